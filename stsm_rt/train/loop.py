"""The training loop: clips in, weights out; resumable after every epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stsm_rt.channel_order import order_channels
from stsm_rt.checkpoints import lite0_package_weights, load_pretrained
from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.augment import centre_boxes, crop_and_resize, random_boxes, random_indices, vary_colours
from stsm_rt.train.datasets import ClipSet, sample_indices
from stsm_rt.train.recipe import Recipe

BACKGROUND = "nothing"


def class_names(recipe: Recipe, clips: ClipSet) -> tuple[str, ...]:
    """One name per logit: the data's classes and, if the recipe asks for it, the background."""
    return (*clips.classes, BACKGROUND) if recipe.background else clips.classes


def build_network(recipe: Recipe, classes: int, pretrained: str | Path | None = None) -> StreamingNetwork:
    """The recipe's network, with ImageNet weights where it starts from them.

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
    return network


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to do.
        clips: The data.
        train: Indices of the clips to train on.
        device: Where; on CUDA the forward pass runs in bfloat16.
        pretrained: File of ImageNet weights; None: those of the Lite0 package.
        folder: Where the log and the checkpoint go; None: nowhere.
        progress: Called with (epoch, mean loss) after every epoch.

    Attributes:
        network: Being trained.
        averaged: What to keep: the exponential average of `network`, or itself.
    """

    def __init__(
        self,
        recipe: Recipe,
        clips: ClipSet,
        train: Tensor,
        *,
        device: torch.device | str = "cpu",
        pretrained: str | Path | None = None,
        folder: Path | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.clips, self.train_list = recipe, clips, train
        self.device = torch.device(device)
        self.folder, self.progress = folder, progress
        self.classes = class_names(recipe, clips)
        self.size = (recipe.height, recipe.width)
        self.source_size = (clips.frames.shape[2], clips.frames.shape[3])
        self.stride = clips.frame_rate / recipe.frame_rate
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.network = build_network(recipe, len(self.classes), pretrained).to(self.device)
        self.network = self.network.to(memory_format=torch.channels_last)
        self.epoch = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 on CUDA, nothing elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def _frames(self, chosen: Tensor, indices: Tensor) -> Tensor:
        home = self.clips.frames.device
        frames = self.clips.frames[chosen[:, None].to(home), indices.to(home)].to(self.device, non_blocking=True)
        return frames if frames.shape[-1] == 3 else frames.expand(*frames.shape[:-1], 3)

    def training_batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented clips.

        Args:
            chosen: Indices of clips (B,).

        Returns:
            Frames float (B, T, H, W, 3) in 0 to 255, target distributions (B, K), step weights (B, T) that sum to 1.
        """
        recipe, augmentation, generator = self.recipe, self.recipe.augmentation, self.generator
        count = len(chosen)
        indices, valid = random_indices(self.clips.lengths[chosen], self.stride, recipe.steps, augmentation, generator)
        labels = self.clips.labels[chosen].clone()
        still = torch.rand(count, generator=generator) < recipe.background
        if recipe.background:
            labels[still] = len(self.classes) - 1
            indices[still] = indices[still, :1]
            valid = valid | still[:, None]
        boxes = random_boxes(count, recipe.steps, self.source_size, self.size, augmentation, generator, still=still)
        flip = (torch.rand(count, generator=generator) < 0.5) if augmentation.flip else None
        frames = crop_and_resize(self._frames(chosen, indices), boxes, self.size, flip)
        frames = vary_colours(frames, augmentation, generator, still=still)
        weights = valid.float() * torch.arange(1, recipe.steps + 1)
        weights = weights / weights.sum(1, keepdim=True)
        targets = F.one_hot(labels, len(self.classes)).float()
        if augmentation.mixup:
            other = torch.randperm(count, generator=generator)
            share = torch.rand(count, generator=generator)
            share = torch.where(torch.rand(count, generator=generator) < augmentation.mixup, share, 1.0)
            targets = targets * share[:, None] + targets[other] * (1 - share[:, None])
            share = share.to(self.device).view(-1, 1, 1, 1, 1)
            frames = frames * share + frames[other.to(self.device)] * (1 - share)
        return frames, targets.to(self.device), weights.to(self.device)

    def plain_batches(self, chosen: Tensor, batch: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Whole clips as a stream sees them: (indices, frames (B, T, H, W, 3), index of the last step (B,))."""
        steps = math.ceil(self.clips.frames.shape[1] / self.stride)
        boxes = centre_boxes(1, self.source_size, self.size)
        for part in chosen.split(batch):
            indices, valid = sample_indices(self.clips.lengths[part], self.stride, steps)
            frames = crop_and_resize(self._frames(part, indices), boxes.expand(len(part), 1, 4), self.size)
            yield part, frames, valid.sum(1) - 1

    @torch.no_grad()
    def logits(self, chosen: Tensor, network: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, K) of whole clips and the index (B,) of each one's last step, on the CPU."""
        network = network or self.averaged
        network.eval()
        outputs, last = [], []
        for _, frames, end in self.plain_batches(chosen):
            with self.autocast():
                outputs.append(network(frames).float().cpu())
            last.append(end)
        return torch.cat(outputs), torch.cat(last)

    def accuracy(self, chosen: Tensor, smoothing: int = 1, network: nn.Module | None = None) -> float:
        """Top-1 at the last step, of the mean probability over the last `smoothing` steps, without the background."""
        logits, last = self.logits(chosen, network)
        probabilities = logits.softmax(-1)[..., : len(self.clips.classes)]
        hits = 0
        for p, end, label in zip(probabilities, last.tolist(), self.clips.labels[chosen].tolist(), strict=True):
            hits += int(p[max(0, end + 1 - smoothing) : end + 1].mean(0).argmax()) == label
        return hits / len(chosen)

    @torch.no_grad()
    def _head_features(self, passes: int) -> tuple[Tensor, Tensor]:
        """Features (M, F) and labels (M,) of training clips at their last steps, from augmented passes."""
        features, labels = [], []
        self.network.eval()
        for _ in range(passes):
            for part in self.train_list.split(self.recipe.batch):
                frames, targets, weights = self.training_batch(part)
                with self.autocast():
                    seen = self.network.averages.clip(self.network.clip_features(frames).float())
                last = (weights > 0).sum(1) - 1
                features.append(seen[torch.arange(len(part)), last].float())
                labels.append(targets)
        return torch.cat(features), torch.cat(labels)

    def fit_classifier(self) -> None:
        """Start the classifier from a logistic regression on the untrained backbone's features."""
        features, targets = self._head_features(2 if self.recipe.augmentation.flip else 1)
        network = self.network
        network.offset.copy_(features.mean(0))
        network.scale.copy_(1 / features.std(0).clamp(min=1e-3))
        if not self.recipe.head_l2:
            return
        standard = (features - network.offset) * network.scale
        weight = torch.zeros_like(network.classifier.weight, requires_grad=True)
        bias = torch.zeros_like(network.classifier.bias, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = F.cross_entropy(standard @ weight.T + bias, targets)
            value = value + self.recipe.head_l2 * weight.square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        with torch.no_grad():
            network.classifier.weight.copy_(weight)
            network.classifier.bias.copy_(bias)

    def _initialise(self) -> None:
        recipe, network = self.recipe, self.network
        if recipe.order_channels and network.shift is not None:
            with self.autocast():
                order_channels(
                    network.eval(), self.training_batch(self.train_list[:: len(self.train_list) // 16][:16])[0]
                )
        if recipe.pretrained:
            self.fit_classifier()

    def _prepare(self) -> None:
        recipe, network = self.recipe, self.network
        features = getattr(network.backbone, "features", None)
        for index, block in enumerate(features if isinstance(features, nn.Sequential) else ()):
            block.requires_grad_(index >= recipe.frozen_blocks)
        backbone = [p for p in network.backbone.parameters() if p.requires_grad]
        decay, plain = [p for p in backbone if p.dim() > 1], [p for p in backbone if p.dim() <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decay, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
                {"params": plain, "lr": recipe.lr, "weight_decay": 0.0},
                {
                    "params": [network.classifier.weight],
                    "lr": recipe.head_lr,
                    "weight_decay": recipe.weight_decay,
                },
                {"params": [network.classifier.bias], "lr": recipe.head_lr, "weight_decay": 0.0},
            ]
        )
        self.steps_per_epoch = max(1, len(self.train_list) // recipe.batch)
        total = self.steps_per_epoch * recipe.epochs
        rise = max(1, round(recipe.warmup * total))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda step: (
                (step + 1) / rise
                if step < rise
                else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
            ),
        )
        self.average = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
            if recipe.ema
            else None
        )

    @property
    def averaged(self) -> StreamingNetwork:
        """The network to keep."""
        average = getattr(self, "average", None)
        return average.module if average is not None else self.network

    def run(self, *, resume: bool = False) -> StreamingNetwork:
        """Train to the end.

        Args:
            resume: Go on from the checkpoint in `folder`, if there is one.

        Returns:
            The network to keep, in evaluation mode.
        """
        if not (resume and self._has_checkpoint()):
            self._initialise()
        self._prepare()
        if resume:
            self._restore()
        while self.epoch < self.recipe.epochs:
            start = time.monotonic()
            loss = self._train_epoch()
            self.epoch += 1
            if self.folder is not None:
                line = {
                    "epoch": self.epoch,
                    "loss": loss,
                    "lr": self.schedule.get_last_lr()[0],
                    "seconds": time.monotonic() - start,
                }
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                self._checkpoint()
            if self.progress:
                self.progress(self.epoch, loss)
        return self.averaged.eval()

    def _train_epoch(self) -> float:
        recipe, network = self.recipe, self.network
        network.train()
        if recipe.pretrained:
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        frozen = self.epoch < recipe.frozen_epochs
        order = self.train_list[torch.randperm(len(self.train_list), generator=self.generator)]
        total = torch.zeros((), device=self.device)
        for step in range(self.steps_per_epoch):
            frames, targets, weights = self.training_batch(order[step * recipe.batch : (step + 1) * recipe.batch])
            with self.autocast():
                with torch.set_grad_enabled(not frozen):
                    pooled = network.clip_features(frames)
                logits = network.classify(network.averages.clip(pooled.float()))
            smooth = targets * (1 - recipe.label_smoothing) + recipe.label_smoothing / targets.shape[1]
            losses = -(smooth[:, None] * logits.float().log_softmax(-1)).sum(-1)
            loss = (losses * weights).sum(1).mean()
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), recipe.max_grad_norm)
            self.optimiser.step()
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(network)
            total += loss.detach()
        mean = float(total) / self.steps_per_epoch
        if not math.isfinite(mean):
            raise UserError(f"training of {recipe.name} diverged in epoch {self.epoch + 1}; lower lr in the recipe")
        return mean

    def _state(self) -> dict:
        state = {
            "recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
        }
        return {**state, "average": self.average.state_dict()} if self.average is not None else state

    def _checkpoint(self) -> None:
        assert self.folder is not None
        partial = self.folder / "checkpoint.pt.part"
        torch.save(self._state(), partial)
        os.replace(partial, self.folder / "checkpoint.pt")

    def _has_checkpoint(self) -> bool:
        return self.folder is not None and (self.folder / "checkpoint.pt").is_file()

    def _restore(self) -> None:
        if self.folder is None or not self._has_checkpoint():
            return
        path = self.folder / "checkpoint.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != json.dumps(dataclasses.asdict(self.recipe)):
            raise UserError(f"{path} belongs to another recipe; choose another --out or leave out --resume")
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch = int(state["epoch"])
