"""Activation sparsity: inputs and neurons that are zeroed token by token, where, and how they are counted.

A *rule* is a module that maps activations to a mask, True where one stays: :class:`Threshold`, :class:`TopK`. It
stands at a *site*: the input of a Linear (:func:`mask_inputs`) or the output of a feed-forward network's activation
function (:func:`mask_neurons`). A site knows its *positions policy*, the tokens of a sequence that it touches, and
counts what it zeroes. Three counts are in use, the same for every method; all are taken on touched tokens:

input sparsity
    of a Linear: the share of its inputs that are zeroed.
neuron sparsity
    of a feed-forward network: the share of its hidden neurons that are zeroed; of a model, the mean over networks.
model-level sparsity
    the share of the weights of all Linears inside the blocks that a token need not read. A zeroed input spares a
    column; a zeroed neuron spares its row of the up projection and its column of the down projection. Embeddings,
    norms, biases and head are no part of it.

:func:`measured` gives them for whatever ran since :func:`forget`: for a result that is the evaluation itself, so
not the text that thresholds were calibrated on. Weights stay dense and products too: nothing is faster for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.sequential import Observer, walk

#: Which tokens of a sequence a method touches. A single token (decoding) is touched under every policy.
Positions = Literal["all", "last-99%", "last-half", "last-10%", "decode"]

_DENSE_HEAD: Mapping[str, Callable[[int], int]] = {
    "all": lambda tokens: 0,
    "last-99%": lambda tokens: tokens - int(0.99 * tokens),
    "last-half": lambda tokens: tokens - tokens // 2,
    "last-10%": lambda tokens: int(0.9 * tokens),
    "decode": lambda tokens: tokens,
}

POSITIONS_HELP = "tokens that are touched: all, the last share of a sequence, or single tokens alone (decode)"
DENOMINATOR = (
    "weights of the Linears inside the blocks, per touched token; embeddings, norms, biases and head excluded"
)

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "intermediate_act_fn")


def dense_tokens(positions: Positions, tokens: int) -> int:
    """Return how many tokens at the start of a sequence of ``tokens`` stay dense."""
    return 0 if tokens == 1 else _DENSE_HEAD[positions](tokens)


class SequenceShape:
    """Remembers the shape [batch, tokens] of what enters a block, for layers that get it flattened."""

    def __init__(self) -> None:
        self.leading: torch.Size | None = None

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the block."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        self.leading = hidden.shape[:-1]

    def arrange(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return ``x`` as [batch, tokens, channels], and whether its tokens are in the order of a sequence.

        [tokens, channels] of a whole batch is unfolded. What experts of a mixture get, [routed tokens, channels],
        becomes one row without an order.
        """
        if x.dim() == 3:
            return x, True
        if self.leading is not None and len(self.leading) == 2 and x.shape[0] == self.leading.numel():
            return x.view(*self.leading, x.shape[-1]), True
        return x[None], False


