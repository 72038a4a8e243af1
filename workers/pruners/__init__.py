"""Pruning methods; they know nothing of the service."""
