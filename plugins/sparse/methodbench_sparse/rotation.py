"""Rotation of a decoder's residual stream, so that chosen matrices get orthogonal columns.

Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", arXiv
2505.19427, after SliceGPT (arXiv 2401.15024).

RMSNorm without gain commutes with rotations: a block whose input-side Linears are multiplied by an
orthogonal Q and whose residual is multiplied by the change of basis computes the same function. With k and
gate of every block as W = U S V^T and Q = V, the columns of W Q are orthogonal and their norms are the
singular values. Per block, with Q1 of its k, Q2 of its gate, Q3 of the next block's k (Q2 in the last
block)::

    q, k, v <- W Q1      o <- Q2^T W      gate, up <- W Q2      down <- Q3^T W
    h = r (Q1^T Q2) + Attn(rms(r))        out = h (Q2^T Q3) + MLP(rms(h))

The two residual products are d x d matrices that the dense model does not have: they cost memory and time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.model import LoadedModel, set_submodule, set_weight

ATTENTION_INPUTS = ({"q", "k", "v"}, {"qkv"})
MLP_INPUTS = ({"gate", "up"}, {"gate_up"})
#: Largest deviation of the rotated model's logits from the unrotated ones', as a share of their standard
#: deviation: this, or what rounding to the model's dtype explains. A forward pass that differs gives about 1.
TOLERANCE = 1e-2
ROUNDINGS = 32
PROBE_TOKENS = 8


class RotatedBlock(nn.Module):
    """A pre-norm decoder block whose two residuals are multiplied by a change of basis.

    Takes over the children of ``block`` under their own names. ``attention_shortcut`` and ``mlp_shortcut``
    are [width, width].
    """

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    attention_shortcut: Tensor
    mlp_shortcut: Tensor

    def __init__(self, block: nn.Module, attention_shortcut: Tensor, mlp_shortcut: Tensor) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.register_buffer("attention_shortcut", attention_shortcut)
        self.register_buffer("mlp_shortcut", mlp_shortcut)
        self.train(block.training)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the block's output [batch, tokens, width] in the next block's basis."""
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden = hidden_states @ self.attention_shortcut + (
            attended[0] if isinstance(attended, tuple) else attended
        )
        return hidden @ self.mlp_shortcut + self.mlp(self.post_attention_layernorm(hidden))


@torch.no_grad()
def rotate(model: LoadedModel, *, subtract_embed_mean: bool) -> float:
    """Rotate the residual stream of ``model`` (a clone that may be changed); products are taken in float64.

    Args:
        model: a decoder of pre-norm blocks with RMSNorm and gated MLP; embedding and head need not be tied.
        subtract_embed_mean: subtract from every embedding its mean over channels, as the authors' code
            does. For RMSNorm this changes the function, before any sparsity.

    Returns:
        Largest deviation of probe logits that the rotation itself causes, as a share of their standard
        deviation.

    Raises:
        NotApplicableError: the blocks have another shape, or the rotation does not preserve their function.
    """
    adapter, module = model.adapter, model.module
    blocks, names = adapter.blocks(module), adapter.block_names(module)
    embedding, head, final_norm = adapter.embedding(module), adapter.head(module), adapter.final_norm(module)
    if embedding is None or head is None or final_norm is None or not blocks:
        raise _unsuitable(model, "it has no embedding, head, final norm or blocks")
    parts = [_roles(model, block) for block in blocks]

    if subtract_embed_mean:
        rows = _double(embedding)
        set_weight(embedding, rows - rows.mean(dim=-1, keepdim=True))
    _untie(module)
    probe = torch.arange(PROBE_TOKENS).remainder(_double(embedding).shape[0])[None]
    before = _logits(module, probe)

    for block, linears in zip(blocks, parts, strict=True):
        _fold_gain(block.get_submodule("input_layernorm"), _named(linears, ATTENTION_INPUTS))
        _fold_gain(block.get_submodule("post_attention_layernorm"), _named(linears, MLP_INPUTS))
    _fold_gain(final_norm, [head])

    bases = [right_singular_vectors(_double(linears.get("k") or linears["qkv"])) for linears in parts]
    basis = bases[0]
    set_weight(embedding, _double(embedding) @ basis)
    for index, (block, linears) in enumerate(zip(blocks, parts, strict=True)):
        middle = right_singular_vectors(_double(linears.get("gate") or linears["gate_up"]))
        following = bases[index + 1] if index + 1 < len(blocks) else middle
        for linear in _named(linears, ATTENTION_INPUTS):
            set_weight(linear, _double(linear) @ basis)
        for linear in _named(linears, MLP_INPUTS):
            set_weight(linear, _double(linear) @ middle)
        _rotate_output(linears["o"], middle)
        _rotate_output(linears["down"], following)
        dtype = embedding.get_parameter("weight").dtype
        shortcuts = (basis.T @ middle).to(dtype), (middle.T @ following).to(dtype)
        set_submodule(module, names[index], RotatedBlock(block, *shortcuts))
        basis = following
    set_weight(head, _double(head) @ basis)

    after = _logits(module, probe)
    deviation = float((after - before).abs().max() / before.std())
    rounding = torch.finfo(embedding.get_parameter("weight").dtype).eps
    if not deviation <= max(TOLERANCE, ROUNDINGS * rounding):
        raise _unsuitable(model, f"rotated, its logits differ by {deviation:.2g} of their spread")
    return deviation


