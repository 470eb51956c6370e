"""Augmentation of whole clips on the device that trains: the same crop, flip and colours for every frame of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How training clips vary.

    Attributes:
        crop_scale: Least share of the picture's area that a crop keeps.
        crop_ratio: A crop's aspect ratio varies by up to this factor either way.
        flip: Whether half of the clips are mirrored.
        colour: Strength of brightness, contrast and saturation changes, 0 to 1.
        grey: Share of clips that lose their colour.
        noise: Largest standard deviation of added noise, in grey levels (0 to 255).
        pan: Largest displacement of a slow camera pan over a clip, as a share of the picture; a third of the clips.
        speed: A clip plays up to this factor faster or slower.
        late_start: Share of the clips that start up to half their length late.
        mixup: Share of the batch's clips that are blended with another, labels likewise; the weight is uniform.
    """

    crop_scale: float = 0.5
    crop_ratio: float = 1.2
    flip: bool = True
    colour: float = 0.4
    grey: float = 0.1
    noise: float = 6.0
    pan: float = 0.08
    speed: float = 1.25
    late_start: float = 0.3
    mixup: float = 0.0


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def random_indices(
    lengths: Tensor, stride: float, steps: int, augmentation: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Frame indices (B, T) and mask (B, T) of clips that start and play at random."""
    count = len(lengths)
    speed = torch.exp(_uniform(generator, count, -1, 1) * torch.tensor(augmentation.speed).log()) * stride
    start = torch.rand(count, generator=generator) * stride
    late = torch.rand(count, generator=generator) < augmentation.late_start
    start = torch.where(late, torch.rand(count, generator=generator) * lengths / 2, start)
    wanted = (start[:, None] + torch.arange(steps)[None, :] * speed[:, None]).long()
    return wanted.minimum(lengths[:, None] - 1), wanted < lengths[:, None]


def centre_boxes(count: int, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """The largest centred box of the target's shape, (B, 1, 4): centre x and y, half width and height, in -1 to 1."""
    ratio = (target[1] / target[0]) / (source[1] / source[0])
    return torch.tensor([0.0, 0.0, min(ratio, 1.0), min(1 / ratio, 1.0)]).expand(count, 1, 4)


def random_boxes(
    count: int,
    steps: int,
    source: tuple[int, int],
    target: tuple[int, int],
    augmentation: Augmentation,
    generator: torch.Generator,
    *,
    still: Tensor,
) -> Tensor:
    """Crop boxes (B, T, 4) that drift slowly where the camera pans; clips marked `still` (B,) pan twice as often."""
    full = centre_boxes(count, source, target)[:, 0]
    area = _uniform(generator, count, augmentation.crop_scale, 1.0).sqrt()
    ratio = torch.exp(_uniform(generator, count, -0.5, 0.5) * torch.tensor(augmentation.crop_ratio).log())
    half_width = (full[:, 2] * area * ratio).clamp(max=1)
    half_height = (full[:, 3] * area / ratio).clamp(max=1)
    x = _uniform(generator, count, -1, 1) * (1 - half_width)
    y = _uniform(generator, count, -1, 1) * (1 - half_height)
    pans = torch.rand(count, generator=generator) < torch.where(still, 0.66, 0.33)
    drift = torch.randn(count, 2, generator=generator) * augmentation.pan * pans[:, None]
    zoom = 1 + torch.randn(count, generator=generator) * augmentation.pan / 2 * pans
    time = torch.linspace(-0.5, 0.5, steps)[None, :]
    scale = zoom[:, None] ** time
    return torch.stack(
        [
            x[:, None] + drift[:, :1] * time,
            y[:, None] + drift[:, 1:] * time,
            half_width[:, None] * scale,
            half_height[:, None] * scale,
        ],
        -1,
    )


def crop_and_resize(frames: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """Cut boxes out of clips and bring them to one size, bilinearly.

    Args:
        frames: (B, T, H, W, C), uint8.
        boxes: (B, T or 1, 4).
        size: (height, width).
        flip: bool (B,), clips to mirror.

    Returns:
        Float (B, T, height, width, C), 0 to 255.
    """
    batch, steps = frames.shape[:2]
    boxes = boxes.to(frames.device).expand(batch, steps, 4).flatten(0, 1)
    sign = torch.ones(batch, device=frames.device)
    if flip is not None:
        sign[flip.to(frames.device)] = -1
    sign = sign.repeat_interleave(steps)
    theta = torch.zeros(batch * steps, 2, 3, device=frames.device)
    theta[:, 0, 0], theta[:, 0, 2] = boxes[:, 2] * sign, boxes[:, 0]
    theta[:, 1, 1], theta[:, 1, 2] = boxes[:, 3], boxes[:, 1]
    pictures = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, [batch * steps, pictures.shape[1], *size], align_corners=False)
    cut = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cut.permute(0, 2, 3, 1).unflatten(0, (batch, steps))


def vary_colours(clips: Tensor, augmentation: Augmentation, generator: torch.Generator, *, still: Tensor) -> Tensor:
    """Brightness, contrast, saturation and noise of (B, T, H, W, C) clips in 0 to 255; `still` ones flicker, too."""
    count, device = len(clips), clips.device

    def factor() -> Tensor:
        strength = augmentation.colour
        return _uniform(generator, count, 1 - strength, 1 + strength).to(device).view(-1, 1, 1, 1, 1)

    grey = clips.mean(-1, keepdim=True)
    saturation = torch.where(
        (torch.rand(count, generator=generator) < augmentation.grey).to(device).view(-1, 1, 1, 1, 1),
        0.0,
        factor(),
    )
    clips = grey + (clips - grey) * saturation
    level = clips.mean((1, 2, 3, 4), keepdim=True)
    clips = (level + (clips - level) * factor()) * factor()
    steps = torch.arange(clips.shape[1])[None, :]
    drift = (
        torch.randn(count, 1, generator=generator)
        * 0.15
        * (torch.rand(count, 1, generator=generator) < 0.5)
        * still[:, None]
    )
    ramp = 1 + drift * torch.sigmoid((steps - torch.rand(count, 1, generator=generator) * clips.shape[1]) * 2)
    clips = clips * ramp.to(device).view(count, -1, 1, 1, 1)
    sigma = (torch.rand(count, generator=generator) ** 2 * augmentation.noise).to(device).view(-1, 1, 1, 1, 1)
    return (clips + torch.randn_like(clips) * sigma).clamp(0, 255)
