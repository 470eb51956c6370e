"""The training loop: clips in, weights out; on one or several processes, resumable after every epoch."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.batch_norm import synchronise, train_mode
from stsm_rt.train.batches import Batch, Step, TrainingData
from stsm_rt.train.datasets import ClipSet
from stsm_rt.train.memory_clips import MemoryClips
from stsm_rt.train.optimisation import Objective, Opaque, make_optimiser, make_schedule
from stsm_rt.train.processes import make_fabric, on_first, together, total
from stsm_rt.train.recipe import Recipe
from stsm_rt.train.run_folder import RunFolder
from stsm_rt.train.start import build_network, initialise

LOOK_EVERY = 20  # optimiser steps between looks at the loss, which make the device wait


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to do.
        data: The clips: a set in memory, or what `batches.TrainingData` describes.
        train: Of a set in memory, indices of the clips to train on.
        held_out: Clips to validate with after every epoch, as indices into the set in memory or into the held-out part
            of `data`; the best epoch's weights are kept by `save_best`. None: there is no validation.
        fabric: The processes, launched; None: this one, on `device`.
        device: Where; on CUDA the forward pass runs in bfloat16.
        accumulate: Forward and backward passes per optimiser step.
        pretrained: File of pretrained weights; None: those of the Lite0 package.
        folder: Where the log and the checkpoint go; None: nowhere.
        progress: Called with (epoch, mean loss) after every epoch, in the first process.
        on_step: Called with the number of optimiser steps done, in the first process.
        save_best: Called with (network, top-1) in the first process when an epoch validates best.

    Attributes:
        network: Being trained.
        averaged: What to keep: the exponential average of `network`, or itself.
        top1: Of the last validation, None before the first.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ClipSet | TrainingData,
        train: Tensor | None = None,
        *,
        held_out: Tensor | None = None,
        fabric: Fabric | None = None,
        device: torch.device | str = "cpu",
        accumulate: int = 1,
        pretrained: str | Path | None = None,
        folder: Path | None = None,
        progress: Callable[[int, float], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        save_best: Callable[[StreamingNetwork, float], None] | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.held_out, self.accumulate = recipe, held_out, accumulate
        self.fabric = fabric or make_fabric(device)
        self.device = self.fabric.device
        if isinstance(data, ClipSet):
            chosen = torch.arange(len(data.labels)) if train is None else train
            self.data: TrainingData = MemoryClips(recipe, data, chosen, self.device)
        else:
            self.data = data
        self.classes = self.data.classes
        self.folder = RunFolder(folder) if folder is not None else None
        self.progress, self.on_step, self.save_best = progress, on_step, save_best
        network = build_network(recipe, len(self.classes), pretrained).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fabric.strategy.precision.convert_module(self.network)
        self.steps_per_epoch = max(1, self.data.clips // recipe.batch)
        self.epoch, self.best = 0, -1.0
        self.top1: float | None = None
        self.average: AveragedModel | None = None

    @property
    def averaged(self) -> StreamingNetwork:
        """The network to keep."""
        if self.average is None:
            return self.network
        assert isinstance(self.average.module, StreamingNetwork)
        return self.average.module

    def run(self, *, resume: bool = False) -> StreamingNetwork:
        """Train to the end.

        Args:
            resume: Go on from the checkpoint in `folder`, if there is one.

        Returns:
            The network to keep, in evaluation mode.

        Raises:
            UserError: The run diverges, its data cannot be read, or its folder cannot be written.
        """
        state = None
        with together(self.fabric):
            if resume and self.folder is not None and self.fabric.is_global_zero and self.folder.has_checkpoint:
                state = self._state_to_resume(self.folder)
        state = self.fabric.broadcast(state)  # other machines may not see the folder
        if state is None:
            self._initialise()
        self._prepare()
        if state is not None:
            self._restore(state)
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.open_events(self.epoch * self.steps_per_epoch)
        try:
            while self.epoch < self.recipe.epochs:
                self._one_epoch()
        finally:
            if self.folder is not None:
                self.folder.close()
        return self.averaged.eval()

    def accuracy(self, chosen: Tensor, smoothing: int = 1, network: nn.Module | None = None) -> float:
        """Top-1 of whole clips, without the background; each process computes a part of them.

        Of a causal recipe, at the last step, of the mean probability over the last `smoothing` steps; of one whose loss
        is the consensus, of the mean of all logits.

        Args:
            chosen: As `held_out`.
            smoothing: Steps.
            network: Instead of `averaged`.

        Raises:
            UserError: No clip could be read.
        """
        network = (network or self.averaged).eval()

        @torch.no_grad()
        def logits_of(frames: Tensor) -> Tensor:
            with self.fabric.autocast():
                return network(frames.to(self.device, non_blocking=True))

        with together(self.fabric):
            part = chosen[self.fabric.global_rank :: self.fabric.world_size]
            counts = self.data.hits(logits_of, part, smoothing)
        found, read = total(self.fabric, torch.tensor(counts, dtype=torch.float32)).tolist()
        if not read:
            raise UserError(f"none of the {len(chosen)} clips to measure accuracy with can be read; check --data")
        return found / read

    def _initialise(self) -> None:
        if isinstance(self.data, MemoryClips):
            initialise(self.network, self.recipe, self.data, self.fabric.autocast)

    def _prepare(self) -> None:
        recipe, network = self.recipe, self.network
        if self.fabric.world_size > 1 and recipe.norm != "frozen":
            synchronise(network, self.device)
        optimiser = make_optimiser(recipe, network)
        self.schedule = make_schedule(recipe, optimiser, self.steps_per_epoch)
        if recipe.ema:
            self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        self.objective, self.optimiser = self.fabric.setup(Objective(network, recipe), optimiser)

    def _one_epoch(self) -> None:
        start = time.monotonic()
        loss = self._train_epoch()
        self.epoch += 1
        row: dict[str, float] = {
            "epoch": self.epoch,
            "loss": loss,
            "lr": float(self.schedule.get_last_lr()[0]),
            "seconds": time.monotonic() - start,
        }
        if self.held_out is not None:
            self.top1 = row["validation_top1"] = top1 = self.accuracy(self.held_out, self.recipe.decision.smoothing)
            if top1 > self.best:
                self.best = top1
                if (save_best := self.save_best) is not None:
                    on_first(self.fabric, lambda: save_best(self.averaged, top1))
        if (folder := self.folder) is not None:
            state = self._state()
            on_first(self.fabric, lambda: folder.save(state, row))
        if self.progress and self.fabric.is_global_zero:
            self.progress(self.epoch, loss)

    def _train_epoch(self) -> float:
        train_mode(self.network, self.recipe.norm)
        summed = torch.zeros((), device=self.device)
        for done, step in enumerate(self.data.steps(self.epoch, self.fabric, self.accumulate), 1):
            summed += self._train_step(step)
            steps = self.epoch * self.steps_per_epoch + done
            if done % LOOK_EVERY == 0 or done == self.steps_per_epoch:
                loss = float(total(self.fabric, summed)) / done
                if not math.isfinite(loss):
                    raise UserError(
                        f"training of {self.recipe.name} diverged in epoch {self.epoch + 1}; lower lr in the recipe"
                    )
                if self.folder is not None:
                    self.folder.scalar("loss", loss, steps)
            if self.on_step and self.fabric.is_global_zero:
                self.on_step(steps)
        return loss

    def _train_step(self, step: Step) -> Tensor:
        """One optimiser step; returns this process's part of the mean loss."""
        fabric, recipe = self.fabric, self.recipe
        keep = None
        if recipe.dropout:
            # Of the whole batch, so that every process draws the same numbers.
            shape = (step.size, recipe.steps, self.network.averages.out_features)
            keep = torch.empty(shape, device=self.device).bernoulli_(1 - recipe.dropout) > 0
        summed = torch.zeros((), device=self.device)
        self.optimiser.zero_grad()
        for number, part in enumerate(step.parts, 1):
            with fabric.no_backward_sync(self.objective, enabled=number < len(step.parts)):
                # Gradients of the processes are averaged, those of the parts added.
                loss = self.objective(self._opaque(part, keep, fabric.world_size / max(step.clips, 1)))
                fabric.backward(loss)
            summed += loss.detach() / fabric.world_size
        fabric.strategy.precision.unscale_gradients(self.optimiser.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), recipe.max_grad_norm)
        self.optimiser.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return summed

    def _opaque(self, part: Batch, keep: Tensor | None, scale: float) -> Opaque:
        device = self.device
        moved = Batch(
            part.frames.to(device, non_blocking=True), part.targets.to(device), part.weights.to(device), part.places
        )
        return Opaque(
            moved,
            keep[part.places.to(device)] if keep is not None else None,
            scale,
            train_backbone=self.epoch >= self.recipe.frozen_epochs,
        )

    def _state(self) -> dict[str, Any]:
        state = {
            "recipe": json.dumps(dataclasses.asdict(self.recipe)),
            "classes": list(self.classes),
            "epoch": self.epoch,
            "best": self.best,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "data": self.data.state(),
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return {**state, "average": self.average.state_dict()} if self.average is not None else state

    def _state_to_resume(self, folder: RunFolder) -> dict[str, Any]:
        state = folder.load()
        if state["recipe"] != json.dumps(dataclasses.asdict(self.recipe)):
            raise UserError(f"{folder.path} belongs to another recipe; choose another --out or leave out --resume")
        if state["classes"] != list(self.classes):
            raise UserError(f"{folder.path} was trained on other classes than --data has; choose another --out")
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.data.restore(state["data"])
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.best = int(state["epoch"]), float(state["best"])
        if self.folder is not None and self.fabric.is_global_zero:
            self.folder.write_log()
