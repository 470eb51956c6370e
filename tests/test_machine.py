from __future__ import annotations

import importlib.util
from time import process_time

from stsm_rt import machine
from stsm_rt.machine import Quiet, machine_lines, matrix_products, memory_copy, quiet_line
from stsm_rt.timing import time_in_turns


def test_the_machine_and_the_packages_are_named():
    of = machine.machine()
    versions = machine.versions()

    assert of["processor"] and of["system"] and of["cores"] >= of["threads"] >= 1
    assert {"stsm-rt", "python", "numpy", "onnxruntime"} <= set(versions)
    first, second = machine_lines({"machine": of, "versions": versions})
    assert of["processor"] in first and f"numpy {versions['numpy']}" in second


def test_the_matrix_product_is_computed_by_what_is_installed(monkeypatch):
    assert list(matrix_products()) == ["numpy", "onnxruntime"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(matrix_products()) == ["numpy"]


def test_products_and_the_copy_take_their_turns():
    candidates = [*matrix_products().values(), memory_copy()]

    times = time_in_turns(candidates, pairs=1)

    assert [len(block) for blocks in times for block in blocks] == [2, 2, 2]
    assert all(seconds > 0 for blocks in times for block in blocks for seconds in block)


def test_own_work_is_not_taken_for_that_of_others():
    quiet = Quiet()
    begin = process_time()
    while process_time() - begin < 0.5:
        pass
    shares = quiet.record()

    if shares is not None:  # Linux
        assert set(shares) == {"others", "stolen"}
        assert all(0 <= share <= 1 for share in shares.values())


def test_own_and_other_work_are_told_apart(monkeypatch):
    ticks = iter([(10.0, 1.0, 4.0, 100.0), (18.0, 1.5, 10.0, 120.0)])
    monkeypatch.setattr(machine, "_ticks", lambda: next(ticks))

    # Of 20 seconds of all cores 8 were busy, 6 of them with this process.
    assert Quiet().record() == {"others": 0.1, "stolen": 0.025}


def test_a_machine_that_is_not_quiet_is_said():
    assert quiet_line({"others": 0.012, "stolen": 0.034}) == (
        "meanwhile other processes used 1.2 % of the cores, and the hypervisor took 3.4 % away"
    )
    assert "not quiet, measure again" in quiet_line({"others": 0.5, "stolen": 0.0})
    assert "not known" in quiet_line(None)


def test_a_system_that_does_not_tell_gives_none(monkeypatch):
    monkeypatch.setattr(machine, "_ticks", lambda: None)

    assert Quiet().record() is None
