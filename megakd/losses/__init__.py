"""Nouns: numerics over a vocabulary split across a group."""
