from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stsm_rt import fetch as fetch_module
from stsm_rt import public_checkpoints
from stsm_rt.download import cache_folder, download, main
from stsm_rt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONTENT = bytes(range(256)) * 1200  # 307,200 bytes
NEWER = CONTENT[::-1]
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PART = 100_000


# A server on loopback that answers as it is told


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        answers = self.server.answers
        with self.server.counting:
            self.server.requests.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
            answer = answers[min(len(self.server.requests), len(answers)) - 1]
        answer(self)

    def send(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, str]] = []
        self.answers: list[Answer] = [honest]
        self.counting = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:  # a client that hangs up is none
        pass


Answer = Callable[[Handler], None]


def version(content: bytes = CONTENT, etag: str | None = '"1"', *, cut: int | None = None, **headers: Any) -> Answer:
    """A server that knows ranges; `cut`: the bytes of the body after which the connection ends."""

    def answer(handler: Handler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(asked[1]) if asked and handler.headers.get("If-Range") == etag else 0
        fields = {"ETag": etag} if etag else {}
        if start >= len(content):
            handler.send(416, Content_Range=f"bytes */{len(content)}", Content_Length=0)
            return
        body = content[start:]
        if start:
            fields["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.send(206 if start else 200, body[:cut], **{**fields, "Content_Length": len(body), **headers})

    return answer


def ignoring_ranges(content: bytes = CONTENT, *, cut: int | None = None, length: int | None = None) -> Answer:
    return lambda handler: handler.send(
        200, content[:cut], ETag='"1"', Content_Length=len(content) if length is None else length
    )


def status(code: int, **headers: Any) -> Answer:
    return lambda handler: handler.send(code, **{"Content_Length": 0, **headers})


def redirect(to: str, code: int = 302) -> Answer:
    return status(code, Location=to)


def chunked(*chunks: bytes, whole: bool = True, **headers: Any) -> Answer:
    def answer(handler: Handler) -> None:
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
        handler.send(200, body + (b"0\r\n\r\n" if whole else b""), Transfer_Encoding="chunked", **headers)

    return answer


def stalling(handler: Handler) -> None:
    """Sends a part and then nothing until it is released."""
    handler.send(200, CONTENT[:PART], ETag='"1"', Content_Length=len(CONTENT))
    handler.wfile.flush()
    handler.server.released.wait(60)


honest = version()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def registered(path: Path, host: str, **fields: Any) -> Path:
    entry = {"name": "net", "what": "a network", "url": f"{host}/models/net.pth", "classes": 3, "page": "https://p"}
    path.write_text(json.dumps([{**entry, "licence": "not stated", **fields}]))
    return path


@pytest.fixture
def register(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def register(**fields: Any) -> Path:
        path = registered(tmp_path / "registry.json", server.url, **fields)
        monkeypatch.setattr(public_checkpoints, "REGISTRY", path)
        return path

    register(sha256=DIGEST)
    return register


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not made."""
    pauses: list[float] = []
    monkeypatch.setattr(fetch_module, "sleep", pauses.append)
    return pauses


@pytest.fixture
def get(register: Callable[..., Path], waits: list[float], tmp_path: Path) -> Callable[..., Path]:
    def get(**options: Any) -> Path:
        return download("net", cache=tmp_path / "cache", **{"timeout": 5.0, **options})

    return get


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "net").iterdir()}


KEPT = {"net.pth", "net.pth.sha256", "net.pth.lock"}
PARTIAL = {"net.pth.part", "net.pth.part.json", "net.pth.lock"}


# The file


def test_a_file_is_downloaded_once_verified_and_recorded(server, get, tmp_path):
    seen = []
    path = get(progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT and path == tmp_path / "cache" / "net" / "net.pth"
    assert left(tmp_path) == KEPT
    assert path.with_name("net.pth.sha256").read_text() == f"{DIGEST}  net.pth\n"
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert get() == path and len(server.requests) == 1
    request = server.requests[0]
    assert request["accept-encoding"] == "identity" and "range" not in request


def test_a_kept_file_that_changed_is_removed_and_had_again(server, get, tmp_path):
    path = get()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"has changed since it was downloaded.*run the same command again"):
        get()
    assert left(tmp_path) == KEPT - {"net.pth"}
    assert get().read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(server, get, tmp_path):
    server.answers = [version(NEWER)]
    with pytest.raises(UserError, match=r"is not what was published: its 307200 bytes .* expected .*removed"):
        get()
    assert left(tmp_path) == {"net.pth.lock"} and len(server.requests) == 1


def test_the_digits_in_a_files_name_are_enough_and_the_rest_is_recorded(server, get, register, tmp_path):
    register(sha256_prefix=DIGEST[:8])
    path = get()
    assert path.with_name("net.pth.sha256").read_text().startswith(DIGEST)
    register(sha256_prefix="0" * 8)
    with pytest.raises(UserError, match="find out which one is right"):
        get()
    path.with_name("net.pth.sha256").unlink()
    with pytest.raises(UserError, match="has changed since it was downloaded"):
        get()
    with pytest.raises(UserError, match="expected 00000000;"):
        get()
    assert left(tmp_path) == {"net.pth.lock"}


def test_a_file_longer_than_known_is_not_taken(server, get, register, tmp_path):
    register(sha256=DIGEST, size=1000)
    with pytest.raises(UserError, match="longer than the 1000 bytes it should have"):
        get()
    assert left(tmp_path) == {"net.pth.lock"}


# Cut off and taken up


def test_a_transfer_that_broke_off_is_taken_up(server, get, waits, tmp_path):
    server.answers = [version(cut=PART), honest]
    said = []
    assert get(say=said.append).read_bytes() == CONTENT
    assert server.requests[1]["range"] == f"bytes={PART}-" and server.requests[1]["if-range"] == '"1"'
    assert said == [f"it ended after {PART} of {len(CONTENT)} bytes; trying again in 1 s"] and waits == [1.0]
    assert left(tmp_path) == KEPT


@given(cuts=st.lists(st.integers(0, 120_000), max_size=6))
@settings(max_examples=15, deadline=None)
def test_the_file_is_the_same_wherever_it_is_cut(cuts):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, Server() as server:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(fetch_module, "sleep", lambda _: None)
        patch.setattr(public_checkpoints, "REGISTRY", registered(Path(folder, "r.json"), server.url, sha256=DIGEST))
        server.answers = [*(version(cut=cut) for cut in cuts), honest]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            assert download("net", cache=Path(folder), attempts=8).read_bytes() == CONTENT
        finally:
            server.shutdown()
        starts = [int(request.get("range", "bytes=0-")[6:-1]) for request in server.requests]
        assert starts == sorted(starts)


def test_a_killed_process_leaves_what_the_next_one_takes_up(server, get, register, tmp_path):
    server.answers = [stalling, honest]
    child = command_of(tmp_path, "net", "--cache", str(tmp_path / "cache"))
    partial = tmp_path / "cache" / "net" / "net.pth.part"
    wait_until(lambda: partial.exists() and partial.stat().st_size == PART)
    child.kill()
    child.communicate()
    assert left(tmp_path) == PARTIAL
    assert get().read_bytes() == CONTENT
    assert server.requests[1]["range"] == f"bytes={PART}-" and left(tmp_path) == KEPT


def test_a_file_that_changed_meanwhile_is_started_again(server, get, register):
    server.answers = [version(cut=PART), version(NEWER, '"2"')]
    register(sha256=hashlib.sha256(NEWER).hexdigest())
    assert get().read_bytes() == NEWER
    assert server.requests[1]["if-range"] == '"1"' and len(server.requests) == 2


def test_without_a_version_or_with_a_weak_one_it_is_started_again(server, get):
    server.answers = [version(etag=None, cut=PART), version(etag='W/"1"', cut=PART), version(etag=None)]
    assert get().read_bytes() == CONTENT
    assert all("range" not in request for request in server.requests)


def test_the_date_of_change_serves_as_a_version(server, get):
    date = "Tue, 03 Nov 2026 10:00:00 GMT"
    server.answers = [version(etag=None, cut=PART, Last_Modified=date), honest]
    assert get().read_bytes() == CONTENT
    assert server.requests[1]["if-range"] == date


def test_a_server_that_ignores_ranges_sends_it_from_the_start(server, get):
    server.answers = [ignoring_ranges(cut=PART), ignoring_ranges()]
    assert get().read_bytes() == CONTENT and len(server.requests) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"Content_Range": f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"}, id="elsewhere"),
        pytest.param({"Content_Range": "nonsense"}, id="unreadable"),
        pytest.param({"ETag": '"2"', "Content_Range": f"bytes {PART}-307199/307200"}, id="of another version"),
    ],
)
def test_another_part_than_was_asked_for_is_not_appended(wrong, server, get):
    lying = lambda handler: handler.send(206, CONTENT[5:], Content_Length=len(CONTENT) - 5, **{"ETag": '"1"', **wrong})  # noqa: E731
    server.answers = [version(cut=PART), lying, honest]
    assert get().read_bytes() == CONTENT
    assert "range" not in server.requests[2]


def test_a_range_beyond_the_end_starts_again(server, get):
    server.answers = [version(cut=PART), status(416, Content_Range="bytes */50"), honest]
    assert get().read_bytes() == CONTENT
    assert "range" in server.requests[1] and "range" not in server.requests[2]


def test_attempts_that_get_no_further_end_it(server, get, waits, tmp_path):
    server.answers = [version(cut=PART), version(cut=0)]
    with pytest.raises(UserError, match=r"after 100000 of 307200 bytes, 4 times in a row; 100000 bytes are kept"):
        get(attempts=4)
    assert len(server.requests) == 4 and waits == [1.0, 2.0, 4.0]
    assert left(tmp_path) == PARTIAL


def test_attempts_that_get_further_do_not_count(server, get):
    server.answers = [version(cut=40_000)]
    assert get(attempts=2).read_bytes() == CONTENT
    assert len(server.requests) == 8


def test_what_is_not_there_is_not_asked_for_again(server, get):
    server.answers = [status(404)]
    with pytest.raises(UserError, match=r"net\.pth cannot be had: the server answered 404 Not Found; see the page"):
        get()
    assert len(server.requests) == 1


def test_an_overloaded_server_is_asked_again(server, get):
    server.answers = [status(503), status(429), honest]
    assert get().read_bytes() == CONTENT and len(server.requests) == 3


def test_a_server_that_falls_silent_is_left(server, get):
    server.answers = [stalling, honest]
    assert get(timeout=0.3).read_bytes() == CONTENT
    assert server.requests[1]["range"] == f"bytes={PART}-"


def test_no_server_at_all_is_one_sentence(register, get, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        register(sha256=DIGEST, url=f"http://127.0.0.1:{taken.getsockname()[1]}/net.pth")
        with pytest.raises(UserError, match=r"could not be downloaded: no answer \(.*refused.*\), 3 times in a row"):
            get(attempts=3)


# Lies about length


def test_a_length_that_is_too_short_shows_in_the_hash(server, get, tmp_path):
    server.answers = [ignoring_ranges(length=len(CONTENT) - 10)]
    with pytest.raises(UserError, match=r"its 307190 bytes have the SHA-256"):
        get()
    assert left(tmp_path) == {"net.pth.lock"}


def test_a_length_that_is_too_long_does_not_spoil_a_file_with_the_right_hash(server, get):
    server.answers = [ignoring_ranges(length=len(CONTENT) + 10)]
    assert get().read_bytes() == CONTENT and len(server.requests) == 1


def test_a_length_that_is_too_long_is_set_right_by_the_range(server, get, register):
    register()
    server.answers = [ignoring_ranges(length=len(CONTENT) + 10), honest]
    assert get(trust_first_use=True).read_bytes() == CONTENT
    assert server.requests[1]["range"] == f"bytes={len(CONTENT)}-"  # answered 416: nothing lies beyond


def test_a_file_in_chunks_has_an_end_of_its_own(server, get, register):
    register()
    server.answers = [chunked(CONTENT[:PART], whole=False, ETag='"1"'), chunked(CONTENT[:PART], CONTENT[PART:])]
    assert get(trust_first_use=True).read_bytes() == CONTENT and len(server.requests) == 2


def test_a_file_without_any_length_is_verified_by_its_hash(server, get):
    server.answers = [lambda handler: handler.send(200, CONTENT)]
    assert get().read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda handler: handler.send(200, CONTENT), "without a length"),
        (version(Content_Type="text/html; charset=utf-8"), "a page instead of a file"),
        (version(Content_Encoding="gzip"), "comes encoded"),
    ],
)
def test_what_a_hash_would_bring_to_light_is_not_trusted_without_one(answer, problem, server, get, register, tmp_path):
    register()
    server.answers = [answer]
    with pytest.raises(UserError, match=f"{problem}.*give one with --sha256"):
        get(trust_first_use=True)
    assert left(tmp_path) == {"net.pth.lock"}


# Where nothing is published


def test_nothing_is_asked_for_what_cannot_be_verified(server, get, register, tmp_path):
    register()
    with pytest.raises(UserError, match=r"no SHA-256 of net is published.*--sha256.*--trust-first-use"):
        get()
    assert server.requests == []
    assert get(sha256=DIGEST.upper()).read_bytes() == CONTENT
    assert get().read_bytes() == CONTENT  # recorded by now


def test_what_was_trusted_once_is_held_to_ever_after(server, get, register, tmp_path):
    register()
    path = get(trust_first_use=True)
    path.write_bytes(NEWER)
    with pytest.raises(UserError, match="has changed since it was downloaded"):
        get(trust_first_use=True)
    server.answers = [version(NEWER, '"2"')]
    with pytest.raises(UserError, match="is not what was published"):
        get(trust_first_use=True)
    assert left(tmp_path) == KEPT - {"net.pth"}


@pytest.mark.parametrize("digits", ["abc", "g" * 64, DIGEST + "0", ""])
def test_a_hash_of_another_form_is_refused(digits, server, get):
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        get(sha256=digits)
    assert server.requests == []


def test_hashes_that_contradict_each_other_are_refused(server, get):
    path = get()
    with pytest.raises(UserError, match=r"by the registry|by the record"):
        get(sha256="0" * 64)
    assert path.exists()


# Redirects


def hops(count: int, code: int = 302) -> Answer:
    def answer(handler: Handler) -> None:
        hop = int(handler.path.rpartition("?")[2]) if "?" in handler.path else 0
        (redirect(f"/models/net.pth?{hop + 1}", code) if hop < count else version(cut=None))(handler)

    return answer


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_five_redirects_are_followed(code, server, get):
    server.answers = [hops(5, code)]
    assert get().read_bytes() == CONTENT and len(server.requests) == 6


@pytest.mark.parametrize("answer", [hops(6), redirect("/models/net.pth")])
def test_six_are_not(answer, server, get):
    server.answers = [answer]
    with pytest.raises(UserError, match="redirects more than 5 times"):
        get()
    assert len(server.requests) == 6


@pytest.mark.parametrize("to", ["file:///etc/hostname", "ftp://127.0.0.1/net.pth", "data:,net"])
def test_a_redirect_elsewhere_than_http_is_refused(to, server, get, tmp_path):
    server.answers = [redirect(to)]
    with pytest.raises(UserError, match="http"):
        get()
    assert left(tmp_path) == {"net.pth.lock"} and len(server.requests) == 1


def test_a_redirect_keeps_the_range(server, get):
    server.answers = [version(cut=PART), redirect("/elsewhere"), honest]
    assert get().read_bytes() == CONTENT
    assert [request.get("range") for request in server.requests] == [None, f"bytes={PART}-", f"bytes={PART}-"]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    key, public = path.with_name("key.pem"), path.with_name("public.pem")
    subprocess.run(["openssl", *made.split(), "-keyout", key, "-out", public], check=True, capture_output=True)
    path.write_text(key.read_text() + public.read_text())
    return path


@pytest.fixture
def https(certificate: Path) -> Iterator[Server]:
    with Server() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_redirect_from_https_to_http_is_refused(https, certificate, server, get, register, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    address = https.url.replace("http:", "https:")
    register(sha256=DIGEST, url=f"{address}/net.pth")
    https.answers = [redirect(f"{server.url}/net.pth")]
    with pytest.raises(UserError, match="redirects from https to unprotected http"):
        get()
    assert server.requests == []
    https.answers = [redirect("/again.pth"), honest]
    https.requests.clear()
    assert get().read_bytes() == CONTENT


def test_a_certificate_that_nobody_vouches_for_ends_it_at_once(https, get, register, waits):
    register(sha256=DIGEST, url=f"{https.url.replace('http:', 'https:')}/net.pth")
    with pytest.raises(UserError, match=r"certificate of 127\.0\.0\.1 is not trusted"):
        get()
    assert https.requests == [] and waits == []


# Files and processes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_one_sentence(server, get, tmp_path):
    folder = tmp_path / "cache" / "net"
    folder.mkdir(parents=True)
    (folder / "net.pth.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*net\.pth\.part \(No space left on device\); free some space"):
        get()
    assert "net.pth" not in left(tmp_path) and len(server.requests) == 1


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_a_cache_that_cannot_be_is_one_sentence(place, register, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*choose another folder with --cache"):
        download("net", cache=tmp_path / place)


def command_of(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with the registry of the test."""
    registry = str(tmp_path / "registry.json")
    code = (
        "import pathlib, sys, stsm_rt.public_checkpoints as registry; from stsm_rt.download import main; "
        "registry.REGISTRY = pathlib.Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, registry, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_download_it_once(server, register, tmp_path):
    server.answers = [stalling, honest]
    arguments = (tmp_path, "net", "--cache", str(tmp_path / "cache"))
    first = command_of(*arguments)
    partial = tmp_path / "cache" / "net" / "net.pth.part"
    wait_until(lambda: partial.exists() and partial.stat().st_size == PART)
    second = command_of(*arguments)
    assert second.stderr is not None and "another process is downloading this" in second.stderr.readline()
    server.released.set()
    assert first.wait(60) == 0 and second.wait(60) == 0
    outputs = [process.communicate()[0] for process in (first, second)]
    assert outputs[0] == outputs[1] and len(server.requests) == 2  # the stall ends as a cut-off
    assert left(tmp_path) == KEPT


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
def test_ctrl_c_keeps_what_has_come(server, register, tmp_path):
    server.answers = [stalling]
    child = command_of(tmp_path, "net", "--cache", str(tmp_path / "cache"))
    partial = tmp_path / "cache" / "net" / "net.pth.part"
    wait_until(lambda: partial.exists() and partial.stat().st_size == PART)
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=60)
    assert child.returncode == 130 and out == ""
    assert error == "stsm-rt: stopped; what has come is kept, the same command takes it up\n"
    assert left(tmp_path) == PARTIAL


# The command


def test_the_command_says_how_to_convert_it(server, register, tmp_path, capsys):
    register(sha256=DIGEST, labels=["wave", "clap", "nothing"])
    cache = tmp_path / "my cache"
    assert main(["net", "--cache", str(cache)]) == 0
    out, error = capsys.readouterr()
    path, digest, licence, convert = out.splitlines()
    assert path == str(cache / "net" / "net.pth") and digest == f"SHA-256 {DIGEST} (as is known)"
    assert licence == "licence: not stated" and error == ""
    folder = f"{cache}/net"
    assert convert == (
        f"convert it with: stsm-rt convert '{folder}/net.pth' -o net.safetensors --labels '{folder}/labels.txt'"
    )
    assert (cache / "net" / "labels.txt").read_text() == "wave\nclap\nnothing\n"


def test_the_command_says_what_the_trust_rests_on(server, register, tmp_path, capsys):
    register(sha256_prefix=DIGEST[:8], labels_page="https://labels")
    assert main(["net", "--cache", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "whose first 8 digits are published; the rest is recorded" in out and "3 classes" in out
    assert "at https://labels" in out and "--labels '" not in out
    register()
    assert main(["net", "--cache", str(tmp_path / "b"), "--trust-first-use"]) == 0
    assert "(recorded; none is published)" in capsys.readouterr().out


def test_a_terminal_shows_how_far_it_is(server, register, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(fetch_module, "sleep", lambda _: None)
    server.answers = [version(cut=PART), honest]
    assert main(["net", "--cache", str(tmp_path / "cache")]) == 0
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\r0\.\d of 0\.3 MB, \d+ %", shown) and shown.endswith("\r0.3 of 0.3 MB, 100 %\x1b[K\n")
    assert "\nstsm-rt: it ended after 100000 of 307200 bytes; trying again in 1 s\n" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["nothing"], "there is no checkpoint 'nothing'"), ([], "name a checkpoint"), (["net", "--sha256", "1"], "64")],
)
def test_errors_are_one_sentence(arguments, sentence, server, register, tmp_path, capsys):
    assert main([*arguments, "--cache", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and sentence in error and error.count("\n") == 1
    assert server.requests == []


def test_the_list_tells_what_licence_and_source(register, capsys):
    register(sha256=DIGEST, size=12_345_678)
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "net",
        "  a network; 12.3 MB; SHA-256 known",
        "  licence: not stated",
        "  https://p",
    ]
    register()
    assert main(["--list"]) == 0
    assert "  a network; size not stated; no SHA-256 published\n" in capsys.readouterr().out


def test_the_module_is_a_command_that_needs_no_torch(tmp_path):
    code = "import sys; from stsm_rt.download import main; main(['--list']); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "stsm_rt.download", "no-such-name", "--cache", str(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stderr.startswith("stsm-rt: error: there is no checkpoint 'no-such-name'")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.endswith("False\n") and "tsm-mobilenetv2-jester-online" in result.stdout


# The cache's place


def test_the_cache_is_where_the_platform_keeps_such(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache_folder() == Path("/some/where/stsm-rt/checkpoints")
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == tmp_path / ".cache" / "stsm-rt" / "checkpoints"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert cache_folder() == tmp_path / "Local" / "stsm-rt" / "checkpoints"


# The registry


def test_the_registry_says_what_is_known_and_no_more():
    entries = public_checkpoints.checkpoints()
    assert len(entries) >= 20
    assert len(entries) == len(json.loads(public_checkpoints.REGISTRY.read_text()))
    assert len({entry.url for entry in entries.values()}) == len(entries)
    for name, entry in entries.items():
        assert re.fullmatch(r"[a-z0-9_-]+", name)
        assert all(urlsplit(url).scheme == "https" for url in (entry.url, entry.page, entry.labels_page or "https:"))
        assert re.fullmatch(r"[\w.-]+\.pth(\.tar)?", entry.file)
        assert entry.licence.startswith("not stated")
        assert entry.size is None or entry.size > 10_000_000
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert not entry.labels or (len(entry.labels) == entry.classes == len(set(entry.labels)))
        digits = re.search(r"-([0-9a-f]{8})\.pth$", entry.file)
        named = digits[1] if digits else None
        assert (entry.sha256 or "").startswith(named or "") if entry.sha256 else entry.sha256_prefix == named
