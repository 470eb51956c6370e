"""The data of a run of the command: what to train on, what to hold out, what to report on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stsm_rt.errors import UserError
from stsm_rt.train.annotation_formats import FORMATS
from stsm_rt.train.annotations import VideoList, load_videos
from stsm_rt.train.batches import TrainingData
from stsm_rt.train.datasets import ClipSet, Split, hold_out, load_jhmdb, load_shrec17
from stsm_rt.train.memory_clips import MemoryClips
from stsm_rt.train.negatives import add_negatives
from stsm_rt.train.recipe import Recipe
from stsm_rt.train.video_set import VideoSet


@dataclass(frozen=True, eq=False)
class RunData:
    """What a run uses.

    Attributes:
        data: The clips.
        held_out: Those to validate with after every epoch, or None.
        reported: Those to report on at the end, or None.
        where: What `held_out` or `reported` are, in words.
        dataset: Its name.
        split: The official split.
        missing: Videos that the annotations list and the disk does not hold.
    """

    data: TrainingData
    held_out: Tensor | None
    reported: Tensor | None
    where: str
    dataset: str
    split: int
    missing: tuple[str, ...] = ()

    def accuracy(self, top1: float) -> dict[str, Any]:
        """The record of an accuracy."""
        chosen = self.reported if self.reported is not None else self.held_out
        clips = len(chosen) if chosen is not None else 0
        return {"dataset": self.dataset, "split": self.split, "on": self.where, "clips": clips, "top1": top1}


def parse_fold(text: str) -> tuple[int, int]:
    """Read FOLD/FOLDS.

    Raises:
        UserError: It is something else.
    """
    try:
        fold, folds = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise UserError(f"--hold-out takes FOLD/FOLDS such as 0/3, got {text!r}") from error
    if not 0 <= fold < folds or folds < 2:
        raise UserError(f"--hold-out takes FOLD/FOLDS with 0 <= FOLD < FOLDS and FOLDS >= 2, got {text!r}")
    return fold, folds


def load_memory(
    recipe: Recipe, options: argparse.Namespace, fold: tuple[int, int] | None, folder: Path, device: torch.device
) -> RunData:
    """A set that is held in memory; it is validated with what --hold-out leaves out, never with the test list.

    Raises:
        UserError: The folder is not the data set, or it is not one that is held in memory.
    """
    clips, split = _memory_set(recipe, options.data, options.split)
    if fold is not None:
        split = hold_out(clips, split.train, *fold)
    if recipe.background:
        clips, split = add_negatives(clips, split, options.negatives)
    where = f"held-out part {options.hold_out} of the training list" if fold is not None else "test list"
    return RunData(
        MemoryClips(recipe, clips, split.train, device),
        held_out=split.test if fold is not None else None,
        reported=split.test if fold is not None or options.report_test else None,
        where=where,
        dataset=recipe.dataset,
        split=options.split,
    )


def _memory_set(recipe: Recipe, folder: Path, split: int) -> tuple[ClipSet, Split]:
    if recipe.dataset == "jhmdb":
        return load_jhmdb(folder, split)
    if recipe.dataset == "shrec17":
        return load_shrec17(folder)
    raise UserError(
        f"the recipe's data set {recipe.dataset!r} is not held in memory, as jhmdb and shrec17 are; add a table [video]"
    )


def load_video_set(
    recipe: Recipe, options: argparse.Namespace, fold: tuple[int, int] | None, folder: Path, device: torch.device
) -> RunData:
    """A set of videos; it is validated with its validation list, if it has one, never with the test list.

    Raises:
        UserError: The folder is not the data set, or an option does not go with it.
    """
    if fold is not None:
        raise UserError("--hold-out is for jhmdb and shrec17; give a list of your own with --dataset list instead")
    parts = FORMATS[recipe.dataset].parts if recipe.dataset in FORMATS else ()

    def videos(part: str, annotations: Path | None) -> VideoList:
        return load_videos(
            recipe.dataset,
            options.data,
            part,
            split=options.split,
            annotations=annotations,
            image_template=options.image_template,
            frame_rate=options.frame_rate,
            missing=options.missing,
        )

    train = videos("train", options.annotations)
    validates = "validation" in parts
    if recipe.dataset == "list" and options.annotations is not None:
        validates = options.validation is not None
    if options.report_test and validates:
        raise UserError(
            f"{recipe.dataset} is validated after every epoch; for its test list run stsm-rt evaluate on the weights"
        )
    held_out = None
    if validates:
        held_out = videos("validation", options.validation or options.annotations)
    elif options.report_test:
        held_out = videos("test", options.annotations)
    chosen = torch.arange(len(held_out.records)) if held_out else None
    data = VideoSet(recipe, train, held_out, workers=options.workers, unreadable_log=folder / "unreadable.jsonl")
    return RunData(
        data,
        held_out=chosen if validates else None,
        reported=chosen,
        where="validation list" if validates else "test list",
        dataset=recipe.dataset,
        split=options.split,
        missing=train.missing + (held_out.missing if held_out else ()),
    )
