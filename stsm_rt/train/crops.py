"""Crops of whole clips: the same rectangle of every frame, as TSM cuts them for training and for its protocols.

Pictures are resized as Pillow and torchvision do it, bilinearly and averaging where they shrink, which the published
weights were trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# uint8 clip (T, H, W, 3) and a random generator -> uint8 (crops, T, height, width, 3)
Crop = Callable[[Tensor, np.random.Generator], Tensor]

# Where a training crop may lie, in quarters of the free way from left to right and from top to bottom: corners, centre,
# middles of the sides, and the centres of the quarters (TSM's 13 fixed positions).
_POSITIONS = (
    *((0, 0), (4, 0), (0, 4), (4, 4), (2, 2)),
    *((0, 2), (4, 2), (2, 4), (2, 0)),
    *((1, 1), (3, 1), (1, 3), (3, 3)),
)
# Sides are drawn from the scales independently, but at most one step apart.
_DISTORTION = 1
# A side that is nearly the network's is taken as it is, so that nothing is resized.
_NEARLY = 3


@dataclass(frozen=True)
class MultiScaleCrop:
    """A random crop for training (TSM, after TSN): a scale for each side, one of 13 positions, and half are mirrored.

    Attributes:
        size: Height and width of the result, pixels.
        scales: Of the sides, relative to the largest rectangle of the result's shape that the picture holds.
        flip: Whether half of the clips are mirrored; not where left and right tell the classes apart, as in
            Something-Something and Jester.
    """

    size: tuple[int, int]
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: bool = True

    def rectangles(self, height: int, width: int) -> list[tuple[int, int]]:
        """The (height, width) that a crop of a picture of this size may have, pixels."""
        largest = min(height / self.size[0], width / self.size[1])

        def sides(wanted: int, most: int) -> list[int]:
            scaled = [int(largest * wanted * scale) for scale in self.scales]
            return [min(most, wanted if abs(side - wanted) < _NEARLY else max(1, side)) for side in scaled]

        heights, widths = sides(self.size[0], height), sides(self.size[1], width)
        return [(h, w) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= _DISTORTION]

    def __call__(self, frames: Tensor, random: np.random.Generator) -> Tensor:
        """uint8 (T, H, W, 3) -> (1, T, height, width, 3)."""
        rectangles = self.rectangles(frames.shape[1], frames.shape[2])
        height, width = rectangles[random.integers(len(rectangles))]
        x, y = _POSITIONS[random.integers(len(_POSITIONS))]
        top, left = y * ((frames.shape[1] - height) // 4), x * ((frames.shape[2] - width) // 4)
        cut = _resize(frames[:, top : top + height, left : left + width], self.size)
        return (cut.flip(2) if self.flip and random.random() < 0.5 else cut)[None]


@dataclass(frozen=True)
class CentreCrop:
    """The middle of the picture.

    Attributes:
        resize: What the picture's shorter side is brought to first, pixels; more where the crop would not fit.
        size: Height and width of the crop, pixels.
    """

    resize: int
    size: tuple[int, int]

    def __call__(self, frames: Tensor, random: np.random.Generator | None = None) -> Tensor:
        """uint8 (T, H, W, 3) -> (1, T, height, width, 3); nothing about it is random."""
        frames = _resize_shorter(frames, self.resize, self.size)
        height, width = self.size
        top, left = round((frames.shape[1] - height) / 2), round((frames.shape[2] - width) / 2)
        return frames[None, :, top : top + height, left : left + width].contiguous()


@dataclass(frozen=True)
class ThreeCrops:
    """Both ends and the middle of the picture's longer side, which together show all of it.

    Attributes:
        resize: What the picture's shorter side is brought to first, pixels; more where the crop would not fit.
        size: Height and width of a crop, pixels; TSM's full resolution is `resize` for both.
    """

    resize: int
    size: tuple[int, int]

    def __call__(self, frames: Tensor, random: np.random.Generator | None = None) -> Tensor:
        """uint8 (T, H, W, 3) -> (3, T, height, width, 3): left or top, right or bottom, middle; nothing is random."""
        frames = _resize_shorter(frames, self.resize, self.size)
        height, width = self.size
        down, right = (frames.shape[1] - height) // 4, (frames.shape[2] - width) // 4
        wide = frames.shape[2] - width >= frames.shape[1] - height
        corners = [(2 * down, k * right) if wide else (k * down, 2 * right) for k in (0, 4, 2)]
        return torch.stack([frames[:, y : y + height, x : x + width] for y, x in corners])


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (T, H, W, 3) -> (T, height, width, 3), as Pillow's bilinear filter does it."""
    if frames.shape[1:3] == size:
        return frames
    pictures = frames.permute(0, 3, 1, 2)
    return F.interpolate(pictures, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _resize_shorter(frames: Tensor, resize: int, size: tuple[int, int]) -> Tensor:
    height, width = frames.shape[1:3]
    shorter = min(height, width)
    wanted = max(resize, -(-size[0] * shorter // height), -(-size[1] * shorter // width))
    return _resize(frames, (wanted * height // shorter, wanted * width // shorter))
