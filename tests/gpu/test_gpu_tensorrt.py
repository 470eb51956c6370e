"""Plans of the shipped network, built and run on a real GPU and compared with PyTorch frame by frame."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stsm_rt.check_weights import moving_clip
from stsm_rt.engine.tensorrt import TensorRTEngine
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest
from stsm_rt.model import load_model
from stsm_rt.networks import stream
from stsm_rt.tensorrt_library import device_compute_capability, load_tensorrt, rtx_targets

WEIGHTS = Path(__file__).resolve().parents[2] / "engines" / "actions_lite0.safetensors"
# Of the largest logit. INT8 is held only to what a wrong scale or a lost state would exceed; what it costs in accuracy
# is measured on J-HMDB.
TOLERANCES = {"fp16": 2e-2, "int8": 0.25}
FRAMES = 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def runtime(request: pytest.FixtureRequest) -> str:
    runtime: str = request.param
    own = device_compute_capability()
    if own is None:
        pytest.skip("needs an NVIDIA GPU, and there is none on this machine")
    try:
        library = load_tensorrt(runtime)
    except UserError as error:
        pytest.skip(f"needs {runtime}: {error}")
    if runtime == "tensorrt-rtx" and own not in rtx_targets(library):
        pytest.skip(f"TensorRT-RTX does not know this GPU's compute capability {own}")
    return runtime


def build(runtime: str, precision: str, batch: int, folder: Path) -> Path:
    path = folder / f"{runtime}_{precision}_{batch}.engine"
    command = [sys.executable, "-m", "stsm_rt.build_engine", "--weights", str(WEIGHTS), "--runtime", runtime]
    command += ["--precision", precision, "--batch", str(batch), "-o", str(path)]
    subprocess.run(command, check=True, timeout=1200)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module", params=["fp16", "int8"])
def plan(runtime: str, folder: Path, request: pytest.FixtureRequest) -> Path:
    return build(runtime, request.param, 1, folder)


@pytest.fixture(scope="module")
def clip(plan: Path) -> np.ndarray:
    manifest = Manifest.load(plan)
    return moving_clip(FRAMES, manifest.input_height, manifest.input_width, seed=3)


def logits_of(engine: TensorRTEngine, clip: np.ndarray, slot: int = 0) -> np.ndarray:
    return np.stack([engine.step(frame[None], [slot])[0].copy() for frame in clip])


def test_every_frame_equals_pytorch(plan: Path, clip: np.ndarray) -> None:
    network, _ = load_model(WEIGHTS)
    expected = stream(network, torch.from_numpy(clip)[None])[0].numpy()
    got = logits_of(TensorRTEngine(plan), clip)

    assert np.abs(got - expected).max() <= TOLERANCES[Manifest.load(plan).precision] * np.abs(expected).max()


def test_cuda_graphs_are_used_and_repeat_plain_execution(plan: Path, clip: np.ndarray) -> None:
    engine = TensorRTEngine(plan, slots=2)
    assert engine.cuda_graphs
    graphs = logits_of(engine, clip)
    for rings in engine._rings:
        rings.graphs.clear()
    engine.reset()

    assert np.allclose(logits_of(engine, clip), graphs, rtol=0, atol=1e-3 * np.abs(graphs).max())


def test_interleaved_slots_equal_each_alone_bit_for_bit(plan: Path, clip: np.ndarray) -> None:
    streams = [clip, clip[::-1]]
    alone = [logits_of(TensorRTEngine(plan), frames) for frames in streams]
    engine = TensorRTEngine(plan, slots=2)
    for t in range(FRAMES):
        # The second stream pauses now and then, so the slots' phases drift apart.
        assert np.array_equal(engine.step(streams[0][t][None], [0])[0], alone[0][t])
        if t % 3:
            step = t - t // 3 - 1
            assert np.array_equal(engine.step(streams[1][step][None], [1])[0], alone[1][step])


def test_a_reset_starts_its_slot_again_and_touches_no_other(plan: Path, clip: np.ndarray) -> None:
    expected = logits_of(TensorRTEngine(plan), clip)
    engine = TensorRTEngine(plan, slots=2)
    for frame in clip[:5]:
        engine.step(np.stack([frame, frame]))
    engine.reset([1])

    assert np.array_equal(logits_of(engine, clip, slot=1), expected)
    assert np.array_equal(logits_of(engine, clip[5:], slot=0), expected[5:])


def test_the_rows_of_a_batch_serve_two_streams(runtime: str, folder: Path) -> None:
    plan = build(runtime, "fp16", 2, folder)
    manifest = Manifest.load(plan)
    clip = moving_clip(FRAMES, manifest.input_height, manifest.input_width, seed=3)
    alone = [logits_of(TensorRTEngine(plan, slots=2), clip, slot) for slot in range(2)]
    engine = TensorRTEngine(plan, slots=2)
    steps = [0, 0]
    for t in range(FRAMES):
        chosen = [[1, 0], [1], [0], [0, 1]][t % 4]
        logits = engine.step(np.stack([clip[steps[slot]] for slot in chosen]), chosen)
        for row, slot in zip(logits, chosen, strict=True):
            assert np.array_equal(row, alone[slot][steps[slot]])
            steps[slot] += 1


def test_closed_engines_give_the_memory_back(plan: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA cannot say how much memory the GPU has left")
    TensorRTEngine(plan).close()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(5):
        TensorRTEngine(plan, slots=4).close()

    assert torch.cuda.mem_get_info()[0] >= before - (32 << 20)
