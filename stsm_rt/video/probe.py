"""Why a stream cannot be opened: a look at the server, since OpenCV says nothing."""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from stsm_rt.errors import redact

_PORTS = {"rtsp": 554, "http": 80, "https": 443}
_MOST_BYTES = 65536  # of an answer that is looked at
# What a server may call a video; anything else is a page, a document or a picture.
_VIDEO_TYPES = (
    "video/",
    "multipart/",
    "image/jpeg",
    "application/octet-stream",
    "mpegurl",
    "dash+xml",
    "application/ogg",
)


def explain(url: str, *, timeout: float) -> str:
    """Look why a stream cannot be opened.

    Args:
        url: The address, rtsp, http or https; its credentials are sent to its host, and are not in the answer.
        timeout: Seconds for each step: name, connection, answer.

    Returns:
        A sentence for a person.
    """
    name = redact(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _PORTS[parts.scheme.lower()]
    except ValueError:
        host, port = None, 0
    if not host:
        return f"{name} is no address; write it as {url.split(':')[0]}://host:port/path"
    try:
        answer = (_ask_rtsp if parts.scheme.lower() == "rtsp" else _ask_http)(url, parts, timeout)
    except socket.gaierror:
        return f"{name} names an unknown host; check the spelling of {host} and the network"
    except ConnectionRefusedError:
        return f"{name} refuses the connection; check that the camera serves on port {port}"
    except TimeoutError:
        return f"{name} does not answer within {timeout:g} s; check that {host} is on and can be reached"
    except LookupError:  # by which the parsers of the standard library answer a field without a value
        return f"{name} asks for a user and a password in words that are damaged; check the server"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{name} cannot be reached ({_words(error)}); check the address and the network"
    return f"{name} {_sentence(answer, has_user=parts.username is not None)}"


class _Answer(NamedTuple):
    """What the server said: a status as in HTTP, and what it would send."""

    status: int
    kind: str = ""
    video: bool = True


def _sentence(answer: _Answer, *, has_user: bool) -> str:
    status = answer.status
    if status == 401 and has_user:
        return "refuses this user or password; check them, and percent-encode signs such as @ : / # in them"
    if status == 401:
        return "wants a user and a password; write user:password@ before the host"
    if status == 403:
        return "forbids it (403); check what this user may see, and whether too many watch already"
    if status in (404, 410, 454):
        return f"does not exist on this server ({status}); check the path of the stream"
    if status >= 300:
        return f"was answered with status {status}; check the address and the server"
    if not answer.video:
        return f"is not a video but {answer.kind or 'something else'}; give the address of the stream itself"
    return "gives no video that can be decoded; check that another player shows it"


def _ask_http(url: str, parts: SplitResult, timeout: float) -> _Answer:
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    # FFmpeg checks no certificate either; cameras have ones of their own making.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    if parts.username is not None:
        passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, plain, unquote(parts.username), unquote(parts.password or ""))
        opener.add_handler(urllib.request.HTTPBasicAuthHandler(passwords))
        opener.add_handler(urllib.request.HTTPDigestAuthHandler(passwords))
    try:
        with opener.open(plain, timeout=timeout) as response:
            kind = response.headers.get_content_type() if "Content-Type" in response.headers else ""
            return _Answer(response.status, kind, not kind or any(word in kind for word in _VIDEO_TYPES))
    except urllib.error.HTTPError as error:
        with error:
            return _Answer(error.code)
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason)) from error


def _ask_rtsp(url: str, parts: SplitResult, timeout: float) -> _Answer:
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    with socket.create_connection((parts.hostname, parts.port or _PORTS["rtsp"]), timeout) as connection:
        status, headers, body = _describe(connection, plain, 1, "")
        if status == 401 and parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
            authorization = _authorize(headers.get_all("WWW-Authenticate", []), user, password, plain)
            status, headers, body = _describe(connection, plain, 2, f"Authorization: {authorization}\r\n")
    return _Answer(status, "a stream without a picture", "m=video" in body)


def _describe(
    connection: socket.socket, url: str, number: int, header: str
) -> tuple[int, http.client.HTTPMessage, str]:
    """Ask an RTSP server what it has at an address (RFC 2326, 10.2)."""
    request = f"DESCRIBE {url} RTSP/1.0\r\nCSeq: {number}\r\nAccept: application/sdp\r\n{header}\r\n"
    connection.sendall(request.encode())
    with connection.makefile("rb") as answer:
        line = answer.readline(_MOST_BYTES).decode("latin-1").split(maxsplit=2)
        if len(line) < 2 or not line[0].startswith("RTSP/") or not line[1].isdecimal():
            raise ValueError("it does not speak RTSP")
        headers = http.client.parse_headers(answer)
        length = headers.get("Content-Length", "0")
        body = answer.read(min(int(length), _MOST_BYTES)) if length.isdecimal() else b""
    return int(line[1]), headers, body.decode("utf-8", "replace")


def _authorize(challenges: list[str], user: str, password: str, url: str) -> str:
    """Answer a server's challenge, the digest one (RFC 2069, which RTSP 1.0 uses) rather than the basic one."""
    for challenge in challenges:
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "digest":
            fields = urllib.request.parse_keqv_list(urllib.request.parse_http_list(rest))
            realm, nonce = fields.get("realm", ""), fields.get("nonce", "")
            secret = _md5(f"{user}:{realm}:{password}")
            response = _md5(f"{secret}:{nonce}:{_md5(f'DESCRIBE:{url}')}")
            return f'Digest username="{user}", realm="{realm}", nonce="{nonce}", uri="{url}", response="{response}"'
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"


_md5: Callable[[str], str] = lambda text: hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()  # noqa: E731


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
