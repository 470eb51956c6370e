"""The command ``python -m stsm_rt.gpu_check``: is a step on this machine's NVIDIA GPU exact, and what does it cost?

For every network it compares the step with the causal clip, the CUDA graphs with the eager step, FP16 with FP32 and
slots with each other; then it times the plain network against the shifted ones, in turns. Where TensorRT is installed
it does the same with plans that it builds (`gpu_check_tensorrt`). It needs PyTorch and no network connection: where no
trained weights are at hand, it makes random ones from a seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

import stsm_rt
from stsm_rt.bench import Comparison, Run, compare, time_engines
from stsm_rt.check_weights import Weights, moving_clip, random_weights, shipped_weights
from stsm_rt.engine import Engine
from stsm_rt.engine.torch import Precision, TorchEngine, exact_convolutions
from stsm_rt.errors import UserError, report
from stsm_rt.networks import stream
from stsm_rt.tensorrt_library import load_tensorrt

if TYPE_CHECKING:
    from stsm_rt.gpu_check_tensorrt import BuiltPlan, TensorRTPart

EXACT_BOUND = 1e-5
FP16_BOUND = 2e-2
SHIFTS = ("tsm_online", "stsm_online")
_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
_TENSORRT_PACKAGES = ("tensorrt", "tensorrt_rtx")
_DEFAULT_NETWORKS = ("r50", "mbv2", "lite0")
_FRAMES = 12

Device = Literal["cuda", "cpu"]
Frames = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """One comparison of logits, or an engine of which there are none to compare.

    Attributes:
        network: Name of the network.
        shift: Name of the shift, ``"plain"`` for none.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        what: What is compared.
        difference: Largest difference relative to the largest logit; 0.0 means equal bit for bit. None where the engine
            could not be built or run.
        bound: The largest difference that passes; None likewise.
        passed: Whether it is within the bound.
        runtime: ``"torch"``, ``"tensorrt"`` or ``"tensorrt-rtx"``.
        frontend: Of a TensorRT plan: ``"onnx"`` or ``"torch-tensorrt"``.
        mean_difference: Mean difference relative to the largest logit, where it is of interest.
        reason: Why the engine could not be built or run.
    """

    network: str
    shift: str
    precision: str
    what: str
    difference: float | None
    bound: float | None
    passed: bool
    runtime: str = "torch"
    frontend: str | None = None
    mean_difference: float | None = None
    reason: str | None = None


def check_network(weights: Weights, *, device: Device = "cuda", frames: int = _FRAMES) -> list[Check]:
    """Hold every shifted network's engines to the clip form, the eager step, FP32 and each other.

    Args:
        weights: Of one network.
        device: Where to check; on the CPU there are no CUDA graphs to compare.
        frames: Length of the clips.

    Returns:
        The checks, passed or not.
    """
    height, width = weights.spec.height, weights.spec.width
    first, second = (moving_clip(frames, height, width, seed=seed) for seed in (0, 1))
    checks = []
    for shift in SHIFTS:
        network = weights.network(shift)
        reference: Logits | None = None
        for precision in _PRECISIONS:

            def add(
                what: str,
                got: Logits,
                expected: Logits,
                bound: float,
                *,
                shift: str = shift,
                precision: Precision = precision,
            ) -> None:
                largest = difference(got, expected)
                # A comparison with NaN is false, so NaN fails.
                checks.append(Check(weights.spec.network, shift, precision, what, largest, bound, largest <= bound))

            engine = TorchEngine(network, weights.spec, slots=2, device=device, precision=precision)
            alone, other = played(engine, first, 0), played(engine, second, 1)
            if precision == "fp32":
                reference = alone
                add("step and causal clip", *_stream_and_clip(engine, first), EXACT_BOUND)
                add("engine and eager step", alone, _stream_and_clip(engine, first)[0], EXACT_BOUND)
            else:
                assert reference is not None
                add("fp16 and fp32", alone, reference, FP16_BOUND)
            add("interleaved slots and each alone", *interleaved(engine, first, second, alone, other), 0.0)
            add("reset of the other slot", *reset_beside(engine, first, second, alone, other), 0.0)
    return checks


def _stream_and_clip(engine: TorchEngine, frames: Frames) -> tuple[Logits, Logits]:
    """Logits of the step form, run eagerly by the engine's network, and of its clip form."""
    clip = torch.from_numpy(frames)[None].to(next(engine.network.parameters()).device)
    with torch.no_grad(), exact_convolutions():
        step, whole = stream(engine.network, clip), engine.network(clip)
    return step[0].float().cpu().numpy(), whole[0].float().cpu().numpy()


