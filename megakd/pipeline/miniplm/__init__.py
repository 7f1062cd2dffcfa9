"""Verb: MiniPLM's own shards and scores, imported."""
