"""Language models from GGUF files and from folders in the layout of the Hugging Face hub."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from methodbench.context import Context
from methodbench.errors import MissingExtraError, SourceError
from methodbench.params import hyperparameters
from methodbench.torchkit.adapters import detect, unfuse_experts
from methodbench.torchkit.model import LoadedModel
from methodbench_quant.models import pretrained

DType = Annotated[
    Literal["float32", "float16", "bfloat16"], Field(description="precision in which the weights are kept")
]


@hyperparameters
class GGUFCausalLM:
    """A language model in a GGUF file, its quantized weights decoded once."""

    dtype: DType = "float32"

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        """Decode ``source``, a ``.gguf`` file, into ``target``.

        Raises:
            SourceError: it is no GGUF file.
            MissingExtraError: the package ``gguf`` is not installed.
        """
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("reading GGUF files", "gguf", "methodbench[quant]")
        if source is None or not source.is_file() or not _is_gguf(source):
            raise SourceError(f"{source} is not a GGUF file", "Its first four bytes must read GGUF.")
        where = {"gguf_file": source.name, "local_files_only": True}
        decoded = AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=getattr(torch, self.dtype), **where
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
        pretrained.write(_rebuilt(decoded), tokenizer, target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        return load(folder)


@hyperparameters
class HubCausalLM:
    """A language model in a folder as the hub has it: ``config.json``, safetensors weights and a
    tokenizer."""

    dtype: DType = "float32"

    def prepare(self, source: Path | None, target: Path, ctx: Context) -> None:
        """Convert the weights in ``source`` to :attr:`dtype`, so that loading can map them into memory.

        Raises:
            SourceError: weights that are pickled, quantized already, or need code of their own; no tokenizer.
            NotApplicableError: blocks of a structure that no adapter fits.
        """
        folder = pretrained.checked_folder(source)
        tokenizer = pretrained.read_tokenizer(folder)
        model = pretrained.read(AutoModelForCausalLM, folder, getattr(torch, self.dtype))
        detect(model)
        pretrained.write(model, tokenizer, target)

    def load(self, folder: Path, ctx: Context) -> LoadedModel:
        return load(folder)


def load(folder: Path) -> LoadedModel:
    """Return the language model that :meth:`prepare` wrote to ``folder``, memory-mapped.

    Fused experts are split into one Linear per expert and projection, which methods can compress.
    """
    module = pretrained.read(AutoModelForCausalLM, folder)
    unfuse_experts(module)
    return LoadedModel(
        name=module.config.model_type,
        kind="causal-lm",
        module=module,
        adapter=detect(module),
        tokenizer=pretrained.read_tokenizer(folder),
        facts={"parameters": sum(parameter.numel() for parameter in module.parameters())},
    )


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse the header of a GGUF file once.

    It does so anew for configuration, weights and tokenizer, and a large vocabulary takes seconds each time.
    """
    import gguf

    parse = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(parse)
    try:
        yield
    finally:
        gguf.GGUFReader = parse


def _rebuilt(decoded: PreTrainedModel) -> PreTrainedModel:
    """Return the model without the mark of its quantized origin, for which transformers refuses to save
    it."""
    settings: dict[str, Any] = decoded.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        model = type(decoded)(type(decoded.config).from_dict(settings))
    model.load_state_dict(decoded.state_dict(), assign=True)
    model.tie_weights()
    return model
