"""Tasks on language models: perplexity, and any task of lm-eval by its name."""

from __future__ import annotations

from methodbench.entries import Metric, Task

_KINDS = ("compressor",)
_ACCEPTS = ("causal-lm",)
_PREFIX = "lm-eval:"

_PERPLEXITY = Metric(name="perplexity", direction="lower", aggregate="exp-mean", primary=True)
_ACC = Metric(name="acc", direction="higher", title="accuracy", primary=True)
_ACC_NORM = Metric(name="acc_norm", direction="higher", title="accuracy, normalized by length")
_EXACT_MATCH = Metric(name="exact_match", direction="higher", title="exact match", primary=True)
_SCORE = Metric(name="score", direction="higher", title="first metric, higher is better", primary=True)
#: A probe names its own numbers; the first of them is repeated under this name.
_PROBED = Metric(name="score", direction="lower", title="first number of the probe", primary=True)

#: Metrics of tasks that are known beforehand, by the beginning of lm-eval's name. The metrics of every other
#: task come with its results; the first of them is repeated as ``score``.
_METRICS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("piqa", (_ACC, _ACC_NORM)),
    ("blimp_", (_ACC,)),
    ("gsm8k", (_EXACT_MATCH,)),
)

TASKS: list[Task] = [
    Task(
        name="pydoc-ppl",
        kinds=_KINDS,
        accepts=_ACCEPTS,
        impl="methodbench_quant.tasks.perplexity:Perplexity",
        summary="Perplexity on the language reference that ships with Python (8 windows of 512 tokens).",
        metrics=(_PERPLEXITY,),
        protocol=1,
        data="builtin:pydoc-topics",
        options={"text": "pydoc", "windows": 8},
        extra="quant",
    ),
    Task(
        name="wikitext2-ppl",
        kinds=_KINDS,
        accepts=_ACCEPTS,
        impl="methodbench_quant.tasks.perplexity:Perplexity",
        # No source: the implementation pins the text by its digest, from wherever it comes.
        summary="Perplexity on the test set of WikiText-2, the tokenized release (4 windows of 512 tokens).",
        metrics=(_PERPLEXITY,),
        protocol=1,
        options={"text": "wikitext2"},
        extra="quant",
    ),
    Task(
        name="decode-speed",
        kinds=_KINDS,
        accepts=_ACCEPTS,
        impl="methodbench_quant.tasks.decode_speed:DecodeSpeed",
        summary="Tokens per second of greedy decoding, batch 1, in turn with the dense model.",
        metrics=(
            Metric(
                name="speedup",
                direction="higher",
                title="decode speed over dense",
                aggregate="median",
                primary=True,
            ),
            Metric(
                name="tokens_per_second",
                direction="higher",
                title="decode speed",
                unit="tokens/s",
                aggregate="median",
            ),
            Metric(
                name="dense_tokens_per_second",
                direction="higher",
                title="decode speed of the dense model beside it",
                unit="tokens/s",
                aggregate="median",
            ),
        ),
        protocol=1,
        data="builtin:pydoc-topics",
        extra="quant",
    ),
    Task(
        name="pydoc-probe",
        kinds=("probe",),
        accepts=_ACCEPTS,
        impl="methodbench_quant.tasks.probing:Probing",
        summary="Hands the language reference that ships with Python to a probe (8 windows of 512 tokens).",
        metrics=(_PROBED,),
        protocol=1,
        data="builtin:pydoc-topics",
        options={"text": "pydoc", "windows": 8},
        extra="quant",
    ),
]


def task_named(name: str) -> Task | None:
    """Describe ``lm-eval:<task>``, any task that lm-eval knows by name; None for other names."""
    if not name.startswith(_PREFIX) or name == _PREFIX:
        return None
    task = name.removeprefix(_PREFIX)
    metrics = next((metrics for start, metrics in _METRICS if task.startswith(start)), (_SCORE,))
    options = {"task": task, "first_as": _SCORE.name} if metrics == (_SCORE,) else {"task": task}
    return Task(
        name=name,
        kinds=_KINDS,
        accepts=_ACCEPTS,
        impl="methodbench_quant.tasks.lm_eval_task:LMEvalTask",
        summary=f"{task}, as lm-eval defines it.",
        metrics=metrics,
        protocol=1,
        options=options,
        extra="quant",
    )
