"""AdaQuant on convolutional networks: layers, batch norms that are put back, biases, and the program's budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methodbench.context import Context
from methodbench.errors import DivergedError, NotApplicableError, ParameterError
from methodbench.params import build
from methodbench.testing import planted
from methodbench.torchkit.adapters import detect
from methodbench.torchkit.batchnorm import batchnorms_behind, fold_batchnorms
from methodbench.torchkit.model import Calibration, LoadedModel, set_weight
from methodbench_quant.llm.adaquant import AdaQuant
from methodbench_quant.vit.adaquant import para_normalize, relus_behind
from methodbench_quant.vit.minmax import MinMaxViT
from methodbench_quant.vit.sites import Draft


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    """A stem and two blocks whose batch norms hold the true statistics of their data."""

    def __init__(self, width: int = 12, classes: int = 6) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.layer1, self.layer2 = nn.Sequential(Block(width)), nn.Sequential(Block(width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x)))))
        return self.linear(self.pool(x).flatten(1))


def pictures(count: int, seed: int) -> Tensor:
    draw = planted.generator(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=draw)
    return nn.functional.interpolate(coarse, scale_factor=4) + 0.3 * torch.randn(
        count, 3, 16, 16, generator=draw
    )


@pytest.fixture(scope="module")
def network() -> LoadedModel:
    torch.manual_seed(0)
    module = Network()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            part.momentum = None
    module.train()
    with torch.no_grad():
        for seed in range(100, 108):
            module(pictures(64, seed))
    module.eval().requires_grad_(False)
    return LoadedModel("network", "cnn", module, detect(module))


@pytest.fixture(scope="module")
def data() -> Calibration:
    return Calibration(pictures(96, 1), "96 pictures")


def compressed(model: LoadedModel, data: Calibration, **hyper: Any) -> LoadedModel:
    chosen: dict[str, Any] = {"iterations": 100, "lr_qin": 1e-3, **hyper}
    return build(AdaQuant, chosen, "adaquant").compress(model, data, Context(seed=0))


def divergence(model: LoadedModel, dense: LoadedModel, images: Tensor) -> float:
    wanted = planted.output(dense.module, images).log_softmax(-1)
    given = planted.output(model.module, images).log_softmax(-1)
    return float(nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean"))


def test_fitting_lowers_every_error_and_holds_on_other_pictures(
    network: LoadedModel, data: Calibration
) -> None:
    before = {key: value.clone() for key, value in network.module.state_dict().items()}
    fitted, rounded = compressed(network, data), compressed(network, data, iterations=0)
    assert fitted.facts["mse_after"] < 0.9 * fitted.facts["mse_before"]
    assert rounded.facts["mse_after"] == rounded.facts["mse_before"] == fitted.facts["mse_before"]
    other = pictures(64, 7)
    assert divergence(fitted, network, other) < 0.8 * divergence(rounded, network, other)
    assert fitted.storage == "real"
    assert fitted.facts["activations"] == "4 bits, static, simulated"
    assert all(torch.equal(value, before[key]) for key, value in network.module.state_dict().items())


def test_inputs_of_quantized_layers_can_be_learned_from(network: LoadedModel, data: Calibration) -> None:
    one, other = compressed(network, data, sequential=True), compressed(network, data)
    assert divergence(one, network, data.inputs) != divergence(other, network, data.inputs)
    rounded = compressed(network, data, iterations=0)
    assert divergence(one, network, data.inputs) < 0.8 * divergence(rounded, network, data.inputs)


def test_errors_are_compared_behind_the_relus_that_read_a_layer(
    network: LoadedModel, data: Calibration
) -> None:
    folded = fold_batchnorms(network, data.inputs[:1])
    layers = [name for name, part in folded.module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    # The second convolution of a block goes into a sum first.
    assert relus_behind(folded.module, layers, data.inputs[:1]) == {
        "conv1",
        "layer1.0.conv1",
        "layer2.0.conv1",
    }


def quantized_draft(network: LoadedModel, images: Tensor, bits: int) -> Draft:
    method = MinMaxViT(w_bits=bits)
    draft = Draft(fold_batchnorms(network, images[:1]), method._quantize_weight, None, attention=False)
    draft.calibrate(images)
    return draft


def test_a_norm_that_is_put_back_is_nearly_the_identity_on_float_statistics(network: LoadedModel) -> None:
    # The norms hold the means over the pictures they were measured on, and other pictures of the kind differ a little.
    images = torch.cat([pictures(64, seed) for seed in range(100, 108)])
    draft = quantized_draft(network, images, 8)
    before = planted.output(draft.model.module, images)
    para_normalize(draft, batchnorms_behind(network, images[:1]), images, passes=1)
    after = planted.output(draft.model.module, images)
    assert float(planted.relative_errors(after, before).mean()) < 0.01


def test_measured_statistics_bring_back_the_scale_that_a_layer_lost(network: LoadedModel) -> None:
    images = torch.cat([pictures(64, seed) for seed in range(100, 104)])
    draft = quantized_draft(network, images, 8)
    exact = planted.output(network.module, images)
    hurt = draft.weights["layer1.0.conv1"]
    draft.put("layer1.0.conv1", type(hurt)(hurt.codes, hurt.scale * 0.5, hurt.zero, hurt.low, hurt.bits))
    broken = float(planted.relative_errors(planted.output(draft.model.module, images), exact).mean())
    para_normalize(draft, batchnorms_behind(network, images[:1]), images, passes=20)
    mended = float(planted.relative_errors(planted.output(draft.model.module, images), exact).mean())
    assert mended < 0.2 * broken


def test_tuned_biases_follow_the_dense_network(network: LoadedModel, data: Calibration) -> None:
    coarse = {"bits": 3, "iterations": 0}
    plain = compressed(network, data, **coarse)
    tuned = compressed(network, data, **coarse, bias_steps=40, bias_lr=0.5)
    other = pictures(64, 9)
    assert divergence(tuned, network, other) < 0.9 * divergence(plain, network, other)
    last = [model.module.get_submodule("linear").bias for model in (plain, tuned)]
    assert torch.equal(last[0], last[1])


def test_the_program_keeps_the_size_and_spends_more_where_it_hurts(
    network: LoadedModel, data: Calibration
) -> None:
    found = compressed(network, data, size=0.14, precisions=[8, 4, 2], iterations=0, a_bits=16)
    assert found.facts["size"] <= 0.14
    assert sum(found.facts["layers_by_bits"].values()) == 4
    worse = compressed(network, data, bits=2, iterations=0, a_bits=16)
    assert divergence(found, network, data.inputs) < divergence(worse, network, data.inputs)
    with pytest.raises(ParameterError, match="Set size to"):
        compressed(network, data, size=0.05, precisions=[8, 4, 2])


def test_a_network_without_batch_norms_is_left_without(data: Calibration) -> None:
    torch.manual_seed(1)
    module = Network()
    for holder in [module, *(part for part in module.modules() if isinstance(part, Block))]:
        for name in [name for name, part in holder.named_children() if isinstance(part, nn.BatchNorm2d)]:
            setattr(holder, name, nn.Identity())
    model = LoadedModel("plain", "cnn", module.eval().requires_grad_(False), detect(module))
    one = compressed(model, data, iterations=2)
    two = compressed(model, data, iterations=2, bn_passes=1)
    assert torch.equal(planted.output(one.module, data.inputs), planted.output(two.module, data.inputs))


def test_hostile_input_is_refused(network: LoadedModel, data: Calibration) -> None:
    with pytest.raises(NotApplicableError, match="calibration images"):
        compressed(network, Calibration.none())
    with pytest.raises(DivergedError, match="not finite"):
        compressed(network, Calibration(data.inputs * torch.nan))
    damaged = network.clone()
    conv = damaged.module.get_submodule("layer1.0.conv1")
    set_weight(conv, torch.full_like(conv.get_parameter("weight"), torch.nan))
    with pytest.raises((DivergedError, NotApplicableError)):
        compressed(damaged, data)
    one = compressed(network, Calibration(data.inputs[:1]), bn_passes=1, bias_steps=1)
    assert torch.isfinite(planted.output(one.module, data.inputs)).all()
    constant = compressed(network, Calibration(torch.ones_like(data.inputs[:8])))
    assert torch.isfinite(planted.output(constant.module, data.inputs)).all()
