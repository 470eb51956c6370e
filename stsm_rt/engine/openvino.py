"""Engines that OpenVINO runs on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stsm_rt.engine.host import Buffers, HostEngine, check_graph
from stsm_rt.engine.rings import Tensor, phases, step_tensors
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest

if TYPE_CHECKING:
    import openvino

_TYPES = {"uint8": "u8", "bool": "boolean", "float16": "f16", "float32": "f32"}


class OpenVINOEngine(HostEngine):
    """An ONNX graph in step form, run by OpenVINO on the CPU.

    A graph of batch 1 serves any number of slots, each with buffers of its own. A graph of batch N serves up
    to N slots, slot i in row i; its input ``active`` says which rows make the step. No step allocates a
    tensor: all inputs, states and logits are bound once to arrays that this object owns.

    Args:
        path: The ONNX file, with its manifest beside it.
        slots: Number of streams to serve.
        threads: Threads that one step may use; None means one for each physical core of this process.
        stride: Steps for each delay of 1.

    Raises:
        UserError: If OpenVINO is not installed, the file or its manifest is absent, damaged or does not match the
            other, or a number is out of range.
    """

    def _open(self, path: Path, threads: int) -> None:
        self._compiled = _compile(self.manifest, path, threads)

    def _bind(self, buffers: Buffers) -> Sequence[Callable[[], None]]:
        """Make one infer request for each phase, which saves binding every state anew at every step.

        OpenVINO's own states (ReadValue and Assign) keep one step only. They were 2 to 3 % faster on
        EfficientNet-Lite0 and within the noise on ResNet-50, so they are not used.
        """
        tensor = functools.partial(load_openvino().Tensor, shared_memory=True)
        shared = {name: tensor(array) for name, array in self._inputs.items()} | {"logits": tensor(self._bound_logits)}
        rings = {name: [tensor(buffer) for buffer in ring] for name, ring in buffers.items()}
        steps = []
        for read, written in phases(rings):
            request = self._compiled.create_infer_request()
            for name, bound in (shared | read | written).items():
                request.set_tensor(name, bound)
            steps.append(functools.partial(_run, request))
        return steps


def load_openvino() -> Any:
    """Import OpenVINO.

    Returns:
        The module.

    Raises:
        UserError: It is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"OpenVINO is needed for this engine but cannot be imported ({error}); run pip install 'stsm-rt[openvino]'"
        ) from error
    return openvino


def _run(request: openvino.InferRequest) -> None:
    # Not infer(), which makes a dictionary of results each time.
    request.start_async()
    request.wait()


def _compile(manifest: Manifest, path: Path, threads: int) -> openvino.CompiledModel:
    runtime = load_openvino()
    settings = {
        # The default is every core of the machine; two threads on one physical core are slower than one.
        "INFERENCE_NUM_THREADS": threads,
        # One frame at a time, by all threads together.
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # The default computes FP32 graphs in BF16, unasked, on processors that have it.
        "INFERENCE_PRECISION_HINT": "f32",
        # A pinned thread waits for the camera's reader or the window though another core is idle.
        "ENABLE_CPU_PINNING": False,
    }
    try:
        # Core.read_model() would let every frontend guess what a damaged file is, and each writes its guess to stderr.
        frontend = runtime.frontend.FrontEndManager().load_by_framework("onnx")
        model = frontend.convert(frontend.load(str(path)))
        inputs, outputs = step_tensors(manifest)
        check_graph(manifest, path, _TYPES, _tensors(model.inputs, inputs), _tensors(model.outputs, outputs))
        return runtime.Core().compile_model(model, "CPU", settings)
    except UserError:
        raise
    except Exception as error:  # its exceptions share no base class below Exception
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"OpenVINO {runtime.__version__} cannot open the engine {path} ({reason}); export the engine again"
        ) from error


def _tensors(ports: Sequence[Any], declared: Collection[str]) -> dict[str, Tensor]:
    """Type and shape of each port by its declared names, or by another one if it has none of them."""
    found = {}
    for port in ports:
        names = port.get_names()
        for name in [name for name in declared if name in names] or [min(names, default="without a name")]:
            shape = port.get_partial_shape()
            # A shape that is not static fits none.
            sizes = tuple(shape.to_shape()) if shape.is_static else (-1,)
            found[name] = (port.get_element_type().get_type_name(), sizes)
    return found
