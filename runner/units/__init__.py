"""Units for service managers, as package data: `runner service install` fills them in."""
