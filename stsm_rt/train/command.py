"""The command ``stsm-rt train RECIPE``: a recipe and a data set in, weights out.

With a folder in place of the recipe it trains on own actions: see `own_actions`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from stsm_rt.errors import UserError, report
from stsm_rt.model import ModelSpec, save_model
from stsm_rt.networks import StreamingNetwork
from stsm_rt.train.loop import Trainer
from stsm_rt.train.memory_clips import BACKGROUND
from stsm_rt.train.processes import PRECISIONS, leave, make_fabric, on_first, reports_errors, together
from stsm_rt.train.recipe import Recipe, load_recipe
from stsm_rt.train.run_data import load_memory, load_video_set, parse_fold
from stsm_rt.train.run_folder import LOG, MISSING, RunFolder, has_tensorboard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and Path(arguments[0]).is_dir():
        from stsm_rt.train import own_actions

        return own_actions.main(arguments)
    options = _parser().parse_args(arguments)
    try:
        if options.recipe.is_dir():
            raise UserError(
                f"the folder of own actions comes first: stsm-rt train {options.recipe} and then the options"
            )
        if not options.recipe.is_file():
            raise UserError(f"{options.recipe} is neither a recipe nor a folder of own actions; give one that exists")
        if options.data is None:
            raise UserError(f"give --data FOLDER, the data set that {options.recipe} names")
        return _train(options)
    except UserError as error:
        # Every process meets the same error; one of each machine tells it.
        return report(error) if reports_errors() else 2
    except torch.OutOfMemoryError:
        return report(UserError(f"{options.device} has too little memory for a batch; give a larger --accumulate"))
    except KeyboardInterrupt:
        if reports_errors():
            print("\nstopped; --resume goes on after the last whole epoch", file=sys.stderr)
        return 130
    finally:
        leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stsm-rt train",
        description="Train a network from a recipe. With a folder of own clips in its place: stsm-rt train FOLDER.",
    )
    parser.add_argument("recipe", type=Path, help="recipe in TOML, or a folder of own actions")
    parser.add_argument("--data", type=Path, help="folder of the data set that the recipe names")
    parser.add_argument("--dataset", help="replaces the recipe's data set")
    parser.add_argument(
        "--annotations", type=Path, help="where the annotations are, if not in --data (a list: its file to train on)"
    )
    parser.add_argument("--validation", type=Path, metavar="FILE", help="list to validate with, of the data set 'list'")
    parser.add_argument(
        "--image-template", metavar="NAME", help="name of extracted frames such as img_{:05d}.jpg; without it: videos"
    )
    parser.add_argument("--frame-rate", type=float, metavar="FPS", help="frames per second of extracted frames")
    parser.add_argument(
        "--missing", type=float, default=0.01, metavar="SHARE", help="of the videos that may be absent (default: 0.01)"
    )
    parser.add_argument("--split", type=int, default=1, help="official split (J-HMDB, UCF101, HMDB51: 1, 2, 3)")
    parser.add_argument(
        "--hold-out",
        metavar="FOLD/FOLDS",
        help="leave this part of the training list's source groups out, validate with it after every epoch and report "
        "on it; without it all is trained on",
    )
    parser.add_argument(
        "--negatives", type=Path, help="folder that stsm_rt.train.negatives wrote, for the background class"
    )
    parser.add_argument("--report-test", action="store_true", help="report on the test list at the end")
    parser.add_argument("--shift", help="replaces the recipe's shift: a preset or 'none'")
    parser.add_argument("--seed", type=int, help="replaces the recipe's seed")
    parser.add_argument("--epochs", type=int, help="replaces the recipe's epochs")
    parser.add_argument("--pretrained", type=Path, help="weights to start from (default: the package of the network)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for runs (default: runs)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument(
        "--devices", type=_one_or_more, help="processes on each machine, one per GPU (default: 1, or torchrun's)"
    )
    parser.add_argument("--nodes", type=_one_or_more, help="machines (default: 1, or torchrun's)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16-mixed on cuda, 32-true on cpu")
    parser.add_argument(
        "--accumulate",
        type=_one_or_more,
        default=1,
        metavar="N",
        help="passes per optimiser step; the batch stays the recipe's, batch norm that is trained sees each pass alone",
    )
    parser.add_argument(
        "--workers",
        type=_none_or_more,
        default=4,
        help="processes that decode videos, for each device (default: 4); 0: the one that trains decodes",
    )
    return parser


def _one_or_more(text: str) -> int:
    return _at_least(1, text)


def _none_or_more(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    names = ("dataset", "shift", "seed", "epochs")
    overrides = {key: getattr(options, key) for key in names if getattr(options, key) is not None}
    recipe = load_recipe(options.recipe, **overrides)
    recipe.shift_spec()
    fold = parse_fold(options.hold_out) if options.hold_out is not None else None
    fabric = make_fabric(
        options.device,
        devices=options.devices,
        nodes=options.nodes,
        precision=options.precision,
        find_unused=recipe.frozen_epochs > 0,
    )
    fabric.launch()
    name = run_name(recipe, options.split, options.hold_out)
    folder = options.out / name
    with together(fabric):
        if (folder / LOG).exists() and not options.resume:
            raise UserError(f"{folder} holds a run already; give --resume to go on with it, or another --out")
        load = load_video_set if recipe.video else load_memory
        run = load(recipe, options, fold, folder, fabric.device)
    trained_on = device_name(options.device, fabric.world_size, fabric.strategy.precision.precision)

    def save(network: StreamingNetwork, accuracy: dict | None, target: Path) -> None:
        spec = model_spec(recipe, network, run.data.classes, accuracy, trained_on)
        save_model(network, spec, target)

    trainer = Trainer(
        recipe,
        run.data,
        held_out=run.held_out,
        fabric=fabric,
        accumulate=options.accumulate,
        pretrained=options.pretrained,
        folder=folder,
        save_best=lambda network, top1: save(network, run.accuracy(top1), folder / f"{recipe.name}-best.safetensors"),
    )
    with together(fabric):
        _make(folder)
    if run.missing:
        on_first(fabric, lambda: RunFolder(folder).write_missing(run.missing))
        fabric.print(f"videos of the annotations that are absent: {len(run.missing)}; see {folder / MISSING}")
    fabric.print(f"{name}: {run.data.clips} clips, {recipe.epochs} epochs on {trained_on}; log and weights in {folder}")
    if not has_tensorboard():
        fabric.print(f"TensorBoard is not installed, so {LOG} is the only log; for its curves: pip install tensorboard")
    with tqdm(
        total=recipe.epochs * trainer.steps_per_epoch, unit="step", desc=name, disable=not fabric.is_global_zero
    ) as bar:

        def on_step(steps: int) -> None:
            bar.update(steps - bar.n)

        def progress(epoch: int, loss: float) -> None:
            bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}")

        trainer.on_step, trainer.progress = on_step, progress
        network = trainer.run(resume=options.resume)
    accuracy = None
    if run.reported is not None:
        top1 = trainer.top1
        if top1 is None:
            top1 = trainer.accuracy(run.reported, recipe.decision.smoothing)
        accuracy = run.accuracy(top1)
        fabric.print(f"top-1 {100 * top1:.1f} % of {len(run.reported)} clips ({run.where})")
    target = folder / f"{recipe.name}.safetensors"
    on_first(fabric, lambda: save(network.cpu(), accuracy, target))
    fabric.print(f"weights: {target}")
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error}); choose another --out") from error


def run_name(recipe: Recipe, split: int, fold: str | None) -> str:
    """The name of a run's folder: what tells it from others of the same recipe."""
    shift = recipe.shift if isinstance(recipe.shift, str) else "custom"
    parts = [recipe.name, shift, f"split{split}", f"seed{recipe.seed}"]
    return "-".join(parts + ([f"fold{fold.replace('/', 'of')}"] if fold is not None else []))


def model_spec(
    recipe: Recipe, network: StreamingNetwork, classes: tuple[str, ...], accuracy: dict | None, trained_on: str
) -> ModelSpec:
    """The record that goes with the weights."""
    return ModelSpec(
        network=recipe.network,
        padding=network.padding,
        shift=network.shift.to_json() if network.shift is not None else None,
        rates=recipe.rates,
        changes=recipe.changes,
        labels=classes,
        background=BACKGROUND if recipe.background else None,
        height=recipe.height,
        width=recipe.width,
        frame_rate=recipe.frame_rate,
        decision=recipe.decision,
        recipe={**json.loads(json.dumps(dataclasses.asdict(recipe))), "trained_on": trained_on},
        accuracy=accuracy,
    )


def device_name(device: str, processes: int, precision: str) -> str:
    """The device's name, how it was used, and PyTorch's version, for the record."""
    chip = torch.cuda.get_device_name() if device.startswith("cuda") else "the CPU"
    several = f" x {processes}" if processes > 1 else ""
    return f"{chip}{several}, PyTorch {torch.__version__}, {precision}"
