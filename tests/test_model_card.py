from __future__ import annotations

import json
from pathlib import Path

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


def test_missing_records_are_one_sentence(tmp_path, capsys):
    assert main(arguments(tmp_path / "card.md", weights=tmp_path / "none.safetensors")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shipped_engine_is_made_from_the_shipped_weights(tmp_path):
    from stsm_rt.export import compare

    network, _ = load_model(ENGINES / "actions_lite0.safetensors")
    assert compare(network, ENGINES / "actions_lite0_fp32.onnx", frames=16) <= 1e-4
