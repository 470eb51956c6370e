"""Scores of events in untrimmed videos, against annotated intervals.

An event counts as right where it starts close to the annotated start of the same action, as in online detection of
action starts (Shou et al., ECCV 2018, point-level scores at an offset tolerance of 1 to 10 s): a recognizer of a stream
has to say that something starts, not to draw its outline afterwards. The overlap of whole intervals at an intersection
over union of one half, the criterion of temporal action segmentation (Lea et al., CVPR 2017, F1@50), is given beside
it. The order of the labels is judged by the Levenshtein accuracy (Köpüklü et al., FG 2019, real-time hand gesture
detection).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stsm_rt.decision import Event
from stsm_rt.errors import UserError
from stsm_rt.metrics import levenshtein

OVERLAP = 0.5
_COLUMNS = ("video", "label", "start", "end")

Criterion = Literal["start", "interval", "overlap"]


@dataclass(frozen=True)
class Interval:
    """One action in a video.

    Attributes:
        label: The action.
        start: Seconds.
        end: Seconds, after the start.
    """

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class StreamOutcome:
    """What was annotated in a video and what was raised.

    Attributes:
        name: Of the video.
        seconds: Its length.
        intervals: The annotated actions.
        events: The ended events, in the order in which they started.
    """

    name: str
    seconds: float
    intervals: tuple[Interval, ...]
    events: tuple[Event, ...]


def read_annotations(path: Path, labels: Sequence[str]) -> dict[Path, tuple[Interval, ...]]:
    """Read annotated intervals.

    Args:
        path: A CSV file with the columns ``video`` (a path, relative to the file's folder), ``label``, ``start`` and
            ``end`` (seconds), one action a line. A video in which nothing happens has a line whose other fields are
            empty.
        labels: The actions that the engine knows.

    Returns:
        Of each video its intervals by their start.

    Raises:
        UserError: The file cannot be read, lacks a column, names an unknown action, or holds no interval.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the annotations {path} cannot be read ({error}); give a CSV file") from error
    if not rows or not set(_COLUMNS) <= set(columns):
        found = ", ".join(columns) or "nothing"
        raise UserError(f"the annotations {path} need the columns {', '.join(_COLUMNS)} and a line, found {found}")
    videos: dict[Path, list[Interval]] = {}
    for line, row in enumerate(rows, 2):
        if not row["video"]:
            raise UserError(f"line {line} of {path} names no video; give its path")
        intervals = videos.setdefault(path.parent / row["video"], [])
        if row["label"] or row["start"] or row["end"]:
            intervals.append(_interval(row, f"line {line} of {path}", labels))
    return {video: tuple(sorted(found, key=lambda each: each.start)) for video, found in videos.items()}


def _interval(row: dict[str, str | None], where: str, labels: Sequence[str]) -> Interval:
    label = row["label"] or ""
    if label not in labels:
        raise UserError(f"{where} has the label {label!r}; the engine knows {', '.join(labels)}")
    try:
        start, end = float(row["start"] or ""), float(row["end"] or "")
    except ValueError as error:
        raise UserError(f"{where} needs seconds in start and end, got {row['start']!r} and {row['end']!r}") from error
    if not (0 <= start < end < math.inf):
        raise UserError(f"{where} ends at {end:g} s and starts at {start:g} s; expected 0 <= start < end")
    return Interval(label, start, end)


def match(
    intervals: Sequence[Interval], events: Sequence[Event], criterion: Criterion, tolerance: float
) -> list[tuple[Interval, Event]]:
    """Pair intervals with events of the same label, each at most once and as many as possible.

    Args:
        intervals: The annotated actions of a video.
        events: The ended events of the same video.
        criterion: ``"start"``: the event starts at most the tolerance before or after the interval does.
            ``"interval"``: it starts between the tolerance before the interval's start and its end, or the tolerance
            after its start where that is later. ``"overlap"``: their intersection is at least half of their union.
        tolerance: Seconds.
    """
    if criterion == "overlap":
        return _match_overlaps(intervals, events)
    pairs = []
    remaining = list(intervals)
    # An event takes the interval whose time runs out first: no other choice leaves more to the events after it.
    for event in sorted(events, key=lambda each: each.start):
        fitting = [
            (_latest(interval, criterion, tolerance), place)
            for place, interval in enumerate(remaining)
            if interval.label == event.label
            and interval.start - tolerance <= event.start <= _latest(interval, criterion, tolerance)
        ]
        if fitting:
            pairs.append((remaining.pop(min(fitting)[1]), event))
    return pairs


def _latest(interval: Interval, criterion: Criterion, tolerance: float) -> float:
    return max(interval.end if criterion == "interval" else 0.0, interval.start + tolerance)


def _match_overlaps(intervals: Sequence[Interval], events: Sequence[Event]) -> list[tuple[Interval, Event]]:
    """Largest overlap first; that matches the most where intervals of a label do not overlap each other."""
    overlaps = sorted(
        (
            (-_overlap(interval, event), i, e)
            for i, interval in enumerate(intervals)
            for e, event in enumerate(events)
            if interval.label == event.label and _overlap(interval, event) >= OVERLAP
        ),
    )
    taken_intervals: set[int] = set()
    pairs: dict[int, int] = {}
    for _, i, e in overlaps:
        if i not in taken_intervals and e not in pairs:
            taken_intervals.add(i)
            pairs[e] = i
    return [(intervals[i], events[e]) for e, i in sorted(pairs.items())]


def _overlap(interval: Interval, event: Event) -> float:
    end = event.start if event.end is None else event.end
    shared = min(interval.end, end) - max(interval.start, event.start)
    return max(shared, 0.0) / (max(interval.end, end) - min(interval.start, event.start))


def event_record(outcomes: Sequence[StreamOutcome], tolerance: float) -> dict[str, Any]:
    """Score the events of videos.

    Args:
        outcomes: The videos, at least one.
        tolerance: Seconds that an event may start before or after the annotated start.

    Returns:
        JSON-ready data: ``annotated`` and ``events`` (counts), ``seconds``; ``start`` (with its ``tolerance``) and
        ``overlap`` (with its ``iou``): ``matched``, ``precision``, ``recall`` and ``f1``, None where nothing was there
        to be right; ``delay``: of the ``detected`` intervals, those that raised an event while they lasted or within
        the tolerance of their start, ``median`` and ``p90`` of the seconds from the annotated start to the event's,
        None without any; ``levenshtein``: ``distance`` of the label sequences and ``accuracy``, which is
        1 - distance / annotated and may be negative; ``per_class``: ``annotated``, ``events``, ``matched``,
        ``precision``, ``recall`` and ``f1`` at the start; ``videos``: each video's name, length, intervals and events.
    """
    intervals = [interval for outcome in outcomes for interval in outcome.intervals]
    events = [event for outcome in outcomes for event in outcome.events]
    starts, within, overlaps = (
        [pair for outcome in outcomes for pair in match(outcome.intervals, outcome.events, criterion, tolerance)]
        for criterion in ("start", "interval", "overlap")
    )
    delays = [event.start - interval.start for interval, event in within]
    distance = sum(
        levenshtein([each.label for each in outcome.intervals], [each.label for each in outcome.events])
        for outcome in outcomes
    )
    labels = sorted({each.label for each in intervals} | {each.label for each in events})
    return {
        "seconds": sum(outcome.seconds for outcome in outcomes),
        "annotated": len(intervals),
        "events": len(events),
        "start": {"tolerance": tolerance, **_rates(len(starts), len(intervals), len(events))},
        "overlap": {"iou": OVERLAP, **_rates(len(overlaps), len(intervals), len(events))},
        "delay": {
            "detected": len(delays),
            "median": float(np.median(delays)) if delays else None,
            "p90": float(np.percentile(delays, 90)) if delays else None,
        },
        "levenshtein": {"distance": distance, "accuracy": 1 - distance / len(intervals) if intervals else None},
        "per_class": {
            label: {
                "annotated": (annotated := sum(each.label == label for each in intervals)),
                "events": (raised := sum(each.label == label for each in events)),
                **_rates(sum(interval.label == label for interval, _ in starts), annotated, raised),
            }
            for label in labels
        },
        "videos": [
            {
                "file": outcome.name,
                "seconds": outcome.seconds,
                "intervals": [vars(each) for each in outcome.intervals],
                "events": [
                    {"label": each.label, "start": each.start, "end": each.end, "score": each.peak}
                    for each in outcome.events
                ],
            }
            for outcome in outcomes
        ],
    }


def _rates(matched: int, annotated: int, events: int) -> dict[str, Any]:
    return {
        "matched": matched,
        "precision": matched / events if events else None,
        "recall": matched / annotated if annotated else None,
        "f1": 2 * matched / (annotated + events) if annotated + events else None,
    }


def event_lines(record: dict[str, Any]) -> Iterator[str]:
    """What `event_record` found, for people."""
    seconds = record["start"]["tolerance"]
    yield f"events   {record['events']} in {record['seconds'] / 60:.2f} min, {record['annotated']} actions annotated"
    for key, what in (("start", f"starts within {seconds:g} s"), ("overlap", f"overlap of at least {OVERLAP:g}")):
        found = record[key]
        yield (
            f"{what:<24} precision {_percent(found['precision'])}, recall {_percent(found['recall'])}, "
            f"F1 {_percent(found['f1'])}"
        )
    delay = record["delay"]
    if delay["detected"]:
        yield (
            f"delay    median {delay['median']:.2f} s, 90 % within {delay['p90']:.2f} s "
            f"({delay['detected']} of {record['annotated']} actions raised their event)"
        )
    yield (
        f"order    Levenshtein accuracy {_percent(record['levenshtein']['accuracy'])}, "
        f"{record['levenshtein']['distance']} edits"
    )
    yield f"  {'':<20} {'annotated':>9} {'events':>6} {'precision':>9} {'recall':>8} {'F1':>8}"
    for label, row in record["per_class"].items():
        rates = f"{_percent(row['precision']):>9} {_percent(row['recall']):>8} {_percent(row['f1']):>8}"
        yield f"  {label:<20} {row['annotated']:>9} {row['events']:>6} {rates}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
