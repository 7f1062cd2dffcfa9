"""Verb ``megakd evaluate``: held-out data, tasks of lm-eval and files of requests under a frozen model."""
