"""Verb: scores and a selection as a page."""
