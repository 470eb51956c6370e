"""The command that times the steps of engines, side by side, and the whole loop.

``stsm_rt.timing`` says how: blocks in turns, ratios pair by pair, a bootstrap interval of their median. Engines are
given, or built in a temporary folder beside the networks that they are compared with.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stsm_rt.bench_run import Group, time_group
from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.errors import UserError, report
from stsm_rt.machine import Quiet, machine, machine_lines, quiet_line, versions
from stsm_rt.manifest import Manifest
from stsm_rt.timing import Comparison, Run, compare, time_engines

# Also for those that time engines of their own.
__all__ = ["Comparison", "Run", "compare", "main", "time_engines"]

_LIVE_SHARE = 10  # of --frames, as a camera takes real time
_BUILDING = ("precision", "runtime", "shift", "size", "calibration", "exclude_layer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        0, or 2 if something that was given cannot be used.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("pairs", "frames"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    try:
        _check(options)
        record = {"command": shlex.join(["python", "-m", "stsm_rt.bench", *arguments])} | _bench(options)
        if options.json is not None:
            _write(options.json, json.dumps(record, indent=2) + "\n")
        if options.plot is not None:
            from stsm_rt.bench_plot import plot

            plot(record["comparisons"], machine_lines(record)[0], options.plot)
    except UserError as error:
        return report(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stsm-rt bench",
        description="Time the steps of engines, side by side, and the whole loop, on this machine.",
    )
    add = parser.add_argument
    add(
        "--engine",
        action="append",
        type=Path,
        metavar="FILE",
        help="engine file (default: the embedded engine); give it again to compare with the first",
    )
    add("--network", action="append", help="build an engine of this network; give it again for another run of turns")
    add("--precision", choices=("fp32", "int8"), help="of what is built (default: fp32)")
    add("--runtime", choices=("onnxruntime", "openvino"), help="of what is built (default: onnxruntime)")
    add("--shift", help="of what is built (default: stsm_online)")
    add("--size", type=_size, metavar="HxW", help="of random weights' input, or one number (default: 224)")
    add("--weights", type=Path, help="weights that stsm-rt train wrote (default: shipped ones, else random ones)")
    add("--calibration", type=Path, metavar="DIR|FILE", help="videos for INT8 (default: recorded ranges, else noise)")
    add("--exclude-layer", action="append", metavar="PATTERN", help="leave layers out of INT8 (default: as recorded)")
    add(
        "--against",
        action="append",
        choices=("plain", "naive", "self"),
        help="compare with the network without the shift, of the same weights, runtime and precision; with the shift "
        "as slices and pads; or with the same engine again, which should give 1",
    )
    add("--pairs", type=int, default=30, help="blocks of each engine, repetitions of --loop (default: 30)")
    add(
        "--loop", type=Path, metavar="FILE", help="measure the whole loop, too, on this video, with as many repetitions"
    )
    add("--frames", type=int, default=10_000, help="of --loop, for memory; live a tenth (default: 10000)")
    add("--json", type=Path, metavar="OUT", help="write all numbers here")
    add("--plot", type=Path, metavar="OUT", help="draw the comparisons here (.png or .svg)")
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or int(match[1]) < 32 or int(match[2] or 32) < 32:
        raise argparse.ArgumentTypeError(f"height x width of at least 32 pixels, like 224 or 224x288, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured or written before anything is measured."""
    for out, what in ((options.json, "times"), (options.plot, "plot")):
        if out is not None and not out.absolute().parent.is_dir():
            raise UserError(f"the {what} cannot be written to {out}: there is no folder {out.parent}; create it first")
    if options.plot is not None:
        if options.plot.suffix not in (".png", ".svg"):
            raise UserError(f"a plot is a .png or an .svg file, not {options.plot}")
        if not importlib.util.find_spec("matplotlib"):
            raise UserError("--plot needs matplotlib, which is not installed; run pip install 'stsm-rt[bench]'")
        if not options.against and len(options.engine or ()) < 2:
            raise UserError("--plot draws comparisons; give a second --engine, or --against")
    if options.loop is not None:
        if len(options.engine or options.network or [0]) > 1:
            raise UserError("--loop measures one engine; give one --engine or one --network with it")
        if not options.loop.is_file():
            raise UserError(f"there is no video {options.loop}; give --loop a video file")
    if options.engine and options.network:
        raise UserError("--engine times what is built and --network builds; give one of them")
    if not (options.engine or options.network or options.weights):
        options.engine = [embedded_engine()]
    for path in options.engine or ():
        Manifest.load(path)
    refused = []
    if options.engine:
        refused = [*_BUILDING, *([] if options.against else ["weights"])]
    elif options.precision != "int8":
        refused = ["calibration", "exclude_layer"]
    for name in refused:
        if getattr(options, name) is not None:
            flag, wanted = f"--{name.replace('_', '-')}", "--network" if options.engine else "--precision int8"
            raise UserError(f"{flag} is for what is built with {wanted}; add that, or leave {flag} out")


