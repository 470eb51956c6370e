"""What a network computes and holds, in clip form and in step form.

FLOPs are those of `torch.utils.flop_counter`: 2 for each multiply-add of a convolution or a matrix product, nothing
else. Many papers, TSM's among them, call a multiply-add one FLOP: halve these to compare.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stsm_rt.networks import StreamingNetwork
from stsm_rt.shift import ShiftError


def count_parameters(network: StreamingNetwork) -> int:
    """Number of learned weights."""
    return sum(parameter.numel() for parameter in network.parameters())


def clip_flops(network: StreamingNetwork, frames: int, height: int, width: int) -> int:
    """FLOPs of a clip.

    Args:
        network: In evaluation mode.
        frames: Of the clip.
        height: Of the pictures, pixels.
        width: Of the pictures, pixels.
    """
    return _flops(network, torch.zeros(1, frames, height, width, 3, dtype=torch.uint8))


def step_flops(network: StreamingNetwork, height: int, width: int) -> int | None:
    """FLOPs of one step of a stream; None where the network looks ahead and has no step.

    Args:
        network: In evaluation mode.
        height: Of the frame, pixels.
        width: Of the frame, pixels.
    """
    try:
        state = network.initial_state(height, width)
    except ShiftError:
        return None
    return _flops(network, torch.zeros(1, height, width, 3, dtype=torch.uint8), *state)


def _flops(network: StreamingNetwork, *inputs: Tensor) -> int:
    device = network.classifier.weight.device
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake, FlopCounterMode(display=False) as counter:
        network(*(fake.from_tensor(each.to(device)) for each in inputs))
    return int(counter.get_total_flops())
