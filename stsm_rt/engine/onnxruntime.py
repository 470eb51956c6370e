"""Engines that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stsm_rt.engine.base import Engine
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest

# Every phase of the rings gets a binding of its own; delays without a common measure would need far too many.
_MAX_PERIOD = 1024

_Tensor = tuple[str, tuple[int, ...]]  # type and shape, as a session names them


class OnnxRuntimeEngine(Engine):
    """An ONNX graph in step form, run by ONNX Runtime on the CPU.

    A graph of batch 1 serves any number of slots, each with buffers of its own. A graph of batch N serves up
    to N slots, slot i in row i; its input ``active`` says which rows make the step. No step allocates a
    tensor: all inputs, states and logits are bound once to arrays that this object owns.

    Args:
        path: The ONNX file, with its manifest beside it.
        slots: Number of streams to serve.
        threads: Threads that one step may use; None means one for each physical core of this process.

    Raises:
        UserError: If the file or its manifest is absent, damaged or does not match the other, or a number is
            out of range.
    """

    def __init__(self, path: str | os.PathLike[str], *, slots: int = 1, threads: int | None = None) -> None:
        self.manifest = manifest = Manifest.load(path)
        batch = manifest.batch
        if slots < 1 or (batch > 1 and slots > batch):
            most = f"from 1 to {batch}, the engine's batch" if batch > 1 else "at least 1"
            raise UserError(f"the number of slots must be {most}, not {slots}")
        if threads is not None and threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {threads}")
        self._session = _open_session(Path(path), _physical_cores() if threads is None else threads)
        _check_graph(self._session, manifest, path)

        self.slots = slots
        self.frames = np.zeros((batch, manifest.input_height, manifest.input_width, 3), np.uint8)
        self._bound_logits = np.zeros((batch, len(manifest.labels)), np.float32)
        self._logits = np.zeros((slots, len(manifest.labels)), np.float32)
        self._active = np.zeros(batch, np.bool_)
        inputs = {"frame": self.frames} | ({"active": self._active} if batch > 1 else {})
        self._rings = [
            _Rings(self._session, manifest, inputs, self._bound_logits) for _ in range(slots if batch == 1 else 1)
        ]

    def step(self, frames: npt.NDArray[np.uint8], slots: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Run one network step of each given slot; see ``Engine.step``."""
        chosen = self._checked(slots)
        self._check_frames(frames, len(chosen))
        if self.manifest.batch > 1:
            return self._step_rows(frames, chosen)
        if len(chosen) == 1:
            if frames is not self.frames:
                np.copyto(self.frames, frames)
            self._rings[chosen[0]].step()
            return self._bound_logits
        for i, slot in enumerate(chosen):
            np.copyto(self.frames[0], frames[i])
            self._rings[slot].step()
            self._logits[i] = self._bound_logits[0]
        return self._logits[: len(chosen)]

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Set the state of slots to zero; see ``Engine.reset``."""
        for slot in self._checked(slots):
            if self.manifest.batch > 1:
                self._rings[0].clear(slot)
            else:
                self._rings[slot].clear(0)

    def _step_rows(self, frames: npt.NDArray[np.uint8], rows: Sequence[int]) -> npt.NDArray[np.float32]:
        rows = list(rows)
        if frames is not self.frames or rows != list(range(self.manifest.batch)):
            self.frames[rows] = frames
        self._active[:] = False
        self._active[rows] = True
        self._rings[0].step()
        logits = self._logits[: len(rows)]
        logits[:] = self._bound_logits[rows]
        return logits


class _Rings:
    """The state buffers of one stream (or of all rows of a batch), and one binding for each phase.

    Step t of a state with delay d writes buffer t mod (d+1) and reads buffer (t-d) mod (d+1), which is the
    next one to be written. With d >= 1 they are never the same: ONNX Runtime silently computes wrong numbers
    when one buffer is both.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        inputs: dict[str, npt.NDArray[Any]],
        logits: npt.NDArray[np.float32],
    ) -> None:
        self._session = session
        self.buffers = {
            state.name: [np.zeros(state.shape, state.dtype) for _ in range(state.delay + 1)]
            for state in manifest.states
        }
        # An OrtValue made from a C-contiguous array shares its memory; of another it would keep a stale copy.
        shared = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        bound_logits = ort.OrtValue.ortvalue_from_numpy(logits)
        rings = {
            name: [ort.OrtValue.ortvalue_from_numpy(buffer) for buffer in ring] for name, ring in self.buffers.items()
        }
        # The arrays live as long as their OrtValues, and older IOBindings do not keep those alive.
        self._values = (shared, bound_logits, rings)
        self.bindings = []
        for phase in range(_period(manifest)):
            binding = session.io_binding()
            for name, value in shared.items():
                binding.bind_ortvalue_input(name, value)
            # Bound by value: bound by name alone, an output is memory that ONNX Runtime owns.
            binding.bind_ortvalue_output("logits", bound_logits)
            for name, ring in rings.items():
                binding.bind_ortvalue_input(f"{name}_in", ring[(phase + 1) % len(ring)])
                binding.bind_ortvalue_output(f"{name}_out", ring[phase % len(ring)])
            self.bindings.append(binding)
        self.phase = 0

    def step(self) -> None:
        self._session.run_with_iobinding(self.bindings[self.phase])
        self.phase = (self.phase + 1) % len(self.bindings)

    def clear(self, row: int) -> None:
        # The phase may stay: where a ring of zeros starts makes no difference.
        for ring in self.buffers.values():
            for buffer in ring:
                buffer[row] = 0


