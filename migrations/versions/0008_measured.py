"""Which structure a measured network is, and its seconds without the raw values: bounds on latencies ask for them."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
SECOND_PART = {
    "sqlite": "substr(key, instr(key, '|') + 1, 32)",
    "postgresql": "split_part(key, '|', 2)",
}
"""Of a network's key: the structure's id, which has 32 characters."""


def upgrade() -> None:
    """To this revision."""
    with op.batch_alter_table("measurements", schema=None) as batch_op:
        batch_op.add_column(sa.Column("structure_id", sa.String(32), nullable=True))
    part = SECOND_PART[op.get_bind().dialect.name]
    op.execute(f"UPDATE measurements SET structure_id = {part} WHERE kind = 'network'")
    op.create_index("ix_measurements_structure", "measurements", ["table_id", "structure_id", "seconds", "p90"])
    op.create_index("ix_measurements_seconds", "measurements", ["table_id", "seconds", "structure_id"])


def downgrade() -> None:
    """Back to the revision before."""
    op.drop_index("ix_measurements_seconds", "measurements")
    op.drop_index("ix_measurements_structure", "measurements")
    with op.batch_alter_table("measurements", schema=None) as batch_op:
        batch_op.drop_column("structure_id")
