"""What the shift is worth on J-HMDB: every shift, split and seed of one recipe, in one table.

Each cell is three commands, ``stsm-rt train``, ``export`` and ``evaluate``: the network of a split is trained on that
split's training list alone, becomes an FP32 engine, and plays the split's test list frame by frame. A cell that is
done is not done again, and a training that was interrupted goes on, so the table may grow over many days::

    python benchmarks/ablation.py --data DIR --negatives DIR

A cell takes minutes on a large GPU and hours on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from stsm_rt.errors import UserError, report

FOLDER = Path(__file__).parent
RECORDS = FOLDER / "results" / "ablation.jsonl"
TABLE = FOLDER / "ABLATION.md"
SHIFTS = ("none", "tsm_online", "stsm_online", "stsm_joint_online")
SPLITS = (1, 2, 3)

_HEAD = """# What the shift is worth on J-HMDB

Written by `python benchmarks/ablation.py` from `benchmarks/results/ablation.jsonl`; do not edit.

Recipe `{recipe}`. Each network is trained on the training list of its split and its FP32 engine plays that split's test
list frame by frame: top-1 in percent, one number per seed. `±` is the standard deviation of what stands before it: over
the seeds of a split, and over the seeds' means of the three splits. A cell that is empty has not been run. With about
268 clips in a test list, the standard error of one number is about 3 points.

"""


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        recipe: Its recipe.
        shift: A preset, or "none".
        split: Official split.
        seed: Of weights, order and augmentation.
        out: Folder of all runs.
    """

    recipe: Path
    shift: str
    split: int
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        """Where ``stsm-rt train`` writes."""
        return self.out / f"{self.recipe.stem}-{self.shift}-split{self.split}-seed{self.seed}"

    @property
    def weights(self) -> Path:
        """What it is to write."""
        return self.folder / f"{self.recipe.stem}.safetensors"

    def train(self, data: Path, negatives: Path | None) -> None:
        """Train, or go on with it.

        Raises:
            UserError: The training failed.
        """
        if not self.weights.is_file():
            options = ["--shift", self.shift, "--split", self.split, "--seed", self.seed, "--resume", "--out", self.out]
            background = [] if negatives is None else ["--negatives", negatives]
            _run("train", self.recipe, "--data", data, *options, *background)

    def evaluate(self, data: Path) -> dict[str, Any]:
        """Build the engine and play the test list.

        Returns:
            The cell's line of `RECORDS`.

        Raises:
            UserError: A command failed.
        """
        engine, measured = self.weights.with_suffix(".onnx"), self.folder / "measured.json"
        if not measured.is_file():
            _run("export", "--weights", self.weights, "--out", engine)
            _run("evaluate", "--engine", engine, "--data", data, "--split", self.split, "--json", measured)
        found = json.loads(measured.read_text())
        own = {"recipe": self.recipe.stem, "shift": self.shift, "split": self.split, "seed": self.seed}
        return {**own, **{key: found[key] for key in ("clips", "top1", "top5", "weights_sha256")}}


def _run(command: str, *options: object) -> None:
    words = [sys.executable, "-m", "stsm_rt.cli", command, *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"stsm-rt {command} ended with {done.returncode} ({last}); the command was {' '.join(words)}")


def add_record(record: Mapping[str, Any], path: Path = RECORDS) -> None:
    """Write a cell's line, in place of an earlier one of the same cell."""
    cell = ("recipe", "shift", "split", "seed")
    records = [old for old in read_records(path) if [old[key] for key in cell] != [record[key] for key in cell]]
    records = sorted([*records, record], key=lambda r: (r["recipe"], SHIFTS.index(r["shift"]), r["split"], r["seed"]))
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(line) + "\n" for line in records))
    partial.replace(path)


def read_records(path: Path = RECORDS) -> list[dict[str, Any]]:
    """The lines of `RECORDS`; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The table of one recipe's records in Markdown.

    A row is a shift, a column a split; the last column is the mean over the splits, where all three have the same
    number of seeds.
    """
    lines = ["| shift | " + " | ".join(f"split {split}" for split in SPLITS) + " | mean |", "|---" * 5 + "|"]
    for shift in SHIFTS:
        top1 = {
            split: {r["seed"]: 100 * r["top1"] for r in records if (r["shift"], r["split"]) == (shift, split)}
            for split in SPLITS
        }
        # The mean is taken over whole rounds: a seed that has all three splits.
        seeds = set.intersection(*(set(of_split) for of_split in top1.values()))
        means = [statistics.mean(top1[split][seed] for split in SPLITS) for seed in sorted(seeds)]
        cells = [_with_spread(list(top1[split].values())) for split in SPLITS]
        lines.append("| " + " | ".join([f"`{shift}`", *cells, _with_spread(means)]) + " |")
    return "\n".join(lines) + "\n"


def _with_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {statistics.stdev(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Train and evaluate every shift, split and seed of a recipe.")
    parser.add_argument("--recipe", type=Path, default=FOLDER.parent / "recipes" / "actions_lite0.toml")
    parser.add_argument("--data", type=Path, help="J-HMDB; without it only the table is written")
    parser.add_argument("--negatives", type=Path, help="folder that stsm_rt.train.negatives wrote")
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=SHIFTS)
    parser.add_argument("--splits", nargs="+", type=int, choices=SPLITS, default=SPLITS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time (default: 1)")
    parser.add_argument("--train-only", action="store_true", help="leave engines to another machine")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    options = parser.parse_args(argv)
    # Every shift of a split and seed before the next seed: what is there can be compared.
    order = itertools.product(options.seeds, options.splits, options.shifts)
    cells = [Cell(options.recipe, shift, split, seed, options.out) for seed, split, shift in order]

    one_at_a_time = Lock()

    def finish(cell: Cell) -> None:
        cell.train(options.data, options.negatives)
        print(f"trained: {cell.folder.name}", flush=True)
        if not options.train_only:
            with one_at_a_time:
                add_record(cell.evaluate(options.data))

    try:
        if options.data is not None:
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(finish, cells))
    except UserError as error:
        return report(error)
    mine = table([record for record in read_records() if record["recipe"] == options.recipe.stem])
    TABLE.write_text(_HEAD.format(recipe=options.recipe.stem) + mine)
    print(mine, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
