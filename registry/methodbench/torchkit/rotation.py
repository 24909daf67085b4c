"""Rotations of a decoder that leave its function as it is: residual stream, heads, inputs of single layers.

RMSNorm without gain commutes with orthogonal matrices: ``rms(x Q) = rms(x) Q``. So a decoder of pre-norm blocks
computes the same when its gains are folded into the layers that read the norms, the embeddings are multiplied by
``Q``, readers (rows of weights [out, in]) by ``Q`` from the right, and writers by ``Q^T`` from the left
(SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456). LayerNorm also subtracts the mean, which is folded into
everything that writes to the stream. Products are taken in float64 and stored in the weights' dtype.

Functions here change the module that a :class:`ResidualStream` was found in: pass a clone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.hadamard import hadamard_transform
from methodbench.torchkit.model import LoadedModel, set_submodule, set_weight

#: Largest deviation of a rotated model's logits from the unrotated ones', as a share of their standard
#: deviation: this, or what rounding to the model's dtype explains. A forward pass that differs gives about 1.
TOLERANCE = 1e-2
_ROUNDINGS = 32
_PROBE_TOKENS = 8

_ATTENTION_READERS = ("q", "k", "v", "qkv")
_FEED_FORWARD_READERS = ("gate", "up", "gate_up", "fc1", "router")
_WRITERS = ("o", "down", "fc2")
_POSITION_EMBEDDINGS = ("embed_positions", "wpe")


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch of a block, by dotted names in the model: ``stream + writer(... reader(norm(stream)))``."""

    norm: str
    readers: tuple[str, ...]
    """Layers that read the norm's output; routers of mixtures of experts among them."""
    writers: tuple[str, ...]
    """Layers whose output is added to the stream."""


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """Everything that reads or writes the residual stream of a decoder of pre-norm blocks."""

    module: nn.Module
    embeddings: tuple[str, ...]
    """Token embedding, and a learned position embedding where there is one."""
    branches: tuple[tuple[Branch, Branch], ...]
    """Attention and feed-forward branch of every block."""
    final_norm: str
    head: str

    @property
    def width(self) -> int:
        """Channels of the stream."""
        return int(self.weight(self.head).shape[1])

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight in float64, detached."""
        return double(self.module.get_submodule(name).get_parameter("weight"))

    @property
    def flat_branches(self) -> list[Branch]:
        return [branch for pair in self.branches for branch in pair]


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64, detached."""
    return x.detach().double()


def residual_stream(model: LoadedModel, hint: str = "") -> ResidualStream:
    """Find the residual stream of ``model``.

    Args:
        hint: how to do without the rotation, for error messages.

    Raises:
        NotApplicableError: embedding, head, final norm or blocks are missing, or a block is not one attention and
            one feed-forward branch, each behind a norm of its own.
    """
    adapter, module = model.adapter, model.module
    names = adapter.block_names(module)
    ends = (adapter.embedding(module), adapter.head(module), adapter.final_norm(module))
    if any(part is None for part in ends) or not names or adapter.layout is None:
        raise unsuitable(model, "it has no embedding, head, final norm or blocks", hint)
    branches = tuple(_branches(model, name, hint) for name in names)
    parent = adapter.embedding_name.rpartition(".")[0]
    beside = module.get_submodule(parent)
    positions = [
        f"{parent}.{name}" if parent else name for name in _POSITION_EMBEDDINGS if hasattr(beside, name)
    ]
    return ResidualStream(
        module,
        (adapter.embedding_name, *positions),
        branches,
        adapter.final_norm_name,
        adapter.head_name,
    )


def _branches(model: LoadedModel, block_name: str, hint: str) -> tuple[Branch, Branch]:
    adapter, layout = model.adapter, model.adapter.layout
    assert layout is not None
    block = model.module.get_submodule(block_name)
    norms = [
        next((n for n in candidates if n and isinstance(_get(block, n), nn.Module)), "")
        for candidates in ((layout.attention_norm,), layout.feed_forward_norms)
    ]
    if not all(norms):
        raise unsuitable(model, "its blocks have no norm before attention and feed-forward layers", hint)
    layers = dict.fromkeys(adapter.linears(block))
    layers |= dict.fromkeys(
        name
        for name, module in block.named_modules()
        if name and adapter.role(name) == "router" and isinstance(getattr(module, "weight", None), Tensor)
    )
    found = []
    for norm, inside, roles in (
        (norms[0], True, _ATTENTION_READERS),
        (norms[1], False, _FEED_FORWARD_READERS),
    ):
        names = [name for name in layers if name.startswith(f"{layout.attention}.") is inside]
        readers = [name for name in names if adapter.role(name) in roles]
        writers = [name for name in names if adapter.role(name) in _WRITERS]
        if not readers or not writers or len(readers) + len(writers) < len(names):
            raise unsuitable(model, "its blocks are not one attention and one feed-forward branch", hint)
        found.append(
            Branch(
                f"{block_name}.{norm}",
                tuple(f"{block_name}.{name}" for name in readers),
                tuple(f"{block_name}.{name}" for name in writers),
            )
        )
    return found[0], found[1]


