"""The contract of compressors, on planted transformers, networks and linear layers."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.properties import Promise
from methodbench.testing import planted
from methodbench.testing.subject import Skip, Subject, fingerprint, for_all, quiet, require, values_of
from methodbench.torchkit.model import Calibration, LoadedModel, set_submodule

Settings = Mapping[str, Any]

SEEDS = st.integers(0, 2**16)
#: Powers of two scale without rounding, so that whatever depends on them shows, and nothing else does.
SCALES = st.sampled_from([2.0**k for k in range(-4, 5) if k])
#: CPU seconds of compressing that one property may take; slow methods are shown fewer examples, never fewer than two.
SECONDS_PER_PROPERTY = 8.0
#: Relative squared error that rounding explains in float32, and that no change of the function does.
ROUNDING = 1e-8


class Compressors:
    """Runs one compressor on planted models."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._fits: dict[str, str] = {}
        self._made: dict[tuple[str, int], LoadedModel] = {}
        self._kept: dict[str, list[tuple[str, bool]]] = {}
        self._seconds = 0.0

    def compress(
        self, model: LoadedModel, data: Calibration, changes: Settings | None = None, *, seed: int = 0
    ) -> LoadedModel:
        """Return what the method makes of ``model`` at its defaults (and ``check_params``) with ``changes``."""
        method = self.subject.build_for_checks(changes or {})
        given = data if "calibration" in self.subject.entry.needs else Calibration.none()
        torch.manual_seed(seed)
        start = time.process_time()
        compressed: LoadedModel = method.compress(model, given, quiet(seed))
        self._seconds = max(self._seconds, time.process_time() - start)
        return compressed

    def for_all(
        self, holds: Callable[..., None], *draws: st.SearchStrategy, examples: int, runs: int = 1
    ) -> None:
        """Run ``holds``, which compresses ``runs`` times, on as many examples as a slow method leaves time for."""
        affordable = int(SECONDS_PER_PROPERTY / (runs * self._seconds)) if self._seconds else examples
        for_all(holds, *draws, examples=min(examples, max(2, affordable)))

    def structure(self, kind: str) -> str:
        """Return the first planted structure of a kind of model that the method runs on.

        Raises:
            AssertionError: it runs on none of them.
            Skip: there is no planted model of this kind.
        """
        if kind not in planted.STRUCTURES:
            raise Skip(f"there is no planted model of kind {kind}")
        if kind not in self._fits:
            refusals = []
            for structure in planted.STRUCTURES[kind]:
                try:
                    self.made(structure)
                except NotApplicableError as error:
                    refusals.append(f"{structure}: {error.message}")
                    continue
                self._fits[kind] = structure
                break
            else:
                raise AssertionError(
                    f"applies_to names {kind}, but no such model fits ({'; '.join(refusals)})"
                )
        return self._fits[kind]

    def made(self, structure: str, repetition: int = 0) -> LoadedModel:
        """Return the method's result at its defaults on the planted structure, for each repetition a run of its own."""
        key = structure, repetition
        if key not in self._made:
            model, data = planted.build(structure), planted.inputs(structure, 8, 1)
            before = _state(model, data)
            self._made[key] = self.compress(model, data)
            after = _state(model, data)
            self._kept[structure] = [(what, before[what] == after[what]) for what in before]
        return self._made[key]

    def kinds(self) -> list[str]:
        """Return the kinds of models that the method names, or all that can be planted for ``*``."""
        named = self.subject.entry.applies_to
        return list(planted.STRUCTURES) if "*" in named else list(named)

    def beds(self) -> list[str]:
        """Return one planted structure for each kind of model."""
        return [self.structure(kind) for kind in self.kinds() if kind in planted.STRUCTURES]

    def linear(self, weight: Tensor, seed: int = 0) -> planted.LinearBed | None:
        """Return the model of one Linear, or None where the method needs a whole network."""
        bed = planted.linear_bed(weight, seed)
        if "linear" not in self._fits:
            try:
                self.compress(bed.model, bed.data)
                self._fits["linear"] = "yes"
            except NotApplicableError:
                self._fits["linear"] = ""
        return bed if self._fits["linear"] else None

    def bed(self, seed: int) -> tuple[LoadedModel, Calibration, Tensor]:
        """Return a random Linear, or the first planted model where a Linear is not enough, with its inputs."""
        bed = self.linear(planted.random_weight(seed), seed)
        if bed is not None:
            return bed.model, bed.data, bed.unseen
        structure = self.beds()[0]
        data = planted.inputs(structure, 8, seed + 1)
        return planted.build(structure, seed), data, planted.inputs(structure, 8, seed + 2).inputs

    # What is checked of every compressor.

    def runs(self, kind: str) -> str:
        structure = self.structure(kind)
        model, compressed = planted.build(structure), self.made(structure)
        require(
            isinstance(compressed, LoadedModel),
            f"compress returned {type(compressed).__name__}, not LoadedModel",
        )
        require(compressed.kind == model.kind, f"a {model.kind} became a {compressed.kind}")
        x = planted.inputs(structure, 4, 2).inputs
        before, after = planted.output(model.module, x), planted.output(compressed.module, x)
        require(after.shape == before.shape, f"outputs {tuple(before.shape)} became {tuple(after.shape)}")
        require(bool(after.isfinite().all()), "the compressed model's outputs are not finite")
        if compressed.storage == "dense" and fingerprint(compressed.module) == fingerprint(model.module):
            return f"{structure}, unchanged"
        require(
            compressed.storage in ("real", "simulated"),
            f"storage is {compressed.storage!r}: say 'real' or 'simulated'",
        )
        return f"{structure}, storage {compressed.storage}"

    def no_input_mutation(self) -> str:
        for structure in self.beds():
            self.made(structure)
            for what, same in self._kept[structure]:
                require(same, f"compress changed the {what} of the dense {structure}")
        return ""

    def deterministic(self) -> str:
        for structure in self.beds():
            x = planted.inputs(structure, 4, 2).inputs
            first, second = (
                planted.output(self.made(structure, repetition).module, x) for repetition in range(2)
            )
            require(
                torch.equal(first, second),
                f"two runs with one seed differ by {float((first - second).abs().max()):.2g} on {structure}",
            )
        return ""

    def state_dict(self) -> str:
        for structure in self.beds():
            x = planted.inputs(structure, 4, 2).inputs
            compressed, other = (self.made(structure, repetition) for repetition in range(2))
            expected = planted.output(compressed.module, x)
            state = {name: tensor.clone() for name, tensor in compressed.module.state_dict().items()}
            module = copy.deepcopy(other.module)
            module.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()}, assign=True)
            module.load_state_dict(state, assign=True)
            require(
                torch.equal(planted.output(module, x), expected),
                f"outputs on {structure} change when the state dict is loaded: it lacks what they depend on",
            )
        return ""

    def outlier_score(self) -> str:
        """Score the outputs of the planted transformers with outlier channels against the dense ones."""
        notes = []
        for structure in self.beds():
            if structure == "cnn":
                continue
            model, compressed = planted.build(structure), self.made(structure)
            x = planted.inputs(structure, 16, 2).inputs
            error = _error(compressed, model, x)
            # Blocks that return nothing are what any compressor must beat.
            nothing = _error(_silenced(model), model, x)
            require(
                error < nothing,
                f"relative error {error:.3g} on {structure} with outlier channels: blocks of zeros give {nothing:.3g}",
            )
            notes.append(f"{structure} {error:.2g}")
        if not notes:
            raise Skip("the method applies to no planted transformer")
        return f"relative error {', '.join(notes)} (0 is the dense model)"

    def code_score(self) -> str:
        """Score the outputs of a layer with a known optimal code against that code's, which has error 0."""
        errors = []
        for seed in range(4):
            bed = self.linear(planted.coded_linear(seed), seed)
            if bed is None:
                raise Skip("the method needs more than a Linear")
            errors.append(_error(self.compress(bed.model, bed.data), bed.model, bed.unseen))
        worst = max(errors)
        require(math.isfinite(worst) and worst < 1, f"relative error {worst:.3g}: zeros would give 1")
        return f"relative error {sum(errors) / len(errors):.2g} (0 is optimal at 4 bits or half the weights)"

    # Declared properties.

    def identity_at(self, promise: Promise) -> str:
        def holds(seed: int) -> None:
            model, data, x = self.bed(seed)
            error = _error(self.compress(model, data, promise.settings()), model, x)
            require(error <= ROUNDING, f"relative error {error:.3g} at {promise.argument}")

        self.for_all(holds, SEEDS, examples=6)
        for structure in self.beds():
            model, data = planted.build(structure), planted.inputs(structure, 8, 1)
            x = planted.inputs(structure, 8, 2).inputs
            error = _error(self.compress(model, data, promise.settings()), model, x)
            require(error <= ROUNDING, f"relative error {error:.3g} at {promise.argument} on {structure}")
        return ""

    def monotone(self, promise: Promise) -> str:
        field, falls = promise.field, not promise.argument.startswith("-")
        values = values_of(self.subject, field)
        require(len(values) > 1, f"{field} takes one value only")
        pairs = st.sampled_from([(low, high) for i, low in enumerate(values) for high in values[i + 1 :]])

        def holds(pair: tuple[object, object], seed: int) -> None:
            model, data, x = self.bed(seed)
            low, high = (_error(self.compress(model, data, {field: value}), model, x) for value in pair)
            near, far = (high, low) if falls else (low, high)
            require(
                near <= far * (1 + 1e-3) + ROUNDING,
                f"relative error {low:.4g} at {field} {pair[0]}, {high:.4g} at {pair[1]}",
            )

        self.for_all(holds, pairs, SEEDS, examples=10, runs=2)
        return f"{field} in {', '.join(map(str, values))}"

    def exact_sparsity(self, promise: Promise) -> str:
        field = promise.field
        shares = st.sampled_from(values_of(self.subject, field))

        def holds(share: float, seed: int) -> None:
            model, data, _ = self.bed(seed)
            compressed = self.compress(model, data, {field: share})
            for name, layer in compressed.adapter.targets(compressed.module).items():
                weight = layer.weight
                assert isinstance(weight, Tensor)
                zeros = float((weight == 0).double().mean())
                require(
                    abs(zeros - share) <= 1 / weight[0].numel(),
                    f"{name} has {zeros:.4f} zeros at {field} {share}",
                )

        self.for_all(holds, shares, SEEDS, examples=10)
        return ""

    def idempotent(self, _: Promise) -> str:
        def holds(seed: int) -> None:
            model, data, x = self.bed(seed)
            once = _densified(self.compress(model, data))
            twice = self.compress(once, data)
            error = _error(twice, once, x)
            require(
                error <= ROUNDING, f"the second time changes the outputs by a relative error of {error:.3g}"
            )

        self.for_all(holds, SEEDS, examples=8, runs=2)
        return ""

    def scale_equivariant(self, _: Promise) -> str:
        def holds(scale: float, seed: int) -> None:
            weight = planted.random_weight(seed)
            bed, scaled = self._linears(weight, weight * scale, seed)
            expected = planted.output(self.compress(bed.model, bed.data).module, bed.unseen) * scale
            actual = planted.output(self.compress(scaled.model, scaled.data).module, bed.unseen)
            error = float(planted.relative_errors(actual, expected).max())
            require(
                error <= ROUNDING,
                f"outputs of weights times {scale} are off by a relative error of {error:.3g}",
            )

        self.for_all(holds, SCALES, SEEDS, examples=10, runs=2)
        return ""

    def channel_permutation_equivariant(self, promise: Promise) -> str:
        def holds(seed: int) -> None:
            weight = planted.random_weight(seed)
            order = torch.randperm(
                weight.shape[1 if promise.argument else 0], generator=planted.generator(seed)
            )
            permuted = weight[:, order] if promise.argument else weight[order]
            bed, other = self._linears(weight, permuted, seed)
            data, x = other.data, bed.unseen
            if promise.argument:
                data, x = Calibration(data.inputs[..., order], data.source), x[..., order]
            expected = planted.output(self.compress(bed.model, bed.data).module, bed.unseen)
            actual = planted.output(self.compress(other.model, data).module, x)
            if not promise.argument:
                expected = expected[..., order]
            error = float(planted.relative_errors(actual, expected).max())
            require(
                error <= ROUNDING, f"permuted channels change the outputs by a relative error of {error:.3g}"
            )

        self.for_all(holds, SEEDS, examples=8, runs=2)
        return ""

    def batch_split_invariant(self, _: Promise) -> str:
        for structure in self.beds():
            module = self.made(structure).module

            def holds(cut: int, seed: int, structure: str = structure, module: nn.Module = module) -> None:
                x = planted.inputs(structure, 6, seed).inputs
                whole = planted.output(module, x)
                parts = torch.cat([planted.output(module, part) for part in x.split([cut, 6 - cut])])
                error = float(planted.relative_errors(parts, whole).max())
                require(error <= ROUNDING, f"{structure} in two parts: relative error {error:.3g}")

            for_all(holds, st.integers(1, 5), SEEDS, examples=8)
        return ""

    def dtype_stable(self, _: Promise) -> str:
        for structure in self.beds():
            model, data = planted.build(structure), planted.inputs(structure, 8, 1)
            x = planted.inputs(structure, 8, 2).inputs
            single = planted.output(self.made(structure).module, x)
            floor = _error(self.made(structure), model, x)
            for dtype, slack in ((torch.bfloat16, 0.05), (torch.float64, 1e-3)):
                cast = planted.build(structure)
                cast.module.to(dtype)
                given = Calibration(_to(data.inputs, dtype), data.source)
                got = planted.output(self.compress(cast, given).module, _to(x, dtype))
                require(got.dtype == dtype, f"outputs of a {dtype} model are {got.dtype}")
                require(bool(got.isfinite().all()), f"outputs of a {dtype} model are not finite")
                error = float(planted.relative_errors(got, single).mean())
                # Where one rounding flips, the distance is of the order of the method's own error.
                require(
                    error <= slack + floor, f"{dtype} on {structure}: relative error {error:.3g} to float32"
                )
        return ""

    def _linears(
        self, first: Tensor, second: Tensor, seed: int
    ) -> tuple[planted.LinearBed, planted.LinearBed]:
        beds = self.linear(first, seed), self.linear(second, seed)
        if beds[0] is None or beds[1] is None:
            raise AssertionError("this property is about single layers, and the method needs a whole network")
        return beds[0], beds[1]


