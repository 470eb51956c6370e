from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from stsm_rt.app.engines import describe, find_engines
from stsm_rt.engine.base import shipped_folder
from stsm_rt.errors import UserError
from stsm_rt.manifest import manifest_path


def copy(engine: Any, path: Path) -> Path:
    shutil.copy(engine.path, path)
    shutil.copy(manifest_path(engine.path), manifest_path(path))
    return path


def test_the_shipped_engines_are_offered_the_embedded_one_first() -> None:
    folder = shipped_folder("engines")
    assert folder is not None
    choices = find_engines(folder)
    assert [choice.title for choice in choices] == [
        "EfficientNet-Lite0, FP32, ONNX Runtime",
        "EfficientNet-Lite0, INT8, ONNX Runtime",
    ]
    words = describe(choices[1])
    for part in (
        "10 in a second",
        "288 x 224",
        "8-bit integers",
        "65.3 % of its 268 test clips",
        "It knows 21 actions:",
    ):
        assert part in words
    assert "nothing" not in words.split("It knows")[1]


def test_what_does_not_open_is_left_out_and_what_is_alike_is_told_apart(tiny_engine: Any, tmp_path: Path) -> None:
    for name in ("b.onnx", "a.onnx", "damaged.onnx", "lonely.onnx", "graph.onnx"):
        copy(tiny_engine, tmp_path / name)
    (tmp_path / "damaged.onnx").write_bytes(b"other bytes")
    manifest_path(tmp_path / "lonely.onnx").unlink()
    dataclasses.replace(tiny_engine.manifest, runtime="onnx").save(tmp_path / "graph.onnx")
    (tmp_path / "notes.json").write_text("{}")
    choices = find_engines(tmp_path)
    assert [choice.title for choice in choices] == [
        "colours, FP32, ONNX Runtime (a.onnx)",
        "colours, FP32, ONNX Runtime (b.onnx)",
    ]
    assert [choice.path.name for choice in choices] == ["a.onnx", "b.onnx"]
    assert "Its accuracy was not measured." in describe(choices[0])


def test_no_engine_is_one_sentence_with_each_reason(tiny_engine: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        find_engines(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no file with a manifest"):
        find_engines(tmp_path)
    copy(tiny_engine, tmp_path / "damaged.onnx").write_bytes(b"other bytes")
    with pytest.raises(UserError, match=r"can be opened here: .*damaged\.onnx"):
        find_engines(tmp_path)
