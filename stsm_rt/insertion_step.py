"""What an inserted shift does while the network runs: on clips, and frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stsm_rt.errors import UserError
from stsm_rt.insertion_branches import evaluating, explaining, run_on_shapes
from stsm_rt.shift import ShiftSpec, shift_clip, shift_step


@dataclass(frozen=True)
class Layout:
    """How a layer's input is laid out.

    Attributes:
        axes: For people.
        channels: The axis of the channels, 1 or -1.
        time: Whether it holds whole clips, with an axis of time; otherwise frames are folded into the batch.
    """

    axes: str
    channels: int
    time: bool

    def frames(self, x: Tensor) -> Tensor:
        """A view (N, T, C, H, W) of clips, (N*T, C, H, W) of folded frames; tokens stand in one column."""
        x = x.movedim(self.channels, 1)
        if self.time:
            return x.transpose(1, 2)
        return x.unsqueeze(-1) if x.dim() == 3 else x

    def restore(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of `frames`."""
        if self.time:
            y = y.transpose(1, 2)
        elif like.dim() == 3:
            y = y.squeeze(-1)
        return y.movedim(1, self.channels)


LAYOUTS = {
    (4, 1): Layout("(N*T, C, H, W)", 1, False),
    (4, -1): Layout("(N*T, H, W, C)", -1, False),
    (3, -1): Layout("(N*T, L, C)", -1, False),
    (5, 1): Layout("(N, C, T, H, W)", 1, True),
    (5, -1): Layout("(N, T, H, W, C)", -1, True),
}


