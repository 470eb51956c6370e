"""What engines share that bind frames and logits to arrays on the host, and those among them that run there."""

from __future__ import annotations

import abc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from stsm_rt.engine.base import Engine
from stsm_rt.engine.rings import Tensor, check_delays, check_slots, ring_length, step_tensors
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest

Buffers = dict[str, list[npt.NDArray[Any]]]  # the ring of each state, by its name

_RingsT = TypeVar("_RingsT")


class BoundEngine(Engine, Generic[_RingsT]):
    """An engine whose frames, rows and logits are bound once to arrays on the host.

    A graph of batch 1 serves any number of slots, each with rings of its own. A graph of batch N serves up to N slots
    by one set of rings, slot i in row i; its input ``active`` says which rows make the step.

    A subclass sets ``manifest``, ``slots``, ``stride`` and ``_rings``, calls ``_make_arrays``, and says how to step and
    to clear.
    """

    _rings: list[_RingsT]

    @abc.abstractmethod
    def _advance(self, rings: _RingsT) -> None:
        """Run one step of these rings, from the bound inputs to the bound logits."""

    @abc.abstractmethod
    def _clear(self, rings: _RingsT, row: int) -> None:
        """Set one row of all state buffers to zero."""

    def step(self, frames: npt.NDArray[np.uint8], slots: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Run one network step of each given slot; see ``Engine.step``."""
        chosen = self._checked(slots)
        self._check_frames(frames, len(chosen))
        if self.manifest.batch > 1:
            return self._step_rows(frames, list(chosen))
        if len(chosen) == 1:
            if frames is not self.frames:
                np.copyto(self.frames, frames)
            self._advance(self._rings[chosen[0]])
            return self._bound_logits
        for i, slot in enumerate(chosen):
            np.copyto(self.frames[0], frames[i])
            self._advance(self._rings[slot])
            self._logits[i] = self._bound_logits[0]
        return self._logits[: len(chosen)]

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Set the state of slots to zero; see ``Engine.reset``."""
        for slot in self._checked(slots):
            # The phase may stay: where a ring of zeros starts makes no difference.
            if self.manifest.batch > 1:
                self._clear(self._rings[0], slot)
            else:
                self._clear(self._rings[slot], 0)

    def _step_rows(self, frames: npt.NDArray[np.uint8], rows: list[int]) -> npt.NDArray[np.float32]:
        if frames is not self.frames or rows != list(range(self.manifest.batch)):
            self.frames[rows] = frames
        self._active[:] = False
        self._active[rows] = True
        self._advance(self._rings[0])
        logits = self._logits[: len(rows)]
        logits[:] = self._bound_logits[rows]
        return logits

    def _make_arrays(self, array: Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]) -> None:
        manifest = self.manifest
        batch, classes = manifest.batch, len(manifest.labels)
        self.frames = array((batch, manifest.input_height, manifest.input_width, 3), np.uint8)
        self._active = array((batch,), np.bool_)
        self._inputs = {"frame": self.frames} | ({"active": self._active} if batch > 1 else {})
        self._bound_logits = array((batch, classes), np.float32)
        self._logits = np.zeros((self.slots, classes), np.float32)


@dataclass
class HostRings:
    """The state buffers of one stream (or of all rows of a batch), and the bound step of each phase."""

    buffers: Buffers
    steps: Sequence[Callable[[], None]]
    phase: int = 0


class HostEngine(BoundEngine[HostRings]):
    """An engine that runs on the CPU, on arrays that this object owns: no step allocates a tensor.

    Args:
        path: The engine file, with its manifest beside it.
        slots: Number of streams to serve.
        threads: Threads that one step may use; None means one for each physical core of this process.
        stride: Steps for each delay of 1.

    Raises:
        UserError: If the file or its manifest is absent, damaged or does not match the other, or a number is
            out of range.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, slots: int = 1, threads: int | None = None, stride: int = 1
    ) -> None:
        self.manifest = manifest = Manifest.load(path)
        check_slots(manifest, slots)
        if threads is not None and threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {threads}")
        check_delays(manifest, Path(path), "export", stride)
        self._open(Path(path), physical_cores() if threads is None else threads)

        self.slots = slots
        self.stride = stride
        self._make_arrays(np.zeros)
        self._rings = []
        for _ in range(slots if manifest.batch == 1 else 1):
            buffers: Buffers = {
                state.name: [np.full(state.shape, state.zero, state.dtype) for _ in range(ring_length(state, stride))]
                for state in manifest.states
            }
            self._rings.append(HostRings(buffers, self._bind(buffers)))

    @abc.abstractmethod
    def _open(self, path: Path, threads: int) -> None:
        """Open the engine file and hold it to the manifest."""

    @abc.abstractmethod
    def _bind(self, buffers: Buffers) -> Sequence[Callable[[], None]]:
        """Bind inputs, logits and these state buffers, and give the step of each phase."""

    def _advance(self, rings: HostRings) -> None:
        rings.steps[rings.phase]()
        rings.phase = (rings.phase + 1) % len(rings.steps)

    def _clear(self, rings: HostRings, row: int) -> None:
        for state in self.manifest.states:
            for buffer in rings.buffers[state.name]:
                buffer[row] = state.zero


def physical_cores() -> int:
    """Count the physical cores that this process may use; outside Linux, the logical ones of the machine."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def check_graph(
    manifest: Manifest,
    path: Path,
    type_names: Mapping[str, str],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
) -> None:
    """Hold a graph's inputs and outputs to what the manifest declares.

    Args:
        manifest: Of the engine.
        path: The engine file.
        type_names: The runtime's name for each of numpy's dtypes.
        inputs: The graph's inputs, type (as the runtime names it) and shape by their names.
        outputs: Likewise the outputs.

    Raises:
        UserError: If one is absent, is not declared, or has another type or shape.
    """
    for role, declared, actual in zip(("input", "output"), step_tensors(manifest), (inputs, outputs), strict=True):
        expected = {name: (type_names[dtype], shape) for name, (dtype, shape) in declared.items()}
        for name in [*expected, *actual]:
            if expected.get(name) != actual.get(name):
                raise UserError(
                    f"the {role} {name!r} of the engine {path} should be {_words(expected.get(name))} by "
                    f"its manifest but is {_words(actual.get(name))}; export the engine again"
                )


def _words(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"
