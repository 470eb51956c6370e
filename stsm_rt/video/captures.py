"""Devices and streams, opened with OpenCV and time-outs."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

import cv2

from stsm_rt.errors import UserError, redact
from stsm_rt.video.decoding import declared_rate
from stsm_rt.video.probe import explain

# What goes wrong is raised; FFmpeg's own log would print URLs with their credentials.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
WHOLE_PICTURES = "fflags;+discardcorrupt"  # FFmpeg's option: no picture of which the demuxer knows that it broke off
# RTSP over TCP, so that no packet is lost on the way.
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", f"rtsp_transport;tcp|{WHOLE_PICTURES}")

SCHEMES = ("rtsp", "http", "https")
PIPELINE_PREFIX = "gstreamer:"
_PROBE_TIMEOUT = 3.0  # seconds for each step of the look at why a stream cannot be opened
EXPLAINING = 10.0  # seconds for all of them, and for a name that is not found at once


def silence_opencv() -> None:
    """Keep OpenCV's own messages, which print URLs with their credentials, off standard error."""
    set_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV 4, OpenCV 5
    set_level(0)


def is_device(path: str) -> bool:
    """Whether a path names a device, also one that is not connected just now."""
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return path.startswith("/dev/")


def is_pipeline(text: str) -> bool:
    """Whether a text is a GStreamer pipeline: it says so in front, or ``!`` joins its elements and it is no file."""
    return text.startswith(PIPELINE_PREFIX) or (" ! " in text and not os.path.exists(text))


def check_name(name: str) -> None:
    """Refuse what OpenCV cannot be given: it ends the process where a name is no Unicode text.

    Raises:
        UserError: If the name, of a file, a device, a URL or a pipeline, holds bytes that are no UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r} is no UTF-8 text, which OpenCV needs; rename it, or its folder") from None


def open_camera(camera: int | str) -> cv2.VideoCapture:
    """Open a camera.

    Args:
        camera: Its index, or the path of its device.

    Raises:
        UserError: If it is not there, not free or not allowed to be used.
    """
    name = f"camera {camera}"
    if isinstance(camera, str):
        if not os.path.exists(camera):
            raise UserError(f"there is no {name}; check that it is connected (ls /dev/v4l/by-id shows the cameras)")
        if not os.access(camera, os.R_OK | os.W_OK):
            raise UserError(f"{name} may not be used; add this user to the group that owns the device (often video)")
    try:
        capture = cv2.VideoCapture(camera) if isinstance(camera, int) else cv2.VideoCapture(camera, cv2.CAP_V4L2)
    except cv2.error:
        capture = None
    if capture is None or not capture.isOpened():
        raise UserError(
            f"{name} cannot be opened; check that it is connected, free and allowed to be used, "
            "or give a video as the source"
        )
    return capture


def open_stream(url: str, *, open_timeout: float, read_timeout: float) -> cv2.VideoCapture:
    """Open a stream.

    Args:
        url: Its address: rtsp, http or https.
        open_timeout: Seconds within which it must open.
        read_timeout: Seconds after which a read is given up.

    Raises:
        UserError: If it cannot be opened; the sentence says why, found out by a look of our own.
    """
    # OpenCV else opens one stream at a time: a camera that is away would hold up all others. FFmpeg needs no such lock
    # since its version 4. OpenCV warns of it, so it is not set before its messages are silenced.
    silence_opencv()
    os.environ.setdefault("OPENCV_FFMPEG_IS_THREAD_SAFE", "1")
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, round(1000 * open_timeout)]
    timeouts += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, round(1000 * read_timeout)]
    # Each further thread holds back a frame: with eight of them a live H.264 stream came 230 ms later than with one.
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, [*timeouts, cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise UserError(explain(url, timeout=min(open_timeout, _PROBE_TIMEOUT)))
    return capture


def open_pipeline(pipeline: str) -> cv2.VideoCapture:
    """Open a GStreamer pipeline.

    Args:
        pipeline: Its elements, joined by ``!``, the last of them an ``appsink``; it may begin with ``gstreamer:``.

    Raises:
        UserError: If this OpenCV has no GStreamer, or the pipeline gives no video.
    """
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        raise UserError(
            "this OpenCV was built without GStreamer, as those of PyPI are; use the one of JetPack or Debian for "
            "pipelines, or give a file, a camera or a URL"
        )
    capture = cv2.VideoCapture(pipeline.removeprefix(PIPELINE_PREFIX), cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        raise UserError(
            f"the pipeline {redact(pipeline)} gives no video; try it with gst-launch-1.0, and let it end in "
            "'videoconvert ! video/x-raw,format=BGR ! appsink drop=true max-buffers=1'"
        )
    return capture


def open_file(path: Path) -> cv2.VideoCapture:
    """Open a video file.

    Raises:
        UserError: If there is no such file, or it is not a video that can be decoded.
    """
    if not path.is_file():
        raise UserError(f"there is no video {path}; give a camera index, a video file, a folder of images, or a URL")
    if not os.access(path, os.R_OK):
        raise UserError(f"the video {path} may not be read; change its permissions")
    check_name(os.path.abspath(path))
    # An absolute path cannot be mistaken for a protocol ("a:b.mp4") by FFmpeg. OpenCV decodes with a thread for each
    # core. Beside an engine that has threads of its own, half as many play a file as fast (on two cores, 640x480 and
    # 1920x1080 H.264) and take 10 to 30 % less processor time for decoding.
    threads = [cv2.CAP_PROP_N_THREADS, max(1, cv2.getNumberOfCPUs() // 2)]
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, threads)
    if not capture.isOpened():
        raise UserError(f"{path} is not a video that can be decoded; give a video file or a folder of images")
    return capture


def has_positions(capture: cv2.VideoCapture, scheme: str) -> bool:
    """Whether the positions of an open stream are measured: those of MJPEG over HTTP are made up, at 25 frames/s."""
    motion_jpeg = int(capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"MJPG")
    return not (scheme in ("http", "https") and motion_jpeg)


def measured_rate(capture: cv2.VideoCapture, scheme: str) -> float | None:
    """Frames per second as an open stream declares them, or None where they are made up as its positions are."""
    return declared_rate(capture) if has_positions(capture, scheme) else None


def scheme_of(url: str) -> str:
    """The scheme of a URL in small letters."""
    return urlsplit(url).scheme.lower()
