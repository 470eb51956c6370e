"""Clips of large sets of videos, decoded when they are asked for: which frames, which part of them, what is unreadable.

A clip depends on the seed, the epoch and its number alone, so that any number of processes and workers see the same.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from stsm_rt.errors import UserError
from stsm_rt.sampler import Sampler
from stsm_rt.train.annotations import VideoList, VideoRecord
from stsm_rt.train.crops import Crop
from stsm_rt.train.decoding import FrameFolder, UnreadableVideo, VideoFile

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video make a clip.

    Attributes:
        segments: Frames of a clip, T.
        dense_span: None: the clip spans the video, a frame from each of `segments` equal parts. Otherwise it spans a
            window of so many frames (TSM: 64); a shorter video starts again.
        views: Clips of each video when testing; in training there is one.
        frame_rate: None, or the steps per second at which a causal network sees a stream: the clip's frames are those
            that the recognizer would take of the video from some frame on. A video that ends early stays at its last
            frame.
    """

    segments: int
    dense_span: int | None = None
    views: int = 1
    frame_rate: float | None = None

    def __post_init__(self) -> None:
        if self.segments < 1 or self.views < 1:
            raise ValueError(f"a clip has at least 1 frame and a video 1 view, got {self.segments} and {self.views}")
        if self.dense_span is not None and self.frame_rate is not None:
            raise ValueError("clips are sampled from a dense window or at a frame rate, not both; leave one out")
        if self.dense_span is not None and self.dense_span < self.segments:
            raise ValueError(f"a window of {self.dense_span} frames cannot hold {self.segments}; widen dense_span")


