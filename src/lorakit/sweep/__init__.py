"""Many adapters over one frozen base, trained in one batch: grids, random search, halving."""
