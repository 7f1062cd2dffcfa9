"""Nouns: what a teacher said, on disk."""
