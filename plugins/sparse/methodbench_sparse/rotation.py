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

from methodbench.torchkit.model import LoadedModel, set_submodule
from methodbench.torchkit.rotation import (
    Branch,
    center_embeddings,
    check_preserved,
    fold_norm,
    probe_logits,
    residual_stream,
    rotate_embeddings,
    rotate_inputs,
    rotate_outputs,
    unsuitable,
    untie,
)

_HINT = "Set transform=false to mask inputs without it."
_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


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
    module = model.module
    names = model.adapter.block_names(module)
    for block in model.adapter.blocks(module):
        for child in _CHILDREN:
            if not isinstance(getattr(block, child, None), nn.Module):
                raise unsuitable(model, f"its blocks have no {child}", _HINT)
    stream = residual_stream(model, _HINT)
    guides = [
        (_guide(model, attention, ("k", "qkv")), _guide(model, mlp, ("gate", "gate_up")))
        for attention, mlp in stream.branches
    ]

    if subtract_embed_mean:
        center_embeddings(stream)
    untie(stream)
    before = probe_logits(model)
    for branch in stream.flat_branches:
        fold_norm(module, branch.norm, branch.readers)
    fold_norm(module, stream.final_norm, (stream.head,))

    bases = [right_singular_vectors(stream.weight(key)) for key, _ in guides]
    basis = bases[0]
    rotate_embeddings(stream, basis)
    for index, ((attention, mlp), (_, gate)) in enumerate(zip(stream.branches, guides, strict=True)):
        middle = right_singular_vectors(stream.weight(gate))
        following = bases[index + 1] if index + 1 < len(bases) else middle
        rotate_inputs(stream, attention.readers, basis)
        rotate_inputs(stream, mlp.readers, middle)
        rotate_outputs(stream, attention.writers, middle)
        rotate_outputs(stream, mlp.writers, following)
        dtype = module.get_submodule(stream.head).get_parameter("weight").dtype
        shortcuts = (basis.T @ middle).to(dtype), (middle.T @ following).to(dtype)
        set_submodule(module, names[index], RotatedBlock(module.get_submodule(names[index]), *shortcuts))
        basis = following
    rotate_inputs(stream, (stream.head,), basis)
    return check_preserved(model, before, _HINT)


def added_share(model: LoadedModel) -> float:
    """Return the weights of the residual products as a share of the weights of the Linears inside the blocks."""
    blocks = [block for block in model.adapter.blocks(model.module) if isinstance(block, RotatedBlock)]
    added = sum(block.attention_shortcut.numel() + block.mlp_shortcut.numel() for block in blocks)
    layers = model.adapter.targets(model.module).values()
    return added / sum(layer.get_parameter("weight").numel() for layer in layers)


def right_singular_vectors(weight: Tensor) -> Tensor:
    """Return V [in, in] of the full decomposition W = U S V^T of a float64 ``weight`` [out, in]."""
    rows, columns = weight.shape
    right: Tensor = torch.linalg.svd(weight, full_matrices=rows < columns).Vh
    return right.T.contiguous()


def _guide(model: LoadedModel, branch: Branch, roles: tuple[str, ...]) -> str:
    """Return the one reader of ``branch`` whose columns become orthogonal."""
    found = [name for name in branch.readers if model.adapter.role(name) in roles]
    if len(found) != 1 or len(branch.writers) != 1:
        raise unsuitable(model, "its blocks are not one attention and one gated MLP", _HINT)
    return found[0]
