"""CFSP: coarse-to-fine structured pruning by activations.

Wang et al., "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
COLING 2025, arXiv 2409.13199; authors' code wyxscir/CFSP (b2d5b13).

Hidden neurons of gated feed-forward networks go, with their rows of the gate and up projections and their column of
the down projection, so that smaller dense layers stay. One pass of the dense model says which:

- *coarse*: blocks that turn the residual stream further keep more. With x and y a token's state before and after
  block l, ``I_l = sum_tokens arccos(cos(x, y)) / pi``, and block l keeps ``z_l / mean(z) (1 - p)`` of its neurons,
  ``z_l = sigmoid(a (I_l - mean(I)) / 1e4)``; where a block would keep more than all, z is drawn towards its mean;
- *fine*: within a block neurons are ranked by ``F_j``, from ``A_j``, the root of their summed squares per sequence.

The authors' score (``score="three_w_one_wa"``) normalizes each weight term by its sum over exactly what it is averaged
over afterwards, so that weights cancel and A alone ranks. The equation of the paper normalizes over neurons
(``score="paper"``, after a restatement by others). The constant 1e4 fits the authors' 131,072 calibration tokens; with
``per_budget`` it follows the tokens that there are.

Recovery: the paper fine-tunes low-rank updates whose ranks follow the kept shares; that part is not in the authors'
code. Here it is ``recovery_steps`` of AdamW on calibration text, with updates merged at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import FeedForward
from methodbench.torchkit.low_rank import LowRankUpdate, merge_updates
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.sequential import walk
from methodbench.torchkit.text_tuning import tune_on_text
from methodbench_sparse.structured import cut, gated_networks, record_widths
from methodbench_sparse.wanda import InputScale

Score = Literal[
    "three_w_one_wa", "paper", "one_wa", "one_a", "three_w_one_a", "wanda_base", "mag_base", "random"
]
Importance = Literal["angular", "cosine", "mse", "mae", "constant"]

#: The authors' calibration tokens, 128 sequences of 1,024, and the divisor of importances that goes with them.
TOKENS = 128 * 1024
DIVISOR = 1e4
#: How far below "all" the block that keeps most stays when z is drawn together, as in the authors' code.
MARGIN = 1.05


@hyperparameters
class CFSP:
    """Cuts hidden neurons out of gated feed-forward networks; what stays are smaller dense layers."""

    sparsity: Annotated[
        float,
        Field(ge=0, lt=1, description="share of hidden neurons that go, mean over blocks; 0 prunes nothing"),
    ] = 0.2
    sharpness: Annotated[
        float, Field(ge=0, le=1e6, description="a, how unequal blocks are treated; 0 cuts all alike")
    ] = 1.0
    importance: Annotated[Importance, Field(description="what a block does to the residual stream")] = (
        "angular"
    )
    score: Annotated[Score, Field(description="how neurons of a block are ranked")] = "three_w_one_wa"
    inner: Annotated[float, Field(gt=0, le=4, description="b, exponent of the norm beside the weights")] = 1.0
    outer: Annotated[float, Field(gt=0, le=4, description="c, exponent of the norm beside the terms")] = 1.0
    multiple: Annotated[
        int, Field(ge=1, le=1024, description="widths are multiples of it, which GPUs like; 1 is free")
    ] = 128
    per_budget: Annotated[
        bool, Field(description="scale the constant 1e4 to the tokens there are; off as in the authors' code")
    ] = True
    recovery_steps: Annotated[int, Field(ge=0, le=100_000, description="steps of fine-tuning; 0: none")] = 0
    recovery_rank: Annotated[int, Field(ge=1, le=1024, description="mean rank of the updates")] = 8
    recovery_tokens: Annotated[
        int, Field(ge=2, le=100_000, description="tokens of a step, from a random place of a sequence")
    ] = 256
    recovery_lr: Annotated[float, Field(gt=0, le=1, description="learning rate of AdamW")] = 1e-4

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the smaller model; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration inputs; blocks without one gated feed-forward network each.
            DivergedError: an activation is not finite.
        """
        if not len(data):
            raise NotApplicableError(
                "cfsp ranks neurons by their activations, and the task gives no calibration data"
            )
        networks = gated_networks(model)
        pruned = model.clone()
        if self.sparsity:
            with ctx.phase("statistics"):
                norms, importances = statistics(pruned, data, networks, self.importance)
            tokens = data.inputs.numel() if self.per_budget else TOKENS
            keep = keep_ratios(importances, self.sparsity, self.sharpness * TOKENS / tokens)
            for network, norm, share in zip(networks, norms, keep.tolist(), strict=True):
                mask = kept(self._scores(pruned, network, norm, ctx), share, self.multiple)
                cut(pruned, network, mask)
            if self.recovery_steps:
                with ctx.phase("recovery"):
                    self._recover(pruned, data, keep, ctx)
        return record_widths(pruned, networks)

    def _scores(self, model: LoadedModel, network: FeedForward, norm: Tensor, ctx: Context) -> Tensor:
        if self.score == "random":
            generator = torch.Generator().manual_seed(ctx.seed)
            return torch.rand(network.neurons, generator=generator).to(norm.device)
        gate, up, down = (
            model.module.get_submodule(name).get_parameter("weight").detach().float()
            for name in (network.first, network.up, network.down)
        )
        return neuron_scores(gate, up, down, norm, self.score, self.inner, self.outer)

    def _recover(self, model: LoadedModel, data: Calibration, keep: Tensor, ctx: Context) -> None:
        """Fine-tune low-rank updates of all Linears of the blocks on ``data``, in place, and merge them."""
        generator = torch.Generator().manual_seed(ctx.seed)
        ranks = (self.recovery_rank * keep / keep.mean()).round().clamp(min=1).int().tolist()
        updates: dict[str, LowRankUpdate] = {}
        names = model.adapter.block_names(model.module)
        for block, rank in zip(names, ranks, strict=True):
            for name, linear in model.adapter.linears(model.module.get_submodule(block)).items():
                update = LowRankUpdate(linear, rank, generator)
                updates[f"{block}.{name}"] = update
                set_submodule(model.module, f"{block}.{name}", update)
        trained = [parameter for update in updates.values() for parameter in update.factors()]
        tune_on_text(
            model,
            data,
            trained,
            steps=self.recovery_steps,
            lr=self.recovery_lr,
            tokens=self.recovery_tokens,
            generator=generator,
        )
        merge_updates(model.module, updates)


