"""megakd: pre-training knowledge distillation at Megatron scale. Importing it loads nothing but the version."""

__version__ = "0.1.0"
