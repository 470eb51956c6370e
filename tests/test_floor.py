from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from stsm_rt import floor
from stsm_rt.floor import FloorMeter, Rates, why_not_counted
from stsm_rt.machine import COPY_BYTES, PRODUCT_OPERATIONS
from stsm_rt.operations import count_operations
from stsm_rt.timing import Candidate, Run, Times


@pytest.fixture
def rates():
    """Measured after the pairs 0 and 2: a product in 0.1 s by numpy, in 0.2 s by the other; a copy in 0.01 s."""
    return Rates(
        {"onnxruntime": Times.of([[0.2], [0.2]]), "numpy": Times.of([[0.1], [0.1]])},
        Times.of([[0.01], [0.01]]),
        (0, 2),
    )


def test_the_fastest_product_gives_the_matrix_rate(rates):
    assert rates.by == "numpy"
    assert rates.operations_per_second == pytest.approx(PRODUCT_OPERATIONS / 0.1)
    assert rates.bytes_per_second == pytest.approx(COPY_BYTES / 0.01)
    assert set(rates.record()["products"]) == {"numpy", "onnxruntime"}
    assert "numpy" in rates.line()


def test_a_step_is_held_to_the_rate_of_its_own_pair(rates, tiny_engine):
    counted = count_operations(tiny_engine.path)
    ideal = counted.multiply_adds / rates.operations_per_second
    run = Run(
        **vars(Times.of([[2 * ideal], [9 * ideal], [4 * ideal]])),
        engine="tiny",
        runtime="onnxruntime",
        network="colours",
        shift="tsm_online",
        folding="none",
        precision="fp32",
        input=(12, 16),
        sha256="",
    )

    found = rates.floor(run, tiny_engine.manifest, tiny_engine.path, tiny_engine.path)

    assert (found.operations, found.weight_bytes) == (counted.multiply_adds, counted.weight_bytes)
    # The picture and two triples of floats are read and written.
    assert found.state_bytes == 2 * 4 * (12 * 16 * 3 + 3 + 3)
    assert found.multiplying == pytest.approx(ideal)
    assert found.moving == pytest.approx((found.weight_bytes + found.state_bytes) / rates.bytes_per_second)
    assert (found.step.ratio_median, found.step.pairs) == (pytest.approx(3), 2)
    assert "x3.000" in found.line()


def test_the_rates_are_measured_after_about_thirty_pairs_of_a_long_run(monkeypatch):
    calls = []
    monkeypatch.setattr(
        floor,
        "matrix_products",
        lambda: {"numpy": Candidate(step=lambda: calls.append("product"), warm_up=0, counted=1)},
    )
    monkeypatch.setattr(
        floor, "memory_copy", lambda: Candidate(step=lambda: calls.append("copy"), warm_up=0, counted=1)
    )
    meter = FloorMeter(pairs=100)

    for pair in range(100):
        meter.measure(pair)

    assert calls == ["product", "copy"] * 34
    assert meter.rates().pairs == tuple(range(0, 100, 3))


def test_what_cannot_be_held_to_the_rate_says_why(tiny_engine, monkeypatch):
    manifest = tiny_engine.manifest

    assert why_not_counted(manifest) is None
    assert "int8" in (why_not_counted(dataclasses.replace(manifest, precision="int8")) or "")
    assert "tensorrt" in (why_not_counted(dataclasses.replace(manifest, runtime="tensorrt")) or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install onnx" in (why_not_counted(manifest) or "")
