"""Verbs: a teacher's output distribution to a logits store, from a frozen model or a run's journal."""
