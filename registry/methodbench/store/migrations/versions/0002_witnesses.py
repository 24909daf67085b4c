"""What makes records trustworthy: fingerprints, witnesses of replays, seals, drivers and their claims.

Revision ID: 0002
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    text: Any = sa.String()
    json: Any = sa.JSON()
    op.add_column("run", sa.Column("task_passed", json, nullable=True))
    op.add_column("run", sa.Column("witness_of", text, nullable=True))
    op.create_index("ix_run_witness_of", "run", ["witness_of"])
    op.create_index("ix_run_started_at", "run", ["witness_of", "started_at", "id"])
    op.create_table(
        "fingerprint",
        sa.Column("run_id", text, sa.ForeignKey("run.id"), primary_key=True),
        sa.Column("marks", json, nullable=False),
    )
    op.create_table(
        "witness",
        sa.Column("run_id", text, sa.ForeignKey("run.id"), primary_key=True),
        sa.Column("original", text, sa.ForeignKey("run.id"), nullable=False),
        sa.Column("verdict", text, nullable=False),
        sa.Column("tolerance", sa.Float(), nullable=False),
        sa.Column("parts_at", text, nullable=False),
        sa.Column("differences", json, nullable=False),
        sa.Column("suspects", json, nullable=False),
    )
    op.create_index("ix_witness_original", "witness", ["original"])
    for name in ("seal", "wheel"):
        op.add_column("run", sa.Column(name, text, nullable=False, server_default=""))
    op.create_index("ix_run_seal", "run", ["seal"])
    op.create_table(
        "driver",
        sa.Column("id", text, primary_key=True),
        sa.Column("host", text, nullable=False),
        sa.Column("place", text, nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("process_started", sa.Float(), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("beats", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "claim",
        sa.Column("cell_key", text, primary_key=True),
        sa.Column("driver_id", text, sa.ForeignKey("driver.id"), nullable=False),
        sa.Column("claimed_at", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_claim_driver_id", "claim", ["driver_id"])


def downgrade() -> None:
    op.drop_table("claim")
    op.drop_table("driver")
    op.drop_index("ix_run_seal", "run")
    op.drop_table("witness")
    op.drop_table("fingerprint")
    op.drop_index("ix_run_started_at", "run")
    op.drop_index("ix_run_witness_of", "run")
    with op.batch_alter_table("run") as batch:
        for column in ("wheel", "seal", "witness_of"):
            batch.drop_column(column)
        batch.drop_column("task_passed")
