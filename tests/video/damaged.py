"""Damaged H.264: bytes flipped, cut out, put in between, and joined to a stream of another size."""

from __future__ import annotations

import io
import random
from fractions import Fraction
from functools import cache

import av
import cv2
import numpy as np

FORMATS = {"h264": "h264", "mp4": "mp4", "mpegts": "ts", "matroska": "mkv"}
FRAMES = 40


@cache
def encode(size: tuple[int, int], seed: int) -> bytes:
    """A moving pattern as a raw H.264 stream: four groups of ten frames, deblocking and CABAC as encoders do it."""
    small = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    scene = cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"tune": "zerolatency", "preset": "veryfast", "x264-params": "keyint=10:scenecut=0"}
        for index in range(FRAMES):
            picture = np.roll(scene, (3 * index, 2 * index), (0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "bgr24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def wrap(data: bytes, form: str) -> bytes:
    """Put a raw stream into a container."""
    if form == "h264":
        return data
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data), format="h264") as raw, av.open(buffer, "w", format=form) as container:
        stream = container.add_stream_from_template(raw.streams.video[0])
        for index, packet in enumerate(packet for packet in raw.demux() if packet.size):
            packet.pts = packet.dts = index
            packet.duration, packet.time_base, packet.stream = 1, Fraction(1, 25), stream
            container.mux(packet)
    return buffer.getvalue()


def damaged(seed: int) -> tuple[str, bytes]:
    """The suffix and the bytes of a damaged video."""
    chance = random.Random(seed)
    form = chance.choice(list(FORMATS))
    raw = encode((64, 48), 0)
    if chance.random() < 0.25:
        other = encode(chance.choice([(128, 96), (32, 32), (48, 64)]), 1)
        form, raw = "h264", raw[: chance.randrange(len(raw))] + other + raw
    data = bytearray(wrap(raw, form))
    for _ in range(chance.choice([1, 1, 2, 5])):
        place = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                for _ in range(chance.choice([1, 3, 10, 40])):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[place : place + chance.randrange(1, 2000)]
            case 2:
                data[place:place] = chance.randbytes(chance.randrange(1, 500))
            case 3 if len(data) > 4000:
                del data[max(4000, place) :]
        if len(data) < 2:
            break
    return FORMATS[form], bytes(data)
