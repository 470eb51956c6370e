"""Readers of J-HMDB and SHREC'17: every clip decoded once, in memory."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from stsm_rt.errors import UserError


@dataclass(frozen=True)
class ClipSet:
    """Labelled clips of equal picture size.

    Attributes:
        frames: uint8 (clips, F, H, W, C), BGR or grey (C is 1); a shorter clip repeats its last frame.
        lengths: int64 (clips,), frames of each clip.
        labels: int64 (clips,), index into `classes`.
        groups: Where each clip comes from (source video, person): clips of one group are not independent.
        classes: Names.
        frame_rate: Frames per second.
    """

    frames: Tensor
    lengths: Tensor
    labels: Tensor
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    frame_rate: float


@dataclass(frozen=True)
class Split:
    """Indices into a ClipSet: what to train on and what to report on."""

    train: Tensor
    test: Tensor


def decode(path: Path) -> np.ndarray:
    """All frames of a video, uint8 (F, H, W, 3) BGR.

    Raises:
        UserError: Nothing could be decoded.
    """
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        ok, frame = capture.read()
        if not ok:
            break
        frames.append(frame)
    capture.release()
    if not frames:
        raise UserError(f"no frame could be decoded from {path}; expected a video")
    return np.stack(frames)


def load_jhmdb(folder: Path, split: int) -> tuple[ClipSet, Split]:
    """J-HMDB as `manifest.csv` lists it.

    Args:
        folder: Holds manifest.csv and the clips.
        split: 1, 2 or 3.

    Raises:
        UserError: The folder is not J-HMDB, or there is no such split.
    """
    table = folder / "manifest.csv"
    if not table.is_file():
        raise UserError(f"expected J-HMDB with its manifest.csv in {folder}, found none")
    rows = list(csv.DictReader(table.open()))
    if f"split{split}" not in rows[0]:
        raise UserError(f"J-HMDB has splits 1, 2 and 3, not {split}")
    labels = [int(row["label"]) for row in rows]
    names = {int(row["label"]): row["class"] for row in rows}
    clips = [decode(folder / row["file"]) for row in rows]
    lengths = [len(clip) for clip in clips]
    # The pictures differ by a pixel or two in width; all are brought to the commonest size.
    height, width = Counter(clip.shape[1:3] for clip in clips).most_common(1)[0][0]
    frames = np.empty((len(clips), max(lengths), height, width, 3), np.uint8)
    for index, clip in enumerate(clips):
        for t in range(frames.shape[1]):
            frame = clip[min(t, len(clip) - 1)]
            frames[index, t] = frame if frame.shape[:2] == (height, width) else cv2.resize(frame, (width, height))
    clip_set = ClipSet(
        torch.from_numpy(frames),
        torch.tensor(lengths),
        torch.tensor(labels),
        tuple(row["source_group"] for row in rows),
        tuple(names[i] for i in sorted(names)),
        30.0,
    )
    sides = [
        torch.tensor([i for i, row in enumerate(rows) if row[f"split{split}"] == side]) for side in ("train", "test")
    ]
    return clip_set, Split(*sides)


SHREC17_CLASSES = (
    "grab",
    "tap",
    "expand",
    "pinch",
    "rotate_clockwise",
    "rotate_counter_clockwise",
    "swipe_right",
    "swipe_left",
    "swipe_up",
    "swipe_down",
    "swipe_x",
    "swipe_plus",
    "swipe_v",
    "shake",
)


def load_shrec17(folder: Path) -> tuple[ClipSet, Split]:
    """SHREC'17 hand gestures as depth video, the published people-disjoint test list.

    Raises:
        UserError: The folder is not SHREC'17.
    """
    archive = folder / "shrec17_composed_96x72.npz"
    if not archive.is_file():
        raise UserError(f"expected shrec17_composed_96x72.npz in {folder}, found none")
    data = np.load(archive)
    frames, keys = data["frames"], data["keys"]
    test = {
        tuple(map(int, line.split()[:4])) for line in (folder / "test_gestures.txt").read_text().splitlines() if line
    }
    in_test = torch.tensor([tuple(int(v) for v in key) in test for key in keys])
    clip_set = ClipSet(
        torch.from_numpy(frames[..., None]),
        torch.full((len(frames),), frames.shape[1]),
        torch.from_numpy(keys[:, 0].astype(np.int64) - 1),
        tuple(f"person_{key[2]}" for key in keys),
        SHREC17_CLASSES,
        30.0,
    )
    return clip_set, Split((~in_test).nonzero()[:, 0], in_test.nonzero()[:, 0])


def hold_out(clips: ClipSet, indices: Tensor, fold: int, folds: int) -> Split:
    """Divide clips into a part to train on and a part to choose on, never sharing a group.

    Groups are dealt class by class, the largest first, to the fold that has fewest clips of that class; the result
    depends on the clips alone.

    Args:
        clips: The set.
        indices: Those of its clips to divide, for example a training list.
        fold: Which part is held out, from 0.
        folds: Number of parts.
    """
    sizes: dict[int, Counter[str]] = {}
    for i in indices.tolist():
        sizes.setdefault(int(clips.labels[i]), Counter())[clips.groups[i]] += 1
    fold_of: dict[str, int] = {}
    for label in sorted(sizes):
        counts = [0] * folds
        for group, size in sorted(sizes[label].items(), key=lambda item: (-item[1], item[0])):
            # The fold to begin with turns with the label, or the first fold would get every largest group.
            best = min(range(folds), key=lambda k: (counts[k], (k - label) % folds))
            counts[fold_of.setdefault(group, best)] += size
    held = torch.tensor([fold_of[clips.groups[i]] == fold for i in indices.tolist()])
    return Split(indices[~held], indices[held])


def sample_indices(lengths: Sequence[int] | Tensor, stride: float, steps: int) -> tuple[Tensor, Tensor]:
    """Which frames a stream at the model's rate sees of whole clips.

    Args:
        lengths: Frames of each clip, (B,).
        stride: Source frames per step.
        steps: T.

    Returns:
        Frame indices int64 (B, T), and a mask (B, T) of the steps inside the clip.
    """
    lengths = torch.as_tensor(lengths)
    wanted = (torch.arange(steps) * stride).round().long()[None, :].expand(len(lengths), -1)
    return wanted.minimum(lengths[:, None] - 1), wanted < lengths[:, None]
