from __future__ import annotations

import pytest
import torch

from stsm_rt.train.augment import Augmentation
from stsm_rt.train.datasets import ClipSet
from stsm_rt.train.recipe import Recipe


@pytest.fixture(scope="session")
def moving_squares() -> ClipSet:
    """A bright square that moves left or right, round and round: no single frame tells which."""
    generator = torch.Generator().manual_seed(0)
    count, length, height, width = 160, 6, 16, 32
    frames = torch.randint(0, 30, (count, length, height, width, 1), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    for clip in range(count):
        x, y = (int(torch.randint(0, high, (1,), generator=generator)) for high in (width, height - 4))
        for t in range(length):
            columns = (torch.arange(4) + x + (2 * t if labels[clip] else -2 * t)) % width
            frames[clip, t, y : y + 4, columns] = 220
    groups = tuple(f"group_{clip // 8}" for clip in range(count))
    return ClipSet(frames, torch.full((count,), length), labels, groups, ("left", "right"), 30.0)


@pytest.fixture
def small_recipe() -> Recipe:
    return Recipe(
        name="squares",
        dataset="shrec17",
        network="r8",
        shift="tsm_online",
        height=16,
        width=32,
        frame_rate=30.0,
        steps=6,
        epochs=4,
        batch=16,
        pretrained=False,
        lr=3e-3,
        head_lr=3e-3,
        dropout=0.0,
        augmentation=Augmentation(
            crop_scale=1.0, crop_ratio=1.0, flip=False, colour=0.1, grey=0.0, pan=0.0, speed=1.0, late_start=0.0
        ),
    )
