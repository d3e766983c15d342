"""Adapters into one adapter: sums, sparse sums and interpolations of their changes."""
