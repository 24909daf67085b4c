"""R-Sparse: large inputs through the columns of a weight, small ones through a low-rank part of it.

Zhang, Liu, Tian, Khaitan, Wang, Li, "R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", ICLR 2025,
arXiv 2504.19449; authors' code VITA-Group/R-Sparse. The search is not in it, and is written from the paper.

Zeroing small inputs drops what they add together. They are many and alike, so a few singular directions of the weight
carry most of it. A Linear that may read a share 1 - s of its weights spends alpha of that on columns and the rest on
rank. With the decomposition W = U S V^T, c_j = ||W_:j||_2::

    channels = int(in (1 - s) alpha)      r = int((in out (1 - s) - channels out) / (in + out))
    m = [|x| c > t],  t the int(n tau)-th smallest of n calibration scores,  tau = 1 - (1 - s) alpha
    y = W (m x) + U_r S_r V_r^T ((1 - m) x)

With alpha = 1 there is no low-rank part and the score is |x|. A recipe has one alpha for each Linear; an evolutionary
search finds it by the loss on calibration text. In a sequence the last tenth is touched, a single token always.
Weights and products stay dense: no time is saved here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import (
    POSITIONS_HELP,
    Positions,
    Site,
    Threshold,
    block_linears,
    observed,
    score,
    sequence_shapes,
)
from methodbench.torchkit.model import Calibration, LoadedModel, next_token_loss, set_submodule
from methodbench_sparse.histograms import smallest

#: The search chooses every alpha among this many values from 0 to 1.
CHOICES = 21

Recipe = tuple[float, ...]


@hyperparameters
class RSparse:
    """Splits every Linear in the blocks into columns for large inputs and a low-rank part for the others."""

    sparsity: Annotated[
        float,
        Field(ge=0, lt=1, description="share of every weight that is not read; model-level sparsity too"),
    ] = 0.5
    alpha: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="share of the budget that goes to columns; 1 (the code's default) has no low-rank part, "
            "0 no columns, 0.95 is the paper's recipe without a search",
        ),
    ] = 0.95
    search: Annotated[
        bool, Field(description="find an alpha for each Linear by the loss on calibration text")
    ] = False
    population: Annotated[int, Field(ge=2, description="recipes that live at a time")] = 32
    generations: Annotated[int, Field(ge=1, description="generations of the search")] = 5
    mutation: Annotated[
        float, Field(ge=0, le=1, description="chance that an alpha of a child is redrawn")
    ] = 0.5
    search_sequences: Annotated[int, Field(ge=1, description="calibration sequences of the search")] = 16
    tokens: Annotated[int, Field(ge=1, description="calibration tokens of the thresholds")] = 512
    positions: Annotated[Positions, Field(description=POSITIONS_HELP)] = "last-10%"

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the model with split Linears; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no Linear in the blocks, no calibration inputs, or a search on a model without
                logits.
        """
        linears = block_linears(model)
        # A budget of all weights is spent on columns: the dense model.
        alpha = self.alpha if self.sparsity else 1.0
        alphas = [alpha]
        if self.search and self.sparsity:
            alphas = sorted({alpha, *(index / (CHOICES - 1) for index in range(CHOICES))})
        with ctx.phase("calibrate"):
            thresholds = self._thresholds(model, data, alphas, ctx)
        with ctx.phase("decompose"):
            factors = {
                name: low_rank_factors(linear.get_parameter("weight"), self._largest_rank(linear, alphas))
                for name, linear in linears.items()
            }

        def build(recipe: Sequence[float]) -> LoadedModel:
            sparse = model.clone()
            shapes = sequence_shapes(sparse, linears)
            for (name, linear), alpha in zip(linears.items(), recipe, strict=True):
                rank = self._rank(linear, alpha)
                scale = None if alpha == 1 else column_scale(linear.get_parameter("weight"))
                left, right = factors[name]
                site = Site("input", self.positions, {name: 1.0}, shapes[name])
                rule = Threshold(thresholds[name, alpha], scale)
                split = RankAwareLinear(linear, rule, left[:, :rank], right[:rank], site)
                set_submodule(sparse.module, name, split)
            sparse.storage = "simulated"
            return sparse

        recipe: Recipe = (alpha,) * len(linears)
        if len(alphas) > 1:
            with ctx.phase("search"):
                ids = data.inputs[: self.search_sequences]
                recipe = evolve(
                    lambda found: next_token_loss(build(found), ids),
                    recipe,
                    alphas,
                    population=self.population,
                    generations=self.generations,
                    mutation=self.mutation,
                    draw=torch.Generator().manual_seed(ctx.seed),
                )
        sparse = build(recipe)
        by_role: dict[str, list[float]] = {}
        for name, alpha in zip(linears, recipe, strict=True):
            by_role.setdefault(model.adapter.role(name), []).append(alpha)
        sparse.facts |= {
            "sparsity_target": self.sparsity,
            "alpha_by_role": {role: sum(found) / len(found) for role, found in by_role.items()},
        }
        return sparse

    def _rank(self, linear: nn.Module, alpha: float) -> int:
        out, width = linear.get_parameter("weight").shape
        return split_budget(width, out, self.sparsity, alpha)[1]

    def _largest_rank(self, linear: nn.Module, alphas: Sequence[float]) -> int:
        return max(self._rank(linear, alpha) for alpha in alphas)

    def _thresholds(
        self, model: LoadedModel, data: Calibration, alphas: Sequence[float], ctx: Context
    ) -> dict[tuple[str, float], float]:
        found: dict[tuple[str, float], float] = {}
        some = data
        if len(data) and data.inputs.ndim == 2:
            sequences = -(-self.tokens // data.inputs.shape[1])
            some = Calibration(data.inputs[:sequences, : self.tokens], data.source)
        for names, tensors in observed(model, some, block_linears(model), "r-sparse"):
            for name in names:
                if not tensors:
                    ctx.warn(f"no calibration token reached {name}: all of its inputs go through its columns")
                    found |= dict.fromkeys(((name, alpha) for alpha in alphas), 0.0)
                    continue
                x = torch.cat([part.flatten(0, -2) for part in tensors]).float()
                scale = column_scale(model.module.get_submodule(name).get_parameter("weight"))
                plain, scaled = x.abs().flatten(), score(x, scale.float()).flatten()
                if len(alphas) > 1:
                    plain, scaled = plain.sort().values, scaled.sort().values
                for alpha in alphas:
                    scores = plain if alpha == 1 else scaled
                    found[name, alpha] = threshold(scores, self.sparsity, alpha, ordered=len(alphas) > 1)
        return found


class RankAwareLinear(nn.Linear):
    """A Linear that shares another's parameters: columns for inputs above a threshold, factors for the others.

    Buffers: ``left`` [out, rank] (singular values included) and ``right`` [rank, in].
    """

    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Module, rule: nn.Module, left: Tensor, right: Tensor, site: Site) -> None:
        weight = linear.get_parameter("weight")
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.register_parameter("bias", getattr(linear, "bias", None))
        self.rule = rule
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        site.added = right.shape[0] * (weight.shape[0] + weight.shape[1]) / weight.numel()
        self.site = site
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W (m x) + left right ((1 - m) x) + b`` for touched tokens, ``W x + b`` for others."""
        masked = self.site.apply(input, self.rule)
        columns = super().forward(masked)
        if not self.right.shape[0]:
            return columns
        return columns + nn.functional.linear(nn.functional.linear(input - masked, self.right), self.left)


def split_budget(
    width: int, out: int, sparsity: float, alpha: float, *, at_least_one: bool = False
) -> tuple[int, int]:
    """Return the columns and the rank that a Linear [out, width] may read.

    Args:
        at_least_one: of each, as in the recipes of the authors' code.
    """
    floor = int(at_least_one)
    channels = max(floor, int(width * (1 - sparsity) * alpha))
    rank = max(floor, int((width * out * (1 - sparsity) - channels * out) / (width + out)))
    if alpha == 1 and not at_least_one:
        rank = 0
    return channels, min(rank, width, out)


def threshold(scores: Tensor, sparsity: float, alpha: float, *, ordered: bool = False) -> float:
    """Return the ``int(n tau)``-th smallest of ``scores`` [n] with ``tau = 1 - (1 - sparsity) alpha``.

    0 where that count is 0, so that every input passes; infinite for an alpha of 0, so that none does.

    Args:
        ordered: ``scores`` ascend.
    """
    if alpha == 0:
        return float("inf")
    count = int(scores.numel() * (1 - (1 - sparsity) * alpha))
    if not count:
        return 0.0
    return float(scores[count - 1] if ordered else smallest(scores, count)[0])


def column_scale(weight: Tensor) -> Tensor:
    """Return ``||W_:j||_2`` [in] of ``weight`` [out, in], which is ``||(V S)_j:||_2``."""
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=0)
    return norms


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``U_r S_r`` [out, rank] and ``V_r^T`` [rank, in] of ``weight`` [out, in], in its dtype.

    The decomposition is taken in float64.
    """
    if not rank:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
    u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(weight.dtype), vt[:rank].to(weight.dtype)


