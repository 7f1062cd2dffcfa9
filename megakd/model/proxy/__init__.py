"""The proxy scorer: a small model with a head that makes one number of a sample."""
