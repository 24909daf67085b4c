"""Implementations of the toy methods."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from typing import Annotated, Literal

from pydantic import Field

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.params import hyperparameters


@hyperparameters
class Noop:
    """Returns its value."""

    value: Annotated[float, Field(ge=0, le=10, description="what it returns")] = 1.0

    def measure(self, model, data, ctx):
        return {"value": self.value}


@hyperparameters
class Sleeper(Noop):
    """Returns its value after a while, and notes in a file that it has run."""

    seconds: float = 0.2
    ledger: str = ""

    def measure(self, model, data, ctx):
        if self.ledger:
            with open(self.ledger, "a") as file:
                file.write(f"{self.value} {ctx.seed}\n")
        time.sleep(self.seconds)
        return {"value": self.value}


@hyperparameters
class Jitter(Noop):
    """Returns its value with noise of its own, so that two methods differ by chance under each seed."""

    def measure(self, model, data, ctx):
        noise = random.Random(f"{ctx.seed} {self.value}").gauss(0, 0.01)
        return {"value": self.value + noise}


@hyperparameters
class Misbehave:
    """Does one bad thing."""

    how: Literal[
        "raise", "hang", "hang-hard", "memory", "segfault", "kill", "exit", "diverge", "not-applicable", "orphan",
        "hog", "hog-family", "escape", "signal", "kill-server", "stop-server", "nonsense", "surrogate", "environment",
    ] = "raise"  # fmt: skip
    note: str = ""
    number: int = 0

    def measure(self, model, data, ctx):
        match self.how:
            case "raise":
                raise RuntimeError("the toy broke")
            case "hang":
                time.sleep(600)
            case "hang-hard":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            case "memory":
                raise MemoryError("no room")
            case "segfault":
                ctypes.string_at(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "diverge":
                raise DivergedError("the loss is not finite")
            case "not-applicable":
                raise NotApplicableError("this toy does not fit")
            case "orphan":
                if os.fork() == 0:
                    with open(self.note, "w") as file:
                        file.write(str(os.getpid()))
                    time.sleep(600)
                while not os.path.exists(self.note) or os.path.getsize(self.note) == 0:
                    time.sleep(0.01)
            case "escape":
                # A daemon: a session of its own, and no parent that lives.
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        with open(self.note, "w") as file:
                            file.write(str(os.getpid()))
                        time.sleep(600)
                    os._exit(0)
                while not os.path.exists(self.note) or os.path.getsize(self.note) == 0:
                    time.sleep(0.01)
            case "signal":
                os.kill(os.getpid(), self.number)
                time.sleep(600)
            case "environment":
                return {"value": float(os.environ.get("CUDA_VISIBLE_DEVICES", "-1"))}
            case "hog-family":
                # Three processes, none of which is over the limit alone.
                for _ in range(3):
                    if os.fork() == 0:
                        break
                block = bytearray(300 << 20)
                block[::4096] = b"x" * len(block[::4096])
                time.sleep(600)
            case "stop-server":
                os.kill(os.getppid(), signal.SIGSTOP)
            case "hog":
                block = bytearray(1 << 30)
                block[::4096] = b"x" * len(block[::4096])
                time.sleep(600)
            case "kill-server":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(5)
            case "surrogate":
                raise RuntimeError("a lone surrogate: \udc80")
            case "nonsense":
                return "nonsense"
        return {"value": 1.0}


@hyperparameters
class Scale:
    """Multiplies every weight."""

    factor: Annotated[float, Field(gt=0)] = 0.5

    def compress(self, model, data, ctx):
        from methodbench.torchkit.model import set_weight

        small = model.clone()
        for module in small.module.modules():
            if hasattr(module, "weight"):
                set_weight(module, module.weight * self.factor)
        small.storage = "simulated"
        small.facts["calibrated_on"] = len(data)
        return small


class _Compressor:
    def compress(self, model, data, ctx):
        from methodbench.torchkit.model import set_weight

        small = model.clone()
        for layer in small.adapter.targets(small.module).values():
            set_weight(layer, self.changed(layer.weight))
        small.storage = "simulated"
        return small


@hyperparameters
class ZeroColumns(_Compressor):
    """Zeroes the first columns of every weight."""

    columns: Annotated[int, Field(ge=0, description="how many")] = 1

    def changed(self, weight):
        weight = weight.clone()
        weight[:, : self.columns] = 0
        return weight


@hyperparameters
class Round(_Compressor):
    """Rounds every weight to a grid, shifted off zero on request."""

    step: Annotated[float, Field(gt=0, description="distance of the grid's points")] = 0.25
    shift: float = 0.0

    def changed(self, weight):
        return ((weight - self.shift) / self.step).round() * self.step + self.shift


@hyperparameters
class Mask:
    """Replaces every layer by one of another class."""

    def compress(self, model, data, ctx):
        from torch import nn

        from methodbench.torchkit.model import set_submodule

        class MaskedLinear(nn.Linear):
            pass

        small = model.clone()
        for name, layer in small.adapter.targets(small.module).items():
            masked = MaskedLinear(layer.in_features, layer.out_features, bias=False)
            masked.weight = layer.weight
            set_submodule(small.module, name, masked)
        return small


@hyperparameters
class Restore:
    """Puts back the largest weight of every layer, from the model before the chain."""

    def compress(self, model, data, ctx):
        import torch

        from methodbench.torchkit.model import set_weight

        fixed = model.clone()
        dense = ctx.dense.adapter.targets(ctx.dense.module)
        for name, layer in fixed.adapter.targets(fixed.module).items():
            largest = dense[name].weight.abs() == dense[name].weight.abs().max()
            set_weight(layer, torch.where(largest, dense[name].weight, layer.weight))
        return fixed
