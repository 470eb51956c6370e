"""The protocol that every runtime's engine follows."""

from __future__ import annotations

import abc
import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError
from stsm_rt.manifest import Manifest

if TYPE_CHECKING:
    from stsm_rt.model import ModelSpec
    from stsm_rt.networks import StreamingNetwork

_EMBEDDED = "actions_lite0_fp32.onnx"


class Engine(abc.ABC):
    """A network in step form whose state stays inside.

    A slot is one stream with a state of its own. An engine must not be stepped or reset from two threads at once: those
    that share one hold ``turn`` meanwhile, and until they have looked at the logits.

    Attributes:
        manifest: What the engine is and expects.
        slots: Number of streams that the engine serves, numbered from 0.
        stride: Steps for each delay of 1: a state that is to be read d frames later is read ``d * stride`` steps later.
        frames: The bound input, uint8 (batch, input_height, input_width, 3), BGR. Fill it and pass this very
            array to ``step``, and no copy is made.

    Example:
        >>> engine = Engine.open("actions.onnx")  # doctest: +SKIP
        >>> engine.frames[0] = picture  # doctest: +SKIP
        >>> logits = engine.step(engine.frames)  # doctest: +SKIP
    """

    manifest: Manifest
    slots: int
    stride: int = 1
    frames: npt.NDArray[np.uint8]

    @staticmethod
    def open(
        path: str | os.PathLike[str] | None = None, *, slots: int = 1, threads: int | None = None, stride: int = 1
    ) -> Engine:
        """Open an engine file with the runtime that its manifest names.

        Args:
            path: The engine file, with its manifest beside it; None means the embedded engine. Weights
                (``.safetensors``) are run by PyTorch: on the GPU if there is one, else on the processor.
            slots: Number of streams to serve.
            threads: Threads of the processor that one step may use; None means one for each physical core of this
                process. An engine on a GPU has no use for them.
            stride: Steps for each delay of 1. With k, an engine that is given every frame of a source k times as fast
                as the model gives the logits that k engines would give that are fed in turn. It takes k times the
                memory for states.

        Returns:
            The engine, with every slot's state at zero.

        Raises:
            UserError: If the file or its manifest is absent, damaged or does not match the other, its runtime is not
                installed, a number is not positive, or a batch above 1 is to have a stride above 1.
        """
        path = embedded_engine() if path is None else Path(path)
        if path.suffix == ".safetensors":
            return _open_weights(path, slots, stride)
        runtime = Manifest.load(path).runtime
        if runtime == "onnx":
            raise UserError(
                f"{path} is a graph for TensorRT and no engine yet; build one on the device that will run it with "
                f"python -m stsm_rt.build_engine {path}"
            )
        if runtime == "openvino":
            from stsm_rt.engine.openvino import OpenVINOEngine

            return OpenVINOEngine(path, slots=slots, threads=threads, stride=stride)
        if runtime == "onnxruntime":
            from stsm_rt.engine.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(path, slots=slots, threads=threads, stride=stride)
        from stsm_rt.engine.tensorrt import TensorRTEngine

        return TensorRTEngine(path, slots=slots, stride=stride)

    @functools.cached_property
    def turn(self) -> threading.Lock:
        """The lock of those who share the engine."""
        return threading.Lock()

    @abc.abstractmethod
    def step(self, frames: npt.NDArray[np.uint8], slots: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Run one network step of each given slot.

        Args:
            frames: uint8 (n, input_height, input_width, 3), BGR, contiguous or not; one frame per slot.
            slots: The n different slots that the frames belong to; None means all slots in order.

        Returns:
            Logits, float32 (n, classes), row i for ``slots[i]``: a view of a buffer that the next step
            overwrites, so copy what you keep.

        Raises:
            UserError: If the frames have another shape or dtype, their number differs from the slots', or a
                slot does not exist or is given twice. No slot has been stepped then.
        """

    @abc.abstractmethod
    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Set the state of slots to zero, as if no frame had been seen; other slots keep theirs.

        Args:
            slots: The slots; None means all.

        Raises:
            UserError: If a slot does not exist or is given twice. No slot has been reset then.
        """

    def _checked(self, slots: Sequence[int] | None) -> Sequence[int]:
        """The slots that are meant, all of them where None is given."""
        if slots is None:
            return range(self.slots)
        for slot in slots:
            if not isinstance(slot, (int, np.integer)) or not 0 <= slot < self.slots:
                raise UserError(
                    f"the engine has {self.slots} slot{'s' if self.slots > 1 else ''}, numbered from 0; "
                    f"slot {slot!r} does not exist, open the engine with more slots"
                )
        if len(set(slots)) != len(slots):
            raise UserError(f"each slot makes one step at a time, but {list(slots)} names one twice")
        return slots

    def _check_frames(self, frames: npt.NDArray[np.uint8], count: int) -> None:
        given = (frames.dtype, frames.shape) if isinstance(frames, np.ndarray) else None
        if given is None or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self.frames.shape[1:]:
            came = f"{given[0]} {given[1]}" if given else type(frames).__name__
            raise UserError(
                f"frames must be a uint8 array of shape {(count, *self.frames.shape[1:])}, not {came}; "
                "resize the frames and add the first dimension"
            )
        if len(frames) != count:
            raise UserError(
                f"step needs one frame for each slot, but came {len(frames)} frame(s) for {count} slot(s); "
                "name the slots that the frames belong to"
            )


def _open_weights(path: Path, slots: int, stride: int) -> Engine:
    network, spec = _load_weights(path)
    import torch

    from stsm_rt.engine.torch import TorchEngine

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchEngine(network, spec, slots=slots, stride=stride, device=device)


def _load_weights(path: Path) -> tuple[StreamingNetwork, ModelSpec]:
    try:
        import torch  # noqa: F401, the package to name if it is not there

        from stsm_rt.model import load_model
    except ModuleNotFoundError as error:
        raise UserError(
            f"weights are run by PyTorch, but {error.name} is not installed; run: pip install 'stsm-rt[train]'"
        ) from error
    return load_model(path)


def frame_rate_of(path: str | os.PathLike[str] | None = None) -> float:
    """Return the model steps per second of source time that an engine file expects, without opening it.

    Args:
        path: As ``Engine.open`` takes it.

    Raises:
        UserError: As ``Engine.open`` does where the file or its manifest is not right.
    """
    path = embedded_engine() if path is None else Path(path)
    if path.suffix == ".safetensors":
        return _load_weights(path)[1].frame_rate
    return Manifest.load(path).frame_rate


def shipped_folder(name: str) -> Path | None:
    """The folder ``engines`` or ``calibration`` that comes with stsm-rt.

    In an installed package it lies in ``stsm_rt``, in a checkout beside it; None if it is absent.
    """
    package = Path(__file__).resolve().parent.parent
    return next((folder for folder in (package / name, package.parent / name) if folder.is_dir()), None)


def embedded_engine() -> Path:
    """Return the path of the engine that comes with stsm-rt.

    Raises:
        UserError: If the file is absent.
    """
    folder = shipped_folder("engines")
    if folder is not None and (folder / _EMBEDDED).is_file():
        return folder / _EMBEDDED
    raise UserError(
        f"the embedded engine {_EMBEDDED} is not in this installation; install the stsm-rt wheel, "
        "take a complete checkout, or give the path of an engine"
    )
