"""CAM.

Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016 (1512.04150). In a network that
ends in global average pooling and one Linear layer, a class score is a sum over positions. Before the pooling,
what each position adds to it is a map: the channels weighted by the class's row of the Linear::

    y_k = sum_c w_kc mean_ij A_cij + b_k          L = ReLU(sum_c w_kc A_c)

Other networks have no such map; whether a network is one of these is measured, not read off its name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methodbench.errors import NotApplicableError
from methodbench.params import hyperparameters
from methodbench.torchkit.model import LoadedModel
from methodbench_vision.cam import check_images, check_targets, layer_names, recorded, saliency

#: Largest difference of the logits that rounding explains, as a share of the largest logit.
_ROUNDING = 1e-3


@hyperparameters
class CAM:
    """Channels weighted by the classifier's weights."""

    def explain(self, model: LoadedModel, x: Tensor, target: Tensor) -> Tensor:
        """Return maps [B, H, W] in [0, 1] of normalized images ``x`` [B, C, H, W] for classes [B].

        Raises:
            NotApplicableError: the network does not end in global average pooling and one Linear.
        """
        check_images(model, x)
        head = model.adapter.head(model.module)
        if not isinstance(head, nn.Linear):
            raise NotApplicableError(
                f"{model.name} does not end in one Linear layer, whose weights CAM needs",
                "Grad-CAM is the same map where CAM applies, and exists elsewhere too.",
            )
        (name,) = layer_names(model, x)
        with recorded(model.module, [name], gradients=False) as held:
            logits = model.module(x)
        check_targets(logits, target, len(x))
        maps = held[name]
        weight = head.weight.detach()
        if maps.ndim != 4 or maps.shape[1] != weight.shape[1] or not _is_sum(maps, head, logits):
            raise NotApplicableError(
                f"between layer {name!r} and the logits of {model.name} lies more than a global mean and a "
                "Linear",
                "Grad-CAM is the same map where CAM applies, and exists elsewhere too.",
            )
        raw = torch.einsum("bc,bchw->bhw", weight[target].float(), maps.float())
        return saliency([raw], (x.shape[2], x.shape[3]))


def _is_sum(maps: Tensor, head: nn.Linear, logits: Tensor) -> bool:
    """Whether the logits [B, K] are the Linear of the mean over positions of ``maps`` [B, C, h, w]."""
    with torch.inference_mode():
        expected = head(maps.mean((2, 3)))
        return float((logits - expected).abs().max()) <= _ROUNDING * float(expected.abs().max())