def frame_indices(sampling: Sampling, times: npt.NDArray[np.float64], random: np.random.Generator | None) -> Indices:
    """Choose frames.

    Args:
        sampling: How.
        times: Seconds of each of the video's frames, (F,); only a stream needs them to be known.
        random: For training; None: for testing, always the same.

    Returns:
        int64 (1, T) for training, (views, T) for testing, in 0 to F - 1.
    """
    if sampling.frame_rate is not None:
        return _stream(sampling, sampling.frame_rate, times, random)
    count, steps = len(times), np.arange(sampling.segments)
    if sampling.dense_span is not None:
        starts = _starts(max(0, count - sampling.dense_span), sampling.views, random)
        return (starts[:, None] + steps * (sampling.dense_span // sampling.segments)) % count
    length = count // sampling.segments
    if random is not None and length:
        return (steps * length + random.integers(length, size=sampling.segments))[None]
    # TSM's test frames: the middle of every part, and with two clips the start as well. A video with fewer frames than
    # parts repeats some (TSM's training and validation repeat its first frame alone).
    views = 1 if random is not None else sampling.views
    shifts = np.array([views / 2]) if views == 1 else np.arange(views)
    return np.floor((steps + shifts[:, None] / views) * count / sampling.segments).astype(np.int64)


def _starts(last: int, views: int, random: np.random.Generator | None) -> Indices:
    """First frames of windows, 0 to `last`: one at random, or evenly spread, a single one in the middle."""
    if random is not None:
        return random.integers(last + 1, size=1)
    return np.array([last // 2]) if views == 1 else np.linspace(0, last, views, dtype=np.int64)


def _stream(
    sampling: Sampling, frame_rate: float, times: npt.NDArray[np.float64], random: np.random.Generator | None
) -> Indices:
    def taken(start: int) -> list[int]:
        sampler = Sampler(frame_rate)
        wanted = (index for index in range(start, len(times)) if sampler.take(float(times[index])))
        return list(itertools.islice(wanted, sampling.segments))

    # Steps may be longer than 1 / frame_rate (25 frames/s at a rate of 10: every third): the last start that leaves
    # room for the clip is at or before this one.
    last = max(0, int(np.searchsorted(times, times[-1] - (sampling.segments - 1) * 0.9 / frame_rate, side="right")) - 1)
    while last and len(taken(last)) < sampling.segments:
        last -= 1
    rows = [taken(int(start)) for start in _starts(last, sampling.views, random)]
    return np.array([row + row[-1:] * (sampling.segments - len(row)) for row in rows], np.int64)


class VideoClip(NamedTuple):
    """A video's clips.

    Attributes:
        frames: uint8 (V, T, H, W, 3), BGR; V is 1 in training, else views times crops: crop c of view v is
            v * crops + c.
        label: Index into the list's classes.
        index: The video's place in the list.
    """

    frames: Tensor
    label: int
    index: int  # type: ignore[assignment]  # shadows tuple.index


class VideoBatch(NamedTuple):
    """Clips of several videos.

    Attributes:
        frames: uint8 (B, V, T, H, W, 3), BGR.
        labels: int64 (B,).
        indices: int64 (B,), places in the list.
    """

    frames: Tensor
    labels: Tensor
    indices: Tensor


class VideoClips(Dataset["VideoClip | None"]):
    """The clips of a list of videos.

    An item is None where its video cannot be read: it is written down and left out (`collate`), never replaced by
    another. `check` ends the run when there are too many of them; it is for the process that loads, since what a
    DataLoader's worker raises arrives with its traceback. What was found unreadable and the epoch are in shared memory:
    workers that persist see them.
    """

    def __init__(
        self,
        videos: VideoList,
        sampling: Sampling,
        crop: Crop,
        *,
        training: bool,
        seed: int = 0,
        unreadable: float = 0.01,
        unreadable_log: Path | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            videos: The list.
            sampling: Which frames.
            crop: What is cut out of them.
            training: Whether frames are drawn at random.
            seed: Of sampling and crops.
            unreadable: Share of the list that may be unreadable.
            unreadable_log: File to which a JSON line with path and reason is added for each of them; its folder exists.
        """
        self.videos, self.sampling, self.crop = videos, sampling, crop
        self.training, self.seed = training, seed
        self.limit, self.unreadable_log = unreadable, unreadable_log
        self._failed = torch.zeros(len(videos.records), dtype=torch.bool).share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.videos.records)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the randomness belongs to; before its first clip is asked for."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> VideoClip | None:
        """Decode the clips of a video; None if that is impossible.

        Raises:
            UserError: There are too many such videos (not raised in a DataLoader's worker), or a stream of extracted
                frames is asked for whose frame rate is unknown.
        """
        record = self.videos.records[index]
        random = np.random.default_rng((self.seed, int(self._epoch), index))
        try:
            with _open(record) as video:
                if self.sampling.frame_rate is not None and np.isnan(video.times).any():
                    raise UserError(f"how fast {record.path} was filmed is unknown; give the data set's frame rate")
                chosen = frame_indices(self.sampling, video.times, random if self.training else None)
                frames = torch.from_numpy(video.read(chosen.ravel())).unflatten(0, chosen.shape)
        except UnreadableVideo as error:
            self._leave_out(index, error)
            return None
        return VideoClip(torch.cat([self.crop(view, random) for view in frames]), record.label, index)

    @property
    def unreadable(self) -> tuple[Path, ...]:
        """The videos that this process and its workers could not read so far, in the order of the list."""
        return tuple(self.videos.records[index].path for index in self._failed.nonzero()[:, 0].tolist())

    def check(self) -> None:
        """End the run when too many videos are unreadable.

        Raises:
            UserError: More than the limit, with the number and the first of them.
        """
        count = int(self._failed.sum())
        if count > self.limit * len(self):
            listed = f"; all are listed in {self.unreadable_log}" if self.unreadable_log else ""
            raise UserError(
                f"{count} of {len(self)} videos cannot be decoded, more than the limit of {self.limit:.2%}, the first "
                f"is {self.unreadable[0]}; replace them or raise the limit{listed}"
            )

    def _leave_out(self, index: int, error: UnreadableVideo) -> None:
        if not self._failed[index]:
            self._failed[index] = True
            if self.unreadable_log is not None:
                line = json.dumps({"path": str(self.videos.records[index].path), "reason": str(error)}) + "\n"
                # One write to a file opened for appending: lines of several workers do not mix.
                target = os.open(self.unreadable_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    os.write(target, line.encode())
                finally:
                    os.close(target)
        if get_worker_info() is None:
            self.check()


def _open(record: VideoRecord) -> VideoFile | FrameFolder:
    if record.template is None:
        return VideoFile(record.path)
    return FrameFolder(record.path, record.template, frames=record.frames, frame_rate=record.frame_rate)


def collate(items: Sequence[VideoClip | None]) -> VideoBatch | None:
    """Put the clips of a batch together; those of unreadable videos are left out, and None means that none is left."""
    clips = [item for item in items if item is not None]
    if not clips:
        return None
    labels, indices = (torch.tensor([clip[field] for clip in clips]) for field in (1, 2))
    return VideoBatch(torch.stack([clip.frames for clip in clips]), labels, indices)


def read_batches(loader: DataLoader) -> Iterator[VideoBatch]:
    """The batches of a loader of `VideoClips` with `collate`, without empty ones.

    Raises:
        UserError: Too many videos are unreadable.
    """
    clips = loader.dataset
    assert isinstance(clips, VideoClips)
    for batch in loader:
        clips.check()
        if batch is not None:
            yield batch
    clips.check()
