"""Makes the normative vectors of protocol/vectors from the code that they describe."""
