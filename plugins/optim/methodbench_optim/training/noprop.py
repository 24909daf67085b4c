"""NoProp: Training Neural Networks without Back-propagation or Forward-propagation (Li, Teh and Pascanu, 2025, arXiv
2503.24322), in discrete time.

Each of T blocks learns alone to predict the embedded label from the input and a noisy label embedding of a fixed
noise level; no signal passes between blocks in training. At inference they run in sequence, as a chain that removes
noise, and a linear head reads the last state. With u_y the embedding of label y, ᾱ_t rising from nearly 0 to nearly 1,
and SNR(t) = ᾱ_t / (1 - ᾱ_t):

    training of block t    z ~ N(√ᾱ_{t-1} u_y, 1 - ᾱ_{t-1}),    û = softmax(block_t(x, z)) W_E
                           L_t = CE(head(z_T), y) + KL(q(z_0 | y) ‖ N(0, I)) + T/2 η (SNR(t) - SNR(t-1)) ‖û - u_y‖²
    inference              z_0 ~ N(0, I),    z_t = a_t û_t(z_{t-1}, x) + b_t z_{t-1} + √c_t ε

z_T is drawn apart from z. The paper gives the cosine schedule as a figure only: here ᾱ_t = f((T - t) / T) / f(0),
clipped, with f(a) = cos²((a + s) / (1 + s) π/2). A block is a copy of the model that is trained, freshly initialized,
whose outputs are joined with an embedding of z.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters

if TYPE_CHECKING:
    from methodbench.context import Context


@hyperparameters
class NoProp:
    """Blocks that each learn to remove the noise of one level from a label (paper, algorithm 1)."""

    T: Annotated[int, Field(ge=1, le=1000, description="blocks")] = 10
    eta: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="weight of the distance to the embedded label")
    ] = 0.1
    embedding: Annotated[
        Literal["one-hot", "learned"],
        Field(description="label embeddings: the identity, or orthogonal and learned"),
    ] = "one-hot"
    dimensions: Annotated[int, Field(ge=2, description="of a learned embedding")] = 20
    width: Annotated[int, Field(ge=1, description="hidden units of a block beside the model's copy")] = 64
    cosine_s: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="offset s of the cosine schedule")
    ] = 0.008
    clip: Annotated[
        float,
        Field(gt=0, lt=0.5, description="distance of the schedule from 0 and from 1"),
    ] = 1e-4

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return T blocks around copies of ``model``, which maps inputs to logits of classes.

        Raises:
            NotApplicableError: the model does not end in a Linear, so that the number of classes is not known.
        """
        linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not linears:
            raise NotApplicableError("the model has no Linear that says how many classes there are")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(ctx.seed)
            return Blocks(model, linears[-1].out_features, self)

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return L_t of the block whose turn it is, for the inputs that the model saw last."""
        assert isinstance(model, Blocks)
        return model.block_loss(model.turn, targets)

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Leave the gradients alone: the other blocks have none."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Pass the turn to the next block."""
        assert isinstance(model, Blocks)
        model.turn = model.turn % len(model.blocks) + 1