def _bench(options: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {"machine": machine(), "versions": versions(), "runs": [], "comparisons": [], "floors": []}
    print("\n".join(machine_lines(record)), flush=True)
    quiet = Quiet()
    with tempfile.TemporaryDirectory() as folder:
        for group in _groups(options, Path(folder)):
            timed = time_group(group, options.pairs)
            print("\n" + "\n".join(timed.lines()), flush=True)
            record["runs"] += [asdict(run) for run in timed.runs]
            record["comparisons"] += [asdict(comparison) for comparison in timed.comparisons]
            record["floors"].append(timed.floor_record())
            if options.loop is not None:
                subject = group.contenders[group.subject].path
                record["loop"] = _loop(subject, timed.runs[group.subject].median, options)
    record["machine"]["quiet"] = quiet.record()
    print("\n" + quiet_line(record["machine"]["quiet"]))
    return record


def _groups(options: argparse.Namespace, folder: Path) -> Iterator[Group]:
    """The engines of each run, built one run after the other."""
    against = options.against or []
    if options.engine and not set(against) - {"self"}:
        yield Group.of_files(options.engine, again=bool(against))
        return
    try:
        from stsm_rt import bench_build
    except ModuleNotFoundError as error:
        raise UserError(
            f"building an engine needs {error.name}, which is not installed; run pip install 'stsm-rt[build]', or time "
            "engines that are built with --engine"
        ) from error
    of_network = functools.partial(
        bench_build.subject_of_network,
        runtime=options.runtime or "onnxruntime",
        precision=options.precision or "fp32",
        shift=options.shift or "stsm_online",
        size=options.size,
        weights=options.weights,
        calibration=options.calibration,
        exclude=options.exclude_layer or (),
    )
    of_engine = functools.partial(bench_build.subject_of_engine, weights=options.weights)
    subjects = map(of_engine, options.engine) if options.engine else map(of_network, options.network or [None])
    for number, subject in enumerate(subjects):
        place = folder / str(number)
        place.mkdir()
        yield subject.group(against, place)


def _loop(path: Path, step: float, options: argparse.Namespace) -> dict[str, Any]:
    from stsm_rt import bench_loop  # machines that only time steps need no OpenCV

    engine = Engine.open(path, slots=Manifest.load(path).batch)
    file = bench_loop.time_file(engine, options.loop, options.pairs)
    live = bench_loop.time_live(engine, options.loop, max(1, options.frames // _LIVE_SHARE), step)
    memory = bench_loop.watch_memory(engine, options.loop, options.frames)
    print("\n" + "\n".join(bench_loop.loop_lines(file, live, memory)), flush=True)
    return {"file": asdict(file), "live": asdict(live), "memory": asdict(memory) if memory else None}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"the times cannot be written to {path} ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
