"""Recorded ranges survive their file, and a file that is none is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stsm_rt.errors import UserError
from stsm_rt.ranges import FORMAT_VERSION, METHODS, Ranges

RANGES = Ranges(
    format_version=FORMAT_VERSION,
    network="r8",
    shift="stsm_online",
    weights_sha256="a" * 64,
    data="clips",
    clips=2,
    frames=20,
    method="max",
    tensors={
        "stem.input": {"max": (-1.0, 3.0), "percentile": (-0.5, 2.0), "entropy": (-1.0, 1.5)},
        "conv.input": {"max": (-4.0, 3.0)},
    },
    means={"stem": (0.5, -0.25, 0.0)},
)

lows, highs = st.floats(max_value=0, allow_infinity=False), st.floats(min_value=0, allow_infinity=False)
records = st.builds(
    Ranges,
    format_version=st.just(FORMAT_VERSION),
    network=st.text(),
    shift=st.text(),
    weights_sha256=st.text(),
    data=st.text(),
    clips=st.integers(0),
    frames=st.integers(0),
    method=st.sampled_from(METHODS),
    tensors=st.dictionaries(st.text(), st.dictionaries(st.sampled_from(METHODS), st.tuples(lows, highs))),
    means=st.dictionaries(st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple)),
)


@given(records)
def test_a_record_comes_back_from_its_file_as_it_was(record: Ranges) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranges.json"
        record.save(path)
        assert Ranges.load(path) == record
        assert [file.name for file in Path(folder).iterdir()] == ["ranges.json"]


def test_the_file_has_one_line_for_each_tensor_and_module(tmp_path: Path) -> None:
    RANGES.save(tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum("stem.input" in line for line in lines) == 1
    assert any("conv.input" in line and "-4.0, 3.0" in line for line in lines)
    assert any('"stem": [0.5, -0.25, 0.0]' in line for line in lines)


def test_what_each_form_leaves_out_is_kept(tmp_path: Path) -> None:
    recorded = dataclasses.replace(RANGES, exclude={"onnx": ("stem", "*.conv")})
    recorded.save(tmp_path / "r.json")
    assert Ranges.load(tmp_path / "r.json") == recorded
    with pytest.raises(ValueError, match="onnx leaves out"):
        dataclasses.replace(RANGES, exclude={"onnx": (1,)})  # type: ignore[dict-item]


def test_a_range_is_that_of_the_method() -> None:
    assert RANGES.range("stem.input") == (-1.0, 3.0)
    assert RANGES.with_method("percentile").range("stem.input") == (-0.5, 2.0)
    assert RANGES.with_method("entropy") == dataclasses.replace(RANGES, method="entropy")
    assert RANGES.method == "max"


def test_the_largest_magnitude_is_of_either_sign() -> None:
    assert (RANGES.amax("stem"), RANGES.amax("conv")) == (3.0, 4.0)
    assert RANGES.with_method("entropy").amax("stem") == 1.5


def test_an_unknown_method_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(UserError, match=r"'minmax'.*max, percentile, entropy"):
        RANGES.with_method("minmax")


@pytest.mark.parametrize(
    "ask",
    [
        lambda ranges: ranges.amax("head"),
        lambda ranges: ranges.range("head.input"),
        lambda ranges: ranges.mean("head"),
        lambda ranges: ranges.with_method("entropy").amax("conv"),
    ],
)
def test_a_module_that_was_not_calibrated_is_named(ask: Any) -> None:
    with pytest.raises(UserError, match=r"no (range|means) of (head|conv).*calibrate this one"):
        ask(RANGES)


def record_with(**fields: Any) -> str:
    return json.dumps({**dataclasses.asdict(RANGES), **fields})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[1, 2]",
        "{}",
        b"\xff\xfe",
        record_with(format_version=FORMAT_VERSION + 1),
        record_with(method="minmax"),
        record_with(extra=1),
        record_with(weights_sha256=None),
        record_with(frames="many"),
        record_with(tensors=[]),
        record_with(tensors={"stem.input": {"max": [1.0, 2.0]}}),
        record_with(tensors={"stem.input": {"max": [-2.0, -1.0]}}),
        record_with(tensors={"stem.input": {"max": [-1.0, float("inf")]}}),
        record_with(tensors={"stem.input": {"max": [-1.0, float("nan")]}}),
        record_with(tensors={"stem.input": {"max": [-1.0]}}),
        record_with(tensors={"stem.input": {"max": "low"}}),
        record_with(tensors={"stem.input": None}),
        record_with(means={"stem": [None]}),
        record_with(means={"stem": [float("nan")]}),
    ],
    ids=lambda content: str(content)[-40:],
)
def test_what_is_no_record_is_refused_in_one_sentence(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="is not a calibration that stsm-rt calibrate wrote") as raised:
        Ranges.load(path)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Ranges.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be read"):
        Ranges.load(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        RANGES.save(tmp_path / "absent" / "r.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        RANGES.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
