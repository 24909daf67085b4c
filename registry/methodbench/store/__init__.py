"""Records: tables, sessions, migrations. Importing this package imports SQLModel."""

from methodbench.store.database import Finished, Store, Version, open_store
from methodbench.store.schema import (
    SCHEMA_REVISION,
    Claim,
    Driver,
    Environment,
    Fingerprint,
    MetricValue,
    Run,
    Series,
    Witness,
)

__all__ = [
    "SCHEMA_REVISION",
    "Claim",
    "Driver",
    "Environment",
    "Fingerprint",
    "Finished",
    "MetricValue",
    "Run",
    "Series",
    "Store",
    "Version",
    "Witness",
    "open_store",
]
