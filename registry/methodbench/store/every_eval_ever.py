"""Documents of the ``every_eval_ever`` schema (https://github.com/evaleval/every_eval_ever), version 0.3.0.

One document is one evaluation of one model: a run here. What the schema has a field for goes there; the record as a
whole travels in ``eval_library.additional_details``, so that a document of ours comes back as the record it was, seal
and all. A document of another program becomes one run per evaluation, of the method ``published``: its numbers stand
beside ours, and its single score per metric says that there is nothing to pair.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from methodbench.errors import CapsuleError
from methodbench.provenance import canonical_json, digest
from methodbench.store import capsule, records
from methodbench.store.capsule import Content
from methodbench.store.records import Record
from methodbench.store.schema import Environment, MetricValue, Run

SCHEMA_VERSION = "0.3.0"

#: Largest document, in bytes.
MAX_BYTES = 256 << 20
_OURS = "methodbench"


def document(record: Record, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of one run that is ``ok``.

    Metrics without a finite value are left out: the schema has no number for them.
    """
    run = record.run
    when = str(int(run["started_at"].timestamp()))
    model = run["model"] or run["task"]
    name = f"{run['method']} {run['variant']}".strip()
    metrics = [row for row in record.children.get("metric", []) if _finite(row["value"])]
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{run['task']}/{model}/{run['seal']}",
        "evaluation_timestamp": when,
        "retrieved_timestamp": when,
        "source_metadata": {
            "source_name": "methodbench",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {
            "name": "methodbench",
            "version": run["methodbench_version"] or "unknown",
            "additional_details": {_OURS: canonical_json(_packed(record, environment))},
        },
        "model_info": {
            "name": f"{model} ({name})",
            "id": model,
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "unknown",
                "method": run["method"],
                "variant": run["variant"],
                "method_params": canonical_json(run["params"]),
                "dtype": run["dtype"],
                "weights_digest": run["weights_digest"],
            },
        },
        "evaluation_results": [_result(run, metric) for metric in metrics],
    }


