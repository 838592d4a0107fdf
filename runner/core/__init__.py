"""Pure judgement: inputs in, effects out. No clock, no I/O, no logging, no randomness."""
