"""From a request to a plan to a live adapter, and back into weights."""
