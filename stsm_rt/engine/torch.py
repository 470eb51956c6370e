"""Engines that PyTorch runs, on an NVIDIA GPU as CUDA graphs or on the CPU."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stsm_rt.engine.base import Engine
from stsm_rt.engine.rings import check_stride, phases, ring_length
from stsm_rt.errors import UserError
from stsm_rt.manifest import FORMAT_VERSION, Manifest, StateSpec
from stsm_rt.model import ModelSpec
from stsm_rt.networks import StreamingNetwork

Precision = Literal["fp32", "fp16"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class TorchManifest(Manifest):
    """What a `TorchEngine` is and expects; it describes a network in memory, so it is never saved.

    ``runtime`` is ``"torch"``. ``sha256`` and ``weights_sha256`` are those of the manifest that the engine was
    given, and empty if it was given a `ModelSpec`.
    """

    def __post_init__(self) -> None:
        # No file is described: the values were checked when the manifest or the weights were read.
        pass


class TorchEngine(Engine):
    """A `StreamingNetwork` in step form, run by PyTorch with its states kept on the device.

    Every slot has buffers of its own: for a state with delay d at a stride of k a ring of k * d + 1, which change roles
    from step to step.
    On a GPU a step is one upload of the uint8 frame, one CUDA graph (captured here for every slot and phase of the
    rings) and one download of the logits into pinned memory; it allocates nothing. On the CPU the network runs eagerly.

    Args:
        network: Causal; it is copied, not changed.
        spec: The record of its weights, or the manifest of another engine made of them.
        slots: Number of streams to serve.
        stride: Steps for each delay of 1.
        device: ``"cuda"``, the current GPU, or ``"cpu"``.
        precision: Of weights, activations and states. On a GPU ``"fp32"`` is computed without TF32.

    Attributes:
        network: The engine's own copy, on its device and in its precision.

    Raises:
        UserError: If the shift looks ahead, there is no GPU, or the batch, the number of slots, the stride, the device
            or the precision cannot be served.
    """

    def __init__(
        self,
        network: StreamingNetwork,
        spec: ModelSpec | Manifest,
        *,
        slots: int = 1,
        stride: int = 1,
        device: Literal["cuda", "cpu"] = "cuda",
        precision: Precision = "fp32",
    ) -> None:
        if slots < 1:
            raise UserError(f"the number of slots must be at least 1, not {slots}")
        check_stride(stride)
        if precision not in _DTYPES:
            raise UserError(f"the precision must be {' or '.join(_DTYPES)}, not {precision!r}")
        if device not in ("cuda", "cpu"):
            raise UserError(f"the device must be cuda or cpu, not {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("this machine has no NVIDIA GPU that PyTorch can use; open the engine with device='cpu'")
        if isinstance(spec, Manifest) and spec.batch != 1:
            raise UserError(f"PyTorch serves a batch of 1, not {spec.batch}; give the number of streams as slots")
        cuda = device == "cuda"
        own = copy.deepcopy(network).eval().requires_grad_(False)
        # One call each: the stubs of PyTorch know no call with both.
        self.network = own.to(device, _DTYPES[precision]).to(memory_format=torch.channels_last)
        height, width = (
            (spec.input_height, spec.input_width) if isinstance(spec, Manifest) else (spec.height, spec.width)
        )
        states = self.network.state_specs(height, width)
        self.manifest = _manifest(network, spec, states, device, precision)
        self.slots = slots
        self.stride = stride

        classes = len(self.manifest.labels)
        # The host's side is pinned, so that the GPU reads and writes it without a copy in between.
        self._uploaded = torch.zeros((1, height, width, 3), dtype=torch.uint8, pin_memory=cuda)
        self._downloaded = torch.zeros((slots, classes), dtype=torch.float32, pin_memory=cuda)
        self._rows = [self._downloaded[slot : slot + 1] for slot in range(slots)]
        self._frame = torch.zeros_like(self._uploaded, device=device) if cuda else self._uploaded
        self._device_logits = torch.zeros((1, classes), dtype=torch.float32, device=device)
        self.frames = self._uploaded.numpy()
        self._logits = self._downloaded.numpy()

        self._rings = [_Rings(states, stride, device) for _ in range(slots)]
        self._stream = torch.cuda.Stream() if cuda else None
        self._steps = [self._replays(rings) if cuda else self._eager_steps(rings) for rings in self._rings]
        self.reset()

    def step(self, frames: npt.NDArray[np.uint8], slots: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Run one network step of each given slot; see ``Engine.step``."""
        chosen = self._checked(slots)
        self._check_frames(frames, len(chosen))
        for i, slot in enumerate(chosen):
            if frames is not self.frames:
                np.copyto(self.frames[0], frames[i])
            rings = self._rings[slot]
            run = self._steps[slot][rings.phase]
            if self._stream is None:
                run()
                self._rows[i].copy_(self._device_logits)
            else:
                with torch.cuda.stream(self._stream):
                    self._frame.copy_(self._uploaded, non_blocking=True)
                    run()
                    self._rows[i].copy_(self._device_logits, non_blocking=True)
                self._stream.synchronize()
            rings.phase = (rings.phase + 1) % len(rings.phases)
        return self._logits[: len(chosen)]

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Set the state of slots to zero; see ``Engine.reset``."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for slot in self._checked(slots):
                self._rings[slot].clear()

    @torch.no_grad()
    def _advance(self, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        logits, *following = self.network(self._frame, *read)
        for buffer, state in zip(written, following, strict=True):
            buffer.copy_(state)
        self._device_logits.copy_(logits)

    def _eager_steps(self, rings: _Rings) -> list[Callable[[], None]]:
        return [
            lambda read=read, written=written: self._advance(read, written)  # type: ignore[misc]
            for read, written in rings.phases
        ]

    def _replays(self, rings: _Rings) -> list[Callable[[], None]]:
        """Capture one CUDA graph for each phase."""
        assert self._stream is not None
        # The buffers were filled with zeros on another stream.
        torch.cuda.synchronize()
        graphs = []
        # cuDNN tries its algorithms once, in the warm-up; while capturing it finds the choice in its cache. Only
        # deterministic ones, so that slots agree bit for bit.
        with exact_convolutions():
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP_STEPS):
                    for read, written in rings.phases:
                        self._advance(read, written)
            pool = torch.cuda.graph_pool_handle()
            for read, written in rings.phases:
                graph = torch.cuda.CUDAGraph()
                # Other threads may go on using the GPU meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    self._advance(read, written)
                graphs.append(graph)
        return [graph.replay for graph in graphs]


