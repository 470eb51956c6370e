from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stsm_rt.export import export_engine
from stsm_rt.manifest import sha256_of
from stsm_rt.model import load_model
from stsm_rt.train.command import main

RECIPE = Path(__file__).parents[2] / "recipes" / "gestures_r8.toml"
SMALL = RECIPE.read_text().replace("epochs = 30", "epochs = 2").replace("batch = 64", "batch = 8")


@pytest.fixture
def data(tmp_path):
    """A folder laid out as SHREC'17, of noise."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    keys = np.array([(gesture, 1, person, 1) for gesture in range(1, 15) for person in range(1, 5)])
    frames = generator.integers(0, 256, (len(keys), 8, 24, 32), np.uint8)
    np.savez(folder / "shrec17_composed_96x72.npz", frames=frames, keys=keys)
    lines = [f"{' '.join(map(str, key))} {key[0]} {key[0]} 8" for key in keys if key[2] == 4]
    (folder / "test_gestures.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "gestures_r8.toml").write_text(SMALL)
    return folder


def train(data, *options):
    out = data.parent / "runs"
    return main(
        [str(data.parent / "gestures_r8.toml"), "--data", str(data), "--out", str(out), "--device", "cpu", *options]
    )


def test_a_recipe_and_data_become_weights_an_engine_and_an_honest_record(data, capsys):
    torch.set_num_threads(1)
    assert train(data, "--report-test", "--shift", "stsm_online", "--seed", "3") == 0
    run = data.parent / "runs" / "gestures_r8-stsm_online-split1-seed3"
    assert "of 14 clips (test list)" in capsys.readouterr().out
    assert len((run / "log.csv").read_text().splitlines()) == 3
    network, spec = load_model(run / "gestures_r8.safetensors")
    assert spec.shift["name"] == "stsm_online"
    assert spec.recipe["seed"] == 3
    assert spec.recipe["trained_on"].startswith("the CPU, PyTorch")
    assert spec.accuracy["clips"] == 14
    assert sum(p.numel() for p in network.parameters()) < 0.5e6
    digest = sha256_of(run / "gestures_r8.safetensors")
    manifest = export_engine(network, spec, data.parent / "gestures_r8.onnx", weights_sha256=digest)
    assert manifest.labels[6] == "swipe_right"


def test_a_held_out_part_is_left_out_and_reported_on(data, capsys):
    assert train(data, "--hold-out", "0/3", "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "28 clips, 1 epochs" in said
    assert "of 14 clips (held-out part 0/3 of the training list)" in said


def test_a_run_is_never_overwritten(data, capsys):
    assert train(data, "--epochs", "1") == 0
    assert train(data, "--epochs", "1") == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hold-out", "3/3"], "0 <= FOLD < FOLDS"),
        (["--hold-out", "half"], "FOLD/FOLDS"),
        (["--shift", "sideways"], "unknown shift 'sideways'"),
        (["--shift", "tsm_onlin"], "the presets are"),
    ],
)
def test_bad_options_are_one_sentence(data, capsys, options, words):
    assert train(data, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (data.parent / "runs").exists()


def test_an_absent_folder_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "stsm_rt.train", RECIPE, "--data", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "found none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_log_is_a_table_with_a_row_for_each_epoch(data):
    assert train(data, "--epochs", "2") == 0
    (log,) = (data.parent / "runs").rglob("log.csv")
    rows = list(csv.DictReader(log.open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[0].keys() == {"epoch", "loss", "lr", "seconds"}
    assert all(float(row["loss"]) > 0 for row in rows)
