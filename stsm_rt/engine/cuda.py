"""CUDA as far as an engine needs it: memory, one stream, and graphs captured from that stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError


class CudaError(UserError):
    """A call to CUDA that failed, in one sentence."""


class Gpu:
    """The GPU that is current for the calling thread, with a stream of its own and everything allocated through it.

    All work goes to that stream, in order; only ``synchronize`` waits for it.

    Attributes:
        compute_capability: For example 87 of a GPU with compute capability 8.7.
        stream: The stream's handle.

    Raises:
        UserError: If cuda-bindings is not installed or there is no GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise UserError(
                f"TensorRT engines need the package cuda-bindings ({error}); install the one of your driver's CUDA, "
                "pip install 'cuda-bindings==12.*' or 'cuda-bindings==13.*'"
            ) from error
        code, count = self._cuda.cudaGetDeviceCount()
        if code != self._cuda.cudaError_t.cudaSuccess or not count:
            raise UserError(
                f"TensorRT engines need an NVIDIA GPU with a driver, and CUDA finds none here ({self._reason(code)}); "
                "check with nvidia-smi that the driver is there and not older than the CUDA of cuda-bindings, or open "
                "an engine for onnxruntime"
            )
        device = self._call("cudaGetDevice")
        attributes = self._cuda.cudaDeviceAttr
        major = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, device)
        minor = self._call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, device)
        self.compute_capability = 10 * major + minor
        # Work on the default stream waits for a blocking stream and the other way round.
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        # Freed in reverse order. What freeing returns is not looked at: after an error of the GPU it fails, too, and
        # that error has been said already.
        self._resources = ExitStack()
        self._resources.callback(self._cuda.cudaStreamDestroy, self._stream)

    def allocate(self, size: int) -> int:
        """Give the address of ``size`` bytes of the GPU's memory, which are not cleared.

        Raises:
            CudaError: If there is not as much left.
        """
        address: int = self._call("cudaMalloc", size)
        self._resources.callback(self._cuda.cudaFree, address)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Give an array in page-locked memory of the host, which is not cleared.

        The memory lives as long as any array over it, also after ``close``.

        Raises:
            CudaError: If there is no memory left.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault)
        return np.asarray(_Pinned(self._cuda, address, shape, np.dtype(dtype)))

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Enqueue the copy of a pinned array to the GPU; the array must not change before ``synchronize``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, array: npt.NDArray[Any], address: int) -> None:
        """Enqueue the copy from the GPU to a pinned array; it is there after ``synchronize``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def clear(self, address: int, size: int) -> None:
        """Enqueue the setting of ``size`` bytes to zero."""
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done.

        Raises:
            CudaError: If any of it failed.
        """
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Make a CUDA graph of what ``enqueue`` enqueues; nothing of it is executed.

        Returns:
            The executable graph, for ``launch``.

        Raises:
            CudaError: If it cannot be captured; the stream is as before, as after any error of ``enqueue``.
        """
        # Other threads may go on using the GPU meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        with ExitStack() as captured:
            try:
                enqueue()
            finally:
                # Also after an error, or the stream would go on capturing.
                code, graph = self._cuda.cudaStreamEndCapture(self._stream)
                if code == self._cuda.cudaError_t.cudaSuccess:
                    captured.callback(self._cuda.cudaGraphDestroy, graph)
            self._check("cudaStreamEndCapture", code)
            executable = self._call("cudaGraphInstantiate", graph, 0)
        self._resources.callback(self._cuda.cudaGraphExecDestroy, executable)
        return executable

    def launch(self, graph: Any) -> None:
        """Enqueue a captured graph."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def close(self) -> None:
        """Wait for the stream, then free it, all of its graphs and all memory on the GPU."""
        self._cuda.cudaStreamSynchronize(self._stream)
        self._resources.close()

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._cuda, name)(*arguments)
        self._check(name, code)
        return values[0] if values else None

    def _check(self, name: str, code: Any) -> None:
        if code == self._cuda.cudaError_t.cudaSuccess:
            return
        if code == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise CudaError(
                f"there is not enough memory for the engine on the GPU ({name}: {self._reason(code)}); end other "
                "programs that use the GPU or open the engine with fewer slots"
            )
        raise CudaError(
            f"the GPU cannot go on ({name}: {self._reason(code)}); open the engine again, and look into the driver's "
            "log if that fails too"
        )

    def _reason(self, code: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(code)
        return f"{code.name}, {text.decode()}"


class _Pinned:
    """Owner of page-locked memory: the base of an array over it, and so of all views of that array."""

    def __init__(self, cuda: Any, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._cuda, self._address = cuda, address
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": (address, False)}

    def __del__(self) -> None:
        self._cuda.cudaFreeHost(self._address)
