"""Labelled clips and other streams, played through a recognizer."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Event
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source

_FRAME_RATE = 30.0
_CLIPS_PER_CLASS = 3
_VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


Stream = Iterable[tuple[npt.NDArray[np.uint8], float]]


class UnreadableVideo(UserError):
    """A video that cannot be opened or decoded."""


@dataclass(frozen=True)
class Clip:
    """A clip that shows one action.

    Attributes:
        path: The video file, or the folder of its extracted frames.
        label: The action, one of the engine's labels.
        template: Of a folder of extracted frames, the name of frame n, such as ``img_{:05d}.jpg``; None: all its
            images are frames.
        frame_rate: Frames per second of a folder of extracted frames; None: 30.
    """

    path: Path
    label: str
    template: str | None = None
    frame_rate: float | None = None


@dataclass(frozen=True)
class ClipOutcome:
    """What the recognizer made of a clip.

    Attributes:
        label: The true label.
        prediction: Top label at the last step.
        score: The score of that label, 0 to 1.
        in_top5: Whether the true label is among the best five at the last step.
        settles: Index of the first frame from which on the top label no longer changes.
        frames: Number of frames in the clip.
    """

    label: str
    prediction: str
    score: float
    in_top5: bool
    settles: int
    frames: int


def read_clips(data: Path, split: int, actions: Sequence[str] | None = None, *, part: str = "test") -> list[Clip]:
    """Read the clips of a part of a data set.

    Args:
        data: Folder with ``manifest.csv``, whose columns are at least ``file``, ``class`` and ``split1`` etc.
        split: Which split; its clips are those with the part's name in the column ``split{split}``.
        actions: The labels that an engine knows; every class of a clip must be one of them. None: any.
        part: ``"test"`` or ``"train"``.

    Returns:
        The clips in the order of the file.

    Raises:
        UserError: If the list cannot be read, has no such split or no such clip, or names an unknown class.
    """
    path, column = data / "manifest.csv", f"split{split}"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"the list of clips {path} cannot be read ({error}); give --data a folder that holds it"
        ) from error
    missing = {"file", "class", column} - set(rows[0] if rows else ())
    if missing:
        raise UserError(f"the list of clips {path} has no column {', '.join(sorted(missing))}")
    clips = [Clip(data / row["file"], row["class"]) for row in rows if row[column] == part]
    if not clips:
        raise UserError(f"the list of clips {path} has no {part} clip in {column}")
    unknown = sorted({clip.label for clip in clips} - set(actions)) if actions is not None else []
    if unknown and actions is not None:
        raise UserError(f"the engine does not know the class {unknown[0]!r} of {path}; it knows {', '.join(actions)}")
    return clips


def calibration_videos(path: Path, split: int = 1) -> tuple[list[Path], str]:
    """The clips that a calibration plays.

    Args:
        path: A video; a folder of videos; or a data set with ``manifest.csv``, of whose training list some clips of
            every class are taken.
        split: Of the data set.

    Returns:
        The videos, and in words what they are.

    Raises:
        UserError: There is no such path, no video in it, or the data set's list cannot be read.
    """
    if (path / "manifest.csv").is_file():
        chosen: dict[str, list[Path]] = {}
        for clip in read_clips(path, split, part="train"):
            chosen.setdefault(clip.label, []).append(clip.path)
        videos = [video for of_class in chosen.values() for video in _spread(of_class, _CLIPS_PER_CLASS)]
        return videos, f"{path.resolve().name}, training list of split {split}"
    if not path.exists():
        raise UserError(f"there is no calibration clip or folder {path}; give a video, or a folder of videos")
    videos = videos_in(path) if path.is_dir() else [path]
    if not videos:
        raise UserError(f"the folder {path} holds no video to calibrate with; put some clips of your camera into it")
    return videos, path.resolve().name


def videos_in(folder: Path) -> list[Path]:
    """The videos in a folder and below, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _VIDEO_SUFFIXES)


