"""Sentence encoders: a transformer whose token vectors are averaged and scaled to length one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.model import LoadedModel
from methodbench_quant.models import pretrained

_POOLING = "1_Pooling/config.json"


@hyperparameters
class SentenceEncoder:
    """An encoder in a folder as sentence-transformers has it, with mean pooling."""

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        """Copy weights and tokenizer of ``source``.

        Raises:
            SourceError: the folder holds no safetensors weights, or pools otherwise than by the mean.
        """
        folder = pretrained.checked_folder(source)
        modes = [name for name, chosen in _json(folder / _POOLING).items() if chosen is True]
        if modes != ["pooling_mode_mean_tokens"]:
            raise SourceError(
                f"{folder / _POOLING} asks for {', '.join(modes) or 'no pooling'}",
                "Only the mean over tokens is supported.",
            )
        tokenizer = pretrained.read_tokenizer(folder)
        limits = _json(folder / "sentence_bert_config.json")
        tokenizer.model_max_length = int(limits.get("max_seq_length", tokenizer.model_max_length))
        pretrained.write(pretrained.read(AutoModel, folder, torch.float32), tokenizer, target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        module = MeanPooled(pretrained.read(AutoModel, folder)).eval()
        return LoadedModel(
            name=module.transformer.config.model_type,
            kind="sentence-encoder",
            module=module,
            adapter=detect(module),
            tokenizer=pretrained.read_tokenizer(folder),
            facts={"parameters": sum(parameter.numel() for parameter in module.parameters())},
        )


class MeanPooled(nn.Module):
    """The mean of a transformer's last hidden states over real tokens, scaled to length one."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer: Any = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return float [sentences, width].

        Args:
            input_ids: int64 [sentences, tokens].
            attention_mask: int64 [sentences, tokens], 0 for padding; None where there is none.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1)


def encode(model: LoadedModel, sentences: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return one vector of length one per sentence, float [sentences, width], in the order given."""
    device = model.device
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    rows: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = [sentences[index] for index in batch]
        tokens = model.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            vectors = model.module(tokens["input_ids"], tokens["attention_mask"])
        rows.update(zip(batch, vectors, strict=True))
    return torch.stack([rows[index] for index in range(len(sentences))])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    return content
