"""Results on disk: files that are whole or absent, their manifests, and locks."""
