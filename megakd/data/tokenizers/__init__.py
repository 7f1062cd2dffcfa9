"""Tokenizers: the reference engines, and a fast one that is held to them."""
