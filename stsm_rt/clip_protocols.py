"""Evaluation of weights on clips cut from videos, by the protocols that papers report.

Views of a video are several clips in time, each cropped in several places. As in TSM's ``test_models.py``, the logits
of a clip's frames are averaged, then those of the views; the softmax of that mean gives the probabilities. (mmaction2's
configurations average the probabilities of the views instead.) The whole clip is seen at once, so that networks that
look ahead can be evaluated, too.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from stsm_rt.errors import UserError
from stsm_rt.evaluation_set import EvaluationSet
from stsm_rt.manifest import sha256_of
from stsm_rt.metrics import Predictions
from stsm_rt.model import load_model
from stsm_rt.network_cost import clip_flops, count_parameters, step_flops
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.crops import CentreCrop, ThreeCrops
from stsm_rt.train.video_clips import Sampling, VideoClips, collate, read_batches

FRAMES = 8
_RESIZE = 256 / 224  # the shorter side against the input
_CLIPS_AT_ONCE = 8


@dataclass(frozen=True)
class ClipProtocol:
    """Which views of a video are averaged.

    Attributes:
        name: As papers call it.
        clips: Clips in time.
        crops: 1: the centre, of the network's input size. 3: both ends and the middle of the longer side, squares of
            the resized shorter side ("full resolution").
        dense_span: Frames of the video that a clip spreads over; None: the whole video, in equal segments.
    """

    name: str
    clips: int
    crops: int
    dense_span: int | None = None

    def crop(self, size: int) -> CentreCrop | ThreeCrops:
        """The crop for a network whose input has this shorter side: of 224, pictures are resized to 256."""
        resize = round(size * _RESIZE)
        return CentreCrop(resize, (size, size)) if self.crops == 1 else ThreeCrops(resize, (resize, resize))


# Lin et al., TSM (ICCV 2019), and the commands in the README of its code.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (ClipProtocol("efficient", 1, 1), ClipProtocol("accurate", 2, 3), ClipProtocol("dense", 10, 3, 64))
}


def evaluate_weights(
    weights: Path,
    source: EvaluationSet,
    protocol: ClipProtocol,
    *,
    frames: int | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Evaluate weights on a data set.

    Args:
        weights: File that `save_model` wrote; the shift may look ahead.
        source: The videos.
        protocol: The views.
        frames: Of a clip; None: as many as the weights were trained with on decoded videos, or 8, as TSM has it.
        device: As torch names it.
        workers: Processes that decode; 0: this one.

    Returns:
        JSON-ready data: ``weights``, ``weights_sha256``, ``network``, ``shift``, what `EvaluationSet.to_record` gives,
        ``protocol``, ``views`` (``clips``, ``crops``, ``frames``, ``height`` and ``width`` of each, and what of them
        is averaged: ``average``), ``cost`` (``parameters``, and of a step, a view and all views of a video
        ``step_flops``, ``view_flops``, ``video_flops``), ``missing`` (videos that the annotations list and the disk
        lacks), ``unreadable`` (``file`` and ``reason`` of each video that was left out) and `Predictions.to_record`.

    Raises:
        UserError: The weights or the annotations cannot be read, they do not fit each other, or more than 1 % of the
            videos are missing or cannot be read.
    """
    network, spec = load_model(weights)
    labels = [label for label in spec.labels if label != spec.background]
    videos = source.read(labels)
    size = min(spec.height, spec.width)
    crop = protocol.crop(size)
    if frames is None:
        frames = int(spec.recipe.get("steps", FRAMES)) if spec.recipe.get("video") else FRAMES
    try:
        sampling = Sampling(frames, dense_span=protocol.dense_span, views=protocol.clips)
    except ValueError as error:
        raise UserError(f"protocol {protocol.name}: {error}; give fewer --frames") from error
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "unreadable.jsonl")
        clips = VideoClips(videos, sampling, crop, training=False, unreadable_log=log)
        network = network.to(device)
        scores, indices = predict_videos(network, clips, protocol.clips * protocol.crops, workers)
        unreadable = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    foreground = [place for place, label in enumerate(spec.labels) if label != spec.background]
    truth = np.array([videos.records[index].label for index in indices])
    height, width = crop.size
    flops = clip_flops(network, frames, height, width)
    return {
        "weights": weights.name,
        "weights_sha256": sha256_of(weights),
        "network": spec.network,
        "shift": spec.shift["name"] if spec.shift is not None else "none",
        **source.to_record(),
        "protocol": protocol.name,
        "views": {
            "clips": protocol.clips,
            "crops": protocol.crops,
            "frames": frames,
            "height": height,
            "width": width,
            "average": "logits",
        },
        "cost": {
            "parameters": count_parameters(network),
            "step_flops": step_flops(network, spec.height, spec.width),
            "view_flops": flops,
            "video_flops": flops * protocol.clips * protocol.crops,
        },
        "missing": list(videos.missing),
        "unreadable": [{"file": each["path"], "reason": each["reason"]} for each in unreadable],
        **Predictions.from_scores(scores[:, foreground], truth, labels).to_record(),
    }


@torch.inference_mode()
def predict_videos(
    network: StreamingNetwork, clips: VideoClips, views: int, workers: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Average the views of every video.

    Args:
        network: In evaluation mode.
        clips: For testing.
        views: Of a video.
        workers: Processes that decode; 0: this one.

    Returns:
        Probabilities, float32 (N, K), and the number of each video in the list, int64 (N,), without those that cannot
        be read.

    Raises:
        UserError: More videos than `clips` allows cannot be read.
    """
    # A forked worker would inherit the threads of a network that has run already, and could wait for them forever.
    loader = DataLoader(
        clips,
        batch_size=max(1, _CLIPS_AT_ONCE // views),
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    device = network.classifier.weight.device
    probabilities, indices = [], []
    for batch in read_batches(loader):
        parts = batch.frames.flatten(0, 1).split(_CLIPS_AT_ONCE)
        logits = torch.cat([network(part.to(device)).float().mean(1) for part in parts])
        probabilities.append(logits.unflatten(0, (-1, views)).mean(1).softmax(1).cpu().numpy())
        indices.append(batch.indices.numpy())
    return np.concatenate(probabilities), np.concatenate(indices)