class FrameFolding:
    """Forward hooks of a 2D network, which sees N clips of T frames as N*T frames.

    Attributes:
        declared: T of frames that come folded already, or None.
        length: T of the clips on their way through the network.
        clips: N and T if they came unfolded, (N, T, C, H, W).
        idle: Whether to pass everything as it is: one frame each, or a network without its shift.
    """

    def __init__(self, declared: int | None) -> None:
        self.declared = self.length = declared
        self.clips: tuple[int, int] | None = None
        self.idle = False

    def fold(self, network: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the network: (N, T, C, H, W) becomes (N*T, C, H, W)."""
        self.clips, self.length = None, self.declared
        if self.idle:
            return None
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() not in (4, 5) or (x.dim() == 4 and self.declared is None):
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"a shifted network takes clips (N, T, C, H, W), or with insert_shift(..., frames=T) N*T frames "
                f"(N*T, C, H, W), as its first argument; got {came}"
            )
        if x.dim() == 4:
            return None
        self.clips = (x.shape[0], x.shape[1])
        self.length = x.shape[1]
        return (x.flatten(0, 1), *args[1:])

    def unfold(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the network: what it gives for each frame, N*T, becomes (N, T, ...)."""
        clips, self.clips, self.length = self.clips, None, self.declared
        if clips is None:
            return output

        def unflatten(y: Any) -> Any:
            return y.unflatten(0, clips) if isinstance(y, Tensor) and y.shape[:1] == (clips[0] * clips[1],) else y

        return tree_map(unflatten, output)


class ShiftedLayer:
    """Forward pre-hook that shifts a layer's input, in clip form or, with `previous` set, in step form.

    Attributes:
        path: Of the layer in the network.
        kind: Its class, for people.
        channels: C of its input.
        layout: Of its input.
        spec: What moves where.
        folding: Knows T where frames are folded into the batch.
        previous: In step form, for each of the spec's delays the slice that was kept.
        following: In step form, for each delay the slice to keep.
        given: Shape and dtype of the input last seen, as (N*T, C, H, W).
    """

    def __init__(
        self, path: str, kind: str, channels: int, layout: Layout, spec: ShiftSpec, folding: FrameFolding
    ) -> None:
        self.path, self.kind, self.channels, self.layout = path, kind, channels, layout
        self.spec, self.folding = spec, folding
        self.previous: Sequence[Tensor] | None = None
        self.following: tuple[Tensor, ...] = ()
        self.given: tuple[torch.Size, torch.dtype] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The layer's arguments, the first one shifted."""
        x, *others = args
        frames = self.layout.frames(x)
        self.given = frames.shape, frames.dtype
        if self.previous is not None:
            y, self.following = shift_step(frames, self.previous, self.spec)
        elif self.folding.idle:
            return args
        elif self.layout.time:
            y = shift_clip(frames, self.spec)
        else:
            length = self.folding.length
            if length is None or frames.shape[0] % length:
                raise UserError(
                    f"layer {self.path} got {frames.shape[0]} frames, which are no clips of T = {length}: give the "
                    f"network clips (N, T, C, H, W), or N*T frames of the T declared in insert_shift(..., frames=T)"
                )
            y = shift_clip(frames.unflatten(0, (-1, length)), self.spec).flatten(0, 1)
        return (self.layout.restore(y, x), *others)


class StepForm(nn.Module):
    """A shifted 2D network that takes one frame after another: ``(frame, *states) -> (output, *next states)``.

    It shares the network's modules and can be given to ``torch.export``. `stsm_rt.shift.RollingState` carries its
    states, whatever their delays.

    Args:
        network: Shifted.
        layers: Its shifted layers, in order.
        folding: Its hooks.
        frame: (N, C, H, W) of the size, dtype and device that frames will have.

    Attributes:
        delays: For each state, the frames between its writing and its reading.

    Raises:
        UserError: The spec looks ahead, or a layer of the network makes a frame's output depend on other frames.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[ShiftedLayer], folding: FrameFolding, frame: Tensor
    ) -> None:
        super().__init__()
        self.network, self.layers, self.folding = network, layers, folding
        # Enough frames that no other axis is taken for theirs, and few enough to be quick.
        frames = folding.declared if folding.declared not in (None, 1) else 5
        folding.idle = True
        try:
            refuse_mixing(network, torch.rand(frames, *frame.shape[1:]).to(frame), 0)
            run_on_shapes(network, frame)
        finally:
            folding.idle = False
        self._states: list[tuple[tuple[int, ...], torch.dtype]] = []
        for layer in layers:
            assert layer.given is not None
            (batch, channels, *size), dtype = layer.given
            for delay in layer.spec.delays:
                kept = sum(s.stop - s.start for s in layer.spec.slices(channels) if s.dt == delay)
                self._states.append(((batch, kept, *size), dtype))
        self.delays = tuple(delay for layer in layers for delay in layer.spec.delays)
        self._device = frame.device

    def initial_state(self) -> list[Tensor]:
        """Zeros for every state, as at the start of a stream: (N, moved channels, H, W) at each layer."""
        return [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in self._states]

    def forward(self, frame: Tensor, *states: Tensor) -> tuple[Any, ...]:
        """One frame.

        Args:
            frame: (N, C, H, W), of the size that this step form was made for.
            *states: As `initial_state` lists them, which is what they are at the start of a stream.

        Returns:
            What the network gives for the frame, logits (N, K) mostly, and the next states.

        Raises:
            UserError: The states are not as many as those of `initial_state`.
        """
        if len(states) != len(self.delays):
            raise UserError(
                f"a step of this network takes {len(self.delays)} states, got {len(states)}; see initial_state"
            )
        kept = iter(states)
        self.folding.idle = True
        for layer in self.layers:
            layer.previous = [next(kept) for _ in layer.spec.delays]
        try:
            output = self.network(frame)
        finally:
            self.folding.idle = False
            for layer in self.layers:
                layer.previous = None
        following = [state for layer in self.layers for state in layer.following]
        for layer in self.layers:
            layer.following = ()  # nothing of this step may outlive it: a CUDA graph's memory, a traced tensor
        return (output, *following)


def refuse_mixing(network: nn.Module, clip: Tensor, time: int) -> None:
    """Find the first layer in which frames meet.

    One frame of the clip is made not a number. Whatever is computed from it is none either, were it multiplied by
    zero, so a layer that looks at each frame alone spoils one frame of its output at most.

    Args:
        network: With its shift idle.
        clip: What it takes, of any numbers; it is overwritten.
        time: The axis of the frames.

    Raises:
        UserError: There is such a layer.
    """
    count = clip.shape[time]
    spoilt = count // 2
    clip.select(time, spoilt).fill_(torch.nan)
    paths = {module: path for path, module in network.named_modules()}

    def check(module: nn.Module, args: Any, output: Any) -> None:
        for y in tree_leaves(output):
            if not isinstance(y, Tensor) or not y.is_floating_point():
                continue
            lost = y.isnan()
            if time == 0 and y.shape[:1] == (count,):
                lost[spoilt] = False
                meet = bool(lost.any())
            else:
                meet = int(lost.sum()) * count > lost.numel()
            if meet:
                path = paths[module]
                name = f"layer {path} ({type(module).__name__})" if path else f"{type(module).__name__} itself"
                raise UserError(
                    f"{name} makes what it computes for a frame depend on other frames, so the network has no step "
                    f"form; use the clip form, or put a layer there that looks at each frame alone"
                )

    hooks = [module.register_forward_hook(check) for module in paths]
    try:
        with explaining(network, clip), evaluating(network):
            network(clip)
    finally:
        for hook in hooks:
            hook.remove()
