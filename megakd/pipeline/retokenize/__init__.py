"""Verb: a dataset into another tokenizer's ids."""
