"""What a video file says of itself, and whether it is one that may be opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import av
from av.stream import Disposition

from stsm_rt.errors import UserError
from stsm_rt.video.captures import WHOLE_PICTURES

# FFmpeg opens these, and then the files and addresses that they name. A visitor must not read what others uploaded.
_NAMES_OTHERS = {
    "concat", "concatf", "dash", "ffmetadata", "hls", "image2", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest"
}  # fmt: skip
_MOST_PIXELS = 7680 * 4320
_FEW_FRAMES = 3
_HALF_SECOND = 0.5


@dataclass(frozen=True)
class Container:
    """What a video file declares, which need not be true.

    Attributes:
        format: FFmpeg's name of the container's format.
        frames: Number of frames, or None.
        duration: Seconds, or None.
    """

    format: str
    frames: int | None
    duration: float | None

    def is_complete(self, frames: int, duration: float) -> bool:
        """Whether what came is what was declared, give or take three frames or half a second.

        Either will do: some files declare frames that are not to be shown, others a last frame that stands for long.

        Args:
            frames: Frames that came.
            duration: Seconds that they lasted.
        """
        enough_frames = None if self.frames is None else frames >= self.frames - _FEW_FRAMES
        long_enough = None if self.duration is None else duration >= self.duration - _HALF_SECOND
        return bool(enough_frames or long_enough) or (enough_frames is None and long_enough is None)


def read_container(path: Path, name: str) -> Container:
    """Open a video file with FFmpeg as far as to know what it declares.

    Args:
        path: The file.
        name: What its owner calls it, for errors.

    Returns:
        What it declares.

    Raises:
        UserError: If it is no video, is a picture or a playlist that names other files, holds no moving picture, or
            pictures larger than 7680 x 4320.
    """
    try:
        with av.open(
            str(path.absolute()), "r", options={"protocol_whitelist": "file"}, metadata_errors="replace"
        ) as container:
            kind = container.format.name
            if _NAMES_OTHERS & set(kind.split(",")) or kind.endswith("_pipe"):
                raise UserError(f"{name} is a picture or a list of files; give a video")
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise UserError(f"{name} holds no moving picture; give a video")
            stream = streams[0]
            if stream.width * stream.height > _MOST_PIXELS:
                raise UserError(
                    f"{name} has pictures of {stream.width}x{stream.height} pixels, at most 7680x4320 are taken; "
                    "make them smaller"
                )
            duration = None
            if kind == "avi" and stream.frames and stream.average_rate:
                # FFmpeg shortens the duration of an AVI to what the file's size allows.
                duration = float(stream.frames / stream.average_rate)
            elif stream.duration is not None and stream.time_base is not None:
                duration = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                duration = container.duration / av.time_base
            return Container(kind, stream.frames or None, duration)
    except (av.FFmpegError, ValueError) as error:
        raise UserError(f"{name} is not a video that can be decoded; give a file that a video player plays") from error


def hold_opencv_to(container: Container) -> None:
    """Let this process's OpenCV open nothing but local files of a container's format.

    It has an FFmpeg of its own, which could take the same bytes for something else.
    """
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = (
        f"protocol_whitelist;file|format_whitelist;{container.format}|{WHOLE_PICTURES}"
    )
