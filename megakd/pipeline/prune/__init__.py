"""Verb ``megakd prune``: a student cut out of a teacher."""
