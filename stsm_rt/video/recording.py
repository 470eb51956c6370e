"""The annotated video as a file that plays whatever ends the run."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from stsm_rt.errors import UserError
from stsm_rt.video.captures import check_name
from stsm_rt.video.mp4 import DamagedPieceError, GrowingMp4
from stsm_rt.video.result_files import FileSink
from stsm_rt.video.source import Frame

_GROUP = 12  # frames from one key frame to the next, as OpenCV has them encoded
_LONGEST_PIECE = 0.9  # seconds of video, of which the one that is being made is lost when the process is killed


class VideoSink(FileSink):
    """An MP4 file (MPEG-4 Part 2) that plays while it grows, up to its last second.

    OpenCV can neither write an MP4 that plays before it is complete nor say that a disk is full. So it encodes pieces
    of less than a second, each of which is checked and appended to the file; see `stsm_rt.video.mp4`.

    Attributes:
        path: The target as it was given.
        frame_count: Frames written so far, in all files of a rotation.
        fps: Frames per second at which the video plays.
        size: Width and height in pixels.
    """

    def __init__(self, path: str | os.PathLike[str], size: tuple[int, int], fps: float, **options: Any) -> None:
        """Start the file.

        Args:
            path: Target, ending in ``.mp4``.
            size: Width and height in pixels; an odd one loses its last column or row.
            fps: Frames per second at which the video plays.
            options: ``live``, ``rotate`` and ``say`` of ``FileSink``.

        Raises:
            UserError: If the target cannot be written or is no MP4.
        """
        super().__init__(path, **options)
        if self._direct or self._target.suffix.lower() != ".mp4":
            raise UserError(f"the annotated video is an MP4 file, so {self.path} must end in .mp4")
        check_name(str(self._target))
        # The codec's clock ticks at most 65,535 times a second, and OpenCV looks for three decimals.
        self.fps = round(fps, 3 if fps < 60 else 2 if fps < 600 else 1)
        self.size = size
        self.frame_count = 0
        self._first_time: float | None = None
        longest = max(1, int(self.fps * _LONGEST_PIECE))
        self._piece_frames = longest // _GROUP * _GROUP or longest
        self._finished = False
        try:
            self._piece = _Piece(self._target.parent, size, self.fps)
        except OSError as error:
            raise self._failure(error) from error
        if not self._piece.opened:
            self._piece.close()
            raise UserError(
                f"OpenCV cannot write {self.path} as MP4 with {size[0]}x{size[1]} pixels at {self.fps} "
                "frames/s; give another file or another source"
            )
        try:
            self._file = self._begin()
            self._movie = GrowingMp4(self._file)
        except (UserError, OSError) as error:
            self._piece.close()
            raise error if isinstance(error, UserError) else self._failure(error) from error

    def __enter__(self) -> VideoSink:
        return self

    def write(self, image: Frame, time: float | None = None) -> None:
        """Write one frame.

        Args:
            image: uint8 (H, W, 3), BGR; one of another size is fitted in, with black borders.
            time: Source time in seconds. If given, the frame is repeated or left out so that the video plays
                at the source's speed although its frames came irregularly; at most one second is filled.

        Raises:
            UserError: If the file cannot be written; it plays up to the second before.
        """
        count = 1
        if time is not None:
            if self._first_time is None:
                self._first_time = time
            due = round((time - self._first_time) * self.fps) + 1
            count = due - self.frame_count
            if not 0 <= count <= self.fps:
                self._first_time = time - self.frame_count / self.fps
                count = 1
        if count > 0 and (image.shape[1], image.shape[0]) != self.size:
            image = letterbox(image, self.size)
        for _ in range(count):
            self._piece.write(image)
            self.frame_count += 1
            if self._piece.frame_count == self._piece_frames:
                self._append()

    def _append(self) -> None:
        """Put the piece that was being made into the file, or into the next one."""
        count = self._piece.frame_count
        try:
            data = self._piece.finish()
            if self._movie.frame_count and self._is_full(self._movie.complete_length + len(data)):
                self._movie.complete()
                self._file.close()
                self._file = self._begin()
                self._movie = GrowingMp4(self._file)
            self._movie.append(data, count)
            if not self._finished:
                self._piece = _Piece(self._target.parent, self.size, self.fps)
        except DamagedPieceError as error:
            raise UserError(
                f"{self.path} cannot be written, for OpenCV left a piece of video that is incomplete ({error}); "
                "look whether the disk is full"
            ) from error
        except OSError as error:
            raise self._failure(error) from error

    def _finish(self) -> None:
        if self._finished:
            return
        self._finished = True
        try:
            if self._piece.frame_count:
                self._append()
        finally:
            self._piece.close()
            try:
                self._movie.complete()
            finally:
                self._file.close()
                if not self._movie.frame_count:
                    self._file.path.unlink(missing_ok=True)


class _Piece:
    """Less than a second of video, as a complete MP4 file of its own, which has no name wherever that is possible."""

    def __init__(self, folder: Path, size: tuple[int, int], fps: float) -> None:
        self.frame_count = 0
        descriptor, name = tempfile.mkstemp(".mp4", ".stsm-rt-", folder)
        os.close(descriptor)
        self._name: str | None = name
        self._writer = cv2.VideoWriter(name, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
        self._file = open(name, "rb")  # noqa: SIM115 - closed by close
        with suppress(PermissionError):  # Windows keeps the name of an open file
            os.unlink(name)
            self._name = None
        self.opened = self._writer.isOpened()

    def write(self, image: Frame) -> None:
        self._writer.write(image)
        self.frame_count += 1

    def finish(self) -> bytes:
        self._writer.release()
        data = self._file.read()
        self.close()
        return data

    def close(self) -> None:
        self.frame_count = 0
        self._writer.release()
        self._file.close()
        if self._name is not None:
            os.unlink(self._name)
            self._name = None


def letterbox(image: Frame, size: tuple[int, int]) -> Frame:
    """Fit a picture into another size with black borders.

    Args:
        image: uint8 (H, W, 3), BGR.
        size: Width and height in pixels.

    Returns:
        A new picture, uint8 (height, width, 3).
    """
    scale = min(size[0] / image.shape[1], size[1] / image.shape[0])
    width, height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = (size[0] - width) // 2, (size[1] - height) // 2
    canvas[y : y + height, x : x + width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return canvas
