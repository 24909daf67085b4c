"""The vocabulary of ``Method.properties``: what a method can promise, and how that is written.

A property is a name, with an argument after a colon where it takes one: ``"deterministic"``,
``"identity-at:sparsity=0"``, ``"monotone:bits"``. The vocabulary is fixed so that a promise means the same for
every method; :mod:`methodbench.testing` turns each into a test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class PropertyError(ValueError):
    """A property that is not in the vocabulary, or not written as it should be."""


@dataclass(frozen=True, slots=True)
class Property:
    """One word of the vocabulary."""

    meaning: Mapping[str, str]
    """What it says about a method of each kind that can have it."""
    argument: str = ""
    """How the argument reads; empty where there is none."""


@dataclass(frozen=True, slots=True)
class Promise:
    """A property as a method declares it."""

    text: str
    name: str
    argument: str = ""

    @property
    def field(self) -> str:
        """The hyperparameter that the argument names, without sign or value."""
        return self.argument.partition("=")[0].removeprefix("-")

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters that ``field=value[,field=value]`` sets; values are JSON, or else text."""
        found = {}
        for part in self.argument.split(","):
            name, _, value = part.partition("=")
            try:
                found[name.strip()] = json.loads(value)
            except ValueError:
                found[name.strip()] = value.strip()
        return found


_EVERY_KIND = ("compressor", "optimizer", "training", "explainer", "segmenter", "probe")

PROPERTIES: Mapping[str, Property] = {
    "deterministic": Property(
        dict.fromkeys(_EVERY_KIND, "The same seed gives the same result, bit for bit.")
    ),
    "no-input-mutation": Property(
        {
            "compressor": "The dense model and the calibration data are left as they are.",
            "optimizer": "Gradients are left as they are.",
            "training": "The module that is wrapped keeps its tensors until the first step.",
            "explainer": "Model, images and classes are left as they are, and no hook stays.",
            "segmenter": "Images and labels are left as they are.",
            "probe": "Model and data are left as they are, and no hook stays.",
        }
    ),
    "identity-at": Property(
        {"compressor": "At this degenerate setting the outputs are the dense model's."},
        argument="FIELD=VALUE[,FIELD=VALUE]",
    ),
    "monotone": Property(
        {
            "compressor": "As the field grows, the outputs come closer to the dense model's (-FIELD: drift away)."
        },
        argument="FIELD or -FIELD",
    ),
    "exact-sparsity": Property(
        {"compressor": "The share of zeros in every compressed layer is the field's, to one entry per row."},
        argument="FIELD",
    ),
    "idempotent": Property({"compressor": "Compressing what was compressed changes nothing more."}),
    "scale-equivariant": Property(
        {
            "compressor": "Weights that are multiplied by c give outputs that are multiplied by c.",
            "explainer": "Class scores that are multiplied by c > 0 give the same maps.",
        }
    ),
    "gradient-scale-invariant": Property(
        {"optimizer": "Gradients that are multiplied by c > 0 give the same steps."}
    ),
    "channel-permutation-equivariant": Property(
        {
            "compressor": "Permuted output channels (with :in, input channels) give permuted results.",
            "optimizer": "Permuted rows of a matrix and of its gradients give permuted steps.",
            "explainer": "Permuted hidden channels give the same maps.",
        },
        argument="in (compressors; optional)",
    ),
    "batch-split-invariant": Property(
        {
            "compressor": "The compressed model treats a batch as it treats its parts.",
            "explainer": "The maps of a batch are the maps of its parts.",
        }
    ),
    "dtype-stable": Property(
        {
            "compressor": "Models in bfloat16 and float64 give finite outputs of their dtype, near those in float32.",
            "optimizer": "Parameters in bfloat16 and float64 keep their dtype, and their path is that in float32.",
            "explainer": "Models in float64 give the maps that they give in float32.",
        }
    ),
}

#: What the contract suite checks of every method, declared or not.
ALWAYS = ("deterministic", "no-input-mutation")

_OPTIONAL_ARGUMENT = {"channel-permutation-equivariant"}


def parse(text: str, kind: str) -> Promise:
    """Read one property of a method of this kind.

    Raises:
        PropertyError: names what is wrong and what is allowed.
    """
    name, colon, argument = text.partition(":")
    known = PROPERTIES.get(name)
    if known is None:
        raise PropertyError(f"property {text!r} is not in the vocabulary: {', '.join(PROPERTIES)}")
    if kind not in known.meaning:
        raise PropertyError(
            f"property {text!r} is for {' and '.join(known.meaning)} methods, not for a {kind}"
        )
    if bool(colon) != bool(known.argument) and name not in _OPTIONAL_ARGUMENT:
        form = f"{name}:{known.argument}" if known.argument else name
        raise PropertyError(f"property {text!r} must read {form!r}")
    if name in _OPTIONAL_ARGUMENT and argument not in ("", "in"):
        raise PropertyError(f"property {text!r} must read {name!r} or '{name}:in'")
    if name == "identity-at" and not all("=" in part for part in argument.split(",")):
        raise PropertyError(f"property {text!r} must read 'identity-at:{known.argument}'")
    return Promise(text, name, argument)
