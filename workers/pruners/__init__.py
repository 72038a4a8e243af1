"""Pruning of trained networks: pure algorithms that advance in resumable units."""
