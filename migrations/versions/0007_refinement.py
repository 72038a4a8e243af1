"""Layers that a profile's measurements show to be needed, too."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision; profiles of before stay as they are."""
    with op.batch_alter_table("profiles", schema=None) as batch_op:
        batch_op.add_column(sa.Column("refined", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Back to the revision before; what was measured stays in its table."""
    with op.batch_alter_table("profiles", schema=None) as batch_op:
        batch_op.drop_column("refined")
