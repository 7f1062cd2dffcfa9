"""The record of a run: console, files, trackers."""
