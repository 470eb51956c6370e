"""The shift in the form that costs least in an exported graph.

Taken literally, a spatial group is a slice and a pad of a few channels, eight small copies for each block, and every
copy leaves the layout in which a runtime computes its convolutions. Here all spatial groups of a block are one
depthwise convolution with one-hot kernels, which runtimes compute in their own layout; what is left for time is one
slice that is kept and one concatenation with what was kept. Multiplying by one and adding zeros is exact.

Residual sums without an activation (inverted residuals) are narrow, so the convolution takes all of their channels, the
unmoved ones by a one in the middle of the kernel. Behind a ReLU (basic blocks, bottlenecks) they are wide: there it
takes only the channels that move, and `stsm_rt.split_streams` can go on to keep the streams apart altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from stsm_rt.networks import StreamingNetwork, residual_branch_starts
from stsm_rt.shift import ChannelSlice, ShiftSpec

Folding = Literal["none", "depthwise", "split"]


def fold_shifts(network: StreamingNetwork) -> None:
    """Let a network shift by depthwise convolutions in step form, in place.

    Args:
        network: Causal; its clip form is not changed.
    """
    wide = {block.conv1 for block in network.backbone.modules() if isinstance(block, (BasicBlock, Bottleneck))}
    # A network without a shift has no hooks.
    for hook, conv in zip(network.hooks, residual_branch_starts(network.backbone), strict=bool(network.hooks)):
        hook.step = FoldedShift(hook.spec, conv.in_channels, whole=conv not in wide).to(conv.weight)


class FoldedShift(torch.nn.Module):
    """`stsm_rt.shift.shift_step` by depthwise convolutions, with equal results.

    Args:
        spec: Causal.
        channels: C of the frames that are shifted.
        whole: Whether one convolution takes all channels of a frame, or only those that move within it.

    Raises:
        ShiftError: The spec looks ahead, or does not fit.
    """

    kernel: Tensor

    def __init__(self, spec: ShiftSpec, channels: int, *, whole: bool) -> None:
        super().__init__()
        self._delays = spec.delays
        slices = spec.slices(channels)
        self._kept = [[s for s in slices if s.dt == delay] for delay in self._delays]
        self._within = [s for s in slices if not s.dt]
        self._start = max((s.stop for s in slices if s.dt), default=0)
        self._stop = max((s.stop for s in self._within), default=self._start)
        self._whole = whole
        for i, kept in enumerate(self._kept):
            if any(s.dh or s.dw for s in kept):
                self.register_buffer(f"kernel_{i}", one_hot_kernel(kept, kept[0].start, kept[-1].stop))
        if self._within:
            taken = (0, channels) if whole else (self._start, self._stop)
            self.register_buffer("kernel", one_hot_kernel(self._within, *taken))

    def forward(self, x: Tensor, previous: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One frame; see `stsm_rt.shift.shift_step`."""
        pieces = [
            _moved(kept, getattr(self, f"kernel_{i}")) if hasattr(self, f"kernel_{i}") else kept
            for i, kept in enumerate(previous)
        ]
        if self._within and self._whole:
            x = _moved(x, self.kernel)
            pieces.append(x[:, self._start :])
        elif self._within:
            pieces.append(_moved(x[:, self._start : self._stop], self.kernel))
            pieces.append(x[:, self._stop :])
        else:
            pieces.append(x[:, self._start :])
        following = tuple(x[:, kept[0].start : kept[-1].stop] for kept in self._kept)
        pieces = [piece for piece in pieces if piece.shape[1]]
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0], following


def one_hot_kernel(slices: Sequence[ChannelSlice], start: int, stop: int) -> Tensor:
    """Depthwise kernels that move channels within a picture.

    Args:
        slices: What moves where.
        start: First channel that the convolution takes.
        stop: One past its last channel; those in no slice stay in place.

    Returns:
        (stop - start, 1, 2r + 1, 2r + 1) for displacements of up to r pixels, of ones and zeros.
    """
    radius = max(max(abs(s.dh), abs(s.dw)) for s in slices)
    kernel = torch.zeros(stop - start, 1, 2 * radius + 1, 2 * radius + 1)
    kernel[:, 0, radius, radius] = 1
    for s in slices:
        rows = kernel[s.start - start : s.stop - start, 0]
        rows.zero_()
        rows[:, radius - s.dh, radius - s.dw] = 1
    return kernel


def _moved(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=kernel.shape[0])
