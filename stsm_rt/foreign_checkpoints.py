"""Checkpoints of other projects: what they call the layers of our networks, and what they shift.

The names are those of the published code: torchvision; mit-han-lab/temporal-shift-module (``ops/models.py``,
``ops/temporal_shift.py``, ``archs/mobilenet_v2.py``, ``online_demo/mobilenet_v2_tsm.py``); open-mmlab/mmaction2
(``resnet.py``, ``resnet_tsm.py``, ``mobilenet_v2.py``, ``mobilenet_v2_tsm.py`` and the heads of TSM and TSN). All of
them normalise RGB with ImageNet's mean and standard deviation and pad strided convolutions on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork

_SHOWN = 12  # keys that an error names
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one project stores one network.

    Attributes:
        source: The project, for people.
        network: One of `networks.ARCHITECTURES`.
        shift: What its shift takes: nothing, the first eighth of the channels from the past ("past"), or the first
            eighth from the future and the second from the past ("both").
        prefix: Stands before every key of the backbone.
        modules: Our names of the backbone's modules -> theirs, where they differ.
        head: Their name of the classifier.
        frame_rate: Steps per second that suit how the project samples frames.
        smoothing: Frames whose scores the project averages.
    """

    source: str
    network: str
    shift: Literal["none", "past", "both"]
    prefix: str
    modules: Mapping[str, str]
    head: str
    frame_rate: float
    smoothing: int

    def names(self) -> dict[str, str]:
        """Their key -> our key, of every tensor."""
        names = {}
        for key in _shapes(self.network, 1):
            module, _, tensor = key.rpartition(".")
            if module == "classifier":
                names[f"{self.head}.{tensor}"] = key
            else:
                module = module.removeprefix("backbone.")
                names[f"{self.prefix}{self.modules.get(module, module)}.{tensor}"] = key
        return names


def _resnet_blocks(counts: Iterable[int]) -> list[str]:
    return [f"layer{stage}.{block}" for stage, count in enumerate(counts, 1) for block in range(count)]


def _mobilenet_blocks() -> Iterator[tuple[int, str, bool]]:
    """Of each block its place in torchvision's `features`, its name in mmaction2, and whether it is residual."""
    place = 0
    for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
        for block in range(count):
            place += 1
            yield place, f"layer{stage}.{block}", block > 0


def _tsm_resnet(blocks: list[str], net: str) -> dict[str, str]:
    return {f"{block}.conv1": f"{block}.conv1{net}" for block in blocks}


def _tsm_mobilenet(net: str) -> dict[str, str]:
    """Its blocks are flat lists of convolution, batch norm, ReLU6."""
    modules = {}
    for place, _, residual in _mobilenet_blocks():
        block = f"features.{place}.conv"
        projection = 1 if place == 1 else 2  # the first block has no expansion
        for layer in range(projection):
            modules[f"{block}.{layer}.0"] = f"{block}.{3 * layer}{net if residual and layer == 0 else ''}"
            modules[f"{block}.{layer}.1"] = f"{block}.{3 * layer + 1}"
        modules[f"{block}.{projection}"] = f"{block}.{3 * projection}"
        modules[f"{block}.{projection + 1}"] = f"{block}.{3 * projection + 1}"
    return modules


def _mmaction_resnet(blocks: list[str], net: str) -> dict[str, str]:
    modules = {"conv1": "conv1.conv", "bn1": "conv1.bn"}
    for block in blocks:
        for layer in (1, 2, 3):
            modules[f"{block}.conv{layer}"] = f"{block}.conv{layer}.conv{net if layer == 1 else ''}"
            modules[f"{block}.bn{layer}"] = f"{block}.conv{layer}.bn"
        modules[f"{block}.downsample.0"] = f"{block}.downsample.conv"
        modules[f"{block}.downsample.1"] = f"{block}.downsample.bn"
    return modules


def _mmaction_mobilenet(net: str) -> dict[str, str]:
    """Its shift wraps the first convolution together with its batch norm."""
    modules = {f"features.{place}.{i}": f"{conv}.{('conv', 'bn')[i]}" for place, conv in _ENDS for i in (0, 1)}
    for place, name, residual in _mobilenet_blocks():
        block = f"features.{place}.conv"
        projection = 1 if place == 1 else 2
        for layer in range(projection):
            wrapper = net if residual and layer == 0 else ""
            modules[f"{block}.{layer}.0"] = f"{name}.conv.{layer}{wrapper}.conv"
            modules[f"{block}.{layer}.1"] = f"{name}.conv.{layer}{wrapper}.bn"
        modules[f"{block}.{projection}"] = f"{name}.conv.{projection}.conv"
        modules[f"{block}.{projection + 1}"] = f"{name}.conv.{projection}.bn"
    return modules


_ENDS = ((0, "conv1"), (18, "conv2"))
_MOBILENET = "mbv2_torchvision"
_RESNETS = {"r18": _resnet_blocks((2, 2, 2, 2)), "r50": _resnet_blocks((3, 4, 6, 3))}
_TORCHVISION_HEADS = {"r18": "fc", "r50": "fc", _MOBILENET: "classifier.1"}


