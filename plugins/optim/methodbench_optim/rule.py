"""What optimizers share: the base of those written here, and the checks that all of them pass before a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from methodbench.errors import ParameterError

#: Bytes of parameters that a CPU handles together: with gradients and state they stay in a core's cache from
#: one elementwise operation to the next, which halves the time of a step over tensors that do not all fit in.
CPU_CHUNK = 512 * 1024

#: Settings of a group that are rates or strengths: finite, and not negative.
_NOT_NEGATIVE = ("lr", "weight_decay", "eps")
#: Settings of a group that are decays of averages: from 0, below 1.
_DECAYS = ("betas", "momentum", "alpha", "rho")

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


class Rule(torch.optim.Optimizer):
    """A rule that moves each parameter by its gradient and a state of its own.

    A subclass names itself and implements :meth:`advance` on lists of tensors. Gradients must be dense and
    real: a step that finds another kind raises before any parameter moves. Gradients that are not finite are used as
    they are, as torch does: what they lead to is the rule's. Parameters without a gradient stay as they are, decay
    included. State has the parameter's dtype; mixed precision is for autocast and a gradient scaler, which leave
    parameters in float32.

    A step may be captured in a CUDA graph once it has run a first time. The graph keeps the rates of its capture. A
    rule that counts steps needs ``capturable`` in its groups for that, which keeps the numbers on the device.
    """

    title: ClassVar[str]
    """The rule's name, for errors."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, computed before it (None without a closure)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [(group, list(with_gradients(group, self.title))) for group in self.param_groups]
        for group, parts in found:
            for params, grads in parts:
                self.advance(group, params, grads)
        return loss

    def advance(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move ``params`` by their gradients ``grads``, in place; ``grads`` are left as they are."""
        raise NotImplementedError

    def averages(self, params: list[Tensor], name: str) -> list[Tensor]:
        """Return the state ``name`` of each parameter, of its shape and dtype; zeros before the first step."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.state[p][name] for p in params]

    def count(self, params: list[Tensor], group: Mapping[str, Any]) -> list[Any]:
        """Add one to the steps of each parameter and return them, from 1: as ints, or with ``capturable`` as tensors.

        Raises:
            RuntimeError: a CUDA graph is being captured and the group is not ``capturable``: every replay would take
                the same step again.
        """
        capturable = group.get("capturable", False)
        if not capturable and not torch.compiler.is_compiling() and capturing():
            raise RuntimeError(
                f"{self.title} counts its steps, and a CUDA graph would repeat the number of this one: "
                "give its groups capturable=True"
            )
        counted = []
        for p in params:
            state = self.state[p]
            before = state.get("step", 0)
            if not capturable:
                state["step"] = int(before) + 1 if isinstance(before, Tensor) else before + 1
                counted.append(state["step"])
                continue
            if not isinstance(before, Tensor):
                state["step"] = torch.tensor(float(before), device=p.device)
            counted.append(state["step"].add_(1).double())
        return counted

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its settings checked.

        Raises:
            ParameterError: a setting of the group is out of range.
        """
        super().add_param_group(param_group)
        check_group(self.title, self.param_groups[-1])


def capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def ready(optimizer: OptimizerT, name: str) -> OptimizerT:
    """Return ``optimizer``, checked, with a state dict that no other rule takes for its own.

    Args:
        optimizer: any optimizer, of torch's too.
        name: the method's name, which goes into the state dict under ``"rule"``.

    Raises:
        ParameterError: there is no parameter, or a group's setting is out of range.
    """
    if not any(group["params"] for group in optimizer.param_groups):
        raise ParameterError(f"{name}: there is no parameter to optimize")
    for group in optimizer.param_groups:
        check_group(name, group)

    def sign(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "rule": name}

    def compare(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        theirs = state.get("rule", "an unnamed rule")
        if theirs != name:
            raise ParameterError(
                f"{name}: the state dict is that of {theirs}",
                f"Resume it with {theirs}, or start {name} afresh.",
            )

    optimizer.register_state_dict_post_hook(sign)
    optimizer.register_load_state_dict_pre_hook(compare)
    return optimizer


def real(optimizer: OptimizerT, name: str) -> OptimizerT:
    """Return ``optimizer``, whose parameters are real.

    Raises:
        ParameterError: a parameter is complex.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.is_complex():
                raise ParameterError(
                    f"{name} moves real parameters, and one of shape {tuple(p.shape)} is complex"
                )
    return optimizer


def check_group(owner: str, group: Mapping[str, Any]) -> None:
    """Refuse settings of a parameter group that no rule can use.

    Raises:
        ParameterError: a rate is negative or not finite, a decay of an average is not in [0, 1), or parameters
            are in float16, in which ``eps`` is zero.
    """
    for name in _NOT_NEGATIVE:
        for value in _numbers(group.get(name)):
            if not (math.isfinite(value) and value >= 0):
                raise ParameterError(f"{owner}: {name} = {value} is not a finite number of 0 or more")
    for name in _DECAYS:
        for value in _numbers(group.get(name)):
            if not 0 <= value < 1:
                raise ParameterError(f"{owner}: {name} = {value} is not from 0 to below 1")
    eps = min((v for name in ("eps", "eps1") for v in _numbers(group.get(name)) if v), default=1.0)
    if any(p.dtype == torch.float16 for p in group["params"]) and not torch.tensor(eps, dtype=torch.float16):
        raise ParameterError(
            f"{owner}: eps = {eps} is zero in float16, the dtype of a parameter",
            "Keep the parameters in float32 or bfloat16, or raise eps.",
        )


def _numbers(value: Any) -> list[float]:
    if value is None or isinstance(value, bool):
        return []
    return [
        float(item) for item in (value if isinstance(value, (tuple, list)) else (value,)) if item is not None
    ]


def with_gradients(group: Mapping[str, Any], owner: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the parameters of ``group`` that have a gradient, and these, in lists to handle together.

    On a CPU a list holds at most :data:`CPU_CHUNK` bytes of parameters, or a single larger one; elsewhere one
    list holds all of them, which takes the fewest kernels.

    Args:
        group: a parameter group of :class:`torch.optim.Optimizer`.
        owner: the optimizer's name, for the error.

    Raises:
        RuntimeError: a gradient is sparse or complex; elementwise rules follow dense real ones.
    """
    params: list[Tensor] = []
    grads: list[Tensor] = []
    held = 0
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout != torch.strided or grad.is_complex():
            kind = "complex" if grad.is_complex() else "sparse"
            raise RuntimeError(
                f"{owner} follows dense real gradients, and one of shape {tuple(grad.shape)} is {kind}"
            )
        size = p.numel() * p.element_size() if p.device.type == "cpu" else 0
        if params and held + size > CPU_CHUNK:
            yield params, grads
            params, grads, held = [], [], 0
        params.append(p)
        grads.append(grad)
        held += size
    if params:
        yield params, grads