def statistics(
    model: LoadedModel, data: Calibration, networks: list[FeedForward], importance: Importance
) -> tuple[list[Tensor], Tensor]:
    """Return A [neurons] of every block, and I [blocks] in float64, from one pass of the dense model.

    Raises:
        DivergedError: an activation is not finite.
    """
    of_block = {model.module.get_submodule(network.block): network for network in networks}
    scale = {network.block: InputScale(network.neurons) for network in networks}

    def watch(block: nn.Module) -> Mapping[str, Callable[[Tensor], None]]:
        network = of_block[block]
        return {network.down.removeprefix(f"{network.block}."): scale[network.block].add}

    importances = []
    for step in walk(model, data, propagate="dense", observe=watch):
        assert step.outputs is not None
        pairs = zip(step.inputs, step.outputs, strict=True)
        importances.append(sum(float(change(x, y, importance).double().sum()) for x, y in pairs))
        if not bool(scale[step.name].value.isfinite().all()):
            raise DivergedError(f"the inputs of the down projection of {step.name} are not finite")
    norms = [scale[network.block].value.sqrt() for network in networks]
    return norms, torch.tensor(importances, dtype=torch.float64)


def change(x: Tensor, y: Tensor, importance: Importance) -> Tensor:
    """Return how much a block does to each token, float32 [...], from its input and output [..., channels]."""
    x, y = x.float(), y.float()
    match importance:
        case "constant":
            return torch.zeros_like(x[..., 0])
        case "mse":
            return (x - y).square().mean(dim=-1)
        case "mae":
            return (x - y).abs().mean(dim=-1)
    cosine = (x * y).sum(dim=-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    cosine = cosine.nan_to_num(nan=0.5).clamp(-1, 1)
    return 1 - cosine if importance == "cosine" else cosine.arccos() / torch.pi


def keep_ratios(importances: Tensor, sparsity: float, sharpness: float) -> Tensor:
    """Return the share of neurons that every block keeps, float64 [blocks]; its mean is ``1 - sparsity``."""
    z = torch.sigmoid(sharpness * (importances.double() - importances.double().mean()) / DIVISOR)
    mean, most = z.mean(), z.max()
    if most / mean * (1 - sparsity) >= 1 and most > mean:
        factor = mean * (1 / (1 - sparsity) - 1) / (most - mean) / MARGIN
        z = mean + (z - mean) * factor
        mean = z.mean()
    return z / mean * (1 - sparsity)


def neuron_scores(
    gate: Tensor, up: Tensor, down: Tensor, norm: Tensor, score: Score, inner: float = 1.0, outer: float = 1.0
) -> Tensor:
    """Return F [neurons], float32.

    Args:
        gate: weight [neurons, channels].
        up: weight [neurons, channels].
        down: weight [channels, neurons].
        norm: A [neurons].
        score: which of the authors' scores, or the paper's.
        inner: b.
        outer: c.
    """
    down, gate, up = down.abs(), gate.abs().T, up.abs().T
    weighted = down * norm**inner

    def normalized(term: Tensor) -> Tensor:
        # A dead neuron has no share in anything.
        return (term / term.sum(dim=0)).nan_to_num(nan=0.0)

    match score:
        case "three_w_one_wa":
            terms = normalized(weighted) + normalized(gate) + normalized(up)
        case "three_w_one_a":
            terms = normalized(down) + normalized(gate) + normalized(up)
        case "one_wa":
            terms = normalized(weighted)
        case "one_a":
            return norm.sqrt()
        case "wanda_base":
            return (down * norm).mean(dim=0)
        case "mag_base":
            return down.norm(dim=0)
        case "paper":
            # Per hidden channel, the share of a neuron among all: what is left of the weights' sizes ranks too.
            over_neurons = (weighted / (down.sum(dim=1, keepdim=True) * (norm**inner).sum())).nan_to_num(
                nan=0.0
            )
            return over_neurons.sum(dim=0)
        case _:
            raise ValueError(score)
    return (terms * norm**outer).mean(dim=0)


def kept(scores: Tensor, share: float, multiple: int) -> Tensor:
    """Return True for the neurons that stay: those whose score is no lower than that of the last one that counts.

    Args:
        scores: F [neurons]; equal scores stay together.
        share: how many neurons the block keeps.
        multiple: 1 keeps one neuron more than the share, as the authors' code does; otherwise the nearest multiple,
            one multiple at least.
    """
    neurons = len(scores)
    if multiple == 1:
        last = int(neurons * share)
    else:
        last = max(1, int((neurons * share + multiple / 2) / multiple)) * multiple - 1
    threshold = scores.sort(descending=True).values[min(last, neurons - 1)]
    return scores >= threshold
