"""Verb: runs side by side."""
