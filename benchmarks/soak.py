"""Run two cameras that lose their connections again and again, as fast as it goes, and watch what grows.

The cameras show a video file, which is opened anew at each connection and read as fast as the engine makes steps of it:
100,000 steps are 2 h 47 min of a camera at 10 steps per second. The network is the default one with a small input, so
that it takes minutes (needs the extra 'build'); with ``--engine`` it is that one. Resident memory, threads and open
files are looked at after each hundredth. It fails if memory is not flat within 2 % after the warm-up, or if a thread or
a descriptor is left:

    python benchmarks/soak.py
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.cameras import Camera, Cameras
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError, report
from stsm_rt.recognizer import Recognizer
from stsm_rt.run_counts import Metrics
from stsm_rt.video.captures import silence_opencv
from stsm_rt.video.live import LiveSource, Patience
from stsm_rt.video.result_files import Rotation
from stsm_rt.video.sinks import JsonLinesSink
from stsm_rt.video.source import OnChange, Source

STEPS = 100_000
WARM_UP = 0.2  # share of the steps
GROWTH = 0.02  # of resident memory, at the most
_WEIGHTS = Path("engines/actions_lite0.safetensors")
_HEIGHT, _WIDTH = 32, 64  # of the small network's input
_LOOKS = 100
_CAMERAS = 2
_ROTATION = Rotation(size=2_000_000)


class _Connection:
    """A capture of a video that breaks off after so many frames, and waits until the engine wants one more."""

    def __init__(self, video: Path, frames: int, turn: threading.Semaphore) -> None:
        self._path, self._left, self._turn = str(video), frames, turn
        self._capture = cv2.VideoCapture(self._path, cv2.CAP_FFMPEG)

    def grab(self) -> bool:
        if not self._left:
            return False
        self._left -= 1
        self._turn.acquire(timeout=0.5)
        return self._capture.grab() or (self._capture.set(cv2.CAP_PROP_POS_FRAMES, 0) and self._capture.grab())

    def retrieve(self) -> tuple[bool, npt.NDArray[Any]]:
        return self._capture.retrieve()

    def get(self, what: int) -> float:
        return self._capture.get(what)

    def isOpened(self) -> bool:
        return self._capture.isOpened()

    def release(self) -> None:
        self._capture.release()


def soak(engine: Engine, video: Path, folder: Path, *, steps: int, connection: int) -> dict[str, Any]:
    """Make steps with two cameras and look at the process meanwhile.

    Args:
        engine: Open, with two slots.
        video: What the cameras show.
        folder: Where the results are written.
        steps: Number of steps, of both together.
        connection: Frames after which a connection breaks off.

    Returns:
        What was seen.
    """
    before = _threads(), _descriptors()
    turns = [threading.Semaphore(2) for _ in range(_CAMERAS)]

    def opened(turn: threading.Semaphore) -> Callable[[OnChange], Source]:
        patience = Patience(first_delay=0.005, longest_delay=0.01, healthy_after=0.0)
        connect = lambda: cast(cv2.VideoCapture, _Connection(video, connection, turn))  # noqa: E731
        return lambda on_change: LiveSource(None, video.name, connect=connect, patience=patience, on_change=on_change)

    # At every frame, whatever time it is: the cameras are far faster than real ones.
    rate = engine.manifest.frame_rate
    cameras = [
        Camera(str(slot), Recognizer(engine, slot=slot, every_frame=rate, patience=5), opened(turn))
        for slot, turn in enumerate(turns)
    ]
    metrics = Metrics()
    made, changes, looks = 0, 0, []
    begin = perf_counter()
    with (
        JsonLinesSink(folder / "soak.jsonl", live=True, rotate=_ROTATION) as lines,
        Cameras(cameras, on_frame=lambda camera: metrics.camera(camera.name).frame(camera.dropped)) as running,
    ):
        while (news := running.take(1.0)) is not None:
            for item in news:
                if item.change is not None:
                    changes += 1
                    lines.write(item.change.to_record())
                if item.result is not None:
                    made += 1
                    turns[int(item.camera.name)].release()
                    metrics.camera(item.camera.name).step(item.result.latency)
                    lines.write(item.result.to_record())
            for old in folder.glob("soak-*.jsonl"):
                old.unlink()
            if made >= steps * (len(looks) + 1) / _LOOKS:
                looks.append({"steps": made, "resident": _resident(), "threads": _threads()})
            if made >= steps:
                running.stop()
    seconds = perf_counter() - begin
    end = perf_counter() + 5
    while (_threads(), _descriptors()) != before and perf_counter() < end:
        gc.collect()
        sleep(0.05)
    settled = [look["resident"] for look in looks[int(WARM_UP * _LOOKS) :]]
    fifth = max(1, len(settled) // 5)
    return {
        "steps": made,
        "seconds": seconds,
        "reconnects": [camera.source.reconnects for camera in cameras],
        "resets": [camera.recognizer.resets for camera in cameras],
        "frames": [camera.frame_count for camera in cameras],
        "changes": changes,
        "growth": float(np.median(settled[-fifth:]) / np.median(settled[:fifth]) - 1),
        "threads": (before[0], _threads()),
        "descriptors": (before[1], _descriptors()),
        "looks": looks,
    }


def verdict(found: dict[str, Any]) -> list[str]:
    """What is wrong, in words; nothing if all is well."""
    wrong = []
    if abs(found["growth"]) > GROWTH:
        wrong.append(f"resident memory changed by {100 * found['growth']:+.1f} % after the warm-up")
    for what in ("threads", "descriptors"):
        before, after = found[what]
        if after > before:
            wrong.append(f"{after - before} {what} are left")
    if min(found["reconnects"]) < 1:
        wrong.append("a camera never lost its connection")
    return wrong


def small_engine(folder: Path) -> Path:
    """Export the default network with a small input, in a process of its own: PyTorch takes a gigabyte.

    Raises:
        UserError: If it cannot be exported.
    """
    path = folder / "small.onnx"
    child = multiprocessing.get_context("spawn").Process(target=_export, args=(path,))
    child.start()
    child.join()
    if child.exitcode:
        raise UserError("the network could not be exported with a small input; see above, or give another --engine")
    return path


def _export(path: Path) -> None:
    from stsm_rt.export import export_engine
    from stsm_rt.manifest import sha256_of
    from stsm_rt.model import load_model

    network, spec = load_model(_WEIGHTS)
    spec = dataclasses.replace(spec, height=_HEIGHT, width=_WIDTH)
    export_engine(network, spec, path, weights_sha256=sha256_of(_WEIGHTS))


def _write_video(path: Path) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (96, 64))
    scene = np.linspace(0, 160, 96, dtype=np.uint8)[None, :, None]
    for noise in np.random.default_rng(0).integers(0, 96, (40, 64, 96, 3), np.uint8):
        writer.write(scene + noise)
    writer.release()
    return path


def _resident() -> float:
    """Resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="engine to run (default: the default network at a small size)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of both cameras together (default: {STEPS})")
    parser.add_argument(
        "--connection", type=int, default=200, help="frames after which a connection breaks off (default: 200)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write what was seen")
    options = parser.parse_args(argv)
    silence_opencv()
    logging.getLogger("stsm_rt").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            path = small_engine(folder) if options.engine is None else options.engine
            engine = Engine.open(path, slots=_CAMERAS)
            video = _write_video(folder / "video.mp4")
            # What the libraries keep for good is there before it is counted.
            soak(engine, video, folder, steps=200, connection=20)
            found = soak(engine, video, folder, steps=options.steps, connection=options.connection)
        except UserError as error:
            return report(error)
    wrong = verdict(found)
    print(
        f"{found['steps']} steps in {found['seconds']:.0f} s, {sum(found['reconnects'])} reconnects, "
        f"{sum(found['resets'])} resets; resident memory {found['looks'][-1]['resident']:.0f} MB, "
        f"{100 * found['growth']:+.2f} % after the warm-up; threads {found['threads'][1] - found['threads'][0]:+d}, "
        f"descriptors {found['descriptors'][1] - found['descriptors'][0]:+d}"
    )
    for line in wrong:
        print(f"WRONG: {line}")
    if options.json is not None:
        options.json.write_text(json.dumps({**found, "wrong": wrong}, indent=1) + "\n", "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
