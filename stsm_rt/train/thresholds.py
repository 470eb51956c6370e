"""The command ``python -m stsm_rt.train.thresholds``: choose smoothing and thresholds on clips held out of training.

It plays the held-out clips of a training list, looped, and streams without an action through an engine that has seen
none of them, keeps the logits, and tries decisions on them: first the smoothing that classifies best, then what each
threshold gives (clips that raise their own event) and costs (events where there is no action). The choice between the
two is a person's, and goes into the recipe's [decision].
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from stsm_rt.decision import Decision
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError, report
from stsm_rt.manifest import DecisionSpec, Manifest
from stsm_rt.recognizer import Sampler
from stsm_rt.still_rooms import still_rooms
from stsm_rt.train.datasets import hold_out, load_jhmdb
from stsm_rt.train.run_data import parse_fold
from stsm_rt.video.fit import fit
from stsm_rt.video.sources import open_source

LOOP_SECONDS = 4.0
_SMOOTHINGS = (1, 3, 6, 10)
_PERCENTS = range(16, 65, 4)
_RELEASE = 0.6  # of the threshold


@dataclass(frozen=True)
class Stream:
    """Logits of a stream.

    Attributes:
        logits: (steps, K).
        label: Its action, None where there is none.
        steps: Of a looped clip, those of its first pass.
    """

    logits: np.ndarray
    label: str | None
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What a decision does on the streams.

    Attributes:
        spec: The decision.
        top1: Share of clips whose label is the decision's at the end of their first pass.
        own: Share of these clips that raise their own event within the loop.
        false: Events in streams without an action.
    """

    spec: DecisionSpec
    top1: float
    own: float
    false: int


def logits_of(engine: Engine, frames: Iterable[tuple[np.ndarray, float]]) -> np.ndarray:
    """Logits (steps, K) of a stream from a fresh state."""
    engine.reset()
    sampler = Sampler(engine.manifest.frame_rate)
    rows = []
    for frame, time in frames:
        if sampler.breaks(time):
            engine.reset()
            sampler.reset()
        if sampler.take(time):
            fit(frame, None, engine.frames[0])
            rows.append(engine.step(engine.frames)[0].copy())
    return np.stack(rows)


def try_decision(streams: Sequence[Stream], manifest: Manifest, spec: DecisionSpec) -> Outcome:
    """Run a decision over recorded logits."""
    clips, hits, own, false = 0, 0, 0, 0
    for stream in streams:
        decision = Decision(manifest.labels, manifest.background, spec, topk=1)
        started, prediction = [], ""
        for index, row in enumerate(stream.logits):
            labels, _, events = decision.update(row, index / manifest.frame_rate, index)
            started += [event.label for event in events if event.end is None]
            if index == stream.steps - 1:
                prediction = labels[0]
        if stream.label is None:
            false += len(started)
            continue
        clips += 1
        if prediction == stream.label:
            hits += 1
            own += stream.label in started
    return Outcome(spec, hits / max(clips, 1), own / max(hits, 1), false)


def best_smoothing(streams: Sequence[Stream], manifest: Manifest) -> int:
    """The smoothing that classifies most clips at the end of their first pass; the shortest of equals."""
    firsts = [Stream(s.logits[: s.steps], s.label, s.steps) for s in streams if s.label is not None]
    plain = [DecisionSpec(smoothing=k, threshold=1, release=1, min_steps=1) for k in _SMOOTHINGS]
    return max((try_decision(firsts, manifest, spec) for spec in plain), key=lambda o: o.top1).spec.smoothing


def curve(streams: Sequence[Stream], manifest: Manifest, *, min_steps: int) -> list[Outcome]:
    """What a decision gives and costs over a range of thresholds, with the best smoothing."""
    smoothing = best_smoothing(streams, manifest)
    return [try_decision(streams, manifest, _spec(smoothing, percent, min_steps)) for percent in _PERCENTS]


def _spec(smoothing: int, percent: int, steps: int) -> DecisionSpec:
    threshold = percent / 100
    return DecisionSpec(
        smoothing=smoothing, threshold=threshold, release=round(threshold * _RELEASE, 3), min_steps=steps
    )


def _looped(frames: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    for index, frame in enumerate(itertools.islice(itertools.cycle(frames), round(LOOP_SECONDS * 30))):
        yield frame, index / 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="stsm_rt.train.thresholds", description=__doc__)
    parser.add_argument("--engine", type=Path, required=True, help="engine trained without the held-out part")
    parser.add_argument("--data", type=Path, required=True, help="J-HMDB folder")
    parser.add_argument("--split", type=int, default=1)
    parser.add_argument("--hold-out", metavar="FOLD/FOLDS", required=True, help="as it was given to train")
    parser.add_argument(
        "--negatives", type=Path, nargs="*", default=[], help="videos without an action, not trained on"
    )
    parser.add_argument("--rooms", type=float, default=5.0, help="minutes of synthetic rooms (default: 5)")
    parser.add_argument("--min-steps", type=int, default=3, help="steps before an event starts (default: 3)")
    options = parser.parse_args(argv)
    try:
        engine = Engine.open(options.engine)
        clips, split = load_jhmdb(options.data, options.split)
        held = hold_out(clips, split.train, *parse_fold(options.hold_out)).test.tolist()
        streams = []
        for index in tqdm(held, unit="clip"):
            frames = clips.frames[index, : clips.lengths[index]].numpy()
            steps = -(-len(frames) * int(engine.manifest.frame_rate) // 30)
            streams.append(Stream(logits_of(engine, _looped(frames)), clips.classes[clips.labels[index]], steps))
        for path in tqdm(options.negatives, unit="video"):
            with open_source(path) as source:
                streams.append(Stream(logits_of(engine, source), None, 0))
        if options.rooms > 0:
            streams.append(Stream(logits_of(engine, still_rooms(options.rooms, seed=1)), None, 0))
        outcomes = curve(streams, engine.manifest, min_steps=options.min_steps)
    except UserError as error:
        return report(error)
    print(f"top-1 {100 * outcomes[0].top1:.1f} % with a smoothing of {outcomes[0].spec.smoothing}")
    print("threshold  clips with their own event  events without an action")
    for outcome in outcomes:
        print(f"{outcome.spec.threshold:9.2f}  {100 * outcome.own:25.1f} %  {outcome.false:24d}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
