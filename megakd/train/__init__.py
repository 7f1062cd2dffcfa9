"""Verb: train a student."""
