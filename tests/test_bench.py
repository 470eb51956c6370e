from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stsm_rt import bench


class PacedEngine:
    """An engine on a clock of its own, whose first steps after a switch take longer."""

    clock = 0.0
    last: PacedEngine | None = None

    def __init__(self, manifest: Any, seconds: float) -> None:
        self.manifest = manifest
        self.frames = np.zeros((1, 4, 4, 3), np.uint8)
        self.seconds = seconds
        self.steps = 0
        self.since_switch = 0

    def step(self, frames: np.ndarray, slots: Sequence[int] | None = None) -> None:
        self.since_switch = self.since_switch + 1 if PacedEngine.last is self else 1
        PacedEngine.last = self
        PacedEngine.clock += self.seconds * (2 if self.since_switch <= bench.WARM_UP_STEPS else 1)
        # The machine slows down all the time, which is what pairs are for.
        self.seconds *= 1.0001
        self.steps += 1


@pytest.fixture
def paced(tiny_engine, monkeypatch):
    PacedEngine.clock, PacedEngine.last = 0.0, None
    monkeypatch.setattr(bench, "perf_counter", lambda: PacedEngine.clock)
    return lambda seconds: PacedEngine(tiny_engine.manifest, seconds)


def test_the_first_steps_after_a_switch_are_not_counted(paced):
    run = bench.time_engines([paced(0.010), paced(0.020)], ["a", "b"], pairs=4)[0]

    assert run.steps == 4 * bench.BLOCK_STEPS
    assert 0.010 <= run.min <= run.median <= run.p95 < 0.012


def test_ratios_are_taken_pair_by_pair_and_survive_a_drift_of_the_machine(paced):
    a, b = bench.time_engines([paced(0.010), paced(0.020)], ["a", "b"], pairs=6)
    comparison = bench.compare(a, b)

    assert max(a.blocks) / min(a.blocks) > 1.01
    assert comparison.ratio_median == pytest.approx(2, rel=1e-3)
    assert comparison.ratio_min <= comparison.ratio_median <= comparison.ratio_max
    assert (comparison.a, comparison.b, comparison.pairs) == ("a", "b", 6)


def test_the_order_of_the_engines_alternates(tiny_engine, monkeypatch):
    order = []
    engines = [PacedEngine(tiny_engine.manifest, 1.0), PacedEngine(tiny_engine.manifest, 1.0)]
    monkeypatch.setattr(bench, "_block", lambda engine: order.append(engines.index(engine)) or [1.0])

    bench.time_engines(engines, ["a", "b"], pairs=3)

    assert order == [0, 1, 1, 0, 0, 1]


def test_the_report_holds_machine_versions_runs_and_comparisons(make_engine, tmp_path: Path, capsys):
    a, b = make_engine(), make_engine(height=24, width=32)
    out = tmp_path / "bench.json"

    code = bench.main(["--engine", str(a.path), "--engine", str(b.path), "--pairs", "3", "--json", str(out)])

    assert code == 0
    record = json.loads(out.read_text())
    assert list(record) == ["machine", "versions", "runs", "comparisons"]
    assert record["machine"]["processor"] and record["machine"]["cores"] >= 1
    assert {"stsm-rt", "python", "numpy", "onnxruntime"} <= set(record["versions"])
    assert [run["sha256"] for run in record["runs"]] == [a.manifest.sha256, b.manifest.sha256]
    assert [len(run["blocks"]) for run in record["runs"]] == [3, 3]
    (comparison,) = record["comparisons"]
    assert set(comparison) == {"a", "b", "ratio_median", "ratio_min", "ratio_max", "pairs"}
    assert comparison["a"] != comparison["b"] and comparison["pairs"] == 3
    assert "24x32" in capsys.readouterr().out


def test_one_engine_is_timed_without_a_comparison(tiny_engine, tmp_path: Path):
    out = tmp_path / "bench.json"

    assert bench.main(["--engine", str(tiny_engine.path), "--pairs", "1", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["comparisons"] == []


def test_an_engine_with_a_batch_is_timed_with_all_its_rows(make_engine):
    assert bench.main(["--engine", str(make_engine(batch=2, delays=(1, 1, 1)).path), "--pairs", "1"]) == 0


def test_what_cannot_be_used_is_said_in_one_sentence(tiny_engine, tmp_path: Path, capsys):
    missing = tmp_path / "absent" / "bench.json"
    for arguments in (
        ["--engine", str(tmp_path / "no.onnx")],
        ["--engine", str(tiny_engine.path), "--json", str(missing)],
    ):
        assert bench.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("stsm-rt: error: ") and error.count("\n") == 1
    assert not missing.parent.exists()