def played(engine: Engine, frames: Frames, slot: int) -> Logits:
    """Logits (T, classes) of a clip (T, height, width, 3) that one slot sees from its reset on."""
    engine.reset([slot])
    return np.stack([engine.step(frame[None], [slot])[0].copy() for frame in frames])


def interleaved(engine: Engine, first: Frames, second: Frames, alone: Logits, other: Logits) -> tuple[Logits, Logits]:
    """Logits of two clips played in both slots at once, and those of each alone."""
    engine.reset()
    together = np.stack([engine.step(np.stack(pair)).copy() for pair in zip(first, second, strict=True)])
    return np.concatenate([together[:, 0], together[:, 1]]), np.concatenate([alone, other])


def reset_beside(engine: Engine, first: Frames, second: Frames, alone: Logits, other: Logits) -> tuple[Logits, Logits]:
    """Logits of two clips, of which slot 1 starts again in the middle of slot 0's, and what they should be.

    The middle is an odd step, so that the slots' phases differ.
    """
    engine.reset()
    middle = len(first) // 2 | 1
    logits = []
    for t, frame in enumerate(first):
        if t == middle:
            engine.reset([1])
        logits.append(engine.step(frame[None], [0])[0].copy())
        engine.step(second[t % middle][None], [1])
    # Slot 1 has seen the first frames of its stream after its reset; what comes next tells.
    rest = [engine.step(frame[None], [1])[0].copy() for frame in second[len(first) - middle :]]
    return np.stack([*logits, *rest]), np.concatenate([alone, other[len(first) - middle :]])


