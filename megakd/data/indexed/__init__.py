"""Megatron's indexed dataset: reading, writing, joining."""
