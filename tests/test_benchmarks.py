"""The scripts in ``benchmarks``, run as a person does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from clips import counted, write_video

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)


def run(engine: str, shift: str, milliseconds: float) -> dict[str, Any]:
    seconds = milliseconds / 1000
    times = {"median": seconds, "min": 0.9 * seconds, "p95": 1.2 * seconds}
    return {"engine": engine, "shift": shift, "input": [224, 288], **times}


def comparison(a: str, b: str, ratio: float, interval: tuple[float, float]) -> dict[str, Any]:
    low, high = ratio - 0.2, ratio + 0.2
    return {
        "a": a,
        "b": b,
        "ratio_median": ratio,
        "ratio_min": low,
        "ratio_max": high,
        "pairs": 30,
        "interval": interval,
    }


def record(**parts: Any) -> dict[str, Any]:
    machine = {"processor": "a processor", "cores": 2, "threads": 2, "quiet": {"others": 0.012, "stolen": 0.034}}
    defaults = {"runs": [], "comparisons": [], "floors": []}
    return {"command": "python -m a", "machine": machine, "versions": {"numpy": "2.0"}, **defaults, **parts}


def of_network(ratio: float, interval: tuple[float, float]) -> dict[str, Any]:
    """What the bench writes of r50."""
    plain, ours = "r50 fp32 plain", "r50 fp32 stsm_online"
    step = {
        "engine": ours,
        "operations": 4_087_000_000,
        "weight_bytes": 94_000_000,
        "state_bytes": 6_000_000,
        "multiplying": 0.041,
        "moving": 0.003,
        "step": comparison("its operations at the matrix rate", ours, 0.95, (0.94, 0.96)),
    }
    rates = {"size": 2048, "by": "numpy", "bytes_per_second": 3e10, "products": {"numpy": {"median": 0.0859}}}
    return record(
        runs=[
            run(f"{ours} naive", "stsm_online", 45),
            run(plain, "none", 41),
            run(ours, "stsm_online", 42),
            run(f"{ours} again", "stsm_online", 42),
        ],
        comparisons=[
            comparison(f"{ours} naive", ours, 0.9, (0.89, 0.91)),
            comparison(plain, ours, ratio, interval),
            comparison(plain, f"{ours} naive", 1.1, (1.09, 1.11)),
            comparison(ours, f"{ours} again", 1.001, (0.998, 1.004)),
        ],
        floors=[{"rates": rates, "steps": [step], "left_out": []}],
    )


@pytest.fixture
def written(tmp_path: Path):
    """Write records as raw numbers, and give the rows of the table that is generated, by what they are about."""

    def write(**records: dict[str, Any]) -> dict[str, list[str]]:
        folder, out = tmp_path / "results", tmp_path / "RESULTS.md"
        folder.mkdir()
        for name, data in records.items():
            (folder / f"{name}.json").write_text(json.dumps(data))
        done = script("results.py", "--results", folder, "--out", out)
        assert done.returncode == 0, done.stderr
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.read_text().splitlines()]
        return {row[0]: row[1:] for row in cells if len(row) > 1}

    return write


def test_a_machine_that_was_not_quiet_is_said_beside_the_verdict(written):
    noisy = of_network(1.021, (1.015, 1.027))
    noisy["machine"]["quiet"]["others"] = 0.4
    row = written(onnxruntime_fp32_r50=noisy)["ONNX Runtime FP32, shifted / plain: ResNet-50"]

    assert row[-1] == "yes; the machine was not quiet"


@pytest.mark.parametrize(
    ("ratio", "interval", "verdict"),
    [
        (1.021, (1.015, 1.027), "yes"),
        (1.029, (1.020, 1.035), "yes, but the interval reaches beyond"),
        (1.034, (1.028, 1.040), "no, but the interval reaches to it"),
        (1.051, (1.040, 1.060), "no"),
    ],
)
def test_a_bar_is_held_against_the_plain_network(written, ratio, interval, verdict):
    row = written(onnxruntime_fp32_r50=of_network(ratio, interval))["ONNX Runtime FP32, shifted / plain: ResNet-50"]

    assert row == ["at most 1.030", f"**{ratio:.3f}**", f"{interval[0]:.3f} to {interval[1]:.3f}, 30 pairs", verdict]


def test_the_floor_and_the_engine_against_itself_are_in_the_table(written):
    rows = written(onnxruntime_fp32_r50=of_network(1.02, (1.01, 1.03)))

    assert rows["ResNet-50 FP32 step / its operations at the matrix rate"][1] == "**0.950**"
    assert rows["A/A, onnxruntime fp32 r50"] == ["0.990 to 1.010", "**1.001**", "0.998 to 1.004, 30 pairs", "yes"]
    assert rows["r50 fp32 stsm_online"][:2] == ["4.087 G", "41.00 ms"]


def test_what_was_not_measured_is_said(written):
    rows = written()

    assert rows["OpenVINO FP32, shifted / plain: ResNet-50"][-1] == "not measured"
    assert rows["growth of resident memory per 10,000 frames"][-1] == "not measured"


def test_decisions_are_compared_with_the_clip(written):
    ours, clip = "r50 fp32 onnxruntime stsm_online", "r50 fp32 onnxruntime stsm_online clip of 8 frames"
    rows = written(
        rivals_r50=record(
            runs=[run(ours, "stsm_online", 42), run(clip, "stsm_online", 340)],
            comparisons=[comparison(clip, ours, 0.125, (0.12, 0.13))],
        )
    )

    assert rows["streaming decision / 8-frame clip per decision: ResNet-50"] == [
        "at most 0.143",
        "**0.125**",
        "0.120 to 0.130, 30 pairs",
        "yes",
    ]


def test_the_loop_is_in_the_table(written):
    part = {"processor": [1.0, 1.2, 1.1], "wall": [0.6, 0.6, 0.7]}
    file = {
        "size": [640, 480],
        "codec": "h264",
        "frames": 230,
        "steps": 77,
        "frames_per_second": 300.0,
        "steps_per_second": 100.0,
        "loop": part,
        "decode": part,
        "step": part,
        "resize": part,
        "processor": comparison("alone", "loop", 1.04, (1.03, 1.06)),
        "wall": comparison("alone", "loop", 1.1, (1.0, 1.2)),
    }
    latency = {"latency_median": 0.01, "latency_p95": 0.05, "latency_max": 0.06, "added_p95": 0.042}
    live = {"frames": 1000, "rate": 30.0, "dropped": 0, "step": 0.008, **latency}
    memory = {"frames": 10_000, "megabytes": [100.0, 100.1], "growth": -0.2}

    rows = written(loop=record(loop={"file": file, "live": live, "memory": memory}))

    assert rows["processor time of the loop on a file / (step + decoding alone)"][1:] == [
        "**1.040**",
        "1.030 to 1.060, 30 pairs",
        "yes, but the interval reaches beyond",
    ]
    assert rows["latency of the live loop beyond the step, p95"] == ["at most 33.33 ms", "**42.00 ms**", "", "no"]
    assert rows["growth of resident memory per 10,000 frames"][1:] == ["**-0.200 MB**", "", "yes"]
    assert rows["the whole loop"] == ["14.29 ms", "7.79 ms"]


def test_several_cameras_are_a_table_of_what_each_costs_and_gets(written):
    def camera(name: str, steps: int) -> dict[str, Any]:
        times = {"latency_median": 0.02, "latency_p95": 0.03, "latency_max": 0.2, "longest_wait": 0.25}
        return {"name": name, "given": 300, "frames": 299, "dropped": 3, "steps": steps, **times}

    runs = [
        {"cameras": 1, "processor": 5.0, "wall": 20.0, "each": [camera("front", 150)]},
        {"cameras": 2, "processor": 9.0, "wall": 20.0, "each": [camera("front", 150), camera("back", 140)]},
    ]
    rows = written(
        cameras=record(
            several=runs,
            rate=15.0,
            engine="actions.onnx",
            comparisons=[comparison("8 cameras one by one", "8 cameras in one batch", 1.05, (1.04, 1.06))],
        )
    )

    assert rows["1"] == ["7.5", "1.0 %", "20.0 ms", "30.0 ms", "0.25 s", "0.25", ""]
    assert rows["2"] == ["7.0", "1.0 %", "20.0 ms", "30.0 ms", "0.25 s", "0.45", "0.20 cores"]
    assert rows["back"] == ["300", "3", "140", "20.0 ms", "30.0 ms"]
    assert rows["8 cameras in one batch / one by one"][0] == "1.050"


def test_commands_machine_and_how_quiet_it_was_are_written(written, tmp_path: Path):
    written(onnxruntime_fp32_r50=of_network(1.02, (1.01, 1.03)))

    text = (tmp_path / "RESULTS.md").read_text()
    assert "`python -m a`" in text and "a processor, 2 cores, 2 threads for a step; numpy 2.0" in text
    assert "used 1.2 % of the cores" in text and "took 3.4 % away" in text


def test_the_ratios_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / "onnxruntime_fp32_r50.json").write_text(json.dumps(of_network(1.02, (1.01, 1.03))))
    out = tmp_path / "ratios.png"

    done = script("results.py", "--results", tmp_path, "--out", tmp_path / "RESULTS.md", "--plot", out)

    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_file_in_the_repository_is_what_the_raw_numbers_give(tmp_path: Path):
    out = tmp_path / "RESULTS.md"

    assert script("results.py", "--out", out).returncode == 0
    assert out.read_text() == (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_the_commands_of_all_measurements_can_be_listed():
    done = script("compare.py", "--list", "--video", "loop.mp4")

    commands = [line for line in done.stdout.splitlines() if line.startswith("$ python ")]
    assert done.returncode == 0 and len(commands) == 11
    assert "$ python -m stsm_rt.bench --loop loop.mp4 --json benchmarks/results/loop.json" in commands
    assert script("compare.py", "--only", "wind").returncode == 2


@pytest.mark.slow
def test_ways_to_a_decision_are_timed_in_one_run(tmp_path: Path):
    pytest.importorskip("torch")
    out = tmp_path / "rivals.json"

    done = script("rivals.py", "--network", "r8", "--size", 48, 64, "--pairs", 2, "--json", out)

    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    ours = "r8 fp32 onnxruntime stsm_online"
    against = {c["a"] for c in found["comparisons"] if c["b"] == ours}
    assert against == {
        "r8 fp32 onnxruntime plain",
        f"{ours} naive",
        f"{ours} clip of 8 frames",
        "r3d_18 fp32 onnxruntime clip of 16 frames",
        "r8 fp32 pytorch eager stsm_online",
    }
    assert all(c["pairs"] == 2 and c["interval"] for c in found["comparisons"])
    assert {"command", "machine", "versions", "runs", "comparisons"} == set(found)


def test_eight_cameras_are_all_served_by_the_default_network(tmp_path: Path):
    video, out = write_video(tmp_path / "clip.mp4", counted(30, (320, 240))), tmp_path / "cameras.json"

    done = script("cameras.py", "--video", video, "--cameras", 8, "--seconds", 5, "--json", out)

    assert done.returncode == 0, done.stderr
    (run,) = json.loads(out.read_text())["several"]
    steps = [camera["steps"] for camera in run["each"]]
    # Not more than every second of 15 frames/s, at a model of 10 frames/s; how many fewer is the machine's affair.
    assert len(steps) == 8 and max(steps) <= 39 and min(steps) >= max(5, max(steps) // 2)
    for number, camera in enumerate(run["each"], 1):
        assert camera["longest_wait"] < 3
        assert 0 < camera["latency_median"] <= camera["latency_p95"] <= camera["latency_max"] < 3
        assert (
            f"    {number}: {camera['given']} frames, {camera['dropped']} dropped, {camera['steps']} steps"
            in done.stdout
        )


@pytest.mark.slow
def test_two_cameras_that_lose_their_connections_leave_nothing_behind(tiny_engine: Any, tmp_path: Path):
    out = tmp_path / "soak.json"

    done = script("soak.py", "--engine", tiny_engine.path, "--steps", 4000, "--connection", 100, "--json", out)

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["steps"] >= 4000 and min(found["reconnects"]) >= 10
    # Every connection is a new stream.
    assert found["resets"] == found["reconnects"]
    assert abs(found["growth"]) <= 0.02 and found["wrong"] == []
