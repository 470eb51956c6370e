"""The options of the command ``stsm-rt webcam``, and the file that lists several cameras."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from stsm_rt.delivery import DEAD_LETTERS
from stsm_rt.errors import UserError
from stsm_rt.video.result_files import Rotation

Roi = tuple[int, int, int, int]

_LINE = re.compile(r"(?P<name>[^=\[\]:/]+?)\s*(?:\[(?P<roi>[^\]]*)\]\s*)?=\s*(?P<source>\S.*)")
_FORMAT = "NAME = SOURCE or NAME [X,Y,W,H] = SOURCE"
_PORTS = 65535


@dataclass(frozen=True)
class CameraOption:
    """One of several cameras.

    Attributes:
        name: What to call it.
        source: What ``open_source`` takes.
        roi: Part of its picture to look at, x, y, width, height in pixels; None: all of it.
    """

    name: str
    source: str
    roi: Roi | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for; see ``stsm-rt webcam --help``.

    Attributes:
        cameras: Several cameras, by ``--sources`` or more than one ``--source``; else empty.
        source: The one source; None where none was given, or several.
    """

    cameras: tuple[CameraOption, ...]
    source: str | None
    engine: str | None
    roi: Roi | None
    headless: bool
    save: Path | None
    events: Path | None
    rotate: Rotation | None
    topk: int
    threshold: float | None
    smoothing: int | None
    every_frame: bool
    max_frames: int | None
    max_retries: int | None
    read_timeout: float
    metrics: int | None
    webhook: str | None
    mqtt: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str] | None) -> Options:
    """Read the command line, and the file of cameras if it names one.

    Args:
        argv: The arguments; None means those of the process.

    Raises:
        UserError: If something is wrong with them.
    """
    given = vars(_parser().parse_args(argv))
    sources, file = given.pop("source") or [], given.pop("sources")
    if sources and file:
        raise UserError("--sources lists the cameras, so --source cannot be given beside it; add it to the file")
    cameras = read_cameras(file) if file else ()
    if len(sources) > 1:
        cameras = tuple(CameraOption(f"camera {number}", source) for number, source in enumerate(sources, 1))
    options = Options(**given, cameras=cameras, source=sources[0] if len(sources) == 1 else None)
    _check(options, [*sources, *(camera.source for camera in cameras), *([file] if file else [])])
    return options


def _parser() -> _Parser:
    parser = _Parser(
        prog="stsm-rt webcam",
        description="Recognize actions in cameras, videos, streams or folders of images, frame by frame.",
        epilog="Keys in the window: q quits, r resets, space pauses (one camera), s takes a snapshot.",
    )
    parser.add_argument("--engine", metavar="FILE", help="engine to run (default: the embedded one)")
    parser.add_argument(
        "--source",
        metavar="0|FILE|DIR|URL|-",
        action="append",
        help="camera index or device, video file, folder of images, rtsp/http URL, GStreamer pipeline, or - for a "
        "YUV4MPEG2 stream on standard input (default: camera 0, or the sample clip where there is none); given again, "
        "one more camera on the same engine",
    )
    parser.add_argument(
        "--sources",
        metavar="FILE",
        help=f"file that lists several cameras, one a line: {_FORMAT}, the numbers being the part of the picture to "
        "look at; lines that begin with # are comments",
    )
    parser.add_argument("--roi", metavar="X,Y,W,H", type=_roi, help="part of the picture to look at, in pixels")
    parser.add_argument("--headless", action="store_true", help="open no window")
    parser.add_argument("--save", metavar="OUT.mp4", type=Path, help="write the annotated video, of several the mosaic")
    parser.add_argument(
        "--events", metavar="OUT.jsonl", type=Path, help="write results, events and what sources do as JSON lines"
    )
    parser.add_argument(
        "--rotate",
        metavar="SIZE|TIME",
        type=_rotation,
        help="go on in new files of --save and --events when they reach a size (100MB) or an age (1h)",
    )
    parser.add_argument("--topk", metavar="K", type=int, default=3, help="labels in each result (default: 3)")
    parser.add_argument("--threshold", metavar="T", type=float, help="score from 0 to 1 that starts an event")
    parser.add_argument("--smoothing", metavar="N", type=int, help="steps over which the scores are averaged")
    parser.add_argument(
        "--every-frame", action="store_true", help="decide on every frame, not only at the model's frame rate"
    )
    parser.add_argument("--max-frames", metavar="N", type=int, help="stop after N frames (of each camera)")
    parser.add_argument(
        "--max-retries",
        metavar="N",
        type=int,
        help="attempts to connect a live source again before it has failed (default: no end)",
    )
    parser.add_argument(
        "--read-timeout",
        metavar="S",
        type=float,
        default=10.0,
        help="seconds without a frame after which a live source is connected again (default: 10)",
    )
    parser.add_argument(
        "--metrics", metavar="PORT", type=int, help="serve /metrics (Prometheus) and /healthz on this machine's PORT"
    )
    parser.add_argument("--webhook", metavar="URL", help="send each event there as JSON by HTTP POST")
    parser.add_argument("--mqtt", metavar="URL", help="publish each event, mqtt://[USER:PASSWORD@]HOST/TOPIC")
    return parser


