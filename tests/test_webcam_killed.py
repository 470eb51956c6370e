"""The command, ended while it records a camera: by SIGKILL, and by SIGTERM while nobody takes its events."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import cv2
import numpy as np
from clips import counted, http_server, plain, write_video
from required import required_module

from stsm_rt import cameras, delivery, pipeline
from stsm_rt.video import live, sources

if TYPE_CHECKING:
    from conftest import TinyEngine


def command(engine: Path, source: str, folder: Path, *options: str) -> list[str]:
    files = ["--save", str(folder / "out.mp4"), "--events", str(folder / "events.jsonl")]
    words = ["webcam", "--engine", str(engine), "--source", source, "--headless", *files, *options]
    return [sys.executable, "-m", "stsm_rt.cli", *words]


def frames_in(path: Path) -> int:
    capture, count = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), 0
    while capture.read()[0]:
        count += 1
    return count


def test_a_kill_leaves_a_video_that_plays_and_whole_lines(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    required_module("prometheus_client", "pip install 'stsm-rt[live]'")
    with http_server(frames=counted(30) * 200, fps=30) as url:
        words = command(tiny_engine.path, f"{url}/camera", tmp_path, "--metrics", "0")
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            try:
                address = None
                for line in process.stdout:
                    if address is None and (found := re.search(r"http://\S+/metrics", line)):
                        address = found[0]
                    if line.startswith("watching"):
                        break
                assert address is not None
                taken = 0
                while taken < 60:
                    text = urllib.request.urlopen(address, timeout=10).read().decode()
                    found = re.search(r"stsm_frames_total\{[^}]*\} (\d+)", text)
                    taken = int(found[1]) if found else 0
            finally:
                process.send_signal(signal.SIGKILL)
        assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "out.mp4"]
        played = frames_in(tmp_path / "out.mp4")
        assert played >= 30, "two seconds were recorded, of which the last may be lost"
        lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
        assert lines and all(line.endswith("\n") and json.loads(line) for line in lines)

        words = command(tiny_engine.path, f"{url}/camera", tmp_path, "--max-frames", "5")
        run = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    asides = {re.sub(r"\d{8}-\d{6}", "TIME", name): name for name in os.listdir(tmp_path)}
    assert sorted(asides) == ["events-TIME.jsonl", "events.jsonl", "out-TIME.mp4", "out.mp4"]
    assert asides["out-TIME.mp4"] in run.stdout and asides["events-TIME.jsonl"] in run.stdout
    assert frames_in(tmp_path / asides["out-TIME.mp4"]) == played


@contextmanager
def stalling_recording(path: Path) -> Iterator[str]:
    """A file on a server that stops to send in the middle, but keeps the connection."""
    data, over = path.read_bytes(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - begin))
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            middle = len(data) // 2
            with contextlib.suppress(OSError):
                self.wfile.write(data[begin : middle if begin < middle else None])
                if begin < middle:
                    over.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/recording.avi"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_sigterm_ends_a_recording_whose_server_says_nothing_any_more(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    frames = list(np.random.default_rng(0).integers(0, 256, (60, 240, 320, 3), np.uint8))
    path = write_video(tmp_path / "recording.avi", plain("green", 60, (320, 240)) + frames)
    with stalling_recording(path) as url, socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        words = command(tiny_engine.path, url, tmp_path, "--webhook", f"http://127.0.0.1:{port}/")
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        ) as process:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if "green starts" in line:
                    break
            sleep(1.0)  # until it has read all there is
            process.send_signal(signal.SIGTERM)
            begin = monotonic()
            said += process.stdout.read()
            assert process.wait(30) == 0, said
            assert monotonic() - begin < 3.5, "two seconds, on a busy machine"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines if line.get("state") == "ended"] == ["it was closed"]
    assert frames_in(tmp_path / "out.mp4") >= 60


def test_what_is_waited_for_at_the_end_takes_less_than_the_two_seconds_in_all() -> None:
    one = pipeline._PARTING + sources._PARTING, pipeline._WAKE + live._PARTING
    several = cameras._PATIENCE + cameras._WAKE
    assert max(*one, several) + delivery._CLOSING <= 1.7
    # A camera's own threads have ended before its reader is left behind.
    assert live._WAKE + live._PARTING < cameras._PATIENCE


def test_sigterm_completes_all_files_while_nobody_takes_the_events(tiny_engine: TinyEngine, tmp_path: Path) -> None:
    required_module("paho.mqtt.client", "pip install 'stsm-rt[live]'")
    with http_server(frames=plain("green", 30) * 200, fps=30) as url, socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        elsewhere = ["--webhook", f"http://me:s3cret@{host}/", "--mqtt", f"mqtt://me:s3cret@{host}/events"]
        words = command(tiny_engine.path, f"{url}/camera", tmp_path, *elsewhere, "--threshold", "0")
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        ) as process:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if "green starts" in line:
                    break
            process.send_signal(signal.SIGTERM)
            begin = monotonic()
            said += process.stdout.read()
            assert process.wait(30) == 0, said
            assert monotonic() - begin < 3.5, "two seconds, on a busy machine"
    assert frames_in(tmp_path / "out.mp4") > 0
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    letters = [json.loads(line) for line in (tmp_path / "stsm-rt-undelivered.jsonl").read_text().splitlines()]
    assert [letter["record"]["kind"] for letter in letters] == ["event"] * 2 * kinds.count("event")
    assert {letter["to"] for letter in letters} == {f"http://{host}", f"mqtt://{host}"}
    assert "s3cret" not in said + (tmp_path / "stsm-rt-undelivered.jsonl").read_text()
