"""Alembic migrations of the service's database; shipped with it."""