class Block(nn.Module):
    """Maps (x, z) to logits of classes."""

    def __init__(self, model: nn.Module, classes: int, dimensions: int, width: int) -> None:
        super().__init__()
        self.of_x = copy.deepcopy(model)
        for layer in self.of_x.modules():
            reset: Any = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
        self.of_z = nn.Sequential(nn.Linear(dimensions, width), nn.ReLU(), nn.Linear(width, width))
        self.joined = nn.Sequential(
            nn.ReLU(), nn.Linear(classes + width, width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, x: Any, z: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        logits: Tensor = self.joined(torch.cat([self.of_x(x), self.of_z(z)], -1))
        return logits


class Blocks(nn.Module):
    """T blocks, label embeddings W_E and the head; ``turn`` is the block that learns, from 1."""

    alpha_bar: Tensor

    def __init__(self, model: nn.Module, classes: int, settings: NoProp) -> None:
        super().__init__()
        like = next(model.parameters())
        dimensions = classes if settings.embedding == "one-hot" else settings.dimensions
        rows = torch.empty(classes, dimensions)
        rows = torch.eye(classes) if settings.embedding == "one-hot" else nn.init.orthogonal_(rows)
        self.embedding = nn.Parameter(rows, requires_grad=settings.embedding == "learned")
        self.head = nn.Linear(dimensions, classes)
        self.blocks = nn.ModuleList(
            Block(model, classes, dimensions, settings.width) for _ in range(settings.T)
        )
        self.to(like.device, like.dtype)
        bars = cosine_schedule(settings.T, settings.cosine_s, settings.clip, 1 - settings.clip)
        self.register_buffer("alpha_bar", bars.to(like.device, like.dtype), persistent=False)
        self.eta, self.turn = settings.eta, 1
        self.inputs: Any = None
        self.generator = torch.Generator(like.device).manual_seed(torch.initial_seed() % 2**63)

    def forward(self, x: Any) -> Tensor:
        """Return logits: of the chain, or while training none, as the inputs are only kept for the loss."""
        if not self.training:
            return self.infer(x)
        self.inputs = x
        return self.head.bias.detach().expand(len(x), -1)

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return normal noise [count, d], by default from the generator of the training."""
        return torch.randn(
            (count, self.embedding.shape[1]),
            generator=generator or self.generator,
            dtype=self.embedding.dtype,
            device=self.embedding.device,
        )

    def block_loss(self, t: int, targets: Tensor) -> Tensor:
        """Return L_t for the last inputs; it has gradients for block t, the head and the embeddings alone."""
        clean = self.embedding[targets]
        z_last = noisy(clean, self.alpha_bar[-1], self.noise(len(targets)))
        z = noisy(clean, self.alpha_bar[t - 1], self.noise(len(targets)))
        predicted = embedded(self.blocks[t - 1](self.inputs, z), self.embedding)
        distance = distance_loss(predicted, clean, t, self.alpha_bar, self.eta)
        return F.cross_entropy(self.head(z_last), targets) + kl_loss(clean, self.alpha_bar[0]) + distance

    def infer(self, x: Any) -> Tensor:
        """Return the head's logits [B, classes] of the last state; the noise is the same for every call.

        It comes from a generator of its own: a look at held-out data does not change what is trained on.
        """
        generator = torch.Generator(self.embedding.device).manual_seed(0)
        a, b, c = coefficients(self.alpha_bar)
        z = self.noise(len(x), generator)
        for index, block in enumerate(self.blocks):
            z = chain_step(
                embedded(block(x, z), self.embedding),
                z,
                self.noise(len(x), generator),
                a[index],
                b[index],
                c[index],
            )
        logits: Tensor = self.head(z)
        return logits


def cosine_schedule(steps: int, s: float, low: float, high: float) -> Tensor:
    """Return ᾱ_t for t = 0 to ``steps``, rising, float64 [steps + 1]."""
    ahead = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    squares = torch.cos((ahead + s) / (1 + s) * math.pi / 2).square()
    return (squares / squares[-1]).clamp(low, high)


def alphas(alpha_bar: Tensor) -> Tensor:
    """Return α_t, of which ᾱ_t is the product from t on: [T + 1]."""
    return torch.cat([alpha_bar[:-1] / alpha_bar[1:], alpha_bar[-1:]])


def snr(alpha_bar: Tensor) -> Tensor:
    """Return the ratio of signal to noise at each t, [T + 1]."""
    return alpha_bar / (1 - alpha_bar)


def coefficients(alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b and c of the inference chain for t = 1 to T, each [T] (paper, equation 3)."""
    alpha = alphas(alpha_bar)[:-1]
    before, after = 1 - alpha_bar[:-1], alpha_bar[1:]
    return (
        after.sqrt() * (1 - alpha) / before,
        alpha.sqrt() * (1 - after) / before,
        (1 - after) * (1 - alpha) / before,
    )


def noisy(clean: Tensor, alpha_bar: Tensor, noise: Tensor) -> Tensor:
    """Return a draw of z_t given embeddings [B, d] and standard normal noise of that shape."""
    return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise


def embedded(logits: Tensor, embedding: Tensor) -> Tensor:
    """Return û [B, d], the embeddings [m, d] weighed by the softmax of logits [B, m]."""
    return logits.softmax(-1) @ embedding


def distance_loss(predicted: Tensor, clean: Tensor, t: int, alpha_bar: Tensor, eta: float) -> Tensor:
    """Return T/2 η (SNR(t) - SNR(t-1)) times the mean over the batch of ‖û - u_y‖², a scalar."""
    ratios = snr(alpha_bar)
    squares = (predicted - clean).square().sum(-1).mean()
    return (len(alpha_bar) - 1) / 2 * eta * (ratios[t] - ratios[t - 1]) * squares


def kl_loss(clean: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the mean over embeddings [B, d] of KL(N(√ᾱ_0 u, 1 - ᾱ_0) ‖ N(0, 1)), a scalar."""
    spread = 1 - alpha_bar
    per_row = alpha_bar * clean.square().sum(-1) + clean.shape[-1] * (spread - 1 - spread.log())
    return 0.5 * per_row.mean()


def chain_step(predicted: Tensor, z: Tensor, noise: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return z_t from û, z_{t-1} and standard normal noise, all [B, d]."""
    return a * predicted + b * z + c.sqrt() * noise
