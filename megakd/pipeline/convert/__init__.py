"""``megakd convert``: models between Hugging Face folders and checkpoints."""
