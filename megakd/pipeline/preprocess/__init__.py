"""Verb: JSON lines to an indexed dataset."""
