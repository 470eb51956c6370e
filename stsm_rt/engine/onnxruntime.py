"""Engines that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from stsm_rt.engine.host import Buffers, HostEngine, check_graph
from stsm_rt.engine.rings import phases
from stsm_rt.errors import UserError

# What the variable that stsm_rt sets does elsewhere, this does on Windows.
ort.disable_telemetry_events()

# It gives a layer that was left in floating point on purpose int8 weights with one scale for all channels: on
# EfficientNet-Lite0, 5 to 10 times the error.
_REQUANTIZER = "WeightBiasQuantization"

_TYPES = {
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
}


class OnnxRuntimeEngine(HostEngine):
    """An ONNX graph in step form, run by ONNX Runtime on the CPU.

    A graph of batch 1 serves any number of slots, each with buffers of its own. A graph of batch N serves up
    to N slots, slot i in row i; its input ``active`` says which rows make the step. No step allocates a
    tensor: all inputs, states and logits are bound once to arrays that this object owns.

    Args:
        path: The ONNX file, with its manifest beside it.
        slots: Number of streams to serve.
        threads: Threads that one step may use; None means one for each physical core of this process.
        stride: Steps for each delay of 1.
        fused: Whether ONNX Runtime may rewrite the graph. Without, it computes every node as it stands: slowly, and
            what the graph means, to compare with.

    Raises:
        UserError: If the file or its manifest is absent, damaged or does not match the other, or a number is
            out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        slots: int = 1,
        threads: int | None = None,
        stride: int = 1,
        fused: bool = True,
    ) -> None:
        self._fused = fused
        self._values: list[Any] = []
        super().__init__(path, slots=slots, threads=threads, stride=stride)

    def _open(self, path: Path, threads: int) -> None:
        self._session = session = _open_session(path, threads, self._fused)
        inputs, outputs = (
            {node.name: (node.type, tuple(node.shape)) for node in nodes}
            for nodes in (session.get_inputs(), session.get_outputs())
        )
        check_graph(self.manifest, path, _TYPES, inputs, outputs)

    def _bind(self, buffers: Buffers) -> Sequence[Callable[[], None]]:
        # An OrtValue made from a C-contiguous array shares its memory; of another it would keep a stale copy.
        value = ort.OrtValue.ortvalue_from_numpy
        inputs = {name: value(array) for name, array in self._inputs.items()}
        logits = value(self._bound_logits)
        rings = {name: [value(buffer) for buffer in ring] for name, ring in buffers.items()}
        # The arrays live as long as their OrtValues, and older IOBindings do not keep those alive.
        self._values.append((inputs, logits, rings))
        steps = []
        # ONNX Runtime silently computes wrong numbers when one buffer is read and written.
        for read, written in phases(rings):
            binding = self._session.io_binding()
            for name, tensor in (inputs | read).items():
                binding.bind_ortvalue_input(name, tensor)
            # Bound by value: bound by name alone, an output is memory that ONNX Runtime owns.
            for name, tensor in ({"logits": logits} | written).items():
                binding.bind_ortvalue_output(name, tensor)
            steps.append(functools.partial(self._session.run_with_iobinding, binding))
        return steps


def _open_session(path: Path, threads: int, fused: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # The default is every core of the machine, also those that this process may not use; and two threads on
    # one physical core are slower than one.
    options.intra_op_num_threads = threads
    # Threads that go on spinning after a step take the cores from the camera's reader and the window.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Within a step they spin through short operations that one thread makes, and no longer: whoever decodes the next
    # frame wants that core (benchmarks/PROFILE.md has what it costs and brings).
    options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # What goes wrong arrives as an exception and is said in one sentence; the log would repeat it on stderr.
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_REQUANTIZER]
        )
    except Exception as error:  # its exceptions share no base class below Exception
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"ONNX Runtime {ort.__version__} cannot open the engine {path} ({reason}); export the engine again"
        ) from error
