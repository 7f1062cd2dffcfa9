"""Samples: the ways in which a dataset is cut into training sequences."""
