"""The command that prints what an engine is: its manifest, its states and their sizes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stsm_rt.engine import embedded_engine
from stsm_rt.errors import UserError, report
from stsm_rt.manifest import Manifest, StateSpec

_UNITS = ("bytes", "KiB", "MiB", "GiB")


def main(argv: Sequence[str] | None = None) -> int:
    """Print an engine's manifest, states and sizes as a table.

    Args:
        argv: Arguments of the command; None means those of the process.

    Returns:
        0, or 2 if the engine or its manifest is absent, damaged or does not match.
    """
    parser = argparse.ArgumentParser(prog="stsm-rt inspect", description="Print what an engine is.")
    parser.add_argument("engine", nargs="?", metavar="FILE", help="engine file (default: the embedded engine)")
    arguments = parser.parse_args(argv)
    try:
        path = Path(arguments.engine) if arguments.engine else embedded_engine()
        manifest = Manifest.load(path)
        size = path.stat().st_size
    except UserError as error:
        return report(error)
    print(describe(manifest, path, size))
    return 0


def describe(manifest: Manifest, path: Path, size: int) -> str:
    """Return a readable table of an engine.

    Args:
        manifest: The engine's manifest.
        path: The engine file.
        size: Size of the engine file in bytes.

    Returns:
        Lines without a newline at the end.
    """
    decision = manifest.decision
    rows = [
        ("engine", f"{path} ({_size(size)})"),
        ("network", f"{manifest.network}, shift {_shift(manifest)}"),
        (
            "runtime",
            f"{manifest.runtime} {manifest.runtime_version} on {manifest.device}, {manifest.precision}",
        ),
        (
            "input",
            f"frame uint8 {manifest.batch} x {manifest.input_height} x {manifest.input_width} x 3 (BGR), "
            f"{manifest.frame_rate:g} per second",
        ),
        *([("in the graph", _pairs(manifest.preprocessing))] if manifest.preprocessing else []),
        ("labels", f"{len(manifest.labels)}: {', '.join(manifest.labels)}"),
        ("background", manifest.background or "none"),
        (
            "decision",
            f"mean of {decision.smoothing} steps, starts at {decision.threshold:g} for {decision.min_steps} "
            f"steps, ends below {decision.release:g}, temperature {decision.temperature:g}",
        ),
        ("calibration", _pairs(manifest.calibration)),
        ("accuracy", _pairs(manifest.accuracy)),
        ("sha256", manifest.sha256),
        ("weights", manifest.weights_sha256),
        ("format", str(manifest.format_version)),
    ]
    table = [f"{name:<14}{value}" for name, value in rows]
    total = sum(_state_bytes(state) for state in manifest.states)
    table += ["", f"states: {len(manifest.states)}, {_size(total)} per slot"]
    if manifest.states:
        cells = [("name", "dtype", "shape", "delay", "buffers")]
        cells += [
            (
                state.name,
                state.dtype,
                " x ".join(map(str, state.shape)),
                str(state.delay),
                f"{state.delay + 1} of {_size(_state_bytes(state) // (state.delay + 1))}",
            )
            for state in manifest.states
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(table)


def _state_bytes(state: StateSpec) -> int:
    return math.prod(state.shape) * np.dtype(state.dtype).itemsize * (state.delay + 1)


def _shift(manifest: Manifest) -> str:
    groups = [
        f"{group.get('fraction')} at ({group.get('dt')}, {group.get('dh')}, {group.get('dw')})"
        for group in manifest.shift["groups"]
    ]
    form = {"none": "", "depthwise": "; as depthwise convolutions", "split": "; streams split"}[manifest.folding]
    return f"{manifest.shift['name']}: {', '.join(groups)}{form}" if groups else str(manifest.shift["name"])


def _pairs(values: dict[str, object] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) if values else "none"


def _size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[0]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


if __name__ == "__main__":
    sys.exit(main())
