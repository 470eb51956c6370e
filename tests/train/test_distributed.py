from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_videos import write_dataset
from two_processes import RUNS, data_of, weights

from stsm_rt.errors import UserError
from stsm_rt.model import load_model
from stsm_rt.train.command import main
from stsm_rt.train.processes import make_fabric, shares

# Rounding in double precision is 1e-16 of a number; a hundred steps that divide by the size of the gradient (AdamW,
# batch norm) enlarge it to 1e-12 at most. A clip lost, counted twice or augmented otherwise changes weights by 1e-4.
TOLERANCE = 1e-10
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = write_dataset("list", tmp_path_factory.mktemp("videos"), frames=6)
    broken = sorted(folder.rglob("train_1.mp4"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    return folder


@pytest.fixture(scope="module")
def of_two(videos, tmp_path_factory):
    """The weights of all runs as two processes train them, each under a torchrun of its own, as on two machines."""
    out = tmp_path_factory.mktemp("two") / "weights.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    script = [str(HERE / "two_processes.py"), str(videos), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(node), *script], stderr=subprocess.PIPE, text=True, env=environment
        )
        for node in range(2)
    ]
    try:
        said = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    return torch.load(out, weights_only=True)


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_weights_of_one(of_two, videos, name):
    recipe = RUNS[name]
    one = weights(recipe, data_of(recipe, videos, 0), make_fabric("cpu", precision="64-true"))
    assert largest_difference(of_two[name], one) < TOLERANCE


@pytest.mark.slow
def test_accumulation_over_two_processes_gives_the_weights_of_the_whole_batch(of_two):
    name = "sgd, frozen batch norm, frozen backbone at first"
    assert largest_difference(of_two[name], of_two["accumulated"]) < TOLERANCE


@pytest.mark.slow
def test_an_error_of_one_process_reaches_all(of_two):
    assert of_two["error"] == "only the second process cannot read this; remove it"


@pytest.mark.slow
def test_two_processes_that_are_killed_and_resumed_give_the_weights_of_an_uninterrupted_run(tmp_path):
    data = shrec17(tmp_path / "data")
    recipe = tmp_path / "squares.toml"
    recipe.write_text(RECIPE)
    options = [str(recipe), "--data", str(data), "--device", "cpu", "--precision", "64-true"]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "stsm_rt.train", *options, "--devices", "2", "--out", str(tmp_path / "cut")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "cut" / "squares-tsm_online-split1-seed0"
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not (run / "log.csv").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert 1 <= len(epochs(run)) < 12
    assert not (run / "squares.safetensors").exists()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert epochs(run) == list(range(1, 13))
    found, record = load_model(run / "squares.safetensors")
    assert "the CPU x 2" in record.recipe["trained_on"]
    expected, _ = load_model(tmp_path / "whole" / run.name / "squares.safetensors")
    assert largest_difference(found.state_dict(), expected.state_dict()) < 1e-6  # models are loaded in single precision


RECIPE = """
name = "squares"
dataset = "shrec17"
network = "r8"
shift = "tsm_online"
height = 16
width = 16
frame_rate = 15.0
steps = 4
epochs = 12
batch = 8
pretrained = false
ema = 0.9
"""


def shrec17(folder):
    folder.mkdir()
    keys = np.array([(gesture, 1, person, 1) for gesture in range(1, 15) for person in range(1, 4)])
    frames = np.random.default_rng(0).integers(0, 256, (len(keys), 6, 20, 20), np.uint8)
    np.savez(folder / "shrec17_composed_96x72.npz", frames=frames, keys=keys)
    (folder / "test_gestures.txt").write_text("".join(f"{k} 1 3 1 {k} {k} 6\n" for k in range(1, 15)))
    return folder


def epochs(run):
    with (run / "log.csv").open() as log:
        return [int(row["epoch"]) for row in csv.DictReader(log)]


@given(count=st.integers(1, 200), world=st.integers(1, 9), accumulate=st.integers(1, 9))
def test_the_shares_of_all_processes_are_the_batch(count, world, accumulate):
    processes = [SimpleNamespace(world_size=world, global_rank=rank) for rank in range(world)]
    if count < world * accumulate:
        with pytest.raises(UserError, match=f"batch of {count} clips cannot be divided"):
            shares(count, processes[0], accumulate)
        return
    parts = [part for process in processes for part in shares(count, process, accumulate)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_numbers_that_contradict_torchrun_are_one_sentence(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--devices is 3, but torchrun started 2"):
        make_fabric("cpu", devices=3)
    with pytest.raises(UserError, match="--nodes is 3, but torchrun started 2"):
        make_fabric("cpu", nodes=3)


def test_gpus_that_are_not_there_are_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="PyTorch sees 2 GPUs"):
        make_fabric("cuda", devices=3)
