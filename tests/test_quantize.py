"""INT8 graphs: where the pairs are, what integers they hold, and that they compute what they say."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from clips import write_video
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from small_networks import panning, small_model

from stsm_rt.calibrate import calibrate
from stsm_rt.check_weights import random_weights
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.errors import UserError
from stsm_rt.export import export_engine, export_onnx, relative_difference
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.networks import StreamingNetwork
from stsm_rt.quantize import FORMS, convolutions, mean_error, quantize, weight_scale
from stsm_rt.ranges import Ranges

CLIP = panning(6)
TYPES = [*((form, "float32") for form in FORMS), ("onnx", "float16")]  # of the graph that is quantized


@dataclass(frozen=True)
class Calibrated:
    """A network, its FP32 graph and the ranges of its activations on `CLIP`-like frames."""

    network: StreamingNetwork
    graph: ModelProto
    ranges: Ranges
    manifest: Manifest
    clip: np.ndarray


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Calibrated]:
    done: dict[str, Calibrated] = {}

    def prepare(name: str) -> Calibrated:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            if name == "r8":
                network, spec = small_model()
                clip = CLIP
            else:
                weights = random_weights(name, height=64, width=64)
                network, clip = weights.network("stsm_online"), panning(6, (64, 64))
                assert network.shift is not None
                spec = dataclasses.replace(weights.spec, shift=network.shift.to_json())
            path = folder / "m.onnx"
            manifest = export_engine(network, spec, path, weights_sha256="a" * 64, folding="none")
            ranges = calibrate(path, [write_video(folder / "c.mp4", clip, fps=10)], data="a clip")
            done[name] = Calibrated(network, onnx.load(path), ranges, manifest, clip)
        return done[name]

    return prepare


@pytest.fixture(scope="module")
def r8(prepared: Callable[[str], Calibrated]) -> Calibrated:
    return prepared("r8")


@pytest.fixture(scope="module")
def half(r8: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    path = tmp_path_factory.mktemp("half") / "m.onnx"
    export_onnx(copy.deepcopy(r8.network).half(), path, height=48, width=64)
    return onnx.load(path)


class Pairs:
    """What a quantized graph says: scale and zero point of tensors, integers and scales of constants."""

    def __init__(self, model: ModelProto) -> None:
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        writers = {name: node for node in model.graph.node for name in node.output}
        self.tensors: dict[str, tuple[float, int]] = {}
        self.convolutions: dict[str, dict[str, Any]] = {}  # by the tensor that leaves
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                self.tensors[node.input[0]] = (float(self.constants[node.input[1]]), int(self.constants[node.input[2]]))
        for node in model.graph.node:
            if node.op_type == "Conv":
                self.convolutions[node.output[0]] = {
                    part: self._dequantized(writers.get(name)) or name
                    for part, name in zip(("x", "w", "b"), node.input, strict=True)
                }
        self.activations = {str(self.constants[n.input[2]].dtype) for n in model.graph.node if "QuantizeL" in n.op_type}

    def _dequantized(self, node: NodeProto | None) -> Any:
        """The float tensor behind a pair, or (integers, scale, zero point, axis) of a constant."""
        if node is None or node.op_type != "DequantizeLinear":
            return None
        if node.input[0] in self.constants:
            (axis,) = [attribute.i for attribute in node.attribute]
            return (*(self.constants[name] for name in node.input), axis)
        return node.input[0].removesuffix("_quantized")


def convs(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Conv"]


def compute(model: ModelProto, names: list[str], frames: np.ndarray) -> list[list[np.ndarray]]:
    """Tensors of a graph that is computed node by node, for every frame of a stream."""
    shown = ModelProto()
    shown.CopyFrom(model)
    del shown.graph.value_info[:]
    known = {output.name for output in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    state = {node.name: np.zeros(node.shape, kinds[node.type]) for node in session.get_inputs()[1:]}
    steps = []
    for frame in frames:
        got = session.run([*names, *(name.replace("_in", "_out") for name in state)], {"frame": frame[None], **state})
        steps.append(got[: len(names)])
        state = dict(zip(state, got[len(names) :], strict=True))
    return steps


def test_only_what_enters_a_convolution_has_a_pair_for_openvino_and_tensorrt(r8: Calibrated) -> None:
    entering = {node.output[0]: node.input[0] for node in convs(r8.graph)}
    assert len(set(entering.values())) == 9
    for form in ("openvino", "onnx"):
        pairs = Pairs(quantize(r8.graph, r8.ranges, FORMS[form]))
        assert set(pairs.tensors) == set(entering.values())
        assert {left: conv["x"] for left, conv in pairs.convolutions.items()} == entering


def test_for_onnx_runtime_all_that_enters_leaves_or_is_added_has_a_pair(r8: Calibrated) -> None:
    pairs = Pairs(quantize(r8.graph, r8.ranges, FORMS["onnxruntime"]))
    entering = {node.output[0]: node.input[0] for node in convs(r8.graph)}
    assert set(entering.values()) <= set(pairs.tensors)
    readers = {name: node for node in r8.graph.graph.node for name in node.input}
    for node in r8.graph.graph.node:
        if node.op_type == "Conv" or (node.op_type == "Add" and node.output[0].startswith("add")):
            (left,) = node.output
            left = readers[left].output[0] if readers[left].op_type == "Relu" else left
            assert left in pairs.tensors, left
    assert {left: conv["x"] for left, conv in pairs.convolutions.items()} == entering


def test_one_scale_follows_a_tensor_through_the_shift_into_the_state(r8: Calibrated) -> None:
    pairs = Pairs(quantize(r8.graph, r8.ranges, FORMS["onnxruntime"]))
    writers = {name: node for node in r8.graph.graph.node for name in node.output}
    shifts = [node for node in r8.graph.graph.node if node.op_type == "Concat" and node.input[0].startswith("state_")]
    assert [node.input[0] for node in shifts] == ["state_00_in", "state_01_in", "state_02_in"]
    for shift in shifts:
        scales, names = {pairs.tensors[shift.output[0]]}, list(shift.input)
        while names:
            name = names.pop()
            scales.add(pairs.tensors[name])
            if name in writers and writers[name].op_type in ("Slice", "Pad"):
                names.append(writers[name].input[0])
        assert len(scales) == 1
    # The state that goes out is made of the same integers as the one that comes in.
    out = next(
        node for node in quantize(r8.graph, r8.ranges, FORMS["onnxruntime"]).graph.node if "state_00_out" in node.output
    )
    assert out.op_type == "Slice" and out.input[0].endswith("_dequantized")


@pytest.mark.parametrize("form", FORMS)
def test_the_ranges_are_the_recorded_ones(r8: Calibrated, form: str) -> None:
    tensor = "backbone.blocks.1.conv2"
    scale, zero = Pairs(quantize(r8.graph, r8.ranges, FORMS[form])).tensors[
        next(node.input[0] for node in convs(r8.graph) if node.input[1] == f"{tensor}.weight")
    ]
    low, high = r8.ranges.range(f"{tensor}.input")
    assert (low, zero) == (0, 0)
    assert scale == pytest.approx(high / (127 if form == "onnx" else 255), rel=1e-6)
    first = Pairs(quantize(r8.graph, r8.ranges, FORMS[form])).tensors[convs(r8.graph)[0].input[0]]
    low, high = r8.ranges.range("backbone.stem.0.input")
    expected = (r8.ranges.amax("backbone.stem.0") / 127, 0) if form == "onnx" else ((high - low) / 255, 128)
    assert first == pytest.approx(expected, rel=1e-6, abs=1)


@pytest.mark.parametrize(
    ("form", "kind", "most", "weight_bias"),
    [("onnxruntime", "uint8", 63, np.int32), ("openvino", "uint8", 127, None), ("onnx", "int8", 127, None)],
)
def test_the_integers_are_those_that_the_runtime_fuses(
    r8: Calibrated, form: str, kind: str, most: int, weight_bias: Any
) -> None:
    pairs = Pairs(quantize(r8.graph, r8.ranges, FORMS[form]))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in r8.graph.graph.initializer}
    assert pairs.activations == {kind}
    if kind == "int8":
        assert {zero for _, zero in pairs.tensors.values()} == {0}
    for node in convs(r8.graph):
        conv = pairs.convolutions[node.output[0]]
        integers, scale, zero, axis = conv["w"]
        assert (integers.dtype, zero.dtype, axis) == (np.int8, np.int8, 0)
        assert scale.shape == zero.shape == (len(integers),) and not zero.any()
        rows = integers.astype(int).reshape(len(integers), -1)
        if form == "onnxruntime" and integers.shape[2:] == (1, 1):
            # Activations are at most 255, so no two products exceed the 16 bits of a processor without VNNI.
            assert 255 * abs(rows[:, 1:] + rows[:, :-1]).max() <= 2**15 - 1
        else:
            assert (abs(rows).max(1) == most).all()
        np.testing.assert_allclose(
            integers * scale[:, None, None, None], weights[node.input[1]], atol=scale.max() * 0.5001
        )
        if weight_bias is None:
            assert isinstance(conv["b"], str)
        else:
            bias, bias_scale, bias_zero, _ = conv["b"]
            assert bias.dtype == weight_bias and not bias_zero.any()
            np.testing.assert_allclose(bias_scale, scale * pairs.tensors[conv["x"]][0], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_excluded_layers_keep_their_weights(r8: Calibrated, form: str) -> None:
    quantized = quantize(r8.graph, r8.ranges, FORMS[form], ["backbone.stem.*", "*.downsample.0"])
    kept = {node.input[1]: node.input[2] for node in convs(quantized) if node.input[1].endswith(".weight")}
    names = ["stem.0", "blocks.1.downsample.0", "blocks.2.downsample.0"]
    assert list(kept) == [f"backbone.{name}.weight" for name in names]
    before, after = (
        {tensor.name: tensor.SerializeToString() for tensor in model.graph.initializer}
        for model in (r8.graph, quantized)
    )
    for names_of_layer in kept.items():
        assert [after[name] for name in names_of_layer] == [before[name] for name in names_of_layer]
    # The frame enters no other layer, so it stays as it is.
    assert convs(quantized)[0].input[0] == convs(r8.graph)[0].input[0]


def test_all_layers_excluded_leave_the_graph_as_it_was(r8: Calibrated) -> None:
    assert not Pairs(quantize(r8.graph, r8.ranges, FORMS["onnxruntime"], ["*"])).tensors


def test_a_pattern_that_matches_no_layer_is_refused(r8: Calibrated) -> None:
    with pytest.raises(
        UserError, match=r"no layer matches 'backbone.stem'; .* backbone.stem.0, backbone.blocks.0.conv1"
    ):
        quantize(r8.graph, r8.ranges, FORMS["onnx"], ["backbone.stem.*", "backbone.stem"])


def test_ranges_of_another_network_are_refused(r8: Calibrated) -> None:
    tensors = {name: value for name, value in r8.ranges.tensors.items() if "conv2" not in name}
    other = dataclasses.replace(r8.ranges, tensors=tensors)
    with pytest.raises(UserError, match=r"no range of backbone.blocks.0.conv2.*calibrate this one"):
        quantize(r8.graph, other, FORMS["onnx"])


def test_the_graph_that_is_quantized_is_not_changed(r8: Calibrated) -> None:
    before = r8.graph.SerializeToString()
    quantize(r8.graph, r8.ranges, FORMS["onnxruntime"])
    assert r8.graph.SerializeToString() == before


def test_the_layers_are_named_after_their_modules(r8: Calibrated) -> None:
    modules = [name for name, module in r8.network.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert set(convolutions(r8.graph.graph)) == set(modules)


@pytest.mark.parametrize(("form", "type_name"), TYPES)
def test_the_graph_is_valid(r8: Calibrated, half: ModelProto, form: str, type_name: str) -> None:
    quantized = quantize(r8.graph if type_name == "float32" else half, r8.ranges, FORMS[form])
    onnx.checker.check_model(quantized, full_check=True)
    assert [value.name for value in quantized.graph.input] == [value.name for value in r8.graph.graph.input]
    assert [value.name for value in quantized.graph.output] == [value.name for value in r8.graph.graph.output]
    used = {name for node in quantized.graph.node for name in node.input}
    assert {tensor.name for tensor in quantized.graph.initializer} <= used


def test_a_float16_graph_has_float16_scales(r8: Calibrated, half: ModelProto) -> None:
    quantized = quantize(half, r8.ranges, FORMS["onnx"])
    pairs = Pairs(quantized)
    for conv in pairs.convolutions.values():
        _, scale, _, _ = conv["w"]
        assert scale.dtype == np.float16 and (scale >= np.finfo(np.float16).tiny).all()
        assert pairs.constants[conv["b"]].dtype == np.float16
    scales = [tensor for tensor in quantized.graph.initializer if tensor.name.endswith("_scale")]
    assert {tensor.data_type for tensor in scales} == {TensorProto.FLOAT16}


def test_a_float16_graph_computes_what_the_float32_graph_does(r8: Calibrated, half: ModelProto) -> None:
    # The states are float16; the logits of this plain step form are, too.
    got, expected = (
        np.stack([step[0] for step in compute(quantize(model, r8.ranges, FORMS["onnx"]), ["logits"], r8.clip)])
        for model in (half, r8.graph)
    )
    assert relative_difference(got.astype(np.float32), expected) <= 5e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_computes_what_pytorch_fakes(r8: Calibrated, form: str) -> None:
    path = "backbone.blocks.1.conv1"  # strided, behind a shift
    others = [name for name in convolutions(r8.graph.graph) if name != path]
    node = next(node for node in convs(r8.graph) if node.input[1] == f"{path}.weight")
    quantized = quantize(r8.graph, r8.ranges, dataclasses.replace(FORMS[form], outputs=False), others)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in r8.graph.graph.initializer}
    weight, bias = (torch.from_numpy(weights[name].copy()) for name in node.input[1:])

    most = 63 if form == "onnxruntime" else 127
    scales = weight.abs().amax((1, 2, 3)) / most
    rounded = torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros(len(scales)).int(), 0, -most, most)
    # What the rounded weights add to a picture of the mean of each channel.
    flat = torch.tensor(r8.ranges.mean(path))[None, :, None, None].expand(-1, -1, 3, 3)
    bias = bias - torch.nn.functional.conv2d(flat, rounded - weight)[0, :, 0, 0]
    low, high = r8.ranges.range(f"{path}.input")
    steps = compute(quantized, [node.input[0], node.output[0]], r8.clip)
    for entered, left in steps:
        x = torch.from_numpy(entered)
        if form == "onnx":
            x = torch.fake_quantize_per_tensor_affine(x, max(-low, high) / 127, 0, -128, 127)
        else:
            x = torch.fake_quantize_per_tensor_affine(x, (high - low) / 255, round(-low * 255 / (high - low)), 0, 255)
        expected = torch.nn.functional.conv2d(x, rounded, bias, stride=2, padding=1).numpy()
        # A value half between two integers may be rounded otherwise: few pixels, by one step.
        off = np.abs(left - expected) > 1e-4 * np.abs(expected).max()
        assert off.mean() < 0.01
        np.testing.assert_allclose(left, expected, atol=2e-2 * np.abs(expected).max())


def test_bias_correction_brings_the_mean_of_each_channel_back(r8: Calibrated) -> None:
    path = "backbone.blocks.1.conv2"
    others = [name for name in convolutions(r8.graph.graph) if name != path]
    output = next(node.output[0] for node in convs(r8.graph) if node.input[1] == f"{path}.weight")
    none = {**r8.ranges.means, path: (0.0,) * len(r8.ranges.mean(path))}
    uncorrected = dataclasses.replace(r8.ranges, means=none)
    form = dataclasses.replace(FORMS["onnxruntime"], narrow_weights=False)

    def means(model: ModelProto) -> Any:
        return np.stack([step[0] for step in compute(model, [output], r8.clip)]).mean((0, 1, 3, 4))

    expected = means(r8.graph)
    without, corrected = (
        np.abs(means(quantize(r8.graph, ranges, form, others)) - expected).mean() for ranges in (uncorrected, r8.ranges)
    )
    assert corrected < without / 2


@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-2, 2)), st.integers(1, 3)
)
def test_no_two_neighbouring_weights_overflow_16_bits(values: Any, kernel: int) -> None:
    values = np.repeat(np.repeat(values[:, :, None, None], kernel, 2), kernel, 3)
    scale = np.maximum(weight_scale(values, narrow=True), 1e-12)
    integers = np.rint(values.reshape(len(values), -1) / scale[:, None])
    assert abs(integers).max() <= 127
    assert 255 * abs(integers[:, 1:] + integers[:, :-1]).max(initial=0) <= 2**15 - 1
    assert (scale >= weight_scale(values, narrow=False)).all()


def test_the_error_of_a_mean_is_counted_by_group() -> None:
    error = np.arange(4 * 2 * 3 * 3, dtype=np.float64).reshape(4, 2, 3, 3)
    mean = (1.0, -2.0, 0.5, 3.0)
    picture = torch.tensor(mean, dtype=torch.float64)[None, :, None, None].expand(-1, -1, 3, 3)
    expected = torch.nn.functional.conv2d(picture, torch.from_numpy(error), groups=2)[0, :, 0, 0]
    np.testing.assert_allclose(mean_error(error, mean), expected.numpy())
    depthwise = torch.nn.functional.conv2d(picture, torch.from_numpy(error[:, :1]), groups=4)[0, :, 0, 0]
    np.testing.assert_allclose(mean_error(error[:, :1], mean), depthwise.numpy())


@pytest.mark.parametrize(("form", "type_name"), TYPES)
@pytest.mark.parametrize("bias", [0.0, 0.7, -300.0])
def test_a_channel_without_weights_keeps_its_bias(
    r8: Calibrated, half: ModelProto, form: str, type_name: str, bias: float
) -> None:
    model = ModelProto()
    model.CopyFrom(r8.graph if type_name == "float32" else half)
    path = "backbone.blocks.1.conv1"
    for tensor in model.graph.initializer:
        if tensor.name in (f"{path}.weight", f"{path}.weight_bias"):
            values = numpy_helper.to_array(tensor).copy()
            values[3] = 0 if tensor.name.endswith(".weight") else bias
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    output = next(node.output[0] for node in convs(model) if node.input[1] == f"{path}.weight")
    others = [name for name in convolutions(model.graph) if name != path]
    for exclude in ([], others):
        quantized = quantize(model, r8.ranges, FORMS[form], exclude)
        ((left,),) = compute(quantized, [output], r8.clip[:1])
        np.testing.assert_allclose(left[:, 3].astype(np.float32), bias, rtol=1e-3, atol=1e-6)


NETWORKS = ["r8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("r18", "lite0", "mbv2"))]


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtimes_integers_give_what_the_graph_says(
    prepared: Callable[[str], Calibrated], tmp_path: Path, name: str
) -> None:
    network = prepared(name)
    path = tmp_path / "m.onnx"
    onnx.save(quantize(network.graph, network.ranges, FORMS["onnxruntime"]), path)
    dataclasses.replace(
        network.manifest, precision="int8", sha256=sha256_of(path), calibration={"method": "max"}, accuracy=None
    ).save(path)
    fused, unfused = (
        np.stack([engine.step(frame[None]).copy() for frame in network.clip])
        for engine in (OnnxRuntimeEngine(path), OnnxRuntimeEngine(path, fused=False))
    )
    # One integer rounded otherwise, deep inside, is amplified by random weights, most by inverted residuals; which
    # ranges are recorded depends on PyTorch's number of threads.
    assert relative_difference(fused, unfused) <= (0.15 if name in ("mbv2", "lite0") else 2e-2)
    # It is not the FP32 network: the pairs are still there.
    fp32 = np.stack([step[0] for step in compute(network.graph, ["logits"], network.clip)])
    assert 1e-4 < relative_difference(unfused, fp32) < 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_makes_every_convolution_an_integer_one(
    prepared: Callable[[str], Calibrated], tmp_path: Path, name: str
) -> None:
    network = prepared(name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    quantized = quantize(network.graph, network.ranges, FORMS["onnxruntime"])
    onnxruntime.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    operations = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operations.count("QLinearConv") == len(convs(network.graph))
    assert "Conv" not in operations