def _period(manifest: Manifest) -> int:
    return math.lcm(*(state.delay + 1 for state in manifest.states))


def _open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # The default is every core of the machine, also those that this process may not use; and two threads on
    # one physical core are slower than one.
    options.intra_op_num_threads = threads
    # Threads that go on spinning after a step take the cores from the camera's reader and the window.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # What goes wrong arrives as an exception and is said in one sentence; the log would repeat it on stderr.
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class below Exception
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"ONNX Runtime {ort.__version__} cannot open the engine {path} ({reason}); export the engine again"
        ) from error


def _physical_cores() -> int:
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


def _check_graph(session: ort.InferenceSession, manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Hold the graph's inputs and outputs to what the manifest declares."""
    batch = manifest.batch
    if batch > 1 and any(state.delay > 1 for state in manifest.states):
        raise UserError(
            f"the engine {path} has batch {batch} and a state with a delay above 1, which cannot wait for a "
            "slot that skips a step; export it with batch 1"
        )
    if _period(manifest) > _MAX_PERIOD:
        raise UserError(
            f"the delays of the states in the manifest of {path} repeat after {_period(manifest)} steps, "
            f"at most {_MAX_PERIOD} are possible; export the engine again with smaller delays"
        )
    states = [(state.name, state.dtype.replace("float32", "float"), state.shape) for state in manifest.states]
    inputs: dict[str, _Tensor] = {"frame": ("tensor(uint8)", (batch, manifest.input_height, manifest.input_width, 3))}
    if batch > 1:
        inputs["active"] = ("tensor(bool)", (batch,))
    inputs |= {f"{name}_in": (f"tensor({dtype})", shape) for name, dtype, shape in states}
    outputs: dict[str, _Tensor] = {"logits": ("tensor(float)", (batch, len(manifest.labels)))}
    outputs |= {f"{name}_out": (f"tensor({dtype})", shape) for name, dtype, shape in states}
    for role, declared, nodes in (
        ("input", inputs, session.get_inputs()),
        ("output", outputs, session.get_outputs()),
    ):
        actual = {node.name: (node.type, tuple(node.shape)) for node in nodes}
        for name in declared | actual:
            if declared.get(name) != actual.get(name):
                raise UserError(
                    f"the {role} {name!r} of the engine {path} should be {_tensor(declared.get(name))} by "
                    f"its manifest but is {_tensor(actual.get(name))}; export the engine again"
                )


def _tensor(tensor: _Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor[0]} {list(tensor[1])}"
