"""The contract of training methods, segmenters and probes, on problems whose answer was planted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.properties import Promise
from methodbench.testing import planted
from methodbench.testing.subject import Skip, Subject, fingerprint, quiet, require
from methodbench.torchkit.model import Calibration, LoadedModel

Checks = Mapping[str, Callable[[], str]]
STEPS = 120


def training_checks(subject: Subject) -> Checks:
    """Return the checks that every training method must pass, by name."""

    def trained(steps: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return planted.teach(subject.build_for_checks({}), 0, steps, quiet())

    def runs() -> str:
        module = subject.build_for_checks({}).wrap(planted.student(0), planted.supplied(0, quiet()))
        require(isinstance(module, nn.Module), f"wrap returned {type(module).__name__}, not a module")
        losses, _ = trained(4)
        require(bool(losses.isfinite().all()), "the loss is not finite within four steps")
        return ""

    def no_input_mutation() -> str:
        module = planted.student(0)
        before = [parameter.detach().clone() for parameter in module.parameters()]
        subject.build_for_checks({}).wrap(module, planted.supplied(0, quiet()))
        same = all(torch.equal(a, b) for a, b in zip(before, planted.student(0).parameters(), strict=True))
        held = {id(t) for t in module.parameters()}
        require(same and len(held) == len(before), "wrap changed the tensors of the module that it was given")
        return ""

    def deterministic() -> str:
        (first, _), (second, _) = trained(20), trained(20)
        require(torch.equal(first, second), "two trainings with one seed have different losses")
        return ""

    def score() -> str:
        losses, right = trained(STEPS)
        accuracy, chance = float(right.mean()), 1 / planted.CLASSES
        require(
            accuracy > chance + 0.1,
            f"the student is right in {accuracy:.0%} of cases after {STEPS} steps; chance is {chance:.0%}",
        )
        return f"right in {accuracy:.0%} (chance {chance:.0%}), loss {losses[-1]:.2g} after {STEPS} steps"

    return {
        "runs": runs,
        "no-input-mutation": no_input_mutation,
        "deterministic": deterministic,
        "planted-teacher": score,
    }


def segmenter_checks(subject: Subject) -> Checks:
    """Return the checks that every segmenter must pass, by name."""

    of_points = "points" in subject.entry.needs

    def predicted(count: int, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        seen = planted.evidence_images(count, 1)
        predictor = subject.build_for_checks({}).fit(planted.weak_labels(seen), quiet())
        masks: Tensor = predictor(x)
        return masks

    def runs() -> str:
        x = planted.evidence_images(5, 2).images
        masks = predicted(16, x)
        shape = (5, planted.IMAGE_SIZE, planted.IMAGE_SIZE)
        require(tuple(masks.shape) == shape, f"masks are {tuple(masks.shape)}, not {shape}")
        require(not masks.is_floating_point(), f"masks are {masks.dtype}, not integers")
        low, high = int(masks.min()), int(masks.max())
        limit = high if of_points else planted.CLASSES
        require(low >= 0 and high <= limit, f"masks hold {low} to {high}, not 0 to {limit}")
        return ""

    def no_input_mutation() -> str:
        seen, fresh = planted.evidence_images(16, 1), planted.evidence_images(4, 2)
        before = [fingerprint(t) for t in (seen.images, seen.labels, fresh.images)]
        subject.build_for_checks({}).fit(planted.weak_labels(seen), quiet())(fresh.images)
        after = [fingerprint(t) for t in (seen.images, seen.labels, fresh.images)]
        require(before == after, "images or labels were changed")
        return ""

    def deterministic() -> str:
        x = planted.evidence_images(4, 2).images
        require(
            torch.equal(predicted(16, x), predicted(16, x)), "two fits with one seed give different masks"
        )
        return ""

    def score() -> str:
        held_out = planted.evidence_images(32, 3)
        truth = held_out.masks * (held_out.labels + 1)[:, None, None]
        found = predicted(64, held_out.images)
        if of_points:
            # Instances have numbers of their own: what counts is where there is any.
            found, truth = (found > 0).long(), (truth > 0).long()
            overlap = planted.intersection_over_union(found, truth).mean()
            require(float(overlap) > 0, "no predicted instance overlaps with the planted patches")
            return f"mean IoU {overlap:.2f}"
        overlap = planted.intersection_over_union(found, truth).mean()
        whole = planted.intersection_over_union(
            (held_out.labels + 1)[:, None, None].expand_as(truth), truth
        ).mean()
        if not subject.entry.baseline:
            require(float(overlap) > 0, "no predicted mask overlaps with the planted ones")
        return f"mean IoU {overlap:.2f} (the whole image would have {whole:.2f})"

    return {
        "runs": runs,
        "no-input-mutation": no_input_mutation,
        "deterministic": deterministic,
        "planted-masks": score,
    }


def probe_checks(subject: Subject) -> Checks:
    """Return the checks that every probe must pass, by name."""
    kinds = list(planted.STRUCTURES) if "*" in subject.entry.applies_to else list(subject.entry.applies_to)

    def structures() -> list[str]:
        return [planted.STRUCTURES[kind][0] for kind in kinds if kind in planted.STRUCTURES]

    def measured(model: LoadedModel, data: Calibration) -> dict[str, Any]:
        torch.manual_seed(0)
        given = data if "calibration" in subject.entry.needs else Calibration.none()
        return dict(subject.build_for_checks({}).measure(model, given, quiet()))

    def on(structure: str, *, outliers: bool = True) -> dict[str, Any]:
        return measured(planted.build(structure, outliers=outliers), planted.inputs(structure, 8, 1))

    def runs(kind: str) -> str:
        if kind not in planted.STRUCTURES:
            raise Skip(f"there is no planted model of kind {kind}")
        try:
            values = on(planted.STRUCTURES[kind][0])
        except NotApplicableError as error:
            raise AssertionError(f"applies_to names {kind}, but: {error.message}") from error
        require(bool(values), "measure returned nothing")
        for name, value in values.items():
            array = np.asarray(value, dtype=float)
            require(bool(np.isfinite(array).all()), f"{name} is not finite")
        return ", ".join(values)

    def no_input_mutation() -> str:
        for structure in structures():
            model, data = planted.build(structure), planted.inputs(structure, 8, 1)
            before = fingerprint(model.module), fingerprint(data.inputs)
            measured(model, data)
            require(
                before == (fingerprint(model.module), fingerprint(data.inputs)),
                f"measure changed {structure}",
            )
        return ""

    def deterministic() -> str:
        for structure in structures():
            first, second = on(structure), on(structure)
            same = first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
            require(same, f"two measurements of {structure} differ")
        return ""

    def score() -> str:
        """Measure one function with and without outlier channels: what differs is what the probe can see."""
        notes = []
        for structure in structures():
            if structure in ("cnn", "bert"):
                continue
            dense, hostile = on(structure, outliers=False), on(structure)
            for name, value in dense.items():
                if np.ndim(value) == 0 and float(value):
                    notes.append(f"{name} x {float(hostile[name]) / float(value):.3g}")
        if not notes:
            raise Skip("the probe measures no scalar of a transformer")
        return f"with outlier channels: {', '.join(notes)}"

    return {
        **{f"runs-on-{kind}": functools.partial(runs, kind) for kind in kinds},
        "no-input-mutation": no_input_mutation,
        "deterministic": deterministic,
        "planted-contrast": score,
    }


def no_promises(subject: Subject) -> Mapping[str, Callable[[Promise], str]]:
    """Kinds whose properties are those that are always checked."""
    return {}
