"""A run on disk: reading, writing, and what made it."""
