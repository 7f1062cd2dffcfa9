"""Scores of samples: on disk, and opened together for comparison."""
