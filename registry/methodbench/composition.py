"""Chains of compressors: ``wanda@s50 + rtn@w4g64`` applies one after the other to the same model.

A chain is a :class:`~methodbench.entries.Method` like any other, made when its name is asked for. Its hyperparameters
are those of its links, written ``link.name``, so that plans, records, claims and the command line treat it as they
treat a single method; its identity covers the source and every hyperparameter of every link.

Each compressor declares its stage; a chain goes through the stages in their order::

    transform -> rotate -> prune -> quantize -> compensate -> finetune
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from methodbench.entries import STAGES, Method, Resources
from methodbench.errors import MethodbenchError, ParameterError, UnknownNameError

if TYPE_CHECKING:
    from methodbench.catalog import Catalog

SEPARATOR = " + "
#: Stands for a link without a preset in the name of a chain's preset.
DEFAULT = "default"
IMPLEMENTATION = "methodbench.torchkit.chain:Chain"

#: Why a stage cannot come after one that follows it in the order.
_TOO_LATE: Mapping[str, str] = {
    "transform": "it rescales dense weights",
    "rotate": "it rotates dense weights, and a rotation mixes what was set to zero or put on a grid",
    "prune": "it compares dense weights, and cannot write zeros into codes on a grid",
    "quantize": "it rounds weights, which undoes what was fitted to weights that are rounded already",
    "compensate": "it corrects the error of what comes before it, and finetuning already has",
}
#: Stages that two links of a chain may share.
_REPEATABLE = frozenset({"transform", "rotate", "prune", "finetune"})


class ChainError(MethodbenchError):
    """Links that cannot follow each other; the message says why."""


def is_chain(name: str) -> bool:
    """Return whether a name is that of a chain."""
    return "+" in name


def split_use(text: str) -> tuple[str, str]:
    """Split ``name[@preset]``, or a chain of them, into the name and the preset.

    ``wanda@s50 + rtn@w4`` gives ``("wanda + rtn", "s50 + w4")``, and ``wanda@s50 + rtn`` gives
    ``("wanda + rtn", "s50 + default")``. Without any preset the second part is empty.
    """
    uses = [part.strip().partition("@") for part in text.split("+")]
    names = SEPARATOR.join(name for name, _, _ in uses)
    if not any(preset for _, _, preset in uses):
        return names, ""
    return names, SEPARATOR.join(preset or DEFAULT for _, _, preset in uses)


def compose(catalog: Catalog, name: str) -> Method:
    """Return the entry of the chain called ``name``.

    Raises:
        UnknownNameError: a link that no plugin registers.
        ChainError: links that are no compressors, declare no stage, or stand in an order that makes no sense.
    """
    links = [catalog.method(part.strip()) for part in name.split("+")]
    name = SEPARATOR.join(link.name for link in links)
    for link in links:
        if link.kind != "compressor":
            raise ChainError(f"{name}: {link.name} is a {link.kind}; only compressors can be chained")
        if not link.stage:
            raise ChainError(
                f"{name}: {link.name} declares no stage, so it is unknown what may follow it",
                f"Its entry needs stage=, one of {', '.join(STAGES)}.",
            )
        if sum(other.name == link.name for other in links) > 1:
            raise ChainError(f"{name}: {link.name} appears twice")
    for before, after in pairwise(links):
        _check_order(name, before, after)
    kinds = dict.fromkeys(kind for link in links for kind in link.applies_to)
    return Method(
        name=name,
        kind="compressor",
        family=links[-1].family,
        impl=IMPLEMENTATION,
        summary=" Then: ".join(link.summary for link in links),
        applies_to=tuple(kind for kind in kinds if all(_applies(link, kind) for link in links)),
        needs=tuple(dict.fromkeys(need for link in links for need in link.needs)),
        positions=", ".join(dict.fromkeys(link.positions for link in links if link.positions)),
        properties=("deterministic",) if all("deterministic" in link.properties for link in links) else (),
        resources=Resources(
            cores=max(link.resources.cores for link in links),
            memory=max(link.resources.memory for link in links),
            gpus=max(link.resources.gpus for link in links),
        ),
        links=tuple(links),
    )


def _applies(method: Method, kind: str) -> bool:
    return "*" in method.applies_to or kind in method.applies_to


def _check_order(name: str, before: Method, after: Method) -> None:
    first, second = STAGES.index(before.stage), STAGES.index(after.stage)
    if first > second:
        raise ChainError(
            f"{name}: {after.name} ({after.stage}) cannot follow {before.name} ({before.stage}): "
            f"{_TOO_LATE[after.stage]}",
            f"Write {after.name}{SEPARATOR}{before.name}; the order is {', '.join(STAGES)}.",
        )
    if first == second and before.stage not in _REPEATABLE:
        raise ChainError(
            f"{name}: {before.name} and {after.name} both {before.stage}; the second would take the first one's "
            "result for the original"
        )


def preset_params(method: Method, preset: str) -> dict[str, Any]:
    """Return the hyperparameters of a preset; those of a chain are one preset per link, joined by " + ".

    Raises:
        UnknownNameError: the method, or a link, has no such preset.
    """
    if not method.links:
        if preset not in method.presets:
            raise UnknownNameError(f"preset of {method.name}", preset, method.presets)
        return dict(method.presets[preset])
    parts = [part.strip() for part in preset.split("+")]
    if len(parts) != len(method.links):
        raise ChainError(
            f"{method.name} has {len(method.links)} links, but {preset!r} names {len(parts)} presets",
            f"Name one for each, {DEFAULT!r} where a link has none.",
        )
    found = {}
    for link, part in zip(method.links, parts, strict=True):
        if part != DEFAULT or part in link.presets:
            found.update({f"{link.name}.{key}": value for key, value in preset_params(link, part).items()})
    return found


def link_params(method: Method, params: Mapping[str, Any]) -> list[tuple[Method, dict[str, Any]]]:
    """Split hyperparameters by link; a method that is no chain is its own only link.

    Raises:
        ParameterError: a name without one of the links before its dot.
    """
    if not method.links:
        return [(method, dict(params))]
    of_link: dict[str, dict[str, Any]] = {link.name: {} for link in method.links}
    for key, value in params.items():
        owner = next((name for name in of_link if key.startswith(f"{name}.")), None)
        if owner is None:
            raise ParameterError(
                f"{method.name} has no parameter {key!r}",
                f"Name the link first: {' or '.join(f'{name}.{key}' for name in of_link)}.",
            )
        of_link[owner][key.removeprefix(f"{owner}.")] = value
    return [(link, of_link[link.name]) for link in method.links]


def join_params(method: Method, of_links: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Undo :func:`link_params`."""
    if not method.links:
        return dict(of_links[0])
    return {
        f"{link.name}.{key}": value
        for link, params in zip(method.links, of_links, strict=True)
        for key, value in params.items()
    }


def describe_links(method: Method, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a worker needs to build each link; empty for a method that is no chain."""
    if not method.links:
        return []
    return [
        {"name": link.name, "stage": link.stage, "impl": link.impl, "params": own, "needs": list(link.needs)}
        for link, own in link_params(method, params)
    ]
