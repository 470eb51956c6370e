"""Which channels a shift moves: a permutation that changes nothing but their numbers.

A shift takes the first channels of a layer. In a pretrained network those are arbitrary, and moving one that carries a
lot does harm before any training. `order_channels` renumbers the channels of every residual stream so that the first
are those whose displacement changes the next convolution's output least; the plain network computes what it did.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork


def order_channels(network: StreamingNetwork, clip: Tensor) -> None:
    """Renumber the channels of a network of inverted residuals (mbv2, lite0), in place.

    The cost of moving channel c by one step along an axis is taken as the mean square of its change along that axis
    times the squared norm of the weights that read it, summed over the axes that the shift uses.

    Args:
        network: Pretrained, with a shift.
        clip: (N, T, H, W, 3), typical frames to measure the changes on.

    Raises:
        UserError: The network has no shift or no inverted residuals.
    """
    blocks = getattr(network.backbone, "features", None)
    if network.shift is None or not isinstance(blocks, nn.Sequential):
        raise UserError(f"channels can be ordered in mbv2 and lite0 with a shift, not in {network.name} as it is")
    readers = [next(m for m in block.modules() if isinstance(m, nn.Conv2d)) for block in blocks]
    axes = {axis for g in network.shift.groups for axis, d in ((1, g.dt), (3, g.dh), (4, g.dw)) if d}
    start = 1
    while start < len(blocks) - 1:
        stop = start + 1
        while stop < len(blocks) - 1 and getattr(blocks[stop], "use_res_connect", False):
            stop += 1
        if stop > start + 1:
            cost = _cost(network, readers[start + 1 : stop], axes, clip)
            _permute(list(blocks)[start:stop], readers[start + 1 : stop + 1], cost.argsort())
        start = stop


def _cost(network: StreamingNetwork, readers: list[nn.Conv2d], axes: set[int], clip: Tensor) -> Tensor:
    costs: list[Tensor] = []

    def measure(module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].float().unflatten(0, clip.shape[:2])
        change = sum(torch.diff(x, dim=axis).square().mean((0, 1, 3, 4)) for axis in axes)
        costs.append(change * module.get_parameter("weight").square().sum((0, 2, 3)))

    # Measured before the shift's own hook, on the stream as it is.
    handles = [reader.register_forward_pre_hook(measure, prepend=True) for reader in readers]
    try:
        with torch.no_grad():
            network.clip_features(clip)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(costs).sum(0)


@torch.no_grad()
def _permute(writers: list[nn.Module], readers: list[nn.Conv2d], order: Tensor) -> None:
    for block in writers:
        projection = block.get_submodule("conv")
        assert isinstance(projection, nn.Sequential)
        for tensor in itertools.chain(
            projection[-2].parameters(), projection[-1].parameters(), projection[-1].buffers()
        ):
            if tensor.dim():  # not the count of batches
                tensor.copy_(tensor[order].clone())
    for reader in readers:
        reader.weight.copy_(reader.weight[:, order].clone())
