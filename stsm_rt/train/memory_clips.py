"""A data set held in memory, augmented in batches on the device that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from stsm_rt.train.augment import centre_boxes, crop_and_resize, random_boxes, random_indices, vary_colours
from stsm_rt.train.batches import Batch, Step, decide, step_weights
from stsm_rt.train.datasets import ClipSet, sample_indices
from stsm_rt.train.processes import shares
from stsm_rt.train.recipe import Recipe

BACKGROUND = "nothing"


class MemoryClips:
    """A `ClipSet` to train on; see `batches.TrainingData`.

    Every process augments the whole global batch, with the same random numbers, and computes its part of it.

    Args:
        recipe: What to do.
        clips: The data.
        train: Indices of the clips to train on.
        device: Where batches are made.
    """

    def __init__(self, recipe: Recipe, clips: ClipSet, train: Tensor, device: torch.device) -> None:
        self.recipe, self.set, self.train_list, self.device = recipe, clips, train, device
        self.classes = (*clips.classes, BACKGROUND) if recipe.background else clips.classes
        self.clips = len(train)
        self.size = (recipe.height, recipe.width)
        self.source_size = (clips.frames.shape[2], clips.frames.shape[3])
        self.stride = clips.frame_rate / recipe.frame_rate
        self.generator = torch.Generator().manual_seed(recipe.seed)

    def steps(self, epoch: int, fabric: Fabric, accumulate: int) -> Iterator[Step]:
        """The optimiser steps of an epoch; the generator's state decides the order, not the epoch."""
        order = self.train_list[torch.randperm(self.clips, generator=self.generator)]
        batch = self.recipe.batch
        for step in range(max(1, self.clips // batch)):
            chosen = order[step * batch : (step + 1) * batch]
            places = shares(len(chosen), fabric, accumulate)
            frames, targets, weights = self.training_batch(chosen)
            numbers = torch.arange(len(chosen))
            parts = [Batch(frames[place], targets[place], weights[place], numbers[place]) for place in places]
            yield Step(parts, len(chosen), len(chosen))

    def hits(self, logits_of: Callable[[Tensor], Tensor], chosen: Tensor, smoothing: int) -> tuple[int, int]:
        """Clips of the set that are recognized at their last step, without the background, and how many there are."""
        found, consensus = 0, self.recipe.loss == "consensus"
        for part, frames, ends in self.plain_batches(chosen):
            logits = logits_of(frames).float().cpu()
            for values, end, label in zip(logits, ends.tolist(), self.set.labels[part].tolist(), strict=True):
                found += decide(values, end, len(self.set.classes), smoothing, consensus) == label
        return found, len(chosen)

    def state(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a generator's state."""
        self.generator.set_state(state["generator"])

    def _frames(self, chosen: Tensor, indices: Tensor) -> Tensor:
        home = self.set.frames.device
        frames = self.set.frames[chosen[:, None].to(home), indices.to(home)].to(self.device, non_blocking=True)
        return frames if frames.shape[-1] == 3 else frames.expand(*frames.shape[:-1], 3)

    def training_batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented clips.

        Args:
            chosen: Indices of clips (B,).

        Returns:
            Frames float (B, T, H, W, 3) in 0 to 255, target distributions (B, K), step weights (B, T) that sum to 1.
        """
        recipe, augmentation, generator = self.recipe, self.recipe.augmentation, self.generator
        count = len(chosen)
        indices, valid = random_indices(self.set.lengths[chosen], self.stride, recipe.steps, augmentation, generator)
        labels = self.set.labels[chosen].clone()
        still = torch.rand(count, generator=generator) < recipe.background
        if recipe.background:
            labels[still] = len(self.classes) - 1
            indices[still] = indices[still, :1]
            valid = valid | still[:, None]
        boxes = random_boxes(count, recipe.steps, self.source_size, self.size, augmentation, generator, still=still)
        flip = (torch.rand(count, generator=generator) < 0.5) if augmentation.flip else None
        frames = crop_and_resize(self._frames(chosen, indices), boxes, self.size, flip)
        frames = vary_colours(frames, augmentation, generator, still=still)
        targets = F.one_hot(labels, len(self.classes)).float()
        if augmentation.mixup:
            other = torch.randperm(count, generator=generator)
            share = torch.rand(count, generator=generator)
            share = torch.where(torch.rand(count, generator=generator) < augmentation.mixup, share, 1.0)
            targets = targets * share[:, None] + targets[other] * (1 - share[:, None])
            share = share.to(self.device).view(-1, 1, 1, 1, 1)
            frames = frames * share + frames[other.to(self.device)] * (1 - share)
        return frames, targets.to(self.device), step_weights(valid).to(self.device)

    def plain_batches(self, chosen: Tensor, batch: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Whole clips as a stream sees them: (indices, frames (B, T, H, W, 3), index of the last step (B,))."""
        steps = math.ceil(self.set.frames.shape[1] / self.stride)
        boxes = centre_boxes(1, self.source_size, self.size)
        for part in chosen.split(batch) if len(chosen) else ():
            indices, valid = sample_indices(self.set.lengths[part], self.stride, steps)
            frames = crop_and_resize(self._frames(part, indices), boxes.expand(len(part), 1, 4), self.size)
            yield part, frames, valid.sum(1) - 1
