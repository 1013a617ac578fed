"""Coreset selection on arrays: indices and weights."""
