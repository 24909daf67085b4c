"""Pruning as a probe, and mixtures of experts out of dense networks.

He, Deng, Li, Yan, "Understanding and Harnessing Sparsity in Unified Multimodal Models", arXiv 2512.02351; authors' code
Shwai-He/SparseUnifiedModel (322cee1). The paper treats the understanding and the generating branch of multimodal
models apart; a language model is one branch.

``depth``
    blocks (or their attention, or feed-forward networks) whose input and output are most alike, by the mean cosine over
    calibration tokens, are left out. In the code "output" is what the feed-forward network gave, before it was added to
    the stream; ``output="stream"`` compares with the stream behind it.
``width``
    neurons of lowest score go: ``mean_t |h_tj mean_i W_ij|`` times ``||W_:j||``, h what the down projection W reads.
``experts``
    neurons, sorted by that importance, are dealt out to E experts, forth and back, so that experts are equally
    important; a share of the most important ones stays on for every token. A router without bias, zero at first, picks
    ``top_k`` experts by its logits::

        y = shared(x) (1 + w_s x) + sum_chosen expert_e(x) (1 + logit_e)

    With all experts chosen it is the dense network at first. With fewer, a zero router gives all tokens the same ones:
    ``steps`` of fine-tuning on calibration text train routers alone, or all parameters (``adapt``).

First and last blocks stay dense under ``experts``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import FeedForward
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.sequential import hidden_of, walk
from methodbench.torchkit.text_tuning import own_parameters, tune_on_text
from methodbench_sparse.structured import FeedForwardPart, cut, gated_networks, record_widths

Mode = Literal["depth", "width", "experts"]
Drop = Literal["block", "attention", "mlp"]


@hyperparameters
class UnifiedSparsity:
    """Leaves out blocks or neurons, or turns feed-forward networks into mixtures of experts."""

    mode: Annotated[Mode, Field(description="what becomes sparse")] = "width"
    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of layers (depth) or of neurons (width) that go")
    ] = 0.5
    drop: Annotated[Drop, Field(description="depth: what is left out of a layer")] = "block"
    output: Annotated[
        Literal["raw", "stream"],
        Field(description="depth: a layer's output before (as coded) or behind the sum"),
    ] = "raw"
    experts: Annotated[int, Field(ge=1, le=1024, description="experts of a network")] = 32
    top_k: Annotated[int, Field(ge=1, le=1024, description="experts of a token")] = 16
    shared: Annotated[
        float, Field(ge=0, lt=1, description="experts: share of neurons that are always on")
    ] = 0.0
    adapt: Annotated[Literal["routers", "all"], Field(description="experts: what fine-tuning trains")] = (
        "routers"
    )
    steps: Annotated[int, Field(ge=0, le=1_000_000, description="experts: steps of fine-tuning; 0: none")] = 0
    lr: Annotated[float, Field(gt=0, le=1, description="experts: learning rate of AdamW")] = 1e-3
    tokens: Annotated[int, Field(ge=2, le=100_000, description="experts: tokens of a step")] = 256

    @model_validator(mode="after")
    def _experts_agree(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} is more than the {self.experts} experts")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the sparse model; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration inputs; blocks without one gated feed-forward network each; neurons that
                do not divide among the experts.
        """
        if not len(data):
            raise NotApplicableError(
                "unified-sparsity scores layers on tokens, and the task gives no calibration data"
            )
        networks = gated_networks(model)
        sparse = model.clone()
        match self.mode:
            case "depth":
                return self._shorten(sparse, data)
            case "width":
                importance = importances(sparse, data, networks)
                for network, amount in zip(networks, importance, strict=True):
                    down = sparse.module.get_submodule(network.down).get_parameter("weight")
                    kept = int(network.neurons * (1 - self.sparsity))
                    mask = torch.zeros(network.neurons, dtype=torch.bool, device=down.device)
                    mask[width_score(amount, down).topk(max(1, kept)).indices] = True
                    if self.sparsity:
                        cut(sparse, network, mask)
                return record_widths(sparse, networks)
        for network, amount in zip(networks[1:-1], importances(sparse, data, networks)[1:-1], strict=True):
            shared, dealt = deal(amount, self.experts, self.shared)
            holder, _, name = network.first.rpartition(".")
            assert name
            mixture = Mixture.out_of(sparse.module, network, shared, dealt, self.top_k)
            set_submodule(sparse.module, holder, mixture)
        if self.steps:
            with ctx.phase("fine-tuning"):
                self._adapt(sparse, data, ctx)
        sparse.storage = "real"
        sparse.facts |= {
            "experts": self.experts,
            "experts_per_token": self.top_k,
            "neurons_shared": self.shared,
        }
        return sparse

    def _shorten(self, model: LoadedModel, data: Calibration) -> LoadedModel:
        names = model.adapter.block_names(model.module)
        scores = depth_scores(model, data, self.drop, self.output)
        dropped = most_alike(scores, int(self.sparsity * len(names)))
        for index in dropped:
            leave_out(model, names[index], self.drop)
        model.storage = "real"
        model.facts |= {
            "layers_left_out": dropped,
            "layers_left_out_share": len(dropped) / len(names),
            "layers_denominator": f"{len(names)} of this kind: {self.drop}",
        }
        return model

    def _adapt(self, model: LoadedModel, data: Calibration, ctx: Context) -> None:
        """Fine-tune routers, or everything, on the calibration text."""
        parameters = own_parameters(model.module)
        if self.adapt == "routers":
            routers = [
                id(parameter)
                for part in model.module.modules()
                if isinstance(part, Mixture)
                for parameter in (part.router.weight, part.gate.weight)
            ]
            for parameter in parameters:
                parameter.requires_grad_(id(parameter) in routers)
        tune_on_text(
            model,
            data,
            [parameter for parameter in parameters if parameter.requires_grad],
            steps=self.steps,
            lr=self.lr,
            tokens=self.tokens,
            generator=torch.Generator().manual_seed(ctx.seed),
        )


