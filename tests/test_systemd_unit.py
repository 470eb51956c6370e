"""The example of a systemd unit: systemd takes it as it is, and the command takes its options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from required import required_program

from stsm_rt.webcam_options import parse

UNIT = Path(__file__).resolve().parents[1] / "docs" / "systemd" / "stsm-rt.service"


@pytest.fixture
def systemd_analyze() -> str:
    return required_program("systemd-analyze", "apt-get install systemd")


def test_systemd_has_nothing_to_say_against_it(systemd_analyze: str, tmp_path: Path) -> None:
    # The program must be there, and is not.
    text, count = re.subn(r"/opt/stsm-rt/bin/stsm-rt(?= webcam)", sys.executable, UNIT.read_text())
    assert count == 1
    (tmp_path / UNIT.name).write_text(text)
    run = subprocess.run([systemd_analyze, "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True)
    assert run.returncode == 0 and UNIT.name not in run.stdout + run.stderr, run.stderr
    (tmp_path / UNIT.name).write_text(text.replace("ProtectHome=yes", "ProtectHouse=yes"))
    run = subprocess.run([systemd_analyze, "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True)
    assert "ProtectHouse" in run.stderr, "it looks at every line"


def test_the_command_takes_its_options(tmp_path: Path) -> None:
    lines = UNIT.read_text().replace("\\\n", " ").splitlines()
    (start,) = [line.partition("=")[2] for line in lines if line.startswith("ExecStart=")]
    (tmp_path / "cameras").write_text("front = rtsp://user:password@10.0.0.7/live\n")
    words = [
        word.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))
        for word in shlex.split(start.replace("$STSM_OPTIONS", "--metrics 9300 --rotate 1d"))
    ]
    assert words[:2] == ["/opt/stsm-rt/bin/stsm-rt", "webcam"]
    options = parse(words[2:])
    assert options.headless and options.metrics == 9300 and options.rotate is not None
    assert [camera.name for camera in options.cameras] == ["front"]
