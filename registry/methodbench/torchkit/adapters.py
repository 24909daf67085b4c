"""Where the parts of a model are, and what role each layer plays.

Methods ask an :class:`Adapter` for blocks, layers and the places where a scale can be moved from one layer
to the next; none of them looks at a model's name. :func:`detect` builds the adapter from the structure
alone: decoders in the manner of Llama, OPT and GPT-NeoX, mixtures of experts, BERT-like encoders, timm's
vision transformers, and convolutional networks as a chain of stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import set_submodule
from methodbench.torchkit.rotation import TransformedInput

#: What a layer is to its block, by the part of its dotted name that tells; the first match wins.
ROLES: tuple[tuple[str, str], ...] = (
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("self.query", "q"),
    ("self.key", "k"),
    ("self.value", "v"),
    ("qkv_proj", "qkv"),
    ("query_key_value", "qkv"),
    ("qkv", "qkv"),
    ("o_proj", "o"),
    ("out_proj", "o"),
    ("attention.output.dense", "o"),
    ("attention.dense", "o"),
    ("self_attn.dense", "o"),
    ("attn.proj", "o"),
    ("attn.gate", "other"),
    ("self_attn.gate", "other"),
    ("gate_up_proj", "gate_up"),
    ("gate_proj", "gate"),
    ("up_proj", "up"),
    ("down_proj", "down"),
    ("w1", "gate"),
    ("w3", "up"),
    ("w2", "down"),
    ("fc1", "fc1"),
    ("fc2", "fc2"),
    ("mlp.c_fc", "fc1"),
    ("mlp.c_proj", "fc2"),
    ("dense_h_to_4h", "fc1"),
    ("dense_4h_to_h", "fc2"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
    ("gate", "router"),
    ("router", "router"),
    ("shared_expert_gate", "router"),
)

#: Roles in the order in which data flows through a block; layers of one stage read the same tensor.
_STAGES = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up", "fc1"), ("down", "fc2"))
_STAGE = {role: index for index, roles in enumerate(_STAGES) for role in roles}
_ORDER = {role: index for index, role in enumerate(role for roles in _STAGES for role in roles)}

_ACTIVATIONS = ("act_fn", "activation_fn", "act", "intermediate_act_fn", "intermediate.intermediate_act_fn")
_INNER_NORMS = ("norm", "attn_sub_norm", "ffn_sub_norm", "inner_attn_ln", "ffn_layernorm", "ffn_ln")


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """A place where a per-channel scale moves between layers without changing the block's function.

    ``y = previous(x)`` feeds exactly ``linears``: dividing the output of ``previous`` by ``scale`` and
    multiplying the input columns of every one of ``linears`` by it leaves the block as it was.
    """

    previous: str
    """A norm (its weight and bias are divided), a Linear (its LAST ``len(scale)`` output rows and biases are
    divided; a fused layer keeps the part that is passed on at the end) or an activation module (to be
    replaced by one that divides its output)."""
    linears: tuple[str, ...]
    """Every layer that reads it, as names relative to the block. Routers of mixtures of experts come first:
    their columns are scaled like the others', although they are no targets of compression."""
    inspect: str
    """The module whose output error judges a scale; ``""`` for the Linear itself."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names inside one kind of transformer block."""

    attention: str
    feed_forward: tuple[str, ...] = ("mlp",)
    """Candidates for the module that holds the feed-forward layers; ``""`` is the block itself."""
    attention_norm: str = ""
    """Norm whose output only the attention reads; used when ``feed_forward_norms`` has a match as well, since
    blocks with a single norm feed both halves with it."""
    feed_forward_norms: tuple[str, ...] = ()
    """Candidates for the norm whose output only the feed-forward layers read; the first that exists is it."""
    value_last: bool = True
    """Whether the last third of a fused query-key-value layer's output is the value (or heads alternate)."""


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        attention="self_attn",
        feed_forward=("mlp", "block_sparse_moe"),
        attention_norm="input_layernorm",
        feed_forward_norms=("pre_feedforward_layernorm", "post_attention_layernorm"),
    ),
    Layout(
        attention="self_attn",
        feed_forward=("",),
        attention_norm="self_attn_layer_norm",
        feed_forward_norms=("final_layer_norm",),
    ),
    Layout(
        attention="attention",
        attention_norm="input_layernorm",
        feed_forward_norms=("post_attention_layernorm",),
        value_last=False,
    ),
    Layout(attention="attn", attention_norm="norm1", feed_forward_norms=("norm2",)),
    Layout(attention="attention", feed_forward=("",)),
)


