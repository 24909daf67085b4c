"""Planted truth: small models and problems whose right answer is known because it was put there.

Decoders and vision transformers with outlier channels at known places, linear layers with a known optimal
code, images whose evidence and masks are known to the pixel, quadratics with a known condition number and
minimum, a teacher whose labels a student can learn. All are drawn from a seed and built in well under a second
(apart from importing their libraries), on the CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import MissingExtraError
from methodbench.torchkit.adapters import Adapter, detect, unfuse_experts
from methodbench.torchkit.closures import Closure, TrainingClosure, training_step
from methodbench.torchkit.model import Calibration, LoadedModel
from methodbench.torchkit.outliers import inject_outliers

#: Width of the planted transformers: the group sizes in use (32, 64, 128) divide it.
WIDTH = 128
VOCABULARY = 96
OUTLIER_FACTOR = 16.0
OUTLIER_CHANNELS = 4
CLASSES = 3
IMAGE_SIZE = 32
#: Bits of the code that :func:`coded_linear` plants, and the share of zeros in it.
CODE_BITS = 4
CODE_SPARSITY = 0.5

#: Structures that can stand for a kind of model, the most common one first.
STRUCTURES: Mapping[str, tuple[str, ...]] = {
    "causal-lm": ("llama", "opt", "mixture"),
    "vit": ("vit",),
    "cnn": ("cnn",),
    "sentence-encoder": ("bert",),
}


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator that starts at ``seed``."""
    return torch.Generator().manual_seed(seed)


def build(structure: str, seed: int = 0, *, outliers: bool = True) -> LoadedModel:
    """Return the planted model of a structure named in :data:`STRUCTURES`.

    Transformers are random and carry outlier channels behind the norms of their blocks (see
    :func:`methodbench.torchkit.outliers.inject_outliers`); their facts list the channels. ``cnn`` is
    :func:`evidence_network`.

    Raises:
        MissingExtraError: the library that defines the structure is not installed.
    """
    kept = _built(structure, seed, outliers)
    return dataclasses.replace(kept, module=copy.deepcopy(kept.module), facts=copy.deepcopy(kept.facts))


@functools.lru_cache(maxsize=32)
def _built(structure: str, seed: int, outliers: bool) -> LoadedModel:
    if structure == "cnn":
        return evidence_network(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = (_vit if structure == "vit" else _transformer)(structure)
        module.eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.05)
    unfuse_experts(module)
    adapter = detect(module)
    model = LoadedModel(f"planted-{structure}", adapter.kind, module, adapter)
    if outliers and structure != "bert":
        model = inject_outliers(model, factor=OUTLIER_FACTOR, channels=OUTLIER_CHANNELS, seed=seed)
    model.facts["planted"] = {"structure": structure, "seed": seed}
    return model


def _transformer(structure: str) -> nn.Module:
    try:
        import transformers as hf
    except ImportError as error:
        raise MissingExtraError(f"the planted {structure}", "transformers") from error
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    wide = {**sizes, "intermediate_size": 2 * WIDTH, "initializer_range": 0.09}
    gated = {**wide, "num_key_value_heads": 2, "use_cache": False}
    if structure == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**gated, tie_word_embeddings=False))
    if structure == "mixture":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**gated, num_local_experts=4, num_experts_per_tok=2))
    if structure == "opt":
        config = hf.OPTConfig(
            **sizes, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, init_std=0.09, use_cache=False
        )
        return hf.OPTForCausalLM(config)
    return hf.BertModel(hf.BertConfig(**wide))


def _vit(structure: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("the planted vit", "timm") from error
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=IMAGE_SIZE,
        patch_size=8,
        num_classes=CLASSES,
        embed_dim=WIDTH,
        depth=2,
        num_heads=4,
    )


def inputs(structure: str, count: int, seed: int) -> Calibration:
    """Return ``count`` inputs of a planted model: token ids [count, 24], or images [count, 3, 32, 32]."""
    if structure in ("vit", "cnn"):
        return Calibration(evidence_images(count, seed).images, f"{count} planted images, seed {seed}")
    ids = torch.randint(2, VOCABULARY, (count, 24), generator=generator(seed))
    return Calibration(ids, f"{count} random sequences of 24 tokens, seed {seed}")


