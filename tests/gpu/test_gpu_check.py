"""The checks of ``make gpu-check`` at a small size; on a machine without an NVIDIA GPU only what it says there."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stsm_rt import gpu_check
from stsm_rt.bench import Comparison
from stsm_rt.check_weights import Weights, moving_clip, random_weights
from stsm_rt.engine.torch import TorchEngine
from stsm_rt.gpu_check import Check
from stsm_rt.tensorrt_library import TensorRT

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and PyTorch finds none on this machine"
)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights("r8", height=32, width=40)


@needs_gpu
@pytest.mark.parametrize("network", ["r8", "r18", "lite0"])
def test_every_check_passes(network: str) -> None:
    checks = gpu_check.check_network(random_weights(network, height=64, width=80))

    assert len(checks) == 14
    assert [check for check in checks if not check.passed] == []


@needs_gpu
def test_a_step_allocates_nothing_on_the_gpu(weights: Weights) -> None:
    engine = TorchEngine(weights.network("stsm_online"), weights.spec, slots=2)
    frames = moving_clip(2, 32, 40, seed=0)
    engine.step(frames)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(8):
        engine.step(frames)
    engine.reset()

    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@needs_gpu
def test_the_report_holds_machine_checks_runs_and_comparisons(tmp_path: Path) -> None:
    out = tmp_path / "new" / "check.json"

    assert gpu_check.main(["--json", str(out), "--networks", "r18", "--pairs", "2"]) == 0
    record = json.loads(out.read_text())
    assert record["machine"]["gpu"] == torch.cuda.get_device_name()
    assert len(record["checks"]) == 14 and len(record["runs"]) == 6 and len(record["comparisons"]) == 4
    assert {comparison["pairs"] for comparison in record["comparisons"]} == {2}


def test_the_checks_find_a_fault(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in gpu_check.check_network(weights, device="cpu"))

    reset = TorchEngine.reset
    monkeypatch.setattr(TorchEngine, "reset", lambda engine, slots=None: reset(engine))  # resets every slot
    failed = {check.what for check in gpu_check.check_network(weights, device="cpu") if not check.passed}
    assert failed == {"reset of the other slot"}


def test_a_result_that_is_no_number_fails(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "difference", lambda got, expected: float(np.nan))

    assert not any(check.passed for check in gpu_check.check_network(weights, device="cpu", frames=3))


def test_plain_and_shifted_networks_are_timed_pair_by_pair(weights: Weights) -> None:
    runs, comparisons = gpu_check.time_network(weights, 2, device="cpu")

    assert [run.engine.split()[1:] for run in runs] == [
        [precision, shift] for precision in ("fp32", "fp16") for shift in ("plain", "tsm_online", "stsm_online")
    ]
    assert [(c.a, c.b, c.pairs) for c in comparisons] == [
        (f"r8 {precision} plain", f"r8 {precision} {shift}", 2)
        for precision in ("fp32", "fp16")
        for shift in ("tsm_online", "stsm_online")
    ]


@pytest.fixture
def on_the_processor(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds a GPU, but everything runs on the processor, and there is no TensorRT."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "random_weights", lambda name: weights)
    monkeypatch.setattr(gpu_check, "_machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu_check, "_versions", lambda: {"stsm-rt": "0.1.0"})
    monkeypatch.setattr(gpu_check, "_TENSORRT_PACKAGES", ("no_such_package",))
    check, time = gpu_check.check_network, gpu_check.time_network
    monkeypatch.setattr(gpu_check, "check_network", functools.partial(check, device="cpu", frames=4))
    monkeypatch.setattr(gpu_check, "time_network", functools.partial(time, device="cpu"))


def checked(tmp_path: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and report of the command."""
    code = gpu_check.main(["--json", str(tmp_path / "check.json"), "--networks", "r8", "--pairs", "1"])
    return code, json.loads((tmp_path / "check.json").read_text())


