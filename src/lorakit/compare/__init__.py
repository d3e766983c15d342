"""Several methods on one task under one budget: `lorakit compare`."""
