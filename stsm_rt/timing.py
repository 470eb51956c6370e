"""Times of steps that are compared: blocks in turns, ratios pair by pair, and how sure they are.

The speed of a machine drifts while it is measured, so what is compared takes turns in short blocks, in an order that is
turned round from pair to pair, and a ratio is that of the medians of two blocks of one pair. Switching to another
session empties the caches, which a live loop never does, so each block's first steps are not counted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from stsm_rt.engine import Engine

# A virtual machine on a shared host was seen to change its speed by half every second or so. Many short blocks are
# surer than a few long ones: blocks of a tenth of a second gave A/A intervals of +-0.5 % in a time in which blocks of a
# second gave +-3 %. After a switch the first step took 5 % longer, the third no longer.
BLOCK_SECONDS = 0.08
LEAST_STEPS, MOST_STEPS = 3, 24
_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that takes its turn.

    Attributes:
        step: What is timed.
        warm_up: First steps of a block, which are not counted.
        counted: Steps of a block that are.
    """

    step: Callable[[], object]
    warm_up: int
    counted: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long the steps of a candidate took, in seconds.

    Attributes:
        steps: Number of steps that were counted.
        median: Median time of a step.
        min: Shortest time of a step.
        p95: 95th percentile of the times.
        blocks: Median time of each block, in the order of the pairs.
    """

    steps: int
    median: float
    min: float
    p95: float
    blocks: tuple[float, ...]

    @classmethod
    def of(cls, blocks: Sequence[Sequence[float]]) -> Times:
        """Sum up the times of all steps, block by block."""
        times = np.concatenate(blocks)
        return cls(
            steps=len(times),
            median=float(np.median(times)),
            min=float(times.min()),
            p95=float(np.percentile(times, 95)),
            blocks=tuple(float(np.median(block)) for block in blocks),
        )


@dataclass(frozen=True, kw_only=True)
class Run(Times):
    """Times of one engine; a step is one of all rows of its batch.

    Attributes:
        engine: The engine's name.
        runtime: What runs it.
        network: Name of the network.
        shift: Name of its shift, ``"none"`` of a plain one.
        folding: The form of the shift in the graph, as `stsm_rt.manifest.Manifest` says it.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        input: Height and width of the input in pixels.
        sha256: SHA-256 of the engine file.
    """

    engine: str
    runtime: str
    network: str
    shift: str
    folding: str
    precision: str
    input: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class Comparison:
    """How much longer a step of one engine takes than a step of another.

    Attributes:
        a: Name of the engine that is compared with.
        b: Name of the other engine.
        ratio_median: Median over the pairs of b's block median divided by a's.
        ratio_min: Smallest of these ratios.
        ratio_max: Largest of these ratios.
        pairs: Number of pairs.
        interval: Bootstrap 95 % interval of the median; None of a single pair.
    """

    a: str
    b: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    pairs: int
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, a: str, b: str, ratios: Sequence[float] | npt.NDArray[np.float64]) -> Comparison:
        """Sum up the ratios b / a of all pairs."""
        array = np.asarray(ratios, np.float64)
        median, low, high = float(np.median(array)), float(array.min()), float(array.max())
        return cls(a, b, median, low, high, len(array), median_interval(array) if len(array) > 1 else None)

    def line(self) -> str:
        """The comparison in words."""
        spread = f"{self.ratio_min:.3f} to {self.ratio_max:.3f} over {self.pairs} pair{'s' if self.pairs > 1 else ''}"
        sure = f"95 % interval {self.interval[0]:.3f} to {self.interval[1]:.3f}; " if self.interval else ""
        return f"{title(self.a, self.b)}: x{self.ratio_median:.3f} ({sure}{spread})"


def title(a: str, b: str) -> str:
    """Say ``b / a``, but what both names begin with only once."""
    if b == f"{a} again":
        return f"{a} / itself"
    words = a.split(), b.split()
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False)))
    return f"{b} / {' '.join(words[0][shared:]) or a}"


def time_in_turns(
    candidates: Sequence[Candidate], pairs: int, after: Callable[[int], None] | None = None
) -> list[list[list[float]]]:
    """Time candidates in blocks, in turns.

    Args:
        candidates: What takes turns; neighbours are compared best.
        pairs: Number of blocks of each.
        after: Called after each pair with its number, from 0.

    Returns:
        For each candidate and block the times of its counted steps in seconds.
    """
    times: list[list[list[float]]] = [[] for _ in candidates]
    for pair in range(pairs):
        order = range(len(candidates)) if pair % 2 == 0 else reversed(range(len(candidates)))
        for index in order:
            times[index].append(time_block(candidates[index]))
        if after is not None:
            after(pair)
    return times


def time_engines(engines: Sequence[Engine], names: Sequence[str], pairs: int) -> list[Run]:
    """Time engines in blocks, in turns.

    Args:
        engines: Open engines with as many slots as their batch.
        names: Their names.
        pairs: Number of blocks of each engine.

    Returns:
        The times of each engine.
    """
    times = time_in_turns(engine_candidates(engines), pairs)
    return [engine_run(engine, name, blocks) for engine, name, blocks in zip(engines, names, times, strict=True)]


def engine_candidates(engines: Sequence[Engine]) -> list[Candidate]:
    """Let engines take turns, on one frame of noise, in blocks of as many steps as the slowest makes in 0.08 s.

    Args:
        engines: Open, with as many slots as their batch.
    """
    for engine in engines:
        engine.frames[:] = np.random.default_rng(0).integers(0, 256, engine.frames.shape, np.uint8)
    steps = [functools.partial(engine.step, engine.frames) for engine in engines]
    tried = [time_block(Candidate(step=step, warm_up=LEAST_STEPS, counted=LEAST_STEPS)) for step in steps]
    slowest = max((float(np.median(block)) for block in tried), default=1.0)
    counted = min(max(round(BLOCK_SECONDS / slowest), LEAST_STEPS), MOST_STEPS)
    return [Candidate(step=step, warm_up=min(counted // 2 + 1, 4), counted=counted) for step in steps]


def engine_run(engine: Engine, name: str, blocks: Sequence[Sequence[float]]) -> Run:
    """Sum up the times of an engine's steps, block by block."""
    manifest = engine.manifest
    return Run(
        **vars(Times.of(blocks)),
        engine=name,
        runtime=manifest.runtime,
        network=manifest.network,
        shift=manifest.shift["name"],
        folding=manifest.folding,
        precision=manifest.precision,
        input=(manifest.input_height, manifest.input_width),
        sha256=manifest.sha256,
    )


def compare(a: Run, b: Run) -> Comparison:
    """Compare two runs block by block.

    Args:
        a: The run that is compared with.
        b: The other run, of as many blocks.

    Returns:
        The ratios b / a.
    """
    return Comparison.of(a.engine, b.engine, np.array(b.blocks) / np.array(a.blocks))


def median_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of a median by the percentile bootstrap (Efron, 1979), from a fixed seed.

    Args:
        values: At least two.

    Returns:
        The 2.5th and the 97.5th percentile of the medians of resamples.
    """
    medians = np.median(np.random.default_rng(0).choice(values, (_RESAMPLES, len(values))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


def time_block(candidate: Candidate) -> list[float]:
    """One block: seconds of each counted step."""
    for _ in range(candidate.warm_up):
        candidate.step()
    times = []
    for _ in range(candidate.counted):
        begin = perf_counter()
        candidate.step()
        times.append(perf_counter() - begin)
    return times
