"""OSTQuant: refining LLM quantization with orthogonal and scaling transformations (Hu et al., ICLR 2025).

Orthogonal matrices spread outliers, scales even out what is left, and both are absorbed into the weights. Here they
are learned: ``R`` on the residual stream, ``R_ov`` between values and output of each key-value head, and diagonal
``S`` behind norms, between up and down, value and output, query and key. With everything else frozen, they minimize the
divergence of the quantized model's next-token distribution ``q`` from the full-precision model's ``p`` on the ``k``
tokens that ``p`` likes best (KL-Top), rotations on the Stiefel manifold::

    L = mean over tokens of  sum_(i in top-k(p)) p_i (log p_i - log q_i)
    up <- up / S_ud, down <- down S_ud;   k <- k S_qk, q <- q / S_qk;   v <- v / S_ov R_ov, o <- o S_ov R_ov
    readers <- W R S_norm, norm gain <- 1 / S_norm;   writers <- R^T W;   E <- E R;   head <- W R

Then the transformations are merged, weights rounded by GPTQ and activations per token. *QSUR* measures how much of the
quantizer's hypercube data fill, with ``lambda, u`` eigenvalues and leading eigenvector of their covariance::

    QSUR = V_ellipsoid / V_cube = pi^(d/2) / Gamma(d/2 + 1) sqrt(prod lambda) / (2 sqrt(lambda_1) max_j |u_1j|)^d

While learning, transformations act on activations around each quantizer (``x <- Q(x R / S) S R^T``): the same function,
since weights are not rounded then. The authors' training pass scales the rows of ``o`` where their merge scales its
columns; columns are meant, and taken here throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import geoopt
import torch
from pydantic import Field, model_validator
from scipy.special import chdtri
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activations import quantize_inputs
from methodbench.torchkit.attention import Operand, transform_operands
from methodbench.torchkit.hadamard import hadamard_transform, has_hadamard, random_hadamard
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench.torchkit.quantizers import UniformGrid, extremes, groups_of, on_grid, round_ste
from methodbench.torchkit.reconstruction import fit
from methodbench.torchkit.rotation import (
    AcrossHeads,
    Hadamard,
    ResidualStream,
    center_embeddings,
    fuse_norms,
    probe_logits,
    residual_stream,
    rotate_embeddings,
    rotate_heads_in,
    rotate_heads_out,
    rotate_inputs,
    rotate_online,
)
from methodbench_quant.llm.gptq import GPTQ
from methodbench_quant.llm.layers import (
    check_calibration,
    finished,
    in_dtype,
    open_copy,
    replace_linear,
    single_precision,
    weight_of,
)
from methodbench_quant.llm.settings import check_group_size

Bits = Annotated[int, Field(ge=2, le=16)]
Rate = Annotated[float, Field(gt=0)]


@hyperparameters
class OSTQuant:
    """Learns rotations and scales end to end, merges them, and rounds weights and activations."""

    w_bits: Annotated[Bits, Field(description="weight bits; 16 leaves weights alone")] = 4
    w_rounding: Annotated[
        Literal["gptq", "rtn"], Field(description="how weights are rounded: error feedback, or to nearest")
    ] = "gptq"
    w_group_size: Annotated[
        int, Field(ge=-1, description="input columns that share a scale; -1 for one per output channel")
    ] = -1
    w_clip: Annotated[bool, Field(description="search the clipping of every weight grid")] = True
    percdamp: Annotated[float, Field(gt=0, le=1, description="damping of GPTQ's Hessian")] = 0.01
    a_bits: Annotated[Bits, Field(description="bits of the inputs of all layers, per token")] = 4
    a_asym: Annotated[bool, Field(description="activation grids with a zero point")] = True
    a_clip_ratio: Annotated[float, Field(gt=0, le=1, description="factor on a token's extremes")] = 1.0
    kv_bits: Annotated[Bits, Field(description="bits of keys and values, per token and head")] = 16
    online_qk: Annotated[
        bool, Field(description="Hadamard matrices on keys and queries, with a quantized cache")
    ] = False
    rotate_ov: Annotated[bool, Field(description="learn a rotation per key-value head")] = True
    smooth_ov: Annotated[bool, Field(description="learn scales between value and output")] = True
    smooth_qk: Annotated[bool, Field(description="learn scales between key and query")] = True
    smooth_up_down: Annotated[bool, Field(description="learn scales between up and down")] = True
    smooth_norm: Annotated[bool, Field(description="learn scales behind the norms")] = True
    tie_rotary: Annotated[
        bool, Field(description="one key scale per rotary pair: exact, unlike the authors' free channels")
    ] = False
    subtract_embed_mean: Annotated[bool, Field(description="centre the embeddings first")] = False
    use_klt: Annotated[
        bool,
        Field(description="start from principal axes times a random Hadamard matrix, not from that alone"),
    ] = True
    loss: Annotated[
        Literal["kl_top", "r_kl_top", "kl"],
        Field(description="divergence on the teacher's or the student's best tokens, or on all"),
    ] = "kl_top"
    top_k: Annotated[int, Field(ge=1, description="tokens of the vocabulary that count")] = 1000
    softmax_first: Annotated[
        bool, Field(description="normalize over the whole vocabulary before the selection, not after")
    ] = True
    steps: Annotated[int, Field(ge=0, description="optimizer steps; 0 keeps the first rotations")] = 100
    batch_size: Annotated[int, Field(ge=1, description="sequences per step")] = 32
    rotate_lr: Annotated[Rate, Field(description="learning rate of rotations")] = 0.01689753
    smooth_lr: Annotated[Rate, Field(description="learning rate of scales")] = 0.00178988

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_group_size(self.w_group_size, "w_group_size")
        if 8 < self.w_bits < 16:
            raise ValueError("w_bits is 2 to 8, or 16 to leave the weights alone")
        return self

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the transformed and rounded model, learned and calibrated on ``data`` (token ids).

        Raises:
            NotApplicableError: no calibration inputs; blocks that are not Llama's; a width that is no order of a
                known Hadamard matrix.
            DivergedError: weights, activations or losses are not finite.
        """
        if self.steps and not len(data):
            raise NotApplicableError("learning needs inputs for calibration, and there are none")
        model, dtype = single_precision(model)
        model = open_copy(model)
        if self.steps and (self.w_bits == 16 or self.w_rounding == "rtn"):
            # GPTQ looks after this itself.
            check_calibration(model, data, ctx)
        stream = residual_stream(model)
        probe_logits(model)
        sites = [site_of(model, index) for index in range(len(stream.branches))]
        with torch.no_grad():
            if self.subtract_embed_mean:
                center_embeddings(stream)
            fuse_norms(stream)
        generator = torch.Generator().manual_seed(ctx.seed)
        learned = self.start(stream, sites, generator)
        plain = reader_covariance(stream)
        start = learned.rotation.detach().double().clone()
        with ctx.phase("learn"):
            losses = self.learn(model, sites, learned, data) if self.steps else []
        with ctx.phase("merge"), torch.no_grad():
            merge(stream, sites, learned)
        facts: dict[str, Any] = {
            "losses": losses,
            "qsur": {
                name: log_qsur(rotation.T @ plain @ rotation)
                for name, rotation in (
                    ("plain", torch.eye(stream.width, dtype=torch.float64, device=plain.device)),
                    ("start", start),
                    ("learned", learned.rotation.detach().double()),
                )
            },
        }
        model = self._round_weights(model, data, ctx) if self.w_bits < 16 else finished(model, {})
        if self.a_bits < 16:
            self._quantize_inputs(model, sites)
            facts["activations"] = f"{self.a_bits} bits, simulated"
        if self.kv_bits < 16:
            transform_operands(model, lambda _: self._cache_transforms(sites[0].head_dim))
            facts["keys and values"] = f"{self.kv_bits} bits, simulated"
        model.facts.update(facts)
        return in_dtype(model, dtype)

    def start(self, stream: ResidualStream, sites: list[Site], generator: torch.Generator) -> Learned:
        """Return the transformations at their first values; norms must be folded."""
        device = stream.weight(sites[0].down).device
        rotation = random_hadamard(stream.width, generator).to(device)
        if self.use_klt:
            rotation = principal_axes(reader_covariance(stream)) @ rotation
        blocks = []
        for site in sites:
            heads = torch.stack([self._head_rotation(site, generator) for _ in range(site.kv_heads)]).to(
                device
            )
            if self.use_klt:
                output = stream.weight(site.o).view(
                    -1, site.kv_heads, site.heads // site.kv_heads, site.head_dim
                )
                rows = output.permute(1, 0, 2, 3).flatten(1, 2)
                heads = torch.stack([principal_axes(row.T.cov()) for row in rows]) @ heads
            if not self.rotate_ov:
                heads = torch.eye(site.head_dim, dtype=torch.float64, device=device).expand_as(heads)
            blocks.append(
                BlockTransforms.first(site, stream.width, stream.weight(site.down).shape[1], heads.float())
            )
        learned = Learned(rotation.float(), blocks)
        for name, chosen in (("vo", self.smooth_ov), ("qk", self.smooth_qk), ("updown", self.smooth_up_down)):
            for block in blocks:
                getattr(block, name).requires_grad_(chosen)
        for block in blocks:
            block.heads.requires_grad_(self.rotate_ov)
            block.attention.requires_grad_(self.smooth_norm)
            block.mlp.requires_grad_(self.smooth_norm)
            block.tied = self.tie_rotary
        return learned

    @staticmethod
    def _head_rotation(site: Site, generator: torch.Generator) -> Tensor:
        if has_hadamard(site.head_dim):
            return random_hadamard(site.head_dim, generator)
        return torch.eye(site.head_dim, dtype=torch.float64)

    def learn(
        self, model: LoadedModel, sites: list[Site], learned: Learned, data: Calibration
    ) -> list[float]:
        """Minimize the loss over ``learned``; returns its mean in the first and in the last pass over the data."""
        batches = data.inputs.to(learned.rotation.device).split(self.batch_size)
        parameters = [p for p in learned.parameters() if p.requires_grad]
        rotations = [p for p in parameters if p.ndim > 1]
        scales = [p for p in parameters if p.ndim == 1]
        groups = [
            {"params": tensors, "lr": rate}
            for tensors, rate in ((rotations, self.rotate_lr), (scales, self.smooth_lr))
            if tensors
        ]
        optimizer = geoopt.optim.RiemannianAdam(groups, lr=self.rotate_lr, stabilize=10)

        def loss(batch: int, _: float) -> Tensor:
            with torch.no_grad():
                teacher = model.module(batches[batch], use_cache=False).logits
            with self.transformed(model, sites, learned):
                student = model.module(batches[batch], use_cache=False).logits
            k = teacher.shape[-1] if self.loss == "kl" else self.top_k
            return kl_top(teacher, student, k, self.softmax_first, reverse=self.loss == "r_kl_top")

        found = fit(optimizer, loss, len(batches), steps=self.steps, schedule="linear", name="ostquant")
        return [found.first, found.last]

    def transformed(self, model: LoadedModel, sites: list[Site], learned: Learned) -> ExitStack:
        """Make ``model`` compute with the transformations and quantizers until the context is left.

        Every quantizer sees the tensor that it sees in the merged model; what it returns is transformed back.
        """
        hooks = ExitStack()
        for site, block in zip(sites, learned.transforms, strict=True):
            for handle in self._hooks(model, site, block, learned.rotation):
                hooks.callback(handle.remove)
        return hooks

    def _hooks(
        self, model: LoadedModel, site: Site, block: BlockTransforms, rotation: Tensor
    ) -> Iterator[RemovableHandle]:
        a, kv = self._quantizer(self.a_bits), self._quantizer(self.kv_bits, asymmetric=True)

        def leaving(name: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
            return model.module.get_submodule(name).register_forward_hook(lambda _, __, y: change(y))

        def entering(name: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
            return model.module.get_submodule(name).register_forward_pre_hook(lambda _, x: (change(x[0]),))

        def behind_norm(scale: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda y: (a(y @ rotation / scale) * scale) @ rotation.T

        def before_down(x: Tensor) -> Tensor:
            rounded = a(hadamard_transform(x / block.updown))
            return hadamard_transform(rounded, transpose=True) * block.updown

        def through_heads(x: Tensor, quantizer: TokenQuantizer, shape: tuple[int, int, int]) -> Tensor:
            scale = block.vo.view(site.kv_heads, 1, site.head_dim)
            heads = x.unflatten(-1, shape) / scale
            rounded = quantizer(torch.einsum("...hgi,hij->...hgj", heads, block.heads))
            return (torch.einsum("...hgj,hij->...hgi", rounded, block.heads) * scale).flatten(-3)

        one = (site.kv_heads, 1, site.head_dim)
        shared = (site.kv_heads, site.heads // site.kv_heads, site.head_dim)
        yield leaving(site.attention_norm, behind_norm(block.attention))
        yield leaving(site.mlp_norm, behind_norm(block.mlp))
        yield entering(site.down, before_down)
        yield entering(site.o, lambda x: through_heads(x, a, shared))
        if self.kv_bits < 16:
            yield leaving(site.v, lambda y: through_heads(y, kv, one))
        if self.smooth_qk:
            yield leaving(site.k, lambda y: y * block.key_scale)
            yield leaving(site.q, lambda y: y / per_query_head(block.key_scale, site))

    def _round_weights(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        if self.w_rounding == "gptq":
            grid: dict[str, Any] = {"convention": "absmax", "symmetric": True, "mse": self.w_clip}
            gptq = GPTQ(
                bits=self.w_bits,
                group_size=self.w_group_size,
                percdamp=self.percdamp,
                true_sequential=True,
                **grid,
            )
            return gptq.compress(model, data, ctx)
        for name in list(model.adapter.targets(model.module)):
            grouped = groups_of(weight_of(model.module.get_submodule(name)), self.w_group_size, name)
            found = weight_grid(grouped, self.w_bits, search=self.w_clip)
            replace_linear(model.module, name, on_grid(grouped, found, self.w_bits, name))
        return finished(model, {})

    def _quantize_inputs(self, model: LoadedModel, sites: list[Site]) -> None:
        heads = {site.o: site.head_dim for site in sites}
        quantize_inputs(model, lambda name: self._quantizer(self.a_bits, heads.get(name, -1)))

    def _quantizer(self, bits: int, group_size: int = -1, asymmetric: bool | None = None) -> TokenQuantizer:
        chosen = self.a_asym if asymmetric is None else asymmetric
        return TokenQuantizer(bits, group_size=group_size, symmetric=not chosen, clip=self.a_clip_ratio)

    def _cache_transforms(self, head_dim: int) -> dict[Operand, nn.Module]:
        quantizer = self._quantizer(self.kv_bits, head_dim, asymmetric=True)
        found: dict[Operand, nn.Module] = {"key": AcrossHeads(quantizer), "value": AcrossHeads(quantizer)}
        if self.online_qk:
            found["query"] = Hadamard(fp32=True)
            found["key"] = nn.Sequential(Hadamard(fp32=True), found["key"])
        return found


@dataclass(frozen=True, slots=True)
class Site:
    """Names of one block's layers in the model, and the shape of its heads."""

    attention_norm: str
    mlp_norm: str
    q: str
    k: str
    v: str
    o: str
    up: str
    gate: str
    down: str
    head_dim: int
    heads: int
    kv_heads: int


def site_of(model: LoadedModel, index: int) -> Site:
    """Return the layers of block ``index``.

    Raises:
        NotApplicableError: it is not one attention with separate layers and one gated feed-forward network.
    """
    stream = residual_stream(model)
    attention, mlp = stream.branches[index]
    names = (*attention.readers, *attention.writers, *mlp.readers, *mlp.writers)
    roles = {model.adapter.role(name): name for name in names}
    size = getattr(model.module.get_submodule(attention.writers[0].rpartition(".")[0]), "head_dim", None)
    if (
        set(roles) != {"q", "k", "v", "o", "gate", "up", "down"}
        or len(names) != 7
        or not isinstance(size, int)
    ):
        raise NotApplicableError(
            f"block {index} of {model.name} is not one attention and one gated feed-forward network",
            "OSTQuant transforms blocks like Llama's.",
        )

    def heads(role: str) -> int:
        return int(model.module.get_submodule(roles[role]).out_features) // size  # type: ignore[arg-type]

    return Site(attention.norm, mlp.norm, **roles, head_dim=size, heads=heads("q"), kv_heads=heads("k"))


class BlockTransforms(nn.Module):
    """Rotations of the key-value heads [kv heads, head dim, head dim] and scales of one block, all of one at first."""

    heads: Tensor
    vo: Tensor
    qk: Tensor
    updown: Tensor
    attention: Tensor
    mlp: Tensor

    def __init__(self, heads: Tensor, scales: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.heads = geoopt.ManifoldParameter(heads.clone(), manifold=geoopt.Stiefel())
        for name, scale in scales.items():
            setattr(self, name, nn.Parameter(scale.clone()))
        self.tied = False

    @classmethod
    def first(cls, site: Site, width: int, wide: int, heads: Tensor) -> BlockTransforms:
        """Return scales of one for a block of ``width`` channels, ``wide`` inside its feed-forward network."""
        channels, ones, inner = (
            torch.ones(size, device=heads.device) for size in (site.kv_heads * site.head_dim, width, wide)
        )
        return cls(heads, {"vo": channels, "qk": channels, "updown": inner, "attention": ones, "mlp": ones})

    @property
    def key_scale(self) -> Tensor:
        """Scale of the key channels [kv heads * head dim]; the mean of a rotary pair where tied."""
        if not self.tied:
            return self.qk
        pairs = self.qk.view(self.heads.shape[0], 2, -1)
        return pairs.mean(1, keepdim=True).expand_as(pairs).reshape(-1)


class Learned(nn.Module):
    """The rotation of the residual stream [width, width] and the transformations of every block."""

    rotation: Tensor

    def __init__(self, rotation: Tensor, blocks: list[BlockTransforms]) -> None:
        super().__init__()
        self.rotation = geoopt.ManifoldParameter(rotation.clone(), manifold=geoopt.Stiefel())
        self.blocks = nn.ModuleList(blocks)

    @property
    def transforms(self) -> list[BlockTransforms]:
        """The transformations of the blocks, in order."""
        return [block for block in self.blocks if isinstance(block, BlockTransforms)]


def per_query_head(scale: Tensor, site: Site) -> Tensor:
    """Repeat a scale of key-value channels for each query head that reads them."""
    heads = scale.view(site.kv_heads, 1, site.head_dim)
    return heads.expand(-1, site.heads // site.kv_heads, -1).reshape(-1)


def merge(stream: ResidualStream, sites: list[Site], learned: Learned) -> None:
    """Absorb the transformations into the weights, in place, and put the Hadamard matrix before ``down``."""
    rotation = learned.rotation.double()
    for site, block in zip(sites, learned.transforms, strict=True):
        names = {role: getattr(site, role) for role in ("q", "k", "v", "o", "up", "gate", "down")}
        before = {role: stream.weight(name) for role, name in names.items()}
        for role, weight in merged(before, site, block, rotation).items():
            set_weight(stream.module.get_submodule(names[role]), weight)
        _merge_biases(stream, names, site, block, rotation)
        for norm, scale in ((site.attention_norm, block.attention), (site.mlp_norm, block.mlp)):
            set_weight(stream.module.get_submodule(norm), 1 / scale)
    rotate_embeddings(stream, rotation)
    rotate_inputs(stream, (stream.head,), rotation)
    for site in sites:
        rotate_online(stream.module, site.down)


def merged(
    weights: Mapping[str, Tensor], site: Site, block: BlockTransforms, rotation: Tensor
) -> dict[str, Tensor]:
    """Return a block's weights [out, in] by role with the transformations absorbed, in the weights' dtype."""
    dtype = rotation.dtype
    updown, vo, qk, heads = (t.to(dtype) for t in (block.updown, block.vo, block.key_scale, block.heads))
    w = dict(weights)
    w["up"], w["down"] = w["up"] / updown[:, None], w["down"] * updown
    w["k"], w["q"] = w["k"] * qk[:, None], w["q"] / per_query_head(qk, site)[:, None]
    w["v"], w["o"] = w["v"] / vo[:, None], w["o"] * per_query_head(vo, site)
    w["v"], w["o"] = rotate_heads_out(w["v"], heads), rotate_heads_in(w["o"], heads)
    for role, scale in (("q", block.attention), ("k", block.attention), ("v", block.attention)):
        w[role] = w[role] @ rotation * scale.to(dtype)
    for role in ("up", "gate"):
        w[role] = w[role] @ rotation * block.mlp.to(dtype)
    for role in ("o", "down"):
        w[role] = rotation.T @ w[role]
    return w


def _merge_biases(
    stream: ResidualStream, names: Mapping[str, str], site: Site, block: BlockTransforms, rotation: Tensor
) -> None:
    scales = {
        "up": 1 / block.updown,
        "k": block.key_scale,
        "q": 1 / per_query_head(block.key_scale, site),
        "v": 1 / block.vo,
    }
    for role, name in names.items():
        layer = stream.module.get_submodule(name)
        if getattr(layer, "bias", None) is None:
            continue
        bias = layer.get_parameter("bias").double()
        bias = bias * scales[role].double() if role in scales else bias
        if role == "v":
            bias = rotate_heads_out(bias, block.heads.double())
        set_weight(layer, rotation.T @ bias if role in ("o", "down") else bias, "bias")


def kl_top(
    teacher: Tensor, student: Tensor, k: int, softmax_first: bool = True, reverse: bool = False
) -> Tensor:
    """Return the divergence on ``k`` tokens per position, a mean over positions.

    Args:
        teacher: logits [..., vocabulary].
        student: logits of the same shape.
        softmax_first: normalize over the vocabulary and select then, so that the selected shares do not sum to one.
        reverse: select the student's best tokens, and sum ``q (log q - log p)``.
    """
    p, q = (student, teacher) if reverse else (teacher, student)
    best = p.detach().topk(min(k, p.shape[-1]), dim=-1, sorted=False).indices
    if softmax_first:
        log_p, log_q = p.log_softmax(-1).gather(-1, best), q.log_softmax(-1).gather(-1, best)
    else:
        log_p, log_q = p.gather(-1, best).log_softmax(-1), q.gather(-1, best).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def symmetric_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return ``max(mn / -2^(b-1), mx / (2^(b-1) - 1))``: neither end is clipped."""
    half = 2 ** (bits - 1)
    return torch.maximum(low / -half, high / (half - 1))


def quantize_token(x: Tensor, bits: int, *, symmetric: bool = False, clip: float = 1.0) -> Tensor:
    """Return ``x`` [..., n] on the authors' grid of every group (the last axis), differentiable.

    Extremes are widened to 0 and multiplied by ``clip``. Symmetric: :func:`symmetric_scale`. Asymmetric:
    ``s = max(mx - mn, 1e-6) / (2^b - 1)``, ``z = round(-mn / s)``. Gradients pass the rounding of ``x / s`` as if it
    were the identity, the rounding of ``z`` not at all, and end where a code is clamped.
    """
    low, high = extremes(x)
    low, high = low.clamp(max=0) * clip, high.clamp(min=1e-6) * clip
    if symmetric:
        scale = symmetric_scale(low, high, bits)
        return round_ste(x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    scale = (high - low).clamp(min=1e-6) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((round_ste(x / scale) + zero).clamp(0, 2**bits - 1) - zero) * scale


def weight_grid(x: Tensor, bits: int, *, search: bool = True) -> UniformGrid:
    """Return the authors' symmetric grid of every group of a weight (the last axis).

    With ``search`` the scale is multiplied by the ``1 - i / 100``, ``i < 80``, of the least squared error.
    """
    half = 2 ** (bits - 1)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    full = symmetric_scale(low.clamp(max=0), high.clamp(min=0), bits).clamp(min=1e-8)
    best, least = full, torch.full_like(full, torch.inf)
    for i in range(80 if search else 0):
        scale = full * (1 - i / 100)
        error = UniformGrid(scale, None, -half, half - 1).snap(x).sub_(x).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return UniformGrid(best, None, -half, half - 1)


class TokenQuantizer(nn.Module):
    """Rounds each token, or each group of its features, by :func:`quantize_token`."""

    def __init__(
        self, bits: int, *, group_size: int = -1, symmetric: bool = False, clip: float = 1.0
    ) -> None:
        super().__init__()
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """Return the levels of ``x`` [..., features]; ``x`` itself at 16 bits."""
        if self.bits == 16:
            return x
        grouped = x if self.group_size == -1 else groups_of(x, self.group_size, "the activation")
        return quantize_token(grouped, self.bits, symmetric=self.symmetric, clip=self.clip).view_as(x)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"


def reader_covariance(stream: ResidualStream) -> Tensor:
    """Return the covariance of the rows of all layers that read the stream, float64 [width, width]."""
    device = stream.weight(stream.head).device
    count, total = 0, torch.zeros(stream.width, dtype=torch.float64, device=device)
    square = torch.zeros(stream.width, stream.width, dtype=torch.float64, device=device)
    for branch in stream.flat_branches:
        for name in branch.readers:
            rows = stream.weight(name)
            count, total = count + len(rows), total + rows.sum(0)
            square.addmm_(rows.T, rows)
    mean = total / count
    return square / count - mean.outer(mean)


def principal_axes(covariance: Tensor) -> Tensor:
    """Return the eigenvectors of a covariance as columns, eigenvalues ascending (Karhunen-Loève transform)."""
    return torch.linalg.eigh(covariance).eigenvectors


def log_qsur(covariance: Tensor, mean: Tensor | None = None, confidence: float = 0.99) -> float:
    """Return ``log(QSUR) / d``, the quantization space utilization of Gaussian data per dimension.

    Args:
        covariance: float64 [d, d].
        mean: [d]; zero where it is not given, and the confidence then has no influence.
        confidence: share of the data that the ellipsoid holds.
    """
    d = covariance.shape[0]
    values, vectors = torch.linalg.eigh(covariance.double())
    largest, leading = values[-1], vectors[:, -1].abs()
    values = values.clamp(min=1e-12 * float(largest))
    radius = math.sqrt(float(chdtri(d, 1 - confidence)))
    reach = radius * largest.sqrt() * leading
    centre = torch.zeros_like(leading) if mean is None else mean.double()
    edge = (centre + reach).max() - (centre - reach).min()
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    log_ellipsoid = log_ball + d * math.log(radius) + 0.5 * float(values.log().sum())
    return log_ellipsoid / d - math.log(float(edge))
