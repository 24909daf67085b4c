"""Neuron Path.

Wang, Liu, Ren et al., Discovering Influential Neuron Path in Vision Transformers, ICLR 2025 (2503.09046). One
hidden neuron of each feed-forward network, at the class token, is chosen so that together they have the largest
influence on the class probability. The influence is an integrated gradient along the joint path from zero to the
neurons' own activations; the path is grown greedily, first block first. With a_l [F] the activation in block l,
p_l the neuron chosen there, m steps, and G the gradients of the probability::

    samples of block t: (i/m) a_t;    of blocks l < t: a_l with entry p_l times i/m            i = 0 .. m - 1
    score_j = (sum_i G_t[i, j] + sum_{l<t} sum_i G_l[i, p_l]) (a_t[j] + sum_{l<t} a_l[p_l]) / m
    p_t = argmax_j score_j

The score of a whole path (Joint Attribution Score) follows with every block as in l < t. Beside it are measured
what happens to the probability when the path's neurons are set to zero or doubled, and the same for the path of
the strongest activations and for a random one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench_vision.cam import check_images, check_scores, check_targets

#: What becomes of a block's activation at the class token, [B, F] to [B, F].
Edit = Callable[[Tensor], Tensor]

#: What is measured of every path.
_MEASURED = ("jas", "removed", "enhanced")


@hyperparameters
class NeuronPath:
    """Greedy path of neurons with the largest joint attribution."""

    steps: Annotated[int, Field(ge=1, le=1000, description="points m of the integrated gradient")] = 20
    batch_size: Annotated[int, Field(ge=1, le=1024, description="images at a time; each runs m times")] = 10
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="seed of the random path")] = 0

    def measure(
        self, model: LoadedModel, data: Calibration, ctx: Context
    ) -> Mapping[str, np.ndarray | float]:
        """Explain the class that the model itself ranks first, for each of the images in ``data``.

        Returns:
            Per image the path's joint attribution (``jas``), the change of the probability when it is removed
            or enhanced, and how far these lie above those of the path of the strongest activations and of a
            random one; the share of neurons that two images of one class, and of two, have in common; ``path``
            [images, blocks].

        Raises:
            NotApplicableError: no class token, or a feed-forward network of unknown structure.
            DivergedError: the logits are not finite.
        """
        check_images(model, data.inputs)
        found: dict[str, list[Tensor]] = {}
        paths, classes = [], []
        generator = torch.Generator().manual_seed(self.seed)
        for x in data.inputs.split(self.batch_size):
            with torch.inference_mode():
                logits = model.module(x)
            check_scores(model, logits)
            label = logits.argmax(1)
            hidden = class_token_activations(model, x)
            greedy, _ = greedy_path(model, x, label, hidden, self.steps)
            random = torch.stack(
                [torch.randint(a.shape[1], (len(x),), generator=generator) for a in hidden]
            ).to(x.device)
            strongest = torch.stack([a.argmax(1) for a in hidden])
            before = probability(model, x, label)
            for name, path in (("", greedy), ("-activation", strongest), ("-random", random)):
                jas = joint_attribution(model, x, label, hidden, path, self.steps)
                removed = probability(model, x, label, scaled(path, 0.0))
                enhanced = probability(model, x, label, scaled(path, 2.0))
                for key, part in zip(_MEASURED, (jas, removed - before, enhanced - before), strict=True):
                    found.setdefault(f"{key}{name}", []).append(part.double())
            paths.append(greedy.T)
            classes.append(label)
        same, different = shared_neurons(torch.cat(paths), torch.cat(classes))
        values = {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}
        above = {
            f"{name}-above-{other}": values[name] - values[f"{name}-{other}"]
            for name in _MEASURED
            for other in ("activation", "random")
        }
        return {
            **{name: values[name] for name in _MEASURED},
            **above,
            "shared-same-class": same,
            "shared-other-class": different,
            "path": torch.cat(paths).double().cpu().numpy(),
        }


def class_token_activations(model: LoadedModel, x: Tensor) -> list[Tensor]:
    """Return what enters the second feed-forward layer of each block at the class token, [B, F] per block."""
    seen: dict[str, Tensor] = {}
    names = _second_layers(model)
    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0][:, 0]})
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            model.module(x)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name].detach() for name in names]


def greedy_path(
    model: LoadedModel, x: Tensor, label: Tensor, hidden: Sequence[Tensor], steps: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the chosen neurons, int64 [blocks, B], and every block's scores, [B, F] each.

    Args:
        x: images [B, C, H, W].
        label: int64 [B].
        hidden: of :func:`class_token_activations`.
        steps: m.
    """
    path = torch.empty((0, len(x)), dtype=torch.int64, device=x.device)
    scores = []
    for block, activation in enumerate(hidden):
        ratios = _ratios(steps, activation)
        own = (ratios[:, None, None] * activation).flatten(0, 1)
        samples = [*_path_samples(hidden[:block], path, steps), own]
        *before, gradient = _gradients(model, x, label, samples, steps)
        influence = gradient.sum(0) + _on_path(before, path).sum(0)[:, None]
        distance = (activation + _on_path([a[None] for a in hidden[:block]], path).sum(0)[:, None]) / steps
        scores.append(influence * distance)
        path = torch.cat([path, scores[-1].argmax(1)[None]])
    return path, scores