class _Rings:
    """The state buffers of one slot, and those that a step reads and writes in each phase."""

    def __init__(self, states: Sequence[StateSpec], stride: int, device: str) -> None:
        self._buffers = {
            state.name: [_zeros(state, device) for _ in range(ring_length(state, stride))] for state in states
        }
        self.phases = [(list(read.values()), list(written.values())) for read, written in phases(self._buffers)]
        self.phase = 0

    def clear(self) -> None:
        # The phase may stay: where a ring of zeros starts makes no difference.
        for ring in self._buffers.values():
            for buffer in ring:
                buffer.zero_()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions in true FP32 (no TF32), by the fastest deterministic algorithm for their shape."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=False):
        yield


def _zeros(state: StateSpec, device: str) -> Tensor:
    layout = torch.channels_last if len(state.shape) == 4 else torch.contiguous_format
    dtype = getattr(torch, state.dtype)
    return torch.empty(state.shape, dtype=dtype, device=device, memory_format=layout).zero_()


def _manifest(
    network: StreamingNetwork,
    spec: ModelSpec | Manifest,
    states: tuple[StateSpec, ...],
    device: str,
    precision: Precision,
) -> TorchManifest:
    if isinstance(spec, Manifest):
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(Manifest)}
    else:
        fields = {
            "format_version": FORMAT_VERSION,
            "network": spec.network,
            "input_height": spec.height,
            "input_width": spec.width,
            "batch": 1,
            "frame_rate": spec.frame_rate,
            "labels": spec.labels,
            "background": spec.background,
            "decision": spec.decision,
            "sha256": "",
            "weights_sha256": "",
            "calibration": None,
            "accuracy": spec.accuracy,
        }
    fields |= {
        "runtime": "torch",
        "runtime_version": str(torch.__version__),
        "device": device,
        "precision": precision,
        "shift": network.shift.to_json() if network.shift is not None else {"name": "none", "groups": []},
        "states": states,
    }
    return TorchManifest(**fields)
