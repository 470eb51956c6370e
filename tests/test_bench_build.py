from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from small_networks import write_model

from stsm_rt.bench_build import Subject, subject_of_engine, subject_of_network
from stsm_rt.bench_run import Group
from stsm_rt.check_weights import random_weights
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.export import export_onnx
from stsm_rt.manifest import Manifest
from stsm_rt.operations import count_operations

SIZE = (48, 64)


def small(**options: Any) -> Subject:
    defaults = {"runtime": "onnxruntime", "precision": "fp32", "shift": "stsm_online", "size": SIZE}
    return subject_of_network("r8", **(defaults | options))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return small().group(["plain", "naive", "self"], tmp_path_factory.mktemp("group"))


def nodes(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def test_a_network_is_built_beside_what_it_is_compared_with(group: Group):
    names = [contender.name for contender in group.contenders]

    assert names == [
        "r8 fp32 onnxruntime stsm_online naive",
        "r8 fp32 onnxruntime plain",
        "r8 fp32 onnxruntime stsm_online",
        "r8 fp32 onnxruntime stsm_online again",
    ]
    assert names[group.subject] == "r8 fp32 onnxruntime stsm_online"
    assert [(names[a].split()[3:], names[b].split()[3:]) for a, b in group.compared] == [
        (["plain"], ["stsm_online"]),
        (["stsm_online", "naive"], ["stsm_online"]),
        (["plain"], ["stsm_online", "naive"]),
        (["stsm_online"], ["stsm_online", "again"]),
    ]


def test_only_the_plain_network_has_no_shift_and_all_have_the_same_weights(group: Group):
    manifests = [Manifest.load(contender.path) for contender in group.contenders]

    assert [manifest.shift["name"] for manifest in manifests] == ["stsm_online", "none", "stsm_online", "stsm_online"]
    assert [contender.plain for contender in group.contenders] == [False, True, False, False]
    assert manifests[0].folding == manifests[1].folding == "none" != manifests[2].folding
    assert len({manifest.weights_sha256 for manifest in manifests}) == 1
    assert {(manifest.input_height, manifest.input_width) for manifest in manifests} == {SIZE}


def test_the_engine_that_is_compared_with_itself_is_one_file(group: Group):
    assert group.contenders[2].path == group.contenders[3].path


def test_an_int8_engine_is_compared_with_an_int8_plain_network_of_the_same_ranges(tmp_path: Path):
    group = small(precision="int8", exclude=["backbone.stem.0"]).group(["plain"], tmp_path)

    manifests = [Manifest.load(contender.path) for contender in group.contenders]
    assert [manifest.shift["name"] for manifest in manifests] == ["none", "stsm_online"]
    assert manifests[0].calibration == manifests[1].calibration
    assert manifests[0].calibration is not None and manifests[0].calibration["excluded"] == ["backbone.stem.0"]
    assert all("QuantizeLinear" in nodes(contender.path) for contender in group.contenders)


def test_a_network_is_built_for_openvino(tmp_path: Path):
    pytest.importorskip("openvino")
    group = small(runtime="openvino").group([], tmp_path)

    assert [contender.name for contender in group.contenders] == ["r8 fp32 openvino stsm_online"]
    assert Manifest.load(group.contenders[0].path).runtime == "openvino"


def test_an_engine_is_compared_with_the_plain_network_of_its_weights(group: Group, tmp_path: Path):
    path = group.contenders[group.subject].path

    found = subject_of_engine(path).group(["plain"], tmp_path)

    plain, own = found.contenders
    assert own.path == path
    assert plain.plain and Manifest.load(plain.path).weights_sha256 == Manifest.load(path).weights_sha256
    assert Engine.open(plain.path).manifest.shift["groups"] == []


def test_an_engine_of_given_weights_needs_their_file(tmp_path: Path):
    weights = write_model(tmp_path / "weights.safetensors", size=SIZE)
    subject = subject_of_network(None, runtime="onnxruntime", precision="fp32", shift="stsm_online", weights=weights)
    engine = subject.group([], tmp_path).contenders[0].path

    with pytest.raises(UserError, match="--weights"):
        subject_of_engine(engine)
    assert subject_of_engine(engine, weights=weights).engine == engine


def test_shipped_weights_are_taken_where_no_size_is_asked_for():
    subject = subject_of_network("lite0", runtime="onnxruntime", precision="fp32", shift="stsm_online")

    assert subject.weights.sha256 is not None
    assert small().weights.sha256 is None


def test_what_has_no_plain_network_is_refused(group: Group, make_engine):
    plain = group.contenders[1].path
    for path, sentence in (
        (plain, "has no shift"),
        (make_engine(batch=2, delays=(1, 1, 1)).path, "batch 2"),
        (make_engine().path, "unknown network 'colours'"),
    ):
        with pytest.raises(UserError, match=sentence):
            subject_of_engine(path)


@pytest.mark.parametrize(
    ("network", "options", "sentence"),
    [
        ("r9", {}, "unknown network 'r9'"),
        ("r8", {"shift": "wind"}, "wind"),
        ("r8", {"shift": "tsm"}, "later frames"),
    ],
)
def test_what_cannot_be_built_is_said(network, options, sentence, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        subject_of_network(
            network, **({"runtime": "onnxruntime", "precision": "fp32", "shift": "stsm_online", "size": SIZE} | options)
        ).group([], tmp_path)


def test_weights_that_contradict_the_options_are_refused(tmp_path: Path):
    weights = write_model(tmp_path / "weights.safetensors", size=SIZE)
    for network, size in (("r50", None), (None, (64, 64))):
        with pytest.raises(UserError, match="leave --"):
            subject_of_network(
                network, runtime="onnxruntime", precision="fp32", shift="stsm_online", weights=weights, size=size
            )


@pytest.mark.slow
def test_the_operations_of_resnet_50_are_the_known_ones(tmp_path: Path):
    weights = random_weights("r50")
    path = tmp_path / "r50.onnx"
    export_onnx(weights.network(None), path, height=224, width=224)

    counted = count_operations(path)

    # 4.09 G with the classifier of 1,000 classes (torchvision), which takes 2.05 M of them.
    assert counted.convolutions == 4_087_136_256
    assert round((counted.convolutions + 2048 * 1000) / 1e9, 2) == 4.09
    assert counted.products == 4 * 2048 * 21  # four running averages, 21 classes
