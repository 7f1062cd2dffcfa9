"""A frozen model over every sample of a dataset: what `score`, `capture` and `proxy` share."""
