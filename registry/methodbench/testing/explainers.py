"""The contract of explainers, on a network and images whose evidence is known to the pixel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from methodbench.errors import NotApplicableError
from methodbench.properties import Promise
from methodbench.protocols import Oracle
from methodbench.testing import planted
from methodbench.testing.subject import Skip, Subject, fingerprint, for_all, require
from methodbench.torchkit.model import LoadedModel

SEEDS = st.integers(0, 2**16)
#: Planted networks to draw from: few, since building one costs more than explaining it.
MODELS = st.integers(0, 2)
#: Largest distance of two maps in [0, 1] that rounding explains.
ROUNDING = 1e-4
IMAGES = 32


class Explainers:
    """Runs one explainer on planted models."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return the method's maps at its defaults, with torch's generator at a fixed seed."""
        torch.manual_seed(0)
        maps: Tensor = self.subject.build_for_checks({}).explain(model, x, target)
        return maps

    def kinds(self) -> list[str]:
        """Return the kinds of image models that the method names, or all for ``*``."""
        named = self.subject.entry.applies_to
        return ["cnn", "vit"] if "*" in named else list(named)

    def structures(self) -> list[str]:
        """Return the planted structures to run on: those of images."""
        return [kind for kind in self.kinds() if kind in ("cnn", "vit")]

    # What is checked of every explainer.

    def runs(self, kind: str) -> str:
        if kind not in ("cnn", "vit"):
            raise Skip(f"there is no planted image model of kind {kind}")
        model, images = planted.build(kind), planted.evidence_images(5, 1)
        try:
            maps = self.explain(model, images.images, images.labels)
        except NotApplicableError as error:
            raise AssertionError(f"applies_to names {kind}, but: {error.message}") from error
        shape = (5, planted.IMAGE_SIZE, planted.IMAGE_SIZE)
        require(isinstance(maps, Tensor), f"explain returned {type(maps).__name__}, not a tensor")
        require(tuple(maps.shape) == shape, f"maps are {tuple(maps.shape)}, not {shape}")
        require(bool(maps.isfinite().all()), "maps are not finite")
        low, high = float(maps.min()), float(maps.max())
        require(low >= -1e-6 and high <= 1 + 1e-6, f"maps lie in [{low:.3g}, {high:.3g}], not in [0, 1]")
        require(not maps.requires_grad, "maps carry a graph: detach them")
        return ""

    def no_input_mutation(self) -> str:
        for structure in self.structures():
            model, images = planted.build(structure), planted.evidence_images(4, 1)
            before = fingerprint(model.module), fingerprint(images.images), fingerprint(images.labels)
            enabled = torch.is_grad_enabled()
            self.explain(model, images.images, images.labels)
            after = fingerprint(model.module), fingerprint(images.images), fingerprint(images.labels)
            for what, old, new in zip(
                ("model (tensors, hooks, gradients)", "images", "classes"), before, after, strict=True
            ):
                require(old == new, f"explain changed the {what} on {structure}")
            require(torch.is_grad_enabled() == enabled, "explain changed the gradient mode")
        return ""

    def deterministic(self) -> str:
        for structure in self.structures():
            model, images = planted.build(structure), planted.evidence_images(4, 1)
            first, second = (self.explain(model, images.images, images.labels) for _ in range(2))
            require(torch.equal(first, second), f"two runs on {structure} differ")
        return ""

    def score(self) -> str:
        """Score the maps of the planted network against the patches that it looks at."""
        if "cnn" not in self.structures():
            raise Skip("the method does not apply to convolutional networks")
        model, images = planted.build("cnn"), planted.evidence_images(IMAGES, 3)
        maps = self.explain(model, images.images, images.labels)
        mass = planted.evidence_mass(maps, images.masks).nan_to_num(0.0).mean()
        points = planted.points_at(maps, images.masks).mean()
        chance = images.masks.double().mean()
        if not self.subject.entry.baseline:
            require(
                float(mass) > float(chance),
                f"{float(mass):.1%} of the maps' mass lies on the evidence; a constant map has {float(chance):.1%}",
            )
        return (
            f"{mass:.0%} of the mass on the evidence (constant map {chance:.0%}), peak on it in {points:.0%}"
        )

    def oracle(self) -> str:
        """Hand the planted masks to a method that is told the truth."""
        images = planted.evidence_images(IMAGES, 3)
        maps: Tensor = self.subject.build().explain_known(images.masks)
        require(tuple(maps.shape) == tuple(images.masks.shape), f"maps are {tuple(maps.shape)}")
        require(float(maps.min()) >= 0 and float(maps.max()) <= 1, "maps leave [0, 1]")
        mass = float(planted.evidence_mass(maps, images.masks).mean())
        require(mass > 0.999, f"{mass:.1%} of the maps' mass lies on the mask that was given")
        return ""

    # Declared properties.

    def scale_equivariant(self, _: Promise) -> str:
        def holds(scale: float, seed: int, net: int, structure: str) -> None:
            images = planted.evidence_images(4, seed)
            model, scaled = planted.build(structure, net), planted.build(structure, net)
            head = scaled.adapter.head(scaled.module)
            assert head is not None
            for parameter in head.parameters():
                parameter.mul_(scale)
            self._same(
                self.explain(scaled, images.images, images.labels),
                self.explain(model, images.images, images.labels),
                f"class scores times {scale} on {structure}",
            )

        scales = st.sampled_from([2.0**k for k in range(-4, 5) if k])
        for_all(holds, scales, SEEDS, MODELS, st.sampled_from(self.structures()), examples=10)
        return ""

    def channel_permutation_equivariant(self, _: Promise) -> str:
        if "cnn" not in self.structures():
            raise Skip(
                "hidden channels are permuted in a convolutional network, which the method does not take"
            )

        def holds(seed: int) -> None:
            images = planted.evidence_images(4, seed)
            model, other = planted.build("cnn", seed), planted.build("cnn", seed)
            last, head = other.module.get_submodule("features.1.0"), other.module.get_submodule("fc")
            weight, bias, reader = (
                last.get_parameter("weight"), last.get_parameter("bias"), head.get_parameter("weight")
            )  # fmt: skip
            order = torch.randperm(len(bias), generator=planted.generator(seed))
            weight.copy_(weight[order])
            bias.copy_(bias[order])
            reader.copy_(reader[:, order])
            self._same(
                self.explain(other, images.images, images.labels),
                self.explain(model, images.images, images.labels),
                "permuted hidden channels",
            )

        for_all(holds, SEEDS, examples=10)
        return ""

    def batch_split_invariant(self, _: Promise) -> str:
        def holds(cut: int, seed: int, net: int, structure: str) -> None:
            model, images = planted.build(structure, net), planted.evidence_images(6, seed)
            parts = [
                self.explain(model, x, y)
                for x, y in zip(
                    images.images.split([cut, 6 - cut]), images.labels.split([cut, 6 - cut]), strict=True
                )
            ]
            whole = self.explain(model, images.images, images.labels)
            self._same(torch.cat(parts), whole, f"a batch in parts of {cut} and {6 - cut} on {structure}")

        for_all(holds, st.integers(1, 5), SEEDS, MODELS, st.sampled_from(self.structures()), examples=10)
        return ""

    def dtype_stable(self, _: Promise) -> str:
        for structure in self.structures():
            model, double, images = (
                planted.build(structure),
                planted.build(structure),
                planted.evidence_images(4, 1),
            )
            double.module.to(torch.float64)
            self._same(
                self.explain(double, images.images.double(), images.labels).float(),
                self.explain(model, images.images, images.labels).float(),
                f"float64 on {structure}",
            )
        return ""

    def _same(self, maps: Tensor, expected: Tensor, what: str) -> None:
        away = float((maps - expected).abs().max())
        require(away <= ROUNDING, f"{what}: maps differ by {away:.3g}")


def checks(subject: Subject) -> Mapping[str, Callable[[], str]]:
    """Return the checks that every explainer must pass, by name."""
    bench = Explainers(subject)
    if isinstance(subject.build(), Oracle):
        return {"oracle": bench.oracle}
    runs = {f"runs-on-{kind}": functools.partial(bench.runs, kind) for kind in bench.kinds()}
    return {
        **runs,
        "no-input-mutation": bench.no_input_mutation,
        "deterministic": bench.deterministic,
        "planted-evidence": bench.score,
    }


def promises(subject: Subject) -> Mapping[str, Callable[[Promise], str]]:
    """Return the tests of the properties that an explainer can declare, by name."""
    bench = Explainers(subject)
    return {
        "scale-equivariant": bench.scale_equivariant,
        "channel-permutation-equivariant": bench.channel_permutation_equivariant,
        "batch-split-invariant": bench.batch_split_invariant,
        "dtype-stable": bench.dtype_stable,
    }
