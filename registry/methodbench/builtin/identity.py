"""The do-nothing baseline: the model as it is."""

from __future__ import annotations

from methodbench.context import Context
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel


@hyperparameters
class Identity:
    """Returns the model unchanged, so that every board shows what the dense model scores."""

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return ``model`` itself."""
        return model
