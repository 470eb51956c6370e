"""Real cameras on the network for the tests: servers in processes of their own that can be killed and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import TracebackType

import pytest

_HERE = Path(__file__).parent
_SYSTEM_PYTHON = "/usr/bin/python3"
_RTSP_PACKAGES = (
    "python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-ugly"
)


@cache
def _has_rtsp_server() -> bool:
    check = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst, GstRtspServer; "
    check += "Gst.init(None); assert all(Gst.ElementFactory.find(n) for n in ('x264enc', 'rtph264pay', 'videotestsrc'))"
    try:
        return subprocess.run([_SYSTEM_PYTHON, "-c", check], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class StreamServer:
    """A camera that can be killed, started again on its port, and stopped while its connections stay open.

    Attributes:
        port: Where it listens on 127.0.0.1.
    """

    def __init__(self, kind: str, **options: object) -> None:
        """Start it.

        Args:
            kind: ``"rtsp"`` (H.264 by GStreamer; the test is skipped where that is not installed, and fails in CI) or
                ``"http"`` (MJPEG).
            options: Options of ``rtsp_server.py`` and ``mjpeg_server.py``: width, height, rate, user, password, ...
        """
        if kind == "rtsp" and not _has_rtsp_server():
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"install {_RTSP_PACKAGES}")
        self.kind = kind
        self._program = [_SYSTEM_PYTHON, "rtsp_server.py"] if kind == "rtsp" else [sys.executable, "mjpeg_server.py"]
        for name, value in options.items():
            self._program += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        self.port = 0
        self.start()

    def __enter__(self) -> StreamServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def url(self, path: str = "/camera", *, user: str = "") -> str:
        """The address of a path; ``user`` may be ``"user:password"``."""
        return f"{self.kind}://{user}{'@' * bool(user)}127.0.0.1:{self.port}{path}"

    def start(self, *options: str) -> None:
        """Start it, again on the same port, with further options."""
        self._process = subprocess.Popen(
            [*self._program, "--port", str(self.port), *options], cwd=_HERE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """Kill it; its connections are closed."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def pause(self) -> None:
        """Stop it: its connections stay open, and nothing comes."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)