def _layouts() -> Iterator[Layout]:
    for network, head in _TORCHVISION_HEADS.items():
        yield Layout(
            source="torchvision",
            network=network,
            shift="none",
            prefix="",
            modules={},
            head=head,
            frame_rate=10.0,
            smoothing=1,
        )
    # The demo steps on every second frame of a camera of 30 and adds up the logits of the last 12. It gives the network
    # OpenCV's BGR as it comes; the training that the checkpoint is from read RGB, which our graph makes of BGR.
    yield Layout(
        source="the online demo of TSM",
        network=_MOBILENET,
        shift="past",
        prefix="",
        modules=_tsm_mobilenet(""),
        head="classifier",
        frame_rate=15.0,
        smoothing=12,
    )
    for shift, net in (("both", ".net"), ("none", "")):
        tsm = {name: _tsm_resnet(blocks, net) for name, blocks in _RESNETS.items()} | {_MOBILENET: _tsm_mobilenet(net)}
        mmaction = {name: _mmaction_resnet(blocks, net) for name, blocks in _RESNETS.items()}
        mmaction[_MOBILENET] = _mmaction_mobilenet(net)
        kind = "TSM" if shift == "both" else "TSN"
        for source, prefix, head, networks in (
            (f"{kind} of mit-han-lab/temporal-shift-module", "base_model.", "new_fc", tsm),
            (f"{kind} of mmaction2", "backbone.", "cls_head.fc_cls", mmaction),
        ):
            for network, modules in networks.items():
                # Dense sampling takes 8 of 64 frames, 30 of them a second; where segments are spread over whole videos
                # the rate is the videos' own.
                yield Layout(
                    source=source,
                    network=network,
                    shift="both" if shift == "both" else "none",
                    prefix=prefix,
                    modules=modules,
                    head=head,
                    frame_rate=3.75,
                    smoothing=8,
                )


LAYOUTS = tuple(_layouts())


@cache
def _shapes(network: str, classes: int) -> dict[str, torch.Size]:
    """Our keys and shapes of a network's weights."""
    with torch.device("meta"):
        tensors = StreamingNetwork(network, classes, shift=None).state_dict()
    return {
        key: value.shape
        for key, value in tensors.items()
        if key.startswith(("backbone.", "classifier.")) and not key.endswith("num_batches_tracked")
    }


def recognize_layout(tensors: Mapping[str, Tensor], path: Path) -> tuple[Layout, dict[str, Tensor]]:
    """Find whose checkpoint it is and account for every key.

    Counters of batches (``num_batches_tracked``) are left out: a network that is not being trained has no use for them.

    Args:
        tensors: The checkpoint.
        path: Where it came from, for the error.

    Returns:
        The layout, and the tensors under our keys, in FP32.

    Raises:
        UserError: It is no known checkpoint, or a key is missing, left over or of another shape.
    """
    given = _plain_names(tensors, path)
    layout, names = min(
        ((layout, layout.names()) for layout in LAYOUTS), key=lambda found: len(found[1].keys() ^ given.keys())
    )
    if 2 * len(names.keys() & given.keys()) < len(names):
        known = ", ".join(dict.fromkeys(f"{layout.source} ({layout.network})" for layout in LAYOUTS))
        raise UserError(
            f"{path} is no checkpoint that can be converted: its keys are {_listed(sorted(given))}; "
            f"expected one of {known}"
        )
    head = given.get(f"{layout.head}.weight")
    classes = max(head.shape[0], 1) if head is not None and head.dim() else 1
    shapes = _shapes(layout.network, classes)
    problems = [
        f"{problem} {_listed(keys)}"
        for problem, keys in (
            ("it lacks", sorted(names.keys() - given.keys())),
            ("it has the unknown", sorted(given.keys() - names.keys())),
            (
                "another shape was expected for",
                [
                    f"{key} ({_size(shapes[own])}, got {_size(given[key].shape)})"
                    for key, own in sorted(names.items())
                    if key in given and given[key].shape != shapes[own]
                ],
            ),
        )
        if keys
    ]
    if problems:
        raise UserError(
            f"{path} looks like {layout.source} ({layout.network}) but {', and '.join(problems)}; "
            "only a whole checkpoint of such a network, in RGB and without further blocks, can be converted"
        )
    if layout.shift == "past" and classes == _IMAGENET_CLASSES:
        raise UserError(
            f"{path} has the keys of {layout.source} but ImageNet's {classes} classes: it is the plain MobileNetV2, "
            "without a shift, that TSM starts from; convert torchvision's mobilenet_v2 instead"
        )
    return layout, {own: given[key].float() for key, own in names.items()}


def _plain_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Without DataParallel's prefix and counters of batches, TSM's classifier always as `new_fc`."""
    wrapped = all(key.startswith("module.") for key in tensors)
    names: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith("num_batches_tracked"):
            continue
        # A network that TSM made without dropout keeps its classifier in the base model.
        plain = key.removeprefix("module.") if wrapped else key
        name = re.sub(r"^base_model\.(?:fc|classifier)\.", "new_fc.", plain)
        if name in names:
            raise UserError(f"{path} has two classifiers, {name} and {plain}; only a network with one can be converted")
        names[name] = value
    return names


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (", ".join(keys[:_SHOWN]) or "none") + more
