"""Live visitors: a slot each, in turn, and nothing of one in the results of another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from clips import plain
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt.app import visitors as visitors_module
from stsm_rt.app.engines import EngineChoice
from stsm_rt.app.visitors import Visit, Visitors
from stsm_rt.engine import Engine
from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.result import Result

Frames = Sequence[np.ndarray]


def choice(engine: Any, title: str = "colours") -> EngineChoice:
    return EngineChoice(engine.path, title, engine.manifest)


def visitors_of(engine: Any, most: int = 2) -> Visitors:
    return Visitors([choice(engine)], most=most, idle=60.0)


def inside(visitors: Visitors, **options: Any) -> Visit:
    visit = visitors.enter(**options)
    visit.open()
    return visit


def show(visit: Visit, frames: Frames, begin: int = 0) -> list[Any]:
    results = [visit.update(frame, (begin + i) / 10, arrived=perf_counter()) for i, frame in enumerate(frames)]
    return [said(result) for result in results]


def alone(engine: Any, frames: Frames) -> list[Any]:
    """What a recognizer with an engine of its own says."""
    recognizer = Recognizer(engine.path, topk=5)
    return [said(recognizer.update(frame, i / 10)) for i, frame in enumerate(frames)]


def said(result: Result | None) -> Any:
    assert result is not None
    return {key: value for key, value in result.to_record().items() if key != "latency"}, result.events


def test_an_engine_is_opened_once_when_the_first_visitor_needs_it(tiny_engine: Any, monkeypatch: Any) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(Engine, "open", lambda path, **options: opened.append(options) or open_engine(path, **options))
    visitors = visitors_of(tiny_engine, most=3)
    visits = [visitors.enter() for _ in range(3)]
    assert (visitors.status.engines, visitors.status.slots, visitors.status.inside) == ((), 0, 3)
    threads = [threading.Thread(target=visit.open) for visit in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [{"slots": 3, "threads": None}]
    assert (visitors.status.engines, visitors.status.slots) == (("colours",), 3)


open_engine = Engine.open


def test_who_comes_when_all_places_are_taken_enters_in_turn(tiny_engine: Any) -> None:
    visitors, moves = visitors_of(tiny_engine), [0] * 5
    visits = [visitors.enter(moved=lambda i=i: moves.__setitem__(i, moves[i] + 1)) for i in range(5)]
    assert [visit.waiting for visit in visits] == [0, 0, 1, 2, 3]
    visits[1].leave()
    assert [visit.waiting for visit in visits] == [0, 0, 0, 1, 2] and moves == [0, 0, 1, 1, 1]
    visits[3].leave()
    assert [visit.waiting for visit in visits] == [0, 0, 0, 0, 1]
    visits[3].leave()
    visits[0].leave()
    assert visits[4].waiting == 0
    assert (visitors.status.inside, visitors.status.waiting) == (2, 0)


def test_the_cap_is_over_all_engines(tiny_engine: Any, make_engine: Any) -> None:
    visitors = Visitors([choice(tiny_engine), choice(make_engine(), "more colours")], most=2, idle=60.0)
    first, second = inside(visitors), inside(visitors, title="more colours")
    third = visitors.enter("more colours")
    assert third.waiting == 1 and visitors.status.engines == ("colours", "more colours")
    first.leave()
    third.open()
    assert visitors.status.slots == 2
    for visit in (second, third):
        visit.leave()
    assert (visitors.status.slots, visitors.status.inside) == (0, 0)


def test_a_slot_is_given_on_only_when_the_step_in_it_has_ended(tiny_engine: Any, monkeypatch: Any) -> None:
    reached, proceed = threading.Event(), threading.Event()
    conclude = Recognizer.conclude

    def slow(self: Recognizer, prepared: Any) -> Result:
        reached.set()
        proceed.wait(10)
        return conclude(self, prepared)

    visitors = visitors_of(tiny_engine, most=1)
    first, second = inside(visitors), visitors.enter()
    monkeypatch.setattr(Recognizer, "conclude", slow)
    thread = threading.Thread(target=show, args=(first, plain("red", 1)))
    thread.start()
    assert reached.wait(10)
    first.leave()
    assert second.waiting == 1 and visitors.status.slots == 1
    proceed.set()
    thread.join()
    assert second.waiting == 0 and visitors.status.slots == 0
    second.open()
    assert show(second, plain("blue", 5)) == alone(tiny_engine, plain("blue", 5))


def test_who_has_left_makes_no_step(tiny_engine: Any) -> None:
    visitors = visitors_of(tiny_engine)
    visit = inside(visitors)
    visit.leave()
    with pytest.raises(RuntimeError, match="has ended"):
        show(visit, plain("red", 1))
    late = visitors.enter()
    late.leave()
    with pytest.raises(RuntimeError, match="has ended"):
        late.open()
    assert visitors.status.slots == 0


def test_settings_are_those_of_the_visitor(tiny_engine: Any) -> None:
    visitors = visitors_of(tiny_engine)
    usual, own = inside(visitors), inside(visitors, threshold=0.99999, smoothing=1)
    assert (usual.threshold, own.threshold) == (0.6, 0.99999)
    first, second = show(usual, plain("red", 6)), show(own, plain("red", 6))
    assert first[-1][0]["active"] == "red" and second[-1][0]["active"] is None
    assert (first[1][0]["warming_up"], second[1][0]["warming_up"]) == (True, False)


@pytest.mark.parametrize("options", [{"threshold": 1.5}, {"smoothing": 0}, {"threshold": float("nan")}])
def test_a_setting_that_makes_no_sense_costs_no_slot(tiny_engine: Any, options: Any) -> None:
    visitors = visitors_of(tiny_engine)
    visit = visitors.enter(**options)
    with pytest.raises(UserError, match="must be"):
        visit.open()
    visit.leave()
    assert (visitors.status.slots, visitors.status.inside) == (0, 0)


def test_an_engine_that_does_not_open_says_why_and_holds_nothing(make_engine: Any) -> None:
    engine = make_engine()
    visitors = visitors_of(engine)
    engine.path.write_bytes(b"damaged")
    visit = visitors.enter()
    with pytest.raises(UserError, match="damaged"):
        visit.open()
    visit.leave()
    assert (visitors.status.engines, visitors.status.slots, visitors.status.inside) == ((), 0, 0)


def test_a_graph_with_rows_has_no_more_slots_than_these(make_engine: Any) -> None:
    visitors = visitors_of(make_engine(batch=2, delays=(1, 1, 1)), most=3)
    visits = [inside(visitors), inside(visitors)]
    third = visitors.enter()
    with pytest.raises(UserError, match="serves 2 at a time"):
        third.open()
    third.leave()
    for visit in visits:
        visit.leave()
    assert visitors.status.slots == 0


def test_an_unknown_engine_and_an_endless_line_are_refused(tiny_engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(visitors_module, "_LONGEST_LINE", 2)
    visitors = visitors_of(tiny_engine, most=1)
    with pytest.raises(UserError, match="no engine 'colors'"):
        visitors.enter("colors")
    for _ in range(3):
        visitors.enter()
    with pytest.raises(UserError, match="2 visitors are waiting"):
        visitors.enter()
    assert (visitors.status.inside, visitors.status.waiting) == (1, 2)


def test_a_ticket_is_good_once_and_for_a_minute(tiny_engine: Any, monkeypatch: Any) -> None:
    visitors = visitors_of(tiny_engine)
    now = 1000.0
    monkeypatch.setattr(visitors_module, "monotonic", lambda: now)
    first, second, third = (visitors.ticket() for _ in range(3))
    assert len({first, second, third}) == 3
    assert visitors.redeem(first) and not visitors.redeem(first) and not visitors.redeem("made up")
    now += 59
    assert visitors.redeem(second)
    now += 2
    assert not visitors.redeem(third)
    for _ in range(1000):
        visitors.ticket()
    with pytest.raises(UserError, match="again in a minute"):
        visitors.ticket()
    now += 61
    assert visitors.redeem(visitors.ticket())


MOVES = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["frame", "frame", "frame", "leave"])), max_size=60)


@settings(max_examples=60, deadline=None)
@given(moves=MOVES, most=st.integers(1, 3), seed=st.integers(0, 100))
def test_in_any_order_each_visitor_gets_what_they_would_get_alone(
    tiny_engine: Any, moves: list[tuple[int, str]], most: int, seed: int
) -> None:
    visitors = visitors_of(tiny_engine, most)
    frames = tiny_engine.frames(60, seed)
    visits: dict[int, Visit] = {}
    got: dict[int, list[Any]] = {}
    shown: dict[int, list[np.ndarray]] = {}
    order: list[int] = []

    def leave(who: int) -> None:
        if who in visits:
            visits.pop(who).leave()
            order.remove(who)
            if who in got:
                assert got.pop(who) == alone(tiny_engine, shown.pop(who))

    for i, (who, move) in enumerate(moves):
        if move == "leave":
            leave(who)
            continue
        if who not in visits:
            visits[who] = visitors.enter()
            order.append(who)
        # Those who came first are inside.
        assert [visits[other].waiting for other in order] == [max(0, place - most + 1) for place in range(len(order))]
        if visits[who].waiting:
            continue
        if who not in got:
            visits[who].open()
            got[who], shown[who] = [], []
        got[who] += show(visits[who], frames[i : i + 1], len(shown[who]))
        shown[who].append(frames[i])
    for who in list(visits):
        leave(who)
    assert (visitors.status.slots, visitors.status.inside, visitors.status.waiting) == (0, 0, 0)


def test_at_the_same_time_each_visitor_gets_what_they_would_get_alone(tiny_engine: Any) -> None:
    visitors = visitors_of(tiny_engine, most=4)
    streams = [list(tiny_engine.frames(80, seed)) for seed in range(4)]
    visits = [inside(visitors) for _ in streams]
    got: dict[int, list[Any]] = {}

    def watch(who: int) -> None:
        got[who] = show(visits[who], streams[who])

    threads = [threading.Thread(target=watch, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for who, stream in enumerate(streams):
        assert got[who] == alone(tiny_engine, stream)
