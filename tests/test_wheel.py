from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "actions_lite0_fp32.onnx"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the package build (extra dev)"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert (ROOT / "engines" / ENGINE).is_file(), "the default engine belongs to the repository"
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("stsm_rt-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment in which only the wheel is installed; returns its folder of commands."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    return commands


def run(commands: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [commands / "stsm-rt", *arguments], cwd=cwd, capture_output=True, text=True, env=clean, timeout=300
    )


def test_the_wheel_holds_the_engine_and_its_manifest_but_no_weights(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = archive.getinfo(f"stsm_rt/engines/{ENGINE}").file_size
    assert f"stsm_rt/engines/{ENGINE}.json" in names
    assert any(name.startswith("stsm_rt/engines/") and name.endswith(".md") for name in names)
    assert "stsm_rt/py.typed" in names
    assert not [name for name in names if name.endswith((".safetensors", ".pt", ".pth"))]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"stsm_rt"}
    assert size <= 20e6


def test_the_environment_has_no_torch(environment: Path):
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"
    assert subprocess.run([environment / "python", "-c", code]).returncode == 0


def test_the_installed_command_runs_the_embedded_engine_from_another_folder(environment: Path, tmp_path: Path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (320, 240))
    for index in range(45):
        frame = np.full((240, 320, 3), 90, np.uint8)
        cv2.circle(frame, (40 + 5 * index, 120), 30, (40, 180, 230), -1)
        writer.write(frame)
    writer.release()

    inspected = run(environment, "inspect", cwd=tmp_path)
    played = run(
        environment,
        "webcam",
        "--headless",
        "--source",
        "clip.mp4",
        "--events",
        "out.jsonl",
        "--save",
        "out.mp4",
        cwd=tmp_path,
    )

    assert inspected.returncode == 0, inspected.stderr
    assert ENGINE in inspected.stdout and "walk" in inspected.stdout
    assert played.returncode == 0, played.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    results = [line for line in lines if line["kind"] == "result"]
    assert len(results) >= 10 and results[-1]["frame"] > 40
    assert all(0 <= line["score"] <= 1 for line in results)
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 45
    capture.release()


def test_the_installed_command_answers_an_error_with_one_sentence(environment: Path, tmp_path: Path):
    result = run(environment, "evaluate", "--data", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("stsm-rt: error: ") and result.stderr.count("\n") == 1
