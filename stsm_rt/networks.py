"""Named 2D networks with a shift in every residual branch, in clip form and in step form.

The shift is put before the first convolution of each residual branch; the identity path is never moved. It
sits in forward hooks, so a shifted network has exactly the parameters and the key names of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

from stsm_rt.errors import UserError
from stsm_rt.manifest import StateSpec
from stsm_rt.running_average import RunningAverages
from stsm_rt.shift import RollingState, ShiftSpec, shift_clip, shift_step

Padding = Literal["symmetric", "same"]


class InvertedResidual(nn.Module):
    """MBConv without squeeze-and-excitation: 1x1 expansion, depthwise kxk, 1x1 projection.

    Key names follow torchvision's MobileNetV2.
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv_bn_relu6(inputs, hidden, kernel=1))
        layers += [
            _conv_bn_relu6(hidden, hidden, kernel=kernel, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            _batch_norm_tf(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def _batch_norm_tf(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _conv_bn_relu6(inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return Conv2dNormActivation(
        inputs, outputs, kernel, stride, groups=groups, norm_layer=_batch_norm_tf, activation_layer=nn.ReLU6
    )


class _Classifierless(nn.Module):
    """A torchvision network up to its pooled features."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, getattr(network, name))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x.mean((2, 3))


_RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def _lite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le, 2019; the Lite variants drop squeeze-and-excitation and use ReLU6)."""
    # channels, blocks, stride, kernel, expansion
    stages = (
        (16, 1, 1, 3, 1),
        (24, 2, 2, 3, 6),
        (40, 2, 2, 5, 6),
        (80, 3, 2, 3, 6),
        (112, 3, 1, 5, 6),
        (192, 4, 2, 5, 6),
        (320, 1, 1, 3, 6),
    )
    layers, channels = [_conv_bn_relu6(3, 32, kernel=3, stride=2)], 32
    for outputs, blocks, stride, kernel, expansion in stages:
        for block in range(blocks):
            layers.append(
                InvertedResidual(
                    channels, outputs, kernel=kernel, stride=stride if block == 0 else 1, expansion=expansion
                )
            )
            channels = outputs
    layers.append(_conv_bn_relu6(channels, 1280, kernel=1))
    network = nn.Module()
    network.features = nn.Sequential(*layers)
    return _Classifierless(network, ("features",))


def _r8() -> nn.Module:
    """A residual network of three basic blocks with 0.3 M parameters, for small low-resolution problems."""
    network = nn.Module()
    network.stem = Conv2dNormActivation(3, 32, 3, 2)
    network.blocks = nn.Sequential(
        *(
            BasicBlock(
                inputs,
                outputs,
                stride,
                nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
                if inputs != outputs
                else None,
            )
            for inputs, outputs, stride in ((32, 32, 1), (32, 64, 2), (64, 128, 2))
        )
    )
    return _Classifierless(network, ("stem", "blocks"))


@dataclass(frozen=True)
class Architecture:
    """What a named network is.

    Attributes:
        build: Makes the network, from (N, 3, H, W) normalised RGB to pooled features (N, F).
        features: F.
        mean: Of RGB, in the units of a uint8 frame (0 to 255).
        std: Likewise; the network sees ``(rgb - mean) / std``.
        padding: Of strided convolutions: "symmetric" (torchvision) or "same" (TensorFlow: the odd pixel goes
            right and below). It belongs to the weights.
    """

    build: Callable[[], nn.Module]
    features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: Padding


_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

ARCHITECTURES: dict[str, Architecture] = {
    "r18": Architecture(
        lambda: _Classifierless(tv.resnet18(), _RESNET), 512, _IMAGENET_MEAN, _IMAGENET_STD, "symmetric"
    ),
    "r50": Architecture(
        lambda: _Classifierless(tv.resnet50(), _RESNET), 2048, _IMAGENET_MEAN, _IMAGENET_STD, "symmetric"
    ),
    "mbv2": Architecture(
        lambda: _Classifierless(tv.mobilenet_v2(), ("features",)), 1280, (127.5,) * 3, (127.5,) * 3, "same"
    ),
    # The same network as torchvision, TSM and mmaction2 trained it: their preprocessing, their padding.
    "mbv2_torchvision": Architecture(
        lambda: _Classifierless(tv.mobilenet_v2(), ("features",)), 1280, _IMAGENET_MEAN, _IMAGENET_STD, "symmetric"
    ),
    "lite0": Architecture(_lite0, 1280, (127.0,) * 3, (128.0,) * 3, "same"),
    "r8": Architecture(_r8, 128, (127.5,) * 3, (127.5,) * 3, "symmetric"),
}


class _SamePadding:
    """Forward pre-hook of a strided convolution: TensorFlow's SAME padding."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.kernel, self.stride = conv.kernel_size, conv.stride
        conv.padding = (0, 0)

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        totals = [
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, kernel, stride in zip(x.shape[2:], self.kernel, self.stride, strict=True)
        ]
        (height, width) = totals
        return (F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)),)


class ShiftHook:
    """Forward pre-hook that shifts a layer's input, in clip form or, with `previous` set, in step form.

    Attributes:
        step: What shifts in step form, from a frame and the slices kept to the shifted frame and the slices to keep.
    """

    def __init__(self, spec: ShiftSpec) -> None:
        self.spec = spec
        self.step: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, tuple[Tensor, ...]]] = partial(
            shift_step, spec=spec
        )
        self.length = 1
        self.previous: Sequence[Tensor] | None = None
        self.following: tuple[Tensor, ...] = ()
        self.shape: torch.Size | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """The layer's input, shifted: (N * T, C, H, W) in clip form, (N, C, H, W) in step form."""
        (x,) = args
        self.shape = x.shape
        if self.previous is None:
            return (shift_clip(x.unflatten(0, (-1, self.length)), self.spec).flatten(0, 1),)
        y, self.following = self.step(x, self.previous)
        return (y,)


def residual_branch_starts(network: nn.Module) -> list[nn.Conv2d]:
    """The first convolution of every residual branch, in order."""
    starts = []
    for module in network.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            starts.append(module.conv1)
        elif getattr(module, "use_res_connect", False):
            starts.append(next(m for m in module.modules() if isinstance(m, nn.Conv2d)))
    return starts


class StreamingNetwork(nn.Module):
    """A shifted 2D network with a causal classifier: uint8 frames in, logits out.

    ``network(clip)`` is the clip form, ``network(frame, *state)`` the step form; see `forward`.

    Args:
        name: One of `ARCHITECTURES`.
        classes: Number of logits.
        shift: What moves where, or None for the plain network.
        rates: Of the classifier's running averages, fastest first; none: it sees the current frame only.
        changes: Whether the classifier sees the running average of absolute changes, too.
        padding: Of strided convolutions; None: what the network's usual weights need.
        dropout: Of the classifier's input, while training.

    Raises:
        UserError: Unknown network or padding, or a shift that does not fit the network.
    """

    mean: Tensor
    std: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        classes: int,
        *,
        shift: ShiftSpec | None,
        rates: Sequence[float] = (),
        changes: bool = False,
        padding: Padding | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise UserError(f"unknown network {name!r}; there are {', '.join(ARCHITECTURES)}")
        if padding not in (None, *get_args(Padding)):
            raise UserError(f"unknown padding {padding!r}; there are {', '.join(get_args(Padding))}")
        architecture = ARCHITECTURES[name]
        self.name, self.shift = name, shift
        self.padding = padding or architecture.padding
        # Buffers, because a CUDA graph cannot capture a copy from the host; they belong to the architecture, not
        # to its weights.
        self.register_buffer("mean", torch.tensor(architecture.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(1, 3, 1, 1), persistent=False)
        self.backbone = architecture.build()
        if self.padding == "same":
            for module in self.backbone.modules():
                if isinstance(module, nn.Conv2d) and module.stride != (1, 1) and module.kernel_size != (1, 1):
                    module.register_forward_pre_hook(_SamePadding(module))
        self.hooks: list[ShiftHook] = []
        if shift is not None:
            for conv in residual_branch_starts(self.backbone):
                shift.slices(conv.in_channels)
                self.hooks.append(ShiftHook(shift))
                conv.register_forward_pre_hook(self.hooks[-1], prepend=True)
        self.averages = RunningAverages(architecture.features, rates, changes=changes)
        self.register_buffer("offset", torch.zeros(self.averages.out_features))
        self.register_buffer("scale", torch.ones(self.averages.out_features))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.averages.out_features, classes)

    def pooled(self, frames: Tensor) -> Tensor:
        """(N, H, W, 3) BGR, 0 to 255 -> (N, F) pooled features."""
        # The cast comes first: neither TensorRT nor its ONNX parser can permute bytes.
        x = frames.to(self.classifier.weight.dtype).permute(0, 3, 1, 2).flip(1)
        return self.backbone((x - self.mean) / self.std)

    def classify(self, features: Tensor) -> Tensor:
        """(..., out_features) of the running averages -> (..., K) logits, in FP32 or FP16 as the weights."""
        return self.classifier(self.dropout((features - self.offset) * self.scale))

    def forward(self, frames: Tensor, *state: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Clip form or step form, by the number of dimensions.

        Args:
            frames: uint8 BGR, (N, T, H, W, 3) for a clip or (N, H, W, 3) for a step. A clip may be floating
                (0 to 255), as augmentation leaves it.
            *state: In step form, the states in the order of `state_specs`; zeros at the start of a stream.

        Returns:
            Of a clip: logits (N, T, K), each frame's from itself and the frames before it, if the shift is
            causal. Of a step: ``(logits (N, K), *next_state)``.

        Raises:
            UserError: In step form: the shift looks ahead, or the states are not those of `state_specs`.
        """
        if frames.dim() == 5:
            return self.classify(self.averages.clip(self.clip_features(frames)))
        expected = sum(len(hook.spec.delays) for hook in self.hooks) + len(self.averages.state_shapes(1))
        if len(state) != expected:
            raise UserError(f"a step of this network takes {expected} states, got {len(state)}; see initial_state")
        kept = iter(state)
        for hook in self.hooks:
            hook.previous = [next(kept) for _ in hook.spec.delays]
        try:
            pooled = self.pooled(frames)
        finally:
            for hook in self.hooks:
                hook.previous = None
        features, following = self.averages.step(pooled, list(kept))
        moved = [state for hook in self.hooks for state in hook.following]
        for hook in self.hooks:
            hook.following = ()  # nothing of this step may outlive it: a CUDA graph's memory, a traced tensor
        return (self.classify(features), *moved, *following)

    def clip_features(self, frames: Tensor) -> Tensor:
        """(N, T, H, W, 3) BGR -> (N, T, F) pooled features of the clip form."""
        for hook in self.hooks:
            hook.length = frames.shape[1]
        return self.pooled(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def state_specs(self, height: int, width: int, batch: int = 1) -> tuple[StateSpec, ...]:
        """Names, shapes, dtypes and delays of the step form's states.

        Raises:
            ShiftError: The shift looks ahead.
        """
        delays = self.shift.delays if self.shift is not None else ()
        weight = self.classifier.weight
        modes = [(module, module.training) for module in self.modules()]
        self.eval()  # these zeros must not enter the batch norm statistics
        with torch.no_grad():
            self.clip_features(torch.zeros(batch, 1, height, width, 3, dtype=torch.uint8, device=weight.device))
        for module, training in modes:
            module.training = training
        shapes: list[tuple[tuple[int, ...], int]] = []
        for hook in self.hooks:
            assert hook.shape is not None
            slices = hook.spec.slices(hook.shape[1])
            for delay in delays:
                channels = sum(s.stop - s.start for s in slices if s.dt == delay)
                shapes.append(((batch, channels, *hook.shape[2:]), delay))
        shapes += [(shape, 1) for shape in self.averages.state_shapes(batch)]
        dtype = str(weight.dtype).removeprefix("torch.")
        return tuple(
            StateSpec(name=f"state_{i:02d}", shape=tuple(shape), dtype=dtype, delay=delay)
            for i, (shape, delay) in enumerate(shapes)
        )

    def initial_state(self, height: int, width: int, batch: int = 1) -> list[Tensor]:
        """Zeros for every state, on the network's device."""
        weight = self.classifier.weight
        return [
            torch.zeros(s.shape, dtype=weight.dtype, device=weight.device)
            for s in self.state_specs(height, width, batch)
        ]


@torch.no_grad()
def stream(network: StreamingNetwork, clip: Tensor) -> Tensor:
    """Feed a clip frame by frame through the step form.

    Args:
        network: Causal, in evaluation mode.
        clip: (N, T, H, W, 3) uint8 BGR.

    Returns:
        Logits (N, T, K).
    """
    batch, _, height, width, _ = clip.shape
    specs = network.state_specs(height, width, batch)
    rolling = RollingState(network.initial_state(height, width, batch), [s.delay for s in specs])
    logits = []
    for frame in clip.unbind(1):
        output, *following = network(frame, *rolling.read())
        rolling.write(following)
        logits.append(output)
    return torch.stack(logits, 1)
