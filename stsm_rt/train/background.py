"""The command ``python -m stsm_rt.train.background``: fit the background's logit anew, and nothing else.

The classifier's row for the background is fitted by logistic regression on the trained network's features of training
clips and of clips without an action: the negatives, held frames, and still pictures through which patches move as
cars and passers-by do. All other rows stay, so the ranking of the actions, and with it the accuracy, does not change.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stsm_rt.errors import UserError, report
from stsm_rt.model import ModelSpec, load_model, save_model
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.__main__ import parse_fold
from stsm_rt.train.augment import Augmentation
from stsm_rt.train.datasets import ClipSet, hold_out, load_jhmdb
from stsm_rt.train.loop import Trainer
from stsm_rt.train.negatives import add_negatives
from stsm_rt.train.recipe import Recipe

_L2 = 3e-3
_STEPS = (5, 8, 11)  # of a clip, whose features are fitted


def moving_patches(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Let patches of other clips' pictures pass in straight lines through still pictures.

    Args:
        frames: (B, T, H, W, C), 0 to 255; only the first frame of each clip is used.
        generator: Of places, sizes and speeds.

    Returns:
        (B, T, H, W, C).
    """
    batch, steps, height, width, _ = frames.shape
    clips = frames[:, :1].expand(-1, steps, -1, -1, -1).clone()
    for clip in range(batch):
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            other = int(torch.randint(0, batch, (1,), generator=generator))
            size, start, speed = (torch.rand(2, generator=generator) for _ in range(3))
            h, w = ((0.15 + 0.45 * size) * torch.tensor([height, width])).int().tolist()
            top, left = (torch.rand(2, generator=generator) * torch.tensor([height - h, width - w])).int().tolist()
            patch = frames[other, 0, top : top + h, left : left + w]
            for t in range(steps):
                place = start * 1.2 - 0.1 + (speed - 0.5) * torch.tensor([0.04, 0.2]) * t
                y, x = (place * torch.tensor([height, width])).int().tolist()
                y0, y1, x0, x1 = max(y, 0), min(y + h, height), max(x, 0), min(x + w, width)
                if y0 < y1 and x0 < x1:
                    clips[clip, t, y0:y1, x0:x1] = patch[y0 - y : y1 - y, x0 - x : x1 - x]
    return clips


def _features(trainer: Trainer, train: Tensor, actions: int, passes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Standardised features and whether each is of the background."""
    network = trainer.network.eval()
    labels = trainer.clips.labels
    generator = torch.Generator().manual_seed(trainer.recipe.seed)
    batches = [part for _ in range(passes) for part in train[torch.randperm(len(train), generator=generator)].split(16)]
    for index, part in enumerate(tqdm(batches, unit="batch")):
        frames, targets, weights = trainer.training_batch(part)
        background = targets.argmax(1) == actions
        if index % 3 == 0:  # a third of the batches: pictures of actions and of none, but nobody acts
            real = labels[part] < actions
            frames[real] = moving_patches(frames, generator)[real]
            background[:] = True
            weights = torch.ones_like(weights)
        with torch.no_grad():
            seen = network.averages.clip(network.clip_features(frames))
        seen = (seen - network.offset) * network.scale
        for step in _STEPS:
            valid = weights[:, step] > 0
            yield seen[valid, step], background[valid]


def refit(network: StreamingNetwork, features: Tensor, background: Tensor, actions: int) -> None:
    """Fit the classifier's background row in place, the others fixed.

    Args:
        network: Its classifier has ``actions + 1`` rows, the background last.
        features: (M, F), standardised.
        background: bool (M,).
        actions: Number of actions.
    """
    with torch.no_grad():
        others = features @ network.classifier.weight[:actions].T + network.classifier.bias[:actions]
        rest = others.logsumexp(1)
    anchor = network.classifier.weight[actions].detach().clone()
    weight, bias = anchor.clone().requires_grad_(), network.classifier.bias[actions].detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    # Both sides count the same, however many samples each has.
    balance = torch.where(background, 0.5 / background.float().mean(), 0.5 / (~background).float().mean())

    def loss() -> Tensor:
        optimiser.zero_grad()
        logit = features @ weight + bias - rest
        fit = F.binary_cross_entropy_with_logits(logit, background.float(), weight=balance)
        value = fit + _L2 * (weight - anchor).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        network.classifier.weight[actions] = weight
        network.classifier.bias[actions] = bias


def run(network: StreamingNetwork, spec: ModelSpec, clips: ClipSet, train: Tensor, *, passes: int) -> None:
    """Refit a trained model's background on clips, in place.

    Raises:
        UserError: The model has no background.
    """
    if spec.background is None:
        raise UserError("these weights have no background to fit; train them with background > 0")
    fields = {f.name for f in dataclasses.fields(Recipe)}
    data = {key: value for key, value in spec.recipe.items() if key in fields and key != "decision"}
    data |= {"rates": tuple(data["rates"]), "augmentation": Augmentation(**data["augmentation"]), "pretrained": False}
    trainer = Trainer(Recipe(**data), clips, train)
    trainer.network = network
    samples = list(_features(trainer, train, len(clips.classes), passes))
    refit(network, torch.cat([f for f, _ in samples]), torch.cat([b for _, b in samples]), len(clips.classes))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="stsm_rt.train.background", description=__doc__)
    parser.add_argument("weights", type=Path, help="weights that stsm-rt train wrote")
    parser.add_argument("--data", type=Path, required=True, help="J-HMDB folder")
    parser.add_argument("--split", type=int, default=1)
    parser.add_argument("--hold-out", metavar="FOLD/FOLDS", help="as it was given to train")
    parser.add_argument("--negatives", type=Path, required=True, help="folder that stsm_rt.train.negatives wrote")
    parser.add_argument("--passes", type=int, default=2, help="over the training list (default: 2)")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        network, spec = load_model(options.weights)
        clips, split = load_jhmdb(options.data, options.split)
        if options.hold_out:
            split = hold_out(clips, split.train, *parse_fold(options.hold_out))
        clips, split = add_negatives(clips, split, options.negatives)
        run(network, spec, clips, split.train, passes=options.passes)
        recipe = {**spec.recipe, "background_passes": options.passes}
        save_model(network, dataclasses.replace(spec, recipe=recipe), options.out)
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
