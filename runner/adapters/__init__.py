"""Edges: one file per outside thing; each maps foreign exceptions to ours."""
