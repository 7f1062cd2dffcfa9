"""Verb ``megakd score``: log-probabilities of every sample of a dataset under a model."""
