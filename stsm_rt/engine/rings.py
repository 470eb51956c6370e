"""What every engine derives from a manifest: its streams, the tensors of a step, and the rings of its states.

A state with delay d has a ring of d + 1 buffers, which change roles from step to step: step t writes buffer t mod (d+1)
and reads buffer (t-d) mod (d+1), the next one to be written. With d >= 1 they are never the same. Where a step lies in
the time after which all rings stand as they stood is its phase. A stride of k makes every delay k times as long: step t
sees what steps t-k, t-2k, ... left, as if k engines were fed in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest, StateSpec

# Every phase is bound once and for all; delays without a common measure would need far too many.
_MAX_PERIOD = 1024

Tensor = tuple[str, tuple[int, ...]]  # dtype and shape
_Buffer = TypeVar("_Buffer")


def ring_length(state: StateSpec, stride: int) -> int:
    """Number of buffers that a state takes."""
    return state.delay * stride + 1


def phases(rings: Mapping[str, Sequence[_Buffer]]) -> list[tuple[dict[str, _Buffer], dict[str, _Buffer]]]:
    """Give the buffers that a step reads and those that it writes, for each phase of the rings.

    Args:
        rings: The buffers of each state by its name, as many as its `ring_length`.

    Returns:
        For each phase the buffers read, by ``f"{name}_in"``, and those written, by ``f"{name}_out"``, in the rings'
        order.
    """
    return [
        (
            {f"{name}_in": ring[(phase + 1) % len(ring)] for name, ring in rings.items()},
            {f"{name}_out": ring[phase % len(ring)] for name, ring in rings.items()},
        )
        for phase in range(math.lcm(*(len(ring) for ring in rings.values())))
    ]


def step_tensors(manifest: Manifest) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the inputs and the outputs of a step by their names, as the manifest declares them.

    Returns:
        For each tensor its dtype, as numpy names it, and its shape.
    """
    inputs: dict[str, Tensor] = {"frame": ("uint8", (manifest.batch, manifest.input_height, manifest.input_width, 3))}
    if manifest.batch > 1:
        inputs["active"] = ("bool", (manifest.batch,))
    inputs |= {f"{state.name}_in": (state.dtype, state.shape) for state in manifest.states}
    outputs: dict[str, Tensor] = {"logits": ("float32", (manifest.batch, len(manifest.labels)))}
    outputs |= {f"{state.name}_out": (state.dtype, state.shape) for state in manifest.states}
    return inputs, outputs


def check_slots(manifest: Manifest, slots: int) -> None:
    """Check a number of streams: any for a batch of 1, one for each row at the most for a greater batch.

    Raises:
        UserError: If it is out of range.
    """
    batch = manifest.batch
    if slots < 1 or (batch > 1 and slots > batch):
        most = f"from 1 to {batch}, the engine's batch" if batch > 1 else "at least 1"
        raise UserError(f"the number of slots must be {most}, not {slots}")


def check_delays(manifest: Manifest, path: Path, made_by: Literal["export", "build"], stride: int) -> None:
    """Check that the states' delays can be served.

    Args:
        manifest: Of the engine.
        path: The engine file.
        made_by: What has to be done again where they cannot.
        stride: Steps for each delay of 1.

    Raises:
        UserError: If the stride is not positive, a batch has a delay or a stride above 1, or the rings have too many
            phases.
    """
    check_stride(stride)
    if manifest.batch > 1 and stride > 1:
        raise UserError(
            f"the engine {path} has batch {manifest.batch}, whose states cannot wait for a slot that skips a step at "
            f"a stride of {stride}; {made_by} it with batch 1"
        )
    if manifest.batch > 1 and any(state.delay > 1 for state in manifest.states):
        raise UserError(
            f"the engine {path} has batch {manifest.batch} and a state with a delay above 1, which cannot wait for a "
            f"slot that skips a step; {made_by} it with batch 1"
        )
    period = math.lcm(*(ring_length(state, stride) for state in manifest.states))
    if period > _MAX_PERIOD and stride > 1:
        raise UserError(
            f"at a stride of {stride} the delays of the states in the manifest of {path} repeat after {period} steps, "
            f"at most {_MAX_PERIOD} are possible; open the engine with a smaller stride"
        )
    if period > _MAX_PERIOD:
        raise UserError(
            f"the delays of the states in the manifest of {path} repeat after {period} steps, at most {_MAX_PERIOD} "
            f"are possible; {made_by} the engine again with smaller delays"
        )


def check_stride(stride: int) -> None:
    """Check a number of steps for each delay of 1.

    Raises:
        UserError: If it is not positive.
    """
    if stride < 1:
        raise UserError(f"the stride must be at least 1, not {stride}")