def output(module: nn.Module, x: Tensor) -> Tensor:
    """Return a model's scores (or last hidden states) for inputs ``x``, without gradients."""
    with torch.no_grad():
        out = module(x)
    found = out if isinstance(out, Tensor) else out[0]
    assert isinstance(found, Tensor)
    return found


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return each sample's squared error as a share of what a constant would miss: float64 [samples].

    0 is perfect; 1 is no better than the mean of the expected values, sample by sample.
    """
    got, wanted = actual.double().flatten(1), expected.double().flatten(1)
    spread = (wanted - wanted.mean(1, keepdim=True)).square().sum(1)
    return (got - wanted).square().sum(1) / spread.clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, slots=True)
class LinearBed:
    """A model of one Linear without bias, and inputs [sequences, tokens, in] with outlier channels."""

    model: LoadedModel
    data: Calibration
    unseen: Tensor
    """Inputs that are not in ``data``, drawn from the same distribution."""


def linear_bed(weight: Tensor, seed: int = 0) -> LinearBed:
    """Return the model ``x W^T`` for ``weight`` [out, in], as one block that holds one Linear.

    Inputs are correlated normals; a few channels are :data:`OUTLIER_FACTOR` times as large as the rest.
    """
    columns = weight.shape[1]
    draw = generator(seed)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=draw) / math.sqrt(columns)
    gain = torch.ones(columns)
    gain[torch.randperm(columns, generator=draw)[:OUTLIER_CHANNELS]] = OUTLIER_FACTOR

    def sample(sequences: int) -> Tensor:
        return torch.randn(sequences, 16, columns, generator=draw) @ mixing * gain

    layer = nn.Linear(columns, weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    module = nn.Sequential(nn.Sequential(layer)).eval()
    adapter = Adapter(kind="causal-lm", stages=("0",))
    model = LoadedModel("planted-linear", "causal-lm", module, adapter)
    return LinearBed(model, Calibration(sample(16), f"planted inputs, seed {seed}"), sample(8))


def random_weight(seed: int, rows: int = 32, columns: int = WIDTH) -> Tensor:
    """Return a weight [rows, columns] with normal entries and a spread that differs from row to row."""
    draw = generator(seed)
    spread = torch.exp(0.5 * torch.randn(rows, 1, generator=draw)) / math.sqrt(columns)
    return torch.randn(rows, columns, generator=draw) * spread


def coded_linear(seed: int, rows: int = 32, columns: int = WIDTH) -> Tensor:
    """Return a weight [rows, columns] that both a 4-bit grid and half of its entries hold without loss.

    Every row is ``s (q - 8)`` with codes of :data:`CODE_BITS` bits. Of every four entries two are zero; the
    others have codes other than 8, and the lowest and the highest code are among each 32 of them. So rounding to
    4 bits with a zero point, per row or in groups of at least 32, has error 0 at best, and so has removing
    half of the entries, anywhere or as 2:4.
    """
    draw = generator(seed)
    scale = torch.exp(0.5 * torch.randn(rows, 1, generator=draw)) / 64
    values = torch.randint(0, 2**CODE_BITS - 1, (rows, columns), generator=draw)
    middle = 2 ** (CODE_BITS - 1)
    codes = torch.where(values >= middle, values + 1, values)
    order = torch.rand(rows, columns // 4, 4, generator=draw).argsort(-1).flatten(1)
    codes[order >= 2] = middle
    kept = (order < 2).unflatten(1, (columns // 32, 32))
    grouped = codes.unflatten(1, (columns // 32, 32))
    rank = kept.cumsum(-1)
    grouped[kept & (rank == 1)] = 0
    grouped[kept & (rank == 2)] = 2**CODE_BITS - 1
    return scale * (grouped.flatten(1) - middle)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Images [B, 3, H, W] and where the evidence for each class lies."""

    images: Tensor
    labels: Tensor
    """int64 [B]: the class of the large patch."""
    masks: Tensor
    """bool [B, H, W]: the patch of ``labels``, to the pixel."""
    distractors: Tensor
    """bool [B, H, W]: a smaller patch of another class."""


