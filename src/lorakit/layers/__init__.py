"""Geometry kinds, low-rank factors, the wrapper, and which adapter each row runs."""
