"""Text files: found, decompressed and read record by record."""
