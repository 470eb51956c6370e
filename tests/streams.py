"""Streams of frames in which everything happens that can happen to one, and engines that are slow or fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from time import perf_counter, sleep

import numpy as np
from clips import plain
from hypothesis import strategies as st

from stsm_rt.decision import Event
from stsm_rt.engine import Engine
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.source import Reading, Source, Wanted

Item = tuple[np.ndarray, float]

PATIENCE = 20.0  # seconds after which a test that waits has failed


class Script(Source):
    """A recording of given frames and times, which leaves out the pictures that nobody wants.

    At the frames of ``connections``, which are always made, another stream begins. ``before`` is called with the index
    of each frame.
    """

    name = "a script of the tests"

    def __init__(
        self,
        items: Sequence[Item],
        before: Callable[[int], None] | None = None,
        *,
        connections: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.given = 0
        self.size = (64, 48)
        self._items, self._before, self._connections = items, before, connections

    def _next(self, wanted: Wanted) -> Reading | None:
        if self.given == len(self._items):
            return None
        if self._before is not None:
            self._before(self.given)
        frame, time = self._items[self.given]
        begins, stream = self.given in self._connections, sum(index <= self.given for index in self._connections)
        self.given += 1
        return Reading(frame if begins or wanted(time) else None, time, perf_counter(), stream)


def noise(count: int, seed: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    scene = np.linspace(0, 160, size[0], dtype=np.uint8)[None, None, :, None]
    return list(scene + np.random.default_rng(seed).integers(0, 96, (count, size[1], size[0], 3), np.uint8))


def timed(frames: Sequence[np.ndarray], fps: float = 30.0, start: float = 0.0) -> list[Item]:
    return [(frame, start + i / fps) for i, frame in enumerate(frames)]


def bare(result: Result | None) -> Result | None:
    """A result without what differs from run to run."""
    return None if result is None else dataclasses.replace(result, latency=0.0)


def looped(
    recognizer: Recognizer, items: Sequence[Item], resets: Sequence[int] = ()
) -> tuple[list[Result | None], tuple[Event, ...]]:
    """One result or None for each frame by ``update`` in a loop, and what ``finish`` gives at the end."""
    recognizer.reset()
    results: list[Result | None] = []
    ended: tuple[Event, ...] = ()
    for index, (frame, time) in enumerate(items):
        if index in resets:
            ended = recognizer.finish()
            recognizer.reset()
        result = recognizer.update(frame, time)
        if result is not None and ended:
            result, ended = dataclasses.replace(result, events=ended + result.events), ()
        results.append(bare(result))
    return results, recognizer.finish()


def slowed(engine: Engine, seconds: float, seen: Callable[[np.ndarray], None] | None = None) -> Engine:
    """The same engine, whose steps take longer."""
    step = engine.step

    def slow(frames: np.ndarray, slots: Sequence[int] | None = None) -> np.ndarray:
        if seen is not None:
            seen(frames)
        sleep(seconds)
        return step(frames, slots)

    engine.step = slow  # type: ignore[method-assign]
    return engine


def wait_until(condition: Callable[[], bool]) -> None:
    end = perf_counter() + PATIENCE
    while not condition():
        assert perf_counter() < end
        sleep(0.005)


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["on", "gap", "back", "size", "cut", "colour", "reset", "connection"]),
        st.integers(1, 12),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stream, the frames before which it is reset, and those at which another connection begins."""

    items: list[Item]
    resets: list[int]
    connections: list[int]

    def looped(self, recognizer: Recognizer) -> tuple[list[Result | None], tuple[Event, ...]]:
        return looped(recognizer, self.items, [*self.resets, *self.connections])

    def script(self, recognizer: Recognizer) -> Script:
        """A source of it, which resets the recognizer of a pipeline or a camera."""
        reset = lambda index: recognizer.restart() if index in self.resets else None  # noqa: E731
        return Script(self.items, reset, connections=self.connections)


def pieces(plan: Sequence[tuple[str, int, int]], fps: float) -> Plan:
    """A stream with everything that can happen to one."""
    items: list[Item] = []
    resets, connections, time = [], [], 0.0
    for kind, count, seed in plan:
        time += {"gap": 1.5, "back": -0.2}.get(kind, 0.0)
        if kind == "reset":
            resets.append(len(items))
        if kind == "connection":
            connections.append(len(items))
        frames = (
            plain("blue", count) if kind == "colour" else noise(count, seed, (48, 48) if kind == "size" else (64, 48))
        )
        if kind == "cut":
            frames = [frame[:, ::-1].copy() for frame in frames]
        items += timed(frames, fps, time)
        time += count / fps
    return Plan(items, resets, connections)
