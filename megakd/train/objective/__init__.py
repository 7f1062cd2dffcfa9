"""Loss of a run: the weight of each token in each term."""
