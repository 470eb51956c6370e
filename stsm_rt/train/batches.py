"""What the loop trains on: clips with targets, as any data set gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor


@dataclass(eq=False)
class Batch:
    """Clips of one forward and backward pass.

    Attributes:
        frames: uint8 or float (B, T, H, W, 3) BGR, 0 to 255.
        targets: Float (B, K), distributions.
        weights: Float (B, T), of the steps of each clip; they sum to 1, or to 0 for a clip that does not count.
        places: int64 (B,), of its clips in the global batch.
    """

    frames: Tensor
    targets: Tensor
    weights: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """This process's part of one optimiser step.

    Attributes:
        parts: One per accumulation step.
        size: Clips drawn for the global batch.
        clips: Of them, those that count: the others could not be read.
    """

    parts: Sequence[Batch]
    size: int
    clips: int


class TrainingData(Protocol):
    """A data set as the loop uses it. Order and augmentation do not depend on the number of processes."""

    classes: tuple[str, ...]
    clips: int

    def steps(self, epoch: int, fabric: Fabric, accumulate: int) -> Iterator[Step]:
        """The optimiser steps of an epoch, from 0."""

    def hits(self, logits_of: Callable[[Tensor], Tensor], chosen: Tensor, smoothing: int) -> tuple[int, int]:
        """Clips that are recognized, and clips that could be read, of those chosen from the part held out."""

    def state(self) -> dict[str, Any]:
        """What a run needs to go on, besides the epoch."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""


def decide(logits: Tensor, last: int, classes: int, smoothing: int, consensus: bool) -> int:
    """The class of a clip.

    Args:
        logits: (T, K).
        last: Index of the clip's last step.
        classes: Leading logits that count; a background is none.
        smoothing: Last steps whose probabilities are averaged.
        consensus: Instead the mean of all logits decides, as in TSM.
    """
    if consensus:
        return int(logits[: last + 1, :classes].mean(0).argmax())
    probabilities = logits.softmax(-1)[max(0, last + 1 - smoothing) : last + 1, :classes]
    return int(probabilities.mean(0).argmax())


def step_weights(valid: Tensor) -> Tensor:
    """Weights (B, T) that rise towards the end of a clip, over its valid steps (B, T); they sum to 1."""
    weights = valid.float() * torch.arange(1, valid.shape[1] + 1)
    return weights / weights.sum(1, keepdim=True)
