"""A ResNet-18 with activation before convolution (arXiv 1603.05027), for images of 32 px: the encoder of VOLTA.

Written from the paper; the names of the modules are those in VOLTA's checkpoints. As there, no pooling after the
first convolution, and neither BatchNorm nor ReLU after the last block.
"""

from __future__ import annotations

from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, and a shortcut that starts after the first ReLU where sizes change."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        active = self.bn1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(self.bn2(self.conv1(active)).relu()) + shortcut


class PreActResNet(nn.Module):
    """Four stages of two blocks; images [B, 3, px, px] -> the average of the last stage, [B, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = self._stage(64, 64, stride=1)
        self.layer2 = self._stage(64, 128, stride=2)
        self.layer3 = self._stage(128, 256, stride=2)
        self.layer4 = self._stage(256, 512, stride=2)

    @staticmethod
    def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(inputs, outputs, stride=stride), PreActBlock(outputs, outputs, stride=1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised [B, 3, px, px] -> [B, 512]."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))  # [B, 512, px / 8, px / 8]
        return maps.mean(dim=(2, 3))
