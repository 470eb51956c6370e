"""Networks to put a shift into, with the layers where it belongs, and the shift written out once more."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torchvision.models as tv
import torchvision.models.video as video
from torch import Tensor, nn

from stsm_rt.shift import PRESETS, RollingState, ShiftSpec

SIZE, FRAMES = 64, 5


@dataclass(frozen=True)
class Case:
    """A network, the layers that start its residual branches, and a shift for it.

    Attributes:
        build: Makes it.
        first_layers: Patterns of their paths.
        count: How many there are.
        shift: Name of a preset.
        shape: Of a clip.
        where: Given to `insert_shift`; None: found by structure.
    """

    build: Callable[[], nn.Module]
    first_layers: tuple[str, ...]
    count: int
    shift: str = "stsm_online"
    shape: tuple[int, ...] = (1, FRAMES, 3, SIZE, SIZE)
    where: str | None = None

    def paths(self, network: nn.Module) -> list[str]:
        """Of the first layers."""
        found = [p for p, _ in network.named_modules() if any(fnmatchcase(p, f) for f in self.first_layers)]
        assert len(found) == self.count
        return found


def timm_network(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of timm with random weights."""

    def build() -> nn.Module:
        if os.environ.get("CI") != "true":
            pytest.importorskip("timm", reason="networks of timm need the package timm (extra dev)")
        import timm

        return timm.create_model(name, num_classes=10, **options)

    return build


def _tv(build: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: build(num_classes=10, **options)


def _s3d() -> nn.Module:
    network = video.s3d(num_classes=10)
    network.avgpool = nn.AdaptiveAvgPool3d(1)  # its own needs 224x224 pixels
    return network


RESNET = ("layer?.*.conv1",)
IMAGE_NETWORKS = {
    # torchvision
    "tv_resnet18": Case(_tv(tv.resnet18), RESNET, 8),
    "tv_resnet50": Case(_tv(tv.resnet50), RESNET, 16),
    "tv_resnext50": Case(_tv(tv.resnext50_32x4d), RESNET, 16),
    "tv_regnet_x_400mf": Case(_tv(tv.regnet_x_400mf), ("*.f.a.0",), 22),
    "tv_regnet_y_400mf": Case(_tv(tv.regnet_y_400mf), ("*.f.a.0",), 16),
    "tv_mobilenet_v2": Case(
        _tv(tv.mobilenet_v2), tuple(f"features.{i}.conv.0.0" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)), 10
    ),
    "tv_mobilenet_v3_small": Case(
        _tv(tv.mobilenet_v3_small), tuple(f"features.{i}.block.0.0" for i in (3, 5, 6, 8, 10, 11)), 6
    ),
    "tv_mobilenet_v3_large": Case(
        _tv(tv.mobilenet_v3_large), tuple(f"features.{i}.block.0.0" for i in (1, 3, 5, 6, 8, 9, 10, 12, 14, 15)), 10
    ),
    "tv_efficientnet_b0": Case(_tv(tv.efficientnet_b0), tuple(f"features.{s}.[1-9].block.0.0" for s in range(1, 8)), 9),
    "tv_mnasnet0_5": Case(_tv(tv.mnasnet0_5), tuple(f"layers.*.{i}.layers.0" for i in (1, 2, 3)), 10, "tsm_online"),
    "tv_convnext_tiny": Case(_tv(tv.convnext_tiny), ("features.*.block.0",), 18),
    "tv_vit": Case(
        _tv(
            tv.VisionTransformer, image_size=SIZE, patch_size=16, num_layers=3, num_heads=4, hidden_dim=96, mlp_dim=192
        ),
        ("encoder.layers.*.ln_[12]",),
        6,
        "tsm_online",
    ),
    "tv_swin_t": Case(_tv(tv.swin_t), ("features.*.norm[12]",), 24),
    # timm
    "timm_resnet18d": Case(timm_network("resnet18d"), RESNET, 8),
    "timm_seresnet50": Case(timm_network("seresnet50"), RESNET, 16),
    "timm_res2net50_14w_8s": Case(timm_network("res2net50_14w_8s"), RESNET, 16),
    "timm_resnetv2_50": Case(timm_network("resnetv2_50"), ("stages.*.0.conv1", "stages.*.blocks.[1-9].norm1"), 16),
    "timm_regnety_002": Case(timm_network("regnety_002"), ("s?.b*.conv1.conv",), 13),
    "timm_mobilenetv2_100": Case(timm_network("mobilenetv2_100"), ("blocks.?.[1-9].conv_pw",), 10),
    "timm_mobilenetv3_large_100": Case(
        timm_network("mobilenetv3_large_100"), ("blocks.?.[1-9].conv_pw", "blocks.0.0.conv_dw"), 10
    ),
    "timm_mobilenetv4_conv_small": Case(
        timm_network("mobilenetv4_conv_small"),
        (
            *(f"blocks.{i}.dw_start.conv" for i in ("2.5", "3.1")),
            "blocks.2.[1-4].pw_exp.conv",
            "blocks.3.[2-5].pw_exp.conv",
        ),
        10,
    ),
    "timm_tf_efficientnet_lite0": Case(timm_network("tf_efficientnet_lite0"), ("blocks.?.[1-9].conv_pw",), 9),
    "timm_convnextv2_atto": Case(timm_network("convnextv2_atto"), ("stages.*.conv_dw",), 12),
    "timm_vit_tiny": Case(
        timm_network("vit_tiny_patch16_224", img_size=SIZE, depth=4), ("blocks.*.norm[12]",), 8, "tsm_online"
    ),
    "timm_swin_tiny": Case(
        timm_network("swin_tiny_patch4_window7_224", img_size=SIZE), ("layers.*.norm[12]",), 24, "tsm_online"
    ),
}

