"""The work on one chunk of logits: one implementation a file."""
