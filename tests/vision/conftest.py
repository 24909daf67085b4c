"""Small trained models and real files for the tests of the vision plugin."""

from __future__ import annotations

from pathlib import Path

import pytest

from methodbench.context import Context
from methodbench.errors import SourceError
from methodbench.sources import fetch
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.models.entries import MODELS


@pytest.fixture
def ctx() -> Context:
    return Context()


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-vit after three epochs: quick to make, and right far more often than by chance."""
    from methodbench_vision.models.digits_vit import DigitsViT

    folder = tmp_path_factory.mktemp("digits-vit")
    DigitsViT(epochs=3, min_accuracy=0.0).prepare(None, folder, Context())
    return folder


@pytest.fixture
def digits_model(digits_folder: Path, ctx: Context) -> LoadedModel:
    from methodbench_vision.models.digits_vit import DigitsViT

    return DigitsViT().load(digits_folder, ctx)


@pytest.fixture(scope="session")
def shapes_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The network of the procedural pictures, trained as its recipe says: a minute."""
    from methodbench_vision.models.shapes_cnn import ShapesCNN

    folder = tmp_path_factory.mktemp("shapes-cnn")
    ShapesCNN().prepare(None, folder, Context())
    return ShapesCNN().load(folder, Context())


@pytest.fixture
def real_file(request: pytest.FixtureRequest) -> Path:
    """The weights file of the model named by indirect parametrization; skips where it is absent."""
    (entry,) = (model for model in MODELS if model.name == request.param)
    try:
        path = fetch(entry.source, sha256=entry.sha256, offline=True).path
    except SourceError as error:
        pytest.skip(f"{entry.name}: {error.message}")
    assert path is not None
    return path