@dataclass(frozen=True)
class Adapter:
    """Names the parts of a model of one structure.

    Either ``stack`` names the list whose children are the blocks, or ``stages`` names the blocks
    themselves. Blocks are applied in order, each to the output of the one before. Tests build adapters of
    toy modules directly.
    """

    kind: str
    stack: str = ""
    stages: tuple[str, ...] = ()
    layout: Layout | None = None
    """None for blocks of unknown inner structure: they have layers, and no scale groups."""
    roles: tuple[tuple[str, str], ...] = ROLES
    layers: tuple[type[nn.Module], ...] = (nn.Linear,)
    """Types of the layers that methods compress, beside whatever has ``in_features`` and ``out_features``."""
    embedding_name: str = ""
    head_name: str = ""
    final_norm_name: str = ""
    merging_norms: tuple[tuple[str, str], ...] = ()
    """Norms between stages of blocks that one Linear each reads: names of the norm and of the Linear."""

    def block_names(self, module: nn.Module) -> list[str]:
        """Return the dotted names of the blocks in ``module``, in order."""
        if self.stages:
            return list(self.stages)
        return [_join(self.stack, name) for name, _ in module.get_submodule(self.stack).named_children()]

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """Return the blocks of ``module``, in order."""
        return [module.get_submodule(name) for name in self.block_names(module)]

    def linears(self, block: nn.Module) -> dict[str, nn.Module]:
        """Return the layers of ``block`` that methods compress, by name relative to it, in forward order.

        A layer that took a Linear's place counts when it has ``in_features`` and ``out_features``. Routers of
        mixtures of experts are left out.
        """
        found = {name: layer for name, layer in self._leaves(block) if self.role(name) != "router"}
        rank = {name: self._rank(name, index) for index, name in enumerate(found)}
        return {name: found[name] for name in sorted(found, key=rank.__getitem__)}

    def targets(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers of all blocks by full dotted name, in forward order."""
        return {
            _join(block_name, name): layer
            for block_name, block in zip(self.block_names(module), self.blocks(module), strict=True)
            for name, layer in self.linears(block).items()
        }

    def role(self, name: str) -> str:
        """Return what the layer called ``name`` (full or relative to its block) is to its block.

        One of ``q k v qkv o gate up gate_up down fc1 fc2 router other``.
        """
        dotted = f".{name}."
        return next((role for part, role in self.roles if f".{part}." in dotted), "other")

    def sequential_groups(self, block: nn.Module) -> list[list[str]]:
        """Return the layers of ``block`` in groups that read the same state of the block, in data-flow order.

        Methods that quantize one group after another, each on the block as the groups before it left it,
        follow this order. Layers of unknown role are groups of their own.
        """
        groups: list[list[str]] = []
        last: int | None = None
        for name in self.linears(block):
            stage = _STAGE.get(self.role(name))
            if stage is None or stage != last:
                groups.append([])
            groups[-1].append(name)
            last = stage
        return groups

    def scale_groups(self, block: nn.Module) -> list[ScaleGroup]:
        """Return the sets of AWQ (arXiv 2306.00978, section 3.2) that ``block`` allows, in forward order.

        Norm to query, key and value; value to output, where their shapes are equal (no grouped queries);
        norm to the first feed-forward layers (and router); last of them, or the activation behind it, to
        the second. A set is left out where the block gives no certainty that it preserves the function:
        post-norm blocks, norms that feed both halves or whose output is not proportional to their gain,
        inner norms, transformed inputs, fused experts.
        """
        if self.layout is None:
            return []
        groups = _Groups(self, self.layout, block)
        return [*groups.attention(), *groups.feed_forward()]

    def embedding(self, module: nn.Module) -> nn.Module | None:
        """Return the token or patch embedding."""
        return _find(module, self.embedding_name)

    def head(self, module: nn.Module) -> nn.Module | None:
        """Return the layer that makes logits."""
        return _find(module, self.head_name)

    def final_norm(self, module: nn.Module) -> nn.Module | None:
        """Return the norm between the last block and the head."""
        return _find(module, self.final_norm_name)

    def prefix_tokens(self, module: nn.Module) -> int:
        """Return how many tokens (class, distillation, registers) a vision transformer has before its patches."""
        return int(getattr(module, "num_prefix_tokens", 0))

    def patch_grid(self, module: nn.Module) -> tuple[int, int] | None:
        """Return rows and columns of a vision transformer's patches; None where the embedding does not say, or blocks
        merge them."""
        grid = None if self.stages else getattr(self.embedding(module), "grid_size", None)
        return None if grid is None else (int(grid[0]), int(grid[1]))

    def _leaves(self, module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            full = _join(prefix, name)
            if isinstance(child, self.layers) or _is_linear(child):
                yield full, child
            else:
                yield from self._leaves(child, full)

    def _rank(self, name: str, index: int) -> tuple[int, int, int]:
        role = self.role(name)
        if role in _STAGE:
            expert = index if ".experts." in f".{name}." else 0
            return _STAGE[role], expert, _ORDER[role]
        # Attention layers of unknown role (low-rank factors, gates) come before the attention's output.
        inside_attention = self.layout is not None and name.startswith(f"{self.layout.attention}.")
        return (0 if inside_attention else len(_STAGES)), index, len(_ORDER)


class _Groups:
    """Finds the scale groups of one block."""

    def __init__(self, adapter: Adapter, layout: Layout, block: nn.Module) -> None:
        self.layout = layout
        self.block = block
        self.layers = adapter.linears(block)
        self.roles = {name: adapter.role(name) for name in self.layers}
        self.routers = [
            name
            for name, module in block.named_modules()
            if name and adapter.role(name) == "router" and isinstance(getattr(module, "weight", None), Tensor)
        ]
        norm = next((name for name in layout.feed_forward_norms if _find(block, name) is not None), "")
        pre_norm = getattr(block, "do_layer_norm_before", True)
        both = bool(norm) and pre_norm and _find(block, layout.attention_norm) is not None
        self.attention_norm = layout.attention_norm if both else ""
        self.feed_forward_norm = norm if both else ""

    def attention(self) -> Iterator[ScaleGroup]:
        inside = [name for name in self.layers if name.startswith(f"{self.layout.attention}.")]
        readers = [name for name in inside if self.roles[name] in _STAGES[0]]
        outputs = [name for name in inside if self.roles[name] == "o"]
        if len(readers) + len(outputs) < len(inside) or not readers:
            return
        if self._gain(self.attention_norm, readers):
            inspect = self.layout.attention if len(readers) > 1 else ""
            yield ScaleGroup(self.attention_norm, tuple(readers), inspect)
        if len(outputs) != 1 or self._has_inner_norm(self.layout.attention):
            return
        (output,) = outputs
        if isinstance(self.block.get_submodule(output.rpartition(".")[0]), TransformedInput):
            return
        wide, out = _shape(self.layers[output])
        for name in readers:
            role, shape = self.roles[name], _shape(self.layers[name])
            fused = role == "qkv" and self.layout.value_last and shape[1] == 3 * wide
            if fused or (role == "v" and shape == (wide, out)):
                yield ScaleGroup(name, (output,), "")

    def feed_forward(self) -> Iterator[ScaleGroup]:
        inside = [name for name in self.layers if not name.startswith(f"{self.layout.attention}.")]
        first = [name for name in inside if self.roles[name] in _STAGES[2]]
        second = [name for name in inside if self.roles[name] in _STAGES[3]]
        if len(first) + len(second) < len(inside) or not first:
            return
        readers = [*self.routers, *first]
        fused = any(isinstance(getattr(module, "down_proj", None), Tensor) for module in self.block.modules())
        if not fused and self._gain(self.feed_forward_norm, readers):
            inspect = _first(self.block, self.layout.feed_forward) if len(readers) > 1 else ""
            yield ScaleGroup(self.feed_forward_norm, tuple(readers), inspect)
        for name in second:
            yield from self._into_second(name, first)

    def _into_second(self, name: str, first: list[str]) -> Iterator[ScaleGroup]:
        parent = name.rpartition(".")[0]
        siblings = [other for other in first if other.rpartition(".")[0] == parent]
        if not siblings and len(first) == 1:
            siblings, parent = first, ""
        if parent and self._has_inner_norm(parent):
            return
        wide = _shape(self.layers[name])[0]
        for other in siblings:
            role, out = self.roles[other], _shape(self.layers[other])[1]
            if (role == "up" and out == wide) or (role == "gate_up" and out == 2 * wide):
                yield ScaleGroup(other, (name,), "")
            elif role == "fc1":
                path = _first(self.block, tuple(_join(parent, name) for name in _ACTIVATIONS))
                if not path:
                    continue
                linear = out == wide and _is_homogeneous(self.block.get_submodule(path))
                yield ScaleGroup(other if linear else path, (name,), "")

    def _has_inner_norm(self, parent: str) -> bool:
        inner = (_find(self.block, _join(parent, name)) for name in _INNER_NORMS)
        return any(norm is not None and not isinstance(norm, nn.Identity) for norm in inner)

    def _gain(self, norm: str, readers: list[str]) -> bool:
        """Whether ``norm`` can take a scale for ``readers``: its output is proportional to its weight and
        bias."""
        module = _find(self.block, norm)
        if module is None:
            return False
        parameters = dict(module.named_parameters())
        if "weight" not in parameters or not parameters.keys() <= {"weight", "bias"}:
            return False
        weight = parameters["weight"]
        widths = {_shape(self.block.get_submodule(name))[0] for name in readers}
        if widths != {weight.numel()}:
            return False
        x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
        ones = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
        twos = {name: 2 * one for name, one in ones.items()}
        with torch.no_grad():
            once, twice = functional_call(module, ones, (x,)), functional_call(module, twos, (x,))
        return torch.allclose(twice, 2 * once, rtol=1e-2, atol=1e-4)


def detect(module: nn.Module) -> Adapter:
    """Return the adapter that fits the structure of ``module``.

    Raises:
        NotApplicableError: no known structure fits.
    """
    if _find(module, "model.encoder") is not None and _find(module, "model.decoder") is not None:
        raise NotApplicableError(
            f"{type(module).__name__} is an encoder-decoder model",
            "Models with one stack of blocks are supported: decoders, encoders, vision transformers, CNNs.",
        )
    for trunk in ("model.language_model", "model.decoder", "model", "gpt_neox", "transformer", "bert", ""):
        root = _find(module, trunk) if trunk else module
        if root is None:
            continue
        for stack, embedding, norms in (
            ("layers", "embed_tokens", ("norm", "final_layer_norm", "final_layernorm")),
            ("layers", "embed_in", ("final_layer_norm",)),
            ("blocks", "patch_embed", ("norm",)),
            ("encoder.layer", "embeddings.word_embeddings", ()),
        ):
            blocks = _find(root, stack)
            if not isinstance(blocks, nn.ModuleList | nn.Sequential) or _find(root, embedding) is None:
                continue
            layout = _layout(list(blocks.children()))
            if layout is not None:
                adapter = Adapter(
                    kind={"blocks": "vit", "encoder.layer": "sentence-encoder"}.get(stack, "causal-lm"),
                    stack=_join(trunk, stack),
                    layout=layout,
                    embedding_name=_join(trunk, embedding),
                    head_name=_first(module, ("lm_head", "embed_out", "head")),
                    final_norm_name=next((_join(trunk, n) for n in norms if _find(root, n) is not None), ""),
                )
                if adapter.targets(module) or _fused_experts(module):
                    return adapter
    windowed = _windowed(module)
    if windowed is not None:
        return windowed
    stages = _conv_stages(module)
    if stages:
        return Adapter(
            kind="cnn",
            stages=stages,
            roles=(),
            layers=(nn.Linear, nn.Conv2d),
            embedding_name=_first(module, ("conv_stem", "stem", "conv1")),
            head_name=_first(module, ("fc", "classifier", "linear", "head.fc", "head")),
        )
    raise NotApplicableError(
        f"no adapter fits the structure of {type(module).__name__}",
        "Known structures: decoders like Llama, OPT and GPT-NeoX, mixtures of experts, BERT-like encoders, "
        "timm vision transformers, convolutional networks. Others need an Adapter of their own.",
    )


class Experts(nn.ModuleList):
    """Experts of a mixture as separate gated feed-forward networks, called like transformers' fused ones."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k].
        """
        out = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, position = torch.where(top_k_index == index)
            if token.numel():
                part = expert(hidden_states[token]) * top_k_weights[token, position, None]
                out.index_add_(0, token, part.to(out.dtype))
        return out


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def unfuse_experts(module: nn.Module) -> int:
    """Replace experts that are stored as three-dimensional parameters by one Linear per expert and
    projection.

    The Linears are views of the fused tensors, so nothing is copied and the function stays the same;
    methods then find every expert's layers like any other.

    Args:
        module: changed in place.

    Returns:
        How many mixtures were replaced; 0 where there are none.

    Raises:
        NotApplicableError: experts with biases, transposed weights or a gate of their own.
    """
    fused = _fused_experts(module)
    for name, experts in fused.items():
        gate_up, down = experts.gate_up_proj, experts.down_proj
        plain = getattr(experts, "has_gate", True) and getattr(experts, "is_concatenated", True)
        extras = ("has_bias", "is_transposed", "has_post_expert_norm")
        plain = plain and not any(getattr(experts, flag, False) for flag in extras)
        if not plain or not _has_default_gate(experts):
            raise NotApplicableError(
                f"the experts at {name} ({type(experts).__name__}) are not plain gate, up and down layers"
            )
        width = down.shape[2]
        split = Experts(
            Expert(gate_up[i, :width], gate_up[i, width:], down[i], experts.act_fn)
            for i in range(down.shape[0])
        )
        split.train(experts.training)
        set_submodule(module, name, split)
    return len(fused)


def _fused_experts(module: nn.Module) -> dict[str, Any]:
    def is_fused(candidate: nn.Module) -> bool:
        weights = (getattr(candidate, "gate_up_proj", None), getattr(candidate, "down_proj", None))
        return all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in weights)

    return {name: candidate for name, candidate in module.named_modules() if is_fused(candidate)}


def _has_default_gate(experts: Any) -> bool:
    """Whether the experts' gate function, where they name one, is ``act(first half) * second half``."""
    if not hasattr(experts, "_apply_gate"):
        return True
    width = experts.down_proj.shape[2]
    x = torch.linspace(-3, 3, 2 * width, dtype=experts.down_proj.dtype, device=experts.down_proj.device)[None]
    with torch.no_grad():
        expected = experts.act_fn(x[:, :width]) * x[:, width:]
        return torch.allclose(experts._apply_gate(x), expected)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def _layout(blocks: list[nn.Module]) -> Layout | None:
    for layout in LAYOUTS:
        for block in blocks[:1]:
            feed_forward = any(_find(block, name) is not None for name in layout.feed_forward if name)
            own = "" in layout.feed_forward and not hasattr(block, "mlp")
            if _find(block, layout.attention) is not None and (feed_forward or own):
                norms = (layout.attention_norm, *layout.feed_forward_norms)
                if not any(norms) or any(_find(block, name) is not None for name in norms):
                    return layout
    return None


def _windowed(module: nn.Module) -> Adapter | None:
    """Return the adapter of a transformer whose stages hold blocks and merge patches between them, as Swin's."""
    stages = _find(module, "layers")
    if not isinstance(stages, nn.Sequential | nn.ModuleList) or _find(module, "patch_embed") is None:
        return None
    names, merging = [], []
    for stage_name, stage in stages.named_children():
        blocks = _find(stage, "blocks")
        if blocks is None:
            return None
        names += [_join("layers", stage_name, "blocks", name) for name, _ in blocks.named_children()]
        path = _join("layers", stage_name, "downsample")
        if all(_find(module, _join(path, part)) is not None for part in ("norm", "reduction")):
            merging.append((_join(path, "norm"), _join(path, "reduction")))
    layout = _layout([module.get_submodule(name) for name in names])
    if layout is None:
        return None
    return Adapter(
        kind="vit",
        stages=tuple(names),
        layout=layout,
        embedding_name="patch_embed",
        head_name=_first(module, ("head.fc", "head")),
        final_norm_name=_first(module, ("norm",)),
        merging_norms=tuple(merging),
    )


def _conv_stages(module: nn.Module) -> tuple[str, ...]:
    """Return the children that hold convolutions, or the children of the only one that does.

    Empty where most layers lie outside of them: a patch embedding does not make a convolutional network.
    """

    def holders(root: nn.Module) -> list[str]:
        return [
            name
            for name, child in root.named_children()
            if not isinstance(child, nn.Conv2d) and any(isinstance(m, nn.Conv2d) for m in child.modules())
        ]

    stages = holders(module)
    inside = [m for name in stages for m in module.get_submodule(name).modules()]
    outside = sum(isinstance(m, nn.Linear) for m in module.modules()) - sum(
        isinstance(m, nn.Linear) for m in inside
    )
    if outside > sum(isinstance(m, nn.Conv2d) for m in inside):
        return ()
    if len(stages) == 1:
        (only,) = stages
        inner = holders(module.get_submodule(only))
        if inner and isinstance(module.get_submodule(only), nn.Sequential):
            return tuple(_join(only, name) for name in inner)
    return tuple(stages)


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _shape(module: Any) -> tuple[int, int]:
    """Return (input width, output width) of a Linear, its replacement, or a router with a weight [out,
    in]."""
    if _is_linear(module):
        return int(module.in_features), int(module.out_features)
    return int(module.weight.shape[1]), int(module.weight.shape[0])


def _is_homogeneous(activation: nn.Module) -> bool:
    """Whether ``f(x * s) == f(x) * s`` for positive ``s``, as for ReLU."""
    x = torch.linspace(-3, 3, 25)
    with torch.no_grad():
        return torch.allclose(activation(x / 4), activation(x) / 4)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    """Return the submodule at dotted path ``name``; None where there is none or ``name`` is empty."""
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _first(module: nn.Module, names: tuple[str, ...]) -> str:
    return next((name for name in names if _find(module, name) is not None), "")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
