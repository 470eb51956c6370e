"""The shift: groups of channels taken from another frame or a neighbouring pixel.

``y[c, t, h, w] = x[c, t - dt, h - dh, w - dw]``, zero outside the clip and the picture. It is a depthwise
convolution with one-hot 3x3x3 kernels, but it has no parameter and costs no multiplication. What moves where
is data, a `ShiftSpec`; the operator has two forms with one meaning:

* `shift_clip` moves a whole clip (N, T, C, H, W), for training and evaluation, forward or backward in time;
* `shift_step` moves one frame (N, C, H, W), given the channels kept from earlier frames.

The temporal rule is that of TSM (Lin et al., ICCV 2019); moving channels in space as well is the idea of the
spatio-temporal shift module (arXiv 2112.02523). That paper's channel fractions could not be obtained: the
spatial part of the presets is our assumption.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stsm_rt.errors import UserError


class ShiftError(UserError):
    """A shift spec that is malformed, does not fit the channels, or cannot run frame by frame."""


@dataclass(frozen=True)
class ShiftGroup:
    """A share of the channels and its displacement.

    Attributes:
        fraction: Share of the channels, between 0 and 1; the group takes ``floor(C * fraction)`` of them.
        dt: Frames. 1 takes the channel from the frame before, -1 from the next one.
        dh: Rows. 1 takes it from the pixel above.
        dw: Columns. 1 takes it from the pixel to the left.
    """

    fraction: Fraction
    dt: int = 0
    dh: int = 0
    dw: int = 0


@dataclass(frozen=True)
class ChannelSlice:
    """Channels ``start:stop`` of one network layer, moved by (dt, dh, dw)."""

    start: int
    stop: int
    dt: int
    dh: int
    dw: int


@dataclass(frozen=True)
class ShiftSpec:
    """Which share of the channels moves where; the remaining channels stay.

    Groups take consecutive channels in the order given. Those with a temporal displacement come first, and
    those with the same dt stand together, so that what a step must remember is one contiguous slice for each
    dt.

    Attributes:
        name: Shown to people and recorded in manifests.
        groups: The groups.

    Raises:
        ShiftError: A group moves nowhere, its fraction is not in (0, 1], or a temporal group is out of place.
    """

    name: str
    groups: tuple[ShiftGroup, ...]

    def __post_init__(self) -> None:
        for group in self.groups:
            if not 0 < group.fraction <= 1:
                raise ShiftError(f"shift {self.name}: a fraction lies in (0, 1], got {group.fraction}")
            if (group.dt, group.dh, group.dw) == (0, 0, 0):
                raise ShiftError(f"shift {self.name}: a group of {group.fraction} moves nowhere; leave it out")
        runs = [group.dt for i, group in enumerate(self.groups) if i == 0 or group.dt != self.groups[i - 1].dt]
        if len(set(runs)) != len(runs) or 0 in runs[:-1]:
            raise ShiftError(
                f"shift {self.name}: temporal groups come first and equal dt stand together, got dt = "
                f"{[group.dt for group in self.groups]}; reorder the groups"
            )

    @property
    def delays(self) -> tuple[int, ...]:
        """The distinct dt > 0, in channel order: one state each.

        Raises:
            ShiftError: The spec looks ahead (dt < 0), so no step form exists.
        """
        if any(group.dt < 0 for group in self.groups):
            causal = f"{self.name}_online" if f"{self.name}_online" in PRESETS else "stsm_online"
            raise ShiftError(
                f"shift {self.name} takes channels from later frames (dt < 0), so it cannot run frame by "
                f"frame; use a causal one such as {causal}"
            )
        return tuple(dict.fromkeys(group.dt for group in self.groups if group.dt > 0))

    def slices(self, channels: int) -> tuple[ChannelSlice, ...]:
        """Lay the groups out over a layer of `channels` channels.

        Raises:
            ShiftError: A group gets no channel, or the groups need more than there are.
        """
        slices, start = [], 0
        for group in self.groups:
            count = int(channels * group.fraction)
            if count == 0:
                raise ShiftError(
                    f"shift {self.name}: a group of {group.fraction} of {channels} channels gets none; "
                    f"it needs at least {-(-1 // group.fraction)} channels"
                )
            slices.append(ChannelSlice(start, start + count, group.dt, group.dh, group.dw))
            start += count
        if start > channels:
            raise ShiftError(f"shift {self.name}: the groups need {start} channels, the layer has {channels}")
        return tuple(slices)

    def to_json(self) -> dict[str, Any]:
        """The spec as plain data: ``{"name", "groups": [{"fraction": "1/8", "dt", "dh", "dw"}]}``."""
        groups = [{"fraction": str(g.fraction), "dt": g.dt, "dh": g.dh, "dw": g.dw} for g in self.groups]
        return {"name": self.name, "groups": groups}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShiftSpec:
        """Inverse of `to_json`.

        Raises:
            ShiftError: The data is not a shift spec.
        """
        try:
            groups = [
                ShiftGroup(Fraction(g["fraction"]), index(g["dt"]), index(g["dh"]), index(g["dw"]))
                for g in data["groups"]
            ]
            name = str(data["name"])
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise ShiftError(
                f'a shift spec is {{"name", "groups": [{{"fraction", "dt", "dh", "dw"}}]}}, got {data!r}'
            ) from error
        return cls(name, tuple(groups))


def _groups(*rows: tuple[int, int, int, int]) -> tuple[ShiftGroup, ...]:
    """Rows of (denominator of the fraction, dt, dh, dw)."""
    return tuple(ShiftGroup(Fraction(1, n), dt, dh, dw) for n, dt, dh, dw in rows)


_AROUND = ((16, 0, 1, 0), (16, 0, -1, 0), (16, 0, 0, 1), (16, 0, 0, -1))
_AROUND_BEFORE = ((16, 1, 1, 0), (16, 1, -1, 0), (16, 1, 0, 1), (16, 1, 0, -1))

PRESETS: dict[str, ShiftSpec] = {
    spec.name: spec
    for spec in (
        ShiftSpec("tsm", _groups((8, -1, 0, 0), (8, 1, 0, 0))),
        ShiftSpec("tsm_online", _groups((8, 1, 0, 0))),
        ShiftSpec("stsm", _groups((8, -1, 0, 0), (8, 1, 0, 0), *_AROUND)),
        ShiftSpec("stsm_online", _groups((8, 1, 0, 0), *_AROUND)),
        ShiftSpec("stsm_joint_online", _groups((8, 1, 0, 0), *_AROUND_BEFORE)),
    )
}


def shift_spec(name: str) -> ShiftSpec:
    """The preset of that name.

    Raises:
        ShiftError: There is none.
    """
    if name not in PRESETS:
        raise ShiftError(f"unknown shift {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def _span(size: int, displacement: int) -> tuple[slice, slice]:
    """Where an axis is read and where that lands, for a displacement of any size."""
    moved = max(-size, min(size, displacement))
    return slice(max(-moved, 0), size - max(moved, 0)), slice(max(moved, 0), size - max(-moved, 0))


def _move_clip(x: Tensor, slices: Iterable[ChannelSlice], sign: int) -> Tensor:
    y = torch.empty_like(x)
    stop = 0
    for s in slices:
        stop = s.stop
        source, target = x[:, :, s.start : s.stop], y[:, :, s.start : s.stop]
        (t0, t1), (h0, h1), (w0, w1) = (
            _span(size, sign * d) for size, d in ((x.shape[1], s.dt), (x.shape[3], s.dh), (x.shape[4], s.dw))
        )
        target.zero_()
        target[:, t1, :, h1, w1] = source[:, t0, :, h0, w0]
    y[:, :, stop:] = x[:, :, stop:]
    return y


class _ShiftClip(torch.autograd.Function):
    """The gradient of a shift is the opposite shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: Sequence[ChannelSlice]) -> Tensor:
        ctx.slices = slices
        return _move_clip(x, slices, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _move_clip(gradients[0], ctx.slices, -1), None


def shift_clip(x: Tensor, spec: ShiftSpec) -> Tensor:
    """Shift a clip.

    Args:
        x: (N, T, C, H, W), any floating dtype and memory layout.
        spec: What moves where; any dt.

    Returns:
        (N, T, C, H, W), zero where the displacement leaves the clip or the picture.

    Raises:
        ShiftError: The spec does not fit C channels.
    """
    return _ShiftClip.apply(x, spec.slices(x.shape[2]))


def _move_frame(x: Tensor, dh: int, dw: int) -> Tensor:
    if (dh, dw) == (0, 0):
        return x
    (h0, h1), (w0, w1) = _span(x.shape[2], dh), _span(x.shape[3], dw)
    return F.pad(x[:, :, h0, w0], (w1.start, x.shape[3] - w1.stop, h1.start, x.shape[2] - h1.stop))


def shift_step(x: Tensor, previous: Sequence[Tensor], spec: ShiftSpec) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Shift one frame of a stream.

    Args:
        x: (N, C, H, W), the frame's features.
        previous: For each of `spec.delays`, the slice that this function returned that many frames before;
            zeros at the start of a stream. (N, channels of that dt, H, W).
        spec: A causal spec.

    Returns:
        The shifted frame (N, C, H, W) and, for each delay, the slice to keep.

    Raises:
        ShiftError: The spec looks ahead, or does not fit C channels.
    """
    delays, slices = spec.delays, spec.slices(x.shape[1])
    starts = {dt: min(s.start for s in slices if s.dt == dt) for dt in delays}
    pieces = []
    for s in slices:
        if s.dt:
            kept, start = previous[delays.index(s.dt)], starts[s.dt]
            pieces.append(_move_frame(kept[:, s.start - start : s.stop - start], s.dh, s.dw))
        else:
            pieces.append(_move_frame(x[:, s.start : s.stop], s.dh, s.dw))
    pieces.append(x[:, slices[-1].stop if slices else 0 :])
    following = tuple(x[:, starts[dt] : max(s.stop for s in slices if s.dt == dt)] for dt in delays)
    return torch.cat(pieces, 1), following


class RollingState:
    """The states of a stream in PyTorch: reads what was written `delay` frames before, zeros until then.

    Args:
        zeros: For each state, a tensor of zeros of its shape.
        delays: For each state, its delay in frames.
    """

    def __init__(self, zeros: Sequence[Tensor], delays: Sequence[int]) -> None:
        self._rings = [deque([zero] * delay, maxlen=delay) for zero, delay in zip(zeros, delays, strict=True)]

    def read(self) -> list[Tensor]:
        """For each state, the oldest tensor kept."""
        return [ring[0] for ring in self._rings]

    def write(self, states: Sequence[Tensor]) -> None:
        """Keep the newest tensor of each state and forget the oldest."""
        for ring, state in zip(self._rings, states, strict=True):
            ring.append(state)
