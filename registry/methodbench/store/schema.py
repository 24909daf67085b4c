"""Tables of the result database.

One row of :class:`Run` is one attempt at one cell; its metrics, with every per-unit score, are rows of
:class:`MetricValue`; curves are rows of :class:`Series`. An :class:`Environment` is stored once per digest. A
:class:`Fingerprint` says what the model's blocks held and gave; a :class:`Witness` what a replay came to. A
:class:`Driver` is a process that runs cells, and a :class:`Claim` says which cells it has taken.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import JSON, BigInteger, Column, Index, LargeBinary
from sqlmodel import Field, SQLModel

#: Newest revision of the schema; the last file of ``migrations/versions`` carries the same.
SCHEMA_REVISION = "0002"


class Environment(SQLModel, table=True):
    """Machine and software that runs were made with."""

    __tablename__ = "environment"

    digest: str = Field(primary_key=True)
    """sha256 over the canonical JSON of ``data``."""
    captured_at: datetime
    """UTC."""
    data: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """Interpreter, packages, processor, memory, accelerator, thread counts, relevant variables, commit."""


class Run(SQLModel, table=True):
    """One attempt at one cell."""

    __tablename__ = "run"
    __table_args__ = (
        Index("ix_run_cell_status", "cell_key", "status"),
        Index("ix_run_started_at", "witness_of", "started_at", "id"),
    )

    id: str = Field(primary_key=True)
    """Random, 12 hexadecimal digits."""
    cell_key: str = Field(index=True)
    """Identity of the cell: sha256 over ``identity``; see :meth:`methodbench.engine.cell.Cell.identity`."""
    identity: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """The fields that ``cell_key`` is the digest of."""
    status: str
    """``ok``, ``failed``, ``timeout``, ``oom`` or ``not-applicable``."""
    reason: str = ""
    """Why the status is not ``ok``, in one sentence."""

    method: str = Field(index=True)
    """Name of the method, or of a chain of compressors."""
    kind: str
    """Kind of the method."""
    family: str = Field(index=True)
    """Board of the method."""
    baseline: bool = False
    """True for the do-nothing row that others are compared with."""
    variant: str = ""
    """How the configuration is called in the suite: a preset, or the parameters that differ from the defaults."""
    params_passed: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """Hyperparameters as the suite gave them."""
    params: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """Hyperparameters with every default filled in."""

    model: str = Field(default="", index=True)
    """Empty where the task brings its own."""
    model_kind: str = ""
    """Kind of the model: ``causal-lm``, ``vit``, ``cnn`` ...; empty without a model."""

    task: str = Field(index=True)
    """Name of the task."""
    task_params: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """Settings of the protocol with every default filled in."""
    task_passed: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    """Settings of the protocol as the suite gave them; None in records of schema 0001, which did not keep them."""
    protocol: int
    """Version of the task's procedure."""

    seed: int = 0
    """Seed that every random number of the cell is drawn under."""
    dtype: str = "float32"
    """Floating-point type of models and tensors."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""
    threads: int = 1
    """CPU threads that the cell computed with."""

    method_digest: str = ""
    """sha256 over the source files of the method."""
    weights_digest: str = ""
    """Identity of the model's weights and loader."""
    data_digest: str = ""
    """Identity of the task's data source."""
    environment_digest: str = Field(default="", foreign_key="environment.digest")
    """Digest of the environment that the run was made in; see :class:`Environment`."""
    methodbench_version: str = ""
    """Version of methodbench that made the run."""

    suite: str = ""
    """Suite that made the run."""
    command: str = ""
    """Command line that repeats it."""
    started_at: datetime
    """UTC."""
    wall_seconds: float = 0.0
    """Seconds of wall-clock time that the cell took."""
    phases: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    """Wall-clock seconds by phase: load, calibrate, compress, evaluate ..."""
    peak_memory_bytes: int | None = None
    """Largest resident set of the worker process."""

    storage: str = ""
    """``dense``, ``real`` or ``simulated``; empty where no model is compressed."""
    model_bytes: int | None = None
    """Bytes that the module's tensors occupy."""
    bits_per_weight: float | None = None
    """Measured, over the layers that compressors may touch."""
    accounted_bits: float | None = None
    """Bits per weight that a simulated format would take."""
    throughput: float | None = None
    """Units per second of the evaluation; None where the task does not time it."""
    throughput_unit: str = ""
    """What ``throughput`` counts, for example ``tokens/s``."""

    facts: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
    """What protocol and method came to: token counts, digests, layers touched."""
    warnings: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    """What a reader of the result should know; shown on the run's page."""
    log_tail: str = ""
    """Last 8,000 characters of the worker's output."""
    witness_of: str | None = Field(default=None, index=True)
    """Id of the run that this one repeats. A witness stands beside that run and never takes its place: plans,
    results and boards leave it out."""

    wheel: str = Field(default="", sa_column_kwargs={"server_default": ""})
    """Distribution that the method came from: name, version and digest of its files; see ``provenance.wheel``."""
    seal: str = Field(default="", index=True, sa_column_kwargs={"server_default": ""})
    """Digest of the whole record, its metrics and curves included; empty in records of schema 0001."""


