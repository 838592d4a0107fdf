"""Reference control plane: small, correct, for a laptop, tests and examples."""
