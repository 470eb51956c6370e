"""A recipe: everything that decides what a training run produces, as data."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec
from stsm_rt.shift import ShiftSpec, shift_spec
from stsm_rt.train.augment import Augmentation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


OPTIMISERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "steps")
LOSSES = ("steps", "consensus")
BATCH_NORMS = ("train", "partial", "frozen")
SAMPLINGS = ("segments", "dense", "stream")


@dataclass(frozen=True)
class VideoInput:
    """How clips are cut out of a set of videos that are decoded while training; the table ``[video]`` of a recipe.

    Attributes:
        sampling: "segments" (one frame of each of `Recipe.steps` equal parts of the video), "dense" (the same, of a
            random window of `dense_span` frames) or "stream" (`Recipe.steps` frames at `Recipe.frame_rate`, as a
            camera gives them).
        dense_span: Length of the window, in frames of the video.
        short_side: To which the shorter side is brought before the centre crop of a validation clip, pixels.
        crop_scales: Of MultiScaleCrop, as shares of the shorter side.
        flip: Whether half of the clips are mirrored.
        unreadable: Share of the list that may be unreadable; more ends the run.
    """

    sampling: str
    dense_span: int = 64
    short_side: int = 256
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: bool = True
    unreadable: float = 0.01

    def __post_init__(self) -> None:
        _one_of("sampling", self.sampling, SAMPLINGS)
        for name in ("dense_span", "short_side"):
            _check(name, value := getattr(self, name), value >= 1, "at least 1")
        _check("unreadable", self.unreadable, 0 <= self.unreadable <= 1, "a share from 0 to 1")
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            raise ValueError(f"crop_scales are shares above 0 and up to 1, got {list(self.crop_scales)}")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: Of the run and of the files it writes.
        dataset: A set that is held in memory, "jhmdb" or "shrec17"; with a table ``[video]`` one that
            `annotations.load_videos` reads.
        network: One of `networks.ARCHITECTURES`.
        shift: A preset's name, "none", or a table of groups.
        height: Of the network's input, pixels.
        width: Of the network's input, pixels.
        frame_rate: Steps per second of source time, of the engine that the weights become; training itself uses it
            where clips are streams (sets in memory, sampling "stream").
        steps: Frames of a training clip; TSM's segments.
        epochs: Passes over the training list, those with a frozen backbone included.
        batch: Clips per optimiser step, of all processes and accumulation steps together.
        rates: Of the classifier's running averages, fastest first.
        changes: Whether the classifier sees the running average of absolute changes.
        pretrained: Start from given weights of the backbone: those of the Lite0 package or ``--pretrained FILE``.
        batch_norm: "train" (statistics and parameters are trained; statistics of the batch of all processes, but each
            pass of ``--accumulate`` has its own), "partial" (TSM's: the first layer is trained, the others stay as they
            are, parameters included) or "frozen" (statistics stay, parameters are trained); None: "frozen" if
            `pretrained`, else "train".
        loss: Cross entropy of each step's logits, weighted towards the end of the clip ("steps", for causal
            recipes), or of the mean of the steps' logits ("consensus", TSM's).
        order_channels: Renumber the channels so that the shift moves those where it does least harm.
        frozen_epochs: Epochs at the start that train the classifier alone.
        frozen_blocks: Leading children of the backbone's `features` that are never trained.
        optimiser: "adamw" (decoupled weight decay) or "sgd" (with momentum, weight decay in the gradient).
        momentum: Of sgd.
        lr: Peak learning rate of the backbone.
        head_lr: Peak learning rate of the classifier; TSM: 5 times `lr`.
        head_bias_lr: Of the classifier's bias; TSM: 10 times `lr`; 0: `head_lr`.
        weight_decay: Of matrices and kernels; biases and batch norm have none.
        head_std: Standard deviation of the random weights that the classifier starts from, its bias being 0; TSM:
            0.001; 0: PyTorch's own start.
        head_l2: Strength of the L2 term of the logistic regression that the classifier starts from; 0: no such start.
        warmup: Share of the optimiser steps with a rising rate.
        schedule: After the rise: "cosine" (to 0) or "steps" (by `lr_decay` at each of `milestones`).
        milestones: Epochs after which the rate falls.
        lr_decay: Factor at each milestone.
        label_smoothing: Of the cross entropy.
        dropout: Of the classifier's input.
        ema: Decay per optimiser step of the averaged weights that are kept; 0: none.
        background: Share of each batch that is turned into clips where nothing happens; 0: there is no
            background class.
        max_grad_norm: Gradients are clipped to it; TSM: 20.
        seed: Of weights, order and augmentation.
        augmentation: Of sets in memory; see `Augmentation`.
        video: Of sets that are decoded while training; see `VideoInput`.
        decision: How logits become a decision; chosen on held-out source groups.
    """

    name: str
    dataset: str
    network: str
    shift: str | dict[str, Any]
    height: int
    width: int
    frame_rate: float
    steps: int
    epochs: int
    batch: int
    rates: tuple[float, ...] = ()
    changes: bool = False
    pretrained: bool = True
    batch_norm: str | None = None
    loss: str = "steps"
    order_channels: bool = False
    frozen_epochs: int = 0
    frozen_blocks: int = 0
    optimiser: str = "adamw"
    momentum: float = 0.9
    lr: float = 1e-4
    head_lr: float = 1e-3
    head_bias_lr: float = 0.0
    weight_decay: float = 0.05
    head_std: float = 0.0
    head_l2: float = 0.0
    warmup: float = 0.1
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    lr_decay: float = 0.1
    label_smoothing: float = 0.1
    dropout: float = 0.3
    ema: float = 0.0
    background: float = 0.0
    max_grad_norm: float = 5.0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    video: VideoInput | None = None
    decision: DecisionSpec = field(
        default_factory=lambda: DecisionSpec(smoothing=3, threshold=0.5, release=0.3, min_steps=3)
    )

    def __post_init__(self) -> None:
        _one_of("optimiser", self.optimiser, OPTIMISERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("loss", self.loss, LOSSES)
        _one_of("batch_norm", self.batch_norm, (*BATCH_NORMS, None))
        for name in ("height", "width", "steps", "epochs", "batch"):
            _check(name, value := getattr(self, name), value >= 1, "at least 1")
        for name in ("frame_rate", "lr", "head_lr", "max_grad_norm"):
            _check(name, value := getattr(self, name), 0 < value < math.inf, "a positive number")
        for name in ("dropout", "ema", "momentum", "label_smoothing"):
            _check(name, value := getattr(self, name), 0 <= value < 1, "at least 0 and below 1")
        for name in ("warmup", "background"):
            _check(name, value := getattr(self, name), 0 <= value <= 1, "a share from 0 to 1")
        for name in ("seed", "frozen_epochs", "frozen_blocks", "head_bias_lr", "weight_decay", "head_std", "head_l2"):
            _check(name, value := getattr(self, name), 0 <= value < math.inf, "at least 0")
        if not self.name or self.name != Path(self.name).name:
            raise ValueError(f"name becomes part of the names of files, got {self.name!r}")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("schedule 'steps' needs milestones, such as [20, 40]")
        if self.head_l2 and self.head_std:
            raise ValueError("the classifier starts from head_l2 or from head_std, not from both; leave one out")
        for name in ("background", "head_l2", "order_channels") if self.video else ():
            if getattr(self, name):
                raise ValueError(f"{name} needs a data set that is held in memory; leave it out beside [video]")

    @property
    def norm(self) -> str:
        """What becomes of batch norm: "train", "partial" or "frozen"."""
        return self.batch_norm or ("frozen" if self.pretrained else "train")

    def shift_spec(self) -> ShiftSpec | None:
        """The shift, or None for the plain network.

        Raises:
            ShiftError: It is not a preset or not a valid table.
        """
        if isinstance(self.shift, dict):
            return ShiftSpec.from_json({"name": "custom", **self.shift})
        return None if self.shift == "none" else shift_spec(self.shift)


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a recipe.

    Args:
        path: A TOML file whose keys are the fields of `Recipe`.
        **overrides: Fields that replace those of the file.

    Raises:
        UserError: No such file, not TOML, or a key that is unknown, missing or of the wrong type.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"recipe not found: expected a TOML file, got {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a recipe in TOML: {error}") from error
    if "video" in data and "augmentation" in data:
        raise UserError(f"{path}: [augmentation] is for sets held in memory, [video] for the others; leave one out")
    for name, kind in (("augmentation", Augmentation), ("video", VideoInput), ("decision", DecisionSpec)):
        if name in data:
            data[name] = _build(kind, data[name], f"{path} [{name}]")
    return _build(Recipe, {**data, **overrides}, str(path))


def _one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(a for a in allowed if a)}, got {value!r}")


def _check(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {expected}, got {value:g}")


def _build(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a table of keys, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(data.keys() - fields.keys()):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; the keys are {', '.join(fields)}")
    no_default = (dataclasses.MISSING, dataclasses.MISSING)
    required = [n for n, f in fields.items() if (f.default, f.default_factory) == no_default]
    if missing := [name for name in required if name not in data]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing")
    values = {}
    for name, value in data.items():
        expected = str(fields[name].type)
        if expected == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(value, list):
            value = tuple(value)
        if expected.startswith("tuple["):
            numbers = (int,) if "int" in expected else (int, float)
            if not isinstance(value, tuple) or any(type(number) not in numbers for number in value):
                raise UserError(f"{where}: {name} is a list of numbers, got {data[name]!r}")
        if expected in ("float", "int", "bool", "str") and type(value).__name__ != expected:
            raise UserError(f"{where}: {name} is {expected}, got {value!r}")
        values[name] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
