"""Measure what several cameras cost on one engine, and whether each gets its share.

A video file plays as so many cameras at once, each at 15 frames per second; what each gets and what all cost is
measured for 1, 2, 4 and 8 of them. With ``--batch``, a graph that makes the steps of several cameras at once is
compared with as many steps one by one, in turns (needs the extra 'build'). Run it on a quiet machine:

    python benchmarks/make_video.py out/loop.mp4      # once; needs PyAV
    python benchmarks/cameras.py --video out/loop.mp4 --batch 2 --batch 4 --batch 8 \
        --json benchmarks/results/cameras.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast

import cv2
import numpy as np

from stsm_rt.cameras import Camera, Cameras
from stsm_rt.endless_video import EndlessCapture
from stsm_rt.engine import Engine
from stsm_rt.engine.base import embedded_engine
from stsm_rt.errors import UserError, report
from stsm_rt.machine import Quiet, machine, quiet_line, versions
from stsm_rt.recognizer import Recognizer
from stsm_rt.timing import Candidate, Comparison, time_in_turns
from stsm_rt.video.live import LiveSource
from stsm_rt.video.source import OnChange, Source

_WEIGHTS = Path("engines/actions_lite0.safetensors")


def serve(engine: Engine, video: Path, *, rate: float, seconds: float) -> dict[str, Any]:
    """Play a video as a camera for each slot of an engine.

    Args:
        engine: Open.
        video: What every camera shows.
        rate: Its frames per second.
        seconds: How long.

    Returns:
        Processor time of the process in seconds, the clock's, and for each camera what it got.
    """

    def opened(on_change: OnChange) -> Source:
        capture = EndlessCapture(video, round(rate * seconds), rate=rate)
        return LiveSource(cast(cv2.VideoCapture, capture), video.name, on_change=on_change)

    latencies: dict[str, list[float]] = defaultdict(list)
    came: dict[str, list[float]] = defaultdict(list)
    cameras = [Camera(str(slot + 1), Recognizer(engine, slot=slot), opened) for slot in range(engine.slots)]
    begin = process_time(), perf_counter()
    with Cameras(cameras) as running:
        while (news := running.take(1.0)) is not None:
            for item in news:
                if item.result is not None:
                    latencies[item.camera.name].append(item.result.latency)
                    came[item.camera.name].append(perf_counter())
    processor, wall = process_time() - begin[0], perf_counter() - begin[1]
    return {
        "cameras": engine.slots,
        "processor": processor,
        "wall": wall,
        "each": [
            {
                "name": camera.name,
                "given": camera.frame_count + camera.source.dropped,
                "frames": camera.frame_count,
                "dropped": camera.dropped,
                "steps": len(latencies[camera.name]),
                "latency_median": float(np.median(latencies[camera.name])),
                "latency_p95": float(np.percentile(latencies[camera.name], 95)),
                "latency_max": max(latencies[camera.name]),
                "longest_wait": float(np.diff(came[camera.name]).max()) if len(came[camera.name]) > 1 else wall,
            }
            for camera in cameras
        ],
    }


def compare_batch(weights: Path, batch: int, pairs: int, folder: Path) -> Comparison:
    """Compare a graph of a batch with as many steps of a graph of batch 1, in turns.

    Raises:
        UserError: As ``export_engine`` does.
    """
    from stsm_rt.export import export_engine
    from stsm_rt.manifest import sha256_of
    from stsm_rt.model import load_model

    network, spec = load_model(weights)
    paths = [folder / f"batch{size}.onnx" for size in (1, batch)]
    for path, size in zip(paths, (1, batch), strict=True):
        if not path.exists():
            export_engine(network, spec, path, weights_sha256=sha256_of(weights), batch=size)
    engines = [Engine.open(path, slots=batch) for path in paths]
    frames = np.random.default_rng(0).integers(0, 256, engines[1].frames.shape, np.uint8)
    engines[1].frames[:] = frames
    steps = [functools.partial(engines[0].step, frames), functools.partial(engines[1].step, engines[1].frames)]
    times = time_in_turns([Candidate(step=step, warm_up=1, counted=3) for step in steps], pairs)
    one_by_one, together = (np.array([np.median(block) for block in blocks]) for blocks in times)
    return Comparison.of(f"{batch} cameras one by one", f"{batch} cameras in one batch", together / one_by_one)


def lines(run: dict[str, Any]) -> list[str]:
    """What was measured with one number of cameras, for people."""
    each = run["each"]
    steps, waits = [camera["steps"] for camera in each], [camera["longest_wait"] for camera in each]
    return [
        f"{run['cameras']} camera{'s' if run['cameras'] > 1 else ''}: "
        f"{run['processor'] / run['wall']:.2f} cores, {min(steps)} to {max(steps)} steps each in {run['wall']:.1f} s, "
        f"longest wait {max(waits):.2f} s",
        *(
            f"    {camera['name']}: {camera['given']} frames, {camera['dropped']} dropped, {camera['steps']} steps, "
            f"latency median {1000 * camera['latency_median']:.1f} ms, p95 {1000 * camera['latency_p95']:.1f} ms"
            for camera in each
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, required=True, help="what every camera shows")
    parser.add_argument("--engine", help="engine to run (default: the embedded one)")
    parser.add_argument("--cameras", type=int, action="append", metavar="N", help="numbers (default: 1, 2, 4, 8)")
    parser.add_argument("--rate", type=float, default=15.0, help="frames per second of each (default: 15)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of cameras (default: 60)")
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="compare a graph of this batch")
    parser.add_argument("--weights", type=Path, default=_WEIGHTS, help=f"for --batch (default: {_WEIGHTS})")
    parser.add_argument("--pairs", type=int, default=40, help="blocks of each for --batch (default: 40)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the raw numbers")
    options = parser.parse_args(argv)
    path = embedded_engine() if options.engine is None else Path(options.engine)
    quiet, runs, comparisons = Quiet(), [], []
    try:
        for count in options.cameras or (1, 2, 4, 8):
            engine = Engine.open(path, slots=count)
            runs.append(serve(engine, options.video, rate=options.rate, seconds=options.seconds))
            print("\n".join(lines(runs[-1])), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for batch in options.batch or ():
                comparisons.append(compare_batch(options.weights, batch, options.pairs, Path(folder)))
                print(comparisons[-1].line(), flush=True)
    except UserError as error:
        return report(error)
    shares = quiet.record()
    print(quiet_line(shares))
    if options.json is not None:
        record = {
            "command": f"python benchmarks/cameras.py {shlex.join(sys.argv[1:] if argv is None else argv)}",
            "machine": {**machine(), "quiet": shares},
            "versions": versions(),
            "engine": path.name,
            "rate": options.rate,
            "several": runs,
            "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
