"""Measurements beyond `diffuspec bench`. Run them from the repository's root."""
