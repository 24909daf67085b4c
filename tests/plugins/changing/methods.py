"""Methods whose result depends on their source, and on a variable of the environment."""

from __future__ import annotations

import os
from typing import Literal

from methodbench.params import hyperparameters

#: A variable that is recorded; here it stands for whatever another machine does differently.
VARIABLE = "MKL_CBWR"


@hyperparameters
class Constant:
    """Returns its value, and what the environment adds to it."""

    value: float = 1.0

    def measure(self, model, data, ctx):
        there = os.environ.get(VARIABLE, "0")
        if there == "crash":
            raise RuntimeError("not on this machine")
        return {"value": self.value + float(there)}


@hyperparameters
class Nudge:
    """Changes one block, in its weights or behind it."""

    block: int = 0
    by: float = 0.0
    where: Literal["weights", "output"] = "weights"

    def compress(self, model, data, ctx):
        from methodbench.torchkit.model import set_weight

        nudged = model.clone()
        block = nudged.module[self.block]
        by = self.by + float(os.environ.get(VARIABLE, "0"))
        if self.where == "weights":
            weight = block[0].weight.clone()
            weight[0, 0] += by
            set_weight(block[0], weight)
        else:
            block[1].register_forward_hook(lambda module, inputs, output: output + by)
        nudged.storage = "simulated"
        return nudged