INCEPTION = "features.*.branch?.0.0"
VIDEO_NETWORKS = {
    "r3d_18": Case(_tv(video.r3d_18), ("layer?.?.conv1.0",), 8, "stsm", (1, 3, 6, SIZE, SIZE)),
    "mc3_18": Case(_tv(video.mc3_18), ("layer?.?.conv1.0",), 8, "stsm", (1, 3, 6, SIZE, SIZE)),
    "r2plus1d_18": Case(_tv(video.r2plus1d_18), ("layer?.?.conv1.0.0",), 8, "stsm", (1, 3, 6, SIZE, SIZE)),
    "s3d": Case(_s3d, (INCEPTION,), 18, "stsm", (1, 3, 16, SIZE, SIZE), INCEPTION),
    "swin3d_t": Case(_tv(video.swin3d_t), ("features.*.norm[12]",), 24, "stsm", (1, 3, 6, SIZE, SIZE)),
}


def clip_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def network_of(case: Case) -> nn.Module:
    """A network in evaluation mode in which every branch, scale and statistic counts.

    Many start with branches that are switched off.
    """
    torch.manual_seed(0)
    network = case.build()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        vector = tensor.numel() == max(tensor.shape, default=0) and tensor.is_floating_point()
        if vector and name.endswith(("running_mean", "bias")):
            tensor.uniform_(-0.1, 0.1)
        elif vector:
            tensor.uniform_(0.3, 0.9)
        elif not tensor.any() and tensor.dim() > 1:
            tensor.normal_(std=0.1)
    if case in IMAGE_NETWORKS.values():
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:  # frames fade on their way through statistics that are none of theirs
            norm.reset_running_stats()
            norm.momentum = None
        if norms:
            network.train()(clip_of(case.shape, seed=9)[0])
        # A deep random network amplifies rounding from block to block, trained ones hardly do.
        for layer in map(network.get_submodule, case.paths(network)):
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(0.2)
    return network.eval()


def shifted(x: Tensor, spec: ShiftSpec) -> Tensor:
    """The definition for (N, T, C, H, W), group by group."""
    y, start = x.clone(), 0
    for group in spec.groups:
        stop = start + int(x.shape[2] * group.fraction)
        part = x[:, :, start:stop]
        for axis, moved in ((1, group.dt), (3, group.dh), (4, group.dw)):
            size = x.shape[axis]
            index = torch.arange(size) - moved
            inside = ((index >= 0) & (index < size)).to(x).view([-1 if i == axis else 1 for i in range(5)])
            part = part.index_select(axis, index.clamp(0, size - 1)) * inside
        y[:, :, start:stop] = part
        start = stop
    return y


def reference(network: nn.Module, case: Case, clip: Tensor, spec: ShiftSpec | None = None) -> Tensor:
    """Logits with the shift before the case's first layers, by hooks of its own."""
    spec = PRESETS[case.shift] if spec is None else spec
    frames = clip.shape[1]

    def shift(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        last = isinstance(module, nn.LayerNorm)
        if x.dim() == 5:
            y = x.permute(0, 1, 4, 2, 3) if last else x.transpose(1, 2)
            y = shifted(y, spec)
            return (y.permute(0, 1, 3, 4, 2) if last else y.transpose(1, 2), *others)
        y = x.reshape(-1, frames, *x.shape[1:])
        if x.dim() == 3:
            y = shifted(y.transpose(2, 3).unsqueeze(-1), spec).squeeze(-1).transpose(2, 3)
        else:
            y = shifted(y.permute(0, 1, 4, 2, 3), spec).permute(0, 1, 3, 4, 2) if last else shifted(y, spec)
        return (y.reshape(x.shape), *others)

    handles = [network.get_submodule(path).register_forward_pre_hook(shift) for path in case.paths(network)]
    try:
        if case in VIDEO_NETWORKS.values():
            return network(clip)
        return network(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
    finally:
        for handle in handles:
            handle.remove()


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    assert logits.shape == expected.shape
    assert torch.isfinite(logits).all()
    return float((logits - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def stream(step: Any, clip: Tensor) -> Tensor:
    """Logits (N, T, K) of a clip (N, T, C, H, W), fed frame by frame."""
    rolling = RollingState(step.initial_state(), step.delays)
    logits = []
    for frame in clip.unbind(1):
        output, *following = step(frame, *rolling.read())
        rolling.write(following)
        logits.append(output)
    return torch.stack(logits, 1)
