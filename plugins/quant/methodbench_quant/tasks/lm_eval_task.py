"""Any task of lm-eval, scored through :class:`~methodbench_quant.tasks.batched_lm.BatchedLM`.

lm-eval makes the prompts, chooses the few-shot examples, filters the answers and defines the metrics; its
version is recorded. Metrics that lm-eval averages over samples come as one score per sample, in the order of
the documents, so that methods can be compared sample by sample; other metrics come as the one number that
lm-eval computes.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from methodbench.context import Context
from methodbench.entries import Metric
from methodbench.errors import MissingExtraError, NotApplicableError, SourceError, UnknownNameError
from methodbench.params import hyperparameters
from methodbench.protocols import Evaluation, Scores
from methodbench.sources import cache_dir
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.packed import materialized
from methodbench_quant.tasks.local_data import LocalData, local_data
from methodbench_quant.tasks.texts import calibration_text
from methodbench_quant.tasks.tokens import draw_calibration, tokenizer_digest

_FEW_SHOT_SEED = 1234


@hyperparameters
class LMEvalTask:
    """One task, tag or group of lm-eval by its name; calibrates on docstrings."""

    task: Annotated[str, Field(min_length=1, description="lm-eval's name of a task, tag or group")]
    limit: Annotated[int, Field(ge=0, description="documents of each task; 0 for all")] = 0
    num_fewshot: Annotated[int | None, Field(ge=0, description="examples in a prompt; none: the task's")] = (
        None
    )
    first_as: Annotated[str, Field(description="name that repeats the first metric, higher is better")] = ""
    calibration_samples: Annotated[int, Field(ge=1, le=4096, description="sequences for calibration")] = 16
    calibration_length: Annotated[int, Field(ge=2, le=131072, description="tokens of each")] = 512

    def calibration(self, model: LoadedModel, ctx: Context) -> Calibration:
        """Return token ids [calibration_samples, calibration_length] drawn with ``ctx.seed``.

        Raises:
            ParameterError: the text is too short for so many sequences.
        """
        samples, length = self.calibration_samples, self.calibration_length
        return draw_calibration(calibration_text("pydoc"), model.tokenizer, samples, length, ctx)

    def evaluate(self, model: LoadedModel, ctx: Context) -> Evaluation:
        """Return every metric of the task.

        Raises:
            UnknownNameError: lm-eval has no such task.
            SourceError: its data can neither be found here nor fetched.
            NotApplicableError: the task runs generated code, or a request does not fit the model.
        """
        try:
            import lm_eval
        except ImportError as error:
            raise MissingExtraError(f"lm-eval:{self.task}", "lm-eval", "methodbench[quant]") from error
        from methodbench_quant.tasks.batched_lm import BatchedLM

        cache = (ctx.cache or cache_dir()) / "lm-eval"
        local = local_data(self.task, cache)
        if local is not None and local.remark:
            ctx.warn(local.remark)
        with ctx.phase("prompts"):
            loaded = self._load(local)
        lm = BatchedLM(model, seed=ctx.seed)
        with materialized(model.module):
            results = lm_eval.evaluate(
                lm=lm, task_dict=loaded, limit=self.limit or None, bootstrap_iters=0, log_samples=True
            )
        scores = _scores(results, loaded["tasks"], self.first_as)
        return Evaluation(
            scores=scores,
            facts={
                "lm_eval": importlib.metadata.version("lm-eval"),
                "versions": {name: results["versions"].get(name) for name in loaded["tasks"]},
                "documents": {name: len(_documents(results, name)) for name in loaded["tasks"]},
                "num_fewshot": {
                    name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()
                },
                "data": "local files" if local else "hub",
                "data_sha256": local.sha256 if local else "",
                "tokenizer_sha256": tokenizer_digest(model.tokenizer),
                "requests": lm.requests,
            },
            throughput=(lm.requests / lm.seconds, "requests/s"),
        )

    def _load(self, local: LocalData | None) -> dict[str, Any]:
        """Return lm-eval's tasks, ready to make requests."""
        manager = _manager(self.task)
        if self.task not in manager.task_index:
            raise UnknownNameError("lm-eval task", self.task, manager.all_tasks)
        # A group of one is lm-eval's way to change a task's configuration.
        spec = {"group": "local", "task": [{"task": self.task, **local.overrides}]} if local else self.task
        try:
            loaded: dict[str, Any] = dict(manager.load([spec]))
        except Exception as error:  # lm-eval and datasets raise whatever their hub client or parser raises
            raise SourceError(
                f"the data of lm-eval's {self.task} could not be had: {error}",
                "It comes from the Hugging Face hub. Without it, set METHODBENCH_DATA to a folder with "
                "local data (piqa, blimp and gsm8k are read from there).",
            ) from error
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise NotApplicableError(
                    f"{self.task} runs generated programs, which methodbench does not",
                    "Run it with lm-eval itself, in a sandbox.",
                )
            if self.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
        if local:
            loaded.update(groups={}, group_map={})
        return loaded


