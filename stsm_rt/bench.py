"""The command that times the steps of engines, side by side.

The speed of a machine drifts while it is measured, so engines take turns in short blocks, in an order that is
turned round from pair to pair, and what is compared are the medians of two neighbouring blocks. Switching to
another engine empties the caches, which a live loop never does, so each block's first steps are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import stsm_rt
from stsm_rt.engine import Engine, embedded_engine
from stsm_rt.errors import UserError, report
from stsm_rt.manifest import Manifest

WARM_UP_STEPS = 8
BLOCK_STEPS = 24


@dataclass(frozen=True)
class Run:
    """Times of one engine.

    Attributes:
        engine: The engine file's name.
        sha256: SHA-256 of the engine file.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        input: Height and width of the input in pixels.
        steps: Number of steps that were counted.
        median: Median time of a step, of all rows of the batch, in seconds.
        min: Shortest time of a step in seconds.
        p95: 95th percentile of the times in seconds.
        blocks: Median time of each block in seconds, in the order of the pairs.
    """

    engine: str
    sha256: str
    precision: str
    input: tuple[int, int]
    steps: int
    median: float
    min: float
    p95: float
    blocks: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """How much longer a step of one engine takes than a step of another.

    Attributes:
        a: Name of the engine that is compared with, the first one given.
        b: Name of the other engine.
        ratio_median: Median over the pairs of b's block median divided by a's.
        ratio_min: Smallest of these ratios.
        ratio_max: Largest of these ratios.
        pairs: Number of pairs.
    """

    a: str
    b: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    pairs: int


def time_engines(engines: Sequence[Engine], names: Sequence[str], pairs: int) -> list[Run]:
    """Time engines in blocks, in turns.

    Args:
        engines: Open engines with as many slots as their batch.
        names: Their names.
        pairs: Number of blocks of each engine.

    Returns:
        The times of each engine.
    """
    rng = np.random.default_rng(0)
    for engine in engines:
        engine.frames[:] = rng.integers(0, 256, engine.frames.shape, np.uint8)
    times: list[list[list[float]]] = [[] for _ in engines]
    for pair in range(pairs):
        order = range(len(engines)) if pair % 2 == 0 else reversed(range(len(engines)))
        for index in order:
            times[index].append(_block(engines[index]))
    return [_run(*row) for row in zip(engines, names, times, strict=True)]


def compare(a: Run, b: Run) -> Comparison:
    """Compare two runs block by block.

    Args:
        a: The run that is compared with.
        b: The other run, of as many blocks.

    Returns:
        The ratios b / a.
    """
    ratios = np.array(b.blocks) / np.array(a.blocks)
    return Comparison(
        a.engine, b.engine, float(np.median(ratios)), float(ratios.min()), float(ratios.max()), len(ratios)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        0, or 2 if something that was given cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="stsm-rt bench", description="Time the steps of engines, side by side, on this machine."
    )
    parser.add_argument(
        "--engine",
        action="append",
        type=Path,
        metavar="FILE",
        help="engine file (default: the embedded engine); give it again to compare with the first",
    )
    parser.add_argument("--pairs", type=int, default=30, help="blocks of each engine (default: 30)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers here")
    arguments = parser.parse_args(argv)
    if arguments.pairs < 1:
        parser.error(f"--pairs must be at least 1, not {arguments.pairs}")
    try:
        _bench(arguments.engine or [embedded_engine()], arguments.pairs, arguments.json)
    except UserError as error:
        return report(error)
    return 0


def _bench(paths: Sequence[Path], pairs: int, out: Path | None) -> None:
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"the times cannot be written to {out}: there is no folder {out.parent}; create it first")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = time_engines([_open(path) for path in paths], names, pairs)
    comparisons = [compare(runs[0], run) for run in runs[1:]]
    record = {
        "machine": _machine(),
        "versions": _versions(),
        "runs": [asdict(run) for run in runs],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    print("\n".join(_lines(record, runs, comparisons)))
    if out is not None:
        _write(out, json.dumps(record, indent=2) + "\n")


def _open(path: Path) -> Engine:
    return Engine.open(path, slots=Manifest.load(path).batch)


def _block(engine: Engine) -> list[float]:
    for _ in range(WARM_UP_STEPS):
        engine.step(engine.frames)
    times = []
    for _ in range(BLOCK_STEPS):
        begin = perf_counter()
        engine.step(engine.frames)
        times.append(perf_counter() - begin)
    return times


def _run(engine: Engine, name: str, blocks: Sequence[Sequence[float]]) -> Run:
    times = np.concatenate(blocks)
    manifest = engine.manifest
    return Run(
        engine=name,
        sha256=manifest.sha256,
        precision=manifest.precision,
        input=(manifest.input_height, manifest.input_width),
        steps=len(times),
        median=float(np.median(times)),
        min=float(times.min()),
        p95=float(np.percentile(times, 95)),
        blocks=tuple(float(np.median(block)) for block in blocks),
    )


def _machine() -> dict[str, Any]:
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    packages = ("numpy", "onnxruntime", "opencv-python")
    installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    return {
        "stsm-rt": stsm_rt.__version__,
        "python": platform.python_version(),
        **{package: installed[package] for package in packages if package in installed},
    }


def _lines(record: dict[str, Any], runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[str]:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['system']}", versions, ""]
    width = max(len(run.engine) for run in runs)
    lines.append(f"{'engine':<{width}}  {'input':>9}    median       min       p95   (ms per step)")
    for run in runs:
        size = f"{run.input[0]}x{run.input[1]}"
        numbers = "".join(f"{1000 * value:10.2f}" for value in (run.median, run.min, run.p95))
        lines.append(f"{run.engine:<{width}}  {size:>9}{numbers}")
    for comparison in comparisons:
        lines.append(
            f"{comparison.b} / {comparison.a}: x{comparison.ratio_median:.3f} "
            f"({comparison.ratio_min:.3f} to {comparison.ratio_max:.3f} over {comparison.pairs} pairs)"
        )
    return lines


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
