"""Nouns: tokens on disk."""
