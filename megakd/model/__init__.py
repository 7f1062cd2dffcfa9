"""The megatron seam."""
