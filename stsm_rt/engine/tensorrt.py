"""Engines that TensorRT or TensorRT-RTX runs on an NVIDIA GPU."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stsm_rt.engine.cuda import Gpu
from stsm_rt.engine.host import BoundEngine
from stsm_rt.engine.rings import check_delays, check_slots, phases, ring_length, step_tensors
from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest, StateSpec
from stsm_rt.tensorrt_library import error_log, first_reason, load_tensorrt, one_line

# Each captured graph takes about a megabyte and milliseconds to make.
_MAX_GRAPHS = 128
# Of the largest logit. A graph repeats the very kernels, so only sums whose order is left to the GPU may differ.
_GRAPH_TOLERANCE = 1e-2

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "BOOL": "bool"}  # TensorRT's names to numpy's

_Tensor = tuple[str, str, tuple[int, ...]]  # role, dtype and shape


class TensorRTEngine(BoundEngine["_Rings"]):
    """A plan in step form, run by TensorRT on a GPU with its states kept there.

    A plan of batch 1 serves any number of slots, each with buffers of its own. A plan of batch N serves up to N slots,
    slot i in row i; its input ``active`` says which rows make the step. A step is one upload of the uint8 frame from
    pinned memory, the network and one download of the logits, all on a stream of its own: one CUDA graph for every
    slot and phase of its state buffers where they can be captured. It allocates nothing. On a machine with several GPUs
    choose one with ``CUDA_VISIBLE_DEVICES``: every thread of a process starts with the first that it sees.

    Args:
        path: The plan, with its manifest beside it.
        slots: Number of streams to serve.
        stride: Steps for each delay of 1.

    Attributes:
        cuda_graphs: Whether steps are CUDA graphs. They are not where TensorRT cannot capture them, where they do not
            repeat what plain execution gives, or where slots, delays and stride would need more than 128 of them.

    Raises:
        UserError: If the file or its manifest is absent, damaged or does not match the other; if TensorRT,
            cuda-bindings or a GPU is missing; if the plan was built with another version or for another GPU; if there
            is not enough memory on the GPU; or a number is out of range. ``step`` and ``reset`` raise it also if the
            GPU fails or the engine was closed; the slots before the failing one have made their step then.
    """

    cuda_graphs = False
    _gpu: Gpu | None = None
    _plan: Any = None
    _context: Any = None

    def __init__(self, path: str | os.PathLike[str], *, slots: int = 1, stride: int = 1) -> None:
        self.manifest = manifest = Manifest.load(path)
        self._path = Path(path)
        check_slots(manifest, slots)
        check_delays(manifest, self._path, "build", stride)
        self._library = library = load_tensorrt(manifest.runtime)
        if manifest.runtime_version != library.version:
            raise UserError(
                f"the engine {path} was built with version {manifest.runtime_version}, but {library.name} is "
                f"installed; {_build_again(manifest)}"
            )
        self._gpu = gpu = Gpu()
        try:
            if not _runs_on(manifest.device, gpu.compute_capability):
                raise UserError(
                    f"the engine {path} was built for {manifest.device}, but this GPU is sm_{gpu.compute_capability}; "
                    f"{_build_again(manifest)}"
                )
            self.slots = slots
            self.stride = stride
            self._open_plan()
            self._allocate(gpu)
            self._prepare(gpu)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free everything on the GPU; the engine cannot be used any more. It is called when the engine is deleted.

        Arrays over the engine's pinned memory, ``frames`` and logits, stay readable as long as somebody holds them.
        """
        gpu, self._gpu = self._gpu, None
        if gpu is not None:
            gpu.close()
            self._context = None
            self._plan = None

    def __del__(self) -> None:
        self.close()

    def _open_plan(self) -> None:
        """Deserialize the plan and make the context that all slots share."""
        data = self._path.read_bytes()
        # The file may have changed since the manifest was compared with it, and a plan holds native code.
        if hashlib.sha256(data).hexdigest() != self.manifest.sha256:
            raise UserError(f"the engine {self._path} changed while it was opened; open it again")
        self._log = error_log(self._library)
        self._log.errors.clear()
        try:
            self._plan = self._library.module.Runtime(self._log).deserialize_cuda_engine(data)
        except (RuntimeError, TypeError) as error:  # what the bindings raise where C++ gives no object
            self._log.errors.append(one_line(error))
        if self._plan is None:
            raise UserError(
                f"{self._library.name} cannot open the engine {self._path}: {first_reason(self._log.errors)}; "
                f"{_build_again(self.manifest)}"
            )
        _check_tensors(self._plan, self.manifest, self._path)
        self._context = self._plan.create_execution_context()
        if self._context is None:
            raise UserError(
                f"{self._library.name} cannot prepare the engine {self._path}: {first_reason(self._log.errors)}; end "
                "other programs that use the GPU's memory and open it again"
            )

    def _allocate(self, gpu: Gpu) -> None:
        manifest = self.manifest
        self._make_arrays(gpu.pinned)
        self._uploads = [(gpu.allocate(array.nbytes), array) for array in self._inputs.values()]
        self._device_logits = gpu.allocate(self._bound_logits.nbytes)
        shared = {name: address for name, (address, _) in zip(self._inputs, self._uploads, strict=True)}
        shared["logits"] = self._device_logits
        self._rings = [
            _Rings(gpu, manifest.states, self.stride, shared) for _ in range(self.slots if manifest.batch == 1 else 1)
        ]

    def _prepare(self, gpu: Gpu) -> None:
        """Capture the graphs, keep them if they repeat plain execution, and leave all states at zero.

        TensorRT must have executed once before it can be captured. And a graph that silently came out empty, or holds
        addresses of another phase, would give wrong logits without an error.
        """
        plain = self._rehearse()
        try:
            self.cuda_graphs = self._capture(gpu) and self._repeats(plain)
        except UserError:
            self.cuda_graphs = False  # if the GPU is to blame, the reset below says so
        if not self.cuda_graphs:
            for rings in self._rings:
                rings.graphs.clear()
        self.frames[...] = 0
        self._active[:] = False
        self._bound_logits[:] = 0
        self.reset()
        gpu.synchronize()

    def _rehearse(self) -> npt.NDArray[np.float32]:
        """The logits of a few steps of all slots from zero, long enough to read each buffer after it was written."""
        self.reset()
        random = np.random.default_rng(0)
        self._active[:] = True
        logits = []
        for rings in self._rings:
            rings.phase = 0
            for _ in range(2 * len(rings.phases)):
                self.frames[...] = random.integers(0, 256, self.frames.shape, np.uint8)
                self._bound_logits[:] = np.nan
                self._advance(rings)
                logits.append(self._bound_logits.copy())
        return np.stack(logits)

    def _capture(self, gpu: Gpu) -> bool:
        """Capture a graph for every slot and phase, unless that is known to be impossible."""
        phases = [(rings, addresses) for rings in self._rings for addresses in rings.phases]
        # TensorRT-RTX knows of itself whether it can be captured; TensorRT has to be tried.
        capturable = getattr(self._context, "is_stream_capturable", None)
        if len(phases) > _MAX_GRAPHS or (capturable is not None and not capturable(gpu.stream)):
            return False
        for rings, addresses in phases:
            rings.graphs.append(gpu.capture(functools.partial(self._enqueue, gpu, addresses)))
        return True

    def _repeats(self, plain: npt.NDArray[np.float32]) -> bool:
        difference = np.abs(self._rehearse() - plain).max()
        return bool(difference <= _GRAPH_TOLERANCE * np.abs(plain).max())  # False for NaN

    def _advance(self, rings: _Rings) -> None:
        """Run one step and wait for its logits."""
        gpu = self._open_gpu()
        if rings.graphs:
            gpu.launch(rings.graphs[rings.phase])
        else:
            self._enqueue(gpu, rings.phases[rings.phase])
        gpu.synchronize()
        rings.phase = (rings.phase + 1) % len(rings.phases)

    def _clear(self, rings: _Rings, row: int) -> None:
        gpu = self._open_gpu()
        for ring, size in zip(rings.buffers.values(), rings.row_sizes, strict=True):
            for buffer in ring:
                gpu.clear(buffer + row * size, size)

    def _enqueue(self, gpu: Gpu, addresses: dict[str, int]) -> None:
        """Enqueue one step: the frame up, the network, the logits down."""
        self._log.errors.clear()
        for address, array in self._uploads:
            gpu.upload(address, array)
        bound = all(self._context.set_tensor_address(name, address) for name, address in addresses.items())
        if not bound or not self._context.execute_async_v3(gpu.stream):
            raise UserError(
                f"{self._library.name} cannot run the engine {self._path}: {first_reason(self._log.errors)}; "
                f"{_build_again(self.manifest)}"
            )
        gpu.download(self._bound_logits, self._device_logits)

    def _open_gpu(self) -> Gpu:
        if self._gpu is None:
            raise UserError(f"the engine {self._path} was closed; open it again")
        return self._gpu


