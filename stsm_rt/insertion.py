"""A shift put into any network of PyTorch, by one call, before the layers where it belongs.

The shift sits in forward hooks: the network keeps its class, its modules, its parameters and their names, so
checkpoints load before and after, and it computes as many FLOPs as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from stsm_rt.errors import UserError
from stsm_rt.insertion_branches import Call, Trace, residual_blocks, run_on_shapes
from stsm_rt.insertion_step import LAYOUTS, FrameFolding, Layout, ShiftedLayer, StepForm, refuse_mixing
from stsm_rt.shift import ShiftError, ShiftSpec, shift_spec


@dataclass(frozen=True)
class Insertion:
    """What `insert_shift` did; ``print`` shows it.

    Attributes:
        model: The network, now shifted.
        spec: What moves where.
        layers: The layers whose input is shifted, in the order in which they run.
        folding: Where a 2D network's frames are folded into its batch; unused by a video network.
        clip_shape: Of the clip that the counts are for: (N, T, C, H, W), of a video network (N, C, T, H, W).
        video: Whether the network takes whole clips, with 3D convolutions.
        parameters: Before and after.
        flops: Of that clip, before and after, as `torch.utils.flop_counter` counts them.
    """

    model: nn.Module
    spec: ShiftSpec
    layers: tuple[ShiftedLayer, ...]
    folding: FrameFolding
    clip_shape: tuple[int, ...]
    video: bool
    parameters: tuple[int, int]
    flops: tuple[int, int]

    def __str__(self) -> str:
        """A line for each layer, and what the shift costs."""
        rows = [(layer.path, layer.kind, layer.layout.axes, self._moves(layer.channels)) for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        axes = "(N, C, T, H, W)" if self.video else "(N, T, C, H, W)"
        return "\n".join(
            (
                f"shift {self.spec.name} by (dt, dh, dw) before {len(rows)} layers of {type(self.model).__name__}",
                *("  ".join(map(str.ljust, ("", *row), (0, *widths))).rstrip() for row in rows),
                f"parameters {self.parameters[0]:,} before, {self.parameters[1]:,} after",
                f"FLOPs {self.flops[0]:,} before, {self.flops[1]:,} after, for a clip {axes} = {self.clip_shape}",
            )
        )

    def _moves(self, channels: int) -> str:
        slices = self.spec.slices(channels)
        moved = ", ".join(f"{s.start}:{s.stop} by ({s.dt}, {s.dh}, {s.dw})" for s in slices)
        return f"{channels} channels, of which {moved}" if moved else f"{channels} channels, all stay"

    def step_form(self, frame: Tensor) -> StepForm:
        """The network frame by frame.

        Args:
            frame: (N, C, H, W) of the size, dtype and device that frames will have; its numbers do not matter.

        Returns:
            ``(frame, *states) -> (logits, *states)``. It shares this network's weights.

        Raises:
            UserError: The frame is none, the spec looks ahead, or a layer, which is named, makes frames depend on
                each other: a convolution, pooling or attention over time.
        """
        if frame.dim() != 4 or not frame.is_floating_point():
            raise UserError(f"a frame is (N, C, H, W) of floating numbers, got {tuple(frame.shape)} of {frame.dtype}")
        if not self.video:
            return StepForm(self.model, self.layers, self.folding, frame)
        self.folding.idle = True
        try:
            refuse_mixing(self.model, torch.rand(self.clip_shape).to(frame), 2)
        finally:
            self.folding.idle = False
        raise UserError(
            f"{type(self.model).__name__} takes whole clips (N, C, T, H, W); a step form needs a 2D network, "
            f"which takes frames"
        )


def insert_shift(
    model: nn.Module,
    spec: ShiftSpec | str,
    *,
    where: str | None = None,
    frames: int | None = None,
    example: Tensor | None = None,
) -> Insertion:
    """Put a shift into a network, in place.

    A 2D network then takes clips (N, T, C, H, W) and gives (N, T, ...), for each frame what the network gives for
    an image; a video network, whose first convolution is 3D, takes (N, C, T, H, W) as before.

    Args:
        model: Any module whose layers are called once each, with an input they share among no other arguments.
        spec: What moves where, or the name of a preset.
        where: Before which layers: a pattern of module paths as `fnmatch` knows it, such as ``"layer*.conv1"``.
            None: the first layer of every residual branch, found by structure. The identity is never shifted.
        frames: T, if a 2D network gets its frames folded: (N*T, C, H, W).
        example: A clip as the network takes it; its numbers do not matter. None: one of 224x224 pixels, with 2
            frames (`frames`, if given), or with 16 for a video network.

    Returns:
        What was done.

    Raises:
        UserError: The network does not run on the example, holds a shift already, has no such layer, or has one
            where the shift would not be exact; the sentence names the layer. The network is as it was then.
    """
    spec = shift_spec(spec) if isinstance(spec, str) else spec
    if any(isinstance(hook, ShiftedLayer) for m in model.modules() for hook in m._forward_pre_hooks.values()):
        raise UserError(f"this {type(model).__name__} holds a shift already; build it anew to insert another")
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    video = isinstance(convolution, nn.Conv3d)
    if frames is not None and (video or frames < 1):
        raise UserError(f"frames is T of a 2D model's folded clips, at least 1, got {frames}; leave it out")
    clip = _clip(model, convolution, video, frames) if example is None else example
    if clip.dim() == 4 and frames is not None and clip.shape[0] % frames == 0:
        clip = clip.unflatten(0, (-1, frames))
    if clip.dim() != 5:
        axes = "(N, C, T, H, W)" if video else "(N, T, C, H, W)"
        raise UserError(f"an example for {type(model).__name__} is a clip {axes}, got {tuple(clip.shape)}")
    before = run_on_shapes(model, clip if video else clip.flatten(0, 1))
    count = _parameters(model)
    folding = FrameFolding(frames)
    layers = [
        _layer(call, before, spec, folding, None if video else clip.shape[0] * clip.shape[1])
        for call in _chosen(model, before, where)
    ]
    handles = [model.get_submodule(layer.path).register_forward_pre_hook(layer, prepend=True) for layer in layers]
    if not video:
        handles.append(model.register_forward_pre_hook(folding.fold, prepend=True))
        handles.append(model.register_forward_hook(folding.unfold, always_call=True))
    try:
        after = run_on_shapes(model, clip)
    except UserError:
        for handle in handles:
            handle.remove()
        raise
    return Insertion(
        model,
        spec,
        tuple(layers),
        folding,
        tuple(clip.shape),
        video,
        (count, _parameters(model)),
        (before.flops, after.flops),
    )


def _clip(network: nn.Module, convolution: nn.Module | None, video: bool, frames: int | None) -> Tensor:
    channels = getattr(convolution, "in_channels", 3)
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    shape = (1, channels, 16, 224, 224) if video else (1, frames or 2, channels, 224, 224)
    return like.new_empty(shape)


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _chosen(network: nn.Module, trace: Trace, where: str | None) -> list[Call]:
    """The layers to shift, in the order in which they run."""
    blocks = residual_blocks(trace)
    if where is None:
        paths = {layer.path for block in blocks for layer in block.first_layers}
        if not paths:
            raise UserError(
                f"{type(network).__name__} has no residual branch to put a shift in; name layers, as in "
                f'where="layer*.conv1"; its modules are {_some(path for path, _ in network.named_modules())}'
            )
    else:
        paths = {path for path, _ in network.named_modules() if path and fnmatchcase(path, where)}
        if not paths:
            raise UserError(
                f"no module of {type(network).__name__} matches where={where!r}; its modules are "
                f"{_some(path for path, _ in network.named_modules())}"
            )
    calls = [call for call in trace.calls if call.path in paths]
    for path in sorted(paths):
        times = sum(call.path == path for call in calls)
        if times != 1:
            raise UserError(
                f"layer {path} runs {times} times for one input; a shift stands before layers that run once"
            )
    for call in calls:
        for block in blocks:
            if block.fork == call.value and call.holds(block.total):
                raise UserError(
                    f"layer {call.path} holds a residual connection, whose identity would be shifted, too; name the "
                    f"first layer of its branch, {block.first_layers[0].path}"
                )
    for one, other in itertools.combinations(calls, 2):
        if one.value == other.value and one.start <= other.start < max(one.stop, one.start + 1):
            raise UserError(
                f"layers {one.path} and {other.path} get the same input, which would be shifted twice; name one of them"
            )
    return calls


def _some(paths: Iterable[str]) -> str:
    named = [path for path in paths if path]
    return ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")


def _layer(call: Call, trace: Trace, spec: ShiftSpec, folding: FrameFolding, batch: int | None) -> ShiftedLayer:
    """The hook for a layer; `batch` is N*T where frames are folded into the batch."""
    if call.value is None:
        raise UserError(f"layer {call.path} gets nothing of the frames as its first argument; name another layer")
    if call.times > 1:
        raise UserError(
            f"layer {call.path} gets its input as {call.times} of its arguments, of which a shift would move one; "
            f"name the layer before it"
        )
    shape = trace.values[call.value].shape
    layout = _layout(call, trace, shape)
    if layout is None or layout.time != (batch is None):
        expected = "clips with an axis of time" if batch is None else "images (N*T, C, H, W) or tokens (N*T, L, C)"
        raise UserError(f"layer {call.path} gets {shape}, expected {expected}; name other layers with where=")
    if batch is not None and shape[0] != batch:
        raise UserError(
            f"layer {call.path} gets {shape}, whose batch is not the {batch} frames; name other layers with where="
        )
    if len(shape) == 3 and any(group.dh or group.dw for group in spec.groups):
        raise UserError(
            f"layer {call.path} gets tokens {shape}, which are no rows and columns, so shift {spec.name} cannot move "
            f"them in the picture; use one that moves in time only, such as tsm_online"
        )
    channels = shape[layout.channels]
    try:
        spec.slices(channels)
    except ShiftError as error:
        raise ShiftError(f"layer {call.path}: {error}; name wider layers with where=") from error
    return ShiftedLayer(call.path, type(call.module).__name__, channels, layout, spec, folding)


def _layout(call: Call, trace: Trace, shape: tuple[int, ...]) -> Layout | None:
    """Told by the innermost module that reads the layer's input; PyTorch's own order where none tells."""
    inner = [c for c in trace.calls if c.value == call.value and call.start <= c.start and c.stop <= call.stop]
    reader = inner[-1].module
    last: tuple[int, ...] = tuple(getattr(reader, "normalized_shape", ()))
    told = type(reader) is nn.LayerNorm  # its children of torchvision and timm may norm the second axis
    if isinstance(reader, nn.Linear):
        last, told = (reader.in_features,), True
    if len(shape) == 3 and isinstance(reader, nn.Conv1d | nn.BatchNorm1d):
        return None
    if len(shape) > 3 and last == shape[-1:] == shape[1:2] and not told:
        raise UserError(
            f"layer {call.path} gets {shape}, in which the channels are the second axis or the last; give example=, a "
            f"clip of another size, so that they differ"
        )
    channels_last = len(shape) == 3 or last == shape[-1:]
    return LAYOUTS.get((len(shape), -1 if channels_last else 1))