class MetricValue(SQLModel, table=True):
    """One metric of one run."""

    __tablename__ = "metric"

    run_id: str = Field(primary_key=True, foreign_key="run.id")
    """Run that it belongs to."""
    name: str = Field(primary_key=True)
    """Name of the metric."""
    title: str = ""
    """What the board calls it; empty where the name will do."""
    unit: str = ""
    """Unit of ``value``, ``low`` and ``high``; empty where there is none."""
    direction: str = "lower"
    """``lower`` or ``higher``: which is better."""
    aggregate: str = "mean"
    """How ``value`` follows from the scores: ``mean``, ``exp-mean`` (exponential of it), ``median``, ``single``."""
    primary: bool = False
    """True for the metric that the task ranks by."""
    value: float | None = None
    """None when the score is not a number."""
    low: float | None = None
    """Lower end of the 95 % bootstrap interval; None for a single score."""
    high: float | None = None
    """Upper end of the same interval."""
    units: int = 1
    """How many per-unit scores there are."""
    scores: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    """Per-unit scores, little-endian float64."""

    def unit_scores(self) -> np.ndarray:
        """Return the per-unit scores as float64 [units]."""
        return np.frombuffer(self.scores, dtype="<f8")


class Series(SQLModel, table=True):
    """A curve of one run: loss per step, trajectory."""

    __tablename__ = "series"

    run_id: str = Field(primary_key=True, foreign_key="run.id")
    """Run that it belongs to."""
    name: str = Field(primary_key=True)
    """Name of the curve."""
    values: bytes = Field(default=b"", sa_column=Column(LargeBinary, nullable=False))
    """Little-endian float64."""

    def points(self) -> np.ndarray:
        """Return the curve as float64 [points]."""
        return np.frombuffer(self.values, dtype="<f8")


class Fingerprint(SQLModel, table=True):
    """What the parts of a run's model held and gave, small enough to keep with every run."""

    __tablename__ = "fingerprint"

    run_id: str = Field(primary_key=True, foreign_key="run.id")
    """Run that it belongs to."""
    marks: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    """In the order of the computation; see :class:`methodbench.torchkit.fingerprints.Mark`."""


class Witness(SQLModel, table=True):
    """What a replay came to; its numbers are a :class:`Run` of their own."""

    __tablename__ = "witness"

    run_id: str = Field(primary_key=True, foreign_key="run.id")
    """The replay's own run."""
    original: str = Field(foreign_key="run.id", index=True)
    """The run that was replayed."""
    verdict: str
    """``bit-identical``, ``within tolerance`` or ``drifted``."""
    tolerance: float
    """Largest difference of a metric, relative to its recorded value, that counts as within tolerance."""
    parts_at: str = ""
    """First layer, step or unit where the two part; empty where they do not."""
    differences: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    """Metrics whose scores differ: ``metric``, values ``first`` and ``second``, ``units`` that differ, ``of`` all."""
    suspects: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    """What differs between the two environments and sources: ``field``, ``recorded``, ``replayed``."""


class Driver(SQLModel, table=True):
    """A process that runs cells of this database. It removes its row when it ends well."""

    __tablename__ = "driver"

    id: str = Field(primary_key=True)
    """Random, 12 hexadecimal digits."""
    host: str
    """Name of the machine."""
    place: str
    """What makes ``pid`` unique: machine, boot and process namespace."""
    pid: int = Field(sa_type=BigInteger)
    """Process id."""
    process_started: float
    """Start of the process as the system tells it; another process with the same pid has another."""
    started_at: datetime
    """UTC."""
    beats: int = Field(default=0, sa_type=BigInteger)
    """Counts up while the driver lives. Others watch it with their own clocks, so no two clocks need agree."""


class Claim(SQLModel, table=True):
    """A cell that a driver has taken; others leave it alone while that driver lives."""

    __tablename__ = "claim"

    cell_key: str = Field(primary_key=True)
    """Identity of the cell."""
    driver_id: str = Field(foreign_key="driver.id", index=True)
    """Driver that has taken it."""
    claimed_at: datetime
    """UTC."""
