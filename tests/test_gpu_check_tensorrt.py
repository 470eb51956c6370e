"""The TensorRT part of ``make gpu-check`` against a stand-in whose plans are ONNX graphs: nothing here is a GPU's.

Exports, calibration, the engine and the checks are the real ones; only TensorRT's builders are replaced.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from engine.standin_tensorrt import Capture, Cuda
from engine.standin_tensorrt import TensorRT as StandIn

from stsm_rt import gpu_check_tensorrt
from stsm_rt.check_weights import Weights, random_weights
from stsm_rt.engine.tensorrt import TensorRTEngine
from stsm_rt.errors import UserError
from stsm_rt.export import export_engine, export_onnx
from stsm_rt.gpu_check import Check
from stsm_rt.gpu_check_tensorrt import PlanKind, PlanResults, TensorRTPart
from stsm_rt.manifest import manifest_path
from stsm_rt.networks import StreamingNetwork, stream
from stsm_rt.quantize import FORMS, quantize
from stsm_rt.tensorrt_build import BuildOptions, Definition, Plan
from stsm_rt.tensorrt_library import TensorRT
from stsm_rt.video.cut import CutDetector
from stsm_rt.video.sources import open_source

SHIFTS = ("plain", "tsm_online", "stsm_online")
PARSED = [PlanKind("onnx", precision, shift) for precision in ("fp16", "int8") for shift in SHIFTS]
CONVERTED = [PlanKind("torch-tensorrt", precision, "stsm_online") for precision in ("fp16", "int8")]
FP16 = PlanKind("onnx", "fp16", "stsm_online")
INT8 = PlanKind("onnx", "int8", "stsm_online")


def plan_of(graph: Path) -> Plan:
    """What the stand-in takes for a plan."""
    empty = Definition(inputs=(), outputs=(), layers=0, quantize_layers=0, dequantize_layers=0)
    return Plan(data=graph.read_bytes(), device="sm_86", definition=empty)


def parse(tensorrt: TensorRT, graph: Path, options: BuildOptions) -> Plan:
    assert options.timing_cache is not None
    return plan_of(graph)


def convert(
    network: StreamingNetwork, height: int, width: int, *, precision: str, ranges: Any, options: BuildOptions
) -> Plan:
    assert options.timing_cache is not None
    graph = options.timing_cache.with_name("converted.onnx")
    export_onnx(copy.deepcopy(network).half(), graph, height=height, width=width)
    if precision == "int8":
        onnx.save(quantize(onnx.load(graph), ranges, FORMS["onnx"], ()), graph)
    return plan_of(graph)


class ExportOnce:
    """``export_engine``, which takes seconds, with what it wrote kept for the next test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, network: StreamingNetwork, spec: Any, target: Path, **options: Any) -> None:
        ranges = options.get("ranges")
        assert (ranges is not None) == (options.get("precision") == "int8")
        key = f"{spec.shift and spec.shift['name']}_{options.get('precision')}_{ranges and ranges.data}"
        kept = self.folder / f"{key}.onnx"
        if not kept.exists():
            export_engine(network, spec, kept, **options)
        for source, copied in ((kept, target), (manifest_path(kept), manifest_path(target))):
            shutil.copy(source, copied)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    cuda = Cuda()
    standin = StandIn(cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        patch.setitem(sys.modules, "tensorrt", standin)
        patch.setattr(gpu_check_tensorrt, "find_spec", lambda name: name)
        patch.setattr(gpu_check_tensorrt, "export_engine", ExportOnce(tmp_path_factory.mktemp("graphs")))
        patch.setattr(gpu_check_tensorrt, "build_plan", parse)
        patch.setattr(gpu_check_tensorrt, "build_plan_from_network", convert)
        patch.setattr(gpu_check_tensorrt, "torch_tensorrt_library", lambda: library(standin))
        yield standin
    assert not cuda.faults
    assert not cuda.blocks and not cuda.handles, "an engine was not closed"


def library(standin: Any) -> TensorRT:
    return TensorRT(standin, "tensorrt", "10.3.0")


@pytest.fixture
def part(standin: StandIn) -> TensorRTPart:
    return TensorRTPart(library(standin))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights("r8", height=32, width=40)


@pytest.fixture(scope="module")
def results(standin: StandIn, weights: Weights) -> PlanResults:
    return TensorRTPart(library(standin)).check(weights, 2)


def kind_of(found: Any) -> PlanKind:
    return PlanKind(found.frontend, found.precision, found.shift)


def failed(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]


@pytest.mark.slow
def test_every_plan_is_built_and_passes_every_check(results: PlanResults) -> None:
    assert [kind_of(plan) for plan in results.plans] == PARSED + CONVERTED
    assert all(plan.cuda_graphs and plan.device == "sm_86" and plan.bytes > 0 for plan in results.plans)
    assert [check.what.replace("int8", "fp16") for check in results.checks] == 8 * [
        "fp16 and PyTorch's fp32",
        "interleaved slots and each alone",
        "reset of the other slot",
    ]
    assert [kind_of(check) for check in results.checks[::3]] == PARSED + CONVERTED
    assert {check.runtime for check in results.checks} == {"tensorrt"}
    assert failed(results.checks) == []


@pytest.mark.slow
def test_plans_are_compared_with_pytorch_in_their_own_bounds(results: PlanResults) -> None:
    for check in results.checks[::3]:
        assert check.bound == {"fp16": 2e-2, "int8": 0.25}[check.precision]
        assert check.difference is not None and check.mean_difference is not None
        assert 0 < check.mean_difference < check.difference
    largest = {kind_of(check): check.difference for check in results.checks[::3]}
    assert largest[INT8] > 2 * largest[FP16], "the INT8 plan is none"


@pytest.mark.slow
def test_shifted_is_compared_with_plain_and_int8_with_fp16(results: PlanResults) -> None:
    assert [run.engine for run in results.runs] == [
        f"r8 {kind.precision} {kind.shift} tensorrt {kind.frontend}" for kind in PARSED + CONVERTED
    ]
    assert {run.precision for run in results.runs} == {"fp16", "int8"}
    shifted = [
        (f"r8 {precision} plain tensorrt onnx", f"r8 {precision} {shift} tensorrt onnx")
        for precision in ("fp16", "int8")
        for shift in SHIFTS[1:]
    ]
    quantized = [(f"r8 fp16 {shift} tensorrt onnx", f"r8 int8 {shift} tensorrt onnx") for shift in SHIFTS]
    quantized += [tuple(f"r8 {kind.precision} stsm_online tensorrt torch-tensorrt" for kind in CONVERTED)]
    assert sorted((c.a, c.b) for c in results.comparisons) == sorted(shifted + quantized)
    assert {c.pairs for c in results.comparisons} == {2}


@pytest.mark.slow
def test_int8_of_random_weights_is_calibrated_on_one_stream(results: PlanResults) -> None:
    assert {plan.calibration for plan in results.plans if plan.precision == "fp16"} == {None}
    assert {plan.calibration for plan in results.plans if plan.precision == "int8"} == {
        "blobs and grain that change slowly"
    }


def test_the_made_up_clip_has_no_cut(weights: Weights, tmp_path: Path) -> None:
    detector = CutDetector()
    with open_source(gpu_check_tensorrt._write_clip(tmp_path / "clip.avi", weights.spec)) as source:
        frames = [frame for frame, _ in source]

    assert len(frames) == 32 and frames[0].shape == (32, 40, 3)
    assert not any(map(detector.is_cut, frames))


@pytest.mark.slow
def test_recorded_ranges_serve_every_shift_of_their_weights(
    part: TensorRTPart, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plans").mkdir()
    measured = gpu_check_tensorrt._PlanBuilder(weights, library(None), tmp_path / "plans")._ranges
    dataclasses.replace(measured, weights_sha256="0" * 64).save(tmp_path / "a.json")
    dataclasses.replace(measured, data="recorded clips").save(tmp_path / "r8.json")
    monkeypatch.setattr(gpu_check_tensorrt, "shipped_folder", lambda name: tmp_path)
    monkeypatch.setattr(gpu_check_tensorrt, "calibrate", lambda *_, **__: pytest.fail("calibrated again"))
    part.kinds = PARSED[3:]
    results = part.check(weights, 1, frames=4)

    assert [plan.calibration for plan in results.plans] == 3 * ["recorded clips"]


def test_the_checks_find_a_reset_of_every_slot(
    part: TensorRTPart, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = TensorRTEngine.reset
    monkeypatch.setattr(TensorRTEngine, "reset", lambda engine, slots=None: reset(engine))
    part.kinds = [FP16]
    results = part.check(weights, 1)

    assert {check.what for check in failed(results.checks)} == {"reset of the other slot"}


@pytest.mark.parametrize("kind", [FP16, INT8], ids=["fp16", "int8"])
def test_the_checks_find_that_only_one_of_plan_and_pytorch_has_a_state(
    part: TensorRTPart, weights: Weights, kind: PlanKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(network: StreamingNetwork, clip: torch.Tensor) -> torch.Tensor:
        return torch.cat([stream(network, frame) for frame in clip.split(1, dim=1)], dim=1)

    monkeypatch.setattr(gpu_check_tensorrt, "stream", forgetful)
    part.kinds = [kind]
    results = part.check(weights, 1)

    assert [check.what for check in failed(results.checks)] == [f"{kind.precision} and PyTorch's fp32"]


def test_a_result_that_is_no_number_fails(
    part: TensorRTPart, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check_tensorrt, "difference", lambda got, expected: float("nan"))
    part.kinds = [FP16]

    assert len(failed(part.check(weights, 1, frames=4).checks)) == 3


def test_a_plan_that_cannot_be_built_is_one_failed_check_and_the_others_go_on(
    part: TensorRTPart, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(tensorrt: TensorRT, graph: Path, options: BuildOptions) -> Plan:
        if "QuantizeLinear" in {node.op_type for node in onnx.load(graph).graph.node}:
            raise UserError("no kernel for INT8; choose another precision")
        return parse(tensorrt, graph, options)

    monkeypatch.setattr(gpu_check_tensorrt, "build_plan", build)
    part.kinds = [FP16, INT8, PARSED[0]]
    results = part.check(weights, 2, frames=4)

    (check,) = failed(results.checks)
    assert kind_of(check) == INT8
    assert (check.difference, check.bound, check.reason) == (
        None,
        None,
        "no kernel for INT8; choose another precision",
    )
    assert len(results.checks) == 7
    assert [kind_of(plan) for plan in results.plans] == [FP16, PARSED[0]]
    assert len(results.runs) == 2 and len(results.comparisons) == 1


def test_an_unexpected_failure_is_a_failed_check_too(
    part: TensorRTPart, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check_tensorrt, "build_plan", lambda *_: 1 / 0)
    part.kinds = [FP16]
    results = part.check(weights, 2, frames=4)

    assert [check.reason for check in results.checks] == ["ZeroDivisionError: division by zero"]
    assert results.plans == results.runs == results.comparisons == []


def test_plans_without_cuda_graphs_say_so(part: TensorRTPart, standin: StandIn, weights: Weights) -> None:
    standin.capture = Capture.REFUSED
    try:
        part.kinds = [FP16]
        results = part.check(weights, 1, frames=4)
    finally:
        standin.capture = Capture.WORKS

    assert [plan.cuda_graphs for plan in results.plans] == [False]
    assert failed(results.checks) == []


def test_torch_tensorrt_of_another_runtime_is_refused(
    part: TensorRTPart, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = TensorRT(sys, "tensorrt-rtx", "1.7.1.116")
    monkeypatch.setattr(gpu_check_tensorrt, "torch_tensorrt_library", lambda: other)
    part.kinds = CONVERTED[:1]
    (check,) = part.check(weights, 1, frames=4).checks

    assert check.reason is not None and "builds for tensorrt-rtx, not for tensorrt" in check.reason


@pytest.mark.parametrize(
    ("missing", "kinds", "left_out"),
    [
        ((), PARSED + CONVERTED, []),
        (
            ("modelopt",),
            PARSED + CONVERTED[:1],
            ["ModelOpt is not installed: INT8 through Torch-TensorRT was left out"],
        ),
        (("torch_tensorrt",), PARSED, ["Torch-TensorRT is not installed: its part was left out"]),
    ],
    ids=["all", "no ModelOpt", "no Torch-TensorRT"],
)
def test_what_is_not_installed_is_left_out_and_named(
    missing: tuple[str, ...], kinds: list[PlanKind], left_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check_tensorrt, "find_spec", lambda name: None if name in missing else name)
    part = TensorRTPart(library(None))

    assert part.kinds == kinds
    assert part.left_out == left_out
    assert part.versions["tensorrt"] == "10.3.0" and part.versions["onnx"] == onnx.__version__
