"""Measure a model: answers, likelihoods, metrics, and how sure each number is."""
