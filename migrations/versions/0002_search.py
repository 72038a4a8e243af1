"""What a better and faster search stores."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision."""
    op.create_table(
        "chunks",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("batch", sa.String(length=64), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("environment", sa.Text(), nullable=False),
        sa.Column("encodings", sa.JSON(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=True),
        sa.Column("owner", sa.String(length=100), nullable=True),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.CheckConstraint("owner IS NULL OR lease_until IS NOT NULL", name=op.f("ck_chunks_lease")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_chunks_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chunks")),
        sa.UniqueConstraint("job_id", "batch", "position", name=op.f("uq_chunks_job_id_batch_position")),
    )
    with op.batch_alter_table("pruning_nets", schema=None) as batch_op:
        batch_op.add_column(sa.Column("fidelity", sa.JSON(), nullable=False, server_default=sa.text("'[]'")))
    with op.batch_alter_table("results", schema=None) as batch_op:
        batch_op.add_column(sa.Column("recipe", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("reused", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch_op.create_index(batch_op.f("ix_results_recipe"), ["recipe"], unique=False)


def downgrade() -> None:
    """Back to the revision before."""
    with op.batch_alter_table("results", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_results_recipe"))
        batch_op.drop_column("reused")
        batch_op.drop_column("recipe")
    with op.batch_alter_table("pruning_nets", schema=None) as batch_op:
        batch_op.drop_column("fidelity")
    op.drop_table("chunks")
