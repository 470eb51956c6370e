"""The manifest: what is written can be read, and whatever does not fit is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stsm_rt.errors import UserError
from stsm_rt.manifest import FORMAT_VERSION, Manifest, manifest_path, sha256_of

FIELDS = [field.name for field in dataclasses.fields(Manifest)]


@pytest.fixture
def record(tiny_engine: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(tiny_engine.manifest.to_json())
    return data


def refusal(data: Any) -> str:
    with pytest.raises(UserError) as raised:
        Manifest.from_json(data if isinstance(data, str) else json.dumps(data), "x.onnx.json")
    sentence = str(raised.value)
    assert sentence.startswith("the manifest x.onnx.json ")
    assert "\n" not in sentence
    return sentence


def test_what_is_written_is_read_back(make_engine: Any) -> None:
    tiny = make_engine(
        labels=("gehen", "großer Sprung", "歩く", "none"),
        background="none",
        calibration={"clips": 12},
        frame_rate=12.5,
    )
    assert Manifest.load(tiny.path) == tiny.manifest
    assert Manifest.load(str(tiny.path)) == tiny.manifest
    assert Manifest.from_json(tiny.manifest.to_json(), "x") == tiny.manifest


def test_the_manifest_lies_beside_the_engine() -> None:
    assert manifest_path("engines/a.onnx") == Path("engines/a.onnx.json")
    assert manifest_path(Path("a.engine")) == Path("a.engine.json")


def test_a_whole_number_will_do_for_a_number(record: dict[str, Any]) -> None:
    manifest = Manifest.from_json(json.dumps(record | {"frame_rate": 15}), "x")
    assert isinstance(manifest.frame_rate, float)


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("folding", "preprocessing")])
def test_a_missing_field_is_named(record: dict[str, Any], name: str) -> None:
    del record[name]
    assert f"lacks {name};" in refusal(record)


def test_a_record_of_an_earlier_export_is_read(record: dict[str, Any]) -> None:
    del record["folding"], record["preprocessing"]
    for state in record["states"]:
        del state["zero"]
    manifest = Manifest.from_json(json.dumps(record), "x")
    assert manifest.folding == "none" and {state.zero for state in manifest.states} == {0}


@pytest.mark.parametrize("name", FIELDS)
def test_a_mistyped_field_is_named(record: dict[str, Any], name: str) -> None:
    assert re.search(rf"\b{name} must be .*, not true", refusal(record | {name: True}))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("decision", "smoothing"), "3", 'smoothing must be a whole number, not "3"'),
        (("decision", "smoothing"), 3.5, "smoothing must be a whole number, not 3.5"),
        (("states", 1, "shape"), [1, "3"], 'shape[1] must be a whole number, not "3"'),
        (("states", 1, "delay"), None, "delay must be a whole number, not null"),
        (("states", 1), [], "states[1] must be an object, not []"),
        (("labels", 2), 7, "labels[2] must be a text, not 7"),
    ],
)
def test_a_mistyped_value_inside_is_named(
    record: dict[str, Any], path: tuple[Any, ...], value: Any, sentence: str
) -> None:
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert sentence in refusal(record)


def test_a_field_that_is_missing_or_unknown_inside_is_named(record: dict[str, Any]) -> None:
    state = record["states"][0]
    assert "states[0] lacks delay" in refusal(record | {"states": [{k: v for k, v in state.items() if k != "delay"}]})
    assert "decision has unknown fields speed" in refusal(record | {"decision": record["decision"] | {"speed": 1}})


def test_an_unknown_field_is_named(record: dict[str, Any]) -> None:
    assert "unknown fields colour, sound" in refusal(record | {"colour": 1, "sound": 2})


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1])
def test_another_format_version_is_said_before_anything_else(version: int) -> None:
    sentence = refusal({"format_version": version, "other": "fields"})
    assert f"has format version {version}, this stsm-rt understands {FORMAT_VERSION}" in sentence


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "not json"])
def test_a_text_that_is_not_json_is_said(text: str) -> None:
    assert "is not valid JSON" in refusal(text)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "3"])
def test_json_that_is_not_a_record_is_said(text: str) -> None:
    assert "must be an object" in refusal(text)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runtime": "abacus"}, "runtime must be onnxruntime, openvino, tensorrt, tensorrt-rtx or onnx, not 'abacus'"),
        ({"folding": "in half"}, "folding must be none, depthwise, split, not 'in half'"),
        ({"precision": "fp8"}, "precision must be fp32, fp16 or int8, not 'fp8'"),
        ({"input_height": 0}, "input_height must be positive"),
        ({"frame_rate": float("nan")}, "frame_rate must be positive"),
        ({"frame_rate": float("inf")}, "frame_rate must be positive"),
        ({"frame_rate": 10**400}, "too large"),
        ({"labels": []}, "labels must not be empty"),
        ({"labels": ["a", "a"]}, "labels must differ"),
        ({"background": "other"}, "background 'other' must be one of the labels"),
        ({"shift": {}}, "shift must hold"),
        ({"shift": {"name": "tsm", "groups": [1]}}, "shift must hold"),
        ({"sha256": "abc"}, "sha256 must be 64"),
        ({"weights_sha256": "Z" * 64}, "weights_sha256 must be 64"),
        ({"batch": 2}, "must start with the batch 2"),
    ],
)
def test_a_value_out_of_range_is_said(record: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(record | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"delay": 0}, "delay of 'state_00' must be at least 1"),
        ({"shape": []}, "must hold positive sizes"),
        ({"shape": [1, -3]}, "must hold positive sizes"),
        ({"dtype": "int4"}, "must be float32, float16, uint8"),
        ({"name": ""}, "must not be empty"),
        ({"name": "state_01"}, "names of the states must differ"),
    ],
)
def test_a_state_out_of_range_is_said(record: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    record["states"][0] |= changes
    assert sentence in refusal(record)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"smoothing": 0}, "smoothing must be at least 1"),
        ({"min_steps": 0}, "min_steps must be at least 1"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1"),
        ({"release": 0.9}, "release must be between 0 and the threshold 0.6"),
        ({"release": -0.1}, "release must be between"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be positive"),
    ],
)
def test_a_decision_out_of_range_is_said(record: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    record["decision"] |= changes
    assert sentence in refusal(record)


def test_a_manifest_of_another_engine_is_refused(make_engine: Any) -> None:
    first, second = make_engine(), make_engine(height=24)
    manifest_path(first.path).write_text(second.manifest.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=f"SHA-256 {sha256_of(first.path)[:12]}.*{sha256_of(second.path)[:12]}"):
        Manifest.load(first.path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "there is no engine file"),
        (lambda path: manifest_path(path).unlink(), r"has no manifest, colours\.onnx\.json was expected"),
        (lambda path: manifest_path(path).write_bytes(b"\xff\xfe\xff"), "cannot be read"),
    ],
)
def test_files_that_are_absent_or_unreadable_are_said(
    make_engine: Any, spoil: Callable[[Path], Any], sentence: str
) -> None:
    tiny = make_engine()
    spoil(tiny.path)
    with pytest.raises(UserError, match=sentence):
        Manifest.load(tiny.path)


def test_a_save_that_fails_leaves_the_old_manifest_and_nothing_else(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_engine()
    before = {path.name: path.read_bytes() for path in tiny.path.parent.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        dataclasses.replace(tiny.manifest, network="other").save(tiny.path)
    assert {path.name: path.read_bytes() for path in tiny.path.parent.iterdir()} == before


def test_a_save_leaves_only_the_manifest(make_engine: Any) -> None:
    tiny = make_engine()
    dataclasses.replace(tiny.manifest, network="other").save(tiny.path)
    assert {path.name for path in tiny.path.parent.iterdir()} == {"colours.onnx", "colours.onnx.json"}
    assert Manifest.load(tiny.path).network == "other"


def test_numbers_that_json_does_not_know_are_never_written(tiny_engine: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(tiny_engine.manifest, accuracy={"top1": float("nan")}).save(tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
