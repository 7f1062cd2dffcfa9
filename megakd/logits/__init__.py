"""Logits stores: a teacher's sparse targets on disk."""
