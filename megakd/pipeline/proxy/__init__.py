"""Verb: fit a small model that predicts differences of scores."""
