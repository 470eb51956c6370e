"""A recipe: everything that decides what a training run produces, as data."""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: Of the run and of the files it writes.
        dataset: "jhmdb" or "shrec17".
        network: One of `networks.ARCHITECTURES`.
        shift: A preset's name, "none", or a table of groups.
        height: Of the network's input, pixels.
        width: Of the network's input, pixels.
        frame_rate: Steps per second of source time.
        steps: Frames of a training clip.
        epochs: Passes over the training list, those with a frozen backbone included.
        batch: Clips per optimiser step.
        rates: Of the classifier's running averages, fastest first.
        changes: Whether the classifier sees the running average of absolute changes.
        pretrained: Start from ImageNet weights; batch norm statistics then stay frozen.
        order_channels: Renumber the channels so that the shift moves those where it does least harm.
        frozen_epochs: Epochs at the start that train the classifier alone.
        frozen_blocks: Leading children of the backbone's `features` that are never trained.
        lr: Peak learning rate of the backbone, AdamW.
        head_lr: Peak learning rate of the classifier.
        weight_decay: Decoupled.
        head_l2: Strength of the L2 term of the logistic regression that the classifier starts from; 0: no such start.
        warmup: Share of the optimiser steps with a rising rate.
        label_smoothing: Of the cross entropy.
        dropout: Of the classifier's input.
        ema: Decay per optimiser step of the averaged weights that are kept; 0: none.
        background: Share of each batch that is turned into clips where nothing happens; 0: there is no
            background class.
        max_grad_norm: Gradients are clipped to it.
        seed: Of weights, order and augmentation.
        augmentation: See `Augmentation`.
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
    order_channels: bool = False
    frozen_epochs: int = 0
    frozen_blocks: int = 0
    lr: float = 1e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    head_l2: float = 0.0
    warmup: float = 0.1
    label_smoothing: float = 0.1
    dropout: float = 0.3
    ema: float = 0.0
    background: float = 0.0
    max_grad_norm: float = 5.0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    decision: DecisionSpec = field(
        default_factory=lambda: DecisionSpec(smoothing=3, threshold=0.5, release=0.3, min_steps=3)
    )

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
        data = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"recipe not found: expected a TOML file, got {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a recipe in TOML: {error}") from error
    augmentation = _build(Augmentation, data.pop("augmentation", {}), f"{path} [augmentation]")
    if "decision" in data:
        data["decision"] = _build(DecisionSpec, data["decision"], f"{path} [decision]")
    return _build(Recipe, {**data, **overrides, "augmentation": augmentation}, str(path))


def _build(kind: Any, data: dict[str, Any], where: str) -> Any:
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
        if expected in ("float", "int", "bool", "str") and type(value).__name__ != expected:
            raise UserError(f"{where}: {name} is {expected}, got {value!r}")
        values[name] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
