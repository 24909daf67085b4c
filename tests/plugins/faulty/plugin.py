"""Entries of the faulty plugin: one method per fault, each named ``<kind>-<fault>``."""

from __future__ import annotations

from methodbench import hookimpl
from methodbench.entries import Method

ROUNDER_FAULTS = (
    "writes", "random", "zeros", "hidden-state", "dense", "not-monotone", "absolute-grid", "neighbours", "wrong-dtype",
)  # fmt: skip
DESCENT_FAULTS = ("forgets", "writes", "ascends", "no-loss")
MAPS_FAULTS = ("hook", "off-target", "batch-scale", "range")


def _of_fault(kind, attribute, fault, **more):
    return Method(
        name=f"{kind}-{fault}", kind=kind, family="faulty",
        impl=f"faulty.methods:{attribute}_{fault.replace('-', '_')}",
        summary="Breaks one promise.", fidelity="baseline", **more,
    )  # fmt: skip


@hookimpl
def methodbench_methods():
    rounders = [
        _of_fault(
            "compressor", "Rounder", fault, applies_to=("causal-lm",),
            properties=(
                "deterministic", "monotone:bits", "idempotent", "scale-equivariant", "channel-permutation-equivariant",
                "batch-split-invariant", "dtype-stable",
            ),
        )
        for fault in ("none", *ROUNDER_FAULTS)
    ]  # fmt: skip
    descents = [
        _of_fault(
            "optimizer", "Descent", fault, properties=("channel-permutation-equivariant", "dtype-stable")
        )
        for fault in ("none", *DESCENT_FAULTS)
    ]
    maps = [
        _of_fault(
            "explainer",
            "Maps",
            fault,
            applies_to=("cnn",),
            properties=("batch-split-invariant", "scale-equivariant"),
        )
        for fault in ("none", *MAPS_FAULTS)
    ]
    return [
        *rounders,
        *descents,
        *maps,
        Method(
            name="zeroer", kind="compressor", family="faulty", impl="faulty.methods:Zeroer", summary="no sentence",
            applies_to=("causal-lm",), fidelity="baseline",
            properties=("exact-sparsity:sparsity", "identity-at:sparsity=0", "monotone", "sparkling"),
        ),
        Method(
            name="undescribed", kind="compressor", family="faulty", impl="faulty.methods:Undescribed",
            summary="Has fields that say nothing.", applies_to=("causal-lm",), presets={"third": {"third": 3}},
            fidelity="authors-code",
        ),
        Method(
            name="absent", kind="compressor", family="faulty", impl="faulty.methods:Absent",
            summary="Is not there at all.",
            applies_to=("causal-lm",), fidelity="baseline",
        ),
        Method(
            name="forgiven", kind="optimizer", family="faulty", impl="faulty.methods:Descent_forgets",
            summary="Breaks one promise and says so.", fidelity="baseline",
            expected_failures={"state-dict": "the count of steps is not kept", "runs": "it does run"},
        ),
    ]  # fmt: skip