def similarity(x: Tensor, y: Tensor) -> float:
    """Return the mean cosine of tokens [..., channels] before and behind a layer."""
    return float(torch.cosine_similarity(x.flatten(0, -2).float(), y.flatten(0, -2).float(), dim=-1).mean())


def most_alike(scores: list[float], count: int) -> list[int]:
    """Return the ``count`` layers of highest similarity, ascending."""
    order = torch.tensor(scores).argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


@torch.no_grad()
def depth_scores(
    model: LoadedModel, data: Calibration, drop: Drop, output: Literal["raw", "stream"]
) -> list[float]:
    """Return the similarity of what enters and leaves every layer, over calibration tokens of the dense model.

    Raises:
        NotApplicableError: an attention or feed-forward network is no module of its own.
    """
    scores = []
    for step in walk(model, data, propagate="dense"):
        attention, mlp = halves(model, step.name)
        seen: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
        hooks = [
            part.register_forward_hook(lambda _, __, out, kept=seen[name]: kept.append(hidden_of(out)))
            for name, part in (("attention", attention), ("mlp", mlp))
        ]
        outputs = step.forward()
        for hook in hooks:
            hook.remove()
        x, y = (
            torch.cat([t.flatten(0, -2) for t in step.inputs]),
            torch.cat([t.flatten(0, -2) for t in outputs]),
        )
        added, last = (torch.cat([t.flatten(0, -2) for t in seen[name]]) for name in ("attention", "mlp"))
        behind = last if output == "raw" else y
        pairs = {"block": (x, behind), "attention": (x, x + added), "mlp": (x + added, behind)}
        scores.append(similarity(*pairs[drop]))
    return scores


def halves(model: LoadedModel, block_name: str) -> tuple[nn.Module, nn.Module]:
    """Return the attention and the feed-forward module of a block.

    Raises:
        NotApplicableError: they are no modules of their own.
    """
    block, layout = model.module.get_submodule(block_name), model.adapter.layout
    parts = dict(block.named_children())
    names = [name for name in layout.feed_forward if name in parts] if layout is not None else []
    if layout is None or layout.attention not in parts or not names:
        raise NotApplicableError(f"the halves of {block_name} of {model.name} are no modules of their own")
    return parts[layout.attention], parts[names[0]]


class LeftOut(nn.Module):
    """Gives nothing (for a half, which is added to the stream), or its input (for a block), in the form of ``like``."""

    def __init__(self, *, passes: bool, outputs: int) -> None:
        super().__init__()
        self.passes = passes
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input or zeros of its shape, with None for every other output that the layer had."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        given = hidden if self.passes else torch.zeros_like(hidden)
        return given if not self.outputs else (given, *[None] * (self.outputs - 1))


