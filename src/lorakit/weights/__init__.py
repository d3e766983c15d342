"""Storage of one frozen weight: read it dense, write it back."""
