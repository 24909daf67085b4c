"""Rotations leave a decoder's function as it is, and say where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.hadamard import random_hadamard, random_orthogonal
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.rotation import (
    Hadamard,
    TransformedInput,
    center_embeddings,
    check_preserved,
    fuse_norms,
    probe_logits,
    residual_stream,
    rotate_heads_in,
    rotate_heads_out,
    rotate_online,
    rotate_stream,
)

Decoder = Callable[..., LoadedModel]
Logits = Callable[[nn.Module, Tensor], Tensor]

ROTATABLE = [
    "llama",
    "llama-tied",
    "llama-grouped-queries",
    "phi3",
    "opt",
    "opt-gelu",
    "mixtral",
    "qwen2-moe",
]
OTHERS = ["gemma", "gemma3", "cohere", "opt-post-norm"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ROTATABLE)
@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
def test_fused_and_rotated_decoders_have_the_same_logits(
    decoder: Decoder, tokens: Calibration, logits: Logits, name: str, make: Callable[..., Tensor]
) -> None:
    model = decoder(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    copy = model.clone()
    stream = residual_stream(copy)
    fuse_norms(stream)
    probe = probe_logits(model)
    rotate_stream(stream, make(stream.width, generator()))
    for layer in [key for key in copy.adapter.targets(copy.module) if copy.adapter.role(key) == "down"]:
        rotate_online(copy.module, layer)
    assert check_preserved(copy, probe) < 1e-4
    expected = logits(model.module, tokens.inputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(copy.module, tokens.inputs), expected, rtol=1e-4, atol=1e-5 * scale)
    assert all(torch.equal(model.module.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_in_float64_the_logits_agree_to_the_last_digits(
    decoder: Decoder, tokens: Calibration, logits: Logits, name: str
) -> None:
    model = decoder(name)
    module = model.module.double()
    for parent in [
        *model.adapter.blocks(module),
        module.get_submodule(model.adapter.stack.rpartition(".")[0]),
    ]:
        for child_name, child in parent.named_children():
            if hasattr(child, "variance_epsilon"):
                # transformers' RMSNorm computes in float32 whatever the model's dtype.
                exact = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                exact.load_state_dict(child.state_dict())
                setattr(parent, child_name, exact.requires_grad_(False))
    copy = model.clone()
    stream = residual_stream(copy)
    fuse_norms(stream)
    rotate_stream(stream, random_hadamard(stream.width, generator()))
    expected = logits(module, tokens.inputs)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(logits(copy.module, tokens.inputs), expected, rtol=1e-9, atol=1e-9)


def test_fused_norms_have_unit_gain_and_tied_embeddings_part(decoder: Decoder) -> None:
    copy = decoder("llama-tied").clone()
    stream = residual_stream(copy)
    fuse_norms(stream)
    for name in (*(branch.norm for branch in stream.flat_branches), stream.final_norm):
        assert torch.equal(copy.module.get_submodule(name).weight, torch.ones(32))
    assert not copy.module.config.tie_word_embeddings
    assert copy.module.lm_head.weight is not copy.module.model.embed_tokens.weight


@pytest.mark.parametrize("name", OTHERS)
def test_decoders_that_norms_do_not_commute_with_are_refused(decoder: Decoder, name: str) -> None:
    copy = decoder(name).clone()

    def rotate() -> None:
        stream = residual_stream(copy, "Leave it.")
        probe = probe_logits(copy)
        fuse_norms(stream)
        rotate_stream(stream, random_orthogonal(stream.width, generator()))
        check_preserved(copy, probe, "Leave it.")

    with pytest.raises(
        NotApplicableError, match=r"cannot be rotated: .*(its blocks|its logits|it has no embedding)"
    ) as caught:
        rotate()
    assert caught.value.hint == "Leave it."


def test_centred_embeddings_change_a_decoder_with_rms_norms_only(
    decoder: Decoder, tokens: Calibration, logits: Logits
) -> None:
    for name, same in (("llama", False), ("opt", True)):
        model = decoder(name)
        copy = model.clone()
        center_embeddings(residual_stream(copy))
        close = torch.allclose(
            logits(copy.module, tokens.inputs), logits(model.module, tokens.inputs), rtol=1e-4, atol=1e-4
        )
        # OPT's blocks normalize what they read, but its stream carries the mean of its untouched writers.
        assert close is same, name


def test_heads_rotate_in_pairs() -> None:
    torch.manual_seed(0)
    value, output, x = torch.randn(16, 10), torch.randn(10, 32), torch.randn(5, 10)
    rotations = torch.stack([random_orthogonal(8, generator(seed)) for seed in (0, 1)]).float()

    def run(v: Tensor, o: Tensor) -> Tensor:
        heads = (x @ v.T).view(5, 2, 1, 8).expand(5, 2, 2, 8)
        return heads.reshape(5, 32) @ o.T

    torch.testing.assert_close(
        run(rotate_heads_out(value, rotations), rotate_heads_in(output, rotations)), run(value, output)
    )
    assert rotate_heads_out(value[:, 0], rotations).shape == (16,)
    torch.testing.assert_close(
        rotate_heads_out(value, rotations)[:, 0], rotate_heads_out(value[:, 0], rotations)
    )


def test_the_layer_behind_a_transform_stays_a_target_with_its_role(decoder: Decoder) -> None:
    copy = decoder("llama").clone()
    names = list(copy.adapter.targets(copy.module))
    for name in names:
        if copy.adapter.role(name) in ("o", "down"):
            rotate_online(copy.module, name)
    found = copy.adapter.targets(copy.module)
    assert [name.removesuffix(".linear") for name in found] == names
    assert [copy.adapter.role(name) for name in found] == [copy.adapter.role(name) for name in names]
    for block in copy.adapter.blocks(copy.module):
        assert isinstance(block.mlp.down_proj, TransformedInput)
        moved = {name for group in copy.adapter.scale_groups(block) for name in group.linears}
        assert not {name for name in moved if name.endswith(".linear")}


def test_across_heads_and_head_wise_make_the_full_transform() -> None:
    x = torch.randn(3, 4 * 8, generator=generator(), dtype=torch.float64)
    within = torch.stack([Hadamard()(head) for head in x.unflatten(-1, (4, 8)).unbind(1)], 1).flatten(1)
    torch.testing.assert_close(Hadamard(heads=4)(within), Hadamard()(x))
    half = x.half()
    assert Hadamard(fp32=True)(half).dtype == torch.float16
    torch.testing.assert_close(Hadamard(fp32=True)(half), Hadamard()(half.float()).half())


def test_a_decoder_without_a_head_is_refused(decoder: Decoder) -> None:
    model = decoder("llama")
    trunk = model.module.model
    with pytest.raises(NotApplicableError, match="no embedding, head, final norm or blocks"):
        residual_stream(LoadedModel("trunk", "causal-lm", trunk, detect(trunk)))
