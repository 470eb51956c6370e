"""The TensorRT part of ``python -m stsm_rt.gpu_check``: plans built on this machine, compared with PyTorch and timed.

Of every network the plain and the shifted forms go through TensorRT's parser in FP16 and INT8, and one of them through
Torch-TensorRT where that is installed. Besides TensorRT it needs what building from weights needs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from stsm_rt.bench import Comparison, Run, compare, time_engines
from stsm_rt.calibrate import calibrate
from stsm_rt.check_weights import Weights, moving_clip, weights_sha256
from stsm_rt.engine.base import shipped_folder
from stsm_rt.engine.tensorrt import TensorRTEngine
from stsm_rt.engine_manifest import calibration_record, make_manifest
from stsm_rt.errors import UserError
from stsm_rt.export import export_engine
from stsm_rt.gpu_check import FP16_BOUND, SHIFTS, Check, difference, interleaved, played, reset_beside
from stsm_rt.manifest import sha256_of
from stsm_rt.model import ModelSpec
from stsm_rt.networks import StreamingNetwork, stream
from stsm_rt.ranges import Ranges
from stsm_rt.tensorrt_build import BuildOptions, Plan, build_plan
from stsm_rt.tensorrt_library import TensorRT, has_timing_cache, one_line
from stsm_rt.torch_tensorrt_frontend import build_plan_from_network, torch_tensorrt_library

PlanPrecision = Literal["fp16", "int8"]
# INT8 is held only to what a wrong scale or a lost state would exceed; what it costs takes an evaluation.
BOUNDS: dict[PlanPrecision, float] = {"fp16": FP16_BOUND, "int8": 0.25}
PLAIN = "plain"
_DEFAULT_SHIFT = "stsm_online"
_FRAMES = 12
_SCENES, _FRAMES_BETWEEN = 5, 8
_PACKAGES = ("torch-tensorrt", "torch-tensorrt-rtx", "nvidia-modelopt", "cuda-bindings", "onnx")


@dataclass(frozen=True)
class PlanKind:
    """Which plan of a network.

    Attributes:
        frontend: ``"onnx"``, which is TensorRT's parser, or ``"torch-tensorrt"``.
        precision: ``"fp16"`` or ``"int8"``.
        shift: Name of the shift, or ``"plain"``.
    """

    frontend: str
    precision: PlanPrecision
    shift: str


@dataclass(frozen=True)
class BuiltPlan:
    """A plan that was built and run.

    Attributes:
        network: Name of the network.
        shift: Name of the shift, or ``"plain"``.
        precision: ``"fp16"`` or ``"int8"``.
        runtime: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        frontend: ``"onnx"`` or ``"torch-tensorrt"``.
        device: What it was built for, as a manifest says it.
        bytes: Its size.
        calibration: What was played for its ranges; None if it is not INT8.
        cuda_graphs: Whether its steps are CUDA graphs.
    """

    network: str
    shift: str
    precision: str
    runtime: str
    frontend: str
    device: str
    bytes: int
    calibration: str | None
    cuda_graphs: bool


@dataclass(frozen=True)
class PlanResults:
    """What was found of one network's plans.

    Attributes:
        plans: Those that could be built and run.
        checks: Passed or not.
        runs: One for each of the plans.
        comparisons: Shifted with plain, and INT8 with FP16.
    """

    plans: list[BuiltPlan]
    checks: list[Check]
    runs: list[Run]
    comparisons: list[Comparison]


class TensorRTPart:
    """What to check with the TensorRT that is installed.

    Args:
        tensorrt: The package to build with.

    Attributes:
        kinds: The plans of every network.
        left_out: In words, what is left out for want of a package.
        versions: Of TensorRT and of what builds plans with it, by the names of their distributions.
    """

    def __init__(self, tensorrt: TensorRT) -> None:
        self._tensorrt = tensorrt
        self.kinds = [PlanKind("onnx", precision, shift) for precision in BOUNDS for shift in (PLAIN, *SHIFTS)]
        self.left_out: list[str] = []
        if find_spec("torch_tensorrt") is None:
            self.left_out.append("Torch-TensorRT is not installed: its part was left out")
        else:
            self.kinds.append(PlanKind("torch-tensorrt", "fp16", _DEFAULT_SHIFT))
            if find_spec("modelopt") is None:
                self.left_out.append("ModelOpt is not installed: INT8 through Torch-TensorRT was left out")
            else:
                self.kinds.append(PlanKind("torch-tensorrt", "int8", _DEFAULT_SHIFT))
        installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
        self.versions = {tensorrt.runtime: tensorrt.version}
        self.versions |= {name: installed[name] for name in _PACKAGES if name in installed}

    def check(self, weights: Weights, pairs: int, *, frames: int = _FRAMES) -> PlanResults:
        """Build the plans of one network, hold them to PyTorch in FP32 and to themselves, and time them in turns.

        Args:
            weights: Of the network.
            pairs: Number of blocks of each plan.
            frames: Length of the clips.

        Returns:
            What was found. A plan that cannot be built or run is one failed check, and the others are checked.
        """
        plans: list[BuiltPlan] = []
        checks: list[Check] = []
        with tempfile.TemporaryDirectory(prefix="stsm-rt-") as folder, ExitStack() as opened:
            builder = _PlanBuilder(weights, self._tensorrt, Path(folder))
            engines: dict[PlanKind, TensorRTEngine] = {}
            for kind in self.kinds:
                try:
                    path = builder.build(kind)
                    with closing(TensorRTEngine(path, slots=2)) as engine:
                        checks += _check(engine, weights, kind, frames)
                    engines[kind] = opened.enter_context(closing(TensorRTEngine(path)))
                    plans.append(_built(engines[kind], kind, path))
                except Exception as error:  # whatever became of one plan, the others say more about this machine
                    checks.append(_failed(error, weights, kind, self._tensorrt))
            names = [
                f"{weights.spec.network} {kind.precision} {kind.shift} {self._tensorrt.runtime} {kind.frontend}"
                for kind in engines
            ]
            runs = dict(zip(engines, time_engines(list(engines.values()), names, pairs), strict=True))
        return PlanResults(plans, checks, list(runs.values()), _comparisons(runs))


class _PlanBuilder:
    """Builds plans of one network in a folder."""

    def __init__(self, weights: Weights, tensorrt: TensorRT, folder: Path) -> None:
        self._weights, self._tensorrt, self._folder = weights, tensorrt, folder
        self._sha256 = weights_sha256(weights)
        # Plain and shifted networks share their convolutions, so what was measured for one serves the others.
        self._options = BuildOptions(timing_cache=folder / "timing.cache" if has_timing_cache(tensorrt) else None)

    def build(self, kind: PlanKind) -> Path:
        """Build a plan and write it with its manifest."""
        network, spec = self._network(kind.shift)
        ranges = self._ranges if kind.precision == "int8" else None
        plan = self._plan(kind, network, spec, ranges)
        path = self._folder / f"{kind.frontend}_{kind.precision}_{kind.shift}.engine"
        path.write_bytes(plan.data)
        manifest = make_manifest(
            network,
            spec,
            weights_sha256=self._sha256,
            runtime=self._tensorrt.runtime,
            runtime_version=self._tensorrt.version,
            device=plan.device,
            precision=kind.precision,
            batch=1,
            calibration=calibration_record(ranges, ()) if ranges is not None else None,
        )
        dataclasses.replace(manifest, sha256=sha256_of(path)).save(path)
        return path

    def _network(self, shift: str) -> tuple[StreamingNetwork, ModelSpec]:
        network = self._weights.network(None if shift == PLAIN else shift)
        used = network.shift.to_json() if network.shift is not None else None
        return network, dataclasses.replace(self._weights.spec, shift=used)

    def _plan(self, kind: PlanKind, network: StreamingNetwork, spec: ModelSpec, ranges: Ranges | None) -> Plan:
        if kind.frontend == "onnx":
            graph = self._folder / "graph.onnx"
            export_engine(
                network,
                spec,
                graph,
                weights_sha256=self._sha256,
                runtime="onnx",
                precision=kind.precision,
                ranges=ranges,
            )
            return build_plan(self._tensorrt, graph, self._options)
        other = torch_tensorrt_library()
        if other.runtime != self._tensorrt.runtime:
            raise UserError(
                f"the installed Torch-TensorRT builds for {other.runtime}, not for {self._tensorrt.runtime}; install "
                "the one that belongs to it"
            )
        return build_plan_from_network(
            network, spec.height, spec.width, precision=kind.precision, ranges=ranges, options=self._options
        )

    @functools.cached_property
    def _ranges(self) -> Ranges:
        """The recorded ranges of these weights, or those of a made-up clip; one record serves every shift."""
        recorded = shipped_folder("calibration")
        for path in sorted(recorded.glob("*.json")) if recorded else []:
            ranges = Ranges.load(path)
            if ranges.weights_sha256 == self._sha256:
                return ranges
        network, spec = self._network(_DEFAULT_SHIFT)
        engine = self._folder / "fp32.onnx"
        export_engine(network, spec, engine, weights_sha256=self._sha256)
        video = _write_clip(self._folder / "calibration.avi", spec)
        return calibrate(engine, [video], data="blobs and grain that change slowly")


def _write_clip(path: Path, spec: ModelSpec) -> Path:
    """Blobs that turn into others so slowly that nobody sees a cut, at the network's own size and rate."""
    scenes = moving_clip(_SCENES, spec.height, spec.width, seed=2)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), spec.frame_rate, (spec.width, spec.height))
    for before, after in itertools.pairwise(scenes):
        for share in np.linspace(0, 1, _FRAMES_BETWEEN, endpoint=False):
            writer.write(cv2.addWeighted(before, 1 - share, after, share, 0))
    writer.release()
    return path


