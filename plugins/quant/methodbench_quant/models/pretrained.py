"""Reading and writing folders in the layout of transformers, without pickles and without code from
outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from methodbench.errors import SourceError

# A cell's log keeps what went wrong; bars that redraw themselves would push it out.
transformers.utils.logging.disable_progress_bar()

_OPTIONS = {"local_files_only": True, "trust_remote_code": False}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def checked_folder(source: Path | None) -> Path:
    """Return ``source`` when it is a folder with a configuration and safetensors weights.

    Raises:
        SourceError: it is not; the message says so where the weights are pickles only, need code of their
            own, or are quantized already.
    """
    if source is None or not source.is_dir() or not (source / "config.json").is_file():
        raise SourceError(
            f"{source} is not a folder with a model's config.json",
            "Give the folder of a model that was saved by transformers' save_pretrained.",
        )
    if not any(source.glob("*.safetensors")):
        pickles = sorted(path.name for path in source.iterdir() if path.suffix in _PICKLES)
        found = f"only {', '.join(pickles)}, and pickles are never read" if pickles else "no weights at all"
        raise SourceError(
            f"{source} holds no safetensors weights: {found}",
            "Name a revision that has *.safetensors files, or convert the weights.",
        )
    try:
        config = AutoConfig.from_pretrained(source, **_OPTIONS)
    except (ValueError, OSError) as error:
        raise SourceError(
            f"transformers cannot read {source / 'config.json'}: {str(error).strip().splitlines()[0]}",
            "Models that bring code of their own are not run; others may need a later transformers.",
        ) from error
    if getattr(config, "quantization_config", None):
        raise SourceError(
            f"the weights in {source} are quantized already", "Give the model that they were made from."
        )
    return source


def read(auto: Any, folder: Path, dtype: Any = "auto") -> Any:
    """Return the model in ``folder``, loaded by a transformers class such as ``AutoModelForCausalLM``.

    Weights that are stored in ``dtype`` are memory-mapped. The model is in eval mode, needs no gradients,
    keeps no cache unless asked to, and attends through torch's fused kernel where it can.
    """
    model = auto.from_pretrained(folder, dtype=dtype, use_safetensors=True, **_OPTIONS)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in ``folder``.

    Raises:
        SourceError: there is none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, **_OPTIONS)
    except (ValueError, OSError) as error:
        raise SourceError(
            f"there is no usable tokenizer in {folder}: {str(error).strip().splitlines()[0]}",
            "The folder must hold the tokenizer's files beside the model's.",
        ) from error


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer; the same model gives the same bytes."""
    model.config._name_or_path = ""
    tokenizer.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