class _Rings:
    """The state buffers of one stream (or of all rows of a batch), and all addresses of a step for each phase."""

    def __init__(self, gpu: Gpu, states: Sequence[StateSpec], stride: int, shared: dict[str, int]) -> None:
        self.row_sizes = [math.prod(state.shape[1:]) * np.dtype(state.dtype).itemsize for state in states]
        self.buffers = {
            state.name: [gpu.allocate(state.shape[0] * size) for _ in range(ring_length(state, stride))]
            for state, size in zip(states, self.row_sizes, strict=True)
        }
        self.phases = [shared | read | written for read, written in phases(self.buffers)]
        self.graphs: list[Any] = []  # one for each phase, or none: plain execution
        self.phase = 0


def _runs_on(device: str, compute_capability: int) -> bool:
    """Whether a plan for ``device``, as a manifest says it, runs on a GPU of that compute capability (87 is 8.7)."""
    for built_for in device.split(","):
        number = built_for.removeprefix("sm_").removesuffix("+")
        if not number.isdecimal():
            continue
        if int(number) == compute_capability or (built_for.endswith("+") and int(number) < compute_capability):
            return True
    return False


def _check_tensors(plan: Any, manifest: Manifest, path: Path) -> None:
    """Hold the plan's inputs and outputs to what the manifest declares."""
    inputs, outputs = step_tensors(manifest)
    declared: dict[str, _Tensor] = {name: ("input", *tensor) for name, tensor in inputs.items()}
    declared |= {name: ("output", *tensor) for name, tensor in outputs.items()}
    actual: dict[str, _Tensor] = {}
    for i in range(plan.num_io_tensors):
        name = plan.get_tensor_name(i)
        dtype = plan.get_tensor_dtype(name).name
        shape = tuple(plan.get_tensor_shape(name))
        actual[name] = (plan.get_tensor_mode(name).name.lower(), _DTYPES.get(dtype, dtype), shape)
    for name in declared | actual:
        if declared.get(name) != actual.get(name):
            raise UserError(
                f"the tensor {name!r} of the engine {path} should be {_words(declared.get(name))} by its manifest but "
                f"is {_words(actual.get(name))}; {_build_again(manifest)}"
            )


def _words(tensor: _Tensor | None) -> str:
    return "absent" if tensor is None else f"an {tensor[0]}, {tensor[1]} {list(tensor[2])}"


def _build_again(manifest: Manifest) -> str:
    return (
        "build it again on this device with python -m stsm_rt.build_engine "
        f"--network {manifest.network} --runtime {manifest.runtime} --precision {manifest.precision}"
    )
