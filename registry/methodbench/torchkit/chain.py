"""Compressors one after the other on the same model; see :mod:`methodbench.composition` for names and order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from methodbench.errors import NotApplicableError
from methodbench.torchkit.packed import keeping_unrounded, packed_layers

if TYPE_CHECKING:
    from torch import nn

    from methodbench.context import Context
    from methodbench.protocols import Compressor
    from methodbench.torchkit.model import Calibration, LoadedModel

#: Stages whose methods look at what the layers have become; all others need layers as the dense model has them.
_WORK_ON_REPLACED = frozenset({"compensate", "finetune"})
#: A share of zeros that is lost beyond this is worth a warning.
_LOST_ZEROS = 0.01


class Chain:
    """Applies links in turn; each one calibrates on the inputs as they flow through what the links before it made.

    Args:
        name: of the chain, for messages.
        links: description (``name``, ``stage``) and built compressor of each link.
    """

    def __init__(self, name: str, links: Sequence[tuple[Mapping[str, Any], Compressor]]) -> None:
        self.name = name
        self.links = links

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return what the last link returns; ``facts["links"]`` holds what each one left behind.

        Links find the untouched model in ``ctx.dense``, and compensating ones the weights before rounding in
        :attr:`PackedLayer.unrounded <methodbench.torchkit.packed.PackedLayer>`.

        Raises:
            NotApplicableError: a link has replaced layers by something that the next one does not know.
        """
        ctx.dense = model
        compensated = any(described["stage"] == "compensate" for described, _ in self.links)
        with keeping_unrounded() if compensated else nullcontext():
            result = self._apply(model, data, ctx)
        for layer in packed_layers(result.module).values():
            layer.unrounded = None
        return result

    def _apply(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        current = model
        steps: list[dict[str, Any]] = []
        for described, compressor in self.links:
            if described["stage"] not in _WORK_ON_REPLACED:
                self._check_layers(model, current, described["name"], steps)
            current = compressor.compress(current, data, ctx)
            zeros = zeros_share(current)
            self._check_zeros(described["name"], zeros, steps, ctx)
            steps.append(
                {
                    "method": described["name"],
                    "stage": described["stage"],
                    "storage": current.storage,
                    "zeros_share": zeros,
                }
            )
        current.facts["links"] = steps
        return current

    def _check_layers(
        self, dense: LoadedModel, current: LoadedModel, link: str, steps: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse a model whose layers are no longer those that a method for dense models reads and replaces.

        Layers may have moved (behind a rotation of their input), but not changed their class.
        """
        if not steps:
            return
        before, after = _types(dense), _types(current)
        changed = sorted({kind.__name__ for kind in after} - {kind.__name__ for kind in before})
        if changed or len(after) < len(before):
            made = " and ".join(changed) or "other layers"
            raise NotApplicableError(
                f"{self.name}: {steps[-1]['method']} turns layers of {dense.name} into {made}, and {link} would undo "
                "that by replacing them"
            )

    def _check_zeros(
        self, link: str, zeros: float | None, steps: Sequence[Mapping[str, Any]], ctx: Context
    ) -> None:
        before = steps[-1]["zeros_share"] if steps else None
        if before is not None and zeros is not None and zeros < before - _LOST_ZEROS:
            ctx.warn(
                f"{link} undoes zeros of {steps[-1]['method']}: {before:.1%} of the weights were zero, {zeros:.1%} are"
            )


def _types(model: LoadedModel) -> list[type[nn.Module]]:
    return [type(layer) for layer in model.adapter.targets(model.module).values()]


def zeros_share(model: LoadedModel) -> float | None:
    """Return the share of weights that are exactly zero, as the compressible layers compute with them.

    Returns:
        None where a layer does not show its weight.
    """
    zeros = total = 0
    for layer in model.adapter.targets(model.module).values():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return None
        zeros += weight.numel() - int(torch.count_nonzero(weight))
        total += weight.numel()
    return zeros / total if total else None
