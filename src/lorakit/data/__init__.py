"""Rows from files or the hub, and what a model learns from them."""