def joint_attribution(
    model: LoadedModel, x: Tensor, label: Tensor, hidden: Sequence[Tensor], path: Tensor, steps: int
) -> Tensor:
    """Return the Joint Attribution Score of a path [blocks, B] of neurons, [B]."""
    gradients = _gradients(model, x, label, _path_samples(hidden, path, steps), steps)
    total = _on_path(gradients, path).sum(0)
    return total * _on_path([a[None] for a in hidden], path).sum(0) / steps


def scaled(path: Tensor, factor: float) -> list[Edit]:
    """Return the edits that multiply the neurons of a path [blocks, B] by ``factor``, block after block."""

    def edit(activation: Tensor, neuron: Tensor) -> Tensor:
        return activation.scatter(1, neuron[:, None], factor * activation.gather(1, neuron[:, None]))

    return [functools.partial(edit, neuron=neuron) for neuron in path]


def probability(model: LoadedModel, x: Tensor, label: Tensor, edits: Sequence[Edit] = ()) -> Tensor:
    """Return the probability [B] of the classes."""
    with torch.no_grad():
        return class_logits(model, x, edits).softmax(1).gather(1, label[:, None])[:, 0]


def class_logits(model: LoadedModel, x: Tensor, edits: Sequence[Edit] = ()) -> Tensor:
    """Return logits [B, K] while the first blocks' activations at the class token are edited, one edit per block."""
    with _edited(model, edits):
        return model.module(x)


def shared_neurons(paths: Tensor, classes: Tensor) -> tuple[float, float]:
    """Return the share of neurons that two images have in common: of one class, and of two classes.

    Args:
        paths: int64 [images, blocks].
        classes: int64 [images].

    Returns:
        Means over pairs; 0 where there is no such pair.
    """
    equal = (paths[:, None] == paths[None]).double().mean(2)
    same = classes[:, None] == classes[None]
    pairs = torch.ones_like(same).triu(1).bool()
    means = [equal[pairs & chosen] for chosen in (same, ~same)]
    return tuple(float(part.mean()) if part.numel() else 0.0 for part in means)  # type: ignore[return-value]


def _second_layers(model: LoadedModel) -> list[str]:
    """Return the names of the second feed-forward layers, one per block.

    Raises:
        NotApplicableError: a block has another number of them, or the model no class token.
    """
    adapter, module = model.adapter, model.module
    if not adapter.prefix_tokens(module):
        raise NotApplicableError(
            f"{model.name} has no class token, at which the neurons of a path are read",
            "Use a vision transformer whose head reads a class token.",
        )
    names = []
    for block_name, block in zip(adapter.block_names(module), adapter.blocks(module), strict=True):
        second = [name for name in adapter.linears(block) if adapter.role(name) == "fc2"]
        if len(second) != 1:
            raise NotApplicableError(
                f"block {block_name} of {model.name} has {len(second)} second feed-forward layers, not one"
            )
        names.append(f"{block_name}.{second[0]}")
    return names


@contextmanager
def _edited(model: LoadedModel, edits: Sequence[Edit]) -> Iterator[None]:
    def apply(args: tuple[Tensor, ...], edit: Edit) -> tuple[Tensor, ...]:
        (tokens,) = args
        return (torch.cat([edit(tokens[:, 0])[:, None].to(tokens.dtype), tokens[:, 1:]], dim=1),)

    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, edit=edit: apply(args, edit)
        )
        for name, edit in zip(_second_layers(model), edits, strict=False)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ratios(steps: int, like: Tensor) -> Tensor:
    return torch.arange(steps, device=like.device, dtype=like.dtype) / steps


def _path_samples(hidden: Sequence[Tensor], path: Tensor, steps: int) -> list[Tensor]:
    """Return samples [m B, F] per block: only the path's neuron runs from 0 towards its activation."""
    samples = []
    for activation, neuron in zip(hidden, path, strict=True):
        at = neuron[None, :, None].expand(steps, -1, 1)
        moved = _ratios(steps, activation)[:, None] * activation.gather(1, neuron[:, None])[:, 0]
        samples.append(activation.expand(steps, -1, -1).scatter(2, at, moved[:, :, None]).flatten(0, 1))
    return samples


def _gradients(
    model: LoadedModel, x: Tensor, label: Tensor, samples: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Return dP/d(sample) per block, [m, B, F] each, in one pass over the m-fold batch."""
    leaves = [sample.detach().requires_grad_() for sample in samples]
    repeated = label.repeat(steps)
    with torch.enable_grad():
        replaced: list[Edit] = [lambda _, leaf=leaf: leaf for leaf in leaves]  # type: ignore[misc]
        logits = class_logits(model, x.repeat(steps, 1, 1, 1), replaced)
        check_targets(logits, repeated, len(repeated))
        total = logits.softmax(1).gather(1, repeated[:, None]).sum()
        gradients = torch.autograd.grad(total, leaves)
    return [gradient.unflatten(0, (steps, len(x))) for gradient in gradients]


def _on_path(values: Sequence[Tensor], path: Tensor) -> Tensor:
    """Return the sum over the first axis of values [m, B, F] per block at the path's neurons: [blocks, B]."""
    if not values:
        return torch.zeros((1, path.shape[1]), device=path.device)
    parts = [value.sum(0).gather(1, p[:, None])[:, 0] for value, p in zip(values, path, strict=True)]
    return torch.stack(parts)
