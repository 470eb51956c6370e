"""Labelled clips and other streams, played through a recognizer."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Event
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source

_FRAME_RATE = 30.0


@dataclass(frozen=True)
class Clip:
    """A clip that shows one action.

    Attributes:
        path: The video file.
        label: The action, one of the engine's labels.
    """

    path: Path
    label: str


@dataclass(frozen=True)
class ClipOutcome:
    """What the recognizer made of a clip.

    Attributes:
        label: The true label.
        prediction: Top label at the last step.
        in_top5: Whether the true label is among the best five at the last step.
        settles: Index of the first frame from which on the top label no longer changes.
        frames: Number of frames in the clip.
    """

    label: str
    prediction: str
    in_top5: bool
    settles: int
    frames: int


def read_clips(data: Path, split: int, actions: Sequence[str]) -> list[Clip]:
    """Read the test clips of a data set.

    Args:
        data: Folder with ``manifest.csv``, whose columns are at least ``file``, ``class`` and ``split1`` etc.
        split: Which split; its test clips are those with ``test`` in the column ``split{split}``.
        actions: The labels that an engine knows; every class of a test clip must be one of them.

    Returns:
        The clips in the order of the file.

    Raises:
        UserError: If the list cannot be read, has no such split or no test clip, or names an unknown class.
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
    clips = [Clip(data / row["file"], row["class"]) for row in rows if row[column] == "test"]
    if not clips:
        raise UserError(f"the list of clips {path} has no test clip in {column}")
    unknown = sorted({clip.label for clip in clips} - set(actions))
    if unknown:
        raise UserError(f"the engine does not know the class {unknown[0]!r} of {path}; it knows {', '.join(actions)}")
    return clips


def play_clip(recognizer: Recognizer, clip: Clip) -> ClipOutcome:
    """Play a clip from a fresh state to its end.

    Args:
        recognizer: A recognizer that returns the best five labels.
        clip: The clip.

    Returns:
        What the recognizer made of it.

    Raises:
        UserError: If the clip cannot be read or is empty.
    """
    recognizer.reset()
    settles, result, index = 0, None, -1
    with open_source(clip.path) as source:
        for index, (frame, time) in enumerate(source):
            latest = recognizer.update(frame, time)
            if latest is None:
                continue
            if result is None or latest.label != result.label:
                settles = index
            result = latest
    if result is None:
        raise UserError(f"the clip {clip.path} holds no frame")
    return ClipOutcome(clip.label, result.label, clip.label in result.labels[:5], settles, index + 1)


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
    with open_source(clip.path) as source:
        frames = [frame.copy() for frame, _ in source]
        rate = source.frame_rate or _FRAME_RATE
    looped = itertools.islice(itertools.cycle(frames), round(seconds * rate))
    return started_events(recognizer, ((frame, index / rate) for index, frame in enumerate(looped)))


def started_events(recognizer: Recognizer, stream: Iterable[tuple[npt.NDArray[np.uint8], float]]) -> list[Event]:
    """Play a stream from a fresh state and collect the events that start.

    Args:
        recognizer: The recognizer; it is reset first.
        stream: Frames, uint8 (H, W, 3) BGR, with their times in seconds.

    Returns:
        The events in the order in which they started.
    """
    recognizer.reset()
    results = (recognizer.update(frame, time) for frame, time in stream)
    return [event for result in results if result for event in result.events if event.end is None]
