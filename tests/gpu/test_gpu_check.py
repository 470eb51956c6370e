"""The checks of ``make gpu-check`` at a small size; on a machine without an NVIDIA GPU only what it says there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stsm_rt import gpu_check
from stsm_rt.check_weights import Weights, moving_clip, random_weights
from stsm_rt.engine.torch import TorchEngine

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
    monkeypatch.setattr(gpu_check, "_difference", lambda got, expected: float(np.nan))

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "check.json"

    assert gpu_check.main(["--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stsm-rt: error: the GPU check needs an NVIDIA GPU") and error.count("\n") == 1
    assert not out.parent.exists()