def _spread(items: Sequence[Path], count: int) -> Sequence[Path]:
    """At most `count` items, evenly spread: neighbours in a list are often cut from one video."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def frames_of(clip: Clip) -> Iterator[tuple[npt.NDArray[np.uint8], float]]:
    """The frames of a clip with their times.

    Args:
        clip: The clip.

    Yields:
        Frame, uint8 (H, W, 3) BGR, overwritten by the next one, and its time in seconds.

    Raises:
        UnreadableVideo: If the clip cannot be read or is empty.
    """
    if clip.template is not None:
        rate = clip.frame_rate or _FRAME_RATE
        yield from ((_image(path), index / rate) for index, path in enumerate(_numbered(clip.path, clip.template)))
        return
    try:
        with open_source(clip.path) as source:
            for index, (frame, time) in enumerate(source):
                yield frame, index / clip.frame_rate if clip.frame_rate else time
    except UserError as error:
        raise UnreadableVideo(str(error)) from error


def _numbered(folder: Path, template: str) -> list[Path]:
    """The files of a folder that are named as frames, by their numbers."""
    before, _, after = re.split(r"(\{[^{}]*\})", template, maxsplit=1)
    name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := name.fullmatch(path.name))]
    except OSError as error:
        raise UnreadableVideo(f"the folder {folder} cannot be read ({error.strerror})") from error
    if not found:
        raise UnreadableVideo(f"the folder {folder} holds no frame named like {template}")
    return [path for _, path in sorted(found)]


def _image(path: Path) -> npt.NDArray[np.uint8]:
    image = cv2.imread(str(path))
    if image is None:
        raise UnreadableVideo(f"the image {path} cannot be decoded; replace it")
    return np.asarray(image, np.uint8)


def play_clip(recognizer: Recognizer, clip: Clip) -> ClipOutcome:
    """Play a clip from a fresh state to its end.

    Args:
        recognizer: A recognizer that returns the best five labels.
        clip: The clip.

    Returns:
        What the recognizer made of it.

    Raises:
        UserError: `UnreadableVideo` if the clip cannot be read or is empty.
    """
    recognizer.reset()
    settles, result, index = 0, None, -1
    for index, (frame, time) in enumerate(frames_of(clip)):
        latest = recognizer.update(frame, time)
        if latest is None:
            continue
        if result is None or latest.label != result.label:
            settles = index
        result = latest
    if result is None:
        raise UnreadableVideo(f"the clip {clip.path} holds no frame")
    return ClipOutcome(clip.label, result.label, result.score, clip.label in result.labels[:5], settles, index + 1)


def loop_clip(recognizer: Recognizer, clip: Clip, *, seconds: float) -> list[Event]:
    """Play a clip over and over, as if the action was repeated, and collect the events that start.

    Args:
        recognizer: The recognizer; it is reset first.
        clip: The clip.
        seconds: How long to play it; a longer clip is cut.

    Returns:
        The events in the order in which they started.

    Raises:
        UserError: If the clip cannot be read.
    """
    frames = [frame.copy() for frame, _ in frames_of(clip)]
    with open_source(clip.path) as source:
        rate = clip.frame_rate or source.frame_rate or _FRAME_RATE
    looped = itertools.islice(itertools.cycle(frames), round(seconds * rate))
    return started_events(recognizer, ((frame, index / rate) for index, frame in enumerate(looped)))


def started_events(recognizer: Recognizer, stream: Stream) -> list[Event]:
    """Play a stream from a fresh state and collect the events that start.

    Args:
        recognizer: The recognizer; it is reset first.
        stream: Frames, uint8 (H, W, 3) BGR, with their times in seconds.

    Returns:
        The events in the order in which they started.
    """
    return [event for event in _events(recognizer, stream) if event.end is None]


def ended_events(recognizer: Recognizer, stream: Stream) -> list[Event]:
    """Play a stream from a fresh state and collect its events whole; the last frame ends one that still runs.

    Args:
        recognizer: The recognizer; it is reset first.
        stream: Frames, uint8 (H, W, 3) BGR, with their times in seconds.

    Returns:
        The events, each with its end, in the order in which they started: there is never more than one at a time.
    """
    return [event for event in _events(recognizer, stream) if event.end is not None] + [*recognizer.finish()]


def _events(recognizer: Recognizer, stream: Stream) -> list[Event]:
    recognizer.reset()
    results = (recognizer.update(frame, time) for frame, time in stream)
    return [event for result in results if result for event in result.events]