def right_singular_vectors(weight: Tensor) -> Tensor:
    """Return V [in, in] of the full decomposition W = U S V^T of a float64 ``weight`` [out, in]."""
    rows, columns = weight.shape
    right: Tensor = torch.linalg.svd(weight, full_matrices=rows < columns).Vh
    return right.T.contiguous()


def _roles(model: LoadedModel, block: nn.Module) -> dict[str, nn.Module]:
    linears = {model.adapter.role(name): linear for name, linear in model.adapter.linears(block).items()}
    shapes = [attention | {"o", "down"} | mlp for attention in ATTENTION_INPUTS for mlp in MLP_INPUTS]
    if set(linears) not in shapes or len(linears) != len(model.adapter.linears(block)):
        raise _unsuitable(model, "its blocks are not one attention and one gated MLP")
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        if not isinstance(getattr(block, name, None), nn.Module):
            raise _unsuitable(model, f"its blocks have no {name}")
    return linears


def _named(linears: dict[str, nn.Module], choices: tuple[set[str], ...]) -> list[nn.Module]:
    return [linear for role, linear in linears.items() if any(role in choice for choice in choices)]


def _double(module: nn.Module) -> Tensor:
    return module.get_parameter("weight").detach().double()


def _fold_gain(norm: nn.Module, linears: list[nn.Module]) -> None:
    gain = _double(norm)
    for linear in linears:
        set_weight(linear, _double(linear) * gain)
    set_weight(norm, torch.ones_like(gain))


def _rotate_output(linear: nn.Module, basis: Tensor) -> None:
    set_weight(linear, basis.T @ _double(linear))
    bias = getattr(linear, "bias", None)
    if bias is not None:
        set_weight(linear, basis.T @ bias.detach().double(), "bias")


def _untie(module: nn.Module) -> None:
    """Tell the module's configuration, where it has one, that embedding and head part ways."""
    config = getattr(module, "config", None)
    if config is not None:
        config.tie_word_embeddings = False


def _logits(module: nn.Module, tokens: Tensor) -> Tensor:
    output = module(tokens.to(next(module.parameters()).device))
    return getattr(output, "logits", output).double()


def _unsuitable(model: LoadedModel, why: str) -> NotApplicableError:
    return NotApplicableError(
        f"the rotation of wina does not fit {model.name}: {why}",
        "Set transform=false to mask inputs without it.",
    )
