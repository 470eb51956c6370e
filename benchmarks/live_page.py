"""Count how fast the page answers a browser's camera: Chromium, its fake camera of 640x360 at 30 frames per second.

The server and the browser, which encodes, draws and plays the camera, share this machine's cores, so a visitor with a
machine of their own gets at least this. Needs Chromium and ``pip install playwright``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import cv2
from playwright.sync_api import sync_playwright

from stsm_rt.machine import machine, versions
from stsm_rt.video.sample import sample_clip
from stsm_rt.video.sources import open_source

WIDTH, HEIGHT, RATE = 640, 360, 30


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to watch (default: 30)")
    parser.add_argument("--port", type=int, default=7867)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        camera = Path(folder) / "camera.mjpeg"
        _write_camera(camera)
        with subprocess.Popen(
            [sys.executable, "demo/app.py", "--port", str(options.port)], stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None and "the page is at" in server.stdout.readline()
                numbers = _watch(f"http://127.0.0.1:{options.port}/", camera, options.seconds)
            finally:
                server.send_signal(signal.SIGTERM)
    for name, value in numbers.items():
        print(f"{name:<12}{value:g}")
    if options.json:
        record = {"machine": machine(), "versions": versions(), "seconds": options.seconds} | numbers
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _write_camera(path: Path) -> None:
    with av.open(str(path), "w", format="mjpeg") as container, open_source(sample_clip().path) as source:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for frame, _ in source:
            picture = av.VideoFrame.from_ndarray(cv2.resize(frame, (WIDTH, HEIGHT)), format="bgr24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _watch(address: str, camera: Path, seconds: float) -> dict[str, float]:
    """The page's own counters after some seconds."""
    arguments = [
        "--no-sandbox",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("tab", name="Camera").click()
        page.locator("#live-start").click()
        page.wait_for_timeout(1000 * seconds)
        found = {
            name: float(re.sub(r"[^0-9.]", "", page.locator(f"#live-{name}").inner_text()))
            for name in ("fps", "steps", "latency", "dropped")
        }
        browser.close()
    names = {"fps": "frames/s", "steps": "steps/s", "latency": "latency ms", "dropped": "dropped"}
    return {names[name]: value for name, value in found.items()}


if __name__ == "__main__":
    main()
