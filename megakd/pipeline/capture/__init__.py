"""Verbs ``megakd capture`` and ``megakd collect``: logits stores, from a frozen model or from a run's journal."""
