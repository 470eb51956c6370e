"""The command with several cameras: a slot for each, and none that holds up, starves or disturbs another."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import cv2
import numpy as np
import pytest
from clips import http_server, plain, write_video
from command import ROOT, SIZE, Lines, press_until, records, running, webcam
from display import virtual_display

from stsm_rt.video.sources import open_source


def results_of(path: Path, camera: str | None = None) -> list[dict[str, Any]]:
    """The records but those of states, without what differs from run to run and from camera to camera."""
    return [
        {key: value for key, value in record.items() if key not in ("latency", "camera")}
        for record in records(path)
        if record["kind"] != "source" and record.get("camera") == camera
    ]


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end
        sleep(0.05)


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@contextmanager
def stalling_server(frames: int) -> Iterator[str]:
    """A camera that gives so many frames and then says nothing, but keeps the connection."""
    over = threading.Event()
    part = cv2.imencode(".jpg", plain("blue", 1, SIZE)[0])[1].tobytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for _ in range(frames):
                header = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(part)}\r\n\r\n"
                self.wfile.write(header.encode() + part + b"\r\n")
                sleep(0.03)
            over.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/camera"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_each_of_several_videos_gives_what_it_gives_alone(tiny_engine: Any, tmp_path: Path) -> None:
    colours = {"front door": "green", "yard": "red"}
    for name, colour in colours.items():
        frames = plain("black", 20, SIZE) + plain(colour, 45, SIZE) + plain("black", 20, SIZE)
        write_video(tmp_path / f"{name}.mp4", frames)
        webcam(tmp_path, "--engine", tiny_engine.path, "--source", f"{name}.mp4", "--events", f"{name}.jsonl")
    (tmp_path / "cameras.txt").write_text("".join(f"{name} = {name}.mp4\n" for name in colours))
    code, out, err = webcam(
        tmp_path, "--engine", tiny_engine.path, "--sources", "cameras.txt", "--headless", "--events", "all.jsonl"
    )
    assert (code, err) == (0, "")
    assert "watching front door: front door.mp4" in out and "170 frames, 58 steps, 2 events in" in out
    for name, colour in colours.items():
        assert f"{name}: {colour} starts" in out and f"{name}: {colour} ends" in out
        assert results_of(tmp_path / "all.jsonl", name) == results_of(tmp_path / f"{name}.jsonl")
    states = [(r["camera"], r["state"]) for r in records(tmp_path / "all.jsonl") if r["kind"] == "source"]
    assert [state for camera, state in states if camera == "yard"] == ["running", "ended"]


def test_regions_in_the_file_are_each_cameras_own(tiny_engine: Any, tmp_path: Path) -> None:
    frames = plain("black", 60, SIZE)
    for frame in frames:
        frame[100:200, 150:300] = (0, 0, 255)
    write_video(tmp_path / "corner.mp4", frames)
    (tmp_path / "cameras.txt").write_text("all = corner.mp4\npart [150,100,150,100] = corner.mp4\n")
    _, out, _ = webcam(tmp_path, "--engine", tiny_engine.path, "--sources", "cameras.txt", "--headless")
    assert "part: red starts" in out and "all: red" not in out


def test_cameras_come_and_go_are_counted_and_disturb_nobody(tiny_engine: Any, tmp_path: Path) -> None:
    port = free_port()
    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    receiver = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    with (
        # It ends after a second, again and again; the other does not; the third is never there.
        http_server(frames=plain("green", 30, SIZE), fps=30) as coming,
        http_server(frames=plain("blue", 3000, SIZE), fps=30) as steady,
    ):
        (tmp_path / "cameras.txt").write_text(
            f"coming = {coming}/camera\nsteady = {steady}/camera\naway = http://user:hush@127.0.0.1:1/camera\n"
        )
        arguments = ["--engine", tiny_engine.path, "--sources", "cameras.txt", "--headless", "--events", "a.jsonl"]
        arguments += ["--metrics", port, "--webhook", f"http://127.0.0.1:{receiver.server_port}/events"]
        with running(tmp_path, *arguments) as process:
            lines = Lines(process)
            lines.wait_for("coming is reconnecting")
            lines.wait_for("coming is running again")
            lines.wait_for("coming is reconnecting")
            lines.wait_for("coming is running again")
            metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            begin = monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            seconds = monotonic() - begin
            assert process.returncode == 0 and process.stderr is not None and process.stderr.read() == ""
    receiver.shutdown()
    receiver.server_close()
    assert seconds < 3
    counted = {
        line.split(" ")[0]: float(line.split(" ")[1]) for line in metrics.splitlines() if not line.startswith("#")
    }
    assert counted['stsm_reconnects_total{camera="coming"}'] >= 2
    assert counted['stsm_state_resets_total{camera="coming"}'] >= 1
    assert counted['stsm_reconnects_total{camera="steady"}'] == counted['stsm_state_resets_total{camera="steady"}'] == 0
    assert counted['stsm_frames_total{camera="steady"}'] > 30 < counted['stsm_frames_total{camera="coming"}']
    found = records(tmp_path / "a.jsonl")
    states = {
        name: [r["state"] for r in found if r["kind"] == "source" and r["camera"] == name]
        for name in ("coming", "steady", "away")
    }
    assert states["coming"][:4] == ["opening", "running", "reconnecting", "running"]
    assert states["steady"] == ["opening", "running", "ended"] and "running" not in states["away"]
    times = [r["time"] for r in found if r["kind"] == "result" and r["camera"] == "steady"]
    assert np.diff(times).max() < 0.5 and len(times) > 20
    # Each connection begins anew, with nothing of the one before.
    kinds = [(r["kind"], r.get("state"), r.get("warming_up")) for r in found if r["camera"] == "coming"]
    after = [later for earlier, later in itertools.pairwise(kinds) if earlier == ("source", "running", None)]
    assert all(kind[2] for kind in after if kind[0] == "result")
    assert {event["camera"] for event in received} == {"coming", "steady"} and received[0]["kind"] == "event"
    assert "hush" not in "".join(lines.seen) + (tmp_path / "a.jsonl").read_text()


def test_a_camera_that_is_given_up_leaves_and_the_files_of_the_others_stay(tiny_engine: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "long.mp4", plain("green", 90, SIZE))
    with http_server(frames=plain("blue", 20, SIZE), fps=30) as url:
        gone = f"{url}/nothing"
        code, out, err = webcam(
            tmp_path, "--engine", tiny_engine.path, "--source", "long.mp4", "--source", gone, "--source",
            f"{url}/camera", "--headless", "--events", "a.jsonl", "--max-retries", 0,
        )  # fmt: skip
    assert code == 2 and err.startswith("stsm-rt: error: camera 2 has failed: ") and err.count("\n") == 1
    assert "camera 1: green starts" in out and "camera 3: blue starts" in out and "camera 2 is failed" in out
    assert len(results_of(tmp_path / "a.jsonl", "camera 1")) >= 30
    assert [r["state"] for r in records(tmp_path / "a.jsonl") if r.get("camera") == "camera 2"][-1] == "failed"


def test_a_live_camera_that_has_gone_is_said_and_is_not_healthy(tiny_engine: Any, tmp_path: Path) -> None:
    with (
        http_server(frames=plain("blue", 20, SIZE), fps=30) as short,
        http_server(frames=plain("green", 3000, SIZE), fps=30) as steady,
    ):
        words = ["--source", f"{short}/camera", "--source", f"{steady}/camera", "--max-retries", 0]
        with running(tmp_path, "--engine", tiny_engine.path, *words, "--headless", "--metrics", 0) as process:
            lines = Lines(process)
            lines.wait_for("camera 1 has ended: the connection to http://")
            address = re.search(r"health on (\S+)", "".join(lines.seen))
            assert address is not None
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(address[1], timeout=5)
            healthy = {name: of["healthy"] for name, of in json.load(error.value)["cameras"].items()}
            process.send_signal(signal.SIGTERM)
            process.wait(20)
    assert (error.value.code, healthy) == (503, {"camera 1": False, "camera 2": True})
    wait_for(lambda: "frames dropped" in "".join(lines.seen))
    assert "camera 2 has ended" not in "".join(lines.seen), "somebody stopped it"


def test_a_status_line_is_kept_up_to_date_below_what_is_said_on_a_terminal(tiny_engine: Any, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    with http_server(frames=plain("black", 45, SIZE) + plain("blue", 45, SIZE), fps=30) as url:
        arguments = ["--engine", tiny_engine.path, "--source", f"{url}/camera", "--headless", "--max-retries", "0"]
        command = [sys.executable, "-m", "stsm_rt.webcam", *map(str, arguments)]
        with subprocess.Popen(command, cwd=ROOT, stdout=follower, stderr=subprocess.PIPE) as process:
            os.close(follower)
            said = b""
            with contextlib.suppress(OSError):  # the end
                while data := os.read(leader, 4096):
                    said += data
    os.close(leader)
    assert process.returncode == 0
    # What stands on the screen after each line feed: what came since the last return, up to the line's end.
    lines = [line.rstrip("\r").rpartition("\r\x1b[K")[2] for line in said.decode().split("\n")]
    assert any(re.fullmatch(r" +\d+\.\d\d s  blue starts \(score 0\.\d\d\)", line) for line in lines), lines
    assert re.search(r"\r\x1b\[Khttp://127.0.0.1:\d+/camera: running, \d+\.\d frames/s, \d+ steps", said.decode())
    assert not any("frames/s" in line for line in lines)


@pytest.mark.parametrize("several", [True, False])
def test_sigterm_ends_it_while_a_source_blocks_and_the_window_is_open(
    tiny_engine: Any, tmp_path: Path, several: bool
) -> None:
    (tmp_path / "screen").mkdir()
    with virtual_display(tmp_path / "screen") as display, stalling_server(120) as url:
        sources = ["--source", url] + (["--source", "http://127.0.0.1:1/"] if several else [])
        arguments = ["--engine", tiny_engine.path, *sources, "--events", "a.jsonl", "--save", "a.mp4"]
        with running(tmp_path, *arguments, DISPLAY=display.name) as process:
            lines = Lines(process)
            lines.wait_for("blue starts")

            # Snapshots are what is shown; the pixels on the screen may come late: Qt at times does not paint on Xvfb.
            def blue() -> bool:
                press_until(display, "s", lines, "snapshot")
                picture = cv2.imread(str(sorted(tmp_path.glob("snapshot-*.png"))[-1])).astype(int)
                return bool(((picture[:, :, 0] > 200) & (picture[:, :, 1:].max(axis=2) < 80)).sum() > 1000)

            wait_for(blue)
            # The last picture goes, for it is no longer what the camera sees.
            wait_for(lambda: not blue())
            begin = monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            assert monotonic() - begin < 3
            assert process.returncode == 0 and process.stderr is not None and process.stderr.read() == ""
    assert [r["end"] is None for r in records(tmp_path / "a.jsonl") if r["kind"] == "event"] == [True, False]
    with open_source(tmp_path / "a.mp4") as source:
        assert source.size == ((1280, 480) if several else SIZE)


def test_the_mosaic_shows_every_camera_takes_keys_and_is_saved(tiny_engine: Any, tmp_path: Path) -> None:
    (tmp_path / "screen").mkdir()
    for name, colour in (("a", "green"), ("b", "red"), ("c", "blue")):
        write_video(tmp_path / f"{name}.mp4", plain(colour, 400, SIZE))
    write_video(tmp_path / "short.mp4", plain("green", 8, SIZE))
    (tmp_path / "cameras.txt").write_text("door = a.mp4\nyard = b.mp4\nhall = c.mp4\ngate = short.mp4\n")
    arguments = ["--engine", tiny_engine.path, "--sources", "cameras.txt", "--save", "out.mp4"]
    with (
        virtual_display(tmp_path / "screen") as display,
        running(tmp_path, *arguments, DISPLAY=display.name) as process,
    ):
        lines = Lines(process)
        lines.wait_for("starts")
        press_until(display, "r", lines, "reset")
        sleep(1)
        press_until(display, "s", lines, "snapshot: snapshot-0001.png")
        display.press("q")
        process.wait(20)
        assert process.returncode == 0
    snapshot = cv2.imread(str(tmp_path / "snapshot-0001.png")).astype(int)
    assert snapshot.shape == (720, 1280, 3)
    # Each where it belongs, at its own shape, and nothing is left of what the last one gave before it ended.
    middles = [snapshot[180 + 360 * row, 320 + 640 * column + 100] for row in (0, 1) for column in (0, 1)]
    assert [int(np.argmax(middle)) for middle in middles[:3]] == [1, 2, 0]
    assert all(middle.max() > 150 for middle in middles[:3]) and middles[3].max() < 60
    with open_source(tmp_path / "out.mp4") as source:
        assert source.size == (1280, 720) and source.frame_rate == 15
