from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models as tv
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from stsm_rt.convert import convert, keep_the_past, main, read_labels
from stsm_rt.errors import UserError
from stsm_rt.foreign_checkpoints import LAYOUTS
from stsm_rt.model import load_model
from stsm_rt.networks import ARCHITECTURES, StreamingNetwork, stream
from stsm_rt.shift import shift_clip, shift_spec, shift_step

CLASSES, FRAMES, HEIGHT, WIDTH = 7, 3, 48, 32
STAGES = ((6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


# The sources' networks, as their code builds them: same attributes, so same key names


def from_the_past(x: Tensor, part: int) -> Tensor:
    """The causal half of the shift: the first (0) or the second (1) eighth of the channels, of the frame before."""
    clip = x.unflatten(0, (-1, FRAMES))
    eighth = clip.shape[2] // 8
    taken = slice(part * eighth, (part + 1) * eighth)
    shifted = clip.clone()
    shifted[:, 0, taken] = 0
    shifted[:, 1:, taken] = clip[:, :-1, taken]
    return shifted.flatten(0, 1)


class TemporalShift(nn.Module):
    """What TSM and mmaction2 put around a layer, without what it takes from the future."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(from_the_past(x, 1))


class ConvModule(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, activate: bool = True
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activation = nn.ReLU6() if activate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class MmactionBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = ConvModule(inputs, width, 1)
            self.conv2 = ConvModule(width, width, 3, stride)
            self.conv3 = ConvModule(width, outputs, 1, activate=False)
        else:
            self.conv1 = ConvModule(inputs, width, 3, stride)
            self.conv2 = ConvModule(width, width, 3, activate=False)
        self.branch = [getattr(self, name) for name in ("conv1", "conv2", "conv3") if hasattr(self, name)]
        projected = stride != 1 or inputs != outputs
        self.downsample = ConvModule(inputs, outputs, 1, stride, activate=False) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.branch:
            y = layer.bn(layer.conv(y))
            y = y if layer is self.branch[-1] else y.relu()
        return (y + (self.downsample(x) if self.downsample is not None else x)).relu()


class MmactionResNet(nn.Module):
    def __init__(self, counts: tuple[int, ...], *, bottleneck: bool, shift: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(3, 64, 7, 2, activate=False)
        channels = 64
        for stage, count in enumerate(counts):
            blocks = []
            for block in range(count):
                stride = 2 if stage and block == 0 else 1
                blocks.append(MmactionBlock(channels, 64 << stage, stride, bottleneck=bottleneck))
                channels = (64 << stage) * (4 if bottleneck else 1)
                if shift:
                    blocks[-1].conv1.conv = TemporalShift(blocks[-1].conv1.conv)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 3, 2, 1)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        return x.mean((2, 3))


class InvertedResidual(nn.Module):
    """Of layers in a row: a flat list in TSM, ConvModules in mmaction2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, *, flat: bool) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [ConvModule(inputs, hidden, 1)] if expansion > 1 else []
        layers += [ConvModule(hidden, hidden, 3, stride, groups=hidden), ConvModule(hidden, outputs, 1, activate=False)]
        parts: list[nn.Module] = list(layers)
        if flat:
            parts = [part for layer in layers for part in (layer.conv, layer.bn, layer.activation)][:-1]
        self.conv = nn.Sequential(*parts)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class TsmMobileNet(nn.Module):
    def __init__(self, *, shift: bool) -> None:
        super().__init__()
        first, last = ConvModule(3, 32, 3, 2), ConvModule(320, 1280, 1)
        features: list[nn.Module] = [nn.Sequential(first.conv, first.bn, first.activation)]
        features.append(InvertedResidual(32, 16, 1, 1, flat=True))
        channels = 16
        for expansion, outputs, count, stride in STAGES:
            for block in range(count):
                features.append(
                    InvertedResidual(channels, outputs, 1 if block else stride, expansion, flat=True),
                )
                channels = outputs
                if shift and block:
                    features[-1].conv[0] = TemporalShift(features[-1].conv[0])  # type: ignore[union-attr,index,operator]
        features.append(nn.Sequential(last.conv, last.bn, last.activation))
        self.features = nn.Sequential(*features)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


class MmactionMobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvModule(3, 32, 3, 2)
        self.layer1 = nn.Sequential(InvertedResidual(32, 16, 1, 1, flat=False))
        channels = 16
        for stage, (expansion, outputs, count, stride) in enumerate(STAGES, 2):
            blocks = []
            for block in range(count):
                blocks.append(InvertedResidual(channels, outputs, 1 if block else stride, expansion, flat=False))
                channels = outputs
                if block:
                    blocks[-1].conv[0] = TemporalShift(blocks[-1].conv[0])
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.conv2 = ConvModule(320, 1280, 1)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("conv1", *(f"layer{stage}" for stage in range(1, 8)), "conv2"):
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def resnet(build: Callable[[], nn.Module], *, shift: bool) -> nn.Module:
    """TSM's ResNet is torchvision's with its first convolutions wrapped and without its classifier."""
    network = build()
    network.fc = nn.Identity()
    for stage in (1, 2, 3, 4):
        for block in getattr(network, f"layer{stage}"):
            if shift:
                block.conv1 = TemporalShift(block.conv1)
    return network


def online_demo() -> nn.Module:
    """Its blocks shift what they are given; the demo's own list of those that do, one further for the stem."""
    network = TsmMobileNet(shift=False)
    for index in (2, 4, 5, 7, 8, 9, 11, 12, 14, 15):
        block = network.features[index + 1]
        block.conv[0].register_forward_pre_hook(lambda _, args: from_the_past(args[0], 0))  # type: ignore[union-attr,index,operator]
    return network


class Named(nn.Module):
    """A backbone and a classifier under the names that a project gives them."""

    def __init__(self, backbone: nn.Module, features: int, *, backbone_name: str, head: str) -> None:
        super().__init__()
        self.backbone_name, self.head = backbone_name, head
        owner: nn.Module = self
        if "." in head:
            owner = nn.Module()
            self.add_module(head.partition(".")[0], owner)
        self.add_module(backbone_name, backbone)
        owner.add_module(head.rpartition(".")[2], nn.Linear(features, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.head)(self.get_submodule(self.backbone_name)(x))


class Demo(nn.Module):
    """The online demo's network keeps its classifier beside its features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = online_demo().features
        self.classifier = nn.Linear(1280, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def tsm(backbone: nn.Module, features: int) -> nn.Module:
    return Named(backbone, features, backbone_name="base_model", head="new_fc")


def mmaction(backbone: nn.Module, features: int) -> nn.Module:
    return Named(backbone, features, backbone_name="backbone", head="cls_head.fc_cls")


@dataclass(frozen=True)
class Source:
    """A kind of checkpoint.

    Attributes:
        build: Makes the network that the checkpoint is of.
        network: What it becomes.
        shift: The preset that it becomes, or None.
        ahead: Whether it looks into the future.
        keys: Some of its published names.
        prefix: DataParallel's, where the project saves it.
        wrapped: Whether the project saves the state dict within a record of the training.
    """

    build: Callable[[], nn.Module]
    network: str
    shift: str | None
    ahead: bool
    keys: tuple[str, ...]
    prefix: str = ""
    wrapped: bool = False


R50 = (3, 4, 6, 3)
SOURCES = {
    "torchvision-r18": Source(
        lambda: tv.resnet18(num_classes=CLASSES), "r18", None, False, ("conv1.weight", "fc.bias")
    ),
    "torchvision-r50": Source(
        lambda: tv.resnet50(num_classes=CLASSES), "r50", None, False, ("layer4.2.conv3.weight", "fc.weight")
    ),
    "torchvision-mbv2": Source(
        lambda: tv.mobilenet_v2(num_classes=CLASSES),
        "mbv2_torchvision",
        None,
        False,
        ("features.2.conv.0.0.weight", "classifier.1.weight"),
    ),
    "tsm-r50": Source(
        lambda: tsm(resnet(tv.resnet50, shift=True), 2048),
        "r50",
        "tsm_online",
        True,
        (
            "module.base_model.conv1.weight",
            "module.base_model.layer1.0.conv1.net.weight",
            "module.base_model.layer1.0.downsample.0.weight",
            "module.base_model.layer3.5.bn3.running_var",
            "module.new_fc.bias",
        ),
        "module.",
        True,
    ),
    "tsm-r18": Source(
        lambda: tsm(resnet(tv.resnet18, shift=True), 512),
        "r18",
        "tsm_online",
        True,
        ("module.base_model.layer1.0.conv1.net.weight",),
        "module.",
        True,
    ),
    "tsm-mbv2": Source(
        lambda: tsm(TsmMobileNet(shift=True), 1280),
        "mbv2_torchvision",
        "tsm_online",
        True,
        (
            "module.base_model.features.1.conv.3.weight",
            "module.base_model.features.3.conv.0.net.weight",
            "module.base_model.features.3.conv.7.running_mean",
            "module.base_model.features.4.conv.0.weight",
            "module.base_model.features.18.0.weight",
            "module.new_fc.weight",
        ),
        "module.",
        True,
    ),
    "tsm-tsn-r50": Source(
        lambda: tsm(resnet(tv.resnet50, shift=False), 2048),
        "r50",
        None,
        False,
        ("module.base_model.layer1.0.conv1.weight",),
        "module.",
        True,
    ),
    "online-demo": Source(
        Demo,
        "mbv2_torchvision",
        "tsm_online",
        False,
        ("features.0.0.weight", "features.3.conv.0.weight", "features.3.conv.6.weight", "classifier.weight"),
    ),
    "mmaction-tsm-r50": Source(
        lambda: mmaction(MmactionResNet(R50, bottleneck=True, shift=True), 2048),
        "r50",
        "tsm_online",
        True,
        (
            "backbone.conv1.conv.weight",
            "backbone.conv1.bn.running_mean",
            "backbone.layer1.0.conv1.conv.net.weight",
            "backbone.layer1.0.conv1.bn.weight",
            "backbone.layer2.0.downsample.conv.weight",
            "backbone.layer2.0.downsample.bn.running_var",
            "cls_head.fc_cls.weight",
        ),
        wrapped=True,
    ),
    "mmaction-tsm-mbv2": Source(
        lambda: mmaction(MmactionMobileNet(), 1280),
        "mbv2_torchvision",
        "tsm_online",
        True,
        (
            "backbone.conv1.conv.weight",
            "backbone.layer1.0.conv.1.conv.weight",
            "backbone.layer2.1.conv.0.net.conv.weight",
            "backbone.layer2.1.conv.0.net.bn.running_var",
            "backbone.layer2.1.conv.2.bn.weight",
            "backbone.conv2.bn.bias",
            "cls_head.fc_cls.bias",
        ),
        wrapped=True,
    ),
    "mmaction-tsn-r50": Source(
        lambda: mmaction(MmactionResNet(R50, bottleneck=True, shift=False), 2048),
        "r50",
        None,
        False,
        ("backbone.layer1.0.conv1.conv.weight", "backbone.layer4.2.conv3.bn.bias"),
        wrapped=True,
    ),
    "mmaction-tsn-r18": Source(
        lambda: mmaction(MmactionResNet((2, 2, 2, 2), bottleneck=False, shift=False), 512),
        "r18",
        None,
        False,
        ("backbone.layer1.1.conv2.conv.weight",),
        wrapped=True,
    ),
}


@torch.no_grad()
def random_network(source: Source) -> nn.Module:
    """Every tensor is random; batch norms have statistics of their own."""
    torch.manual_seed(0)
    network = source.build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    network.train()
    network(normalised(clip_of(seed=1)))
    return network.eval()


def clip_of(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, FRAMES, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)


def normalised(clip: Tensor) -> Tensor:
    """(N, T, H, W, 3) BGR -> (N * T, 3, H, W) RGB, as the sources normalise it."""
    rgb = clip.flatten(0, 1).flip(-1).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (rgb - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def checkpoint(source: Source, network: nn.Module) -> dict[str, Any]:
    """The network as the project would save it."""
    tensors = {source.prefix + key: value for key, value in network.state_dict().items()}
    return {"epoch": 50, "arch": "x", "best_prec1": 74.1, "state_dict": tensors} if source.wrapped else tensors


def saved(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pth.tar"
    torch.save(checkpoint(SOURCES[name], random_network(SOURCES[name])), path)
    return path


def state_dict_of(name: str) -> dict[str, Tensor]:
    content = checkpoint(SOURCES[name], random_network(SOURCES[name]))
    return dict(content.get("state_dict", content))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        convert(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(path) in sentence
    return sentence


# What a converted network computes


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_a_converted_network_computes_what_the_source_did(name: str, tmp_path: Path, capsys: Any) -> None:
    source, path, out = SOURCES[name], tmp_path / "source.pth.tar", tmp_path / "out.safetensors"
    reference = random_network(source)
    content = checkpoint(source, reference)
    assert set(source.keys) <= content.get("state_dict", content).keys()
    torch.save(content, path)
    assert main([str(path), "-o", str(out)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "source.pth.tar"]

    network, spec = load_model(out)
    assert (spec.network, spec.shift["name"] if spec.shift else None) == (source.network, source.shift)
    clip = clip_of()
    steps = stream(network, clip)
    # In double precision, where deep random networks do not amplify rounding: what is left is an error of mapping.
    network, reference = network.double(), reference.double()
    expected = reference(normalised(clip).double()).unflatten(0, clip.shape[:2])
    largest = expected.abs().max()
    assert (network(clip) - expected).abs().max() < 1e-5 * largest
    assert (steps - expected).abs().max() < 1e-3 * largest
    if source.shift:  # each frame is told from the same frame without those before it
        assert (network(clip[:, -1:])[:, -1] - expected[:, -1]).abs().max() > 1e-2 * largest


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("r18", "backbone.layer1.0.conv1.weight"),
        ("r50", "classifier.weight"),
        ("mbv2_torchvision", "backbone.features.3.conv.0.0.weight"),
    ],
)
@torch.no_grad()
def test_changing_places_leaves_the_plain_network_as_it_was(name: str, moved: str) -> None:
    torch.manual_seed(0)
    network = StreamingNetwork(name, CLASSES, shift=None).eval().double()
    logits, weights = network(clip_of()), network.state_dict()[moved].clone()
    keep_the_past(network)
    assert not torch.equal(network.state_dict()[moved], weights)
    assert (network(clip_of()) - logits).abs().max() < 1e-9 * logits.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.source}-{layout.network}")
def test_the_graph_normalises_as_every_source_does(layout: Any) -> None:
    architecture = ARCHITECTURES[layout.network]
    assert [m / 255 for m in architecture.mean] == pytest.approx([0.485, 0.456, 0.406])
    assert [s / 255 for s in architecture.std] == pytest.approx([0.229, 0.224, 0.225])
    assert architecture.padding == "symmetric"


# The operators, as their projects define them


def offline(x: Tensor, folds: int = 8) -> Tensor:
    """TSM's README, for (N, T, C, H, W): the first fold from the next frame, the second from the frame before."""
    out = torch.zeros_like(x)
    fold = x.shape[2] // folds
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out


def online(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """TSM's online demo, for (N, C, H, W): the first eighth is what the frame before left."""
    kept, rest = x[:, : x.shape[1] // 8], x[:, x.shape[1] // 8 :]
    return torch.cat((buffer, rest), 1), kept


clips = st.tuples(
    st.integers(1, 2), st.integers(1, 5), st.integers(8, 40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)
).map(lambda d: torch.randn(d[:5], generator=torch.Generator().manual_seed(d[5])))


@given(clip=clips)
def test_the_offline_preset_is_tsms_rule(clip: Tensor) -> None:
    assert torch.equal(shift_clip(clip, shift_spec("tsm")), offline(clip))


@given(clip=clips)
def test_the_online_preset_is_the_rule_of_tsms_demo(clip: Tensor) -> None:
    spec = shift_spec("tsm_online")
    buffer = torch.zeros_like(clip[:, 0, : clip.shape[2] // 8])
    kept: tuple[Tensor, ...] = (buffer,)
    whole = shift_clip(clip, spec)
    for t in range(clip.shape[1]):
        expected, buffer = online(clip[:, t], buffer)
        step, kept = shift_step(clip[:, t], kept, spec)
        assert torch.equal(step, expected) and torch.equal(whole[:, t], expected)


@given(clip=clips)
def test_the_two_take_the_past_into_different_eighths(clip: Tensor) -> None:
    eighth = clip.shape[2] // 8
    swapped = torch.arange(clip.shape[2])
    swapped[: 2 * eighth] = swapped[: 2 * eighth].roll(eighth)
    causal = offline(clip)
    causal[:, :, :eighth] = clip[:, :, :eighth]  # what comes from the future stays in its frame
    assert torch.equal(shift_clip(clip[:, :, swapped], shift_spec("tsm_online"))[:, :, swapped], causal)


# What is told and kept


@pytest.mark.parametrize("name", ["tsm-r18", "torchvision-r18", "mmaction-tsn-r18", "online-demo"])
def test_a_lost_future_is_announced_with_the_command_that_mends_it(name: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.safetensors"
    assert main([str(saved(name, tmp_path)), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out}: {SOURCES[name].network}" in text and "tensors accounted for" in text and "ImageNet" in text
    ahead = SOURCES[name].ahead
    assert ("looks both ways" in text) == ahead
    if ahead:
        flat = " ".join(text.split())
        assert "future half is dropped" in flat and "accuracy falls" in flat
        assert f"stsm-rt train RECIPE.toml --data FOLDER --pretrained {out}" in flat
    assert load_model(out)[1].recipe["future_dropped"] == ahead


def test_the_record_says_where_the_weights_come_from(tmp_path: Path) -> None:
    path = saved("online-demo", tmp_path)
    network, spec, layout = convert(path)
    assert not network.training
    assert (spec.height, spec.width, spec.frame_rate, spec.decision.smoothing) == (224, 224, 15.0, 12)
    assert spec.recipe["source"] == layout.source == "the online demo of TSM"
    assert spec.recipe["file"] == path.name and len(spec.recipe["sha256"]) == 64
    assert spec.recipe["preprocessing"]["mean"] == [123.675, 116.28, 103.53]
    assert convert(path, frame_rate=5.0)[1].frame_rate == 5.0
    with pytest.raises(UserError, match=r"frame rate is a positive number .* got 0"):
        convert(path, frame_rate=0.0)


def test_labels_come_from_a_file_or_are_class_numbers(tmp_path: Path, capsys: Any) -> None:
    path, labels, out = saved("torchvision-r18", tmp_path), tmp_path / "labels.txt", tmp_path / "out.safetensors"
    assert main([str(path), "-o", str(out)]) == 0
    assert load_model(out)[1].labels == tuple("0123456")
    labels.write_text("brush hair\ncartwheel\ncatch\n\nclap\nclimb stairs\ngolf\nschießen\n", encoding="utf-8")
    assert main([str(path), "-o", str(out), "--labels", str(labels)]) == 0
    named = ("brush hair", "cartwheel", "catch", "clap", "climb stairs", "golf", "schießen")
    assert load_model(out)[1].labels == named


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"a\nb\n", "7 classes, got 2 labels"), (b"a\na\n", "'a' twice"), (b"\xff\xfe\xff", "one per line")],
)
def test_labels_that_do_not_fit_are_refused(content: bytes, sentence: str, tmp_path: Path, capsys: Any) -> None:
    path, labels = saved("torchvision-r18", tmp_path), tmp_path / "labels.txt"
    labels.write_bytes(content)
    assert main([str(path), "-o", str(tmp_path / "out.safetensors"), "--labels", str(labels)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_file_of_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one per line"):
        read_labels(tmp_path / "none.txt")


# Every key is accounted for


@pytest.mark.parametrize("name", ["tsm-r18", "mmaction-tsn-r18", "torchvision-r18", "online-demo"])
def test_missing_left_over_and_misshapen_tensors_are_named(name: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of(name)
    key = SOURCES[name].keys[0]
    shown = key.removeprefix("module.")
    save_file({k: v for k, v in whole.items() if k != key}, path)
    assert f"it lacks {shown};" in refusal(path)
    save_file({**whole, f"{SOURCES[name].prefix}gate.weight": torch.zeros(1)}, path)
    assert "it has the unknown gate.weight;" in refusal(path)
    save_file({**whole, key: whole[key][:, :1].clone()}, path)
    sentence = refusal(path)
    assert f"another shape was expected for {shown} (64x" in sentence or f"for {shown} (32x" in sentence


def test_at_most_a_dozen_keys_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of("tsm-r18")
    norms = [key for key in whole if key.endswith("running_mean")]
    save_file({key: value for key, value in whole.items() if key not in norms}, path)
    sentence = refusal(path)
    assert sentence.count("running_mean") == 12 and f"and {len(norms) - 12} more" in sentence
    save_file({**whole, **{f"module.extra{i:02d}": torch.zeros(1) for i in range(30)}}, path)
    sentence = refusal(path)
    assert "extra11 and 18 more" in sentence and "extra12" not in sentence


def test_counters_of_batches_may_be_there_or_not(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of("torchvision-r18")
    assert any(key.endswith("num_batches_tracked") for key in whole)
    save_file({key: value for key, value in whole.items() if not key.endswith("num_batches_tracked")}, path)
    convert(path)


def test_tsms_other_names_of_its_classifier_are_taken(tmp_path: Path) -> None:
    for name, other in (("tsm-r18", "fc"), ("tsm-mbv2", "classifier")):
        path, whole = tmp_path / f"{name}.safetensors", state_dict_of(name)
        save_file({key.replace("new_fc", f"base_model.{other}"): value for key, value in whole.items()}, path)
        bias = convert(path)[0].classifier.bias
        assert torch.equal(bias, whole["module.new_fc.bias"])


def test_a_second_classifier_is_not_lost_without_a_word(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of("tsm-r18")
    save_file({**whole, "module.base_model.fc.bias": torch.zeros(CLASSES)}, path)
    assert "has two classifiers, new_fc.bias and " in refusal(path)


def test_a_shift_elsewhere_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of("tsm-r18")
    in_place_of_blocks = {
        key.replace(".conv1.net.", ".conv1.").replace("layer2.0.", "layer2.0.net."): v for key, v in whole.items()
    }
    save_file(in_place_of_blocks, path)
    assert "layer2.0.net.conv1.weight" in refusal(path)
    every_other = {key.replace("layer2.1.conv1.net.", "layer2.1.conv1."): value for key, value in whole.items()}
    save_file(every_other, path)
    assert "it lacks base_model.layer2.1.conv1.net.weight" in refusal(path)


def test_networks_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tv.resnet34().state_dict(), path)
    assert "looks like torchvision (r18) but it has the unknown layer1.2.bn1.bias" in refusal(path)
    torch.save(tv.squeezenet1_0().state_dict(), path)
    sentence = refusal(path)
    assert "is no checkpoint that can be converted" in sentence and "mmaction2 (r50)" in sentence
    torch.save({}, path)
    assert "its keys are none" in refusal(path)


def test_flow_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of("tsm-r18")
    save_file({**whole, "module.base_model.conv1.weight": torch.zeros(64, 10, 7, 7)}, path)
    assert "base_model.conv1.weight (64x3x7x7, got 64x10x7x7)" in refusal(path)


def test_imagenets_mobilenet_is_not_taken_for_the_online_demo(tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.safetensors", state_dict_of("online-demo")
    save_file({**whole, "classifier.weight": torch.zeros(1000, 1280), "classifier.bias": torch.zeros(1000)}, path)
    assert "without a shift, that TSM starts from; convert torchvision's" in refusal(path)


# Files


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, capsys: Any) -> None:
    marker, path, out = tmp_path / "executed", tmp_path / "weights.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": state_dict_of("torchvision-r18"), "optimizer": Payload(marker)}, path)
    assert main([str(path), "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert "was not opened" in error and error.count("\n") == 1
    assert not marker.exists() and not out.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_record_beside_the_tensors_is_left_out_unread(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmengine saves histories of losses and numpy's numbers; a file of 2019 is a row of pickles."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.losses, self.statistics_methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

        def mean(self) -> None: ...

        def __setstate__(self, _: object) -> None:
            raise AssertionError("code of the checkpoint's project was run")

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = HistoryBuffer.__module__, "HistoryBuffer.mean"
    name, path = "mmaction-tsn-r18", tmp_path / "epoch_50.pth"
    with monkeypatch.context() as patch:
        for module in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        content = {
            "meta": {"best_score": np.float64(0.7), "epoch": np.int64(50), "iter": 7},
            "state_dict": state_dict_of(name),
            "message_hub": {"log_scalars": {"train/loss": HistoryBuffer(), "val/acc": HistoryBuffer()}},
        }
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    trusted = set(torch.serialization.get_safe_globals())
    assert convert(path)[2].source == "TSN of mmaction2"
    assert set(torch.serialization.get_safe_globals()) == trusted


@pytest.mark.parametrize("out", ["out.pth", "missing/out.safetensors"])
def test_a_place_that_cannot_be_written_leaves_nothing(out: str, tmp_path: Path, capsys: Any) -> None:
    path = saved("torchvision-r18", tmp_path)
    assert main([str(path), "-o", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert out in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == [path.name]


def test_a_refused_checkpoint_leaves_an_older_file_as_it_was(tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "weights.pth", tmp_path / "out.safetensors"
    out.write_text("older")
    torch.save(tv.resnet34().state_dict(), path)
    assert main([str(path), "-o", str(out)]) == 2
    assert out.read_text() == "older"
    assert main([str(saved("torchvision-r18", tmp_path)), "-o", str(out)]) == 0
    assert load_model(out)[1].network == "r18"


def test_the_module_is_a_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    result = subprocess.run(
        [sys.executable, "-m", "stsm_rt.convert", "no.pth", "-o", "out.safetensors"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 2 and result.stderr.startswith("stsm-rt: error: weights not found")
    assert list(tmp_path.iterdir()) == []
