from __future__ import annotations

from pathlib import Path

from stsm_rt import operations
from stsm_rt.bench_run import Contender, Group, time_group
from stsm_rt.operations import Operations


def test_files_are_compared_with_the_first(tmp_path: Path):
    group = Group.of_files([Path("a.onnx"), Path("b.onnx"), Path("c.onnx")], again=True)

    assert [contender.name for contender in group.contenders] == ["a.onnx", "b.onnx", "c.onnx", "a.onnx again"]
    assert group.compared == ((0, 1), (0, 2), (0, 3))


def test_files_of_one_name_are_told_apart_by_their_paths():
    group = Group.of_files([Path("one/a.onnx"), Path("two/a.onnx")])

    assert [contender.name for contender in group.contenders] == [str(Path("one/a.onnx")), str(Path("two/a.onnx"))]


def test_the_operations_are_those_of_the_network_without_what_moves_channels(make_engine, monkeypatch):
    plain, shifted = make_engine(), make_engine(height=24, width=32)
    counts = {plain.path: Operations(1000, 0, 8), shifted.path: Operations(1200, 0, 9)}
    monkeypatch.setattr(operations, "count_operations", counts.__getitem__)
    group = Group(
        contenders=(
            Contender(name="plain", path=plain.path, plain=True),
            Contender(name="shifted", path=shifted.path),
            Contender(name="shifted again", path=shifted.path),
        ),
        compared=((0, 1), (1, 2)),
    )

    timed = time_group(group, pairs=1)

    assert [(c.a, c.b) for c in timed.comparisons] == [("plain", "shifted"), ("shifted", "shifted again")]
    assert [floor.engine for floor in timed.floors] == ["plain", "shifted"]
    assert [(floor.operations, floor.weight_bytes) for floor in timed.floors] == [(1000, 8), (1000, 9)]
    assert [run.engine for run in timed.runs] == ["plain", "shifted", "shifted again"]


def test_engines_in_int8_have_no_floor_and_it_is_said_once(make_engine):
    engine = make_engine(precision="int8")

    timed = time_group(Group.of_files([engine.path], again=True), pairs=1)

    assert (timed.rates, timed.floors) == (None, ())
    assert timed.left_out == ("no floor of 2 engines, as the matrix rate is that of FP32 and the engine is int8",)
    assert timed.floor_record() == {"rates": None, "steps": [], "left_out": list(timed.left_out)}
    assert timed.lines()[-1] == timed.left_out[0]