def _get(module: nn.Module, name: str) -> object:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def untie(stream: ResidualStream) -> None:
    """Tell the module's configuration, where it has one, that embedding and head part ways."""
    config = getattr(stream.module, "config", None)
    if config is not None:
        config.tie_word_embeddings = False


def center_embeddings(stream: ResidualStream) -> None:
    """Subtract from every embedding its mean over channels.

    Exact in front of LayerNorm, which subtracts the mean itself; with RMSNorm it changes the function.
    """
    for name in stream.embeddings:
        rows = stream.weight(name)
        set_weight(stream.module.get_submodule(name), rows - rows.mean(dim=-1, keepdim=True))


def fuse_norms(stream: ResidualStream) -> None:
    """Fold every norm's gain and bias into the layers that read it; norms keep a gain of one.

    A LayerNorm becomes an RMSNorm: its mean subtraction moves into the embeddings and into the layers that write
    to the stream. Embedding and head are untied.
    """
    untie(stream)
    layer_norm = False
    for name, readers in (
        *((branch.norm, branch.readers) for branch in stream.flat_branches),
        (stream.final_norm, (stream.head,)),
    ):
        layer_norm |= fold_norm(stream.module, name, readers)
    if layer_norm:
        center_embeddings(stream)
        for branch in stream.flat_branches:
            for name in branch.writers:
                _center_output(stream.module.get_submodule(name))


def fold_norm(module: nn.Module, norm_name: str, readers: Iterable[str]) -> bool:
    """Fold gain and bias of one norm into the layers that read it.

    Returns:
        Whether it was a LayerNorm, in whose place an RMSNorm stands; what enters it must be centred elsewhere.
    """
    norm = module.get_submodule(norm_name)
    gain = double(norm.get_parameter("weight"))
    bias = getattr(norm, "bias", None)
    for name in readers:
        layer = module.get_submodule(name)
        weight = double(layer.get_parameter("weight"))
        if bias is not None:
            _add_bias(layer, weight @ double(bias))
        set_weight(layer, weight * gain)
    if not isinstance(norm, nn.LayerNorm):
        set_weight(norm, torch.ones_like(gain))
        return False
    plain = nn.RMSNorm(gain.numel(), eps=norm.eps, dtype=norm.weight.dtype, device=norm.weight.device)
    set_submodule(module, norm_name, plain.requires_grad_(False).train(norm.training))
    return True


def _add_bias(layer: nn.Module, bias: Tensor) -> None:
    old = getattr(layer, "bias", None)
    if old is None:
        like = layer.get_parameter("weight")
        layer.bias = nn.Parameter(bias.to(like), requires_grad=False)
    else:
        set_weight(layer, double(old) + bias, "bias")


def _center_output(layer: nn.Module) -> None:
    weight = double(layer.get_parameter("weight"))
    set_weight(layer, weight - weight.mean(dim=0, keepdim=True))
    bias = getattr(layer, "bias", None)
    if bias is not None:
        set_weight(layer, double(bias) - double(bias).mean(), "bias")


def rotate_stream(stream: ResidualStream, rotation: Tensor) -> None:
    """Multiply the residual stream by an orthogonal matrix; norms must be folded.

    Args:
        rotation: float64 [width, width].
    """
    rotate_embeddings(stream, rotation)
    for branch in stream.flat_branches:
        rotate_inputs(stream, branch.readers, rotation)
        rotate_outputs(stream, branch.writers, rotation)
    rotate_inputs(stream, (stream.head,), rotation)


def rotate_embeddings(stream: ResidualStream, rotation: Tensor) -> None:
    """``E <- E Q`` for every embedding."""
    for name in stream.embeddings:
        weight = stream.weight(name)
        set_weight(stream.module.get_submodule(name), weight @ rotation.to(weight.device))


def rotate_inputs(stream: ResidualStream, names: Iterable[str], rotation: Tensor) -> None:
    """``W <- W Q`` for the layers ``names``."""
    for name in names:
        weight = stream.weight(name)
        set_weight(stream.module.get_submodule(name), weight @ rotation.to(weight.device))


def rotate_outputs(stream: ResidualStream, names: Iterable[str], rotation: Tensor) -> None:
    """``W <- Q^T W``, ``b <- Q^T b`` for the layers ``names``."""
    for name in names:
        layer = stream.module.get_submodule(name)
        weight = stream.weight(name)
        turn = rotation.T.to(weight.device)
        set_weight(layer, turn @ weight)
        bias = getattr(layer, "bias", None)
        if bias is not None:
            set_weight(layer, turn @ double(bias), "bias")


