"""Families of models in Hugging Face's form, a table each: names, layout and defaults of their classes. No torch."""
