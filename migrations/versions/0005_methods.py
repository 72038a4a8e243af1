"""Pruning methods besides the search: whose a result is, what masks keep."""

import sqlalchemy as sa
from alembic import op

JOBS = sa.table(
    "jobs", sa.column("id", sa.String()), sa.column("finished_at", sa.Double()), sa.column("memory", sa.JSON())
)

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """To this revision; everything before was found by MetaPruning."""
    with op.batch_alter_table("candidates", schema=None) as batch_op:
        batch_op.add_column(sa.Column("pruned", sa.JSON(), nullable=True))
    with op.batch_alter_table("results", schema=None) as batch_op:
        batch_op.add_column(sa.Column("method", sa.String(length=16), nullable=False, server_default="metapruning"))
        batch_op.add_column(sa.Column("masks", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("pruned", sa.JSON(), nullable=True))
        batch_op.create_foreign_key(batch_op.f("fk_results_masks_blobs"), "blobs", ["masks"], ["sha256"])
        batch_op.drop_constraint(batch_op.f("uq_results_job_id_structure_id_role"), type_="unique")
        batch_op.create_unique_constraint(
            batch_op.f("uq_results_job_id_method_structure_id_role"), ["job_id", "method", "structure_id", "role"]
        )

    connection = op.get_bind()
    for row in connection.execute(sa.select(JOBS).where(JOBS.c.finished_at.is_(None))).all():
        queue = [{**trial, "method": "metapruning"} for trial in row.memory.get("queue", [])]
        if queue:
            memory = {**row.memory, "queue": queue}
            connection.execute(sa.update(JOBS).where(JOBS.c.id == row.id).values(memory=memory))


def downgrade() -> None:
    """Back to the revision before, which knows one method."""
    op.execute("DELETE FROM results WHERE method <> 'metapruning'")
    op.execute("DELETE FROM candidates WHERE birth = 'pruning'")
    with op.batch_alter_table("results", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("uq_results_job_id_method_structure_id_role"), type_="unique")
        batch_op.create_unique_constraint(
            batch_op.f("uq_results_job_id_structure_id_role"), ["job_id", "structure_id", "role"]
        )
        batch_op.drop_constraint(batch_op.f("fk_results_masks_blobs"), type_="foreignkey")
        batch_op.drop_column("pruned")
        batch_op.drop_column("masks")
        batch_op.drop_column("method")
    with op.batch_alter_table("candidates", schema=None) as batch_op:
        batch_op.drop_column("pruned")
