"""Scores of samples: on disk, and as they are compared."""
