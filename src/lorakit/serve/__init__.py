"""Serve many adapters over one base: requests, scheduler, cache, pool of adapters, engine."""
