"""The commands of `secateurs`: clients of the HTTP service."""
