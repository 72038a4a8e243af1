"""What a layer costs in a network beyond its time alone: the weights of a fit's terms."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision; fits of before have no terms."""
    with op.batch_alter_table("table_fits", schema=None) as batch_op:
        batch_op.add_column(sa.Column("terms", sa.JSON(), nullable=False, server_default=sa.text("'{}'")))


def downgrade() -> None:
    """Back to the revision before; fits with terms are no lines, so they go."""
    op.execute("DELETE FROM table_fits WHERE CAST(terms AS VARCHAR(2)) <> '{}'")
    with op.batch_alter_table("table_fits", schema=None) as batch_op:
        batch_op.drop_column("terms")
