"""The local execution runner. Empty on purpose: the shim imports this package and must stay small."""