def _built(engine: TensorRTEngine, kind: PlanKind, path: Path) -> BuiltPlan:
    manifest = engine.manifest
    return BuiltPlan(
        network=manifest.network,
        shift=kind.shift,
        precision=kind.precision,
        runtime=manifest.runtime,
        frontend=kind.frontend,
        device=manifest.device,
        bytes=path.stat().st_size,
        calibration=manifest.calibration["data"] if manifest.calibration is not None else None,
        cuda_graphs=engine.cuda_graphs,
    )


def _check(engine: TensorRTEngine, weights: Weights, kind: PlanKind, frames: int) -> list[Check]:
    """Hold a plan with two slots to PyTorch on the processor, and its slots to each other."""
    height, width = weights.spec.height, weights.spec.width
    first, second = (moving_clip(frames, height, width, seed=seed) for seed in (0, 1))
    network = weights.network(None if kind.shift == PLAIN else kind.shift)
    expected = stream(network, torch.from_numpy(first)[None])[0].numpy()
    alone, other = played(engine, first, 0), played(engine, second, 1)
    mean = float(np.abs(alone - expected).mean() / np.abs(expected).max())
    found = [
        (f"{kind.precision} and PyTorch's fp32", (alone, expected), BOUNDS[kind.precision], mean),
        ("interleaved slots and each alone", interleaved(engine, first, second, alone, other), 0.0, None),
        ("reset of the other slot", reset_beside(engine, first, second, alone, other), 0.0, None),
    ]
    checks = []
    for what, pair, bound, mean_difference in found:
        largest = difference(*pair)
        checks.append(
            Check(
                weights.spec.network,
                kind.shift,
                kind.precision,
                what,
                largest,
                bound,
                largest <= bound,
                runtime=engine.manifest.runtime,
                frontend=kind.frontend,
                mean_difference=mean_difference,
            )
        )
    return checks


def _failed(error: Exception, weights: Weights, kind: PlanKind, tensorrt: TensorRT) -> Check:
    return Check(
        weights.spec.network,
        kind.shift,
        kind.precision,
        "build and run",
        None,
        None,
        False,
        runtime=tensorrt.runtime,
        frontend=kind.frontend,
        reason=str(error) if isinstance(error, UserError) else one_line(f"{type(error).__name__}: {error}"),
    )


def _comparisons(runs: Mapping[PlanKind, Run]) -> list[Comparison]:
    """Every shifted plan with the plain one, and every INT8 plan with that of FP16, where both were built."""
    found = []
    for kind, run in runs.items():
        for base in (dataclasses.replace(kind, shift=PLAIN), dataclasses.replace(kind, precision="fp16")):
            if base != kind and base in runs:
                found.append(compare(runs[base], run))
    return found
