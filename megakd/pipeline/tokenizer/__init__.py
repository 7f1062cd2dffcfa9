"""Verb: train a tokenizer."""
