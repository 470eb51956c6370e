"""A set of videos that are decoded while training, by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

from stsm_rt.errors import UserError
from stsm_rt.train.annotations import VideoList
from stsm_rt.train.batches import Batch, Step, decide, step_weights
from stsm_rt.train.crops import CentreCrop, MultiScaleCrop
from stsm_rt.train.processes import shares, together, total
from stsm_rt.train.recipe import Recipe
from stsm_rt.train.video_clips import Sampling, VideoBatch, VideoClips, collate


class VideoSet:
    """Videos to train on and to validate with; see `batches.TrainingData`.

    The order of an epoch and the clip that is cut out of a video depend on the recipe's seed, the epoch and the video's
    number alone.

    Args:
        recipe: With a table ``[video]``.
        train: Videos to train on.
        held_out: Videos to validate with, without augmentation.
        workers: Processes that decode, for each process that trains; 0: none of their own.
        unreadable_log: File to list unreadable videos in.

    Raises:
        UserError: The recipe has no table ``[video]``.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: VideoList,
        held_out: VideoList | None = None,
        *,
        workers: int = 0,
        unreadable_log: Path | None = None,
    ) -> None:
        video = recipe.video
        if video is None:
            raise UserError(f"recipe {recipe.name} has no table [video], which {recipe.dataset} needs; add one")
        self.recipe, self.workers = recipe, workers
        self.classes, self.clips = train.classes, len(train.records)
        try:
            sampling = Sampling(
                segments=recipe.steps,
                dense_span=video.dense_span if video.sampling == "dense" else None,
                frame_rate=recipe.frame_rate if video.sampling == "stream" else None,
            )
        except ValueError as error:
            raise UserError(f"recipe {recipe.name} [video]: {error}") from error
        if held_out is not None and held_out.classes != train.classes:
            raise UserError(
                f"the lists to train on and to validate with name {len(train.classes)} and {len(held_out.classes)} "
                "classes, or others; give lists of the same classes"
            )
        size = (recipe.height, recipe.width)

        def clips(videos: VideoList, crop: MultiScaleCrop | CentreCrop, training: bool) -> VideoClips:
            return VideoClips(
                videos,
                sampling,
                crop,
                training=training,
                seed=recipe.seed,
                unreadable=video.unreadable,
                unreadable_log=unreadable_log,
            )

        self.train = clips(train, MultiScaleCrop(size, video.crop_scales, video.flip), True)
        self.held_out = clips(held_out, CentreCrop(video.short_side, size), False) if held_out else None

    def steps(self, epoch: int, fabric: Fabric, accumulate: int) -> Iterator[Step]:
        """The optimiser steps of an epoch.

        Unreadable videos are left out of their batch. Where nothing of a part of a batch is left, a black clip without
        weight keeps the processes in step.

        Raises:
            UserError: More videos than the recipe allows are unreadable, in any process.
        """
        self.train.set_epoch(epoch)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(self.clips, generator=generator)
        size = min(self.recipe.batch, self.clips)
        places = shares(size, fabric, accumulate)
        starts = range(0, max(1, self.clips // size) * size, size)
        lists = [order[start : start + size][place].tolist() for start in starts for place in places]
        loader = iter(self._loader(self.train, lists))
        for start in starts:
            parts, read = [], 0
            with together(fabric):
                for place in places:
                    batch = _read(loader, self.train)
                    read += len(batch.labels) if batch else 0
                    parts.append(self._batch(batch, order[start : start + size], place))
            yield Step(parts, size, int(total(fabric, torch.tensor(float(read)))))
        self._check_together(fabric)

    def hits(self, logits_of: Callable[[Tensor], Tensor], chosen: Tensor, smoothing: int) -> tuple[int, int]:
        """Of the videos held out, clips that are recognized and clips that could be read.

        Raises:
            UserError: More videos than the recipe allows are unreadable.
        """
        assert self.held_out is not None
        lists = [part.tolist() for part in chosen.split(16)] if len(chosen) else []
        loader = iter(self._loader(self.held_out, lists))
        found, read, consensus = 0, 0, self.recipe.loss == "consensus"
        for _ in lists:
            batch = _read(loader, self.held_out)
            if batch is None:
                continue
            logits = logits_of(batch.frames[:, 0]).float().cpu()
            read += len(logits)
            for values, label in zip(logits, batch.labels.tolist(), strict=True):
                found += decide(values, len(values) - 1, len(self.classes), smoothing, consensus) == label
        return found, read

    def state(self) -> dict[str, Any]:
        """Nothing: the epoch says all."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _check_together(self, fabric: Fabric) -> None:
        """Hold what all processes found unreadable against the limit; each knows its own and checks it at once."""
        if fabric.world_size > 1:
            found: list[tuple[Path, ...]] = [()] * fabric.world_size
            dist.all_gather_object(found, self.train.unreadable)
            count = len(set().union(*found))
            if count > self.train.limit * self.clips:
                raise UserError(
                    f"{count} of {self.clips} videos cannot be decoded, more than the limit of {self.train.limit:.2%}; "
                    f"replace them or raise the limit; {self.train.unreadable_log} lists them"
                )

    def _loader(self, clips: VideoClips, lists: list[list[int]]) -> DataLoader:
        return DataLoader(
            clips,
            batch_sampler=lists,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own, or every epoch would take a number from PyTorch's own.
            generator=torch.Generator().manual_seed(self.recipe.seed),
        )

    def _batch(self, batch: VideoBatch | None, order: Tensor, place: slice) -> Batch:
        recipe, classes = self.recipe, len(self.classes)
        places = torch.arange(len(order))[place]
        if batch is None:
            frames = torch.zeros(1, recipe.steps, recipe.height, recipe.width, 3, dtype=torch.uint8)
            return Batch(frames, torch.zeros(1, classes), torch.zeros(1, recipe.steps), places[:1])
        frames = batch.frames[:, 0]
        weights = step_weights(torch.ones(len(frames), recipe.steps, dtype=torch.bool))
        targets = F.one_hot(batch.labels, classes).float()
        return Batch(frames, targets, weights, places[torch.isin(order[place], batch.indices)])


def _read(loader: Iterator[VideoBatch | None], clips: VideoClips) -> VideoBatch | None:
    try:
        batch = next(loader)
    except UserError as error:  # with the worker's traceback around it
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that decodes videos ended ({error}); try fewer --workers") from error
    clips.check()
    return batch
