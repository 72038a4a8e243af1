"""The search spaces: one description each, from which everything else is derived."""
