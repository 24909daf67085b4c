"""``methodbench new``: a package with a method that works, to be turned into another one.

The package has an entry, an implementation (a simple baseline of its kind), a file of claims, the contract suite as
a test, a README and a pyproject with the entry point. Nothing that exists is ever overwritten.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from methodbench.errors import MethodbenchError
from methodbench.hookspecs import HOOK_VERSION, VERSION_ATTRIBUTE
from methodbench.kinds import KIND_NAMES

if TYPE_CHECKING:
    from methodbench.catalog import Catalog

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}(v\d+)?")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a scaffold of one kind of method consists of."""

    summary: str
    body: str
    """Implementation after the imports; ``$cls`` is the class's name."""
    imports: str
    applies_to: tuple[str, ...]
    properties: tuple[str, ...]
    needs: tuple[str, ...]
    task: str
    """Planted task of the first comparison."""
    model: str = ""
    metric: str = ""


KINDS: Mapping[str, Kind] = {
    "compressor": Kind(
        summary="Rounds every weight to a symmetric grid per output channel.",
        applies_to=("causal-lm", "vit", "cnn"),
        properties=("deterministic", "no-input-mutation", "identity-at:bits=16", "monotone:bits"),
        needs=(),
        task="planted-outliers",
        model="planted-decoder",
        metric="relative-error",
        imports="""from typing import TYPE_CHECKING, Annotated

from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from pydantic import Field
from torch import Tensor
""",
        body='''@hyperparameters
class $cls:
    """Rounds the weights of every layer in the blocks; embeddings, head and norms stay as they are."""

    bits: Annotated[int, Field(ge=2, le=16, description="weight bits; 16 leaves them alone")] = 8

    def compress(self, model: LoadedModel, data: Calibration, ctx: Context) -> LoadedModel:
        """Return the compressed model. The clone shares tensors: replace them, never write into them."""
        model = model.clone()
        for layer in model.adapter.targets(model.module).values():
            set_weight(layer, rounded(layer.get_parameter("weight").detach(), self.bits))
        # "real" once the module's tensors hold the compressed form, for example as packed integers.
        model.storage = "simulated"
        model.accounted_bits = float(self.bits)
        return model


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return ``weight`` [out, ...] on ``2^bits - 1`` levels around zero, one scale per output channel."""
    if bits == 16:
        return weight
    top = 2 ** (bits - 1) - 1
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
    return ((rows / scale).round() * scale).view_as(weight)
''',
    ),
    "optimizer": Kind(
        summary="Plain gradient descent.",
        applies_to=(),
        properties=("deterministic", "no-input-mutation", "channel-permutation-equivariant", "dtype-stable"),
        needs=(),
        task="planted-quadratic",
        metric="log10-gap",
        imports="""from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import torch
from methodbench.params import hyperparameters
from pydantic import Field
""",
        body='''@hyperparameters
class $cls:
    """Steps along the negative gradient."""

    lr: Annotated[float, Field(gt=0, description="learning rate")] = 0.1

    def build(self, param_groups: Iterable[dict[str, Any]], ctx: Context) -> torch.optim.Optimizer:
        """Return the optimizer; groups carry "params" and a "role" (matrix, vector, embedding, head)."""
        return Rule(param_groups, {"lr": self.lr})


class Rule(torch.optim.Optimizer):
    """The rule as a torch optimizer; keep what it remembers in ``self.state[p]``, so that it is saved."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; return the closure's loss, computed before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss
''',
    ),
    "explainer": Kind(
        summary="Shows the magnitude of the class score's gradient by each pixel.",
        applies_to=("cnn", "vit"),
        properties=("deterministic", "no-input-mutation", "batch-split-invariant", "scale-equivariant"),
        needs=(),
        task="planted-evidence",
        model="planted-cnn",
        metric="evidence-mass",
        imports="""from typing import Annotated

import torch
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
""",
        body='''@hyperparameters
class $cls:
    """Gradient magnitude, summed over channels and smoothed."""

    width: Annotated[int, Field(ge=1, le=31, multiple_of=2, description="pixels of smoothing, even")] = 4

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] for images ``x`` [B, C, H, W] and classes ``target`` [B]."""
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            score = model.module(x).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, x)
        maps = gradient.abs().sum(1, keepdim=True)
        maps = F.avg_pool2d(maps, self.width + 1, stride=1, padding=self.width // 2)[:, 0]
        return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
''',
    ),
    "training": Kind(
        summary="Adds a penalty on the weights' magnitude to the loss.",
        applies_to=(),
        properties=("deterministic", "no-input-mutation"),
        needs=(),
        task="planted-teacher",
        metric="accuracy",
        imports="""from typing import TYPE_CHECKING, Annotated

from methodbench.params import hyperparameters
from pydantic import Field
from torch import Tensor, nn
""",
        body='''@hyperparameters
class $cls:
    """Hooks of one training loop, in the order in which they are called."""

    penalty: Annotated[float, Field(ge=0, description="factor of the mean absolute weight")] = 0.0

    def wrap(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return the module to train; replace layers here."""
        return model

    def loss(self, model: nn.Module, outputs: Tensor, targets: Tensor, task_loss: Tensor) -> Tensor:
        """Return the loss to differentiate, a scalar."""
        if not self.penalty:
            return task_loss
        weights = [p.abs().mean() for p in model.parameters() if p.ndim > 1]
        return task_loss + self.penalty * sum(weights, task_loss.new_zeros(()))

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Change gradients here, before the optimizer's step."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Change weights here, after the optimizer's step."""
''',
    ),
    "segmenter": Kind(
        summary="Marks the pixels whose colour speaks for the image's class.",
        applies_to=(),
        properties=("deterministic", "no-input-mutation"),
        needs=(),
        task="planted-masks",
        metric="iou",
        imports="""from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from methodbench.params import hyperparameters
from pydantic import Field
from torch import Tensor
""",
        body='''@hyperparameters
class $cls:
    """Learns a colour per class from its mean image, and marks what comes near to the strongest pixel."""

    share: Annotated[float, Field(gt=0, lt=1, description="share of the peak that is marked")] = 0.5

    def fit(self, weak_labels: Mapping[str, Any], ctx: Context) -> Callable[[Tensor], Tensor]:
        """Return a predictor from images [B, C, H, W] to masks [B, H, W]: 0, or k + 1 for class k.

        ``weak_labels`` holds "images" [N, C, H, W] and "labels" [N], the class of each image.
        """
        images, labels = weak_labels["images"], weak_labels["labels"]
        mean = images.mean((0, 2, 3))
        classes = range(int(labels.max()) + 1)
        colours = torch.stack([images[labels == k].mean((0, 2, 3)) - mean for k in classes])

        def predict(x: Tensor) -> Tensor:
            scores = torch.einsum("kc,bchw->bkhw", colours, x - mean[:, None, None])
            best = scores.mean((2, 3)).argmax(1)
            chosen = scores[torch.arange(len(x)), best]
            marked = chosen > self.share * chosen.amax((1, 2), keepdim=True)
            return marked * (best + 1)[:, None, None]

        return predict
''',
    ),
    "probe": Kind(
        summary="Compares the largest input of a layer with the mean one.",
        applies_to=("causal-lm", "vit"),
        properties=("deterministic", "no-input-mutation"),
        needs=("calibration",),
        task="planted-contrast",
        model="planted-decoder",
        metric="contrast",
        imports="""from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from methodbench.params import hyperparameters
from methodbench.torchkit.model import Calibration, LoadedModel
from pydantic import Field
""",
        body='''@hyperparameters
class $cls:
    """Ratio of the largest to the mean magnitude of what enters the layers of the blocks."""

    quantile: Annotated[float, Field(gt=0, le=1, description="of the layers: 1 is the worst")] = 1.0

    def measure(self, model: LoadedModel, data: Calibration, ctx: Context) -> Mapping[str, float]:
        """Return named numbers (scalars or arrays)."""
        ratios: list[float] = []

        def note(_module: object, args: tuple[torch.Tensor, ...]) -> None:
            size = args[0].detach().abs()
            ratios.append(float(size.amax() / size.mean()))

        layers = model.adapter.targets(model.module).values()
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            with torch.no_grad():
                model.module(data.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {"largest-over-mean": float(torch.tensor(ratios).quantile(self.quantile))}
''',
    ),
}

