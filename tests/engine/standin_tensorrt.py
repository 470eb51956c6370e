"""A stand-in for the GPU: CUDA's runtime over host memory, and a TensorRT whose plans are ONNX graphs.

It is as strict as it can be. A stream does nothing until it is synchronized, so a missing wait shows. New memory is
full of NaN, freed memory too. Wrong addresses, sizes or directions, use after free, freeing twice and I/O tensors that
overlap are faults: they raise, and are kept in ``Cuda.faults`` in case the error is lost.
"""

from __future__ import annotations

import enum
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class Fault(AssertionError):
    """What would corrupt memory or crash on a GPU."""


class Handle:
    """A stream, a graph or an executable graph: the work in it, in order."""

    def __init__(self, kind: str, work: list[Callable[[], None]]) -> None:
        self.kind, self.work = kind, work
        self.captured: list[Callable[[], None]] | None = None  # of a stream while it captures
        self.invalidated = False

    def __int__(self) -> int:
        return id(self)


class Block:
    """Some memory and what kind it is."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind = kind
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN in every floating-point type
        self.start = self.bytes.ctypes.data


def driver_call(function: Any) -> Any:
    """Count the call, fail it if that was asked for, and keep faults."""

    @functools.wraps(function)
    def call(self: Cuda, *arguments: Any) -> Any:
        self.calls[function.__name__] += 1
        code = self.failing.get(function.__name__, lambda count: None)(self.calls[function.__name__])
        if code is not None:
            return (code, None) if function.__name__ in self.GIVING else (code,)
        try:
            return (cudaError_t.cudaSuccess, *(function(self, *arguments) or ()))
        except Fault as fault:
            self.faults.append(fault)
            raise

    return call


class Cuda:
    """Stands for the module ``cuda.bindings.runtime``.

    Attributes:
        failing: By function: the error of its n-th call, or None where it succeeds.
        calls: By function.
        faults: Everything that went wrong.
    """

    cudaError_t, cudaMemcpyKind = cudaError_t, cudaMemcpyKind
    cudaStreamCaptureMode, cudaDeviceAttr = cudaStreamCaptureMode, cudaDeviceAttr
    cudaHostAllocDefault, cudaStreamNonBlocking = 0, 1
    GIVING = (  # a value beside the error code
        "cudaGetDeviceCount",
        "cudaGetDevice",
        "cudaDeviceGetAttribute",
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaStreamCreateWithFlags",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
    )

    def __init__(self, compute_capability: int = 86) -> None:
        self.compute_capability = compute_capability
        self.blocks: dict[int, Block] = {}
        self.freed: list[Block] = []  # kept, so that no address is given twice
        self.handles: dict[int, Handle] = {}
        self.failing: dict[str, Callable[[int], cudaError_t | None]] = {}
        self.calls: Counter[str] = Counter()
        self.faults: list[Fault] = []

    def live(self, kind: str) -> int:
        """How many blocks or handles of a kind were not freed."""
        return sum(owned.kind == kind for owned in (*self.blocks.values(), *self.handles.values()))

    def memory(self, address: int, size: int, kind: str) -> np.ndarray:
        """The bytes at an address, which must be inside one live block of that kind."""
        for block in self.blocks.values():
            if block.start <= address and address + size <= block.start + len(block.bytes):
                if block.kind != kind:
                    raise Fault(f"{kind} memory expected, {block.kind} memory given")
                return block.bytes[address - block.start :][:size]
        raise Fault(f"{size} bytes at {address:#x} are not inside any live block")

    def enqueue(self, stream: Any, work: Callable[[], None]) -> None:
        handle = self.handle(stream, "stream")
        (handle.work if handle.captured is None else handle.captured).append(work)

    def handle(self, handle: Any, kind: str) -> Handle:
        found = self.handles.get(int(handle))
        if found is None or found.kind != kind:
            raise Fault(f"no live {kind}: {handle}")
        return found

    def poison(self, kind: str = "device") -> None:
        """Fill all memory of a kind with NaN."""
        for block in self.blocks.values():
            if block.kind == kind:
                block.bytes[:] = 0xFF

    @driver_call
    def cudaGetDeviceCount(self) -> Any:
        return (1,)

    @driver_call
    def cudaGetDevice(self) -> Any:
        return (0,)

    @driver_call
    def cudaDeviceGetAttribute(self, attribute: cudaDeviceAttr, device: int) -> Any:
        return (divmod(self.compute_capability, 10)[attribute - 75],)

    def cudaGetErrorString(self, code: cudaError_t) -> Any:
        return cudaError_t.cudaSuccess, code.name.removeprefix("cudaError").lower().encode()

    @driver_call
    def cudaMalloc(self, size: int) -> Any:
        return (self._new_block("device", size),)

    @driver_call
    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return (self._new_block("host", size),)

    @driver_call
    def cudaFree(self, address: int) -> Any:
        self._free_block("device", address)

    @driver_call
    def cudaFreeHost(self, address: int) -> Any:
        self._free_block("host", address)

    @driver_call
    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: cudaMemcpyKind, stream: Any) -> Any:
        up = kind is cudaMemcpyKind.cudaMemcpyHostToDevice
        kinds = ("device", "host") if up else ("host", "device")

        def copy() -> None:
            self.memory(to, size, kinds[0])[:] = self.memory(source, size, kinds[1])

        self.memory(to, size, kinds[0]), self.memory(source, size, kinds[1])
        self.enqueue(stream, copy)

    @driver_call
    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> Any:
        def fill() -> None:
            self.memory(address, size, "device")[:] = value

        self.memory(address, size, "device")
        self.enqueue(stream, fill)

    @driver_call
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        return (self._new_handle("stream", []),)

    @driver_call
    def cudaStreamDestroy(self, stream: Any) -> Any:
        self._free_handle(stream, "stream")

    @driver_call
    def cudaStreamSynchronize(self, stream: Any) -> Any:
        handle = self.handle(stream, "stream")
        if handle.captured is not None:
            raise Fault("a stream that captures cannot be synchronized")
        work, handle.work = handle.work, []
        for item in work:
            item()

    @driver_call
    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> Any:
        handle = self.handle(stream, "stream")
        if handle.captured is not None:
            raise Fault("the stream captures already")
        handle.captured, handle.invalidated = [], False

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        self.calls["cudaStreamEndCapture"] += 1
        handle = self.handle(stream, "stream")
        if handle.captured is None:
            raise Fault("the stream does not capture")
        work, handle.captured = handle.captured, None
        if handle.invalidated:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        return cudaError_t.cudaSuccess, self._new_handle("graph", work)

    @driver_call
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return (self._new_handle("executable", list(self.handle(graph, "graph").work)),)

    @driver_call
    def cudaGraphLaunch(self, executable: Any, stream: Any) -> Any:
        for work in self.handle(executable, "executable").work:
            self.enqueue(stream, work)

    @driver_call
    def cudaGraphDestroy(self, graph: Any) -> Any:
        self._free_handle(graph, "graph")

    @driver_call
    def cudaGraphExecDestroy(self, executable: Any) -> Any:
        self._free_handle(executable, "executable")

    def _new_block(self, kind: str, size: int) -> int:
        block = Block(kind, size)
        self.blocks[block.start] = block
        return block.start

    def _free_block(self, kind: str, address: int) -> None:
        if address not in self.blocks or self.blocks[address].kind != kind:
            raise Fault(f"no live block of {kind} memory starts at {address:#x}")
        if any(handle.work for handle in self.handles.values() if handle.kind == "stream"):
            raise Fault("memory is freed while a stream has work to do")
        block = self.blocks.pop(address)
        block.bytes[:] = 0xFF
        self.freed.append(block)

    def _new_handle(self, kind: str, work: list[Callable[[], None]]) -> Handle:
        handle = Handle(kind, work)
        self.handles[int(handle)] = handle
        return handle

    def _free_handle(self, handle: Any, kind: str) -> None:
        self.handles.pop(int(self.handle(handle, kind))).work.clear()


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(enum.Enum):
    FLOAT, HALF, UINT8, BOOL = range(4)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


DTYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
    "tensor(bool)": (DataType.BOOL, np.bool_),
}


class Capture(enum.Enum):
    """What comes of capturing an execution."""

    WORKS = enum.auto()
    REFUSED = enum.auto()  # the execution says that it failed
    INVALIDATED = enum.auto()  # the execution says nothing, the end of the capture does
    EMPTY = enum.auto()  # nobody says anything, and the graph does nothing
    STALE = enum.auto()  # the graph reads the addresses when it is launched


class TensorRT:
    """Stands for the module ``tensorrt`` (``tensorrt_rtx`` if ``rtx``).

    Attributes:
        capture: What comes of capturing.
        makes_contexts: Whether there is memory for a context.
        executes: Whether execution succeeds.
        contexts: Those that are alive.
        opened: Every plan that was deserialized.
    """

    def __init__(self, cuda: Cuda, version: str = "10.3.0", rtx: bool = False) -> None:
        self.cuda, self.__version__, self.rtx = cuda, version, rtx
        self.__package__ = "tensorrt_rtx" if rtx else "tensorrt"
        self.capture = Capture.WORKS
        self.makes_contexts = self.executes = True
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.opened: list[bytes] = []

    class ILogger:
        INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    def __init__(self, library: TensorRT, logger: Any) -> None:
        self.library, self.logger = library, logger

    def deserialize_cuda_engine(self, data: bytes) -> Plan | None:
        self.library.opened.append(data)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception:
            self.logger.log(Severity.INFO, "Loaded engine size: 0 MiB")
            self.logger.log(Severity.ERROR, "Error Code 4: the plan\nis damaged")
            return None
        return Plan(self, session)


class Plan:
    def __init__(self, runtime: Runtime, session: ort.InferenceSession) -> None:
        self.runtime, self.session = runtime, session
        self.tensors = {tensor.name: (tensor, TensorIOMode.INPUT) for tensor in session.get_inputs()}
        self.tensors |= {tensor.name: (tensor, TensorIOMode.OUTPUT) for tensor in session.get_outputs()}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][1]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DTYPES[self.tensors[name][0].type][0]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name][0].shape

    def create_execution_context(self) -> Context | None:
        if self.runtime.library.makes_contexts:
            return (CapturableContext if self.runtime.library.rtx else Context)(self)
        self.runtime.logger.log(Severity.ERROR, "no memory for activations")
        return None


class Context:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.library = plan, plan.runtime.library
        self.addresses: dict[str, int] = {}
        self.executed = False
        self.library.contexts.add(self)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.plan.tensors:
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        library, handle = self.library, self.library.cuda.handle(stream, "stream")
        if set(self.addresses) != set(self.plan.tensors):
            raise Fault(f"no address was set for {set(self.plan.tensors) - set(self.addresses)}")
        if not library.executes:
            self.plan.runtime.logger.log(Severity.ERROR, "enqueueV3 failed")
            return False
        if handle.captured is None:
            self.executed = True
            library.cuda.enqueue(stream, functools.partial(self.compute, dict(self.addresses)))
            return True
        return self._execute_captured(stream, handle)

    def _execute_captured(self, stream: int, handle: Handle) -> bool:
        capture = self.library.capture
        if capture is Capture.REFUSED or not self.executed:
            handle.invalidated = True
            self.plan.runtime.logger.log(Severity.ERROR, "cannot be captured")
            return False
        if capture is Capture.INVALIDATED:
            handle.invalidated = True
        elif capture is Capture.STALE:
            self.library.cuda.enqueue(stream, lambda: self.compute(self.addresses))
        elif capture is Capture.WORKS:
            self.library.cuda.enqueue(stream, functools.partial(self.compute, dict(self.addresses)))
        return True

    def compute(self, addresses: dict[str, int]) -> None:
        tensors = {}
        for name, address in addresses.items():
            tensor, _ = self.plan.tensors[name]
            dtype = DTYPES[tensor.type][1]
            size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
            tensors[name] = self.library.cuda.memory(address, size, "device").view(dtype).reshape(tensor.shape)
        ranges = sorted((array.ctypes.data, array.nbytes) for array in tensors.values())
        for (start, size), (following, _) in itertools.pairwise(ranges):
            if start + size > following:
                raise Fault("two tensors of one execution overlap")
        inputs = [name for name, (_, mode) in self.plan.tensors.items() if mode is TensorIOMode.INPUT]
        outputs = [name for name in self.plan.tensors if name not in inputs]
        results = self.plan.session.run(outputs, {name: tensors[name] for name in inputs})
        for name, result in zip(outputs, results, strict=True):
            tensors[name][...] = result


class CapturableContext(Context):
    """A context of TensorRT-RTX, which can be asked."""

    def is_stream_capturable(self, stream: int) -> bool:
        self.library.cuda.handle(stream, "stream")
        return self.library.capture is not Capture.REFUSED
