"""Verb ``megakd generate``: what a model writes behind prompts."""
