"""The command ``python -m stsm_rt.convert``: other people's checkpoints -> weights that this project opens.

What is taken is listed in `stsm_rt.foreign_checkpoints`. A frame's logits are the source's; a shift that looks ahead
loses that half of it, as a stream must (`keep_the_past`). A project that scores a clip by the mean of its frames'
logits has that score in the mean of the clip form's; the record's smoothing averages probabilities over as many steps.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from stsm_rt.checkpoints import read_tensors
from stsm_rt.errors import UserError, report
from stsm_rt.foreign_checkpoints import Layout, recognize_layout
from stsm_rt.manifest import DecisionSpec, sha256_of
from stsm_rt.model import ModelSpec, save_model
from stsm_rt.networks import ARCHITECTURES, StreamingNetwork, residual_branch_starts
from stsm_rt.shift import shift_spec


class _LeftOut:
    """Stands for what a project saves beside its tensors: takes anything, keeps nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# mmengine's histories of losses and numpy's numbers, under the names that pickles of them use. They are told to the
# weights-only reader with a class of ours for each, so that nothing of theirs is imported or run.
_LEFT_OUT: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_LeftOut, name)
    for name in (
        "mmengine.logging.history_buffer.HistoryBuffer",
        "builtins.getattr",  # by which a history names its statistics
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    )
]
_SIZE = 224  # of every source, a square from the middle of a picture whose shorter side is 256 (torchvision V2: 232)


def convert(
    source: Path, *, labels: Sequence[str] | None = None, frame_rate: float | None = None
) -> tuple[StreamingNetwork, ModelSpec, Layout]:
    """Read a foreign checkpoint.

    Args:
        source: A PyTorch checkpoint (read weights-only) or a .safetensors file.
        labels: One per class; None: the class numbers.
        frame_rate: Steps per second of source time; None: what suits the source.

    Returns:
        The network in evaluation mode, its record and the layout of the source.

    Raises:
        UserError: No known checkpoint, a key or a shape that does not fit, or labels that do not.
    """
    with torch.serialization.safe_globals(_LEFT_OUT):
        content = read_tensors(source)
    layout, tensors = recognize_layout(content, source)
    classes = tensors["classifier.bias"].shape[0]
    if labels is not None and len(labels) != classes:
        raise UserError(f"{source} has {classes} classes, got {len(labels)} labels; give one per line and class")
    if frame_rate is not None and not 0 < frame_rate < float("inf"):
        raise UserError(f"a frame rate is a positive number of steps per second, got {frame_rate:g}")
    architecture = ARCHITECTURES[layout.network]
    spec = ModelSpec(
        network=layout.network,
        padding=architecture.padding,
        shift=shift_spec("tsm_online").to_json() if layout.shift != "none" else None,
        rates=(),
        changes=False,
        labels=tuple(labels) if labels is not None else tuple(map(str, range(classes))),
        background=None,
        height=_SIZE,
        width=_SIZE,
        frame_rate=layout.frame_rate if frame_rate is None else frame_rate,
        # Nobody has chosen thresholds for these weights; the smoothing is the source's own.
        decision=DecisionSpec(smoothing=layout.smoothing, threshold=0.5, release=0.3, min_steps=3),
        recipe={
            "name": source.stem,
            "source": layout.source,
            "file": source.name,
            "sha256": sha256_of(source),
            "future_dropped": layout.shift == "both",
            "preprocessing": {"colour": "RGB", "mean": list(architecture.mean), "std": list(architecture.std)},
        },
    )
    network = spec.build().eval()
    network.load_state_dict(tensors, strict=False)  # every key was accounted for; what is ours alone starts neutral
    if layout.shift == "both":
        keep_the_past(network)
    return network, spec, layout


@dataclass
class _Stream:
    """A residual stream: the layers that write its channels, convolution and batch norm, and those that read them."""

    writers: list[nn.Module] = field(default_factory=list)
    readers: list[nn.Module] = field(default_factory=list)