def _manager(task: str) -> Any:
    """Return a task manager that knows ``task``.

    lm-eval takes seconds to read its thousands of files. A task that one file defines needs only the folder
    of that file; tags, groups and tasks that are made otherwise need them all.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    defines = re.compile(rb"^task:\s*[\"']?%s[\"']?\s*$" % re.escape(task.encode()), re.MULTILINE)
    root = Path(lm_eval.__file__).parent / "tasks"
    files = [path for path in root.rglob("*.yaml") if defines.search(path.read_bytes())]
    if len(files) == 1:
        manager = TaskManager(include_defaults=False, include_path=str(files[0].parent))
        if task in manager.all_subtasks:
            return manager
    return TaskManager()


def _scores(results: Mapping[str, Any], tasks: Mapping[str, Any], first_as: str) -> dict[str, Scores]:
    """Return the scores of all metrics; samples of several tasks follow one another."""
    collected: dict[str, list[Scores]] = {}
    for name, task in tasks.items():
        filters: dict[str, int] = {}
        for key, value in results["results"][name].items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            rank = filters.setdefault(metric, 0)
            filters[metric] += 1
            higher = bool(task.higher_is_better().get(metric, True))
            # Of several ways to read an answer, the first has the metric's own name.
            label = _slug(metric if rank == 0 else f"{metric}-{chosen}")
            collected.setdefault(label, []).append(
                _one(label, float(value), _values(results, name, metric, chosen), higher)
            )
    scores = {label: _joined(parts) for label, parts in collected.items() if len(parts) == len(tasks)}
    if first_as and scores:
        first = next(iter(scores.values()))
        sign = -1.0 if first.metric is not None and first.metric.direction == "lower" else 1.0
        scores[first_as] = Scores(sign * first.values)
    return scores


def _one(label: str, value: float, values: np.ndarray | None, higher: bool) -> Scores:
    """Return one score per sample where lm-eval's number is their mean, else that number alone."""
    per_sample = values is not None and bool(np.isclose(np.mean(values), value, rtol=1e-9, atol=1e-12))
    metric = Metric(
        name=label,
        direction="higher" if higher else "lower",
        aggregate="mean" if per_sample else "single",
    )
    return Scores(values if per_sample and values is not None else np.array([value]), metric)


def _joined(parts: list[Scores]) -> Scores:
    """Return the scores of several tasks as one; single numbers are averaged over tasks."""
    values = np.concatenate([part.values for part in parts])
    metric = parts[0].metric
    if len(parts) > 1 and any(
        part.metric is not None and part.metric.aggregate == "single" for part in parts
    ):
        per_task = [float(part.values.mean()) for part in parts]
        return Scores(np.array([np.mean(per_task)]), metric)
    return Scores(values, metric)


def _values(results: Mapping[str, Any], name: str, metric: str, chosen: str) -> np.ndarray | None:
    """Return the values of one metric by document, or None where a sample's value is not a number."""
    values = [sample.get(metric) for sample in results["samples"][name] if sample["filter"] == chosen]
    if not all(isinstance(value, bool | int | float | np.number) for value in values):
        return None
    return np.array(values, dtype=np.float64)


def _documents(results: Mapping[str, Any], name: str) -> set[int]:
    return {sample["doc_id"] for sample in results["samples"][name]}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "metric"
