"""Verb: score every sample of a dataset under a model."""
