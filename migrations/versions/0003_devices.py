"""What makes latencies trusted: how good a table is, whether it still holds, and whose turn it is to measure."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

FIT_COLUMNS = ("within_5", "within_10", "spearman", "bias", "noise_floor")


def upgrade() -> None:
    """To this revision."""
    op.create_table(
        "hosts",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("device_id", sa.String(length=32), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("wanted_by", sa.String(length=32), nullable=True),
        sa.Column("wanted_until", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_hosts_device_id_devices"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hosts")),
    )
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.add_column(sa.Column("connection", sa.String(length=64), nullable=True))
    with op.batch_alter_table("lookup_tables", schema=None) as batch_op:
        batch_op.add_column(sa.Column("version", sa.BigInteger(), nullable=False, server_default=sa.text("1")))
        batch_op.add_column(sa.Column("checks", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
        batch_op.add_column(sa.Column("checked_at", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("drift", sa.Double(), nullable=True))
        batch_op.add_column(sa.Column("stale", sa.Text(), nullable=True))
        batch_op.drop_constraint(batch_op.f("uq_lookup_tables_device_id_fingerprint_id"), type_="unique")
        batch_op.create_unique_constraint(
            batch_op.f("uq_lookup_tables_device_id_fingerprint_id_version"), ["device_id", "fingerprint_id", "version"]
        )
    with op.batch_alter_table("table_fits", schema=None) as batch_op:
        for name in FIT_COLUMNS:
            batch_op.add_column(sa.Column(name, sa.Double(), nullable=True))
    op.create_table(
        "pricings",
        sa.Column("device_id", sa.String(length=32), nullable=False),
        sa.Column("space_key", sa.String(length=100), nullable=False),
        sa.Column("source", sa.String(length=200), nullable=False),
        sa.Column("prices", sa.String(length=32), nullable=True),
        sa.Column("structures", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_pricings_device_id_devices"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("device_id", "space_key", name=op.f("pk_pricings")),
    )
    with op.batch_alter_table("structures", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_structures_space_key"))
        batch_op.create_index(batch_op.f("ix_structures_space_key_id"), ["space_key", "id"], unique=False)
    with op.batch_alter_table("structure_latencies", schema=None) as batch_op:
        batch_op.drop_column("table_id")
        batch_op.add_column(sa.Column("prices", sa.String(length=32), nullable=True))


def downgrade() -> None:
    """Back to the revision before; of a fingerprint's tables, only the first version can stay."""
    with op.batch_alter_table("structure_latencies", schema=None) as batch_op:
        batch_op.drop_column("prices")
        batch_op.add_column(sa.Column("table_id", sa.String(length=32), nullable=False, server_default=sa.text("''")))
    with op.batch_alter_table("structures", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_structures_space_key_id"))
        batch_op.create_index(batch_op.f("ix_structures_space_key"), ["space_key"], unique=False)
    op.drop_table("pricings")
    later = "SELECT id FROM lookup_tables WHERE version > 1"
    op.execute(f"UPDATE devices SET table_id = NULL WHERE table_id IN ({later})")
    for name in ("measurements", "work", "table_fits"):
        op.execute(f"DELETE FROM {name} WHERE table_id IN ({later})")
    op.execute("DELETE FROM lookup_tables WHERE version > 1")
    with op.batch_alter_table("table_fits", schema=None) as batch_op:
        for name in reversed(FIT_COLUMNS):
            batch_op.drop_column(name)
    with op.batch_alter_table("lookup_tables", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_lookup_tables_device_id_fingerprint_id_version"), type_="unique")
        batch_op.create_unique_constraint(
            batch_op.f("uq_lookup_tables_device_id_fingerprint_id"), ["device_id", "fingerprint_id"]
        )
        for name in ("stale", "drift", "checked_at", "checks", "version"):
            batch_op.drop_column(name)
    with op.batch_alter_table("devices", schema=None) as batch_op:
        batch_op.drop_column("connection")
    op.drop_table("hosts")
