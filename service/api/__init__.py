"""Routes: one file per noun, beside its store file."""
