"""A network camera: endless MJPEG over HTTP at ``/camera``, prints its port, and ends with its parent.

Frame i is frame i of ``clips.counted``, modulo 256. ``/page`` is a web page, ``/forbidden`` answers 403, ``/video`` is
no video although it says so, ``/cut`` breaks off inside a picture.
"""

import argparse
import base64
import ctypes
import hashlib
import itertools
import secrets
import signal
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
from clips import counted

BOUNDARY = "--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--user")
    parser.add_argument("--password")
    parser.add_argument("--digest", action="store_true", help="digest instead of basic authentication")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--still", action="store_true", help="the same picture always")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    frames = [cv2.imencode(".jpg", frame)[1].tobytes() for frame in counted(256, (arguments.width, arguments.height))]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if arguments.user and not self.is_known():
                how = (
                    f'Digest realm="camera", nonce="{secrets.token_hex(8)}"' if arguments.digest else 'Basic realm="c"'
                )
                self.answer(401, "text/plain", ("WWW-Authenticate", how))
            elif self.path in ("/camera", "/cut"):
                self.answer(200, "multipart/x-mixed-replace; boundary=frame")
                self.play()
            elif self.path == "/page":
                self.answer(200, "text/html; charset=utf-8")
                self.wfile.write(b"<html><body>This is no camera.</body></html>")
            elif self.path == "/video":
                self.answer(200, "video/mp4")
                self.wfile.write(b"This is no video either." * 100)
            else:
                self.answer(403 if self.path == "/forbidden" else 404, "text/plain")

        def answer(self, status: int, kind: str, *headers: tuple[str, str]) -> None:
            self.send_response(status)
            for name, value in (("Content-Type", kind), *headers):
                self.send_header(name, value)
            self.end_headers()

        def is_known(self) -> bool:
            kind, _, rest = (self.headers.get("Authorization") or "").partition(" ")
            if not arguments.digest:
                return rest == base64.b64encode(f"{arguments.user}:{arguments.password}".encode()).decode()
            if kind != "Digest":
                return False
            fields = urllib.request.parse_keqv_list(urllib.request.parse_http_list(rest))
            secret = md5(f"{arguments.user}:camera:{arguments.password}")
            return fields["response"] == md5(f"{secret}:{fields['nonce']}:{md5(f'GET:{self.path}')}")

        def play(self) -> None:
            begin = time.perf_counter()
            for index in itertools.count():
                data = frames[170 if arguments.still else index % 256]
                try:
                    self.wfile.write(BOUNDARY.format(len(data)).encode())
                    if self.path == "/cut" and index == 20:
                        self.wfile.write(data[: len(data) // 2])
                        return
                    self.wfile.write(data + b"\r\n")
                except OSError:
                    return
                time.sleep(max(0.0, begin + (index + 1) / arguments.rate - time.perf_counter()))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()


def md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    main()
