"""The command that measures an engine: labelled clips, videos of something else, still rooms.

Everything is played through the recognizer that the webcam uses. ``--data`` gives the accuracy on labelled
clips, ``--negatives`` and ``--rooms`` count the events in streams where there should be none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.confusion import draw_confusion
from stsm_rt.decision import Event
from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.errors import UserError, report
from stsm_rt.manifest import Manifest
from stsm_rt.playback import Clip, ClipOutcome, loop_clip, play_clip, read_clips, started_events, videos_in
from stsm_rt.recognizer import Recognizer
from stsm_rt.still_rooms import still_rooms
from stsm_rt.video.sources import open_source

LOOP_SECONDS = 4.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        0, or 2 if something that was given cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="stsm-rt evaluate", description="Play labelled clips through an engine and report its accuracy."
    )
    parser.add_argument("--engine", type=Path, metavar="FILE", help="engine file (default: the embedded engine)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with manifest.csv and labelled clips")
    parser.add_argument("--split", type=int, default=1, help="split whose test clips are played (default: 1)")
    parser.add_argument(
        "--loop-events",
        action="store_true",
        help=f"also loop each correctly classified clip to {LOOP_SECONDS:g} s and count its events",
    )
    parser.add_argument(
        "--negatives",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="videos that show none of the actions",
    )
    parser.add_argument("--rooms", type=float, default=0, metavar="MINUTES", help="minutes of synthetic still rooms")
    parser.add_argument("--seed", type=int, default=0, help="seed of the still rooms (default: 0)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write the report here, and the confusion matrix beside it as .png",
    )
    arguments = parser.parse_args(argv)
    if not arguments.data and not arguments.negatives and arguments.rooms <= 0:
        parser.error("nothing to play: give --data, --negatives or --rooms")
    if arguments.loop_events and not arguments.data:
        parser.error("--loop-events needs --data")
    try:
        _evaluate(arguments)
    except UserError as error:
        return report(error)
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    engine_path = arguments.engine or embedded_engine()
    engine = _open(engine_path)
    manifest = engine.manifest
    actions = [label for label in manifest.labels if label != manifest.background]
    recognizer = Recognizer(engine, topk=5)
    record: dict[str, Any] = {
        "engine": Path(engine_path).name,
        "engine_sha256": manifest.sha256,
        "weights_sha256": manifest.weights_sha256,
        "network": manifest.network,
        "shift": manifest.shift["name"],
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "decision": asdict(manifest.decision),
    }
    if arguments.json:
        _check_folder(arguments.json)
    picture = None
    if arguments.data:
        clips = read_clips(arguments.data, arguments.split, actions)
        outcomes = [play_clip(recognizer, clip) for clip in _with_progress(clips)]
        record |= {"split": arguments.split, **_accuracy(outcomes, actions)}
        top1 = f"top-1 {100 * record['top1']:.1f} % of {len(clips)} clips"
        title = f"{record['engine']}  split {arguments.split}: {top1}"
        picture = draw_confusion(actions, np.array(record["confusion"]["matrix"]), title)
        if arguments.loop_events:
            correct = [c for c, o in zip(clips, outcomes, strict=True) if o.prediction == o.label]
            record["loop_events"] = _loop_events(recognizer, correct)
    if arguments.negatives:
        record["negatives"] = _negatives(recognizer, arguments.negatives)
    if arguments.rooms > 0:
        stream = still_rooms(arguments.rooms, arguments.seed)
        events = started_events(recognizer, stream)
        record["rooms"] = {"seed": arguments.seed, **_silence(arguments.rooms * 60, events)}
    print("\n".join(_lines(record)))
    if arguments.json:
        _write(arguments.json, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        if picture is not None:
            _write(arguments.json.with_suffix(".png"), cv2.imencode(".png", picture)[1].tobytes())


def _open(path: Path) -> Engine:
    if path.suffix == ".onnx" and Manifest.load(path).runtime == "onnx":
        print(f"engine   {path.name} is a graph for TensorRT; ONNX Runtime computes it node by node here, slowly")
        return OnnxRuntimeEngine(path, fused=False)
    return Engine.open(path)


def _accuracy(outcomes: Sequence[ClipOutcome], labels: Sequence[str]) -> dict[str, Any]:
    places = {label: place for place, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), int)
    for outcome in outcomes:
        matrix[places[outcome.label], places[outcome.prediction]] += 1
    settles = [outcome.settles for outcome in outcomes]
    return {
        "clips": len(outcomes),
        "top1": float(np.mean([outcome.prediction == outcome.label for outcome in outcomes])),
        "top5": float(np.mean([outcome.in_top5 for outcome in outcomes])),
        "per_class": {
            label: {"clips": int(row.sum()), "recall": float(row[place] / row.sum())}
            for place, (label, row) in enumerate(zip(labels, matrix, strict=True))
            if row.sum()
        },
        "confusion": {"labels": list(labels), "matrix": matrix.tolist()},
        "settles": {
            "median_frame": float(np.median(settles)),
            "p90_frame": float(np.percentile(settles, 90)),
            "median_share": float(np.median([o.settles / o.frames for o in outcomes])),
            "frames": settles,
        },
    }


def _loop_events(recognizer: Recognizer, clips: Sequence[Clip]) -> dict[str, Any]:
    own, other = 0, 0
    for clip in _with_progress(clips):
        labels = {event.label for event in loop_clip(recognizer, clip, seconds=LOOP_SECONDS)}
        own += clip.label in labels
        other += bool(labels - {clip.label})
    share = own / len(clips) if clips else 0.0
    return {"seconds": LOOP_SECONDS, "clips": len(clips), "own": own, "other": other, "share": share}


def _negatives(recognizer: Recognizer, paths: Sequence[Path]) -> dict[str, Any]:
    videos, seconds, events = [], 0.0, []
    for path in _with_progress(list(_videos(paths))):
        times: list[float] = []
        with open_source(path) as source:
            found = started_events(recognizer, _noting_times(source, times))
        length = times[-1] - times[0] if times else 0.0
        videos.append({"file": path.name, **_silence(length, found)})
        seconds += length
        events += found
    return {**_silence(seconds, events), "videos": videos}


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


def _with_progress(items: Sequence[Any]) -> Iterator[Any]:
    for index, item in enumerate(items, 1):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{index}/{len(items)}" + ("\n" if index == len(items) else ""))
        yield item


def _lines(record: dict[str, Any]) -> Iterator[str]:
    yield f"engine   {record['engine']}  sha256 {record['engine_sha256'][:12]}"
    if "top1" in record:
        settles = record["settles"]
        yield f"split    {record['split']}, {record['clips']} test clips, prediction at the last frame"
        yield f"top-1    {100 * record['top1']:.1f} %"
        yield f"top-5    {100 * record['top5']:.1f} %"
        yield f"settles  median at frame {settles['median_frame']:g}, 90 % by {settles['p90_frame']:g}"
        yield "recall by class"
        for label, row in sorted(record["per_class"].items(), key=lambda item: -item[1]["recall"]):
            yield f"  {label:<20} {100 * row['recall']:5.1f} % of {row['clips']}"
    if "loop_events" in record:
        loops = record["loop_events"]
        yield (
            f"looped   to {loops['seconds']:g} s, {loops['own']} of {loops['clips']} correctly classified "
            f"clips ({100 * loops['share']:.1f} %) raise their own event, {loops['other']} raise another"
        )
    for video in record.get("negatives", {}).get("videos", ()):
        yield f"negative {_silence_line(video)}  {video['file']}"
    if "negatives" in record:
        yield f"negative {_silence_line(record['negatives'])}  all"
    if "rooms" in record:
        yield f"rooms    {_silence_line(record['rooms'])}  seed {record['rooms']['seed']}"


def _silence_line(silence: dict[str, Any]) -> str:
    labels = ", ".join(f"{event['label']} at {event['start']:.1f} s" for event in silence["events"])
    count = len(silence["events"])
    return (
        f"{count} event{'' if count == 1 else 's'} in {silence['seconds'] / 60:.2f} min "
        f"({silence['events_per_minute']:.2f} per minute)" + (f": {labels}" if labels else "")
    )


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"the report cannot be written to {path}: there is no folder {path.parent}; create it first")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"the report {path} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