def leave_out(model: LoadedModel, block_name: str, drop: Drop) -> None:
    """Replace a block, or one half of it, by what it is without it, in place."""
    block = model.module.get_submodule(block_name)
    attention, mlp = halves(model, block_name)
    target = {"block": block, "attention": attention, "mlp": mlp}[drop]
    (name,) = [name for name, part in model.module.named_modules() if part is target]
    # Attention returns its weights beside its output; blocks and feed-forward networks return one tensor.
    stand_in = LeftOut(passes=drop == "block", outputs=2 if drop == "attention" else 0)
    set_submodule(model.module, name, stand_in)


def importances(model: LoadedModel, data: Calibration, networks: list[FeedForward]) -> list[Tensor]:
    """Return the importance of the neurons [neurons] of every network, the mean over sequences of the dense model."""
    found = {}
    owners = {model.module.get_submodule(network.block): network for network in networks}
    sums: dict[str, Contribution] = {}

    def watch(block: nn.Module) -> dict[str, Any]:
        network = owners[block]
        down = model.module.get_submodule(network.down).get_parameter("weight").detach()
        sums[network.block] = Contribution(down)
        return {network.down.removeprefix(f"{network.block}."): sums[network.block].add}

    for step in walk(model, data, propagate="dense", batch_size=1, observe=watch):
        found[step.name] = sums[step.name].value
    return [found[network.block] for network in networks]


class Contribution:
    """The mean over forward passes of ``mean_t |h_tj mean_i W_ij|``; ``total`` is their sum, [neurons] float32."""

    def __init__(self, down: Tensor) -> None:
        self._mean = down.float().mean(dim=0)
        self.total = torch.zeros_like(self._mean)
        self.passes = 0

    def add(self, hidden: Tensor) -> None:
        """Add one pass with inputs ``hidden`` [..., neurons] of the down projection."""
        self.total += (hidden.float() * self._mean).abs().flatten(0, -2).mean(dim=0)
        self.passes += 1

    @property
    def value(self) -> Tensor:
        """The importance [neurons]."""
        return self.total / max(1, self.passes)


def width_score(importance: Tensor, down: Tensor) -> Tensor:
    """Return the importance [neurons] times the norm of each column of ``down`` [channels, neurons]."""
    norms: Tensor = down.detach().float().norm(dim=0)
    return importance * norms


def deal(importance: Tensor, experts: int, shared: float) -> tuple[Tensor, Tensor]:
    """Return the neurons that are shared, [shared], and those of every expert, int64 [experts, neurons per expert].

    Raises:
        NotApplicableError: what is not shared does not divide among the experts.
    """
    order = importance.argsort(descending=True)
    kept = int(len(order) * shared)
    rest = order[kept:]
    if len(rest) % experts or not len(rest):
        raise NotApplicableError(f"{len(rest)} neurons do not divide among {experts} experts")
    rows = rest.view(-1, experts).clone()
    rows[1::2] = rows[1::2].flip(1)
    return order[:kept], rows.T.contiguous()


class Mixture(nn.Module):
    """A mixture of parts of one network; see the module's text for what it computes."""

    def __init__(self, shared: nn.Module | None, experts: list[nn.Module], width: int, top_k: int) -> None:
        super().__init__()
        self.shared = shared
        self.experts = nn.ModuleList(experts)
        self.top_k = top_k
        self.router = nn.Linear(width, len(experts), bias=False)
        self.gate = nn.Linear(width, 1, bias=False)
        for layer in (self.router, self.gate):
            layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)

    @classmethod
    def out_of(
        cls, module: nn.Module, network: FeedForward, shared: Tensor, dealt: Tensor, top_k: int
    ) -> Mixture:
        """Make the mixture of a dense network from the neurons that :func:`deal` gave."""
        gate, up, down, act = (
            module.get_submodule(name)
            for name in (network.first, network.up, network.down, network.activation)
        )
        if getattr(down, "bias", None) is not None:
            raise NotApplicableError(f"{network.down} has a bias, which would count once for every expert")
        parts = [FeedForwardPart(gate, up, down, act, index) for index in dealt]
        always = FeedForwardPart(gate, up, down, act, shared) if len(shared) else None
        weight = gate.get_parameter("weight")
        mixture = cls(always, list(parts), weight.shape[1], top_k)
        return mixture.to(weight.device, weight.dtype).train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [..., channels]."""
        flat = x.reshape(-1, x.shape[-1])
        logits, chosen = self.router(flat).topk(self.top_k, dim=-1)
        out = torch.zeros_like(flat)
        if self.shared is not None:
            out = out + self.shared(flat) * (1 + self.gate(flat))
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            if token.numel():
                out = out.index_add(0, token, expert(flat[token]) * (1 + logits[token, place, None]))
        return out.view_as(x)
