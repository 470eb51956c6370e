"""The packages ``tensorrt`` (10.3 to 11.x) and ``tensorrt_rtx``: what they have in common and where they differ.

Everything that depends on the package or its version is here. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from stsm_rt.errors import UserError

Progress = Callable[[str, float], None]

_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL = {
    "tensorrt": "on a Jetson JetPack brings it, so use a venv made with --system-site-packages, and on a PC or server "
    "run pip install tensorrt",
    "tensorrt-rtx": "on a machine with an RTX GPU, or to build plans without a GPU, run pip install tensorrt-rtx",
}
_OLDEST, _TOO_NEW = (10, 3), (12, 0)
# What a plan of TensorRT-RTX runs on where no targets are named: compute capability 8.0 and later, not Turing.
_RTX_DEFAULT_DEVICE = "sm_80+"


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        module: The package ``tensorrt`` or ``tensorrt_rtx``.
        runtime: ``"tensorrt"`` or ``"tensorrt-rtx"``, as a manifest says it.
        version: For example ``"10.3.0"``.
    """

    module: ModuleType
    runtime: str
    version: str

    @property
    def name(self) -> str:
        """Product and version, for people: ``"TensorRT 10.3.0"``."""
        return f"{'TensorRT' if self.runtime == 'tensorrt' else 'TensorRT-RTX'} {self.version}"


def load_tensorrt(runtime: str | None = None) -> TensorRT:
    """Import TensorRT or TensorRT-RTX.

    Args:
        runtime: ``"tensorrt"`` or ``"tensorrt-rtx"``; None takes the first that is installed, in this order.

    Raises:
        UserError: It is not installed, its libraries cannot be loaded, or its version is not supported.
    """
    if runtime is None:
        reasons: list[str] = []
        for each in _PACKAGES:
            try:
                return load_tensorrt(each)
            except UserError as error:
                reasons.append(str(error))
        raise UserError("; ".join(reasons))
    if runtime not in _PACKAGES:
        raise UserError(f"the runtime must be {' or '.join(_PACKAGES)}, not {runtime!r}")
    module = _import(runtime)
    version = str(module.__version__)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if runtime == "tensorrt" and not _OLDEST <= numbers < _TOO_NEW:
        raise UserError(f"TensorRT 10.3 to 11.x is supported, not {version}; install a supported version")
    return TensorRT(module, runtime, version)


def _import(runtime: str) -> ModuleType:
    package = _PACKAGES[runtime]
    try:
        module = importlib.import_module(package)
        # Torch-TensorRT for RTX registers tensorrt_rtx under the name tensorrt.
        if module.__package__ != package:
            raise ImportError(f"the module {package} is {module.__package__}")
        return module
    except ModuleNotFoundError as error:
        if error.name != package:
            raise UserError(
                f"the Python package {package} cannot be imported ({error}); {_INSTALL[runtime]}"
            ) from error
        raise UserError(f"the Python package {package} is not installed; {_INSTALL[runtime]}") from None
    except (ImportError, OSError) as error:
        raise UserError(
            f"the Python package {package} cannot be imported ({one_line(error)}); {_INSTALL[runtime]}"
        ) from error


def error_log(tensorrt: TensorRT) -> Any:
    """The logger to give to a builder, a parser or a runtime: it prints nothing and keeps what went wrong.

    Returns:
        An ``ILogger``; its attribute ``errors`` is a list of messages to clear before an operation. There is one for
        the whole process, because TensorRT ignores a second one.
    """
    return _error_log(tensorrt.module)


@functools.cache
def _error_log(trt: Any) -> Any:
    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

    return ErrorLog()


def first_reason(errors: list[str]) -> str:
    """The first message that says something, without the names of TensorRT's own functions and files."""
    for message in errors:
        text = re.sub(r"^.*?Error Code \d+: ", "", one_line(message))
        text = re.sub(r"\s*\(?\bIn \w+ at \S+:\d+.*$", "", text)
        text = re.sub(r"\[\w+\.cpp:\d+: \w+\]\s*", "", text)
        text = text.strip(" .:")
        if text.count("(") > text.count(")"):
            text += ")"
        if text:
            return text
    return "it gave no reason"


def one_line(text: object) -> str:
    """The text without line breaks, at most 300 characters."""
    return " ".join(str(text).split())[:300]


