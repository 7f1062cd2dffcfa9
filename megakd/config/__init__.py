"""Configuration: a tree of dataclasses filled from defaults, YAML files and flags."""
