"""Saved state that can be trusted: what it is, who wrote it, and that nobody else has read or changed it."""