def _result(run: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    scores = np.frombuffer(metric["scores"], "<f8")
    uncertainty: dict[str, Any] = {"num_samples": int(metric["units"])}
    if _finite(metric["low"]) and _finite(metric["high"]):
        uncertainty["confidence_interval"] = {
            "lower": metric["low"],
            "upper": metric["high"],
            "confidence_level": 0.95,
            "method": "bootstrap",
        }
    if len(scores) > 1 and np.isfinite(scores).all():
        uncertainty["standard_deviation"] = float(scores.std(ddof=1))
    return {
        "evaluation_result_id": f"{run['seal']}/{metric['name']}",
        "evaluation_name": run["task"],
        "source_data": {
            "dataset_name": run["task"],
            "source_type": "other",
            "additional_details": {"data_digest": run["data_digest"], "protocol": str(run["protocol"])},
        },
        "metric_config": {
            "metric_id": metric["name"],
            "metric_name": metric["title"] or metric["name"],
            "metric_unit": metric["unit"],
            "lower_is_better": metric["direction"] == "lower",
            "score_type": "continuous",
            "min_score": "-Infinity",
            "max_score": "Infinity",
            "additional_details": {
                "aggregate": metric["aggregate"],
                "primary": str(metric["primary"]).lower(),
            },
        },
        "score_details": {
            "score": metric["value"],
            "details": {"seed": str(run["seed"])},
            "uncertainty": uncertainty,
        },
    }


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _packed(record: Record, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as the members of a capsule of its own, as text."""
    alone = Record(
        {**record.run, "witness_of": None},
        {
            table.name: record.children[table.name]
            for table in records.SEALED
            if table.name in record.children
        },
    )
    content = Content([alone], [dict(environment)])
    # JSON has no bytes: the arrays travel as hexadecimal digits instead of Parquet.
    return {
        "environment": capsule.table_rows(records.ENVIRONMENT, content.environments),
        "run": capsule.table_rows(records.RUN, [alone.run]),
        **{
            table.name: capsule.table_rows(table, alone.children[table.name], arrays=True)
            for table in records.SEALED
            if table.name in alone.children
        },
    }


def write_documents(content: Content, folder: Path) -> list[Path]:
    """Write one document per run that is ``ok`` into ``folder``; return the paths."""
    environments = {row["digest"]: row for row in content.environments}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for record in content.records:
            if record.run["status"] != "ok" or record.run["witness_of"] is not None:
                continue
            text = json.dumps(
                document(record, environments[record.run["environment_digest"]]), indent=1, allow_nan=False
            )
            # The collection names documents by a version 4 UUID; the seal makes it the same each time.
            name = uuid.UUID(bytes=bytes.fromhex(record.run["seal"])[:16], version=4)
            path = folder / f"{name}.json"
            path.write_text(text + "\n", encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise CapsuleError(
            f"cannot write into {folder}: {error.strerror}", "Give another folder with --out."
        ) from error
    return written


def read_document(path: Path) -> Content:
    """Read a document, as hostile as a capsule.

    Raises:
        CapsuleError: it is none, or holds what the schema does not allow.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CapsuleError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        value = capsule.parse_json(path.read_bytes())
        found = _content(value)
    except OSError as error:
        raise CapsuleError(f"{path} cannot be read: {error.strerror}") from error
    except capsule.Refused as error:
        raise CapsuleError(f"{path} is no document of every_eval_ever: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CapsuleError(
            f"{path} is no document of every_eval_ever: {type(error).__name__}: {error}"
        ) from error
    return found


def _content(value: Any) -> Content:
    if not isinstance(value, dict) or not str(value.get("schema_version", "")).startswith("0."):
        raise capsule.Refused("no schema_version 0.x")
    for key in ("evaluation_id", "source_metadata", "model_info", "eval_library", "evaluation_results"):
        if key not in value:
            raise capsule.Refused(f"{key} is missing")
    packed = value["eval_library"].get("additional_details", {}).get(_OURS)
    if packed is not None:
        return capsule.content_of_rows(capsule.parse_json(packed.encode()))
    return _foreign(value)


def _foreign(value: Mapping[str, Any]) -> Content:
    source = value["source_metadata"]
    data = {"source": source, "library": value["eval_library"]}
    when = _time(value.get("evaluation_timestamp") or value.get("retrieved_timestamp"))
    environment = records.row_of(Environment(digest=digest(data), captured_at=when, data=data))
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for result in value["evaluation_results"]:
        by_name.setdefault(_text(result["evaluation_name"]), []).append(result)
    found = []
    for name, results in by_name.items():
        identity = {
            "every_eval_ever": _text(value["schema_version"]),
            "evaluation_id": _text(value["evaluation_id"]),
            "evaluation_name": name,
            "results": digest(results),
        }
        key = digest(identity)
        run = Run(
            id=key[:12],
            cell_key=key,
            identity=identity,
            status="ok",
            method="published",
            kind="published",
            family="published",
            params_passed={},
            params={},
            model=_text(value["model_info"]["id"]),
            model_kind="",
            task=name,
            task_params={},
            protocol=0,
            environment_digest=environment["digest"],
            suite=_text(source["source_organization_name"]),
            started_at=when,
            facts={"model_info": value["model_info"], "results": results},
        )
        record = Record(records.row_of(run), {"metric": [_metric(run.id, row) for row in _distinct(results)]})
        record.run["seal"] = records.seal(record)
        found.append(record)
    content = Content(found, [environment])
    # What was made of it is checked like what a capsule holds.
    return capsule.content_of_rows(
        {
            "environment": capsule.table_rows(records.ENVIRONMENT, content.environments),
            "run": capsule.table_rows(records.RUN, [record.run for record in found]),
            "metric": [
                row
                for record in found
                for row in capsule.table_rows(MetricValue.__table__, record.children["metric"], arrays=True)  # type: ignore[attr-defined]
            ],
        }
    )


def _distinct(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the results with names that differ: the schema lets a metric come several times."""
    named: dict[str, Mapping[str, Any]] = {}
    for result in results:
        config = result["metric_config"]
        name = _text(config.get("metric_id") or config.get("metric_name") or "score")
        number = 1
        while (unique := name if number == 1 else f"{name} #{number}") in named:
            number += 1
        named[unique] = result
    return list(named.items())


def _metric(run_id: str, named: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    name, result = named
    config, details = result["metric_config"], result["score_details"]
    interval = details.get("uncertainty", {}).get("confidence_interval", {})
    score = float(details["score"])
    return records.row_of(
        MetricValue(
            run_id=run_id,
            name=name,
            title=_text(config.get("metric_name") or ""),
            unit=_text(config.get("metric_unit") or ""),
            direction="lower" if config["lower_is_better"] is True else "higher",
            primary=True,
            value=score,
            low=interval.get("lower"),
            high=interval.get("upper"),
            units=1,
            scores=np.array([score], dtype="<f8").tobytes(),
        )
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise capsule.Refused(f"text expected, not {type(value).__name__}")
    return value


def _time(value: Any) -> datetime:
    """Read seconds since 1970 or ISO 8601."""
    text = str(value)
    try:
        return datetime.fromtimestamp(float(text), UTC)
    except (ValueError, OverflowError, OSError):
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
