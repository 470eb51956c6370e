"""Torch-TensorRT and ModelOpt on a machine without an NVIDIA driver.

TensorRT-RTX builds plans without a GPU. Torch-TensorRT does not know that and asks torch.cuda for a device when it is
imported and when it compiles; ModelOpt quantizes in an exportable way on a GPU only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MEMORY = 8 << 30

# What Torch-TensorRT asks while it is imported and while it compiles. The compute capability decides about Tegra only;
# what a plan is built for is set in TensorRT's builder.
_ANSWERS = {
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (8, 6),
    "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
}


@contextmanager
def device_queries_answered() -> Iterator[None]:
    """Answer the queries about a device where there is none; it does nothing where torch.cuda is available.

    Nothing else changes: what would run on a GPU still fails. The queries are as before when the block is left.
    """
    with _replaced(torch.cuda, {} if torch.cuda.is_available() else _ANSWERS):
        yield


@contextmanager
def exportable_quantizers(device: torch.device) -> Iterator[None]:
    """Let ModelOpt's quantizers export to ``tensorrt::quantize_op`` from the CPU, too.

    Args:
        device: Where the network is; on a GPU nothing needs to change.
    """
    from modelopt.torch.quantization import tensor_quant

    # The fallback for the CPU, which torch.export cannot trace, but which computes what the op should.
    fallback: Any = tensor_quant._tensor_quant

    def compute(
        inputs: torch.Tensor, amax: torch.Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> torch.Tensor:
        return fallback(inputs, amax, num_bits, unsigned, narrow_range).to(inputs.dtype)

    def emit(
        inputs: torch.Tensor, amax: torch.Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
    ) -> torch.Tensor:
        return torch.ops.tensorrt.quantize_op(inputs, amax, num_bits, 0, unsigned, narrow_range)

    answers = {"fake_quant_impl": compute, "_tensor_quant": emit}
    with _replaced(tensor_quant, answers if device.type == "cpu" else {}):
        yield


@contextmanager
def _replaced(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
