"""A split graph computes what the whole one does, and copies no feature map at a shift."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.shape_inference import infer_shapes
from small_networks import panning, small_model
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from stsm_rt.export import export_onnx
from stsm_rt.networks import ARCHITECTURES, Architecture
from stsm_rt.operations import count_operations
from stsm_rt.shift import PRESETS, ShiftGroup, ShiftSpec
from stsm_rt.shift_folding import fold_shifts
from stsm_rt.split_streams import split_streams

TWO_DELAYS = ShiftSpec(
    "two_delays",
    (ShiftGroup(Fraction(1, 8), dt=1), ShiftGroup(Fraction(1, 8), dt=2), ShiftGroup(Fraction(1, 16), dw=-1)),
)
SPECS = {name: PRESETS[name] for name in ("stsm_online", "tsm_online", "stsm_joint_online")} | {"two": TWO_DELAYS}
SHIFTED = 4  # residual blocks of the small network


class SmallBottlenecks(nn.Module):
    """A ResNet-50 of two stages with two blocks each, (N, 3, H, W) to (N, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        blocks: list[nn.Module] = []
        for inputs, planes, stride in ((32, 16, 1), (64, 32, 2)):
            projection = nn.Sequential(nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
            blocks += [Bottleneck(inputs, planes, stride, projection), Bottleneck(4 * planes, planes)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def export(path: Path, network: str, spec: ShiftSpec | None, size: tuple[int, int] = (48, 64), batch: int = 1) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        bottlenecks = Architecture(SmallBottlenecks, 128, (127.5,) * 3, (127.5,) * 3, "symmetric")
        patch.setitem(ARCHITECTURES, "bottlenecks", bottlenecks)
        model, _ = small_model(network, spec and spec.to_json(), size)
        fold_shifts(model)
        export_onnx(model, path, height=size[0], width=size[1], batch=batch)
    return onnx.load(path)


@pytest.fixture(scope="module", params=SPECS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelProto:
    return export(tmp_path_factory.mktemp("whole") / "m.onnx", "bottlenecks", SPECS[request.param])


@pytest.fixture(scope="module")
def split(whole: ModelProto) -> ModelProto:
    return split_streams(whole)


def stream(model: ModelProto, frames: int = 6) -> list[dict[str, np.ndarray]]:
    """Every output of every step, with the states of the step before."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    frame, *others = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: np.zeros(value.shape, np.float32) for value in others if value.name != "active"}
    if others[0].name == "active":
        feeds["active"] = np.array([True, False])
    steps = []
    for picture in panning(frames, tuple(frame.shape[1:3])):
        feeds["frame"] = np.stack([picture, picture[:, ::-1]])[: frame.shape[0]]
        steps.append(dict(zip(names, session.run(None, feeds), strict=True)))
        feeds |= {name.replace("_out", "_in"): value for name, value in steps[-1].items() if name != "logits"}
    return steps


def assert_same(split: ModelProto, whole: ModelProto) -> None:
    onnx.checker.check_model(split, full_check=True)
    assert list(split.graph.input) == list(whole.graph.input)
    assert list(split.graph.output) == list(whole.graph.output)
    for got, expected in zip(stream(split), stream(whole), strict=True):
        for name, value in expected.items():
            assert np.abs(got[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def copies(model: ModelProto) -> dict[str, NodeProto]:
    """The nodes that only copy feature maps, by what they write."""
    graph = infer_shapes(model).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info, *graph.output)}
    moves = [node for node in graph.node if node.op_type in ("Concat", "Slice", "Split", "Identity")]
    return {n.output[0]: n for n in moves if 4 in (ranks.get(n.input[0]), ranks.get(n.output[0]))}


def writer_of(model: ModelProto, tensor: str) -> NodeProto:
    (node,) = (node for node in model.graph.node if tensor in node.output)
    return node


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_logits_and_states_are_those_of_the_whole_graph(split, whole):
    assert_same(split, whole)


def test_feature_maps_are_copied_in_the_first_block_only(split, whole):
    stem = writer_of(whole, "state_00_out").input[0]
    first = {"state_00_in", stem, *(name for name, node in copies(whole).items() if stem in node.input)}
    (flip,) = (name for name, node in copies(split).items() if not first & set(node.input))
    assert flip == "flip"  # BGR to RGB
    assert len(copies(whole)) > 2 * SHIFTED


def test_what_a_later_frame_needs_is_written_as_a_state(split, whole):
    sliced = {n.output[0] for n in whole.graph.node if n.op_type == "Slice" and n.output[0].startswith("state_")}
    writers = [writer_of(split, name).op_type for name in sorted(sliced)]
    delays = len(sliced) // SHIFTED
    assert writers == ["Slice"] * delays + ["Relu"] * delays * (SHIFTED - 1)


def test_weights_say_which_part_they_are(split, whole):
    full, found = constants(whole), 0
    for name, values in constants(split).items():
        if match := re.fullmatch(r"(.*\.weight)/(\d+):(\d+),(\d+):(\d+)", name):
            a, b, c, d = map(int, match.groups()[1:])
            assert np.array_equal(values, full[match[1]][a:b, c:d])
            found += values.size
    streams = r"backbone\.blocks\.(0\.(conv3|downsample\.0)|[1-3]\.(conv1|conv3|downsample\.0))\.weight"
    assert found == sum(values.size for name, values in full.items() if re.fullmatch(streams, name))


def test_nothing_is_kept_that_nobody_reads(split):
    assert not split.graph.value_info
    read = {name for node in split.graph.node for name in node.input}
    assert set(constants(split)) <= read


def test_multiply_adds_stay_the_same(split, whole, tmp_path):
    onnx.save(split, tmp_path / "split.onnx")
    onnx.save(whole, tmp_path / "whole.onnx")
    got, expected = (count_operations(tmp_path / name) for name in ("split.onnx", "whole.onnx"))
    assert (got.convolutions, got.products) == (expected.convolutions, expected.products)


def test_the_model_given_is_not_changed(whole):
    before = whole.SerializeToString(deterministic=True)
    split_streams(whole)
    assert whole.SerializeToString(deterministic=True) == before


def test_other_readers_of_a_stream_get_it_whole(whole):
    other = ModelProto()
    other.CopyFrom(whole)
    (pooling,) = (node for node in other.graph.node if node.op_type == "ReduceMean" and len(node.input) == 2)
    pooling.op_type = "ReduceMax"
    other.graph.node.append(onnx.helper.make_node("Neg", pooling.input[:1], ["negative"]))
    split = split_streams(other)
    assert_same(split, other)
    assert writer_of(split, pooling.input[0]).op_type == "Concat"


def test_rows_of_a_batch_that_wait_keep_their_state(tmp_path):
    whole = export(tmp_path / "m.onnx", "bottlenecks", SPECS["stsm_online"], batch=2)
    split = split_streams(whole)
    assert len(copies(split)) < len(copies(whole)) - SHIFTED
    assert_same(split, whole)


def test_a_stream_between_3x3_convolutions_stays_whole(tmp_path):
    whole = export(tmp_path / "m.onnx", "r8", SPECS["stsm_online"])
    assert split_streams(whole) is whole


def test_a_network_without_a_shift_stays_as_it_is(tmp_path):
    plain = export(tmp_path / "m.onnx", "bottlenecks", None)
    assert split_streams(plain) is plain


@pytest.mark.slow
def test_a_residual_sum_without_relu_stays_whole(tmp_path):
    whole = export(tmp_path / "m.onnx", "lite0", SPECS["stsm_online"], (32, 32))
    assert split_streams(whole) is whole


@pytest.mark.slow
def test_resnet_50(tmp_path):
    whole = export(tmp_path / "m.onnx", "r50", SPECS["stsm_online"], (64, 64))
    split = split_streams(whole)
    assert len(copies(split)) <= 5
    assert_same(split, whole)
