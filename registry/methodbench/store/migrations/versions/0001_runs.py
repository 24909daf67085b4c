"""Runs, metrics, series and environments.

Revision ID: 0001
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    text: Any = sa.String()
    json: Any = sa.JSON()
    real: Any = sa.Float()
    integer: Any = sa.BigInteger()
    op.create_table(
        "environment",
        sa.Column("digest", text, primary_key=True),
        sa.Column("captured_at", sa.DateTime(), nullable=False),
        sa.Column("data", json, nullable=False),
    )
    required = {
        "id": text, "cell_key": text, "identity": json, "status": text, "reason": text, "method": text, "kind": text,
        "family": text, "baseline": sa.Boolean(), "variant": text, "params_passed": json, "params": json,
        "model": text, "model_kind": text, "task": text, "task_params": json, "protocol": sa.Integer(),
        "seed": integer, "dtype": text, "device": text, "threads": sa.Integer(), "method_digest": text,
        "weights_digest": text, "data_digest": text, "methodbench_version": text, "suite": text, "command": text,
        "started_at": sa.DateTime(), "wall_seconds": real, "phases": json, "storage": text, "throughput_unit": text,
        "facts": json, "warnings": json, "log_tail": text,
    }  # fmt: skip
    optional = {
        "peak_memory_bytes": integer, "model_bytes": integer, "bits_per_weight": real, "accounted_bits": real,
        "throughput": real,
    }  # fmt: skip
    op.create_table(
        "run",
        *(sa.Column(name, kind, nullable=False, primary_key=name == "id") for name, kind in required.items()),
        *(sa.Column(name, kind, nullable=True) for name, kind in optional.items()),
        sa.Column("environment_digest", text, sa.ForeignKey("environment.digest"), nullable=False),
    )
    for column in ("cell_key", "method", "family", "model", "task"):
        op.create_index(f"ix_run_{column}", "run", [column])
    op.create_index("ix_run_cell_status", "run", ["cell_key", "status"])
    op.create_table(
        "metric",
        sa.Column("run_id", text, sa.ForeignKey("run.id"), primary_key=True),
        sa.Column("name", text, primary_key=True),
        sa.Column("title", text, nullable=False),
        sa.Column("unit", text, nullable=False),
        sa.Column("direction", text, nullable=False),
        sa.Column("aggregate", text, nullable=False),
        sa.Column("primary", sa.Boolean(), nullable=False),
        sa.Column("value", real),
        sa.Column("low", real),
        sa.Column("high", real),
        sa.Column("units", sa.Integer(), nullable=False),
        sa.Column("scores", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "series",
        sa.Column("run_id", text, sa.ForeignKey("run.id"), primary_key=True),
        sa.Column("name", text, primary_key=True),
        sa.Column("values", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    for table in ("series", "metric", "run", "environment"):
        op.drop_table(table)