def difference(got: Logits, expected: Logits) -> float:
    """Largest difference relative to the largest expected logit; NaN if something is no number."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def time_network(weights: Weights, pairs: int, *, device: Device = "cuda") -> tuple[list[Run], list[Comparison]]:
    """Time the plain network against the shifted ones, with the same classifier.

    Args:
        weights: Of one network.
        pairs: Number of blocks of each.
        device: Where to time.

    Returns:
        The runs, plain first, and the comparisons with the plain one, for each precision.
    """
    runs: list[Run] = []
    comparisons: list[Comparison] = []
    for precision in _PRECISIONS:
        engines = [
            TorchEngine(weights.network(shift), weights.spec, device=device, precision=precision)
            for shift in (None, *SHIFTS)
        ]
        names = [f"{weights.spec.network} {precision} {shift}" for shift in ("plain", *SHIFTS)]
        timed = time_engines(engines, names, pairs)
        runs += timed
        comparisons += [compare(timed[0], run) for run in timed[1:]]
    return runs, comparisons


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        0 if every check passed, 1 if one did not, 2 if something that was given cannot be used or there is no GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m stsm_rt.gpu_check",
        description="Check and time the steps of streaming networks on this machine's NVIDIA GPU.",
    )
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="write all numbers here")
    parser.add_argument(
        "--networks",
        default=",".join(_DEFAULT_NETWORKS),
        metavar="NAMES",
        help="networks, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--pairs", type=int, default=30, help="blocks of each engine (default: 30)")
    options = parser.parse_args(argv)
    if options.pairs < 1:
        parser.error(f"--pairs must be at least 1, not {options.pairs}")
    try:
        if not torch.cuda.is_available():
            raise UserError(
                "the GPU check needs an NVIDIA GPU and a PyTorch built for CUDA, but PyTorch "
                f"{torch.__version__} finds no GPU here; run it on a machine that has one"
            )
        passed = _check(options.networks.split(","), options.pairs, options.json)
    except UserError as error:
        return report(error)
    return 0 if passed else 1


def _check(networks: Sequence[str], pairs: int, out: Path) -> bool:
    begin = perf_counter()
    weights = [shipped_weights(name) or random_weights(name) for name in networks]
    tensorrt = _tensorrt_part()
    left_out = ["TensorRT is not installed: its part was left out"] if tensorrt is None else tensorrt.left_out
    record: dict[str, Any] = {"machine": _machine(), "versions": _versions() | (tensorrt.versions if tensorrt else {})}
    print(", ".join(f"{key} {value}" for part in record.values() for key, value in part.items()))
    for line in left_out:
        print(line, flush=True)
    checks: list[Check] = []
    runs: list[Run] = []
    comparisons: list[Comparison] = []
    plans: list[BuiltPlan] = []
    for item in weights:
        print(f"\n{item.spec.network}: {item.spec.height}x{item.spec.width}, weights {item.source}")
        found = check_network(item)
        print("\n".join(map(_check_line, found)), flush=True)
        timed, compared = time_network(item, pairs)
        print("\n".join([*map(_run_line, timed), *map(_comparison_line, compared)]), flush=True)
        checks, runs, comparisons = checks + found, runs + timed, comparisons + compared
        if tensorrt is not None:
            results = tensorrt.check(item, pairs)
            print("\n".join([*map(_plan_line, results.plans), *map(_check_line, results.checks)]))
            print("\n".join([*map(_run_line, results.runs), *map(_comparison_line, results.comparisons)]), flush=True)
            checks, plans = checks + results.checks, plans + results.plans
            runs, comparisons = runs + results.runs, comparisons + results.comparisons
    record |= {
        "weights": [{"network": item.spec.network, "source": item.source, "sha256": item.sha256} for item in weights],
        "left_out": left_out,
        "plans": [asdict(plan) for plan in plans],
        "checks": [asdict(check) for check in checks],
        "runs": [asdict(run) for run in runs],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "seconds": round(perf_counter() - begin, 1),
    }
    _write(out, json.dumps(record, indent=2) + "\n")
    failed = sum(not check.passed for check in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks passed in {record['seconds']} s; all numbers are in {out}")
    return failed == 0


def _tensorrt_part() -> TensorRTPart | None:
    """The checks of plans, where TensorRT is installed.

    Raises:
        UserError: It cannot be used, or a package to build with is missing.
    """
    if not any(map(importlib.util.find_spec, _TENSORRT_PACKAGES)):
        return None
    tensorrt = load_tensorrt()
    try:
        from stsm_rt.gpu_check_tensorrt import TensorRTPart
    except ModuleNotFoundError as error:
        raise UserError(
            f"{tensorrt.name} is installed, but building plans of weights needs {error.name}, which is not; run "
            "pip install 'stsm-rt[build]'"
        ) from error
    return TensorRTPart(tensorrt)


def _check_line(check: Check) -> str:
    word = "passed" if check.passed else "FAILED"
    engine = f"{check.shift} {check.precision}" + (f" {check.runtime} {check.frontend}" if check.frontend else "")
    if check.difference is None:
        return f"  {word}  {engine}: {check.what}: {check.reason}"
    mean = f", {check.mean_difference:.1e} on average" if check.mean_difference is not None else ""
    return f"  {word}  {engine}: {check.what} differ by {check.difference:.1e}{mean} (at most {check.bound:.0e})"


def _plan_line(plan: BuiltPlan) -> str:
    graphs = "CUDA graphs" if plan.cuda_graphs else "no CUDA graphs"
    return (
        f"  built   {plan.shift} {plan.precision} {plan.runtime} {plan.frontend}: {plan.bytes / 2**20:.1f} MiB for "
        f"{plan.device}, {graphs}"
    )


def _run_line(run: Run) -> str:
    numbers = ", ".join(f"{name} {1000 * getattr(run, name):.3f}" for name in ("median", "min", "p95"))
    return f"  {run.engine}: {numbers} ms per step"


def _comparison_line(comparison: Comparison) -> str:
    return (
        f"  {comparison.b} / {comparison.a}: x{comparison.ratio_median:.3f} "
        f"({comparison.ratio_min:.3f} to {comparison.ratio_max:.3f} over {comparison.pairs} pairs)"
    )


def _machine() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver, None where nvidia-smi does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0].strip() if answer.strip() else None


def _versions() -> dict[str, Any]:
    return {
        "stsm-rt": stsm_rt.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"the numbers cannot be written to {path} ({error}); choose another file") from error


if __name__ == "__main__":
    sys.exit(main())
