"""Planted transformers as models, in a module of their own: it imports their library, so that a run does so once."""

from __future__ import annotations

from typing import Annotated, Literal

# Planted models are built by name; what forks workers has imported this module, and so these, before.
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral
import transformers.models.opt.modeling_opt  # noqa: F401
from pydantic import Field

from methodbench.builtin.planted import PlantedModel
from methodbench.params import hyperparameters


@hyperparameters
class PlantedDecoder(PlantedModel):
    """Builds a planted decoder from its seed."""

    structure: Annotated[Literal["llama", "opt", "mixture"], Field(description="which structure it has")] = (
        "llama"
    )
