"""The folder of a training run, read back."""
