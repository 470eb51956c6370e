"""Integers from the frame to the last convolution."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from clips import write_video
from onnx import ModelProto, TensorProto

from stsm_rt.calibrate import calibrate
from stsm_rt.check_weights import moving_clip, random_weights, weights_sha256
from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine
from stsm_rt.export import export_engine, relative_difference
from stsm_rt.integer_graph import byte_states, enter_frame, quantize_for
from stsm_rt.manifest import Manifest, sha256_of
from stsm_rt.quantize import FORMS, convolutions, quantize
from stsm_rt.ranges import Ranges

SIZE = (64, 64)
NETWORKS = ["r8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("r18", "lite0", "mbv2"))]


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """An FP32 engine with folded shifts, its graph and its ranges."""

    path: Path
    graph: ModelProto
    manifest: Manifest
    ranges: Ranges
    clip: np.ndarray


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Calibrated]:
    done: dict[tuple[str, int], Calibrated] = {}

    def prepare(name: str, batch: int = 1) -> Calibrated:
        if (name, batch) not in done:
            folder = tmp_path_factory.mktemp(name)
            weights = random_weights(name, height=SIZE[0], width=SIZE[1])
            network = weights.network("stsm_online")
            assert network.shift is not None
            spec = dataclasses.replace(weights.spec, shift=network.shift.to_json())
            digest = weights_sha256(weights)
            clip = moving_clip(8, *SIZE, seed=1)
            whole = folder / "whole.onnx"
            export_engine(network, spec, whole, weights_sha256=digest, folding="none")
            ranges = calibrate(whole, [write_video(folder / "c.mp4", clip, fps=10)], data="a clip")
            path = folder / "m.onnx"
            manifest = export_engine(network, spec, path, weights_sha256=digest, folding="depthwise", batch=batch)
            done[name, batch] = Calibrated(path, onnx.load(path), manifest, ranges, clip)
        return done[name, batch]

    return prepare


def optimized(model: ModelProto, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def engine(model: ModelProto, of: Calibrated, path: Path, *, fused: bool = True) -> OnnxRuntimeEngine:
    onnx.save(model, path)
    states = byte_states(model, of.manifest.states)
    calibration = {"method": "max"}
    dataclasses.replace(
        of.manifest, precision="int8", sha256=sha256_of(path), states=states, calibration=calibration
    ).save(path)
    return OnnxRuntimeEngine(path, slots=of.manifest.batch, fused=fused)


def logits(engine: OnnxRuntimeEngine, clip: np.ndarray) -> np.ndarray:
    engine.reset()
    return np.stack([engine.step(frame[None]).copy() for frame in clip])


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_but_moves_lies_between_the_integer_convolutions(
    prepared: Callable[..., Calibrated], tmp_path: Path, name: str
) -> None:
    of = prepared(name)
    kinds = optimized(quantize_for("onnxruntime", of.graph, of.ranges), tmp_path)
    assert kinds["QLinearConv"] == sum(node.op_type == "Conv" for node in of.graph.graph.node)
    for gone in ("Conv", "QuantizeLinear", "Pad", "Cast", "QLinearConcat"):
        assert kinds[gone] == 0, gone
    assert kinds["DequantizeLinear"] == 1  # before the mean over the picture
    # The states lie as integer convolutions want them, and so does the frame.
    assert kinds["Transpose"] <= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_pairs_alone_say(prepared: Callable[..., Calibrated], tmp_path: Path, name: str) -> None:
    of = prepared(name)
    entered = ModelProto()
    entered.CopyFrom(of.graph)
    ranges = enter_frame(entered, of.ranges)
    pairs = engine(quantize(entered, ranges, FORMS["onnxruntime"]), of, tmp_path / "pairs.onnx", fused=False)
    integers = engine(quantize_for("onnxruntime", of.graph, of.ranges), of, tmp_path / "integers.onnx", fused=False)
    np.testing.assert_array_equal(logits(integers, of.clip), logits(pairs, of.clip))


def test_states_are_bytes_and_begin_with_the_byte_that_means_zero(
    prepared: Callable[..., Calibrated], tmp_path: Path
) -> None:
    of = prepared("r8")
    model = quantize_for("onnxruntime", of.graph, of.ranges)
    states = byte_states(model, of.manifest.states)
    for before, after in zip(of.manifest.states[:3], states[:3], strict=True):
        assert after.dtype == "uint8" and after.shape == tuple(np.array(before.shape)[[0, 2, 3, 1]])
    assert states[3:] == of.manifest.states[3:]
    shifted = dataclasses.replace(
        of.ranges,
        tensors={
            key: {"max": (low - 1, high)} for key, each in of.ranges.tensors.items() for low, high in [each["max"]]
        },
    )
    other = byte_states(quantize_for("onnxruntime", of.graph, shifted), of.manifest.states)
    assert all(0 < state.zero < 255 for state in other[:3])
    running = engine(quantize_for("onnxruntime", of.graph, shifted), of, tmp_path / "m.onnx")
    first = logits(running, of.clip)
    np.testing.assert_array_equal(logits(running, of.clip), first)
    # Bytes of 0 at the start would be another stream.
    for ring in running._rings[0].buffers.values():
        for buffer in ring:
            buffer[:] = 0
    assert np.abs(running.step(of.clip[:1]) - first[0]).max() > 1e-3


def test_a_batch_whose_rows_may_wait_keeps_floating_point_states(
    prepared: Callable[..., Calibrated], tmp_path: Path
) -> None:
    of = prepared("r8", 2)
    model = quantize_for("onnxruntime", of.graph, of.ranges)
    assert byte_states(model, of.manifest.states) == of.manifest.states
    both = engine(model, of, tmp_path / "m.onnx")
    alone = engine(quantize_for("onnxruntime", prepared("r8").graph, of.ranges), prepared("r8"), tmp_path / "one.onnx")
    for frame in of.clip:
        rows = both.step(np.stack([frame, frame]))
        assert relative_difference(rows[0], alone.step(frame[None])[0]) < 0.05


def test_a_mean_that_is_a_whole_number_enters_exactly(prepared: Callable[..., Calibrated]) -> None:
    of = prepared("lite0")
    model = ModelProto()
    model.CopyFrom(of.graph)
    ranges = enter_frame(model, of.ranges)
    path = convolutions(of.graph.graph)[0]
    assert ranges.range(f"{path}.input") == (-127.0, 128.0)
    feeds = {
        value.name: np.zeros([size.dim_value for size in value.type.tensor_type.shape.dim], np.float32)
        for value in of.graph.graph.input
    }
    feeds["frame"] = of.clip[:1]
    got, expected = (
        onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            ["logits"], feeds
        )[0]
        for each in (model, of.graph)
    )
    assert relative_difference(got, expected) < 1e-5


def test_a_first_layer_that_is_left_out_is_not_touched(prepared: Callable[..., Calibrated]) -> None:
    of = prepared("r8")
    path = convolutions(of.graph.graph)[0]
    model = quantize_for("onnxruntime", of.graph, of.ranges, [path])
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Cast"] == 1 and kinds["Sub"] >= 1
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert weights[f"{path}.weight"] == TensorProto.FLOAT


@pytest.mark.parametrize("runtime", ["openvino", "onnx"])
def test_other_runtimes_get_pairs_only(prepared: Callable[..., Calibrated], runtime: str) -> None:
    of = prepared("r8")
    assert quantize_for(runtime, of.graph, of.ranges) == quantize(of.graph, of.ranges, FORMS[runtime])
