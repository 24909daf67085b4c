"""Entries of the core: the baseline that every compressor is compared with."""

from __future__ import annotations

from methodbench.entries import Family, Method
from methodbench.hookspecs import hookimpl


@hookimpl
def methodbench_families() -> list[Family]:
    return [
        Family(name="baseline", title="Baselines", summary="What a model does when nothing is done to it.")
    ]


@hookimpl
def methodbench_methods() -> list[Method]:
    return [
        Method(
            name="identity",
            kind="compressor",
            family="baseline",
            impl="methodbench.builtin.identity:Identity",
            summary="The dense model, unchanged.",
            applies_to=("*",),
            baseline=True,
            fidelity="baseline",
            properties=(
                "deterministic",
                "no-input-mutation",
                "idempotent",
                "scale-equivariant",
                "dtype-stable",
            ),
        )
    ]
