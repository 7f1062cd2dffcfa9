"""Hugging Face folders: their configuration, tensors and names, and what these are in megatron's models."""
