"""Verbs over data on disk."""
