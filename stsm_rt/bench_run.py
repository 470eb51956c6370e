"""One run of the bench: engines that take turns, with the machine's own rates among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stsm_rt.engine import Engine
from stsm_rt.floor import Floor, FloorMeter, Rates, why_not_counted
from stsm_rt.manifest import Manifest
from stsm_rt.timing import Comparison, Run, compare, engine_candidates, engine_run, time_in_turns


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine that takes part.

    Attributes:
        name: For people.
        path: Its file.
        plain: Whether it is a shifted contender's network without the shift.
    """

    name: str
    path: Path
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """Engines that are timed in one run.

    Attributes:
        contenders: In the order of their turns.
        compared: Which are compared: positions of a and b.
        subject: Position of the one that the group is about.
    """

    contenders: tuple[Contender, ...]
    compared: tuple[tuple[int, int], ...]
    subject: int = 0

    @classmethod
    def of_files(cls, paths: Sequence[Path], *, again: bool = False) -> Group:
        """Engine files, each compared with the first one.

        Args:
            paths: The files.
            again: Whether the first one is compared with itself, too.
        """
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = [str(path) for path in paths]
        contenders = [Contender(name=name, path=path) for name, path in zip(names, paths, strict=True)]
        if again:
            contenders.append(Contender(name=f"{names[0]} again", path=paths[0]))
        return cls(contenders=tuple(contenders), compared=tuple((0, index) for index in range(1, len(contenders))))


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What was measured of a group.

    Attributes:
        runs: Of each contender.
        comparisons: As the group asks for.
        rates: Of the machine, None where no contender can be held to them.
        floors: Of the contenders that can.
        left_out: Why the others cannot, a sentence each.
    """

    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    rates: Rates | None
    floors: tuple[Floor, ...]
    left_out: tuple[str, ...]

    def floor_record(self) -> dict[str, Any]:
        """The machine's rates and the floors as JSON holds them."""
        return {
            "rates": self.rates.record() if self.rates else None,
            "steps": [asdict(floor) for floor in self.floors],
            "left_out": list(self.left_out),
        }

    def lines(self) -> list[str]:
        """All of it, for people."""
        width = max(len(run.engine) for run in self.runs)
        found = [f"{'engine':<{width}}  {'input':>9}    median       min       p95   (ms per step)"]
        for run in self.runs:
            numbers = "".join(f"{1000 * value:10.2f}" for value in (run.median, run.min, run.p95))
            found.append(f"{run.engine:<{width}}  {f'{run.input[0]}x{run.input[1]}':>9}{numbers}")
        found += [comparison.line() for comparison in self.comparisons]
        if self.rates is not None:
            found.append(self.rates.line())
        return [*found, *(floor.line() for floor in self.floors), *self.left_out]


def time_group(group: Group, pairs: int) -> Timed:
    """Time the engines of a group in turns, with the machine's rates in the same turns.

    Args:
        group: The engines; all of them are open at once, as many slots as their batch.
        pairs: Number of blocks of each.

    Raises:
        UserError: An engine cannot be opened.
    """
    manifests = [Manifest.load(contender.path) for contender in group.contenders]
    reasons = [why_not_counted(manifest) for manifest in manifests]
    meter = FloorMeter(pairs) if None in reasons else None
    engines = [
        Engine.open(contender.path, slots=manifest.batch)
        for contender, manifest in zip(group.contenders, manifests, strict=True)
    ]
    times = time_in_turns(engine_candidates(engines), pairs, meter.measure if meter else None)
    runs = tuple(
        engine_run(engine, contender.name, blocks)
        for engine, contender, blocks in zip(engines, group.contenders, times, strict=True)
    )
    rates = meter.rates() if meter else None
    counted = [i for i, reason in enumerate(reasons) if reason is None]
    plain = next((i for i in counted if group.contenders[i].plain), None)
    return Timed(
        runs=runs,
        comparisons=tuple(compare(runs[a], runs[b]) for a, b in group.compared),
        rates=rates,
        floors=tuple(
            rates.floor(
                runs[i], manifests[i], group.contenders[i].path, group.contenders[i if plain is None else plain].path
            )
            for i in counted
            if rates is not None and group.contenders[i].path not in [other.path for other in group.contenders[:i]]
        ),
        left_out=tuple(
            f"no floor of {reasons.count(reason)} engine{'s' if reasons.count(reason) > 1 else ''}, {reason}"
            for reason in dict.fromkeys(filter(None, reasons))
        ),
    )