_PYPROJECT = Template("""[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "methodbench-$name"
version = "0.1.0"
description = "$summary"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["methodbench", "torch>=2.6"]

[project.optional-dependencies]
test = ["methodbench[testing]", "timm>=1.0.9", "transformers>=4.57"]

[project.entry-points.methodbench]
$name = "$package.plugin"

[tool.hatch.build.targets.wheel]
packages = ["$package"]
""")

_PLUGIN = Template('''"""What this package adds to methodbench. Every command loads it: import nothing heavy."""

from __future__ import annotations

from methodbench import hookimpl
from methodbench.entries import Method$imports

$version_attribute = $version


@hookimpl
def methodbench_methods() -> list[Method]:
    return [
        Method(
            name="$name",
            kind="$kind",
            family="$family",
            impl="$package.$module:$cls",
            summary="$summary",$applies_to$paper$needs
            claims="$name.toml",
            # "paper" once the paper's algorithm stands here; "authors-code" once its numbers agree as well.
            fidelity="baseline",
            properties=$properties,
        )
    ]
''')

_IMPLEMENTATION = Template('''"""$title

$summary

State the idea in three sentences here, then the equations in the symbols of the paper.
"""

from __future__ import annotations

$imports
$typed$body''')

_CLAIMS = Template("""# What the paper reports, and what of it can be tested here: `methodbench claims $name`.
method = "$name"
nothing_reported = "the paper's numbers have not been read yet"
nothing_claimed = "no claim has been scaled down yet"

# [[reported]]
# source = "$source"
# table = "Table 1"
# measured_by = "the authors"
# task = "data and protocol, as the paper has them"
# metric = "$metric"
# values = [{ model = "as the paper calls it", setting = "", value = 0.0 }]

# [[claims]]
# id = "beats-the-baseline"
# text = "One sentence that the records can prove wrong."
# source = "Table 1"
# left = "$name"
# op = "$op"
# right = "$rival"
# tasks = ["$task"]
""")

