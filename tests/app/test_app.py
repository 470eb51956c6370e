"""The command that serves the page: what it refuses, in one sentence."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ROOT

from stsm_rt.app.__main__ import main
from stsm_rt.cli import COMMANDS


def mistakes() -> Iterator[tuple[list[str], str]]:
    yield ["--visitors", "0"], "--visitors must be at least 1, not 0"
    yield ["--idle", "0"], "--idle must be at least 1"
    yield ["--max-megabytes", "0"], "--max-megabytes must be at least 1"
    yield ["--max-minutes", "nan"], "--max-minutes must be positive"
    yield ["--certificate", "c.pem"], "belong together"
    yield ["--certificate", "absent.pem", "--key", "absent.key"], "absent.pem and absent.key are no certificate"
    yield ["--certificate", "wrong", "--key", "wrong"], "wrong and wrong are no certificate with its key"
    yield ["--port", "99999"], "--port must be at most 65535, not 99999"
    yield ["--engines", "absent"], "there is no folder absent"
    yield ["--auth", "absent"], "the file of users absent cannot be read"
    yield ["--auth", "empty"], "the file of users empty is empty"
    yield ["--auth", "wrong"], "line 2 of wrong should be user:password"


@pytest.mark.parametrize(("arguments", "sentence"), list(mistakes()))
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'stsm-rt[ui]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "wrong").write_text("anna:secret\nbert\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("stsm-rt: error: ") and error.count("\n") == 1 and sentence in error


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_sentence() -> None:
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'stsm-rt[ui]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, str(ROOT / "demo" / "app.py"), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in done.stderr and "Traceback" not in done.stderr


def test_without_gradio_it_says_what_to_install() -> None:
    """In a process of its own, where the import fails as if it were not installed."""
    code = "import sys; sys.modules['gradio'] = None; from stsm_rt.app.__main__ import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install 'stsm-rt[ui]'" in done.stderr and done.stderr.count("\n") == 1


def test_it_is_a_command_of_stsm_rt() -> None:
    assert COMMANDS["app"][0] == "stsm_rt.app.__main__"