def rotate_heads_out(weight: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the output channels of every head: ``W^T[:, h] <- W^T[:, h] R_h``.

    Args:
        weight: [heads * head_dim, in], or a bias [heads * head_dim].
        rotations: [heads or 1, head_dim, head_dim].
    """
    heads = weight.view(-1, rotations.shape[-1], *weight.shape[1:])
    return torch.einsum("hij,hi...->hj...", rotations.expand(len(heads), -1, -1), heads).reshape(weight.shape)


def rotate_heads_in(weight: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the input channels of every head: ``W[:, j] <- W[:, j] R_(j // g)``.

    Args:
        weight: [out, heads * head_dim].
        rotations: [kv heads or 1, head_dim, head_dim]; each serves ``g = heads / kv heads`` heads in a row.
    """
    heads = weight.view(weight.shape[0], -1, rotations.shape[-1])
    per_head = rotations.repeat_interleave(heads.shape[1] // len(rotations), dim=0)
    return torch.einsum("ohi,hij->ohj", heads, per_head).reshape(weight.shape)


class Hadamard(nn.Module):
    """``x H^T / sqrt(n)`` along the last axis, or across heads. Holds no tensors."""

    def __init__(self, heads: int = 0, *, fp32: bool = False) -> None:
        """
        Args:
            heads: 0 to transform all channels; else [..., heads * head_dim] is transformed along the heads.
            fp32: compute in float32 whatever the input's dtype.
        """
        super().__init__()
        self.heads = heads
        self.fp32 = fp32

    def forward(self, x: Tensor) -> Tensor:
        """Return the transform of ``x`` [..., channels] in its shape and dtype."""
        y = x.float() if self.fp32 else x
        if self.heads:
            y = hadamard_transform(y.unflatten(-1, (self.heads, -1)), -2).flatten(-2)
        else:
            y = hadamard_transform(y)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, fp32={self.fp32}"


class AcrossHeads(nn.Module):
    """Applies a module to the heads of every token side by side, as the layer before attention made them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return ``inner`` of [batch, tokens, heads * head size] for ``x`` [batch, heads, tokens, head size]."""
        tokens = x.transpose(1, 2)
        return self.inner(tokens.flatten(2)).view(tokens.shape).transpose(1, 2)


class TransformedInput(nn.Module):
    """``linear(transform(x))``: a layer behind an operation that its weight has been adapted to.

    The layer stays a submodule of its own, so that quantizers find it, see the inputs that it sees, and replace
    it alone.
    """

    def __init__(self, transform: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.transform = transform
        self.linear = linear
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x`` [..., in]."""
        return self.linear(self.transform(x))


def transform_input(module: nn.Module, name: str, transform: nn.Module) -> None:
    """Put ``transform`` in front of the layer called ``name``; its weight must have been adapted."""
    set_submodule(module, name, TransformedInput(transform, module.get_submodule(name)))


def rotate_online(module: nn.Module, name: str, *, fp32: bool = False) -> None:
    """Rotate the input of one layer by a Hadamard matrix at run time, and its weight to match.

    Raises:
        NotApplicableError: the layer's width is no order of a known Hadamard matrix.
    """
    layer = module.get_submodule(name)
    set_weight(layer, hadamard_transform(double(layer.get_parameter("weight"))))
    transform_input(module, name, Hadamard(fp32=fp32))


def probe_logits(model: LoadedModel) -> Tensor:
    """Return the logits of a few tokens, float64 [tokens, vocabulary].

    Raises:
        DivergedError: they are not finite.
    """
    embedding = model.adapter.embedding(model.module)
    assert embedding is not None
    vocabulary = embedding.get_parameter("weight").shape[0]
    tokens = torch.arange(_PROBE_TOKENS).remainder(vocabulary)[None]
    with torch.no_grad():
        output = model.module(tokens.to(model.device))
    logits: Tensor = getattr(output, "logits", output)
    if not bool(torch.isfinite(logits).all()):
        raise DivergedError(f"the logits of {model.name} hold NaN or infinity")
    return logits[0].double()


def check_preserved(model: LoadedModel, before: Tensor, hint: str = "") -> float:
    """Return by how much the logits of :func:`probe_logits` have moved, as a share of their spread.

    Raises:
        NotApplicableError: by more than rounding explains, so that the model's forward pass is not what the
            rotation takes it for.
    """
    deviation = float((probe_logits(model) - before).abs().max() / before.std())
    embedding = model.adapter.embedding(model.module)
    assert embedding is not None
    rounding = torch.finfo(embedding.get_parameter("weight").dtype).eps
    if not deviation <= max(TOLERANCE, _ROUNDINGS * rounding):
        raise unsuitable(model, f"rotated, its logits differ by {deviation:.2g} of their spread", hint)
    return deviation


def unsuitable(model: LoadedModel, why: str, hint: str = "") -> NotApplicableError:
    """The error that says why ``model`` cannot be rotated."""
    return NotApplicableError(f"{model.name} cannot be rotated: {why}", hint)
