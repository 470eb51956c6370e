"""The machine that is measured on: what it is, how quiet it was, and how fast it multiplies and copies."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

import stsm_rt
from stsm_rt.engine.host import physical_cores
from stsm_rt.timing import Candidate

PRODUCT_SIZE = 2048
PRODUCT_OPERATIONS = PRODUCT_SIZE**3  # multiply-adds
_COPIED = 128 * 2**20  # bytes; several times what a cache holds
COPY_BYTES = 2 * _COPIED  # read and written
NOT_QUIET = 0.05  # share of the cores that other processes use
_PACKAGES = ("numpy", "onnxruntime", "openvino", "opencv-python", "torch", "torchvision", "onnx")


def machine() -> dict[str, Any]:
    """What the machine is, for people, with the number of threads that a step uses."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": physical_cores(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of stsm-rt, Python and the packages that are installed, none of which is imported."""
    installed = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    return {
        "stsm-rt": stsm_rt.__version__,
        "python": platform.python_version(),
        **{package: installed[package] for package in _PACKAGES if package in installed},
    }


def machine_lines(record: Mapping[str, Any]) -> list[str]:
    """``machine`` and ``versions`` of a record, for people."""
    of = record["machine"]
    return [
        f"{of['processor']}, {of['cores']} cores, {of['threads']} threads for a step, {of['system']}",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    ]


def quiet_line(shares: Mapping[str, float] | None) -> str:
    """What `Quiet.record` gave, for people."""
    if shares is None:
        return "how quiet the machine was is not known"
    warning = "; that is not quiet, measure again" if shares["others"] > NOT_QUIET else ""
    return (
        f"meanwhile other processes used {100 * shares['others']:.1f} % of the cores, and the hypervisor took "
        f"{100 * shares['stolen']:.1f} % away{warning}"
    )


class Quiet:
    """How quiet the machine was since this object was made; only Linux tells."""

    def __init__(self) -> None:
        self._begin = _ticks()

    def record(self) -> dict[str, float] | None:
        """Shares, 0 to 1, of the time of all cores that other processes used and that the hypervisor took away.

        None where the system does not tell.
        """
        end = _ticks()
        if self._begin is None or end is None:
            return None
        busy, stolen, own, total = (b - a for a, b in zip(self._begin, end, strict=True))
        return {
            "others": round(max(busy - own, 0.0) / max(total, 1.0), 4),
            "stolen": round(stolen / max(total, 1.0), 4),
        }


def matrix_products() -> dict[str, Candidate]:
    """A product of two 2048x2048 matrices in FP32, by each of what is installed and can compute one: for the turns."""
    steps = {"numpy": _numpy_product()}
    if importlib.util.find_spec("onnx"):
        steps["onnxruntime"] = _onnxruntime_product()
    return {by: Candidate(step=step, warm_up=1, counted=2) for by, step in steps.items()}


def memory_copy() -> Candidate:
    """A copy that no cache holds, by as many threads as a step uses: for the turns."""
    threads = physical_cores()
    pool = ThreadPoolExecutor(threads)
    arrays = np.zeros(_COPIED, np.uint8), np.ones(_COPIED, np.uint8)
    parts = list(zip(*(np.array_split(array, threads) for array in arrays), strict=True))
    return Candidate(step=lambda: list(pool.map(lambda part: np.copyto(*part), parts)), warm_up=1, counted=2)


def _numpy_product() -> Callable[[], object]:
    left, right = _matrices()
    product = np.empty_like(left)
    return lambda: np.matmul(left, right, out=product)


def _onnxruntime_product() -> Callable[[], object]:
    import onnx
    import onnxruntime

    left, right = _matrices()
    shape = [PRODUCT_SIZE, PRODUCT_SIZE]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("left", "product")]
    # A constant factor is packed beforehand, as weights are.
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["left", "right"], ["product"])],
        "product",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(right, "right")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    bound = (value(left), value(np.empty_like(left)))
    binding.bind_ortvalue_input("left", bound[0])
    binding.bind_ortvalue_output("product", bound[1])
    # The default keeps what is bound alive.
    return lambda bound=bound: session.run_with_iobinding(binding)  # type: ignore[misc]


def _matrices() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((PRODUCT_SIZE, PRODUCT_SIZE), np.float32) for _ in range(2))
    return left, right


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _ticks() -> tuple[float, float, float, float] | None:
    """Seconds since the start of all cores: busy, stolen, busy with this process, in all."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, waiting, interrupts, soft, stolen, *_ = (
        int(number) / os.sysconf("SC_CLK_TCK") for number in line.split()[1:]
    )
    busy = user + nice + system + interrupts + soft
    return busy, stolen, process_time(), busy + idle + waiting + stolen
