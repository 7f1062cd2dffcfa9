"""Teachers: a model, logits stores, both, or none."""