def evolve(
    loss: Callable[[Recipe], float],
    start: Recipe,
    choices: Sequence[float],
    *,
    population: int,
    generations: int,
    mutation: float,
    draw: torch.Generator,
) -> Recipe:
    """Return the recipe of least loss that an evolution finds; never worse than ``start``.

    The first generation is ``start`` and random recipes. Of each generation the better half lives on; children
    take every alpha from one of two living parents, and redraw it with the chance ``mutation``.
    """

    def random(count: int) -> list[float]:
        picked = torch.randint(len(choices), (count,), generator=draw)
        return [choices[index] for index in picked.tolist()]

    alive: dict[Recipe, float] = {start: loss(start)}
    while len(alive) < population:
        recipe = tuple(random(len(start)))
        alive.setdefault(recipe, loss(recipe))
        if len(choices) ** len(start) <= len(alive):
            break
    for _ in range(generations):
        parents = sorted(alive, key=alive.__getitem__)[: max(2, population // 2)]
        alive = {parent: alive[parent] for parent in parents}
        for _ in range(population - len(parents)):
            first, second = (parents[i] for i in torch.randint(len(parents), (2,), generator=draw).tolist())
            mixed = torch.rand(2, len(start), generator=draw)
            genes = zip(first, second, random(len(start)), *mixed.tolist(), strict=True)
            child = tuple(
                new if changed < mutation else (one if side < 0.5 else other)
                for one, other, new, side, changed in genes
            )
            if child not in alive:
                alive[child] = loss(child)
    return min(alive, key=alive.__getitem__)
