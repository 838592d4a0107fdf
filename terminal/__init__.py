"""What both command lines print to a terminal, and read from the words typed there."""
