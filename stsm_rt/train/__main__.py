"""The command ``python -m stsm_rt.train RECIPE``: a recipe and a data set in, weights out."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from stsm_rt.errors import UserError, report
from stsm_rt.model import ModelSpec, save_model
from stsm_rt.train.datasets import ClipSet, Split, hold_out, load_jhmdb, load_shrec17
from stsm_rt.train.loop import BACKGROUND, Trainer
from stsm_rt.train.negatives import add_negatives
from stsm_rt.train.recipe import Recipe, load_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        return _train(_parser().parse_args(argv))
    except UserError as error:
        return report(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stsm-rt train", description="Train a network from a recipe.")
    parser.add_argument("recipe", type=Path, help="recipe in TOML")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set that the recipe names")
    parser.add_argument("--split", type=int, default=1, help="official split (J-HMDB: 1, 2, 3)")
    parser.add_argument(
        "--hold-out",
        metavar="FOLD/FOLDS",
        help="leave this part of the training list's source groups out and report on it; without it all is trained on",
    )
    parser.add_argument(
        "--negatives", type=Path, help="folder that stsm_rt.train.negatives wrote, for the background class"
    )
    parser.add_argument("--report-test", action="store_true", help="report on the test list at the end")
    parser.add_argument("--shift", help="replaces the recipe's shift: a preset or 'none'")
    parser.add_argument("--seed", type=int, help="replaces the recipe's seed")
    parser.add_argument("--epochs", type=int, help="replaces the recipe's epochs")
    parser.add_argument("--pretrained", type=Path, help="ImageNet weights (default: the package of the network)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    return parser


def _train(options: argparse.Namespace) -> int:
    overrides = {key: getattr(options, key) for key in ("shift", "seed", "epochs") if getattr(options, key) is not None}
    recipe = load_recipe(options.recipe, **overrides)
    clips, split = _load(recipe, options.data, options.split)
    held_out = options.hold_out is not None
    if held_out:
        split = hold_out(clips, split.train, *parse_fold(options.hold_out))
    name = "-".join(
        [
            recipe.name,
            recipe.shift if isinstance(recipe.shift, str) else "custom",
            f"split{options.split}",
            f"seed{recipe.seed}",
        ]
        + ([f"fold{options.hold_out.replace('/', 'of')}"] if held_out else [])
    )
    if recipe.background:
        clips, split = add_negatives(clips, split, options.negatives)
    folder = options.out / name
    if (folder / "log.jsonl").exists() and not options.resume:
        raise UserError(f"{folder} holds a run already; give --resume to go on with it, or another --out")
    trainer = Trainer(recipe, clips, split.train, device=options.device, pretrained=options.pretrained, folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {len(split.train)} clips, {recipe.epochs} epochs on {options.device}; log and weights in {folder}")
    with tqdm(total=recipe.epochs, unit="epoch", desc=name) as bar:

        def progress(epoch: int, loss: float) -> None:
            bar.n = epoch
            bar.set_postfix(loss=f"{loss:.3f}")

        trainer.progress = progress
        network = trainer.run(resume=options.resume)
    accuracy = None
    if held_out or options.report_test:
        top1 = trainer.accuracy(split.test, recipe.decision.smoothing)
        where = f"held-out part {options.hold_out} of the training list" if held_out else "test list"
        print(f"top-1 {100 * top1:.1f} % of {len(split.test)} clips ({where})")
        accuracy = {
            "dataset": recipe.dataset,
            "split": options.split,
            "on": where,
            "clips": len(split.test),
            "top1": top1,
        }
    spec = ModelSpec(
        network=recipe.network,
        padding=network.padding,
        shift=network.shift.to_json() if network.shift is not None else None,
        rates=recipe.rates,
        changes=recipe.changes,
        labels=trainer.classes,
        background=BACKGROUND if recipe.background else None,
        height=recipe.height,
        width=recipe.width,
        frame_rate=recipe.frame_rate,
        decision=recipe.decision,
        recipe={**json.loads(json.dumps(dataclasses.asdict(recipe))), "trained_on": device_name(options.device)},
        accuracy=accuracy,
    )
    target = folder / f"{recipe.name}.safetensors"
    save_model(network.cpu(), spec, target)
    print(f"weights: {target}")
    return 0


def _load(recipe: Recipe, folder: Path, split: int) -> tuple[ClipSet, Split]:
    if recipe.dataset == "jhmdb":
        return load_jhmdb(folder, split)
    if recipe.dataset == "shrec17":
        return load_shrec17(folder)
    raise UserError(f"unknown dataset {recipe.dataset!r} in the recipe; there are jhmdb and shrec17")


def device_name(device: str) -> str:
    """The device's name and PyTorch's version, for the record."""
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else "the CPU"
    return f"{chip}, PyTorch {torch.__version__}"


def parse_fold(text: str) -> tuple[int, int]:
    """Read FOLD/FOLDS.

    Raises:
        UserError: It is something else.
    """
    try:
        fold, folds = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise UserError(f"--hold-out takes FOLD/FOLDS such as 0/3, got {text!r}") from error
    if not 0 <= fold < folds or folds < 2:
        raise UserError(f"--hold-out takes FOLD/FOLDS with 0 <= FOLD < FOLDS and FOLDS >= 2, got {text!r}")
    return fold, folds


if __name__ == "__main__":
    raise SystemExit(main())