_TEST = Template('''"""The contract of a $kind, and every property that the entry declares."""

from __future__ import annotations

from collections.abc import Callable

from methodbench.testing import contract


@contract("$name")
def test_contract(check: Callable[[], str]) -> None:
    check()
''')

_README = Template("""# methodbench-$name

$summary A $kind for [methodbench](https://pypi.org/project/methodbench/).

```sh
pip install -e '.[test]'
methodbench check $name
$run
methodbench site build
```

What to change, in this order:

1. `$package/$module.py`: the algorithm. Its fields are the hyperparameters, with the paper's defaults.
2. `$package/plugin.py`: summary, paper, presets, declared properties.
3. `$package/claims/$name.toml`: the paper's numbers, and what of them can be tested.
4. `pytest`: the contract suite again, in your own continuous integration.
""")


@dataclass(frozen=True, slots=True)
class Scaffold:
    """A package that was written."""

    folder: Path
    files: tuple[Path, ...]
    family: str
    commands: tuple[str, ...]
    """What to do next, one command each."""


def plan_files(name: str, kind: str, family: str, paper: str, rival: str) -> dict[str, str]:
    """Return the text of every file of the package, by path below its folder."""
    parts = KINDS[kind]
    module = name.replace("-", "_")
    package = f"methodbench_{module}"
    models = f" --model {parts.model}" if parts.model else ""
    methods = " ".join(f"--method {one}" for one in dict.fromkeys(filter(None, (rival, name))))
    guarded = "if TYPE_CHECKING:\n    from methodbench.context import Context\n\n\n"
    typed = guarded if "TYPE_CHECKING" in parts.imports else "\n"
    values = {
        "name": name,
        "kind": kind,
        "family": family,
        "module": module,
        "package": package,
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "summary": parts.summary,
        "title": f"{name} (arXiv {paper})." if paper else f"{name}.",
        "imports": "",
        "typed": typed,
        "version_attribute": VERSION_ATTRIBUTE,
        "version": str(HOOK_VERSION),
        "applies_to": _line("applies_to", parts.applies_to),
        "needs": _line("needs", parts.needs),
        "properties": "(\n" + "".join(f'{" " * 16}"{word}",\n' for word in parts.properties) + " " * 12 + ")",
        "paper": "",
        "source": f"arXiv {paper}" if paper else "the paper",
        "task": parts.task,
        "metric": parts.metric,
        "op": "<" if parts.metric in ("relative-error", "log10-gap") else ">",
        "rival": rival or "another method",
        "run": f"methodbench run {methods}{models} --task {parts.task}",
    }
    entry = dict(values)
    if paper:
        entry["imports"] = ", Paper"
        entry["paper"] = (
            f'\n            paper=Paper(title="arXiv {paper}", arxiv="{paper}", year=20{paper[:2]}),'
        )
    body = Template(parts.body).substitute(cls=values["cls"])
    return {
        "pyproject.toml": _PYPROJECT.substitute(values),
        "README.md": _README.substitute(values),
        f"{package}/__init__.py": f'"""methodbench plugin: {name}."""\n',
        f"{package}/plugin.py": _PLUGIN.substitute(entry),
        f"{package}/{module}.py": _IMPLEMENTATION.substitute(
            {**values, "imports": parts.imports, "body": body}
        ),
        f"{package}/claims/{name}.toml": _CLAIMS.substitute(values),
        "tests/test_contract.py": _TEST.substitute(values),
    }


