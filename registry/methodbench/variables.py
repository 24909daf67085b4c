"""Environment variables that methodbench reads."""

from __future__ import annotations

from collections.abc import Mapping

#: Name -> what it is for.
VARIABLES: Mapping[str, str] = {
    "METHODBENCH_DB": (
        "Result database: a path of an SQLite file or an SQLAlchemy URL. `methodbench.db` in the current folder by "
        "default; `--db` comes first."
    ),
    "METHODBENCH_CACHE": (
        "Folder of what can be fetched or made again: weights, prepared models. `methodbench` in the user's cache "
        "folder by default."
    ),
    "METHODBENCH_DATA": "Folders with data sets, separated as in `PATH`; `{data}` in a `file:` source stands for them.",
    "METHODBENCH_MODELS": "Folders with weights, as above; `{models}` in a `file:` source stands for them.",
    "METHODBENCH_OFFLINE": "Forbids every download when it is set, except to `0`, `false`, `no` or `off`.",
    "METHODBENCH_NO_PLUGIN": "Names of plugins to leave out, separated by commas; as `--no-plugin`.",
    "METHODBENCH_IMPORT_BUDGET": "CPU seconds that the import of a plugin's module may take; 0.5 by default.",
    "METHODBENCH_CHECK_EXAMPLES": "Most examples that a check of a property draws; as many as it needs by default.",
    "METHODBENCH_VECTORS": "Folder of parity vectors for tests; `tests/vectors` in the current folder by default.",
}
