"""The loss of a run: what each token weighs in each term."""