def read_cameras(path: str) -> tuple[CameraOption, ...]:
    """Read a file of cameras.

    Args:
        path: UTF-8 text, with a byte order mark or without, one camera a line, ``NAME = SOURCE`` or
            ``NAME [X,Y,W,H] = SOURCE``; empty lines, and those that begin with ``#``, are comments.

    Raises:
        UserError: If it cannot be read, a line is none of these, a name is there twice, or there is no camera.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text; give a file that lists cameras, one a line: {_FORMAT}") from error
    except OSError as error:
        raise UserError(f"the file of cameras {path} cannot be read ({error.strerror})") from error
    found: dict[str, tuple[int, CameraOption]] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise UserError(f"line {number} of {path} must be {_FORMAT}, not {line!r}")
        name = parts["name"].strip()
        if name in found:
            raise UserError(
                f"line {number} of {path} names {name!r} once more, which line {found[name][0]} is; "
                "give each camera a name of its own"
            )
        try:
            roi = None if parts["roi"] is None else _roi(parts["roi"])
        except argparse.ArgumentTypeError as error:
            raise UserError(f"in line {number} of {path}, {error}") from error
        found[name] = number, CameraOption(name, parts["source"], roi)
    if not found:
        raise UserError(f"{path} lists no camera; write one a line: {_FORMAT}")
    return tuple(camera for _, camera in found.values())


def _check(options: Options, inputs: Sequence[str]) -> None:
    if options.max_frames is not None and options.max_frames < 1:
        raise UserError(f"--max-frames must be at least 1, not {options.max_frames}")
    if options.metrics is not None and not 0 <= options.metrics <= _PORTS:
        raise UserError(f"--metrics takes a port from 0 to {_PORTS}, not {options.metrics}")
    if options.cameras and options.roi:
        raise UserError(
            "--roi is the region of one camera; with several, list them in a file for --sources, a line each: "
            "NAME [X,Y,W,H] = SOURCE"
        )
    if options.cameras and options.every_frame:
        raise UserError("--every-frame decides at the frame rate of one source; leave it out with several cameras")
    if sum(source == "-" for source in inputs) > 1:
        raise UserError("there is one standard input, so only one source can be -")
    if options.rotate and not (options.save or options.events):
        raise UserError("--rotate is for the files of --save and --events; give one of them")
    outputs = [os.path.realpath(path) for path in (options.save, options.events) if path]
    if len({*outputs} - {*map(os.path.realpath, inputs)}) < len(outputs) or len({*outputs}) < len(outputs):
        raise UserError("--save, --events and --source must be different files")
    if (options.webhook or options.mqtt) and os.path.realpath(DEAD_LETTERS) in outputs:
        raise UserError(
            f"{DEAD_LETTERS} is where --webhook and --mqtt leave what could not be delivered; "
            "give another file to --events and --save"
        )


def _rotation(text: str) -> Rotation:
    try:
        return Rotation.parse(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _roi(text: str) -> Roi:
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"x,y,w,h in whole pixels were expected, for example 40,0,320,240, not {text!r}"
        ) from None
    return x, y, width, height
