from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from stsm_rt import export
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.export import compare, export_engine
from stsm_rt.manifest import DecisionSpec, Manifest, manifest_path, sha256_of
from stsm_rt.model import ModelSpec, load_model, save_model
from stsm_rt.networks import ARCHITECTURES
from stsm_rt.shift import PRESETS, ShiftError

STSM = PRESETS["stsm_online"].to_json()
DT2 = {"name": "dt2", "groups": [{"fraction": "1/8", "dt": 2, "dh": 0, "dw": 0}]}


def write_model(path, network="r8", shift=STSM, size=(48, 64), **fields):
    spec = ModelSpec(
        network=network,
        padding=ARCHITECTURES[network].padding,
        shift=shift,
        rates=(0.5, 0.1),
        changes=True,
        labels=("clap", "wave", "nothing"),
        background="nothing",
        height=size[0],
        width=size[1],
        frame_rate=10.0,
        decision=DecisionSpec(smoothing=2, threshold=0.5, release=0.3, min_steps=2),
        recipe={"name": "test"},
        **fields,
    )
    torch.manual_seed(0)
    model = spec.build().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    # Logits of order one, whatever the depth.
    noise = torch.randint(0, 256, (1, 2, *size, 3), dtype=torch.uint8)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.classifier.weight /= model(noise).abs().max()
    save_model(model, spec, path)
    return path


def test_a_model_file_tells_what_it_is(tmp_path):
    path = write_model(tmp_path / "m.safetensors")
    network, spec = load_model(path)
    assert spec.labels == ("clap", "wave", "nothing")
    assert spec.rates == (0.5, 0.1)
    assert network.shift == PRESETS["stsm_online"]
    assert not network.training


@pytest.mark.slow
@pytest.mark.parametrize("network", sorted(ARCHITECTURES))
@pytest.mark.parametrize("shift", [STSM, DT2, None], ids=["stsm_online", "dt2", "plain"])
def test_onnxruntime_equals_pytorch(tmp_path, network, shift):
    weights = write_model(tmp_path / "m.safetensors", network, shift)
    target = tmp_path / "m.onnx"
    manifest = export_engine(weights, target)
    assert manifest == Manifest.load(target)
    assert manifest.weights_sha256 == sha256_of(weights)
    assert {s.delay for s in manifest.states} == ({1, 2} if shift is DT2 else {1})
    assert compare(load_model(weights)[0], target, frames=16) <= 1e-4


def test_the_graph_has_the_contracts_names_and_types(tmp_path):
    export_engine(write_model(tmp_path / "m.safetensors"), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    frame = graph.input[0]
    assert frame.name == "frame"
    assert frame.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in frame.type.tensor_type.shape.dim] == [1, 48, 64, 3]
    states = [s.name for s in Manifest.load(tmp_path / "m.onnx").states]
    assert [i.name for i in graph.input[1:]] == [f"{name}_in" for name in states]
    assert [o.name for o in graph.output] == ["logits", *(f"{name}_out" for name in states)]
    users = [node.op_type for node in graph.node if "frame" in node.input]
    assert users == ["Cast"]


def test_the_file_names_no_folder_of_the_machine_that_made_it(tmp_path):
    export_engine(write_model(tmp_path / "m.safetensors"), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b"stsm_rt/" not in content


def test_a_batched_engine_keeps_the_state_of_idle_slots(tmp_path):
    weights = write_model(tmp_path / "m.safetensors")
    export_engine(weights, tmp_path / "one.onnx")
    export_engine(weights, tmp_path / "two.onnx", batch=2)
    one, two = Engine.open(tmp_path / "one.onnx", slots=2), Engine.open(tmp_path / "two.onnx", slots=2)
    frames = np.random.default_rng(0).integers(0, 256, (10, 1, 48, 64, 3), np.uint8)
    for index, frame in enumerate(frames):
        slot = index % 3 % 2
        expected = one.step(frame, [slot]).copy()
        np.testing.assert_allclose(two.step(frame, [slot]), expected, atol=1e-4 * np.abs(expected).max())


def test_a_shift_that_looks_ahead_has_no_engine(tmp_path):
    weights = write_model(tmp_path / "m.safetensors", shift=PRESETS["stsm"].to_json())
    with pytest.raises(ShiftError, match="stsm_online"):
        export_engine(weights, tmp_path / "out" / "m.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_an_engine_that_disagrees_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="nothing was written"):
        export_engine(write_model(tmp_path / "m.safetensors"), tmp_path / "out" / "m.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_the_older_runtime_of_python_3_10_can_read_the_opset(tmp_path):
    # onnxruntime 1.23 reads opset 23 and below.
    export_engine(write_model(tmp_path / "m.safetensors"), tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version <= 23
    assert Manifest.load(tmp_path / "m.onnx").runtime_version == onnxruntime.__version__


@pytest.mark.parametrize("kind", ["absent", "text", "truncated", "foreign", "onnx suffix"])
def test_bad_weights_are_one_sentence_and_exit_code_2(tmp_path, kind):
    weights, target = write_model(tmp_path / "m.safetensors"), "m.onnx"
    if kind == "absent":
        weights.unlink()
    elif kind == "text":
        weights.write_text("not weights")
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, weights)
    else:
        target = "m.engine"
    command = [sys.executable, "-m", "stsm_rt.export", "--weights", weights, "--out", tmp_path / "out" / target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("stsm-rt: error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_accuracy_travels_from_the_weights_into_the_manifest(tmp_path):
    weights = write_model(tmp_path / "m.safetensors", accuracy={"top1": 0.5})
    export_engine(weights, tmp_path / "m.onnx")
    assert json.loads(manifest_path(tmp_path / "m.onnx").read_text())["accuracy"] == {"top1": 0.5}
