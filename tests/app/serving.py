"""The page's command as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def needed(condition: object, sentence: str) -> None:
    """Skip where something is not installed, but not in CI, where it always is."""
    if not condition:
        assert not os.environ.get("CI"), sentence
        pytest.skip(sentence)


@contextmanager
def serving(*options: object, temporary: Path | None = None) -> Iterator[str]:
    """Run the page's command, with its temporary files in a folder, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "demo" / "app.py"), "--port", str(port), *map(str, options)]
    environment = os.environ | ({} if temporary is None else {"TMPDIR": str(temporary)})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    output = process.stdout
    reader = threading.Thread(target=lambda: lines.extend(output), daemon=True)
    reader.start()
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 90
        while not any("the page is at" in line for line in lines):
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.1)
        yield address
        with urllib.request.urlopen(address, timeout=10) as response:
            assert response.status == 200
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            reader.join(5)
    assert code == 0 and not any("Traceback" in line for line in lines), "".join(lines)
