"""Seconds of measured networks without their raw values, which bounds on latencies ask for."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision."""
    op.create_index("ix_measurements_seconds", "measurements", ["table_id", "kind", "key", "seconds", "p90"])


def downgrade() -> None:
    """Back to the revision before."""
    op.drop_index("ix_measurements_seconds", "measurements")
