"""Graphs are proved before they are written: FP32, FP16 and INT8, for one stream and for several."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from clips import write_video
from small_networks import DT2, STSM, panning, small_model, write_model

from stsm_rt import export
from stsm_rt.calibrate import calibrate
from stsm_rt.engine import Engine
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.errors import UserError
from stsm_rt.export import export_engine, moving_clips, relative_difference
from stsm_rt.manifest import Manifest, manifest_path, sha256_of
from stsm_rt.model import load_model
from stsm_rt.networks import ARCHITECTURES, stream
from stsm_rt.shift import PRESETS, ShiftError

ENGINES = Path(__file__).parents[1] / "engines"
SHA256 = "a" * 64


@pytest.fixture
def openvino():
    if find_spec("openvino") is None:
        message = "OpenVINO is not installed: pip install 'stsm-rt[openvino]'"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The FP32 engine of `small_model()`, batch 1: exporting takes seconds."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    export_engine(*small_model(), path, weights_sha256=SHA256)
    return path


@pytest.fixture
def export_once(exported, monkeypatch):
    monkeypatch.setattr(export, "export_onnx", lambda _, path, **options: shutil.copyfile(exported, path))


@pytest.fixture(scope="module")
def ranges(exported, tmp_path_factory):
    clips = [write_video(tmp_path_factory.mktemp("clips") / "a.mp4", panning(6), fps=10)]
    return calibrate(exported, clips, data="a clip")


def logits_of(path, clip):
    """(frames, N, K), the graph computed node by node."""
    engine = OnnxRuntimeEngine(path, slots=clip.shape[1], fused=False)
    return np.stack([engine.step(frames).copy() for frames in clip])


def from_pytorch(network, clip):
    return stream(network, torch.from_numpy(clip).transpose(0, 1)).transpose(0, 1).numpy()


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
    model, spec = load_model(weights)
    manifest = export_engine(model, spec, target, weights_sha256=sha256_of(weights))
    assert manifest == Manifest.load(target)
    assert (manifest.runtime, manifest.precision, manifest.device) == ("onnxruntime", "fp32", "cpu")
    assert manifest.weights_sha256 == sha256_of(weights)
    assert {s.delay for s in manifest.states} == ({1, 2} if shift is DT2 else {1})
    clip = moving_clips(manifest, 16)
    assert relative_difference(logits_of(target, clip), from_pytorch(model, clip)) <= 1e-4


def test_the_graph_has_the_contracts_names_and_types(exported):
    graph = onnx.load(exported).graph
    frame = graph.input[0]
    assert frame.name == "frame"
    assert frame.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in frame.type.tensor_type.shape.dim] == [1, 48, 64, 3]
    states = [s.name for s in Manifest.load(exported).states]
    assert [i.name for i in graph.input[1:]] == [f"{name}_in" for name in states]
    assert [o.name for o in graph.output] == ["logits", *(f"{name}_out" for name in states)]
    users = [node.op_type for node in graph.node if "frame" in node.input]
    assert users == ["Cast"]


def test_the_file_names_no_folder_of_the_machine_that_made_it(exported):
    content = exported.read_bytes()
    assert b"site-packages" not in content
    assert b"stsm_rt/" not in content


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def two(request, tmp_path_factory, ranges):
    """A graph of batch 2 in each precision; the one for TensorRT, which has float16 states, where it is not FP32."""
    path = tmp_path_factory.mktemp("two") / "m.onnx"
    runtime = "onnxruntime" if request.param == "fp32" else "onnx"
    export_engine(
        *small_model(), path, weights_sha256=SHA256, runtime=runtime, precision=request.param, batch=2, ranges=ranges
    )
    return path


def test_interleaved_streams_of_a_batch_equal_each_alone(two):
    batched, alone = (OnnxRuntimeEngine(two, slots=2, fused=False) for _ in range(2))
    frames = np.random.default_rng(0).integers(0, 256, (12, 1, 48, 64, 3), np.uint8)
    turns = [0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1]
    got = [batched.step(frame, [slot])[0].copy() for frame, slot in zip(frames, turns, strict=True)]
    for slot in range(2):
        alone.reset()
        mine = [step for step, turn in enumerate(turns) if turn == slot]
        expected = [alone.step(frames[step], [slot])[0].copy() for step in mine]
        assert np.array_equal([got[step] for step in mine], expected)


def test_the_state_of_an_idle_row_stays_bit_for_bit_whatever_lies_in_it(two):
    session = onnxruntime.InferenceSession(two, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    states = Manifest.load(two).states
    outputs = ["logits", *(f"{state.name}_out" for state in states)]
    for poison in (None, np.nan):
        before = {f"{s.name}_in": rng.random(s.shape, np.float32).astype(s.dtype) for s in states}
        frames = rng.integers(0, 256, (2, 48, 64, 3), np.uint8)
        feeds = {"frame": frames, "active": np.array([True, False]), **before}
        expected = session.run(outputs, {**feeds, "active": np.array([True, True])})
        if poison is not None:
            for array in before.values():
                array[1] = poison
        feeds["frame"] = np.stack([frames[0], rng.integers(0, 256, (48, 64, 3), np.uint8)])
        logits, *after = session.run(outputs, feeds)
        assert np.array_equal(logits[0], expected[0][0])
        for old, new, undisturbed in zip(before.values(), after, expected[1:], strict=True):
            assert new[1].tobytes() == old[1].tobytes()
            assert np.array_equal(new[0], undisturbed[0])
            assert not np.array_equal(new[0], old[0])


def test_a_batch_has_the_contracts_names_and_types(two):
    manifest = Manifest.load(two)
    graph = onnx.load(two).graph
    names = [state.name for state in manifest.states]
    assert [i.name for i in graph.input] == ["frame", "active", *(f"{name}_in" for name in names)]
    assert [o.name for o in graph.output] == ["logits", *(f"{name}_out" for name in names)]
    assert graph.input[1].type.tensor_type.elem_type == onnx.TensorProto.BOOL
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {state.dtype for state in manifest.states} == {"float32" if manifest.precision == "fp32" else "float16"}
    assert {state.shape[0] for state in manifest.states} == {2}


def test_a_batch_equals_pytorch(two):
    manifest = Manifest.load(two)
    clip = moving_clips(manifest)
    difference = relative_difference(logits_of(two, clip), from_pytorch(small_model()[0], clip))
    assert difference <= {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1}[manifest.precision]


def test_an_fp16_graph_has_float16_states_and_equals_pytorch(tmp_path):
    network, spec = small_model()
    target = tmp_path / "m.onnx"
    manifest = export_engine(network, spec, target, weights_sha256=SHA256, runtime="onnx", precision="fp16")
    assert manifest == Manifest.load(target)
    assert (manifest.runtime, manifest.precision, manifest.device) == ("onnx", "fp16", "any")
    assert {state.dtype for state in manifest.states} == {"float16"}
    clip = moving_clips(manifest)
    assert relative_difference(logits_of(target, clip), from_pytorch(network, clip)) <= 2e-2
    graph = onnx.load(target).graph
    weights = {tensor.data_type for tensor in graph.initializer if tensor.name.endswith(".weight")}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert network.classifier.weight.dtype == torch.float32  # the caller's own stays as it was


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_int8_engine_is_written_for_each_runtime_and_says_how(tmp_path, ranges, export_once, request, runtime):
    if runtime == "openvino":
        request.getfixturevalue("openvino")
    network, spec = small_model(accuracy={"top1": 0.5})
    target = tmp_path / "m.onnx"
    manifest = export_engine(
        network,
        spec,
        target,
        weights_sha256=SHA256,
        runtime=runtime,
        precision="int8",
        ranges=ranges,
        exclude=["backbone.stem.*"],
    )
    assert manifest == Manifest.load(target)
    assert (manifest.runtime, manifest.precision, manifest.device) == (runtime, "int8", "cpu")
    # Shifts move bytes where integers go from convolution to convolution; running averages stay as they are.
    moved = "uint8" if runtime == "onnxruntime" else "float32"
    assert [state.dtype for state in manifest.states] == [moved] * 3 + ["float32"] * (len(manifest.states) - 3)
    assert manifest.folding == ("none" if runtime == "onnx" else "depthwise")
    assert manifest.calibration == {
        "method": "max",
        "data": "a clip",
        "clips": 1,
        "frames": 6,
        "excluded": ["backbone.stem.*"],
    }
    clip = moving_clips(manifest)
    graph, engine = logits_of(target, clip), Engine.open(target)
    fused = np.stack([engine.step(frames).copy() for frames in clip])
    assert relative_difference(fused, graph) <= 5e-2
    # It is another network than the FP32 one: the pairs are there, and they work.
    assert 1e-4 < relative_difference(graph, from_pytorch(network, clip)) < 0.2
    floats = [
        n.input[1] for n in onnx.load(target).graph.node if n.op_type == "Conv" and n.input[1].endswith(".weight")
    ]
    assert floats == ["backbone.stem.0.weight"]


@pytest.mark.usefixtures("openvino")
def test_openvino_computes_in_integers(tmp_path, ranges, export_once):
    target = tmp_path / "m.onnx"
    export_engine(*small_model(), target, weights_sha256=SHA256, runtime="openvino", precision="int8", ranges=ranges)
    layers = [node.get_rt_info() for node in Engine.open(target)._compiled.get_runtime_model().get_ops()]
    convolutions = [layer for layer in layers if layer["layerType"].astype(str) == "Convolution"]
    integers = [layer for layer in convolutions if layer["runtimePrecision"].astype(str) in ("u8", "i8")]
    assert len(integers) > len(convolutions) / 2


@pytest.mark.usefixtures("openvino")
def test_openvino_equals_pytorch_and_leaves_nothing_else(tmp_path, export_once):
    network, spec = small_model(accuracy={"top1": 0.5})
    target = tmp_path / "out" / "m.onnx"
    manifest = export_engine(network, spec, target, weights_sha256=SHA256, runtime="openvino")
    assert manifest == Manifest.load(target)
    assert (manifest.runtime, manifest.precision, manifest.device) == ("openvino", "fp32", "cpu")
    assert (manifest.weights_sha256, manifest.accuracy) == (SHA256, {"top1": 0.5})
    clip, engine = moving_clips(manifest), Engine.open(target)
    got = np.stack([engine.step(frames).copy() for frames in clip])
    assert relative_difference(got, from_pytorch(network, clip)) <= 1e-4
    assert sorted(path.name for path in target.parent.iterdir()) == ["m.onnx", "m.onnx.json"]


@pytest.mark.slow
@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("shift", [DT2, None], ids=["dt2", "plain"])
def test_openvino_equals_pytorch_with_other_shifts(tmp_path, shift):
    manifest = export_engine(*small_model(shift=shift), tmp_path / "m.onnx", weights_sha256=SHA256, runtime="openvino")
    assert {state.delay for state in manifest.states} == ({1, 2} if shift is DT2 else {1})


@pytest.mark.slow
@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("name", ["lite0", "mbv2", "r18", "r50"])
def test_openvino_equals_pytorch_with_every_network(tmp_path, name):
    export_engine(*small_model(name, size=(64, 96)), tmp_path / "m.onnx", weights_sha256=SHA256, runtime="openvino")


def test_int8_without_ranges_or_with_those_of_other_weights_is_refused(tmp_path, ranges):
    network, spec = small_model()
    target = tmp_path / "out" / "m.onnx"
    with pytest.raises(UserError, match="needs recorded ranges"):
        export_engine(network, spec, target, weights_sha256=SHA256, precision="int8")
    with pytest.raises(UserError, match=r"belongs to the weights aaaaaaaaaaaa..., not to bbbbbbbbbbbb"):
        export_engine(network, spec, target, weights_sha256="b" * 64, precision="int8", ranges=ranges)
    assert not target.parent.exists()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_fp16_for_a_processor_is_refused(tmp_path, runtime):
    with pytest.raises(UserError, match="FP16 is for TensorRT"):
        export_engine(
            *small_model(), tmp_path / "out" / "m.onnx", weights_sha256=SHA256, runtime=runtime, precision="fp16"
        )
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_matches_no_layer_leaves_nothing(tmp_path, ranges, export_once):
    with pytest.raises(UserError, match="no layer matches 'head'"):
        export_engine(
            *small_model(),
            tmp_path / "m.onnx",
            weights_sha256=SHA256,
            precision="int8",
            ranges=ranges,
            exclude=["head"],
        )
    assert not list(tmp_path.iterdir())


def test_a_missing_package_leaves_nothing(tmp_path, monkeypatch, export_once):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'stsm-rt\[openvino\]'"):
        export_engine(*small_model(), tmp_path / "m.onnx", weights_sha256=SHA256, runtime="openvino")
    assert not list(tmp_path.iterdir())


def test_a_shift_that_looks_ahead_has_no_engine(tmp_path):
    with pytest.raises(ShiftError, match="stsm_online"):
        export_engine(*small_model(shift=PRESETS["stsm"].to_json()), tmp_path / "m.onnx", weights_sha256=SHA256)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_that_disagrees_is_not_written(tmp_path, monkeypatch, export_once, ranges, precision):
    monkeypatch.setitem(export.TOLERANCES, precision, -1.0)
    monkeypatch.setattr(export, "_FARTHER", 0.0)
    with pytest.raises(UserError, match="nothing was written"):
        export_engine(*small_model(), tmp_path / "m.onnx", weights_sha256=SHA256, precision=precision, ranges=ranges)
    assert not list(tmp_path.iterdir())


def test_an_older_engine_survives_an_export_that_fails(tmp_path, monkeypatch, export_once):
    target = tmp_path / "m.onnx"
    manifest = export_engine(*small_model(), target, weights_sha256=SHA256)
    monkeypatch.setitem(export.TOLERANCES, "fp32", -1.0)
    with pytest.raises(UserError):
        export_engine(*small_model(), target, weights_sha256="b" * 64)
    assert Manifest.load(target) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


def test_a_graph_of_other_weights_disagrees(tmp_path, export_once):
    network, spec = small_model()
    with torch.no_grad():
        network.classifier.bias[0] += 0.01
    with pytest.raises(UserError, match="differs from PyTorch"):
        export_engine(network, spec, tmp_path / "m.onnx", weights_sha256=SHA256)


def test_integers_that_overflow_disagree(tmp_path, monkeypatch, export_once, ranges):
    # As on a processor that adds pairs of products in 16 bits: a scale is not what the graph says.
    played = export._played
    shares = iter([0.88, 1.0])  # the engine is played first, then its graph
    monkeypatch.setattr(export, "_played", lambda engine, clip: played(engine, clip) * next(shares))
    with pytest.raises(UserError, match="differs from its own graph, computed node by node"):
        export_engine(*small_model(), tmp_path / "m.onnx", weights_sha256=SHA256, precision="int8", ranges=ranges)


def test_logits_that_are_no_numbers_are_no_agreement():
    assert relative_difference(np.array([np.nan], np.float32), np.ones(1, np.float32)) == float("inf")
    assert relative_difference(np.ones(2, np.float32), np.array([1, np.nan], np.float32)) == float("inf")
    assert relative_difference(np.array([1.0, -2.5], np.float32), np.array([1, -2], np.float32)) == 0.25


def test_the_older_runtime_of_python_3_10_can_read_the_opset(exported):
    # onnxruntime 1.23 reads opset 23 and below.
    assert onnx.load(exported).opset_import[0].version <= 23
    assert Manifest.load(exported).runtime_version == onnxruntime.__version__


@pytest.mark.slow
def test_the_shipped_engine_is_made_again_byte_for_byte(tmp_path):
    shipped = ENGINES / "actions_lite0_fp32.onnx"
    made_by = onnx.load(shipped, load_external_data=False).producer_version
    if made_by != torch.__version__:
        pytest.skip(f"the shipped engine was made by PyTorch {made_by}, here is {torch.__version__}")
    weights = ENGINES / "actions_lite0.safetensors"
    network, spec = load_model(weights)
    before = Manifest.load(shipped)
    manifest = export_engine(
        network,
        dataclasses.replace(spec, accuracy=before.accuracy),
        tmp_path / "m.onnx",
        weights_sha256=sha256_of(weights),
    )
    assert (tmp_path / "m.onnx").read_bytes() == shipped.read_bytes()
    assert dataclasses.replace(manifest, runtime_version=before.runtime_version) == before


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


def run(*arguments):
    return export.main([str(argument) for argument in arguments])


def test_accuracy_travels_from_the_weights_into_the_manifest_of_fp32_only(tmp_path, capsys, export_once):
    weights = write_model(tmp_path / "m.safetensors", accuracy={"top1": 0.5})
    assert run("--weights", weights, "-o", tmp_path / "m.onnx") == 0
    assert json.loads(manifest_path(tmp_path / "m.onnx").read_text())["accuracy"] == {"top1": 0.5}
    assert "m.onnx: r8 fp32, " in capsys.readouterr().out
    assert export.known_accuracy(None, sha256_of(weights), "int8", load_model(weights)[1]) is None


def test_the_command_makes_an_int8_graph_for_tensorrt(tmp_path, ranges):
    weights = write_model(tmp_path / "m.safetensors")
    recorded = tmp_path / "ranges.json"
    dataclasses.replace(ranges, weights_sha256=sha256_of(weights), method="entropy").save(recorded)
    target = tmp_path / "m.onnx"
    arguments = ["--weights", weights, "-o", target, "--precision", "int8", "--exclude-layer", "*downsample*"]
    assert run(*arguments) == 2  # no calibration
    assert not target.exists()
    assert run(*arguments, "--calibration", recorded) == 0
    manifest = Manifest.load(target)
    assert (manifest.runtime, manifest.precision, manifest.device) == ("onnx", "int8", "any")
    assert {state.dtype for state in manifest.states} == {"float16"}
    assert manifest.calibration is not None
    assert (manifest.calibration["method"], manifest.calibration["excluded"]) == ("entropy", ["*downsample*"])
    assert manifest.accuracy is None
