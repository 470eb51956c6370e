"""What test_distributed runs in every process: train, in one run after another, and write the weights."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from stsm_rt.errors import UserError
from stsm_rt.train.augment import Augmentation
from stsm_rt.train.batches import TrainingData
from stsm_rt.train.datasets import ClipSet
from stsm_rt.train.loop import Trainer
from stsm_rt.train.processes import leave, make_fabric, on_first, together
from stsm_rt.train.recipe import Recipe, VideoInput
from stsm_rt.train.video_set import VideoSet

RECIPE = Recipe(
    name="noise",
    dataset="shrec17",
    network="r8",
    shift="tsm_online",
    height=16,
    width=16,
    frame_rate=30.0,
    steps=4,
    epochs=2,
    batch=8,
    pretrained=False,
    lr=1e-2,
    head_lr=1e-2,
    dropout=0.3,
    ema=0.9,
    augmentation=Augmentation(mixup=0.5),
)
RUNS = {
    "adamw, batch norm of the global batch": RECIPE,
    "adamw, a batch that does not divide evenly": dataclasses.replace(RECIPE, batch=7),
    "sgd, frozen batch norm, frozen backbone at first": dataclasses.replace(
        RECIPE,
        optimiser="sgd",
        schedule="steps",
        milestones=(1,),
        warmup=0.0,
        loss="consensus",
        batch_norm="frozen",
        frozen_epochs=1,
    ),
    "videos, one of them unreadable": dataclasses.replace(
        RECIPE, dataset="list", batch=3, batch_norm="frozen", video=VideoInput("segments", unreadable=0.2)
    ),
}


def noise(count: int = 32) -> ClipSet:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (count, 6, 20, 20, 1), dtype=torch.uint8, generator=generator)
    groups = tuple(str(clip // 4) for clip in range(count))
    return ClipSet(frames, torch.full((count,), 6), torch.arange(count) % 3, groups, ("a", "b", "c"), 30.0)


def data_of(recipe: Recipe, videos: Path, workers: int) -> ClipSet | TrainingData:
    if recipe.video is None:
        return noise()
    from stsm_rt.train.annotations import load_videos

    return VideoSet(recipe, load_videos("list", videos, "train"), workers=workers)


def weights(recipe: Recipe, data: ClipSet | TrainingData, fabric: Fabric, accumulate: int = 1) -> dict:
    network = Trainer(recipe, data, fabric=fabric, accumulate=accumulate).run()
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def main(videos: Path, out: Path) -> None:
    fabric = make_fabric("cpu", precision="64-true", find_unused=True)
    fabric.launch()
    assert fabric.world_size == 2
    results = {name: weights(recipe, data_of(recipe, videos, 1), fabric) for name, recipe in RUNS.items()}
    name = "sgd, frozen batch norm, frozen backbone at first"
    results["accumulated"] = weights(RUNS[name], noise(), fabric, accumulate=2)
    try:
        with together(fabric):
            if fabric.global_rank == 1:
                raise UserError("only the second process cannot read this; remove it")
    except UserError as error:
        results["error"] = str(error)
    on_first(fabric, lambda: torch.save(results, out))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
