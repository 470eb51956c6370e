"""The table of what a shift is worth, from trainings to Markdown."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
name = "tiny"
dataset = "jhmdb"
network = "r8"
shift = "tsm_online"
height = 32
width = 32
frame_rate = 10.0
steps = 3
epochs = 1
batch = 4
pretrained = false
"""


@pytest.fixture
def ablation(tmp_path: Path) -> ModuleType:
    """The script, copied so that its results lie in a folder of the test's own."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    script = shutil.copy(ROOT / "benchmarks" / "ablation.py", tmp_path / "benchmarks")
    spec = importlib.util.spec_from_file_location("ablation", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module
    spec.loader.exec_module(module)
    return module


def cell(shift: str, split: int, seed: int, top1: float) -> dict[str, object]:
    return {"recipe": "tiny", "shift": shift, "split": split, "seed": seed, "top1": top1, "top5": 1.0}


def clips(folder: Path) -> None:
    """Six clips in the layout of J-HMDB: a square that moves left or right."""
    folder.mkdir()
    lines = ["file,class,label,split1,split2,split3,source_group,frames,original_name"]
    for number in range(6):
        label = number % 2
        writer = cv2.VideoWriter(str(folder / f"{number}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 30.0, (48, 48))
        for t in range(9):
            picture = np.zeros((48, 48, 3), np.uint8)
            x = 3 * t if label else 36 - 3 * t
            picture[20:30, x : x + 10] = 255
            writer.write(picture)
        writer.release()
        side = "test" if number < 2 else "train"
        lines.append(f"{number}.mp4,{('left', 'right')[label]},{label},{side},{side},{side},group{number},9,x")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def test_a_row_is_a_shift_a_column_a_split_and_the_mean_is_of_whole_rounds(ablation):
    records = [cell("none", split, 0, 0.5 + split / 10) for split in (1, 2, 3)]
    records += [cell("none", split, 1, 0.4 + split / 10) for split in (1, 2, 3)]
    records += [cell("tsm_online", 1, 0, 0.625)]
    rows = {line.split("|")[1].strip(): line for line in ablation.table(records).splitlines()[2:]}
    assert rows["`none`"] == (
        "| `none` | 55.0 ± 7.1 (60.0, 50.0) | 65.0 ± 7.1 (70.0, 60.0) | 75.0 ± 7.1 (80.0, 70.0) "
        "| 65.0 ± 7.1 (70.0, 60.0) |"
    )
    assert rows["`tsm_online`"] == "| `tsm_online` | 62.5 (1 seed) |  |  |  |"
    assert rows["`stsm_online`"].split("|")[2:6] == ["  "] * 4


def test_a_cell_that_is_measured_again_replaces_its_line(ablation):
    for top1 in (0.5, 0.75):
        ablation.add_record(cell("none", 2, 0, top1))
    ablation.add_record(cell("none", 1, 0, 0.25))
    assert [(r["split"], r["top1"]) for r in ablation.read_records()] == [(1, 0.25), (2, 0.75)]


@pytest.mark.slow
def test_a_cell_is_trained_on_its_split_exported_played_and_not_done_twice(ablation, tmp_path: Path):
    clips(tmp_path / "data")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    command = [sys.executable, str(tmp_path / "benchmarks" / "ablation.py"), "--recipe", "tiny.toml", "--data", "data"]
    command += ["--shifts", "tsm_online", "--splits", "3", "--seeds", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (record,) = ablation.read_records()
    weights = tmp_path / "runs/ablation/tiny-tsm_online-split3-seed0/tiny.safetensors"
    measured = json.loads((weights.parent / "measured.json").read_text())
    assert (record["clips"], record["top1"]) == (2, measured["top1"])
    assert "(1 seed)" in (tmp_path / "benchmarks" / "ABLATION.md").read_text()
    before = weights.stat().st_mtime_ns
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and weights.stat().st_mtime_ns == before


def test_a_training_that_fails_ends_with_its_sentence(ablation, tmp_path: Path, capsys):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    options = ["--recipe", str(tmp_path / "tiny.toml"), "--data", str(tmp_path / "nowhere"), "--splits", "1"]
    assert ablation.main([*options, "--shifts", "none", "--seeds", "0", "--out", str(tmp_path / "runs")]) == 2
    assert "expected J-HMDB with its manifest.csv" in capsys.readouterr().err
