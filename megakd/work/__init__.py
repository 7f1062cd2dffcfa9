"""Machinery of long work: stopping it, sharing it out, resuming it after a kill, and printing its progress."""
