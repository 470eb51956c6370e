"""Several cameras on one engine: each as if it were alone, none starved, and none noticed when it leaves."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest
from camera import camera
from clips import counted, plain, write_video
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import PIECES, Plan, Script, bare, looped, noise, pieces, slowed, timed, wait_until

from stsm_rt.cameras import Camera, Cameras, News
from stsm_rt.decision import Event
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result
from stsm_rt.video.source import OnChange, Reading, Source, SourceState, StateChange, Wanted
from stsm_rt.video.sources import open_source


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def cameras_of(engine: Engine, sources: Sequence[Source | Callable[[OnChange], Source]], **options: Any) -> Cameras:
    """Cameras 0, 1, ... at these sources."""

    def opened(source: Source | Callable[[OnChange], Source]) -> Callable[[OnChange], Source]:
        return (lambda on_change: source) if isinstance(source, Source) else source

    return Cameras(
        [
            Camera(str(slot), Recognizer(engine, slot=slot, threshold=0.3, patience=5), opened(source))
            for slot, source in enumerate(sources)
        ],
        **options,
    )


def play(cameras: Cameras) -> dict[str, tuple[list[Result | None], tuple[Event, ...]]]:
    """The results of each camera and the events that ended when it left."""
    found: dict[str, tuple[list[Result | None], tuple[Event, ...]]] = {
        camera.name: ([], ()) for camera in cameras.cameras
    }
    for news in everything(cameras):
        results, events = found[news.camera.name]
        if news.result is not None:
            results.append(bare(news.result))
        found[news.camera.name] = results, events + news.events
    return found


def everything(cameras: Cameras) -> Iterator[News]:
    with cameras:
        while (news := cameras.take(1.0)) is not None:
            yield from news


def alone(path: Path, plan: Plan) -> tuple[list[Result | None], tuple[Event, ...]]:
    results, events = plan.looped(Recognizer(path, threshold=0.3))
    return [result for result in results if result is not None], events


@settings(max_examples=40, deadline=None)
@given(plans=st.lists(PIECES, min_size=2, max_size=3), fps=st.sampled_from([8.0, 30.0]), pictures=st.booleans())
def test_each_camera_gives_exactly_what_it_gives_alone(
    tiny_engine: Any, plans: list[Any], fps: float, pictures: bool
) -> None:
    streams = [pieces(plan, fps) for plan in plans]
    engine = Engine.open(tiny_engine.path, slots=len(streams))
    sources = [Script(stream.items, connections=[*stream.resets, *stream.connections]) for stream in streams]
    found = play(cameras_of(engine, sources, pictures=pictures))
    assert found == {str(slot): alone(tiny_engine.path, stream) for slot, stream in enumerate(streams)}


@settings(max_examples=60, deadline=None)
@given(plans=st.tuples(PIECES, PIECES), turns=st.lists(st.booleans(), max_size=150), batch=st.booleans())
def test_any_interleaving_of_two_streams_gives_each_what_it_gives_alone(
    tiny_engine: Any, paired_engine: Any, plans: Any, turns: list[bool], batch: bool
) -> None:
    path = paired_engine.path if batch else tiny_engine.path
    streams = [pieces(plan, 10.0) for plan in plans]
    engine = Engine.open(path, slots=2)
    pair = [Recognizer(engine, slot=slot, threshold=0.3) for slot in range(2)]
    found: list[list[Result | None]] = [[], []]
    # The order that was drawn, and then what is left of either.
    order = [int(turn) for turn in turns] + [0] * 99 + [1] * 99
    for which in order:
        index = len(found[which])
        stream = streams[which]
        if index < len(stream.items):
            if index in (*stream.resets, *stream.connections):
                pair[which].restart()
            found[which].append(bare(pair[which].update(*stream.items[index])))
    for which, stream in enumerate(streams):
        expected, events = stream.looped(Recognizer(Engine.open(path, slots=2), threshold=0.3))
        assert (found[which], pair[which].finish()) == (expected, events)


@pytest.fixture(scope="module")
def paired_engine(make_engine: Any) -> Any:
    return make_engine(batch=2, delays=(1, 1, 1))


def test_the_camera_that_has_waited_longest_is_next(tiny_engine: Any) -> None:
    turns: list[int] = []
    engine = Engine.open(tiny_engine.path, slots=3)
    step = engine.step

    def slow(frames: np.ndarray, slots: Sequence[int] | None = None) -> np.ndarray:
        assert slots is not None
        turns.append(slots[0])
        # A round takes longer than the model's period, so each wants its next turn before the others had theirs.
        sleep(0.05)
        return step(frames, slots)

    engine.step = slow  # type: ignore[method-assign]
    # Camera 0 has ten times as many frames as the others, and all have more than there is time for.
    sources = [camera(noise(count, 0), fps)[0] for count, fps in ((1200, 600), (200, 100), (200, 100))]
    with cameras_of(engine, sources) as cameras:
        while cameras.take(1.0) is not None:
            pass
    # Once all have begun, none has to wait until another had more than one turn more than it.
    middle = turns[6:-6]
    assert len(middle) > 12
    assert all(len(set(middle[i : i + 5])) == 3 for i in range(len(middle) - 4)), turns


def test_a_live_camera_gives_the_newest_frame_when_its_turn_comes_and_counts_the_others(tiny_engine: Any) -> None:
    engine = slowed(Engine.open(tiny_engine.path, slots=2), 0.06)
    opened = [camera(counted(120), 60) for _ in range(2)]
    cameras = cameras_of(engine, [source for source, _ in opened])
    latencies: list[float] = []
    last: dict[str, int] = {}
    for news in everything(cameras):
        if news.result is not None:
            latencies.append(news.result.latency)
            last[news.camera.name] = news.result.dropped
    # 60 ms of its own step, and less than a frame before; one that had waited its turn would be 120 ms old.
    assert np.median(latencies) < 0.1
    assert all(dropped > 0 for dropped in last.values()) and set(last) == {"0", "1"}
    assert all(camera.dropped >= last[camera.name] for camera in cameras.cameras)


def test_nobody_waits_for_a_slow_camera_or_one_that_gives_nothing(tiny_engine: Any) -> None:
    crawling = Script(timed(noise(40, 0), 10), lambda index: sleep(0.2))
    quick = Script(timed(noise(30, 1), 10))
    engine = Engine.open(tiny_engine.path, slots=3)
    order = []
    with cameras_of(engine, [crawling, Blocked(), quick]) as cameras:
        while len(order) < 33:
            order += [news.camera.name for news in cameras.take(1.0) or () if news.result is not None]
        assert Counter(order)["2"] == 30 and Counter(order)["0"] < 8
        cameras.stop()
        while cameras.take(1.0) is not None:
            pass


def test_a_camera_that_leaves_or_fails_disturbs_nobody(tiny_engine: Any, tmp_path: Path) -> None:
    long = Plan(timed(noise(80, 1), 10), [], [])
    blue = timed(plain("blue", 12), 10)
    narrow = Script(timed(noise(5, 0) + noise(5, 0, (16, 12)), 10))
    broken = Script(timed(noise(9, 0), 10), lambda index: fail() if index == 6 else None)

    def fail() -> None:
        raise UserError("the cable was cut")

    engine = Engine.open(tiny_engine.path, slots=4)
    cameras = cameras_of(engine, [Script(long.items), Script(blue), narrow, broken])
    cameras.cameras[2].recognizer.roi = (0, 0, 40, 40)
    changes, found = [], {camera.name: [] for camera in cameras.cameras}
    for news in everything(cameras):
        if news.change is not None:
            changes.append((news.camera.name, news.change.state, news.change.reason))
        found[news.camera.name].append(news)
    assert [bare(news.result) for news in found["0"] if news.result] == alone(tiny_engine.path, long)[0]
    # The event that ran when its camera left has ended then.
    assert [(event.label, event.end) for news in found["1"] for event in news.events] == [("blue", 1.1)]
    assert [len([news for news in found[name] if news.result]) for name in "23"] == [5, 6]
    failed = {name: reason for name, state, reason in changes if state is SourceState.FAILED}
    assert failed["3"] == "the cable was cut" and set(failed) == {"2", "3"}
    assert "does not lie inside the frame of 16x12" in failed["2"]
    assert [str(camera.error or "") for camera in cameras.cameras] == ["", "", failed["2"], failed["3"]]


def test_a_recording_loses_nothing_and_a_real_video_gives_the_results_of_the_plain_loop(
    tiny_engine: Any, tmp_path: Path
) -> None:
    paths = [write_video(tmp_path / f"{i}.mp4", noise(40, i) + plain("green", 30)) for i in range(2)]
    expected = {}
    for slot, path in enumerate(paths):
        with open_source(path) as source:
            results, events = looped(Recognizer(tiny_engine.path, threshold=0.3), list(source))
        expected[str(slot)] = [result for result in results if result is not None], events
    engine = Engine.open(tiny_engine.path, slots=2)
    cameras = cameras_of(engine, [lambda _, path=path: open_source(path) for path in paths])
    assert play(cameras) == expected
    assert [camera.frame_count for camera in cameras.cameras] == [70, 70]


def test_recordings_are_played_at_their_own_speed_where_they_are_looked_at(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path, slots=2)
    sources = [Script(timed(noise(count, 0), 30)) for count in (25, 40)]
    begin, seen = perf_counter(), 0
    cameras = cameras_of(engine, sources, pictures=True, paced=True)
    for _ in everything(cameras):
        seen += cameras.cameras[1].picture is not None
    assert perf_counter() - begin >= 39 / 30 and seen
    cameras = cameras_of(engine, [Script(timed(noise(400, 0), 30))])
    begin = perf_counter()
    assert len(play(cameras)["0"][0]) == 134
    assert perf_counter() - begin < 400 / 30 and cameras.cameras[0].picture is None


def test_as_many_frames_are_taken_of_each_as_were_asked_for(tiny_engine: Any) -> None:
    sources = [Script(timed(noise(count, 0), 10)) for count in (50, 5)]
    cameras = cameras_of(Engine.open(tiny_engine.path, slots=2), sources, max_frames=20)
    assert {name: len(results) for name, (results, _) in play(cameras).items()} == {"0": 20, "1": 5}


def test_a_step_that_fails_resets_its_own_camera_only(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path, slots=2)
    step, made = engine.step, Counter()

    def failing(frames: np.ndarray, slots: Sequence[int] | None = None) -> np.ndarray:
        assert slots is not None
        made[slots[0]] += 1
        logits = step(frames, slots)
        if slots[0] == 1 and made[1] == 5:
            logits[0, 2] = np.nan
        return logits

    engine.step = failing  # type: ignore[method-assign]
    plans = [Plan(timed(noise(20, seed), 10), [], []) for seed in (1, 2)]
    cameras = cameras_of(engine, [Script(plan.items) for plan in plans])
    found = play(cameras)
    assert found["0"] == alone(tiny_engine.path, plans[0])
    assert len(found["1"][0]) == 19
    assert [(c.recognizer.failures, c.recognizer.resets) for c in cameras.cameras] == [(0, 0), (1, 1)]
    after = looped(Recognizer(tiny_engine.path, threshold=0.3), plans[1].items[5:])[0]
    assert [r and r.scores for r in found["1"][0][4:]] == [r and r.scores for r in after]


def test_an_engine_that_goes_on_failing_ends_it_with_a_sentence(tiny_engine: Any) -> None:
    def seen(_: np.ndarray) -> None:
        raise RuntimeError("out of memory\nand more")

    engine = slowed(Engine.open(tiny_engine.path, slots=2), 0.0, seen)
    cameras = cameras_of(engine, [Script(timed(noise(2000, 0), 10)) for _ in range(2)])
    with pytest.raises(UserError, match="failed at 5 steps in a row, the last time with: out of memory; start again"):
        play(cameras)
    assert all(camera.frame_count < 50 for camera in cameras.cameras)


def test_whoever_does_not_take_the_news_holds_the_engine_up_and_nothing_grows(tiny_engine: Any) -> None:
    source = Script(timed(noise(1000, 0), 10))
    with cameras_of(Engine.open(tiny_engine.path), [source]) as cameras:
        wait_until(lambda: source.given > 60)
        sleep(0.3)
        given = source.given
        assert given < 70
        cameras.take(1.0)
        wait_until(lambda: source.given > given + 50)


class Blocked(Source):
    """A live source whose next frame never comes, and which ends when it is stopped."""

    name, live, size = "a lost camera", True, (64, 48)

    def _next(self, wanted: Wanted) -> Reading | None:
        while not self.stopped:
            sleep(0.01)
        return None


def test_whoever_leaves_or_stops_ends_the_threads_at_once(tiny_engine: Any) -> None:
    engine = Engine.open(tiny_engine.path, slots=3)
    for leave in (True, False):
        sources = [Script(timed(noise(1, 0) * 100_000, 10)), camera(counted(250), 50)[0], Blocked()]
        begin = perf_counter()
        with cameras_of(engine, sources, paced=True, pictures=True) as cameras:
            while not any(news.result for news in cameras.take(1.0) or ()):
                pass
            if not leave:
                cameras.stop()
                left = []
                while (news := cameras.take(1.0)) is not None:
                    left += news
                assert all(camera.source.stopped for camera in cameras.cameras)
        assert perf_counter() - begin < 3


class Coming(Source):
    """A camera that runs as soon as it is allowed to, which another thread says."""

    name, live, size = "a camera that comes", True, (64, 48)

    def __init__(self, on_change: OnChange, allowed: threading.Event) -> None:
        super().__init__(on_change)
        self._change(SourceState.OPENING)
        self.said = threading.Event()
        self._allowed = allowed
        self.thread = threading.Thread(target=self._come)
        self.thread.start()

    def _come(self) -> None:
        self._allowed.wait()
        self._change(SourceState.RUNNING)
        self.said.set()

    def _next(self, wanted: Wanted) -> Reading | None:
        self.said.wait()
        return None


def test_no_change_of_state_overtakes_another_while_the_cameras_start(
    tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = threading.Event()
    change = Cameras._change

    def slow(self: Cameras, camera: Camera, what: StateChange) -> None:
        if what.state is SourceState.OPENING:
            # Here the camera comes, if it can.
            allowed.set()
            camera.source.said.wait(0.3)  # type: ignore[attr-defined]
        change(self, camera, what)

    monkeypatch.setattr(Cameras, "_change", slow)
    cameras = cameras_of(Engine.open(tiny_engine.path), [lambda on_change: Coming(on_change, allowed)])
    states = [news.change.state for news in everything(cameras) if news.change]
    assert states == [SourceState.OPENING, SourceState.RUNNING, SourceState.ENDED]
    cameras.cameras[0].source.thread.join()  # type: ignore[attr-defined]


def test_an_error_of_the_caller_ends_it(tiny_engine: Any) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        cameras_of(Engine.open(tiny_engine.path), [Script(timed(noise(5000, 0), 10))]),
    ):
        1 / 0  # noqa: B018
