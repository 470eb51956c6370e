"""Small networks with weights of their own, their files, and clips that no cut detector cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from stsm_rt.manifest import DecisionSpec
from stsm_rt.model import ModelSpec, save_model
from stsm_rt.networks import ARCHITECTURES, StreamingNetwork
from stsm_rt.shift import PRESETS

STSM = PRESETS["stsm_online"].to_json()
DT2 = {"name": "dt2", "groups": [{"fraction": "1/8", "dt": 2, "dh": 0, "dw": 0}]}


def small_model(
    network: str = "r8", shift: dict[str, Any] | None = STSM, size: tuple[int, int] = (48, 64), **fields: Any
) -> tuple[StreamingNetwork, ModelSpec]:
    """A network of three classes in evaluation mode, with logits of order one; `size` is height, width."""
    spec = ModelSpec(
        network=network,
        padding=ARCHITECTURES[network].padding,
        shift=shift,
        rates=(0.5, 0.1),
        changes=True,
        labels=("clap", "wave", "nothing"),
        background="nothing",
        height=size[0],
        width=size[1],
        frame_rate=10.0,
        decision=DecisionSpec(smoothing=2, threshold=0.5, release=0.3, min_steps=2),
        recipe={"name": "test"},
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.build().eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
        # Logits of order one, whatever the depth.
        noise = torch.randint(0, 256, (1, 2, *size, 3), dtype=torch.uint8)
        with torch.no_grad():
            model.classifier.weight.normal_()
            model.classifier.weight /= model(noise).abs().max()
    return model, spec


def write_model(path: Path, *arguments: Any, **fields: Any) -> Path:
    """The weights of `small_model`."""
    save_model(*small_model(*arguments, **fields), path)
    return path


def panning(count: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> npt.NDArray[np.uint8]:
    """A camera that turns over a scene of soft blobs: (count, height, width, 3)."""
    height, width = size
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 12, 3), np.uint8)
    scene = cv2.resize(coarse, (width + 2 * count, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([scene[:, 2 * i : 2 * i + width] for i in range(count)])
