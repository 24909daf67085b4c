"""Read-ME: a dense model becomes a mixture of experts whose router reads token ids alone.

Cai, Ro, Kim, Wang, Bejnordi, Akella, Wang, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with
System Co-Design", NeurIPS 2024, arXiv 2410.19123; authors' code VITA-Group/READ-ME (1df7e68).

1. Of every network, the neurons whose mean ``|h|`` over the text of a domain exceeds the N-th largest belong to that
   domain, ``N = int(rate d)``, so N - 1 of them. Those of all domains stay on for every token (R), the rest of each
   domain is its expert (e_c): ``y = W_down ((R + e_c) (act(W_gate x) W_up x))``. Experts of all layers go together.
2. A small causal transformer over token ids, outside of the model, picks the expert of a token for all layers, so that
   routes are known before the model runs. It learns from where the largest activations of the dense model fall: with
   ``F = sum_m [h > (m + 1)-th largest h] / (3 n)`` for five m up to n, the size of the first expert::

       d = 10 (F M^T - mean)     loss = 0.75 CE(pred, argmax d; smoothing 0.5) + 0.25 CE(pred, softmax d), over layers

   where h keeps its sign, unlike in step 1 (both as coded).
3. Router and model are trained in turn; here on calibration text, ``rounds`` times ``router_steps`` and
   ``model_steps``.

The authors take seven data sets as domains; a task has one text, and its contiguous parts stand for them. Each network
is stored as its shared part and its experts, so that a neuron in several experts is stored as often, and one in none
not at all. The serving system of the paper is not part of this.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from methodbench.context import Context
from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.activation_sparsity import FeedForward
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule
from methodbench.torchkit.sequential import Observer, walk
from methodbench.torchkit.text_tuning import own_parameters, tune_on_text
from methodbench_sparse.structured import FeedForwardPart, gated_networks

#: Weights of the two losses of the router, and the smoothing of the first (authors' code).
HARD, SOFT, SMOOTHING = 0.75, 0.25, 0.5
#: Sharpness of the router's targets, and the divisor of what its features count.
SHARPNESS, DIVISOR = 10.0, 3.0


@hyperparameters
class ReadMe:
    """Splits feed-forward networks into experts of domains, and trains a router of token ids."""

    sparsity: Annotated[
        float, Field(ge=0, lt=1, description="share of neurons that are off for a token, 1 - remain_rate")
    ] = 0.5
    experts: Annotated[int, Field(ge=1, le=64, description="domains, contiguous parts of the text")] = 4
    width: Annotated[int, Field(ge=8, le=4096, description="of the router")] = 64
    depth: Annotated[int, Field(ge=1, le=8, description="blocks of the router")] = 1
    heads: Annotated[int, Field(ge=1, le=64, description="heads of the router")] = 4
    rounds: Annotated[
        int, Field(ge=0, le=100, description="how often router and model are trained; 0: never")
    ] = 1
    router_steps: Annotated[int, Field(ge=0, le=100_000, description="steps of the router in a round")] = 100
    router_lr: Annotated[float, Field(gt=0, le=1, description="its learning rate in the first round")] = 1e-3
    model_steps: Annotated[int, Field(ge=0, le=100_000, description="steps of the model in a round")] = 0
    model_lr: Annotated[float, Field(gt=0, le=1, description="its learning rate in the first round")] = 5e-5
    decay: Annotated[float, Field(gt=0, le=1, description="factor of both rates from round to round")] = 0.8
    tokens: Annotated[int, Field(ge=2, le=100_000, description="tokens of a step")] = 256

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the mixture; see :class:`methodbench.protocols.Compressor`.

        Raises:
            NotApplicableError: no calibration text, fewer sequences than experts, blocks without one gated feed-forward
                network each, no token embedding, or a router whose heads do not divide its width.
        """
        if len(data) < self.experts or data.inputs.is_floating_point():
            raise NotApplicableError(
                f"read-me needs text of {self.experts} domains, and there are {len(data)} sequences"
            )
        networks = gated_networks(model)
        embedding = model.adapter.embedding(model.module)
        if embedding is None or self.width % (2 * self.heads):
            raise NotApplicableError(
                f"the router needs a token embedding, and a width ({self.width}) that is a multiple of twice its "
                f"{self.heads} heads"
            )
        usage = domain_usage(model, data, networks, self.experts)
        widths = [int(network.neurons * (1 - self.sparsity)) for network in networks]
        shared, experts = split(usage, widths)
        generator = torch.Generator().manual_seed(ctx.seed)
        table = embedding.get_parameter("weight").detach()
        router = Router(table, self.width, self.depth, self.heads, self.experts, generator).to(model.device)
        mixed = model.clone()
        if self.rounds and self.model_steps:
            own_parameters(mixed.module)
            mixed.module.requires_grad_(False)
        for number in range(self.rounds):
            factor = self.decay**number
            with ctx.phase("router"):
                self._teach(router, mixed, data, networks, experts, self.router_lr * factor, generator)
            if self.model_steps:
                with ctx.phase("model"):
                    self._tune(
                        mixed, data, networks, shared, experts, router, self.model_lr * factor, generator
                    )
        assemble(mixed, networks, shared, experts, router.requires_grad_(False).eval())
        on = [(always | own[0]).double().mean() for always, own in zip(shared, experts, strict=True)]
        mixed.storage = "real"
        mixed.facts |= {
            "experts": self.experts,
            "neurons_on_share": float(torch.stack(on).mean()),
            "neurons_shared_share": float(torch.stack([always.double().mean() for always in shared]).mean()),
            "neurons_denominator": "hidden neurons of the feed-forward networks, for a token of the first expert",
        }
        return mixed

    def _teach(
        self,
        router: Router,
        model: LoadedModel,
        data: Calibration,
        networks: list[FeedForward],
        experts: list[Tensor],
        lr: float,
        generator: torch.Generator,
    ) -> None:
        """Train the router on what the dense model's neurons do with calibration text."""
        optimizer = torch.optim.AdamW(router.parameters(), lr=lr)
        hidden: list[Tensor] = []
        hooks = [
            model.module.get_submodule(network.down).register_forward_pre_hook(
                lambda _, args: hidden.append(args[0].detach())
            )
            for network in networks
        ]
        try:
            for step in range(self.router_steps):
                # Sequences of different domains follow one another.
                ids = data.inputs[
                    (step * max(1, len(data) // self.experts) + step // self.experts) % len(data)
                ]
                start = int(torch.randint(max(1, len(ids) - self.tokens + 1), (), generator=generator))
                piece = ids[None, start : start + self.tokens].to(model.device)
                hidden.clear()
                with torch.no_grad():
                    model.module(piece)
                optimizer.zero_grad()
                with torch.enable_grad():
                    scores = router(piece)
                    pairs = zip(hidden, experts, strict=True)
                    loss = torch.stack([router_loss(scores, h, own)[0] for h, own in pairs]).sum()
                    loss.backward()
                optimizer.step()
        finally:
            for hook in hooks:
                hook.remove()

    def _tune(
        self,
        model: LoadedModel,
        data: Calibration,
        networks: list[FeedForward],
        shared: list[Tensor],
        experts: list[Tensor],
        router: Router,
        lr: float,
        generator: torch.Generator,
    ) -> None:
        """Train the model on calibration text, with neurons masked by the routes of the frozen router."""
        routes = Routes(router.eval())
        hooks = [model.module.register_forward_pre_hook(routes.note, with_kwargs=True)]
        for network, always, own in zip(networks, shared, experts, strict=True):
            masks = (own | always).float()
            hooks.append(
                model.module.get_submodule(network.down).register_forward_pre_hook(
                    lambda _, args, masks=masks: (args[0] * masks[routes.chosen].view_as(args[0]),)
                )
            )
        model.module.requires_grad_(True)
        try:
            tune_on_text(
                model,
                data,
                model.module.parameters(),
                steps=self.model_steps,
                lr=lr,
                tokens=self.tokens,
                generator=generator,
            )
        finally:
            for hook in hooks:
                hook.remove()


# Experts


def domain_usage(
    model: LoadedModel, data: Calibration, networks: list[FeedForward], domains: int
) -> list[Tensor]:
    """Return the mean ``|h|`` of every neuron over the text of each domain, [domains, neurons] per network.

    Domains are contiguous parts of the sequences.
    """
    owners = {model.module.get_submodule(network.block): network for network in networks}
    found = {
        network.block: torch.zeros(domains, network.neurons, device=model.device) for network in networks
    }
    for domain, part in enumerate(data.inputs.tensor_split(domains)):

        def watch(block: nn.Module, domain: int = domain, tokens: int = part.numel()) -> dict[str, Observer]:
            network = owners[block]

            def add(hidden: Tensor) -> None:
                found[network.block][domain] += hidden.flatten(0, -2).float().abs().sum(0) / tokens

            return {network.down.removeprefix(f"{network.block}."): add}

        for _ in walk(model, Calibration(part), propagate="dense", observe=watch):
            pass
    return [found[network.block] for network in networks]


def split(usage: list[Tensor], widths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the shared neurons, bool [neurons], and those of the experts, bool [domains, neurons], per network.

    Args:
        usage: of every network, [domains, neurons].
        widths: N of every network; what is above the N-th largest counts, so one less, or fewer with ties.
    """
    shared, experts = [], []
    for values, width in zip(usage, widths, strict=True):
        threshold = values.sort(dim=1, descending=True).values[:, max(1, width) - 1, None]
        masks = values > threshold
        always = masks.all(0)
        shared.append(always)
        experts.append(masks & ~always)
    return shared, experts


class RoutedFeedForward(nn.Module):
    """The shared part of a network and its experts; a token is seen by the first and by one of the others."""

    def __init__(self, shared: nn.Module | None, experts: list[nn.Module | None], routes: Routes) -> None:
        super().__init__()
        self.shared = shared
        self.experts = nn.ModuleList(nn.Identity() if expert is None else expert for expert in experts)
        self._routes = (routes,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``x`` [..., channels], whose tokens are those that the routes were noted for."""
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        chosen = self._routes[0].chosen
        for index, expert in enumerate(self.experts):
            token = torch.where(chosen == index)[0]
            if token.numel() and not isinstance(expert, nn.Identity):
                out = out.index_add(0, token, expert(flat[token]))
        return out.view_as(x)


def assemble(
    model: LoadedModel,
    networks: list[FeedForward],
    shared: list[Tensor],
    experts: list[Tensor],
    router: Router,
) -> None:
    """Replace the networks of ``model`` by routed ones, in place, and let ``router`` look at its token ids."""
    routes = Routes(router)
    for network, always, own in zip(networks, shared, experts, strict=True):
        gate, up, down, act = (
            model.module.get_submodule(name)
            for name in (network.first, network.up, network.down, network.activation)
        )
        if getattr(down, "bias", None) is not None:
            raise NotApplicableError(f"{network.down} has a bias, which would count once for every part")

        def part(
            mask: Tensor, gate: Any = gate, up: Any = up, down: Any = down, act: Any = act
        ) -> nn.Module | None:
            index = mask.nonzero().flatten()
            return FeedForwardPart(gate, up, down, act, index) if len(index) else None

        routed = RoutedFeedForward(part(always), [part(mask) for mask in own], routes)
        set_submodule(model.module, network.first.rpartition(".")[0], routed.train(model.module.training))
    model.module.add_module("router", router)
    model.module.register_forward_pre_hook(routes.note, with_kwargs=True)


# The router


class Routes:
    """The expert of every token of the present pass, int64 [batch * tokens], and the token ids that led there."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._history = torch.empty(0, 0, dtype=torch.long)
        self.chosen = torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: route what it is given; ids that its cache stands for come first."""
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        before = int(cache.get_seq_length()) if cache is not None else 0
        known = self._history[:, :before] if before and len(self._history) == len(ids) else ids[:, :0]
        self._history = torch.cat([known, ids], dim=1)
        self.chosen = self._router(self._history)[:, -ids.shape[1] :].argmax(-1).flatten()


class Router(nn.Module):
    """A causal transformer from token ids [batch, tokens] to scores of the experts [batch, tokens, experts].

    Its embedding begins as the first channels of the model's, and scores of attention are not divided by the root of
    the head's width, as in the authors' script.
    """

    def __init__(
        self, table: Tensor, width: int, depth: int, heads: int, experts: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table[:, :width].float().clone(), freeze=False)
        self.blocks = nn.ModuleList(RouterBlock(self.embedding.embedding_dim, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(self.embedding.embedding_dim, eps=1e-6)
        self.head = nn.Linear(self.embedding.embedding_dim, experts)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.startswith("embedding"):
                bound = parameter.shape[1] ** -0.5
                parameter.data.uniform_(-bound, bound, generator=generator)
            elif name.endswith("bias"):
                parameter.data.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


class RouterBlock(nn.Module):
    """Causal attention with rotary positions, then two Linears with SiLU; each behind a norm, added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)])
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, scale=1.0)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.silu(self.up(self.norms[1](x))))
        return y


def rotated(x: Tensor) -> Tensor:
    """Return ``x`` [..., tokens, d] with rotary positions of base 10,000."""
    half = x.shape[-1] // 2
    frequencies = 10_000 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def router_loss(scores: Tensor, hidden: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the router for one layer, and the share of tokens that it routes to their target.

    Args:
        scores: of the router, [batch, tokens, experts].
        hidden: h of the dense model, [batch, tokens, neurons], with its sign.
        experts: bool [experts, neurons].
    """
    size = int(experts[0].sum())
    ordered = hidden.float().sort(dim=-1, descending=True).values
    features = torch.zeros_like(hidden, dtype=torch.float32)
    for m in (size - 1, *(int(k * size / 5) for k in (4, 3, 2, 1))):
        features += (hidden > ordered[..., m, None]).float() / (DIVISOR * max(1, size))
    distance = features @ experts.float().T
    distance = (distance - distance.mean()) * SHARPNESS
    target = distance.softmax(-1)
    labels = distance.argmax(-1)
    flat = scores.flatten(0, -2).float()
    hard = F.cross_entropy(flat, labels.flatten(), label_smoothing=SMOOTHING)
    soft = -(target.flatten(0, -2) * flat.log_softmax(-1)).sum() / len(flat)
    return HARD * hard + SOFT * soft, (scores.argmax(-1) == labels).float().mean()
