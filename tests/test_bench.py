from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clips import plain, write_video

from stsm_rt import bench


def run(*arguments: Any) -> int:
    return bench.main([str(argument) for argument in arguments])


def test_the_report_holds_machine_versions_runs_and_comparisons(make_engine, tmp_path: Path, capsys):
    a, b = make_engine(), make_engine(height=24, width=32)
    out = tmp_path / "bench.json"

    assert run("--engine", a.path, "--engine", b.path, "--pairs", 3, "--json", out) == 0

    record = json.loads(out.read_text())
    assert {"command", "machine", "versions", "runs", "comparisons", "floors"} == set(record)
    assert record["machine"]["processor"] and record["machine"]["cores"] >= 1
    assert {"stsm-rt", "python", "numpy", "onnxruntime"} <= set(record["versions"])
    assert [run["sha256"] for run in record["runs"]] == [a.manifest.sha256, b.manifest.sha256]
    assert [len(run["blocks"]) for run in record["runs"]] == [3, 3]
    assert all(0 < run["min"] <= run["median"] <= run["p95"] for run in record["runs"])
    (comparison,) = record["comparisons"]
    assert set(comparison) == {"a", "b", "ratio_median", "ratio_min", "ratio_max", "pairs", "interval"}
    assert comparison["a"] != comparison["b"] and comparison["pairs"] == 3
    low, high = comparison["interval"]
    assert comparison["ratio_min"] <= low <= comparison["ratio_median"] <= high <= comparison["ratio_max"]
    assert "24x32" in capsys.readouterr().out


def test_the_floor_is_measured_in_the_same_run(tiny_engine, tmp_path: Path, capsys):
    out = tmp_path / "bench.json"

    assert run("--engine", tiny_engine.path, "--pairs", 2, "--json", out) == 0

    (floor,) = json.loads(out.read_text())["floors"]
    assert floor["rates"]["by"] in ("numpy", "onnxruntime")
    assert floor["rates"]["operations_per_second"] > 1e8 and floor["rates"]["bytes_per_second"] > 1e8
    (step,) = floor["steps"]
    assert step["operations"] == 12 * 4  # the classifier, all that is a product
    assert step["step"]["pairs"] == 2
    assert "multiply-adds/s" in capsys.readouterr().out


def test_without_onnx_the_floor_is_left_out_and_said(tiny_engine, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert run("--engine", tiny_engine.path, "--pairs", 1) == 0
    assert "no floor of 1 engine, as counting operations needs onnx" in capsys.readouterr().out


def test_an_engine_is_compared_with_itself(tiny_engine, tmp_path: Path):
    out = tmp_path / "bench.json"

    assert run("--engine", tiny_engine.path, "--against", "self", "--pairs", 4, "--json", out) == 0

    record = json.loads(out.read_text())
    (comparison,) = record["comparisons"]
    assert (comparison["a"], comparison["b"], comparison["pairs"]) == ("colours.onnx", "colours.onnx again", 4)
    assert comparison["interval"] is not None
    assert len(record["runs"]) == 2 and len(record["floors"][0]["steps"]) == 1


def test_one_engine_is_timed_without_a_comparison(tiny_engine, tmp_path: Path):
    out = tmp_path / "bench.json"

    assert run("--engine", tiny_engine.path, "--pairs", 1, "--json", out) == 0
    assert json.loads(out.read_text())["comparisons"] == []


def test_an_engine_with_a_batch_is_timed_with_all_its_rows(make_engine):
    assert run("--engine", make_engine(batch=2, delays=(1, 1, 1)).path, "--pairs", 1) == 0


def test_the_whole_loop_is_measured_on_a_video(tiny_engine, tmp_path: Path, capsys):
    video = write_video(tmp_path / "clip.mp4", plain("blue", 10) + plain("red", 10))
    out = tmp_path / "bench.json"

    code = run("--engine", tiny_engine.path, "--pairs", 2, "--loop", video, "--frames", 200, "--json", out)

    assert code == 0
    loop = json.loads(out.read_text())["loop"]
    assert (loop["file"]["frames"], loop["file"]["processor"]["pairs"]) == (20, 2)
    assert loop["live"]["frames"] == 20 and loop["live"]["results"] > 0
    assert sys.platform != "linux" or loop["memory"]["frames"] == 200
    assert "from a frame's arrival to its result" in capsys.readouterr().out


def test_a_plot_is_drawn(tiny_engine, tmp_path: Path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench.png"

    assert run("--engine", tiny_engine.path, "--against", "self", "--pairs", 2, "--plot", out) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(
    tiny_engine, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    assert run("--engine", tiny_engine.path, "--against", "self", "--plot", tmp_path / "bench.png") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "pip install 'stsm-rt[bench]'" in captured.err


def test_without_torch_building_is_refused_in_one_sentence(tmp_path: Path):
    code = (
        "import sys; sys.modules['torch'] = None; from stsm_rt import bench; sys.exit(bench.main(['--network', 'r8']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)

    assert result.returncode == 2
    assert result.stderr.startswith("stsm-rt: error: building an engine needs ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "no.onnx"],
        ["--json", "absent/bench.json"],
        ["--plot", "absent/bench.png"],
        ["--plot", "bench.txt", "--against", "self"],
        ["--plot", "bench.png"],
        ["--loop", "no.mp4"],
        ["--loop", "no.mp4", "--engine", "a.onnx", "--engine", "b.onnx"],
        ["--engine", "a.onnx", "--network", "r50"],
        ["--engine", "a.onnx", "--precision", "int8"],
        ["--engine", "a.onnx", "--weights", "a.safetensors"],
        ["--network", "r50", "--calibration", "clip.mp4"],
        ["--network", "r50", "--exclude-layer", "backbone.conv1"],
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(arguments, tmp_path: Path, monkeypatch, capsys):
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)

    assert run(*arguments) == 2

    error = capsys.readouterr().err
    assert error.startswith("stsm-rt: error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--pairs", "0"], ["--frames", "0"], ["--size", "8"], ["--against", "air"], ["--precision", "fp16"]]
)
def test_numbers_and_names_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
