"""Verb: what refining and distilling cost, and whether they pay."""
