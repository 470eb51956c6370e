"""Batch norm in training: which layers are trained, and statistics of a batch that several processes hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


def norm_layers(network: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers, in order."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def hold_parameters(network: nn.Module, norm: str) -> None:
    """Keep weights and biases from training where TSM's partial batch norm does: in all layers but the first."""
    for layer in norm_layers(network)[1:] if norm == "partial" else []:
        layer.requires_grad_(False)


def train_mode(network: nn.Module, norm: str) -> None:
    """Set training mode; statistics are taken from the batch in all layers, in the first or in none.

    Args:
        network: Any.
        norm: "train", "partial" or "frozen".
    """
    network.train()
    held = {"train": [], "partial": norm_layers(network)[1:], "frozen": norm_layers(network)}[norm]
    for layer in held:
        layer.eval()


def synchronise(network: nn.Module, device: torch.device) -> None:
    """Let batch norm layers see the batch of all processes; parameters stay the same tensors."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, SynchronisedBatchNorm2d.of(child))


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is the gradient's."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batch of all processes, on processors: PyTorch's SyncBatchNorm knows GPUs only.

    Mean and variance are those of Ioffe and Szegedy, 2015, in two passes; the running variance is the unbiased one, as
    in `torch.nn.BatchNorm2d`.
    """

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> SynchronisedBatchNorm2d:
        """A layer with the same parameters and buffers."""
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        new._parameters.update(layer._parameters)
        new._buffers.update(layer._buffers)
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not self.training:
            return super().forward(input)
        kind, input = input.dtype, input.to(torch.promote_types(input.dtype, torch.float32))
        count = torch.tensor(float(input.numel() // input.shape[1]), dtype=input.dtype)
        dist.all_reduce(count)
        mean = _Sum.apply(input.sum((0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * count / (count - 1), rate)
        scale = (variance + self.eps).rsqrt()
        return (centred * (scale * self.weight)[:, None, None] + self.bias[:, None, None]).to(kind)
