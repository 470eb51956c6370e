"""Real plans of TensorRT-RTX, which builds them without a GPU."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stsm_rt.engine.base import embedded_engine
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest
from stsm_rt.quantize import FORMS, quantization_points, quantize
from stsm_rt.ranges import FORMAT_VERSION, Ranges
from stsm_rt.tensorrt_build import BuildOptions, ParsedGraph, PlanTensor, build_plan, configure
from stsm_rt.tensorrt_build import _read_timing_cache as read_timing_cache
from stsm_rt.tensorrt_build import _write_timing_cache as write_timing_cache
from stsm_rt.tensorrt_library import TensorRT


def step_graph(path: Path, *, operator: str = "Relu", pairs: bool = True) -> Path:
    """A step in FP16: the frame and the state before it through one convolution, int8 if it has pairs."""
    rng = np.random.default_rng(0)

    def constant(name, value):
        return numpy_helper.from_array(value, name)

    constants = [
        constant("weight", rng.normal(0, 0.1, (8, 3, 3, 3)).astype(np.float16)),
        constant("scale", np.float16(0.5)),
        constant("weight_scale", np.full(8, 0.01, np.float16)),
        constant("zero", np.int8(0)),
        constant("weight_zero", np.zeros(8, np.int8)),
    ]
    nodes = [
        helper.make_node("Cast", ["frame"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Transpose", ["half"], ["picture"], perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["picture", "state_00_in"], ["sum"]),
    ]
    read = {"x": "sum", "w": "weight"}
    if pairs:
        nodes += [
            helper.make_node("QuantizeLinear", ["sum", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
            helper.make_node("QuantizeLinear", ["weight", "weight_scale", "weight_zero"], ["wq"], axis=0),
            helper.make_node("DequantizeLinear", ["wq", "weight_scale", "weight_zero"], ["w"], axis=0),
        ]
        read = {"x": "x", "w": "w"}
    nodes += [
        helper.make_node("Conv", [read["x"], read["w"]], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["features"], ["active"], name="activation"),
        helper.make_node("ReduceMean", ["active"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Cast", ["mean"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Identity", ["picture"], ["state_00_out"]),
    ]
    inputs = [
        helper.make_tensor_value_info("frame", TensorProto.UINT8, (1, 8, 8, 3)),
        helper.make_tensor_value_info("state_00_in", TensorProto.FLOAT16, (1, 3, 8, 8)),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 8)),
        helper.make_tensor_value_info("state_00_out", TensorProto.FLOAT16, (1, 3, 8, 8)),
    ]
    graph = helper.make_graph(nodes, "step", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_definition_has_the_graphs_tensors_and_pairs(rtx, tmp_path):
    definition = ParsedGraph(rtx, step_graph(tmp_path / "step.onnx")).definition
    assert definition.inputs == (
        PlanTensor("frame", "uint8", (1, 8, 8, 3)),
        PlanTensor("state_00_in", "float16", (1, 3, 8, 8)),
    )
    assert definition.outputs == (
        PlanTensor("logits", "float32", (1, 8)),
        PlanTensor("state_00_out", "float16", (1, 3, 8, 8)),
    )
    assert (definition.quantize_layers, definition.dequantize_layers) == (2, 2)
    plain = ParsedGraph(rtx, step_graph(tmp_path / "step.onnx", pairs=False)).definition
    assert (plain.quantize_layers, plain.dequantize_layers) == (0, 0)
    assert plain.layers < definition.layers


def test_a_plan_is_built_and_progress_rises_to_the_end(rtx, tmp_path):
    seen = []
    options = BuildOptions(workspace_mib=256, progress=lambda phase, fraction: seen.append((phase, fraction)))
    plan = build_plan(rtx, step_graph(tmp_path / "step.onnx"), options)
    assert len(plan.data) > 1000
    assert plan.device == "sm_80+"
    fractions = [fraction for _, fraction in seen]
    assert len(set(fractions)) > 10
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert all(phase for phase, _ in seen)


def test_a_plan_for_named_targets(rtx, tmp_path):
    plan = build_plan(rtx, step_graph(tmp_path / "step.onnx"), BuildOptions(compute_capabilities=("8.6", "8.9")))
    assert plan.device == "sm_86,sm_89"
    assert len(plan.data) > 1000


def bad_graph(folder: Path, kind: str) -> Path:
    path = folder / "bad.onnx"
    if kind == "text":
        path.write_text("not a graph\n" * 10)
    elif kind == "truncated":
        path.write_bytes(step_graph(path).read_bytes()[:-500])
    elif kind == "empty":
        path.touch()
    elif kind == "unknown operator":
        step_graph(path, operator="Frobnicate")
    elif kind == "unsupported operator":
        step_graph(path, operator="StringNormalizer")
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("absent", "there is no graph"),
        ("text", "is damaged or no ONNX file"),
        ("empty", "is damaged or no ONNX file"),
        ("truncated", "is damaged or no ONNX file"),
        ("unknown operator", "it does not know the operator Frobnicate of node 'activation'"),
        ("unsupported operator", r"unsupported node in node 'activation' \(StringNormalizer\)"),
    ],
)
def test_a_graph_that_cannot_be_read_is_one_sentence(rtx, tmp_path, capfd, kind, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build_plan(rtx, bad_graph(tmp_path, kind), BuildOptions())
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compute_capabilities": ("8.7",)}, "7.5, 8.0, 8.6, .* not '8.7'"),
        ({"hardware_compatible": True}, "no hardware-compatible plans"),
        ({"dla": 0}, "DLA core 0 was asked for, this device has none"),
        ({"timing_cache": Path("kernels.cache")}, "has no timing cache"),
        ({"workspace_mib": 0}, "at least 1 MiB, not 0"),
    ],
)
def test_an_option_that_cannot_be_met_is_one_sentence(rtx, tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        build_plan(rtx, step_graph(tmp_path / "step.onnx"), BuildOptions(**options))


def test_a_build_that_fails_gives_tensorrts_reason(rtx, tmp_path, capfd):
    # Turing has no FP32 matrix product in TensorRT-RTX.
    with pytest.raises(UserError, match=r"cannot build a plan from the graph .*for Turing.*choose another") as caught:
        build_plan(rtx, embedded_engine(), BuildOptions(compute_capabilities=("7.5",)))
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pairs", [False, True], ids=["fp32", "int8"])
def test_the_embedded_network_becomes_a_plan(rtx, tmp_path, pairs):
    manifest = Manifest.load(embedded_engine())
    model = onnx.load(embedded_engine())
    points = quantization_points(model.graph)
    convolutions = sum(point.endswith(".input") for point in points)
    path = tmp_path / "step.onnx"
    onnx.save(quantize(model, even_ranges(manifest, model.graph), FORMS["onnx"]) if pairs else model, path)
    plan = build_plan(rtx, path, BuildOptions())
    states = tuple((state.dtype, state.shape) for state in manifest.states)
    frame, *state_inputs = plan.definition.inputs
    logits, *state_outputs = plan.definition.outputs
    assert frame == PlanTensor("frame", "uint8", (1, manifest.input_height, manifest.input_width, 3))
    assert logits == PlanTensor("logits", "float32", (1, len(manifest.labels)))
    for tensors, end in ((state_inputs, "in"), (state_outputs, "out")):
        assert [tensor.name for tensor in tensors] == [f"{state.name}_{end}" for state in manifest.states]
        assert tuple((tensor.dtype, tensor.shape) for tensor in tensors) == states
    # Weights are stored as integers, so only activations are quantized, once for each tensor that is read.
    activations = len({points[point] for point in points if point.endswith(".input")})
    assert plan.definition.quantize_layers == (activations if pairs else 0)
    assert plan.definition.dequantize_layers == (activations + convolutions if pairs else 0)
    assert len(plan.data) > 1e6


def even_ranges(manifest: Manifest, graph: onnx.GraphProto) -> Ranges:
    points = quantization_points(graph)
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    means = {}
    for node in graph.node:
        if node.op_type == "Conv":
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            means[node.input[1].removesuffix(".weight")] = (0.0,) * (weights[node.input[1]][1] * groups)
    return Ranges(
        format_version=FORMAT_VERSION,
        network=manifest.network,
        shift=manifest.shift["name"],
        weights_sha256=manifest.weights_sha256,
        data="none",
        clips=1,
        frames=1,
        method="max",
        tensors={point: {"max": (-6.0, 6.0)} for point in points},
        means=means,
    )


class Config:
    """A builder's config whose timing cache is text, valid if it starts with "kernels"."""

    def create_timing_cache(self, data):
        return types.SimpleNamespace(serialize=lambda: data + b" measured", data=data)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self.cache = cache
        return not cache.data or cache.data.startswith(b"kernels")

    def get_timing_cache(self):
        return self.cache