def _state(model: LoadedModel, data: Calibration) -> dict[str, Any]:
    """Return what a method must leave as it is, in a form that outlives changes."""
    return {
        "weights": fingerprint(model.module),
        "calibration inputs": fingerprint(data.inputs),
        "facts": copy.deepcopy(dict(model.facts)),
        "modules": (model.storage, [name for name, _ in model.module.named_modules()]),
    }


def _to(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def _error(model: LoadedModel, dense: LoadedModel, x: Tensor) -> float:
    """Mean relative error of a model's outputs; infinity where they are not finite."""
    errors = planted.relative_errors(planted.output(model.module, x), planted.output(dense.module, x))
    return float(errors.nan_to_num(nan=math.inf).mean())


def _silenced(model: LoadedModel) -> LoadedModel:
    """Return the model with zeros for the weights of every layer that methods compress."""
    silent = model.clone()
    for layer in silent.adapter.targets(silent.module).values():
        weight = layer.get_parameter("weight")
        layer.register_parameter("weight", nn.Parameter(torch.zeros_like(weight), requires_grad=False))
    return silent


def _densified(model: LoadedModel) -> LoadedModel:
    """Return the compressed model with plain layers that hold its weights, declared dense."""
    dense = model.clone()
    for name, layer in dense.adapter.targets(dense.module).items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if weight.ndim != 2:
            continue
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        plain.register_parameter("bias", getattr(layer, "bias", None))
        set_submodule(dense.module, name, plain)
    dense.storage = "dense"
    return dense


def checks(subject: Subject) -> Mapping[str, Callable[[], str]]:
    """Return the checks that every compressor must pass, by name."""
    bench = Compressors(subject)
    runs = {f"runs-on-{kind}": functools.partial(bench.runs, kind) for kind in bench.kinds()}
    return {
        **runs,
        "no-input-mutation": bench.no_input_mutation,
        "deterministic": bench.deterministic,
        "state-dict": bench.state_dict,
        "planted-outliers": bench.outlier_score,
        "planted-codes": bench.code_score,
    }


def promises(subject: Subject) -> Mapping[str, Callable[[Promise], str]]:
    """Return the tests of the properties that a compressor can declare, by name."""
    bench = Compressors(subject)
    return {
        "identity-at": bench.identity_at,
        "monotone": bench.monotone,
        "exact-sparsity": bench.exact_sparsity,
        "idempotent": bench.idempotent,
        "scale-equivariant": bench.scale_equivariant,
        "channel-permutation-equivariant": bench.channel_permutation_equivariant,
        "batch-split-invariant": bench.batch_split_invariant,
        "dtype-stable": bench.dtype_stable,
    }
