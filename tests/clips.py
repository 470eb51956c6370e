"""Real videos, image folders and a real MJPEG camera for the tests."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

import cv2
import numpy as np

from stsm_rt.video.sources import Source

COLOURS = {"blue": (255, 0, 0), "green": (0, 255, 0), "red": (0, 0, 255), "black": (0, 0, 0)}

Frame = np.ndarray[Any, np.dtype[np.uint8]]


def plain(colour: str, count: int, size: tuple[int, int] = (64, 48)) -> list[Frame]:
    """Frames of one colour."""
    return [np.full((size[1], size[0], 3), COLOURS[colour], np.uint8) for _ in range(count)]


def counted(count: int, size: tuple[int, int] = (64, 48)) -> list[Frame]:
    """Frames that ``number_of`` tells apart after any codec."""
    frames = [np.zeros((size[1], size[0], 3), np.uint8) for _ in range(count)]
    for index, frame in enumerate(frames):
        for bit in range(8):
            frame[:, bit * size[0] // 8 : (bit + 1) * size[0] // 8] = 255 * (index >> bit & 1)
    return frames


def number_of(frame: Frame) -> int:
    """The index of a frame of ``counted``."""
    width = frame.shape[1]
    row = frame[frame.shape[0] // 2, :, 1]
    return sum(int(row[(2 * bit + 1) * width // 16] > 127) << bit for bit in range(8))


def write_video(path: Path, frames: Iterable[Frame], fps: float = 30.0) -> Path:
    """Write an MP4 file, as large as its first frame."""
    frames = list(frames)
    size = (frames[0].shape[1], frames[0].shape[0])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def read_all(source: Source) -> tuple[list[Frame], list[float]]:
    """All frames and times of a source."""
    items = list(source)
    return [frame for frame, _ in items], [time for _, time in items]


@contextmanager
def http_server(
    *, frames: Iterable[Frame] = (), fps: float = 50.0, files: Path | None = None, password: str | None = None
) -> Iterator[str]:
    """Serve an MJPEG camera at ``/camera`` and the files of a folder; yields the address without a slash.

    With a password, everything is refused but to ``user`` with it.
    """
    parts = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if password is not None and not (self.headers.get("Authorization") or "").startswith("Basic "):
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                self.end_headers()
            elif self.path.startswith("/camera"):
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                self._play()
            elif files is not None and (files / self.path[1:]).is_file():
                data = (files / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            else:
                self.send_error(404)

        def _play(self) -> None:
            for part in parts:
                header = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(part)}\r\n\r\n"
                try:
                    self.wfile.write(header.encode() + part + b"\r\n")
                except OSError:
                    return
                sleep(1 / fps)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