@dataclass
class Site:
    """A place where activations are zeroed, and the counts of it."""

    kind: Literal["input", "neurons"]
    positions: Positions
    linears: Mapping[str, float]
    """Linears, by full name, whose weights need not be read where the mask is False, and what portion of each."""
    sequence: SequenceShape = field(default_factory=SequenceShape)
    added: float = 0.0
    """What else is read per touched token, as a share of those weights: low-rank factors, predictors."""
    kept: Tensor | int = 0
    entries: int = 0
    touched: int = 0
    tokens: int = 0
    counting: bool = True
    """Off inside :func:`uncounted`."""

    def split(self, x: Tensor) -> tuple[Tensor, int]:
        """Return ``x`` as [batch, tokens, channels], and how many tokens at its start stay dense.

        Tokens without an order are touched, all of them.
        """
        grid, ordered = self.sequence.arrange(x)
        return grid, dense_tokens(self.positions, grid.shape[1]) if ordered else 0

    def count(self, mask: Tensor | None, tokens: int) -> None:
        """Count a mask [batch, touched tokens, channels] (None for no token touched) of ``tokens`` in all."""
        if not self.counting:
            return
        self.tokens += tokens
        if mask is not None:
            self.kept = self.kept + mask.count_nonzero()
            self.entries += mask.numel()
            self.touched += mask.numel() // max(1, mask.shape[-1])

    def apply(self, x: Tensor, rule: nn.Module) -> Tensor:
        """Return ``x`` with zeros where ``rule`` says False, on the tokens that the policy touches."""
        grid, dense = self.split(x)
        tail = grid[:, dense:]
        if not tail.numel():
            self.count(None, grid.shape[0] * grid.shape[1])
            return x
        mask = rule(tail)
        self.count(mask, grid.shape[0] * grid.shape[1])
        zeroed = tail.masked_fill(~mask, 0)
        return (torch.cat([grid[:, :dense], zeroed], dim=1) if dense else zeroed).view_as(x)

    def forget(self) -> None:
        """Start counting anew."""
        self.kept = self.entries = self.touched = self.tokens = 0

    @property
    def sparsity(self) -> float | None:
        """Share of entries that were zeroed on touched tokens; None where no token was touched."""
        return 1 - int(self.kept) / self.entries if self.entries else None


@dataclass
class BlockUsage:
    """Counts the blocks that are active for a token, for a method that leaves blocks out.

    It stands as ``usage`` at one module of the model, so that :func:`measured` finds it.
    """

    active: dict[str, Tensor | int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    counting: bool = True
    """Off inside :func:`uncounted`."""

    def count(self, active: Tensor) -> None:
        """Count one block's mask [batch, tokens], True where it is active; single tokens are generation."""
        if not self.counting:
            return
        where = "generation" if active.shape[-1] == 1 else "prompt"
        self.active[where] = self.active.get(where, 0) + active.count_nonzero()
        self.pairs[where] = self.pairs.get(where, 0) + active.numel()

    def forget(self) -> None:
        """Start counting anew."""
        self.active, self.pairs = {}, {}

    def facts(self) -> dict[str, Any]:
        """Return the share of active pairs of block and token, of prompts and of generation."""
        found = {
            f"blocks_active_{where}": int(self.active[where]) / pairs for where, pairs in self.pairs.items()
        }
        return found | {"blocks_denominator": "pairs of a block and a token"} if found else {}


class Threshold(nn.Module):
    """Keeps what exceeds a threshold: ``|x| scale > threshold``.

    Buffers: ``threshold``, one for all channels or [channels]; ``scale`` [channels] or None for ones.
    """

    threshold: Tensor
    scale: Tensor | None

    def __init__(self, threshold: float | Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.as_tensor(threshold))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mask of ``x`` [..., channels]."""
        return score(x, self.scale) > self.threshold


class TopK(nn.Module):
    """Keeps the ``keep`` largest of ``|x| scale`` of every token; ties go either way.

    Buffer: ``scale`` [channels] or None for ones.
    """

    scale: Tensor | None

    def __init__(self, keep: int, scale: Tensor | None = None) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mask of ``x`` [..., channels], with ``keep`` True in every row."""
        largest = score(x, self.scale).topk(self.keep, dim=-1, sorted=False).indices
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, largest, True)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