def create_network(tensorrt: TensorRT, builder: Any) -> Any:
    """An empty, strongly typed network definition: the precision of every tensor is that of the graph."""
    known = tensorrt.module.NetworkDefinitionCreationFlag.__members__
    # EXPLICIT_BATCH is an old name for what TensorRT 10 does anyway, and gone in 11; the other may follow it.
    return builder.create_network(1 << int(known["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in known else 0)


def plan_device(tensorrt: TensorRT, compute_capabilities: tuple[str, ...], hardware_compatible: bool) -> str:
    """What a plan will run on, in the manifest's form.

    TensorRT builds for the GPU it is on, TensorRT-RTX for any, present or not.

    Args:
        tensorrt: The builder's package.
        compute_capabilities: Targets such as ``("8.6", "8.9")``; none: the default.
        hardware_compatible: Whether the plan is to run on every GPU since Ampere.

    Returns:
        ``"sm_86"``, ``"sm_86,sm_89"`` or ``"sm_80+"``.

    Raises:
        UserError: A target that this package cannot build for, no GPU for TensorRT, or an option that it lacks.
    """
    if tensorrt.runtime == "tensorrt-rtx":
        if hardware_compatible:
            raise UserError(
                f"{tensorrt.name} has no hardware-compatible plans because all of its plans run on several GPUs; "
                "leave the option out or name the compute capabilities"
            )
        possible = rtx_targets(tensorrt)
        for target in compute_capabilities:
            if target not in possible:
                raise UserError(
                    f"{tensorrt.name} builds for the compute capabilities {', '.join(possible)}, not {target!r}; "
                    "choose among these, or build with TensorRT on the device itself"
                )
        return ",".join(map(_sm, dict.fromkeys(compute_capabilities))) or _RTX_DEFAULT_DEVICE
    own = device_compute_capability()
    if own is None:
        raise UserError(
            f"{tensorrt.name} builds a plan on the GPU that will run it, and this machine has none that works; "
            "build there, or use tensorrt-rtx, which builds without one"
        )
    if set(compute_capabilities) - {own}:
        raise UserError(
            f"{tensorrt.name} builds for the GPU it is on, which has compute capability {own}, not for "
            f"{', '.join(compute_capabilities)}; build on the device that the plan is for"
        )
    if hardware_compatible and "AMPERE_PLUS" not in tensorrt.module.HardwareCompatibilityLevel.__members__:
        raise UserError(f"{tensorrt.name} has no hardware-compatible plans; leave the option out")
    return "sm_80+" if hardware_compatible else _sm(own)


def rtx_targets(tensorrt: TensorRT) -> tuple[str, ...]:
    """The compute capabilities that this TensorRT-RTX can build for: ``("7.5", "8.0", "8.6", ...)``."""
    names = tensorrt.module.ComputeCapability.__members__
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM"))


def set_targets(tensorrt: TensorRT, config: Any, compute_capabilities: tuple[str, ...]) -> None:
    """Tell the builder of TensorRT-RTX its targets, which `plan_device` has accepted."""
    targets = tuple(dict.fromkeys(compute_capabilities))
    if tensorrt.runtime != "tensorrt-rtx" or not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(tensorrt.module.ComputeCapability, _sm(target, "SM")), index)


def has_timing_cache(tensorrt: TensorRT) -> bool:
    """Whether the builder measures kernels; TensorRT-RTX chooses them on the device that runs the plan."""
    return tensorrt.runtime == "tensorrt"


def set_progress(tensorrt: TensorRT, config: Any, progress: Progress) -> None:
    """Report the builder's progress, where the version can: the phase and the fraction that is done, 0 to 1."""
    if hasattr(tensorrt.module, "IProgressMonitor"):
        config.progress_monitor = _progress_monitor(tensorrt.module, progress)


def _progress_monitor(trt: Any, progress: Progress) -> Any:
    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases lie in one another: a phase is a step of its parent."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.done: dict[str, int] = {}
            self.reported = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (parent, max(steps, 1))
            self.done[name] = 0
            self.report(name)

        def step_complete(self, name: str, step: int) -> bool:
            self.done[name] = step + 1
            self.report(name)
            return True

        def phase_finish(self, name: str) -> None:
            parent, _ = self.phases.pop(name, (None, 1))
            if parent is None:
                self.reported = 1.0
                progress(name, 1.0)

        def report(self, name: str) -> None:
            # A step is counted after its phase has finished, so the fraction could fall for a moment.
            self.reported = max(self.reported, self.fraction(name))
            progress(name, self.reported)

        def fraction(self, name: str) -> float:
            inner, at = 0.0, name
            while True:
                parent, steps = self.phases.get(at, (None, 1))
                inner = min((self.done.get(at, 0) + inner) / steps, 1.0)
                if parent is None:
                    return inner
                at = parent

    return ProgressMonitor()


def device_compute_capability() -> str | None:
    """Compute capability of the first GPU, for example ``"8.7"``; None where there is no driver or no GPU."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(str(value.value))
    return ".".join(numbers)


def _sm(compute_capability: str, prefix: str = "sm_") -> str:
    return prefix + compute_capability.replace(".", "")
