"""Frames of a recorded video by their number: the right ones, and few others decoded on the way.

Decoding is PyAV's (FFmpeg inside its wheel). Seeking by time alone is inexact with reordered frames (B-frames), so a
file's packets are read through once, undecoded, and every frame is known by its presentation time stamp: a frame
counts as found only when its own stamp comes out of the decoder. Where packets do not tell the frames (no stamps, as in
AVI, or packets without a picture, as in VP8), the video is decoded from its start.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

from stsm_rt.errors import UserError

Frames = npt.NDArray[np.uint8]

# Of these codecs every packet is one frame that is shown, and in these containers every packet has its stamp.
_ONE_FRAME_A_PACKET = {"h264", "hevc", "vp9", "av1"}
_STAMPED = {"mov", "matroska"}


class UnreadableVideo(UserError):
    """A video that cannot be decoded, and why."""


class VideoFile:
    """A video file, open for reading.

    Attributes:
        times: float64 (F,), seconds of each frame since the first; F is the number of frames.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and number its frames.

        Raises:
            UnreadableVideo: It is missing, no video, or holds no frame.
        """
        self.path = path
        try:
            self._container = _open(path)
        except (av.FFmpegError, OSError) as error:
            raise _unreadable(path, error) from error
        try:
            if not self._container.streams.video:
                raise UnreadableVideo(f"{path} cannot be decoded (it has no video stream)")
            self._stream = self._container.streams.video[0]
            if self._stream.codec_context is None:
                raise UnreadableVideo(f"{path} cannot be decoded (its codec is unknown)")
            # Loaders run a process for each core; threads of the decoder would only get in their way.
            self._stream.codec_context.thread_count = 1
            self._number_frames()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self._container.close()

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Frames:
        """Decode frames.

        Args:
            indices: Frame numbers (n,) in 0 to F - 1, in any order, with repetitions.

        Returns:
            uint8 (n, H, W, 3), BGR, upright.

        Raises:
            UnreadableVideo: One of them cannot be decoded.
        """
        wanted, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        pictures = [_picture(frame) for frame in self._frames(wanted.tolist())]
        if len({picture.shape for picture in pictures}) > 1:
            raise UnreadableVideo(f"{self.path} cannot be decoded to one clip (the size of its pictures changes)")
        return np.stack(pictures)[place]

    def _number_frames(self) -> None:
        """Find the presentation time stamp of every frame, and whether the packets tell them."""
        stamps: list[int | None] = []
        keys: list[int] = []
        packets = [packet for packet in _guarded(self._container.demux(self._stream), self.path) if packet.size]
        for packet in packets:
            if not packet.is_discard:
                stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
        known = [stamp for stamp in stamps if stamp is not None]
        self._pts = sorted(known)
        self._keys = sorted(keys)
        self._seekable = (
            self._container.format.name.split(",")[0] in _STAMPED
            and self._stream.codec_context.codec.canonical_name in _ONE_FRAME_A_PACKET
            and len(set(known)) == len(stamps) > 0
            and packets[0].is_keyframe
            and bool(keys)
            and self._keys[0] <= self._pts[0]
        )
        if not self._seekable:
            decoded = [frame.pts for frame in self._decode_from_start()]
            if not decoded:
                raise UnreadableVideo(f"{self.path} cannot be decoded (it holds no frame)")
            self._pts = [-1 if stamp is None else stamp for stamp in decoded]
        times = np.array(self._pts, np.float64) * float(self._stream.time_base or 0)
        if len(times) > 1 and not (np.diff(times) > 0).all():
            times = np.arange(len(times)) / float(self._stream.average_rate or 30)
        self.times: npt.NDArray[np.float64] = times - times[0]

    def _frames(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        """The frames of these numbers, ascending."""
        if not self._seekable:
            decoder = enumerate(self._decode_from_start())
            for number in wanted:
                yield self._found(next((frame for index, frame in decoder if index == number), None), number)
            return
        self._decoder: Iterator[av.VideoFrame] = iter(())
        position: int | None = None
        for number in wanted:
            target = self._pts[number]
            key = self._keys[bisect_right(self._keys, target) - 1]
            frame = self._advance(target) if position is not None and key <= position else None
            # A container's own index may be wrong, and the jump land too late.
            for decode in (lambda stamp=key: self._decode_from(stamp), self._decode_from_start):
                if frame is None:
                    self._decoder = decode()
                    frame = self._advance(target)
            position = target
            yield self._found(frame, number)

    def _advance(self, target: int) -> av.VideoFrame | None:
        for frame in self._decoder:
            if frame.pts == target:
                return frame
            if frame.pts is not None and frame.pts > target:
                break
        return None

    def _found(self, frame: av.VideoFrame | None, number: int) -> av.VideoFrame:
        if frame is None:
            raise UnreadableVideo(f"{self.path} cannot be decoded (frame {number} of {len(self._pts)} does not come)")
        return frame

    def _decode_from(self, stamp: int) -> Iterator[av.VideoFrame]:
        try:
            self._container.seek(stamp, stream=self._stream, backward=True)
        except av.FFmpegError as error:
            raise _unreadable(self.path, error) from error
        return _guarded(self._container.decode(self._stream), self.path)

    def _decode_from_start(self) -> Iterator[av.VideoFrame]:
        """All frames; the file is opened anew, since not every container finds back to its very first packet."""
        try:
            self._container.close()
            self._container = _open(self.path)
        except (av.FFmpegError, OSError) as error:
            raise _unreadable(self.path, error) from error
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        return _guarded(self._container.decode(self._stream), self.path)


def _open(path: Path) -> av.container.InputContainer:
    # Titles in other encodings than UTF-8 say nothing about the pictures.
    return av.open(str(path), metadata_errors="replace")


def _guarded(items: Iterator, path: Path) -> Iterator:
    # No method: a file that waits for garbage collection would take its decoder into processes that are forked.
    try:
        yield from items
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UnreadableVideo:
    return UnreadableVideo(f"{path} cannot be decoded ({getattr(error, 'strerror', None) or error})")


def _picture(frame: av.VideoFrame) -> Frames:
    # One thread: FFmpeg would start as many as there are cores, and a forked process hangs when it frees theirs.
    picture = np.asarray(frame.to_ndarray(format="bgr24", threads=1), np.uint8)
    # The container's rotation is how far to turn the picture anticlockwise; a phone held upright writes one.
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


class FrameFolder:
    """A folder of extracted frames.

    Attributes:
        times: float64 (F,), seconds of each frame since the first; NaN where the frame rate is unknown.
    """

    def __init__(self, path: Path, template: str, *, frames: int | None, frame_rate: float | None) -> None:
        """Number the frames.

        Args:
            path: The folder.
            template: Name of frame n, such as ``img_{:05d}.jpg``. The first frame is n = 1, or 0 where there is one.
            frames: How many there are; None: as many as follow each other.
            frame_rate: Frames per second; None: unknown.

        Raises:
            UnreadableVideo: There is no frame.
        """
        self.path, self._template = path, template
        self._first = 0 if (path / template.format(0)).is_file() else 1
        if frames is None:
            try:
                names = {entry.name for entry in path.iterdir()}
            except OSError as error:
                raise UnreadableVideo(f"the folder of frames {path} cannot be read ({error.strerror})") from error
            frames = 0
            while template.format(self._first + frames) in names:
                frames += 1
        if frames < 1:
            raise UnreadableVideo(f"the folder {path} holds no frame named {template.format(self._first)}")
        self.times: npt.NDArray[np.float64] = np.arange(frames) / (np.nan if frame_rate is None else frame_rate)

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Frames:
        """Read frames.

        Args:
            indices: Frame numbers (n,) from 0, in any order, with repetitions.

        Returns:
            uint8 (n, H, W, 3), BGR.

        Raises:
            UnreadableVideo: One of them is missing or cannot be decoded.
        """
        wanted, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        pictures = [self._load(self.path / self._template.format(self._first + number)) for number in wanted.tolist()]
        if len({picture.shape for picture in pictures}) > 1:
            raise UnreadableVideo(f"the frames of {self.path} differ in size; extract them again")
        return np.stack(pictures)[place]

    @staticmethod
    def _load(path: Path) -> Frames:
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UnreadableVideo(f"the frame {path} cannot be read ({error.strerror})") from error
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if picture is None:
            raise UnreadableVideo(f"the frame {path} cannot be decoded")
        return np.asarray(picture, np.uint8)
