"""The report of an evaluation: lines for people, JSON and the picture of the confusion matrix for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from stsm_rt.confusion import draw_confusion
from stsm_rt.errors import UserError
from stsm_rt.event_scores import event_lines


def check_folder(path: Path) -> None:
    """See that a report can be written before hours are spent on it.

    Raises:
        UserError: There is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"the report cannot be written to {path}: there is no folder {path.parent}; create it first")


def write_report(record: dict[str, Any], path: Path) -> None:
    """Write the record as JSON and, if it has a confusion matrix, the picture beside it, as ``.png``.

    Raises:
        UserError: They cannot be written.
    """
    _write(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    if "confusion" in record:
        name = record.get("engine") or record["weights"]
        title = f"{name}  split {record['split']}: top-1 {100 * record['top1']:.1f} % of {record['clips']} clips"
        picture = draw_confusion(record["confusion"]["labels"], np.array(record["confusion"]["matrix"]), title)
        _write(path.with_suffix(".png"), cv2.imencode(".png", picture)[1].tobytes())


def report_lines(record: dict[str, Any]) -> Iterator[str]:
    """The whole record, for people."""
    if "engine" in record:
        yield f"engine   {record['engine']}  sha256 {record['engine_sha256'][:12]}"
    else:
        yield f"weights  {record['weights']}  sha256 {record['weights_sha256'][:12]}"
    if "cost" in record:
        yield from _cost_lines(record["cost"])
    if "top1" in record:
        yield from _accuracy_lines(record)
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
    if "untrimmed" in record:
        yield from event_lines(record["untrimmed"])


def _cost_lines(cost: dict[str, Any]) -> Iterator[str]:
    flops = [
        f"{cost[key] / 1e9:.3g} GFLOPs a {key.removesuffix('_flops')}"
        for key in ("step_flops", "view_flops", "video_flops")
        if cost.get(key) is not None
    ]
    yield f"cost     {cost['parameters'] / 1e6:.2f} M parameters, {', '.join(flops)} (a multiply-add is 2)"


def _accuracy_lines(record: dict[str, Any]) -> Iterator[str]:
    data = f"{record['dataset']}, split" if "dataset" in record else "split"
    part = record.get("part", "test")
    if "views" in record:
        views = record["views"]
        yield (
            f"protocol {record['protocol']}: {views['clips']} x {views['crops']} views of {views['frames']} frames, "
            f"{views['width']}x{views['height']}, their logits averaged"
        )
        yield f"{data:<8} {record['split']}, {record['clips']} {part} clips"
    else:
        yield f"{data:<8} {record['split']}, {record['clips']} {part} clips, prediction at the last frame"
    yield f"top-1    {100 * record['top1']:.1f} %"
    yield f"top-5    {100 * record['top5']:.1f} %"
    yield f"classes  {100 * record['mean_class_accuracy']:.1f} % mean accuracy of a class"
    yield f"ECE      {100 * record['calibration_error']:.1f} % expected calibration error"
    if "settles" in record:
        settles = record["settles"]
        yield f"settles  median at frame {settles['median_frame']:g}, 90 % by {settles['p90_frame']:g}"
    if record["missing"]:
        yield f"missing  {len(record['missing'])} videos that the annotations list, such as {record['missing'][0]}"
    for each in record["unreadable"]:
        yield f"left out {each['reason']}"
    yield f"  {'':<40} {'recall':>8} {'precision':>9} {'clips':>6}"
    for label, row in sorted(record["per_class"].items(), key=lambda item: -item[1]["recall"]):
        precision = "-" if row["precision"] is None else f"{100 * row['precision']:.1f} %"
        yield f"  {label:<40} {100 * row['recall']:>6.1f} % {precision:>9} {row['clips']:>6}"


def _silence_line(silence: dict[str, Any]) -> str:
    labels = ", ".join(f"{event['label']} at {event['start']:.1f} s" for event in silence["events"])
    count = len(silence["events"])
    return (
        f"{count} event{'' if count == 1 else 's'} in {silence['seconds'] / 60:.2f} min "
        f"({silence['events_per_minute']:.2f} per minute)" + (f": {labels}" if labels else "")
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"the report {path} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
