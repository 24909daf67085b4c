"""Small networks of methods that learn from weak labels, trained from scratch in a minute."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four times convolution, batch norm and ReLU, of which the last is the tail; a map per class.

    Maps have a quarter of the picture's side. The score of a class is the mean of its map: a network that ends in
    global average pooling and one Linear, with the Linear before the pooling.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(stage(3, 24, stride=2), stage(24, 48), stage(48, 48, stride=2))
        self.tail = stage(48, 72)
        self.classify = nn.Conv2d(72, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the maps of classes [B, K, H / 4, W / 4]."""
        maps: Tensor = self.classify(self.tail(self.stem(x)))
        return maps


def stage(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
