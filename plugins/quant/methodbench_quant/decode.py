"""Greedy decoding of one sequence, token by token, with a key-value cache of fixed size.

On a GPU one step is recorded once and replayed as a CUDA graph, so that the time is that of the kernels and not of
their launches.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methodbench.torchkit.activation_sparsity import uncounted
from methodbench.torchkit.kernels import graph_of


class FixedCache:
    """Keys and values of every layer in memory that does not move, as transformers' attention calls a cache.

    ``position`` int64 [tokens] says where the tokens of a step go.
    """

    is_compileable = True

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.position = torch.zeros(0, dtype=torch.int64)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a step's keys and values [1, heads, tokens, width]; return those of all positions."""
        for held, part in ((self.keys, keys), (self.values, values)):
            if layer_idx not in held:
                held[layer_idx] = part.new_zeros(*part.shape[:2], self.capacity, part.shape[3])
            held[layer_idx].index_copy_(2, self.position, part)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions and mask are given with every call."""
        return 0


class Decoder:
    """A causal language model that goes on from a prompt.

    Args:
        module: of transformers, in eval mode.
        prompt: token ids [1, tokens], on the module's device.
        tokens: how many can follow.
    """

    def __init__(self, module: nn.Module, prompt: Tensor, tokens: int) -> None:
        self.module = module
        self.prompt = prompt
        capacity = prompt.shape[1] + tokens
        self.cache = FixedCache(capacity)
        self.places = torch.arange(capacity, device=prompt.device)
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=prompt.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        self.logits: Tensor | None = None

    @torch.no_grad()
    def prefill(self) -> None:
        """Read the prompt, and decide on the first token."""
        length = self.prompt.shape[1]
        self._advance(self.prompt, self.places[:length])
        self.position.fill_(length)

    @torch.no_grad()
    def step(self) -> None:
        """Append the decided token, and decide on the next: all of it on the device."""
        self._advance(self.ids, self.position)
        self.position.add_(1)

    def _advance(self, ids: Tensor, position: Tensor) -> None:
        self.cache.position = position
        mask = self.places <= position[:, None]
        output = self.module(
            ids,
            attention_mask=mask[None, None],
            position_ids=position[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self.ids.copy_(self.logits.argmax(-1, keepdim=True))


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast tokens came.

    Attributes:
        tokens_per_second: median over the repeats.
        lowest, highest: over the repeats.
        ids: the tokens of the last repeat.
    """

    tokens_per_second: float
    lowest: float
    highest: float
    ids: tuple[int, ...]


class _Timed:
    """One contestant: a decoder, and how a step of it runs.

    It decodes once without the clock. What a sparse model zeroes is counted then alone: counts take time.
    """

    def __init__(self, module: nn.Module, prompt: Tensor, tokens: int) -> None:
        self.decoder = decoder = Decoder(module, prompt, tokens)
        self.tokens = tokens
        decoder.prefill()
        for _ in range(tokens):
            decoder.step()
        self._step, self._wait = decoder.step, _nothing
        if prompt.is_cuda:
            with uncounted(module):
                decoder.prefill()
                self._step, self._wait = graph_of(decoder.step).replay, torch.cuda.synchronize
        self.rates: list[float] = []
        self.ids: tuple[int, ...] = ()

    def run(self) -> None:
        """Decode from the prompt on, and keep the rate."""
        with uncounted(self.decoder.module):
            self._run()

    def _run(self) -> None:
        decoder = self.decoder
        decoder.prefill()
        decoder.cache.position = decoder.position
        ids = []
        self._wait()
        start = time.perf_counter()
        for _ in range(self.tokens):
            ids.append(decoder.ids.clone())
            self._step()
        self._wait()
        self.rates.append(self.tokens / (time.perf_counter() - start))
        self.ids = tuple(int(i) for i in torch.cat(ids).flatten().tolist())

    @property
    def rate(self) -> Rate:
        return Rate(statistics.median(self.rates), min(self.rates), max(self.rates), self.ids)


@torch.no_grad()
def decode_rate(module: nn.Module, prompt: Tensor, tokens: int, repeats: int = 5) -> Rate:
    """Return the rate at which ``module`` decodes ``tokens`` tokens after ``prompt`` [1, tokens], batch 1.

    The prompt's own time does not count.
    """
    timed = _Timed(module, prompt, tokens)
    for _ in range(repeats):
        timed.run()
    return timed.rate


@torch.no_grad()
def paired_rates(
    module: nn.Module, peer: nn.Module, prompt: Tensor, tokens: int, repeats: int
) -> tuple[tuple[list[float], list[float]], tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return tokens per second of ``module`` and of ``peer`` in every repeat, and the ids that each decoded.

    Both go on greedily from ``prompt`` [1, tokens], batch 1, each from what it decoded itself. After a run of each
    that does not count, they alternate, and which of them begins does too: what else the machine does hits both alike.
    """
    pair = (_Timed(module, prompt, tokens), _Timed(peer, prompt, tokens))
    for repeat in range(repeats):
        for timed in pair[:: -1 if repeat % 2 else 1]:
            timed.run()
    return (pair[0].rates, pair[1].rates), (pair[0].ids, pair[1].ids)


def _nothing() -> None:
    """Wait for a device that does not run ahead."""
