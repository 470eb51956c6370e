"""What the frozen network makes of clips: its classifier's input at every step, of the clips and of varied copies."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stsm_rt.manifest import StateSpec
from stsm_rt.networks import StreamingNetwork
from stsm_rt.own_clips import seen_frames
from stsm_rt.shift import RollingState
from stsm_rt.train.augment import Augmentation, crop_and_resize, random_boxes, vary_colours

TAIL_SECONDS = 1.0  # that the last picture of a clip is held while an event may still be raised
_LEAD_SECONDS = 1.5  # that the first picture of a copy is held at most
_SETTLED = 3  # steps after which a held picture is nothing, and an action is one
_ACTION_ROWS, _HELD_ROWS = 6, 3  # steps of a stream that are examples; neighbours are alike
_SPEED = 1.25
_VARIED = Augmentation(crop_scale=0.6, crop_ratio=1.1, flip=False, colour=0.3, grey=0.1, noise=6.0, pan=0.06)


@dataclass(frozen=True)
class Rows:
    """Examples for the classifier.

    Attributes:
        features: float32 (R, out_features of the running averages).
        labels: int64 (R,).
        weights: float32 (R,), how much each counts.
        clips: int64 (R,), the clip that each comes from.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor
    clips: Tensor


@dataclass(frozen=True)
class Played:
    """A clip as the recognizer sees it from a fresh state, with its last picture held for a second at the end.

    Attributes:
        features: float32 (steps, out_features).
        steps: Those of the clip itself.
    """

    features: Tensor
    steps: int


def join(rows: Sequence[Rows]) -> Rows:
    """All rows together."""
    parts = zip(*((r.features, r.labels, r.weights, r.clips) for r in rows), strict=True)
    return Rows(*(torch.cat(part) for part in parts))


class _Through(nn.Module):
    """Stands in for a classifier and lets its input pass.

    Args:
        weight: Of that classifier; a network reads its own precision off it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        return features


class FeatureReader:
    """Plays clips through the frozen network.

    Args:
        network: In evaluation mode; it stays as it is.
        frame_rate: Steps per second of source time.
        background: Index of the label that a held picture gets.
        seed: Of the variations.
    """

    def __init__(self, network: StreamingNetwork, frame_rate: float, *, background: int, seed: int = 0) -> None:
        # A classifier that lets its input pass makes the step form give features, exactly as an engine computes them.
        self._network = copy.deepcopy(network).to(memory_format=torch.channels_last).requires_grad_(False)
        self._network.classifier = _Through(network.classifier.weight.detach())  # type: ignore[assignment]
        self._network.offset.zero_()
        self._network.scale.fill_(1)
        _fold_norms(self._network.backbone)
        self._states: dict[tuple[int, int], tuple[tuple[StateSpec, ...], list[Tensor]]] = {}
        self._rate, self._background = frame_rate, background
        self._generator = torch.Generator().manual_seed(seed)

    def play(self, frames: npt.NDArray[np.uint8], times: Sequence[float]) -> Played:
        """Play a clip as it is, uint8 (F, H, W, 3) with its times in seconds."""
        seen = seen_frames(times, self._rate)
        tail = [seen[-1]] * round(TAIL_SECONDS * self._rate)
        return Played(self._features(torch.from_numpy(frames[seen + tail])), len(seen))

    def vary(
        self,
        frames: npt.NDArray[np.uint8],
        times: Sequence[float],
        *,
        clip: int,
        label: int,
        mirrored: bool,
        follows: bool,
    ) -> tuple[Rows, Tensor]:
        """Play a varied copy of a clip, and a picture of it that is held, which is nothing.

        Args:
            frames: uint8 (F, H, W, 3).
            times: Of the frames, seconds.
            clip: Its number, for the rows.
            label: What it shows, or shows in the mirror.
            mirrored: Whether to mirror it.
            follows: Whether the picture is the first one, and the action follows in the same stream; else it is any
                picture, and both are streams of their own.

        Returns:
            Examples of both, and the features of the picture at every step, float32 (steps, out_features).
        """
        generator = self._generator
        speed = _SPEED ** float(2 * torch.rand((), generator=generator) - 1)
        # Not as the recognizer picks them: it keeps to whole strides, which are few.
        due = np.arange(times[0], times[-1] + 1e-6, speed / self._rate)
        seen = (np.searchsorted(times, due + 1e-6, side="right") - 1).tolist()
        lead = int(torch.randint(_SETTLED, round(_LEAD_SECONDS * self._rate) + 1, (), generator=generator))
        held = seen[0 if follows else int(torch.randint(len(seen), (), generator=generator))]
        order = [held] * lead + seen
        # The held picture flickers, and every picture has noise: that nothing changes must not be what nothing means.
        still = torch.tensor([True])
        size = (frames.shape[1], frames.shape[2])
        boxes = random_boxes(1, len(order), size, size, _VARIED, generator, still=still)
        varied = crop_and_resize(torch.from_numpy(frames[order])[None], boxes, size, torch.tensor([mirrored]))
        varied = vary_colours(varied, _VARIED, generator, still=still)[0]
        streams = [varied] if follows else [varied[:lead], varied[lead:]]
        features = torch.cat([self._features(stream) for stream in streams])
        actions, nothing = _later(len(seen), _ACTION_ROWS), _later(lead, _HELD_ROWS)
        rows = Rows(
            features=torch.cat([features[:lead][nothing], features[lead:][actions]]),
            labels=torch.tensor([self._background] * len(nothing) + [label] * len(actions)),
            # What comes late in a clip has seen more of it.
            weights=torch.cat([torch.full((len(nothing),), 1 / len(nothing)), (actions + 1) / (actions + 1).sum()]),
            clips=torch.full((len(nothing) + len(actions),), clip),
        )
        return rows, features[:lead].clone()

    @torch.no_grad()
    def _features(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) -> (T, out_features), step by step from a fresh state."""
        size = (frames.shape[1], frames.shape[2])
        if size not in self._states:
            self._states[size] = self._network.state_specs(*size), self._network.initial_state(*size)
        specs, zeros = self._states[size]
        rolling = RollingState(zeros, [spec.delay for spec in specs])
        rows = []
        for frame in frames.split(1):
            row, *following = self._network(frame, *rolling.read())
            rolling.write(following)
            rows.append(row)
        return torch.cat(rows)


def _fold_norms(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: the same numbers, sooner."""
    children = list(module.named_children())
    for (_, conv), (name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(module, name, nn.Identity())
    for _, child in children:
        _fold_norms(child)


def _later(steps: int, most: int) -> Tensor:
    """At most so many steps, evenly spread over those that have seen enough; at least the last one."""
    first = min(_SETTLED, steps) - 1
    return torch.linspace(first, steps - 1, min(most, steps - first)).round().long()
