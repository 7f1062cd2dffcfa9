"""Verbs that look at datasets and other artefacts, check them, join them, or add to them."""