def score(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``|x_j| scale_j``, shaped like ``x`` [..., channels]; without ``scale`` [channels] it is one."""
    return x.abs() if scale is None else (x * scale).abs()


class SparseInput(nn.Linear):
    """A Linear that shares another's parameters and zeroes its own inputs by a rule."""

    def __init__(self, linear: nn.Module, rule: nn.Module, site: Site) -> None:
        weight = linear.get_parameter("weight")
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        self.register_parameter("bias", getattr(linear, "bias", None))
        self.rule = rule
        self.site = site
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``W (mask input) + b``."""
        return super().forward(self.site.apply(input, self.rule))


class SparseActivation(nn.Module):
    """An activation function whose outputs are zeroed by a rule."""

    def __init__(self, activation: nn.Module, rule: nn.Module, site: Site) -> None:
        super().__init__()
        self.activation = activation
        self.rule = rule
        self.site = site
        self.train(activation.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``mask activation(input)``."""
        return self.site.apply(self.activation(input), self.rule)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One feed-forward network of a block (or one expert), by full dotted names."""

    block: str
    first: str
    """The Linear whose output the activation function takes: gate, fused gate and up, or fc1."""
    activation: str
    """The module of the activation function."""
    down: str
    """The Linear that reads the hidden neurons."""
    up: str = ""
    """The Linear that the activation is multiplied with; empty where there is none of its own."""
    neurons: int = 0

    @property
    def spared(self) -> Mapping[str, float]:
        """Linears that need not be read in full where the activation is zero: the gate always is."""
        if self.up:
            return {self.up: 1.0, self.down: 1.0}
        return {self.down: 1.0}


def feed_forwards(model: LoadedModel) -> list[FeedForward]:
    """Return the feed-forward networks of the blocks, in order.

    Raises:
        NotApplicableError: a block has none whose activation function is a module of its own.
    """
    adapter, found = model.adapter, []
    for block_name, block in zip(
        adapter.block_names(model.module), adapter.blocks(model.module), strict=True
    ):
        linears = adapter.linears(block)
        roles = {name: adapter.role(name) for name in linears}
        inside = [name for name, role in roles.items() if role in ("gate", "fc1")]
        for name in inside:
            parent = name.rpartition(".")[0]
            beside = {roles[other]: other for other in linears if other.rpartition(".")[0] == parent}
            down = beside.get("down", beside.get("fc2", ""))
            holder = block.get_submodule(parent)
            activation = next(
                (leaf for leaf in _ACTIVATIONS if isinstance(getattr(holder, leaf, None), nn.Module)), ""
            )
            if not down or not activation:
                raise _no_feed_forward(model, block_name)
            found.append(
                FeedForward(
                    block_name,
                    f"{block_name}.{name}",
                    ".".join(part for part in (block_name, parent, activation) if part),
                    f"{block_name}.{down}",
                    f"{block_name}.{beside['up']}" if "up" in beside else "",
                    int(linears[down].get_parameter("weight").shape[1]),
                )
            )
        if not inside:
            raise _no_feed_forward(model, block_name)
    if not found:
        raise _no_feed_forward(model, "its stack")
    return found


def _no_feed_forward(model: LoadedModel, block: str) -> NotApplicableError:
    return NotApplicableError(
        f"{block} of {model.name} has no feed-forward network of gate (or first layer), activation function and down "
        "projection as modules of their own"
    )


def block_linears(model: LoadedModel) -> dict[str, nn.Module]:
    """Return the Linears inside the blocks by full name.

    Raises:
        NotApplicableError: there are none.
    """
    linears = model.adapter.targets(model.module)
    if not linears:
        raise NotApplicableError(f"{model.name} has no Linear inside its blocks")
    return linears


def mask_inputs(model: LoadedModel, rules: Mapping[str, nn.Module], positions: Positions) -> None:
    """Put a rule in front of the Linears named (full dotted names), in place; storage becomes simulated."""
    shapes = sequence_shapes(model, rules)
    for name, rule in rules.items():
        site = Site("input", positions, {name: 1.0}, shapes[name])
        set_submodule(model.module, name, SparseInput(model.module.get_submodule(name), rule, site))
    model.storage = "simulated"


def mask_neurons(
    model: LoadedModel, rules: Iterable[tuple[FeedForward, nn.Module]], positions: Positions
) -> None:
    """Put a rule behind the activation function of feed-forward networks, in place; storage becomes simulated."""
    pairs = list(rules)
    shapes = sequence_shapes(model, [network.activation for network, _ in pairs])
    for network, rule in pairs:
        site = Site("neurons", positions, network.spared, shapes[network.activation])
        activation = model.module.get_submodule(network.activation)
        set_submodule(model.module, network.activation, SparseActivation(activation, rule, site))
    model.storage = "simulated"


def sequence_shapes(model: LoadedModel, names: Iterable[str]) -> dict[str, SequenceShape]:
    """Return, for each module named, what remembers the shape of the sequences that enter its block."""
    blocks: dict[str, SequenceShape] = {}
    found = {}
    block_names = model.adapter.block_names(model.module)
    for name in names:
        owner = next(block for block in block_names if name == block or name.startswith(f"{block}."))
        if owner not in blocks:
            blocks[owner] = SequenceShape()
            block = model.module.get_submodule(owner)
            block.register_forward_pre_hook(blocks[owner].note, with_kwargs=True)
        found[name] = blocks[owner]
    return found


def site_sparsity(model: LoadedModel, spared: Mapping[str, float], target: float) -> float:
    """Return the sparsity at sites that spare ``spared`` for a model-level sparsity of ``target``.

    Args:
        spared: full name of a Linear -> portion of its weights that a site can spare.

    Raises:
        NotApplicableError: the sites cannot spare that much; says how much they can.
    """
    sizes = _sizes(model)
    most = sum(portion * sizes[name] for name, portion in spared.items()) / sum(sizes.values())
    share = target / most if most else float("inf")
    if target and share >= 1:
        raise NotApplicableError(
            f"a model-level sparsity of {target:g} is out of reach on {model.name}: the layers that the method touches "
            f"hold {most:.3f} of the weights in the blocks",
            "Ask for less, or count sparsity at the sites (counted=site).",
        )
    return share


def _sizes(model: LoadedModel) -> dict[str, int]:
    """Return how many weights each Linear inside the blocks has, however it stores them."""
    layers: dict[str, Any] = dict(model.adapter.targets(model.module))
    return {name: layer.in_features * layer.out_features for name, layer in layers.items()}


def observed(
    model: LoadedModel, data: Calibration, names: Iterable[str], owner: str
) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    """Yield what enters modules of the dense model, block after block; only one block's tensors are kept.

    Args:
        names: full dotted names of modules inside the blocks.
        owner: who calibrates, for the message.

    Yields:
        Modules of one block that read the very same tensors, and these: [sequences, tokens, channels] each, or what
        an expert gets, [tokens, channels]. Modules that no token reached come with an empty list.

    Raises:
        NotApplicableError: no calibration inputs.
    """
    if not len(data):
        raise NotApplicableError(
            f"{owner} calibrates on activations, and the task gives no calibration data",
            "Name a task that offers calibration data.",
        )
    wanted = list(names)
    owners = {model.module.get_submodule(block): block for block in model.adapter.block_names(model.module)}
    kept: dict[str, list[Tensor]] = {}

    def watch(block: nn.Module) -> Mapping[str, Observer]:
        kept.clear()
        prefix = f"{owners[block]}."
        kept.update({name: [] for name in wanted if name.startswith(prefix)})
        return {name.removeprefix(prefix): kept[name].append for name in kept}

    for _ in walk(model, data, propagate="dense", observe=watch):
        groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, tensors in kept.items():
            seen = [tensor for tensor in tensors if tensor.numel()]
            kept[name] = seen
            groups[tuple((t.data_ptr(), t.shape) for t in seen) or (name,)].append(name)
        for group in groups.values():
            yield tuple(group), kept[group[0]]


def sites(module: nn.Module) -> dict[str, Site]:
    """Return the sites of ``module`` by the name of the part that holds them."""
    return {
        name: part.site
        for name, part in module.named_modules()
        if isinstance(getattr(part, "site", None), Site)
    }


def usages(module: nn.Module) -> list[BlockUsage]:
    """Return the counts of blocks that stand at parts of ``module``."""
    found = (getattr(part, "usage", None) for part in module.modules())
    return [usage for usage in found if isinstance(usage, BlockUsage)]


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Let ``module`` run without counting what it zeroes, for timing: a count takes time that no method needs."""
    counts: list[Site | BlockUsage] = [*sites(module).values(), *usages(module)]
    before = [count.counting for count in counts]
    try:
        for count in counts:
            count.counting = False
        yield
    finally:
        for count, counting in zip(counts, before, strict=True):
            count.counting = counting


def forget(model: LoadedModel) -> None:
    """Let all sites start counting anew."""
    for site in sites(model.module).values():
        site.forget()
    for usage in usages(model.module):
        usage.forget()


def measured(model: LoadedModel) -> dict[str, Any]:
    """Return the counts of everything that ran since :func:`forget`, for a record; empty without sites.

    Shares of layers that no token reached are left out; where no token was touched at all, sparsities are 0.
    """
    found = sites(model.module)
    of_blocks = {name: value for usage in usages(model.module) for name, value in usage.facts().items()}
    if not found:
        return of_blocks
    sizes = _sizes(model)
    read = dict.fromkeys(sizes, 1.0)
    by_role: dict[str, list[float]] = defaultdict(list)
    neurons: list[float] = []
    for site in found.values():
        zeroed = site.sparsity or 0.0
        for name, portion in site.linears.items():
            read[name] = read[name] * (1 - portion * zeroed) + (site.added if site.entries else 0)
        if site.sparsity is None:
            continue
        if site.kind == "neurons":
            neurons.append(site.sparsity)
        else:
            for name in site.linears:
                by_role[model.adapter.role(name)].append(site.sparsity)
    total = sum(sizes.values())
    sparsity = 1 - sum(read[name] * size for name, size in sizes.items()) / total
    touched, tokens = (sum(getattr(site, what) for site in found.values()) for what in ("touched", "tokens"))
    share = touched / tokens if tokens else 0.0
    facts: dict[str, Any] = of_blocks | {
        "positions": "+".join(dict.fromkeys(site.positions for site in found.values())),
        "sparsity_model": sparsity,
        "sparsity_model_over_all_tokens": sparsity * share,
        "sparsity_denominator": DENOMINATOR,
        "sparsity_touched_tokens": share,
    }
    if neurons:
        facts["sparsity_neurons"] = sum(neurons) / len(neurons)
        facts["sparsity_neurons_range"] = [min(neurons), max(neurons)]
    if by_role:
        facts["sparsity_inputs"] = {role: sum(values) / len(values) for role, values in by_role.items()}
    return facts


@torch.no_grad()
def measure(model: LoadedModel, data: Calibration) -> dict[str, Any]:
    """Run the blocks of ``model`` on ``data`` and return :func:`measured` of that alone."""
    forget(model)
    for step in walk(model, data, propagate="compressed"):
        if step.index == len(model.adapter.block_names(model.module)) - 1:
            step.forward()
    facts = measured(model)
    forget(model)
    return facts


def match(
    model: LoadedModel,
    data: Calibration,
    target: float,
    level: float,
    install: Callable[[LoadedModel, float], None],
    corrections: int,
) -> tuple[LoadedModel, float]:
    """Return a sparse model whose model-level sparsity on ``data`` is nearer to ``target``, and the level it has.

    Thresholds taken from dense activations miss the target, since sparsity in earlier layers shifts what later ones
    see. Each correction measures the sparse model on the calibration data and moves the level by what it is off.

    Args:
        level: what to begin with: the sparsity at the sites.
        install: puts rules of a level into a clone of ``model``.
        corrections: how many times; 0 leaves the level as it is.
    """
    sparse = model.clone()
    install(sparse, level)
    for _ in range(corrections if target else 0):
        got = measure(sparse, data)["sparsity_model"]
        level = min(max(level + (target - got) * level / target, 0.0), 0.999)
        sparse = model.clone()
        install(sparse, level)
    return sparse, level
