"""A frozen model over every sample of a dataset: machinery that score, capture and proxy share."""
