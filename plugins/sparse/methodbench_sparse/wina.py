"""WINA: activation sparsity by input magnitude times column norm.

Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", arXiv
2505.19427; authors' code microsoft/wina.

An input x_j of a Linear adds x_j W_:j to its output, so what is lost with it grows with |x_j| ||W_:j||, not
with |x_j| alone: small inputs that meet large columns stay. Inputs of lowest score are zeroed token by
token. Where the columns are orthogonal the kept set is the best of its size, which a rotation of the
residual stream brings about for k and gate (:mod:`methodbench_sparse.rotation`). With W [out, in], sparsity
s::

    c_j = ||W_:j||_2      z = |x| c      y = W (m x),  m = 1 for the int(in (1 - s)) largest z, or where z > t

The threshold t is the s-quantile of z over calibration tokens. In a sequence of T > 1 tokens the last
int(0.99 T) are masked, a single token always. The weights stay dense and so does the product: no time is
saved here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.sequential import walk
from methodbench_sparse.rotation import rotate

#: Share of a sequence, from its end, that is masked.
MASKED_SHARE = 0.99
#: Sequences of the calibration data on which the kept share is measured.
MEASURED_SEQUENCES = 4
DENOMINATOR = "inputs of the Linears inside the blocks on masked tokens, weighted by parameters"
#: Roles of the Linears whose column norms the authors' code takes; the others score by |x| alone.
NORMED_ROLES = frozenset({"k", "gate", "qkv", "gate_up"})


@hyperparameters
class WINA:
    """Zeroes the inputs of every Linear in the blocks that matter least to its output."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of inputs zeroed, per token and Linear")
    ] = 0.5
    mask_by: Annotated[
        Literal["topk", "threshold"],
        Field(description="keep an exact count per token, or what exceeds a calibrated threshold"),
    ] = "topk"
    columns: Annotated[
        Literal["code", "paper"],
        Field(description="column norms for k and gate only (authors' code) or for every Linear (paper)"),
    ] = "code"
    transform: Annotated[bool, Field(description="rotate the residual stream for orthogonal columns")] = True
    subtract_embed_mean: Annotated[
        bool, Field(description="centre the embeddings before the rotation, as the authors' code does")
    ] = True

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with masked inputs; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no Linear in the blocks, blocks that the rotation does not fit, or a
                threshold asked for without calibration inputs.
        """
        sparse = model.clone()
        if self.mask_by == "threshold" and not len(data):
            raise NotApplicableError("wina calibrates thresholds, and the task gives no calibration data")
        if self.transform:
            with ctx.phase("rotate"):
                sparse.facts["rotation_error"] = rotate(sparse, subtract_embed_mean=self.subtract_embed_mean)
        linears = sparse.adapter.targets(sparse.module)
        if not linears:
            raise NotApplicableError(f"{model.name} has no Linear inside its blocks")
        norms = {name: self._norms(sparse.adapter.role(name), linear) for name, linear in linears.items()}
        thresholds: Mapping[str, float] = {}
        if self.mask_by == "threshold":
            with ctx.phase("calibrate"):
                thresholds = calibrate_thresholds(sparse, norms, data, self.sparsity)
        masked = {
            name: MaskedInput(linear, norms[name], self.sparsity, thresholds.get(name))
            for name, linear in linears.items()
        }
        for name, layer in masked.items():
            set_submodule(sparse.module, name, layer)
        sparse.storage = "simulated"
        sparse.facts |= sparsity_facts(sparse, masked, data)
        return sparse

    def _norms(self, role: str, linear: nn.Module) -> Tensor | None:
        if self.columns == "paper" or role in NORMED_ROLES:
            return column_norms(linear.get_parameter("weight").detach())
        return None


class MaskedInput(nn.Linear):
    """A Linear that shares another's weight and zeroes its own inputs of lowest score.

    ``norms`` is [in] or None for ones; with a ``threshold`` the mask keeps what exceeds it, without one the
    ``int(in (1 - sparsity))`` largest.
    """

    norms: Tensor | None

    def __init__(
        self, linear: nn.Module, norms: Tensor | None, sparsity: float, threshold: float | None = None
    ) -> None:
        weight = linear.get_parameter("weight")
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.register_parameter("bias", getattr(linear, "bias", None))
        self.register_buffer("norms", norms)
        self.keep = int(weight.shape[1] * (1 - sparsity))
        self.threshold = threshold
        self.train(linear.training)

    def mask(self, inputs: Tensor) -> Tensor:
        """Return the boolean mask of ``inputs`` [batch, tokens, in].

        Inputs [tokens, in], as experts get them, carry no positions: every token is masked.
        """
        scores = input_score(inputs, self.norms)
        if inputs.dim() == 2:
            return input_mask(scores[:, None], self.keep, self.threshold)[:, 0]
        return input_mask(scores, self.keep, self.threshold)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``W (mask inputs) + b``."""
        return super().forward(inputs * self.mask(inputs))