def _streams(network: StreamingNetwork) -> Iterator[_Stream]:
    backbone = network.backbone
    stream = _Stream(writers=_layers(backbone)[:2])
    for block in backbone.modules():
        if not (isinstance(block, BasicBlock | Bottleneck) or hasattr(block, "use_res_connect")):
            continue
        downsample = list(getattr(block, "downsample", None) or ())
        branch = [layer for layer in _layers(block) if layer not in downsample]
        stream.readers.append(branch[0])
        if downsample or not getattr(block, "use_res_connect", True):
            stream.readers += downsample[:1]
            yield stream
            stream = _Stream(writers=downsample)
        stream.writers = stream.writers + branch[-2:]
    features = getattr(backbone, "features", None)
    stream.readers.append(_layers(features[-1])[0] if isinstance(features, nn.Sequential) else network.classifier)
    yield stream


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]


@torch.no_grad()
def keep_the_past(network: StreamingNetwork) -> None:
    """Make the first eighth of every shifted residual stream its second, and the second its first, in place.

    TSM's offline shift takes the first eighth of the channels from the next frame and the second from the frame before.
    A stream has no next frame: the first eighth stays where it is. Our causal shift takes the *first* eighth from the
    past, so the two change places in all that writes and reads the stream. The plain network computes what it did.

    Args:
        network: A ResNet or a MobileNetV2 with the weights of the offline shift and without running averages.
    """
    shifted = set(residual_branch_starts(network.backbone))
    for stream in _streams(network):
        channels = next(layer.num_features for layer in stream.writers if isinstance(layer, nn.BatchNorm2d))
        if shifted.isdisjoint(stream.readers):
            continue
        eighth = channels // 8
        order = torch.arange(channels)
        order[: 2 * eighth] = order[: 2 * eighth].roll(eighth)
        for layer in stream.writers:
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():  # not the count of batches
                    tensor.copy_(tensor[order].clone())
        for layer in stream.readers:
            weight: Tensor = layer.get_parameter("weight")
            weight.copy_(weight[:, order].clone())


def read_labels(path: Path) -> list[str]:
    """The labels of a text file, one per line; empty lines do not count.

    Raises:
        UserError: No such file, not text, or a label that stands there twice.
    """
    try:
        labels = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels are a text file with one per line, got {path} ({error}); choose another") from error
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(f"labels must differ from each other, but {path} has {twice[0]!r} twice; rename one")
    return labels


def describe(spec: ModelSpec, layout: Layout, out: Path, tensors: int) -> str:
    """What was converted and what is to know about it, for people."""
    shift = spec.shift["name"] if spec.shift is not None else "none"
    lines = [
        f"{out}: {spec.network}, shift {shift}, {len(spec.labels)} labels, {spec.width}x{spec.height}, "
        f"{spec.frame_rate:g} steps per second",
        f"from {layout.source}: all {tensors} tensors accounted for; RGB, ImageNet's mean and std, as in the source",
    ]
    if layout.shift == "both":
        lines.append(
            "This checkpoint looks both ways: the first eighth of the channels comes from the next frame, the second "
            "from the frame before. A stream has no next frame, so the future half is dropped: the first eighth stays "
            "in its frame. The weights were not trained like that and accuracy falls. Fine-tune with: stsm-rt train "
            f"RECIPE.toml --data FOLDER --pretrained {shlex.quote(str(out))} (a recipe with network = {spec.network!r} "
            f"and shift = {shift!r}). That it is an eighth is TSM's default; a checkpoint does not say it."
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="stsm-rt convert",
        description="Convert a checkpoint of torchvision, TSM (mit-han-lab) or mmaction2 (TSM, TSN) to weights that "
        "stsm-rt export and build-engine take.",
    )
    parser.add_argument("source", type=Path, help="checkpoint (.pth, .pth.tar, .safetensors); no code in it is run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.safetensors)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="one label per line (default: class numbers)")
    parser.add_argument("--frame-rate", type=float, help="steps per second (default: as the source samples frames)")
    options = parser.parse_args(argv)
    try:
        if options.out.suffix != ".safetensors":
            raise UserError(f"converted weights end in .safetensors, got {options.out}")
        labels = read_labels(options.labels) if options.labels else None
        network, spec, layout = convert(options.source, labels=labels, frame_rate=options.frame_rate)
        save_model(network, spec, options.out)
    except UserError as error:
        return report(error)
    print(describe(spec, layout, options.out, len(layout.names())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
