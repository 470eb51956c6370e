"""Videos as people upload them, made with PyAV, and what the command line says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from clips import Frame, plain

ROOT = Path(__file__).parents[2]
SIZE = (320, 240)


def acting(colour: str = "green", size: tuple[int, int] = SIZE) -> list[Frame]:
    """Four seconds at 30 frames/s: black, three quarters of it in a colour from 1 to 3 s, black."""
    coloured = plain(colour, 60, size)
    for frame in coloured:
        frame[:, : size[0] // 4] = 0
    return plain("black", 30, size) + coloured + plain("black", 30, size)


def encode(
    path: Path,
    frames: Iterable[Frame],
    *,
    rate: int = 30,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    file_format: str | None = None,
) -> Path:
    """Encode a video; an MP4 has its index in front, so that something is left of it when it is cut.

    `times` are those of the frames in seconds, `rotation` the counter-clockwise degrees of the display matrix.
    """
    options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", format=file_format, options=options) as container:
        stream: Any = None
        for index, picture in enumerate(frames):
            if stream is None:
                stream = container.add_stream("libx264", rate=rate)
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"preset": "ultrafast"}
                stream.codec_context.time_base = Fraction(1, 90_000 if times else rate)
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(picture, "bgr24")
            frame.pts = round(times[index] * 90_000) if times else index
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file without what differs from run to run."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "latency"} for line in lines]


def command_line(video: Path, folder: Path, *options: object) -> list[dict[str, Any]]:
    """What the command writes for a video, without the changes of its source's state."""
    out = folder / "command-line.jsonl"
    command = [sys.executable, ROOT / "demo" / "webcam.py", "--headless", "--source", video, "--events", out, *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment(), timeout=120)
    found = [record for record in records(out) if record["kind"] != "source"]
    out.unlink()
    return found


def environment() -> dict[str, str]:
    """The variables of a process that finds stsm_rt."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