def evidence_images(count: int, seed: int) -> Evidence:
    """Draw images of grey noise with a patch of the labelled class and a smaller one of another class.

    A patch of class k raises colour k and lowers the others; the two do not overlap.
    """
    draw = generator(seed)
    images = 0.15 * torch.randn(count, CLASSES, IMAGE_SIZE, IMAGE_SIZE, generator=draw)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    others = (labels + torch.randint(1, CLASSES, (count,), generator=draw)) % CLASSES
    masks = torch.zeros(2, count, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    half = IMAGE_SIZE // 2
    for index in range(count):
        # One patch in the left half and one in the right half, so that they never meet.
        left = int(torch.randint(2, (), generator=draw))
        for which, (label, side) in enumerate(((labels[index], 10), (others[index], 6))):
            offset = half * (left if which == 0 else 1 - left)
            top = int(torch.randint(IMAGE_SIZE - side + 1, (), generator=draw))
            start = offset + int(torch.randint(half - side + 1, (), generator=draw))
            patch = (slice(top, top + side), slice(start, start + side))
            masks[which, index][patch] = True
            images[index][:, patch[0], patch[1]] -= 0.5
            images[index, label][patch] += 1.5
    return Evidence(images, labels, masks[0], masks[1])


def weak_labels(seen: Evidence) -> dict[str, object]:
    """Return what a segmenter may learn from: images, their classes, and the middle of each labelled patch."""
    points = []
    for mask in seen.masks:
        rows, columns = mask.nonzero().float().mean(0)
        points.append(torch.stack([columns, rows])[None])
    return {"images": seen.images, "labels": seen.labels, "points": points}


class EvidenceNet(nn.Module):
    """Two convolutions, global mean and a Linear, with weights that are written down instead of trained.

    The first :data:`CLASSES` channels answer to the patches of their class; the others are random and all but
    ignored by the head. :func:`evidence_network` fills it.
    """

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(CLASSES, channels, 5, stride=2, padding=2), nn.ReLU()),
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, 3]."""
        scores: Tensor = self.fc(self.pool(self.features(x)).flatten(1))
        return scores


def evidence_network(seed: int = 0) -> LoadedModel:
    """Return a classifier of :func:`evidence_images` that is right by construction."""
    draw = generator(seed)
    module = EvidenceNet()
    first, second = (module.get_submodule(f"features.{stage}.0") for stage in (0, 1))
    channels = module.fc.in_features
    with torch.no_grad():
        for layer, noise in ((first, 0.03), (second, 0.02)):
            layer.get_parameter("weight").normal_(std=noise, generator=draw)
            layer.get_parameter("bias").normal_(std=0.02, generator=draw)
        opponent = 1.5 * torch.eye(CLASSES) - 0.5
        first.get_parameter("weight")[:CLASSES] = opponent[:, :, None, None] / 25
        first.get_parameter("bias")[:CLASSES] = -0.25
        centre = second.get_parameter("weight")[:, :, 1, 1]
        centre += torch.eye(channels)
        module.fc.weight.normal_(std=0.02, generator=draw)
        module.fc.weight[:, :CLASSES] += 10 * opponent
        module.fc.bias.zero_()
    module.eval().requires_grad_(False)
    model = LoadedModel("planted-cnn", "cnn", module, detect(module))
    model.facts["planted"] = {"structure": "cnn", "seed": seed}
    return model


def evidence_mass(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map's mass inside its mask, float64 [B]; NaN for a map that is zero."""
    maps = maps.double()
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2))


def points_at(maps: Tensor, masks: Tensor) -> Tensor:
    """Return 1 where the highest pixel of a map lies inside its mask, float64 [B]."""
    highest = maps.flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, highest)[:, 0].double()


@dataclass(frozen=True, slots=True)
class Quadratic:
    """``f(x) = (x - minimum)^T hessian (x - minimum) / 2``, float64; the largest curvature is 1."""

    hessian: Tensor
    minimum: Tensor
    start: Tensor
    condition: float

    def value(self, x: Tensor) -> Tensor:
        """Return f at ``x`` [dim], a scalar: the gap to the minimum, which is 0."""
        offset = x - self.minimum
        return 0.5 * offset @ self.hessian @ offset