def _tuple(items: tuple[str, ...]) -> str:
    inner = ", ".join(f'"{item}"' for item in items)
    return f"({inner},)" if len(items) == 1 else f"({inner})"


def _line(name: str, items: tuple[str, ...]) -> str:
    return f"\n            {name}={_tuple(items)}," if items else ""


def write_package(
    name: str, kind: str, catalog: Catalog, *, paper: str = "", family: str = "", parent: Path | None = None
) -> Scaffold:
    """Write the package ``methodbench-NAME`` into ``parent`` (the current folder by default).

    Raises:
        MethodbenchError: the name cannot be a package's or is taken, the paper is no arXiv number, the folder is there.
    """
    if kind not in KIND_NAMES:
        raise MethodbenchError(f"unknown kind {kind!r}", f"Kinds: {', '.join(KIND_NAMES)}")
    if not _NAME.fullmatch(name):
        raise MethodbenchError(
            f"{name!r} cannot be a method's name", "Lower case letters, digits and single hyphens."
        )
    if name in catalog.methods or name in catalog.models or name in catalog.tasks:
        raise MethodbenchError(f"the name {name!r} is taken by an installed plugin", "Choose another one.")
    if paper and not _ARXIV.fullmatch(paper):
        raise MethodbenchError(f"{paper!r} is no arXiv number", "It reads like 2306.00978.")
    folder = (parent or Path()) / f"methodbench-{name}"
    same_kind = [method for method in catalog.methods.values() if method.kind == kind]
    families = Counter(method.family for method in same_kind if not method.baseline)
    board = family or next((name for name, _ in families.most_common(1)), kind)
    rival = next((method.name for method in same_kind if method.baseline), "")
    rival = rival or next((method.name for method in same_kind if method.fidelity == "reimplementation"), "")
    files = plan_files(name, kind, board, paper, rival)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise MethodbenchError(
            f"{folder} exists: nothing was written", "Move it, or choose another name."
        ) from None
    except OSError as error:
        raise MethodbenchError(f"cannot make {folder}: {error.strerror}") from error
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # "x" refuses what is there, whatever appeared since the folder was made.
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    run = next(line for line in files["README.md"].splitlines() if line.startswith("methodbench run"))
    inside = folder.resolve().is_relative_to(Path.cwd())
    where = f"./{os.path.relpath(folder)}" if inside else str(folder.resolve())
    commands = (f"pip install -e '{where}[test]'", f"methodbench check {name}", run, "methodbench site build")
    return Scaffold(folder, tuple(folder / path for path in files), board, commands)
