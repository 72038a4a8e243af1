"""Percentiles of measurements, fits and prices; and the structures that answer "best under a bound" at once."""

from typing import Any

import numpy as np
import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

CHUNK = 1000
MEASUREMENTS = sa.table(
    "measurements", sa.column("id", sa.BigInteger()), sa.column("seconds", sa.Double()), sa.column("p90", sa.Double()),
    sa.column("values", sa.JSON()),
)  # fmt: skip


def upgrade() -> None:
    """To this revision; what was measured before has its percentile from its values."""
    with op.batch_alter_table("measurements", schema=None) as batch_op:
        batch_op.add_column(sa.Column("p90", sa.Double(), nullable=True))
    _fill()
    with op.batch_alter_table("structure_latencies", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_structure_latencies_device_id_seconds"))
        batch_op.add_column(sa.Column("p90", sa.Double(), nullable=True))
    with op.batch_alter_table("candidates", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_candidates_space_key_dataset_id_id"), ["space_key", "dataset_id", "id"], unique=False
        )
    with op.batch_alter_table("table_fits", schema=None) as batch_op:
        batch_op.add_column(sa.Column("statistic", sa.String(length=16), nullable=False, server_default="p50"))
        batch_op.drop_constraint(batch_op.f("pk_table_fits"), type_="primary")
        batch_op.create_primary_key(batch_op.f("pk_table_fits"), ["table_id", "space_key", "statistic"])
    op.create_table(
        "skybands",
        sa.Column("space_key", sa.String(length=100), nullable=False),
        sa.Column("dataset_id", sa.String(length=32), nullable=False),
        sa.Column("cost", sa.String(length=40), nullable=False),
        sa.Column("prices", sa.String(length=32), nullable=True),
        sa.Column("upto", sa.BigInteger(), nullable=False),
        sa.Column("members", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("space_key", "dataset_id", "cost", name=op.f("pk_skybands")),
    )


def downgrade() -> None:
    """Back to the revision before."""
    op.drop_table("skybands")
    op.execute("DELETE FROM table_fits WHERE statistic <> 'p50'")
    with op.batch_alter_table("table_fits", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("pk_table_fits"), type_="primary")
        batch_op.create_primary_key(batch_op.f("pk_table_fits"), ["table_id", "space_key"])
        batch_op.drop_column("statistic")
    with op.batch_alter_table("candidates", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_candidates_space_key_dataset_id_id"))
    with op.batch_alter_table("structure_latencies", schema=None) as batch_op:
        batch_op.drop_column("p90")
        batch_op.create_index(
            batch_op.f("ix_structure_latencies_device_id_seconds"), ["device_id", "seconds"], unique=False
        )
    with op.batch_alter_table("measurements", schema=None) as batch_op:
        batch_op.drop_column("p90")


def _fill() -> None:
    connection, last = op.get_bind(), -1
    query = sa.select(MEASUREMENTS).order_by(MEASUREMENTS.c.id).limit(CHUNK)
    while rows := connection.execute(query.where(MEASUREMENTS.c.id > last)).all():
        last = rows[-1].id
        found = [{"row": row.id, "found": _p90(row)} for row in rows if row.values]
        if found:
            change = sa.update(MEASUREMENTS).where(MEASUREMENTS.c.id == sa.bindparam("row"))
            connection.execute(change.values(p90=sa.bindparam("found")), found)


def _p90(row: Any) -> float:
    """What `seconds` is less than the values' median, the percentile is less than theirs."""
    median, p90 = (float(value) for value in np.percentile(row.values, (50, 90)))
    return max(float(row.seconds), p90 - (median - float(row.seconds)))
