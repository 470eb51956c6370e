"""Write benchmarks/RESULTS.md from the raw numbers in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stsm_rt.bench_plot import plot
from stsm_rt.machine import NOT_QUIET, quiet_line
from stsm_rt.timing import title

FOLDER = Path(__file__).parent
Record = Mapping[str, Any]

_HEAD = """# What it costs

Written by `python benchmarks/results.py` from the raw numbers in `benchmarks/results`; do not edit.

Every ratio is the median, over the pairs of one interleaved run, of the ratio of the medians of two neighbouring
blocks, with the bootstrap 95 % interval of that median. The first steps of a block, after the switch from another
session, are not counted, and the order turns round from pair to pair. An engine compared with itself in the same run
(A/A) shows what such a ratio is worth. Every residual block is shifted (`stsm_online`); the networks without a
file of weights in this repository have random ones. `plain` is the same network without the shift, of the same
weights, in the same runtime and precision and by the same exporter; `naive` has the shift as slices and pads.
"""


@dataclass(frozen=True)
class Measured:
    """One number.

    Attributes:
        value: The number.
        interval: Its 95 % interval, None where there is none.
        pairs: Number of pairs, None where there are none.
    """

    value: float
    interval: Sequence[float] | None = None
    pairs: int | None = None

    @classmethod
    def of(cls, comparison: Mapping[str, Any]) -> Measured:
        """The ratio of a comparison."""
        return cls(comparison["ratio_median"], comparison["interval"], comparison["pairs"])


@dataclass(frozen=True)
class Bar:
    """What is to be shown.

    Attributes:
        name: In words.
        file: Where its raw numbers are.
        find: Takes the number out of them.
        most: What it may be at most.
        least: What it may be at least.
        unit: Behind the numbers.
    """

    name: str
    file: str
    find: Callable[[Record], Measured]
    most: float
    least: float | None = None
    unit: str = ""

    def row(self, records: Mapping[str, Record]) -> str:
        """A row of the table."""
        wanted = f"at most {_number(self.most)}{self.unit}"
        if self.least is not None:
            wanted = f"{_number(self.least)} to {_number(self.most)}{self.unit}"
        if self.file not in records:
            return f"| {self.name} | {wanted} | | | not measured |"
        found, shares = self.find(records[self.file]), records[self.file]["machine"]["quiet"]
        doubt = "; the machine was not quiet" if shares and shares["others"] > NOT_QUIET else ""
        sure = ""
        if found.interval:
            sure = f"{_number(found.interval[0])} to {_number(found.interval[1])}, {found.pairs} pairs"
        verdict = self.verdict(found) + doubt
        return f"| {self.name} | {wanted} | **{_number(found.value)}{self.unit}** | {sure} | {verdict} |"

    def verdict(self, found: Measured) -> str:
        """Whether it is reached, in plain words."""
        reached = self._holds(found.value)
        if found.interval and not all(map(self._holds, found.interval)) and reached:
            return "yes, but the interval reaches beyond"
        if found.interval and any(map(self._holds, found.interval)) and not reached:
            return "no, but the interval reaches to it"
        return "yes" if reached else "no"

    def _holds(self, value: float) -> bool:
        return (self.least is None or self.least <= value) and value <= self.most


def _over_plain(record: Record) -> Measured:
    return next(
        Measured.of(c) for c in record["comparisons"] if c["a"].endswith(" plain") and c["b"] == _subject(record)
    )


def _over_itself(record: Record) -> Measured:
    return next(Measured.of(c) for c in record["comparisons"] if c["b"] == f"{c['a']} again")


def _over_clip(record: Record) -> Measured:
    return next(Measured.of(c) for c in record["comparisons"] if "clip of 8" in c["a"] and c["b"] == _subject(record))


def _over_floor(record: Record) -> Measured:
    return next(
        Measured.of(step["step"])
        for floor in record["floors"]
        for step in floor["steps"]
        if step["engine"] == _subject(record)
    )


def _against_plain(records: Mapping[str, Record]) -> Iterator[Mapping[str, Any]]:
    """The comparisons with plain networks, naive and shipped, of the files that hold them."""
    for name in dict.fromkeys(bar.file for bar in BARS if bar.find is _over_plain):
        for comparison in records.get(name, {"comparisons": []})["comparisons"]:
            if comparison["a"].endswith(" plain"):
                yield comparison


def _subject(record: Record) -> str:
    """The name of the engine that a file is about: the shifted one that is neither naive nor compared with itself."""
    return next(run["engine"] for run in record["runs"] if run["engine"].split()[-1] == run["shift"] != "none")


def _loop_processor(record: Record) -> Measured:
    return Measured.of(record["loop"]["file"]["processor"])


def _loop_latency(record: Record) -> Measured:
    return Measured(1000 * record["loop"]["live"]["added_p95"])


def _loop_memory(record: Record) -> Measured:
    return Measured(record["loop"]["memory"]["growth"])


_NETWORKS = {"r50": "ResNet-50", "mbv2": "MobileNetV2", "lite0": "the default network"}
BARS = (
    *(
        Bar(f"ONNX Runtime FP32, shifted / plain: {name}", f"onnxruntime_fp32_{key}", _over_plain, 1.03)
        for key, name in _NETWORKS.items()
    ),
    *(
        Bar(f"ONNX Runtime INT8, shifted / plain: {name}", f"onnxruntime_int8_{key}", _over_plain, 1.05)
        for key, name in _NETWORKS.items()
    ),
    Bar("OpenVINO FP32, shifted / plain: ResNet-50", "openvino_fp32_r50", _over_plain, 1.05),
    Bar("ResNet-50 FP32 step / its operations at the matrix rate", "onnxruntime_fp32_r50", _over_floor, 0.97),
    *(
        Bar(f"streaming decision / 8-frame clip per decision: {_NETWORKS[key]}", f"rivals_{key}", _over_clip, 1 / 7)
        for key in ("r50", "lite0")
    ),
    Bar("processor time of the loop on a file / (step + decoding alone)", "loop", _loop_processor, 1.05),
    Bar("latency of the live loop beyond the step, p95", "loop", _loop_latency, 1000 / 30, unit=" ms"),
    Bar("growth of resident memory per 10,000 frames", "loop", _loop_memory, 1.0, unit=" MB"),
    *(
        Bar(f"A/A, {file.replace('_', ' ')}", file, _over_itself, 1.01, 0.99)
        for file in (
            *(f"onnxruntime_{precision}_{key}" for precision in ("fp32", "int8") for key in _NETWORKS),
            "openvino_fp32_r50",
        )
    ),
)


def results(records: Mapping[str, Record]) -> str:
    """The whole file.

    Args:
        records: The raw numbers by the names of their files.
    """
    lines = [_HEAD, "| | bar | measured | 95 % interval | reached |", "|---|---|---|---|---|"]
    lines += [bar.row(records) for bar in BARS]
    for name, record in records.items():
        lines += ["", f"## {name.replace('_', ' ')}", "", *_section(record)]
    return "\n".join(lines) + "\n"


def _section(record: Record) -> Iterator[str]:
    machine = record["machine"]
    yield f"`{record['command']}`"
    yield ""
    yield f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads for a step; " + ", ".join(
        f"{package} {version}" for package, version in record["versions"].items()
    )
    line = quiet_line(machine["quiet"])
    yield from ["", f"{line[0].upper()}{line[1:]}."]
    if record.get("runs"):
        yield from ["", "| engine | input | median | min | p95 |", "|---|---|---|---|---|"]
        for run in record["runs"]:
            times = " | ".join(f"{1000 * run[key]:.2f} ms" for key in ("median", "min", "p95"))
            yield f"| {run['engine']} | {run['input'][0]}x{run['input'][1]} | {times} |"
    if "several" in record:
        yield from _several(record)
    if record["comparisons"]:
        yield from ["", "| b / a | ratio | 95 % interval | smallest and largest of the pairs |", "|---|---|---|---|"]
    for c in record["comparisons"]:
        low, high = c["interval"] or (c["ratio_min"], c["ratio_max"])
        yield (
            f"| {title(c['a'], c['b'])} | {c['ratio_median']:.3f} | {low:.3f} to {high:.3f} | {c['ratio_min']:.3f} to "
            f"{c['ratio_max']:.3f}, {c['pairs']} pairs |"
        )
    for floor in record.get("floors", ()):
        yield from _floor(floor)
    if "loop" in record:
        yield from _loop(record["loop"])


def _several(record: Record) -> Iterator[str]:
    runs = record["several"]
    yield from [
        "",
        f"Cameras of {record['rate']:g} frames/s at once on one `{record['engine']}`, without a window; of the cameras "
        "of a run, the least number of steps, the most frames dropped and the longest times. `each one more` is "
        "compared with the row before.",
        "",
        "| cameras | steps/s of each | frames dropped | latency, median | p95 | longest between two results "
        "| cores used | each one more |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for before, run in zip([None, *runs], runs, strict=False):
        each, cores = run["each"], run["processor"] / run["wall"]
        worst = {key: max(camera[key] for camera in each) for key in ("latency_median", "latency_p95", "longest_wait")}
        share = max(camera["dropped"] / camera["given"] for camera in each)
        more = ""
        if before is not None and run["cameras"] > before["cameras"]:
            added = (cores - before["processor"] / before["wall"]) / (run["cameras"] - before["cameras"])
            more = f"{added:.2f} cores"
        yield (
            f"| {run['cameras']} | {min(camera['steps'] for camera in each) / run['wall']:.1f} | {100 * share:.1f} % | "
            f"{1000 * worst['latency_median']:.1f} ms | {1000 * worst['latency_p95']:.1f} ms | "
            f"{worst['longest_wait']:.2f} s | {cores:.2f} | {more} |"
        )
    last = runs[-1]
    yield from ["", f"Each of {last['cameras']}:", "", "| camera | frames | dropped | steps | latency, median | p95 |"]
    yield "|---|---|---|---|---|---|"
    for camera in last["each"]:
        times = " | ".join(f"{1000 * camera[key]:.1f} ms" for key in ("latency_median", "latency_p95"))
        yield f"| {camera['name']} | {camera['given']} | {camera['dropped']} | {camera['steps']} | {times} |"


def _floor(floor: Mapping[str, Any]) -> Iterator[str]:
    if not floor["steps"]:
        return
    rates = floor["rates"]
    products = ", ".join(
        f"{by} {rates['size'] ** 3 / times['median'] / 1e9:.1f} G multiply-adds/s"
        for by, times in rates["products"].items()
    )
    yield from [
        "",
        f"Measured in the same run: a product of two {rates['size']}x{rates['size']} matrices in FP32 by {products} "
        f"(the faster counts), and copying at {rates['bytes_per_second'] / 1e9:.1f} GB/s.",
        "",
        "| engine | multiply-adds | take | weights and states | take | step / multiply-adds |",
        "|---|---|---|---|---|---|",
    ]
    for step in floor["steps"]:
        moved = step["weight_bytes"] + step["state_bytes"]
        low, high = step["step"]["interval"] or (step["step"]["ratio_min"], step["step"]["ratio_max"])
        yield (
            f"| {step['engine']} | {step['operations'] / 1e9:.3f} G | {1000 * step['multiplying']:.2f} ms | "
            f"{moved / 1e6:.1f} MB | {1000 * step['moving']:.2f} ms | {step['step']['ratio_median']:.3f} "
            f"({low:.3f} to {high:.3f}) |"
        )


def _loop(loop: Mapping[str, Any]) -> Iterator[str]:
    file, live, memory = loop["file"], loop["live"], loop["memory"]
    milliseconds = {
        key: f"{1000 * live[key]:.1f} ms" for key in ("latency_median", "latency_p95", "latency_max", "step")
    }
    yield from [
        "",
        f"The video: {file['size'][0]}x{file['size'][1]}, {file['codec']}, {file['frames']} frames, of which "
        f"{file['steps']} are steps. There is no window, and nothing is saved.",
        "",
        "| for each step | processor time | on the clock |",
        "|---|---|---|",
    ]
    for part, words in (
        ("loop", "the whole loop"),
        ("decode", "decoding alone"),
        ("step", "the step alone"),
        ("resize", "cropping and resizing alone"),
    ):
        numbers = (1000 * _median(file[part][kind]) / file["steps"] for kind in ("processor", "wall"))
        yield f"| {words} | " + " | ".join(f"{number:.2f} ms" for number in numbers) + " |"
    yield from [
        "",
        f"As fast as it goes: {file['frames_per_second']:.0f} frames/s, {file['steps_per_second']:.1f} steps/s; the "
        f"loop takes {file['wall']['ratio_median']:.3f} times as long as its steps alone.",
        "",
        f"As a camera of {live['rate']:g} frames/s: {milliseconds['latency_median']} from a frame's arrival to its "
        f"result (median), p95 {milliseconds['latency_p95']}, longest {milliseconds['latency_max']}, a step alone "
        f"{milliseconds['step']}; {live['dropped']} of {live['frames']} frames dropped.",
    ]
    if memory:
        yield from [
            "",
            f"Resident memory over {memory['frames']} frames: {memory['megabytes'][0]:.1f} MB at the start, "
            f"{memory['megabytes'][-1]:.1f} MB at the end.",
        ]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of raw numbers")
    parser.add_argument("--out", type=Path, default=FOLDER / "RESULTS.md", help="file to write")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the ratios to the plain networks here")
    options = parser.parse_args(argv)
    files = sorted(options.results.glob("*.json"))
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    options.out.write_text(results(records), encoding="utf-8")
    comparisons = list(_against_plain(records))
    if options.plot is not None and comparisons:
        plot(comparisons, "one step, compared with the plain 2D network", options.plot)
    print(f"{options.out}: {len(records)} files of raw numbers, {len(BARS)} bars")
    return 0


if __name__ == "__main__":
    sys.exit(main())
