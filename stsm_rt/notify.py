"""Events for other machines: an HTTP endpoint (webhook) and an MQTT broker."""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from stsm_rt.delivery import DEAD_LETTERS, Delivery, Refused, Unreachable
from stsm_rt.errors import UserError

_TIMEOUT = 10.0  # seconds that the other side may take for each answer
_KEEP_ALIVE = 60  # seconds; twice as long without a word, and the broker ends the connection
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_PASSING = {408, 429}  # statuses of 400 and more that another attempt may not meet, beside those from 500 on


class Webhook(Delivery):
    """Sends each record as an HTTP POST with a JSON body.

    A status of 200 to 299 means that it has arrived. It is tried again after 408, 429 and from 500 on (and later,
    where ``Retry-After`` says so), after a time-out and while no connection can be made; any other status is a
    refusal. A redirect counts as one: it would turn the POST into a GET. The header ``Idempotency-Key`` is the same
    each time that a record is sent.
    """

    def __init__(
        self, url: str, *, dead_letters: Path = DEAD_LETTERS, say: Callable[[str], None] = print, **limits: Any
    ) -> None:
        """Check the address and start the thread.

        Args:
            url: ``https://[user:password@]host[:port]/path``, or http.
            dead_letters: See ``Delivery``.
            say: See ``Delivery``.
            limits: ``capacity`` and ``patience`` of ``Delivery``.

        Raises:
            UserError: If the address is none, or the dead-letter file cannot be written.
        """
        super().__init__(
            _Http(_split(url, "--webhook", ("http", "https"))), dead_letters=dead_letters, say=say, **limits
        )


class Mqtt(Delivery):
    """Publishes each record as a JSON message with QoS 1: it has arrived when the broker acknowledges it."""

    def __init__(
        self, url: str, *, dead_letters: Path = DEAD_LETTERS, say: Callable[[str], None] = print, **limits: Any
    ) -> None:
        """Check the address and start the thread.

        Args:
            url: ``mqtts://[user:password@]host[:port]/topic``, or mqtt without TLS; the topic may have several levels.
            dead_letters: See ``Delivery``.
            say: See ``Delivery``.
            limits: ``capacity`` and ``patience`` of ``Delivery``.

        Raises:
            UserError: If the address is none, paho-mqtt is not installed, or the dead-letter file cannot be written.
        """
        super().__init__(
            _Broker(_split(url, "--mqtt", ("mqtt", "mqtts"))), dead_letters=dead_letters, say=say, **limits
        )


class _Http:
    def __init__(self, address: SplitResult) -> None:
        self.name = _name(address)
        self._url = address._replace(netloc=address.netloc.rpartition("@")[2], fragment="").geturl()
        self._headers = {"Content-Type": "application/json", "User-Agent": "stsm-rt"}
        if address.username is not None:
            pair = f"{unquote(address.username)}:{unquote(address.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def open(self) -> None:
        """Each record makes a connection of its own."""

    def send(self, body: bytes, key: str) -> None:
        request = urllib.request.Request(self._url, body, {**self._headers, "Idempotency-Key": key}, method="POST")
        try:
            self._opener.open(request, timeout=_TIMEOUT).close()
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code} {error.reason}".strip()
            if error.code >= 500 or error.code in _PASSING:
                raise Unreachable(reason, _seconds(error.headers.get("Retry-After"))) from error
            raise Refused(reason) from error
        except urllib.error.URLError as error:
            raise Unreachable(_reason(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(_reason(error)) from error

    def idle(self) -> None:
        """Nothing is kept alive."""

    def close(self) -> None:
        """Nothing is kept open."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Follow none."""


class _Broker:
    def __init__(self, address: SplitResult) -> None:
        try:
            import paho.mqtt.client
        except ImportError as error:
            raise UserError(
                "--mqtt needs paho-mqtt, which is not installed; run: pip install 'stsm-rt[live]'"
            ) from error
        self._paho = paho.mqtt.client
        self.name = _name(address)
        self._topic = unquote(address.path.strip("/"))
        if not self._topic or any(sign in self._topic for sign in "#+\0"):
            raise UserError(f"--mqtt needs a topic without + and #, such as mqtt://host/stsm/events, not {self.name}")
        self._address = address
        self._client: Any = None
        self._connected = False
        self._failure = ""
        self._acknowledged: set[int] = set()

    def open(self) -> None:
        address, client = self._address, self._paho.Client(self._paho.CallbackAPIVersion.VERSION2)
        client.connect_timeout = _TIMEOUT
        if address.username is not None:
            client.username_pw_set(unquote(address.username), unquote(address.password or ""))
        if address.scheme == "mqtts":
            client.tls_set()
        client.on_connect = self._on_connect
        client.on_publish = self._on_publish
        self._connected, self._failure = False, ""
        self._acknowledged.clear()
        try:
            client.connect(address.hostname or "", address.port or _PORTS[address.scheme], _KEEP_ALIVE)
        except (OSError, ValueError) as error:
            raise Unreachable(_reason(error)) from error
        self._client = client
        self._wait(lambda: self._connected)

    def send(self, body: bytes, key: str) -> None:
        if self._client is None:
            self.open()
        sent = self._client.publish(self._topic, body, qos=1)
        self._wait(lambda: sent.mid in self._acknowledged)
        self._acknowledged.discard(sent.mid)

    def idle(self) -> None:
        # An end of the connection is met here, and mended by the next record.
        try:
            ended = self._client is not None and self._client.loop(0.0)
        except (OSError, ValueError):
            ended = True
        if ended:
            self._drop()

    def close(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._drop()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Serve the connection until something has come over it."""
        end = monotonic() + _TIMEOUT
        while not done():
            code = self._client.loop(0.1)
            if self._failure or code or monotonic() > end:
                reason = self._failure or (self._paho.error_string(code).rstrip(".") if code else "timed out")
                self._drop()
                raise Unreachable(reason)

    def _drop(self) -> None:
        # A new connection gets a new client: this one would send again what another attempt sends.
        self._client = None

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._connected = not reason.is_failure
        self._failure = str(reason) if reason.is_failure else ""

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        self._acknowledged.add(mid)


def _split(url: str, option: str, schemes: tuple[str, str]) -> SplitResult:
    try:
        address = urlsplit(url)
        usable = address.scheme in schemes and address.hostname and address.port != 0
    except ValueError:
        usable = False
    if not usable or any(not sign.isprintable() or sign.isspace() for sign in url):
        raise UserError(f"{option} needs an address that begins with {schemes[0]}:// or {schemes[1]}://, not {url}")
    return address


def _name(address: SplitResult) -> str:
    """Name the other side without its user, its path and its query, which may be secrets."""
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"


def _reason(error: BaseException | str) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _seconds(retry_after: str | None) -> float | None:
    """Read ``Retry-After``: seconds or a date (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        if retry_after.strip().isdecimal():
            return float(retry_after)
        seconds = (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds()
    except (TypeError, ValueError):
        return None
    return max(0.0, seconds)
