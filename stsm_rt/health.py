"""An HTTP server for Prometheus and for health checks."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any

from stsm_rt.errors import UserError
from stsm_rt.run_counts import LATENCY_BUCKETS, STATES, Metrics, health

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_REQUEST_SECONDS = 5.0  # for a client that connects and says nothing


class HealthServer:
    """Serves ``/metrics`` in Prometheus' text format and ``/healthz``, in threads of its own.

    ``/healthz`` answers 200 while frames come and 503 when they do not: when a camera has failed, has given no frame
    for longer than ``stale`` (before its first frame: since it was named), has ended early, or when there is no camera.
    A recording that was played to its end counts as healthy, and so does what somebody stopped. The answer is JSON and
    says which camera it is.

    Attributes:
        port: The port on which it listens.
        url: Its address, ``http://127.0.0.1:9300``.
    """

    def __init__(self, metrics: Metrics, port: int, host: str = "127.0.0.1", stale: float = 10.0) -> None:
        """Listen; requests are answered at once.

        Args:
            metrics: What to serve.
            port: TCP port; 0 takes a free one.
            host: Address to listen on. The default is reached from this machine only: there is no password.
            stale: Seconds without a frame after which a camera is not healthy.

        Raises:
            UserError: If prometheus_client is not installed or the port is not to be had.
        """
        try:
            from prometheus_client import CollectorRegistry
        except ImportError as error:
            raise UserError(
                "--metrics needs prometheus-client, which is not installed; run: pip install 'stsm-rt[live]'"
            ) from error
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(metrics))
        handler = type("Handler", (_Handler,), {"metrics": metrics, "registry": registry, "stale": stale})
        try:
            self._server = _Server((host, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "no such port"
            raise UserError(f"the metrics cannot be served on {host}:{port} ({reason}); give another port") from error
        self.port = self._server.server_address[1]
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="stsm-rt metrics", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> HealthServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and give back the port; may be called twice."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that is slow to read ends with the process

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle of its request is not worth a line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    metrics: Metrics
    registry: Any
    stale: float
    timeout = _REQUEST_SECONDS
    server_version = "stsm-rt"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            from prometheus_client.exposition import choose_encoder

            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, kind, encode(self.registry))
        elif path == "/healthz":
            healthy, report = health(self.metrics, self.stale)
            self._answer(200 if healthy else 503, "application/json", json.dumps(report).encode() + b"\n")
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /metrics and /healthz\n")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line each."""

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Collector:
    """Hands the counts to prometheus_client when they are asked for; names follow Prometheus' conventions."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        cameras = self._metrics.snapshot()
        for count, name, text in (
            ("frames", "stsm_frames", "Frames taken from the source."),
            ("dropped", "stsm_frames_dropped", "Frames of a live source for which there was no time."),
            ("steps", "stsm_steps", "Steps of the network."),
            ("reconnects", "stsm_reconnects", "Connections to the source that were made again."),
            ("resets", "stsm_state_resets", "Times that the network's state was reset."),
        ):
            counter = CounterMetricFamily(name, text, labels=["camera"])
            for camera, counts in cameras.items():
                counter.add_metric([camera], counts[count])
            yield counter
        latency = HistogramMetricFamily(
            "stsm_step_latency_seconds", "From a frame's arrival to its result.", labels=["camera"]
        )
        bounds = [*map(str, LATENCY_BUCKETS), "+Inf"]
        for camera, counts in cameras.items():
            buckets = list(zip(bounds, counts["latency_buckets"], strict=True))
            latency.add_metric([camera], buckets, counts["latency_sum"])
        yield latency
        age = GaugeMetricFamily("stsm_frame_age_seconds", "Time since the last frame.", labels=["camera"])
        states = GaugeMetricFamily("stsm_source_state", "1 for the state of the source.", labels=["camera", "state"])
        for camera, counts in cameras.items():
            age.add_metric([camera], counts["seconds_since_frame"])
            for state in STATES:
                states.add_metric([camera, state], float(state == counts["state"]))
        yield age
        yield states