@pytest.mark.usefixtures("on_the_processor")
def test_without_tensorrt_the_report_says_that_its_part_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, record = checked(tmp_path)

    assert code == 0
    assert record["left_out"] == ["TensorRT is not installed: its part was left out"]
    assert "TensorRT is not installed: its part was left out\n" in capsys.readouterr().out
    assert record["plans"] == [] and {check["runtime"] for check in record["checks"]} == {"torch"}
    assert (len(record["checks"]), len(record["runs"]), len(record["comparisons"])) == (14, 6, 4)
    assert record["versions"] == {"stsm-rt": "0.1.0"}


@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize("passed", [True, False])
def test_plans_of_tensorrt_go_into_the_same_report(
    passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx", reason="building plans of weights needs onnx")
    from stsm_rt.gpu_check_tensorrt import BuiltPlan, PlanResults

    compared = Check("r8", "plain", "int8", "int8 and PyTorch's fp32", 0.1, 0.25, passed, "tensorrt", "onnx", 0.01)
    built = Check("r8", "plain", "fp16", "build and run", None, None, passed, "tensorrt", "onnx", reason="no memory")
    plan = BuiltPlan("r8", "plain", "int8", "tensorrt", "onnx", "sm_90", 3 << 20, "clips", True)

    class Part:
        left_out, versions = ("ModelOpt is not installed",), {"tensorrt": "10.3.0"}

        def check(self, weights: Weights, pairs: int) -> PlanResults:
            return PlanResults([plan], [compared, built], [], [Comparison("a", "b", 1.0, 0.9, 1.1, pairs)])

    monkeypatch.setattr(gpu_check, "check_network", lambda weights: [])
    monkeypatch.setattr(gpu_check, "_tensorrt_part", Part)
    code, record = checked(tmp_path)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]

    assert code == (0 if passed else 1)
    assert record["versions"]["tensorrt"] == "10.3.0" and record["left_out"] == ["ModelOpt is not installed"]
    assert [plan["frontend"] for plan in record["plans"]] == ["onnx"]
    assert [check["reason"] for check in record["checks"]] == [None, "no memory"]
    assert len(record["runs"]) == 6 and record["comparisons"][-1]["a"] == "a"
    word = "passed" if passed else "FAILED"
    assert "built   plain int8 tensorrt onnx: 3.0 MiB for sm_90, CUDA graphs" in lines
    assert f"{word}  plain fp16 tensorrt onnx: build and run: no memory" in lines
    said = f"{word}  plain int8 tensorrt onnx: int8 and PyTorch's fp32 differ by 1.0e-01, 1.0e-02 on average"
    assert f"{said} (at most 2e-01)" in lines


@pytest.mark.usefixtures("on_the_processor")
def test_tensorrt_that_cannot_be_used_is_said_before_anything_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "_TENSORRT_PACKAGES", ("json",))
    monkeypatch.setattr(gpu_check, "load_tensorrt", lambda: TensorRT(json, "tensorrt", "10.3.0"))
    for name in ("gpu_check_tensorrt", "calibrate"):
        monkeypatch.delitem(sys.modules, f"stsm_rt.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)

    assert gpu_check.main(["--json", str(tmp_path / "check.json")]) == 2
    assert capsys.readouterr().err == (
        "stsm-rt: error: TensorRT 10.3.0 is installed, but building plans of weights needs onnx, which is not; run "
        "pip install 'stsm-rt[build]'\n"
    )
    assert not (tmp_path / "check.json").exists()


def test_the_pytorch_part_needs_nothing_that_building_needs() -> None:
    absent = ("onnx", "onnxruntime", "onnxscript", "tqdm", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "cuda")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import stsm_rt.gpu_check"

    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "check.json"

    assert gpu_check.main(["--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stsm-rt: error: the GPU check needs an NVIDIA GPU") and error.count("\n") == 1
    assert not out.parent.exists()
