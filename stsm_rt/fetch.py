"""One file over HTTP, taken up again where it broke off.

The standard library is enough: urllib brings TLS, proxies and redirects, and what a resumed transfer needs beyond that
(Range, If-Range, Content-Range: RFC 9110, sections 13.1.5 and 14) is here.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import IO, Any
from urllib.parse import urlsplit

from stsm_rt.errors import UserError

_BLOCK = 1 << 16
_LONGEST_WAIT = 30.0  # seconds
_RETRIED = (408, 429, 500, 502, 503, 504)


class _Broken(Exception):
    """The transfer broke off; another attempt may do better."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """At most five, to http or https, and never from https to http."""

    max_redirections = max_repeats = 6  # ours is the lower limit
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https"):
            raise UserError(f"{old.hostname} redirects to {new.scheme}, expected http or https; nothing was taken")
        if old.scheme == "https" and new.scheme == "http":
            raise UserError(
                f"{old.hostname} redirects from https to unprotected http ({new.hostname}); nothing was taken there"
            )
        redirects = getattr(req, "redirects", 0) + 1
        if redirects > 5:
            raise UserError(f"{old.hostname} redirects more than 5 times, which looks like a circle; try again later")
        following = urllib.request.Request(newurl, headers=dict(req.headers), origin_req_host=req.origin_req_host)
        following.redirects = redirects  # type: ignore[attr-defined]
        return following


def _opener() -> urllib.request.OpenerDirector:
    """Of http and https alone: urllib's default one also opens files, ftp and data URLs."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


