"""Losses and readings of logits over a vocabulary that is split across a process group."""
