"""Checkpoints: written, described, read back, and refused when damaged."""
