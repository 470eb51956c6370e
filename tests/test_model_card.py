from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.model import load_model
from stsm_rt.model_card import main

ENGINES = Path(__file__).parents[1] / "engines"
REPORTS = ENGINES / "reports"


def arguments(out, weights=ENGINES / "actions_lite0.safetensors"):
    return [
        *("--weights", str(weights), "--out", str(out)),
        *("--measured", str(REPORTS / "actions_lite0_fp32.json")),
        *("--silence", str(REPORTS / "actions_lite0_fp32_silence.json")),
        *("--int8", str(REPORTS / "actions_lite0_int8.json")),
        *("--comparison", str(REPORTS / "actions_lite0_shifts.jsonl")),
    ]


def test_the_shipped_card_is_what_the_records_give(tmp_path):
    assert main(arguments(tmp_path / "card.md")) == 0
    assert (tmp_path / "card.md").read_text() == (ENGINES / "actions_lite0.md").read_text()


def test_engine_weights_report_and_recipe_belong_together():
    manifest = Manifest.load(ENGINES / "actions_lite0_fp32.onnx")
    report = json.loads((REPORTS / "actions_lite0_fp32.json").read_text())
    weights = ENGINES / "actions_lite0.safetensors"
    assert manifest.weights_sha256 == report["weights_sha256"] == sha256_of(weights)
    assert manifest.sha256 == report["engine_sha256"]
    assert manifest.accuracy == {key: report[key] for key in ("split", "clips", "top1", "top5")}
    assert report["top1"] >= 0.6
    _, spec = load_model(weights)
    assert spec.decision == manifest.decision
    assert (ENGINES / "actions_lite0_fp32.onnx").stat().st_size <= 20e6


@pytest.mark.parametrize("name", ["int8", "fp16_tensorrt", "int8_tensorrt"])
def test_the_other_precisions_are_made_of_the_same_weights(name):
    fp32, other = (Manifest.load(ENGINES / f"actions_lite0_{each}.onnx") for each in ("fp32", name))
    assert other.weights_sha256 == fp32.weights_sha256
    assert (other.labels, other.decision, other.frame_rate) == (fp32.labels, fp32.decision, fp32.frame_rate)
    # The same sizes in another order: ONNX Runtime's INT8 states have their channels last.
    assert [sorted(state.shape) for state in other.states] == [sorted(state.shape) for state in fp32.states]
    assert (other.calibration is not None) == name.startswith("int8")


@pytest.mark.parametrize("name", ["int8", "int8_tensorrt"])
def test_int8_lost_at_most_a_point(name):
    fp32, int8 = (json.loads((REPORTS / f"actions_lite0_{each}.json").read_text()) for each in ("fp32", name))
    assert int8["engine_sha256"] == sha256_of(ENGINES / f"actions_lite0_{name}.onnx")
    assert int8["clips"] == fp32["clips"]
    assert int8["top1"] >= fp32["top1"] - 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("name", "every"), [("int8", 2), ("int8_tensorrt", 8)])
def test_int8_decides_like_fp32(jhmdb, name, every):
    """Every second clip; every eighth for TensorRT's graph, which is computed node by node here."""
    from stsm_rt.engine import Engine
    from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
    from stsm_rt.playback import read_clips
    from stsm_rt.precision_report import accuracy

    clips = read_clips(jhmdb, 1)[::every]
    fp32 = accuracy(Engine.open(ENGINES / "actions_lite0_fp32.onnx"), clips, "FP32")
    int8 = accuracy(OnnxRuntimeEngine(ENGINES / f"actions_lite0_{name}.onnx", fused=every == 2), clips, "INT8")
    assert int8.changed(fp32) <= 0.05 * len(clips)
    assert sum(int8.correct) >= sum(fp32.correct) - max(0.01 * len(clips), 1)


def test_missing_records_are_one_sentence(tmp_path, capsys):
    assert main(arguments(tmp_path / "card.md", weights=tmp_path / "none.safetensors")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shipped_engine_is_made_from_the_shipped_weights(tmp_path):
    import torch

    from stsm_rt.engine import Engine
    from stsm_rt.export import moving_clips, relative_difference
    from stsm_rt.networks import stream

    network, _ = load_model(ENGINES / "actions_lite0.safetensors")
    engine = Engine.open(ENGINES / "actions_lite0_fp32.onnx")
    clip = moving_clips(engine.manifest, frames=16)
    expected = stream(network, torch.from_numpy(clip).transpose(0, 1)).transpose(0, 1).numpy()
    assert relative_difference(np.stack([engine.step(frames).copy() for frames in clip]), expected) <= 1e-4