PLAIN = TensorRT(types.ModuleType("tensorrt"), "tensorrt", "10.3.0")


def test_a_timing_cache_is_read_if_there_and_written(tmp_path):
    path = tmp_path / "timing.cache"
    for before, after in ((None, b" measured"), (b"kernels", b"kernels measured")):
        if before:
            path.write_bytes(before)
        config = Config()
        read_timing_cache(PLAIN, config, path)
        write_timing_cache(config, path)
        assert path.read_bytes() == after
        assert list(tmp_path.iterdir()) == [path]


def test_a_timing_cache_of_another_device_is_refused_and_kept(tmp_path):
    path = tmp_path / "timing.cache"
    path.write_bytes(b"of another device")
    with pytest.raises(UserError, match=r"damaged or of another device or version than TensorRT 10\.3\.0; delete it"):
        read_timing_cache(PLAIN, Config(), path)
    assert path.read_bytes() == b"of another device"


def test_a_timing_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    config = Config()
    read_timing_cache(PLAIN, config, tmp_path / "absent" / "timing.cache")
    with pytest.raises(UserError, match="cannot be written"):
        write_timing_cache(config, tmp_path / "absent" / "timing.cache")


def test_a_dla_core_falls_back_to_the_gpu():
    module = types.ModuleType("tensorrt")
    module.DeviceType = types.SimpleNamespace(DLA="dla")
    module.BuilderFlag = types.SimpleNamespace(GPU_FALLBACK="fallback")
    flags = []
    config = types.SimpleNamespace(set_flag=flags.append)
    configure(
        TensorRT(module, "tensorrt", "10.3.0"), types.SimpleNamespace(num_DLA_cores=2), config, BuildOptions(dla=1)
    )
    assert (config.default_device_type, config.DLA_core, flags) == ("dla", 1, ["fallback"])
    with pytest.raises(UserError, match="DLA core 2 was asked for, this device has 2"):
        configure(PLAIN, types.SimpleNamespace(num_DLA_cores=2), config, BuildOptions(dla=2))
