"""Short fine-tuning of a language model on its calibration text, as compressors use it to recover."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from methodbench.errors import DivergedError, NotApplicableError
from methodbench.torchkit.model import Calibration, LoadedModel


def text_loss(model: LoadedModel, ids: Tensor) -> Tensor:
    """Return the mean next-token loss, in nats, of one sequence ``ids`` [tokens], with its graph.

    Raises:
        NotApplicableError: the model gives no logits.
    """
    ids = ids.to(model.device)
    logits = getattr(model.module(ids[None]), "logits", None)
    if logits is None:
        raise NotApplicableError(f"{model.name} gives no logits, so text has no loss")
    return nn.functional.cross_entropy(logits[0, :-1].float(), ids[1:])


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Give ``module`` parameters of its own in place of shared ones, all of them to be trained; tied ones stay tied."""
    owned: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in owned:
                copied = nn.Parameter(parameter.detach().clone())
                owned[id(parameter)] = copied
            setattr(part, name, owned[id(parameter)])
    return list(owned.values())


def tune_on_text(
    model: LoadedModel,
    data: Calibration,
    parameters: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    tokens: int,
    generator: torch.Generator,
) -> None:
    """Minimize the next-token loss on ``data`` by AdamW, in place; parameters do not ask for gradients afterwards.

    Args:
        model: a clone; what is trained must be its own.
        data: token ids [sequences, tokens].
        parameters: what is trained.
        steps: one piece of text each, sequences in turn.
        lr: learning rate; no weight decay.
        tokens: length of a piece, from a random place of its sequence.
        generator: draws the places.

    Raises:
        NotApplicableError: no token ids, or a model without logits.
        DivergedError: a loss is not finite.
    """
    if not len(data) or data.inputs.is_floating_point():
        raise NotApplicableError("fine-tuning needs calibration text, and the task gives none")
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for step in range(steps):
        ids = data.inputs[step % len(data)]
        start = int(torch.randint(max(1, len(ids) - tokens + 1), (), generator=generator))
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = text_loss(model, ids[start : start + tokens])
            loss.backward()
        if not bool(loss.isfinite()):
            raise DivergedError(
                f"the loss of step {step} of fine-tuning is not finite", "Lower the learning rate."
            )
        optimizer.step()
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
