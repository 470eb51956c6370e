"""Evaluation as in use: an engine plays every video frame by frame through the recognizer that the webcam uses."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from stsm_rt.decision import Event
from stsm_rt.errors import UserError
from stsm_rt.event_scores import Interval, StreamOutcome, event_record
from stsm_rt.metrics import Predictions
from stsm_rt.playback import (
    Clip,
    ClipOutcome,
    UnreadableVideo,
    ended_events,
    loop_clip,
    play_clip,
    started_events,
    videos_in,
)
from stsm_rt.recognizer import Recognizer
from stsm_rt.still_rooms import still_rooms
from stsm_rt.video.sources import open_source

LOOP_SECONDS = 4.0
UNREADABLE = 0.01  # share of the videos that may be unreadable

Item = TypeVar("Item")


def play_clips(
    recognizer: Recognizer, clips: Sequence[Clip]
) -> tuple[list[tuple[Clip, ClipOutcome]], list[dict[str, str]]]:
    """Play labelled clips, each from a fresh state to its end.

    Args:
        recognizer: A recognizer that returns the best five labels.
        clips: At least one.

    Returns:
        Each clip that could be read with its outcome, and of the others ``file`` and ``reason``.

    Raises:
        UserError: More than 1 % of the clips cannot be read.
    """
    outcomes, unreadable = [], []
    for clip in with_progress(clips):
        try:
            outcomes.append((clip, play_clip(recognizer, clip)))
        except UnreadableVideo as error:
            unreadable.append({"file": str(clip.path), "reason": str(error)})
            if len(unreadable) > UNREADABLE * len(clips):
                if len(unreadable) == 1:
                    raise
                raise UserError(
                    f"more than {100 * UNREADABLE:g} % of the {len(clips)} videos cannot be read, the last being "
                    f"{clip.path}; repair or remove them"
                ) from error
    return outcomes, unreadable


def accuracy_record(outcomes: Sequence[ClipOutcome], labels: Sequence[str]) -> dict[str, Any]:
    """Score the decisions at the clips' last frames.

    Args:
        outcomes: Of the clips, at least one.
        labels: The engine's labels without the background.

    Returns:
        `Predictions.to_record`, of which the confidence is the score that the recognizer shows, and ``settles``: the
        first frame from which on the top label no longer changes (``median_frame``, ``p90_frame``, ``median_share`` of
        the clip, ``frames`` of each).
    """
    places = {label: place for place, label in enumerate(labels)}
    predictions = Predictions(
        np.array([places[outcome.label] for outcome in outcomes]),
        np.array([places[outcome.prediction] for outcome in outcomes]),
        np.array([outcome.in_top5 for outcome in outcomes]),
        np.array([outcome.score for outcome in outcomes]),
        tuple(labels),
    )
    settles = [outcome.settles for outcome in outcomes]
    return {
        **predictions.to_record(),
        "settles": {
            "median_frame": float(np.median(settles)),
            "p90_frame": float(np.percentile(settles, 90)),
            "median_share": float(np.median([o.settles / o.frames for o in outcomes])),
            "frames": settles,
        },
    }


def loop_record(recognizer: Recognizer, clips: Sequence[Clip]) -> dict[str, Any]:
    """Loop each clip to 4 s and count the clips that raise events: of their ``own`` label, of an ``other``."""
    own, other = 0, 0
    for clip in with_progress(clips):
        labels = {event.label for event in loop_clip(recognizer, clip, seconds=LOOP_SECONDS)}
        own += clip.label in labels
        other += bool(labels - {clip.label})
    share = own / len(clips) if clips else 0.0
    return {"seconds": LOOP_SECONDS, "clips": len(clips), "own": own, "other": other, "share": share}


def negatives_record(recognizer: Recognizer, paths: Sequence[Path]) -> dict[str, Any]:
    """Play videos that show none of the actions and list their events: ``videos``, and all of them together."""
    videos, seconds, events = [], 0.0, []
    for path in with_progress(list(_videos(paths))):
        times: list[float] = []
        with open_source(path) as source:
            found = started_events(recognizer, _noting_times(source, times))
        length = times[-1] - times[0] if times else 0.0
        videos.append({"file": path.name, **_silence(length, found)})
        seconds += length
        events += found
    return {**_silence(seconds, events), "videos": videos}


def rooms_record(recognizer: Recognizer, minutes: float, seed: int) -> dict[str, Any]:
    """List the events in synthetic still rooms."""
    events = started_events(recognizer, still_rooms(minutes, seed))
    return {"seed": seed, **_silence(minutes * 60, events)}


def annotated_record(
    recognizer: Recognizer, annotations: dict[Path, tuple[Interval, ...]], tolerance: float
) -> dict[str, Any]:
    """Play untrimmed videos and score their events; see `event_record`.

    Args:
        recognizer: The recognizer.
        annotations: Of each video its actions.
        tolerance: Seconds that an event may start before or after the annotated start.

    Raises:
        UserError: A video cannot be read.
    """
    outcomes = []
    for path, intervals in with_progress(list(annotations.items())):
        times: list[float] = []
        with open_source(path) as source:
            events = ended_events(recognizer, _noting_times(source, times))
        length = times[-1] - times[0] if times else 0.0
        outcomes.append(StreamOutcome(path.name, length, intervals, tuple(events)))
    return event_record(outcomes, tolerance)


def with_progress(items: Sequence[Item]) -> Iterator[Item]:
    """Go through items; on a terminal, count them."""
    for index, item in enumerate(items, 1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{index}/{len(items)}" + ("\n" if index == len(items) else ""))
        yield item


def _videos(paths: Sequence[Path]) -> Iterator[Path]:
    """Name every video: a folder stands for the videos in it and below, or is a video made of images."""
    for path in paths:
        yield from (videos_in(path) if path.is_dir() else []) or [path]


def _noting_times(
    stream: Iterable[tuple[npt.NDArray[np.uint8], float]], times: list[float]
) -> Iterator[tuple[npt.NDArray[np.uint8], float]]:
    for frame, time in stream:
        times.append(time)
        yield frame, time


def _silence(seconds: float, events: Sequence[Event]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "events": [{"label": event.label, "start": event.start, "score": event.peak} for event in events],
        "events_per_minute": 60 * len(events) / seconds if seconds else 0.0,
    }