def quadratic(seed: int, condition: float = 100.0, dimension: int = 16) -> Quadratic:
    """Return a rotated quadratic whose curvatures run from 1 / ``condition`` to 1, evenly in the logarithm."""
    draw = generator(seed)
    basis, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=draw, dtype=torch.float64))
    curvature = torch.logspace(-math.log10(condition), 0, dimension, dtype=torch.float64)
    minimum = torch.randn(dimension, generator=draw, dtype=torch.float64)
    start = minimum + torch.randn(dimension, generator=draw, dtype=torch.float64)
    return Quadratic(basis * curvature @ basis.T, minimum, start, condition)


def descend(
    problem: Quadratic,
    build_optimizer: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer],
    steps: int,
) -> Tensor:
    """Return the gaps before each of ``steps`` steps and after the last, float64 [steps + 1].

    Args:
        build_optimizer: makes the optimizer of one group that holds a matrix [4, dim / 4].
    """
    x = nn.Parameter(problem.start.clone().view(4, -1))
    optimizer = build_optimizer([{"params": [x], "role": "matrix"}])
    closure = Closure([x], lambda _: x.flatten(), lambda point, _: problem.value(point))
    gaps = []
    for _ in range(steps):
        gaps.append(problem.value(x.detach().flatten()))
        optimizer.step(closure)  # type: ignore[arg-type]
    gaps.append(problem.value(x.detach().flatten()))
    return torch.stack(gaps)


@dataclass(frozen=True, slots=True)
class Lessons:
    """Inputs [N, 16] and classes [N] that a random linear teacher gave, for training and for testing."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def lessons(seed: int, count: int = 512) -> Lessons:
    """Return samples that a linear model separates without error."""
    draw = generator(seed)
    teacher = torch.randn(CLASSES, 16, generator=draw)
    x = torch.randn(2 * count, 16, generator=draw)
    y = (x @ teacher.T).argmax(1)
    return Lessons(x[:count], y[:count], x[count:], y[count:])


def student(seed: int) -> nn.Module:
    """Return an untrained MLP for :func:`lessons`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def supplied(seed: int, ctx: Context) -> Context:
    """Return ``ctx`` with what training methods may ask a task for, from the lessons of ``seed``.

    The general samples are the first 64 lessons; the task vectors those of two students, each trained on one half.
    """
    given, start = lessons(seed), student(seed)
    vectors = []
    for half in (slice(None, None, 2), slice(1, None, 2)):
        tuned = student(seed)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(tuned(given.x[half]), given.y[half]).backward()
            optimizer.step()
        pairs = zip(tuned.named_parameters(), start.parameters(), strict=True)
        vectors.append({name: (p - before).detach() for (name, p), before in pairs})
    supplies = {"replay": (given.x[:64], given.y[:64]), "task-vectors": vectors}
    return dataclasses.replace(ctx, supplies=supplies)


def teach(method: Any, seed: int, steps: int, ctx: Any) -> tuple[Tensor, Tensor]:
    """Train the student under a training method, with plain SGD, on batches of 32.

    Returns:
        Losses of the steps [steps], and 1 for every test sample that the student gets right, float64 [N].
    """
    given = lessons(seed)
    model = method.wrap(student(seed), supplied(seed, ctx)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        picked = torch.arange(step * 32, step * 32 + 32) % len(given.x)
        closure = TrainingClosure(
            method, model, step, nn.functional.cross_entropy, given.x[picked], given.y[picked]
        )
        losses.append(training_step(optimizer, closure))
    right = output(model.eval(), given.test_x).argmax(1) == given.test_y
    return torch.stack(losses), right.double()


def intersection_over_union(predicted: Tensor, expected: Tensor) -> Tensor:
    """Return the mean over the classes of the image of intersection over union, float64 [B].

    Args:
        predicted: integer masks [B, H, W], 0 for background and k + 1 for class k.
        expected: of the same form; a class counts where either holds it.
    """
    scores = []
    for got, wanted in zip(predicted, expected, strict=True):
        present = [k for k in range(1, CLASSES + 1) if bool((got == k).any() | (wanted == k).any())]
        shares = [
            float(((got == k) & (wanted == k)).sum() / ((got == k) | (wanted == k)).sum()) for k in present
        ]
        scores.append(sum(shares) / len(shares) if shares else 1.0)
    return torch.tensor(scores, dtype=torch.float64)
