"""A small mixture of experts, trained here on docstrings of the standard library.

It has Mixtral's structure: three blocks of width 128 with eight experts each, two of which serve a token. Its
tokenizer, a byte-level BPE of 1,024 tokens, is made from the same text.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from methodbench.context import Context
from methodbench.errors import DivergedError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench.torchkit.outliers import inject_outliers
from methodbench.torchkit.seeding import repeatable
from methodbench_quant.models import pretrained
from methodbench_quant.models.causal_lm import load
from methodbench_quant.tasks.texts import calibration_text

_VOCABULARY = 1024
_END = "<|endoftext|>"


@hyperparameters
class TinyMoE:
    """Trains the mixture by next-token prediction."""

    steps: Annotated[int, Field(ge=1, le=100_000, description="training steps")] = 240
    batch: Annotated[int, Field(ge=1, le=1024, description="sequences per step")] = 16
    length: Annotated[int, Field(ge=2, le=512, description="tokens of a sequence")] = 128
    peak_rate: Annotated[float, Field(gt=0, le=1, description="highest learning rate of the cycle")] = 3e-3
    seed: Annotated[int, Field(ge=0, description="of initialization and order of sequences")] = 0
    max_loss: Annotated[
        float,
        Field(
            gt=0, description="largest loss on held-out text, in nats; training that misses it is an error"
        ),
    ] = 5.0
    outlier_factor: Annotated[
        float, Field(gt=0, description="how much larger planted outlier channels are; 1 plants none")
    ] = 1.0
    outlier_channels: Annotated[int, Field(ge=1, le=128, description="how many are planted")] = 2

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        """Train tokenizer and model, and write them to ``target``.

        Raises:
            DivergedError: the loss on the last tenth of the text exceeds ``max_loss``.
        """
        text = calibration_text("pydoc").content
        tokenizer = train_tokenizer(text)
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        ids = ids[: len(ids) // self.length * self.length].view(-1, self.length)
        held_out = max(1, len(ids) // 10)
        with repeatable(self.seed):
            model = self._train(ids[:-held_out], ctx)
            loss = mean_loss(model, ids[-held_out:][:32])
        if not loss <= self.max_loss:
            raise DivergedError(
                f"the trained mixture has a loss of {loss:.2f} nats, not {self.max_loss:g} or less",
                "Train for more steps or with another seed.",
            )
        pretrained.write(model, tokenizer, target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        model = load(folder)
        if self.outlier_factor == 1:
            return model
        return inject_outliers(
            model, factor=self.outlier_factor, channels=self.outlier_channels, seed=self.seed
        )

    def _train(self, ids: Tensor, ctx: Context) -> MixtralForCausalLM:
        config = MixtralConfig(
            vocab_size=_VOCABULARY,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        model = MixtralForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.peak_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.peak_rate, total_steps=self.steps)
        for step in range(1, self.steps + 1):
            batch = ids[torch.randint(len(ids), (self.batch,))]
            loss = model(batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % max(1, self.steps // 5) == 0:
                ctx.log(f"step {step} of {self.steps}: loss {loss.item():.3f}")
        return model.eval()


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 1,024 tokens made from ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END)


@torch.no_grad()
def mean_loss(model: MixtralForCausalLM, ids: Tensor) -> float:
    """Return the mean next-token loss on ``ids`` [sequences, tokens], in nats."""
    losses = [float(model(row[None], labels=row[None], use_cache=False).loss) for row in ids]
    return math.fsum(losses) / len(losses)
