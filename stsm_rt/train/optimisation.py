"""What is minimised and how: the loss of a batch, the optimiser's groups and the schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.batch_norm import hold_parameters
from stsm_rt.train.batches import Batch
from stsm_rt.train.recipe import Recipe


class Objective(nn.Module):
    """The loss of a recipe, as a module, so that gradients of several processes meet in its backward pass.

    Args:
        network: To be trained.
        recipe: Which loss.
    """

    def __init__(self, network: StreamingNetwork, recipe: Recipe) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe

    def forward(self, batch: Opaque) -> Tensor:
        """The summed loss of a batch's clips times a scale, a scalar."""
        network, recipe = self.network, self.recipe
        with torch.set_grad_enabled(batch.train_backbone):
            pooled = network.clip_features(batch.clips.frames)
        dtype = network.classifier.weight.dtype
        features = (network.averages.clip(pooled.to(dtype)) - network.offset) * network.scale
        if batch.keep is not None:
            features = features * (batch.keep.to(dtype) / (1 - recipe.dropout))
        logits = network.classifier(features).to(dtype)
        targets, weights = batch.clips.targets, batch.clips.weights
        smooth = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing / targets.shape[1]
        if recipe.loss == "consensus":
            seen = weights > 0
            mean = (logits * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
            losses = -(smooth * mean.log_softmax(-1)).sum(-1) * seen.any(1)
        else:
            losses = (-(smooth[:, None] * logits.log_softmax(-1)).sum(-1) * weights).sum(1)
        return losses.sum() * batch.scale


class Opaque:
    """A batch on its way into `Objective`: no collection that Fabric knows, as it would round the batch's numbers.

    Attributes:
        clips: The batch.
        keep: bool (B, T, F), features of the classifier's input that dropout keeps; None: all.
        scale: Of the summed loss.
        train_backbone: Whether the backbone gets gradients.
    """

    def __init__(self, clips: Batch, keep: Tensor | None, scale: float, *, train_backbone: bool) -> None:
        self.clips, self.keep, self.scale, self.train_backbone = clips, keep, scale, train_backbone


def make_optimiser(recipe: Recipe, network: StreamingNetwork) -> Optimizer:
    """The optimiser of what is trained; what is not is marked so.

    Biases and batch norm have no weight decay; the classifier and its bias have rates of their own.
    """
    features = getattr(network.backbone, "features", None)
    if recipe.frozen_blocks and not isinstance(features, nn.Sequential):
        raise UserError(f"frozen_blocks counts the blocks of mbv2 and lite0, {recipe.network} has none; leave it out")
    for index, block in enumerate(features if isinstance(features, nn.Sequential) else ()):
        block.requires_grad_(index >= recipe.frozen_blocks)
    hold_parameters(network, recipe.norm)
    backbone = [p for p in network.backbone.parameters() if p.requires_grad]
    decay = recipe.weight_decay
    rows = (
        ([p for p in backbone if p.dim() > 1], recipe.lr, decay),
        ([p for p in backbone if p.dim() <= 1], recipe.lr, 0.0),
        ([network.classifier.weight], recipe.head_lr, decay),
        ([network.classifier.bias], recipe.head_bias_lr or recipe.head_lr, 0.0),
    )
    groups = [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in rows]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum)
    return torch.optim.AdamW(groups)


def make_schedule(recipe: Recipe, optimiser: Optimizer, steps_per_epoch: int) -> LambdaLR:
    """The recipe's schedule, one value per optimiser step."""
    steps = steps_per_epoch * recipe.epochs
    rise = max(1, round(recipe.warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        if recipe.schedule == "steps":
            return recipe.lr_decay ** sum(step >= epoch * steps_per_epoch for epoch in recipe.milestones)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return LambdaLR(optimiser, factor)
