"""Where a run starts: pretrained weights, the order of channels, and the classifier."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stsm_rt.channel_order import order_channels
from stsm_rt.checkpoints import lite0_package_weights, load_pretrained
from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.memory_clips import MemoryClips
from stsm_rt.train.recipe import Recipe


def build_network(recipe: Recipe, classes: int, pretrained: str | Path | None = None) -> StreamingNetwork:
    """The recipe's network, with pretrained weights where it starts from them.

    Args:
        recipe: The recipe.
        classes: Number of logits.
        pretrained: File of the weights to start from; None: those of the Lite0 package.

    Raises:
        UserError: The weights are missing or another network's.
    """
    network = StreamingNetwork(
        recipe.network,
        classes,
        shift=recipe.shift_spec(),
        rates=recipe.rates,
        changes=recipe.changes,
        dropout=recipe.dropout,
    )
    if recipe.pretrained:
        if pretrained is None and recipe.network != "lite0":
            raise UserError(
                f"recipe {recipe.name} starts from ImageNet weights of {recipe.network}: give --pretrained FILE"
            )
        load_pretrained(network, pretrained or lite0_package_weights())
    if recipe.head_std:
        nn.init.normal_(network.classifier.weight, 0, recipe.head_std)
        nn.init.zeros_(network.classifier.bias)
    return network


def initialise(
    network: StreamingNetwork, recipe: Recipe, data: MemoryClips, autocast: Callable[[], AbstractContextManager]
) -> None:
    """Order the channels and fit the classifier to a data set in memory, as the recipe says."""
    if recipe.order_channels and network.shift is not None:
        with autocast():
            chosen = data.train_list[:: len(data.train_list) // 16][:16]
            order_channels(network.eval(), data.training_batch(chosen)[0])
    if recipe.pretrained and not recipe.head_std:
        fit_classifier(network, recipe, data, autocast)


@torch.no_grad()
def fit_classifier(
    network: StreamingNetwork, recipe: Recipe, data: MemoryClips, autocast: Callable[[], AbstractContextManager]
) -> None:
    """Standardise the classifier's input and start it from a logistic regression on the untrained backbone's features.

    The features are those of augmented training clips at their last steps.
    """
    kept, labels = [], []
    network.eval()
    for _ in range(2 if recipe.augmentation.flip else 1):
        for part in data.train_list.split(recipe.batch):
            frames, targets, weights = data.training_batch(part)
            with autocast():
                seen = network.averages.clip(network.clip_features(frames).to(network.classifier.weight.dtype))
            last = (weights > 0).sum(1) - 1
            kept.append(seen[torch.arange(len(part)), last].to(network.classifier.weight.dtype))
            labels.append(targets)
    features, targets = torch.cat(kept), torch.cat(labels)
    network.offset.copy_(features.mean(0))
    network.scale.copy_(1 / features.std(0).clamp(min=1e-3))
    if recipe.head_l2:
        _regress(network, (features - network.offset) * network.scale, targets.to(features.dtype), recipe.head_l2)


@torch.enable_grad()
def _regress(network: StreamingNetwork, features: Tensor, targets: Tensor, strength: float) -> None:
    weight = torch.zeros_like(network.classifier.weight, requires_grad=True)
    bias = torch.zeros_like(network.classifier.bias, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, targets) + strength * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        network.classifier.weight.copy_(weight)
        network.classifier.bias.copy_(bias)