def column_norms(weight: Tensor) -> Tensor:
    """Return ``||W_:j||_2`` [in] of ``weight`` [out, in], in its dtype."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0)
    return norms


def input_score(inputs: Tensor, norms: Tensor | None) -> Tensor:
    """Return ``|x_j| c_j``, shaped like ``inputs``; without ``norms`` [in], c is one."""
    return inputs.abs() if norms is None else (inputs * norms).abs()


def masked_tokens(tokens: int) -> int:
    """Return how many tokens at the end of a sequence are masked: ``int(0.99 tokens)``, but never none."""
    return int(MASKED_SHARE * tokens) or tokens


def input_mask(scores: Tensor, keep: int, threshold: float | None = None) -> Tensor:
    """Return the boolean mask of non-negative ``scores`` [batch, tokens, in], True where the input stays.

    Per token the ``keep`` largest, or those above ``threshold`` where it is given; True throughout for the
    tokens before the last :func:`masked_tokens`.
    """
    mask = torch.ones_like(scores, dtype=torch.bool)
    count = masked_tokens(scores.shape[1])
    last = scores[:, -count:]
    if threshold is None:
        largest = last.topk(keep, dim=-1, sorted=False).indices
        mask[:, -count:] = torch.zeros_like(last, dtype=torch.bool).scatter_(-1, largest, True)
    else:
        mask[:, -count:] = last > threshold
    return mask


class ScoreHistogram:
    """Exact counts of scores rounded to float16: a bin for every non-negative value of that type."""

    BINS = 0x7C01  # bit patterns of 0 to infinity; larger ones are NaN or negative

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def add(self, scores: Tensor) -> None:
        """Count non-negative ``scores`` of any shape."""
        bits = scores.detach().half().abs().contiguous().view(torch.int16).flatten().to("cpu", torch.int64)
        self.counts += torch.bincount(bits, minlength=self.BINS)[: self.BINS]

    def quantile(self, share: float) -> float:
        """Return the score below which ``share`` (< 1) of all lie, linear between neighbours; 0 for 0.

        0 as well where nothing was counted, so that nothing but zeros is masked.
        """
        if share == 0 or not self.counts.any():
            return 0.0
        present = self.counts.nonzero().flatten()
        values = present.to(torch.int16).view(torch.float16).double()
        cumulative = self.counts[present].cumsum(0).double()
        target = share * cumulative[-1]
        index = int(torch.searchsorted(cumulative, target))
        if index == 0:
            return float(values[0])
        fraction = (target - cumulative[index - 1]) / (cumulative[index] - cumulative[index - 1])
        return float(values[index - 1] + fraction * (values[index] - values[index - 1]))


def calibrate_thresholds(
    model: LoadedModel, norms: Mapping[str, Tensor | None], data: Calibration, sparsity: float
) -> dict[str, float]:
    """Return the ``sparsity``-quantile of every Linear's input scores, by full name.

    Scores are those of the dense ``model`` on every token of ``data``; ``norms`` [in] are by full name too.
    """
    histograms: dict[str, ScoreHistogram] = {}
    thresholds: dict[str, float] = {}
    names = {linear: name for name, linear in model.adapter.targets(model.module).items()}

    def observe(block: nn.Module) -> dict[str, Callable[[Tensor], None]]:
        linears = model.adapter.linears(block)
        histograms.clear()
        histograms.update({names[linear]: ScoreHistogram() for linear in linears.values()})
        return {
            name: _scored(histograms[names[linear]].add, norms[names[linear]])
            for name, linear in linears.items()
        }

    for _ in walk(model, data, propagate="dense", observe=observe):
        thresholds |= {name: histogram.quantile(sparsity) for name, histogram in histograms.items()}
    return thresholds


def _scored(add: Callable[[Tensor], None], norms: Tensor | None) -> Callable[[Tensor], None]:
    return lambda inputs: add(input_score(inputs, norms))


def sparsity_facts(
    model: LoadedModel, masked: Mapping[str, MaskedInput], data: Calibration
) -> dict[str, object]:
    """Return the shares of inputs that stay on masked tokens, measured, and what the shares are of.

    A Linear that the first calibration sequences do not reach counts with its fixed count per token.
    """
    counters = {name: _KeptCounter(layer) for name, layer in masked.items()}
    by_layer: dict[nn.Module, _KeptCounter] = {counter.layer: counter for counter in counters.values()}

    def observe(block: nn.Module) -> dict[str, Callable[[Tensor], None]]:
        return {name: by_layer[layer].add for name, layer in model.adapter.linears(block).items()}

    some = Calibration(data.inputs[:MEASURED_SEQUENCES], data.source)
    if len(some):
        for _ in walk(model, some, propagate="dense", observe=observe):
            pass
    shares = {name: counter.share for name, counter in counters.items()}
    sizes = {name: layer.weight.numel() for name, layer in masked.items()}
    return {
        "kept_share": sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values()),
        "kept_share_min": min(shares.values()),
        "kept_share_max": max(shares.values()),
        "kept_denominator": DENOMINATOR,
        "positions": "last-99%",
    }


class _KeptCounter:
    def __init__(self, layer: MaskedInput) -> None:
        self.layer = layer
        self.kept = self.total = 0

    @property
    def share(self) -> float:
        return self.kept / self.total if self.total else self.layer.keep / self.layer.in_features

    def add(self, inputs: Tensor) -> None:
        mask = self.layer.mask(inputs)
        if inputs.dim() == 3:
            mask = mask[:, -masked_tokens(inputs.shape[1]) :]
        self.kept += int(mask.count_nonzero())
        self.total += mask.numel()