class _Partial:
    """The part of a file that is here, and which version of the file it is of."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.record = path.with_name(f"{path.name}.json")
        self.validator: str | None = None
        self.size = 0
        try:
            found = json.loads(self.record.read_text(encoding="utf-8"))
            if found["url"] == url and isinstance(found["validator"], str):
                self.size, self.validator = path.stat().st_size, found["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing that could be taken up

    def restart(self, validator: str | None) -> None:
        """Begin a file of that version from nothing; without a validator it cannot be taken up."""
        self.record.unlink(missing_ok=True)
        with open(self.path, "wb"):
            pass
        if validator is not None:
            new = self.record.with_name(f"{self.record.name}.new")
            new.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")
            os.replace(new, self.record)
        self.size, self.validator = 0, validator

    def discard(self) -> None:
        """Remove what is here."""
        self.record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.size, self.validator = 0, None


def discard(partial: Path) -> None:
    """Remove a partial file and what is known of it."""
    _Partial(partial, "").discard()


def fetch(
    url: str,
    partial: Path,
    *,
    expected: str | None,
    limit: int,
    attempts: int,
    timeout: float,
    backoff: float,
    say: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> str:
    """Transfer one file.

    The hash has the last word: a transfer whose bytes have the expected one is complete, whatever length the server
    stated.

    Args:
        url: http or https.
        partial: Where the bytes go; what an earlier call left there is taken up if the server still has that version.
        expected: The first hexadecimal digits of the file's SHA-256, or None: not known.
        limit: Bytes; a longer file is not taken.
        attempts: Failures in a row, none of which got further than those before, that end it.
        timeout: Seconds without a byte.
        backoff: Seconds before the second attempt; they double from one to the next.
        say: Told of every attempt that is repeated.
        progress: Told the bytes that are here and those of the whole file, where the server states them.

    Returns:
        The SHA-256 of what is in `partial`, 64 hexadecimal digits.

    Raises:
        UserError: It cannot be had, or cannot be written; what is here is kept for the next call.
    """
    transfer = _Transfer(url, partial, expected, limit, timeout, progress)
    failures = furthest = 0
    while True:
        try:
            return transfer.attempt()
        except _Broken as broken:
            size = transfer.partial.size
            failures = 1 if size > furthest else failures + 1
            furthest = max(furthest, size)
            if failures >= attempts:
                raise UserError(
                    f"{url} could not be downloaded: {broken}, {failures} times in a row; "
                    f"{size} bytes are kept, so run the same command again later"
                ) from broken
            wait = min(backoff * 2 ** (failures - 1), _LONGEST_WAIT)
            say(f"{broken}; trying again in {wait:g} s")
            sleep(wait)
        except OSError as error:  # of the disk: those of the network are broken transfers
            raise UserError(
                f"cannot write {partial} ({error.strerror or error}); free some space or choose another folder "
                "with --cache, what is there is kept"
            ) from error


class _Transfer:
    def __init__(
        self,
        url: str,
        partial: Path,
        expected: str | None,
        limit: int,
        timeout: float,
        progress: Callable[[int, int | None], None],
    ) -> None:
        self.url, self.expected, self.limit, self.timeout = url, expected, limit, timeout
        self.partial, self.progress = _Partial(partial, url), progress
        self.opener = _opener()

    def attempt(self) -> str:
        headers = {"User-Agent": "stsm-rt", "Accept-Encoding": "identity"}
        if self.partial.size and self.partial.validator is not None:
            headers |= {"Range": f"bytes={self.partial.size}-", "If-Range": self.partial.validator}
        try:
            response = self.opener.open(urllib.request.Request(self.url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"the certificate of {urlsplit(self.url).hostname} is not trusted ({reason.verify_message}); "
                    "check the clock and the certificates of this machine"
                ) from error
            raise _Broken(f"no answer ({reason or type(error).__name__})") from error
        with response:
            return self._take(response)

    def _refused(self, error: urllib.error.HTTPError) -> str:
        if error.code == 416 and self.partial.size:
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if whole and int(whole[1]) == self.partial.size:
                return self._hash_of_what_is_here().hexdigest()  # all of it was here
            self.partial.discard()
            raise _Broken("the file there is another one by now")
        if error.code in _RETRIED:
            raise _Broken(f"the server answered {error.code} {error.reason}")
        raise UserError(
            f"{self.url} cannot be had: the server answered {error.code} {error.reason}; "
            "see the page of the source for another address"
        )

    def _take(self, response: http.client.HTTPResponse) -> str:
        tag = response.headers.get("ETag", "")
        validator = tag if tag.startswith('"') else response.headers.get("Last-Modified")
        if response.status == 206:
            part = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", response.headers.get("Content-Range", ""))
            if not part or int(part[1]) != self.partial.size or validator not in (None, self.partial.validator):
                self.partial.discard()
                raise _Broken("the server sent another part than was asked for")
        elif response.status != 200:
            raise UserError(f"{self.url} cannot be had: the server answered {response.status}, expected a file")
        if self.expected is None:
            self._check_without_hash(response)
        if response.status == 200:
            self.partial.restart(validator)
        length = response.length  # None: chunked, or until the connection closes
        total = None if length is None else self.partial.size + length
        digest = self._hash_of_what_is_here()
        failure = self._copy(response, digest, total)
        if self.partial.size > self.limit:
            self.partial.discard()
            raise UserError(f"{self.url} is longer than the {self.limit} bytes it should have; it was removed")
        if self.expected is not None and digest.hexdigest().startswith(self.expected):
            return digest.hexdigest()
        if failure is not None:
            raise _Broken(failure)
        if total is not None and self.partial.size < total:
            raise _Broken(f"it ended after {self.partial.size} of {total} bytes")
        return digest.hexdigest()

    def _check_without_hash(self, response: http.client.HTTPResponse) -> None:
        """What a hash would bring to light has to be seen beforehand."""
        if response.headers.get_content_type() == "text/html":
            problem = "is a page instead of a file"
        elif response.headers.get("Content-Encoding", "identity") != "identity":
            problem = "comes encoded, which was not asked for"
        elif response.length is None and not response.chunked:
            problem = "comes without a length, so its end cannot be told from a cut-off"
        else:
            return
        raise UserError(f"{self.url} {problem}, and no SHA-256 of it is known; give one with --sha256")

    def _copy(self, response: http.client.HTTPResponse, digest: Any, total: int | None) -> str | None:
        """Append the body to the partial file, up to just beyond the limit; returns what went wrong on the way."""
        with open(self.partial.path, "ab", buffering=0) as file:
            while True:
                try:
                    block = memoryview(response.read1(_BLOCK))
                except (OSError, http.client.HTTPException) as error:
                    return f"it broke off after {self.partial.size} bytes ({error or type(error).__name__})"
                if not block:
                    os.fsync(file.fileno())
                    return None
                digest.update(block)
                while block:  # unbuffered: what has come is in the file, even if this process is killed
                    written = file.write(block)
                    self.partial.size += written
                    block = block[written:]
                if self.partial.size > self.limit:
                    return None
                self.progress(self.partial.size, total)

    def _hash_of_what_is_here(self) -> Any:
        digest, missing = hashlib.sha256(), self.partial.size
        with open(self.partial.path, "rb") as file:
            while missing and (block := file.read(min(missing, 1 << 20))):
                digest.update(block)
                missing -= len(block)
        return digest
