"""The inspect command prints what an engine is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stsm_rt.engine import base
from stsm_rt.inspect import main
from stsm_rt.manifest import manifest_path


def test_it_prints_the_manifest_the_states_and_their_sizes(
    make_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_engine(height=64, width=96)
    assert main([str(tiny.path)]) == 0
    table = capsys.readouterr().out
    for words in (
        str(tiny.path),
        "colours, shift tsm_online: 1/8 at (1, 0, 0)",
        "1 x 64 x 96 x 3 (BGR), 10 per second",
        "4: background, blue, green, red",
        "jhmdb_split1_top1 61.0",
        tiny.manifest.sha256,
    ):
        assert words in table
    # 2 buffers of 64 x 96 x 3 floats, 2 of 3 floats and 3 of 3 floats.
    assert "states: 3, 144.1 KiB per slot" in table
    assert re.search(r"state_00 +float32 +1 x 64 x 96 x 3 +1 +2 of 72\.0 KiB", table)
    assert re.search(r"state_02 +float32 +1 x 3 +2 +3 of 12 bytes", table)


def test_it_prints_an_engine_without_states_background_or_accuracy(
    make_engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = make_engine(states=(), background=None, accuracy=None, shift={"name": "off", "groups": []})
    assert main([str(tiny.path)]) == 0
    table = capsys.readouterr().out
    assert "states: 0, 0 bytes per slot" in table
    assert re.search(r"^background +none$", table, re.MULTILINE)
    assert re.search(r"^accuracy +none$", table, re.MULTILINE)
    assert re.search(r"^network +colours, shift off$", table, re.MULTILINE)


def test_an_error_is_one_sentence_and_exit_code_2(make_engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = make_engine()
    manifest_path(tiny.path).write_text("{", encoding="utf-8")
    assert main([str(tiny.path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"stsm-rt: error: the manifest .* is not valid JSON .*\n", printed.err)


def test_without_a_file_it_takes_the_embedded_engine(
    make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "stsm_rt"
    (package / "engines").mkdir(parents=True)
    monkeypatch.setattr(base, "__file__", str(package / "engine" / "base.py"))
    assert main([]) == 2
    assert "embedded engine" in capsys.readouterr().err
    tiny = make_engine()
    for path in (tiny.path, manifest_path(tiny.path)):
        (package / "engines" / path.name.replace("colours.onnx", base._EMBEDDED)).write_bytes(path.read_bytes())
    assert main([]) == 0
    assert base._EMBEDDED in capsys.readouterr().out


def test_it_is_a_module_that_can_be_run(tiny_engine: Any) -> None:
    command = [sys.executable, "-m", "stsm_rt.inspect"]
    done = subprocess.run([*command, str(tiny_engine.path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "state_02" in done.stdout
    failed = subprocess.run([*command, "none.onnx"], capture_output=True, text=True, timeout=60)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert re.fullmatch(r"stsm-rt: error: there is no engine file none\.onnx.*\n", failed.stderr)
