"""Compose adapters on disk: predict, choose weights, compose, measure, save."""
