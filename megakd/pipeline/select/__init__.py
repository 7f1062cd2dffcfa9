"""Verb: keep the samples that a teacher likes better than a reference does."""
