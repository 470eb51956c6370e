"""What a run counts, per camera, and the line that says how it is doing."""

from __future__ import annotations

import re
import threading
from collections import deque
from time import monotonic
from typing import Any

import numpy as np

from stsm_rt.errors import redact
from stsm_rt.video.source import SourceState

# Upper bounds in seconds. A step takes milliseconds on a GPU; at 10 steps a second, 100 ms is where it falls behind.
LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
STATES = tuple(state.value for state in SourceState)

_LONGEST_NAME = 80
_RECENT_SECONDS = 10.0  # over which the frame rate of the status line is taken
_RECENT_FRAMES = 1200
_RECENT_STEPS = 1000


class CameraMetrics:
    """The counts of one camera; see ``Metrics.camera``. Its methods may be called from any thread.

    Attributes:
        name: As it appears in labels: without credentials, query or fragment of a URL, at most 80 characters.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._frames = self._dropped = self._dropped_before = 0
        self._steps = self._reconnects = self._resets = 0
        self._buckets = [0] * (len(LATENCY_BUCKETS) + 1)
        self._seconds = 0.0
        self._latencies: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._arrivals: deque[float] = deque(maxlen=_RECENT_FRAMES)
        self._state = "opening"
        self._early = False
        self._last = monotonic()

    def frame(self, dropped_total: int = 0) -> None:
        """Count a frame that was taken from the source.

        Args:
            dropped_total: Frames that the source has lost so far; where the number falls, its count began anew.
        """
        now = monotonic()
        with self._lock:
            self._frames += 1
            before = self._dropped_before if dropped_total >= self._dropped_before else 0
            self._dropped += dropped_total - before
            self._dropped_before = dropped_total
            self._arrivals.append(now)
            self._last = now
            if self._state == "opening":
                self._state = "running"

    def step(self, latency: float) -> None:
        """Count a step of the network.

        Args:
            latency: Seconds from the frame's arrival to its result.
        """
        with self._lock:
            self._steps += 1
            self._buckets[int(np.searchsorted(LATENCY_BUCKETS, latency))] += 1
            self._seconds += latency
            self._latencies.append(latency)

    def reconnected(self) -> None:
        """Count a connection that was made again."""
        with self._lock:
            self._reconnects += 1

    def reset(self) -> None:
        """Count a reset of the network's state."""
        with self._lock:
            self._resets += 1

    def state(self, state: str, *, early: bool = False) -> None:
        """Say what the source is doing.

        Args:
            state: One of ``STATES``.
            early: Whether it has ended before anybody wanted it to: a camera that has gone, a recording that broke off.

        Raises:
            ValueError: If it is none of them.
        """
        if state not in STATES:
            raise ValueError(f"a source is {', '.join(STATES)}, not {state}")
        with self._lock:
            self._state, self._early = state, early

    def snapshot(self) -> dict[str, Any]:
        """Return all counts at one moment, and what follows from them."""
        now = monotonic()
        with self._lock:
            recent = [time for time in self._arrivals if now - time <= _RECENT_SECONDS]
            span = now - recent[0] if recent else 0.0
            latencies = np.array(self._latencies)
            return {
                "state": self._state,
                "ended_early": self._early,
                "frames": self._frames,
                "dropped": self._dropped,
                "steps": self._steps,
                "reconnects": self._reconnects,
                "resets": self._resets,
                "frame_rate": (len(recent) - 1) / span if len(recent) > 1 else 0.0,
                "latency_p95": float(np.percentile(latencies, 95)) if len(latencies) else None,
                "seconds_since_frame": now - self._last,
                "latency_buckets": np.cumsum(self._buckets).tolist(),
                "latency_sum": self._seconds,
            }


class Metrics:
    """The counts of a run, per camera. Its methods may be called from any thread; it needs no further package.

    Example:
        >>> metrics = Metrics()
        >>> front = metrics.camera("front")
        >>> front.frame()
        >>> front.step(0.012)
        >>> print(status_line(metrics).partition(":")[0])
        front
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cameras: dict[str, CameraMetrics] = {}

    def camera(self, name: str) -> CameraMetrics:
        """Return the counts of a camera, which begin at 0 when it is named for the first time.

        Args:
            name: What to call it. Of a URL neither credentials nor query nor fragment are kept.
        """
        name = _label(name)
        with self._lock:
            return self._cameras.setdefault(name, CameraMetrics(name))

    def remove(self, name: str) -> None:
        """Forget a camera that has gone for good, if it is known."""
        with self._lock:
            self._cameras.pop(_label(name), None)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return the counts of every camera at one moment, by name; see ``CameraMetrics.snapshot``."""
        with self._lock:
            cameras = list(self._cameras.values())
        return {camera.name: camera.snapshot() for camera in cameras}


def status_line(metrics: Metrics) -> str:
    """Say in one line how every camera is doing.

    Args:
        metrics: The counts; the rate is that of the last 10 s, the latency that of the last 1000 steps.

    Returns:
        For example ``front: running, 15.0 frames/s, 120 steps, 3 dropped, latency p95 12 ms``, cameras being separated
        by `` | ``.
    """
    parts = []
    for name, counts in metrics.snapshot().items():
        words = [
            counts["state"],
            f"{counts['frame_rate']:.1f} frames/s",
            f"{counts['steps']} steps",
            f"{counts['dropped']} dropped",
        ]
        if counts["latency_p95"] is not None:
            words.append(f"latency p95 {1000 * counts['latency_p95']:.0f} ms")
        for count, what in (("reconnects", "reconnected"), ("resets", "reset")):
            if counts[count]:
                words.append(f"{what} {counts[count]} times" if counts[count] > 1 else f"{what} once")
        parts.append(f"{name}: {', '.join(words)}")
    return " | ".join(parts) or "no camera"


def health(metrics: Metrics, stale: float = 10.0) -> tuple[bool, dict[str, Any]]:
    """Judge whether frames come.

    Args:
        metrics: The counts.
        stale: Seconds without a frame after which a camera is not healthy.

    Returns:
        Whether all is well, and what ``/healthz`` answers: ``{"healthy": bool, "cameras": {name: {"healthy": bool,
        "state": str, "seconds_since_frame": float}}}``.
    """
    cameras = {}
    for name, counts in metrics.snapshot().items():
        state, age = counts["state"], counts["seconds_since_frame"]
        healthy = not counts["ended_early"] if state == "ended" else state != "failed" and age <= stale
        cameras[name] = {"healthy": healthy, "state": state, "seconds_since_frame": round(age, 3)}
    well = bool(cameras) and all(camera["healthy"] for camera in cameras.values())
    return well, {"healthy": well, "cameras": cameras}


def _label(name: str) -> str:
    """Make a name fit for a label: a URL's query may hold a key, and its length is nobody's promise."""
    name = re.sub(r"(://[^\s?#]*)[?#]\S*", r"\1", redact(name))
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
