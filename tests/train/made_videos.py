"""Small videos whose every frame tells its own number."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

BITS = 8
SIZE = (48, 64)  # height, width


def numbered_frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture, uint8 (H, W, 3) BGR: the number in binary, as bright columns above, dark ones below, on colour."""
    height, width = size
    picture = np.full((height, width, 3), (60, 110, 160), np.uint8)
    picture[:, :, 0] += np.uint8(number * 7 % 60)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        picture[height // 4 : height * 3 // 4, left:right] = 235 if number >> bit & 1 else 16
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a decoded picture (H, W, 3) tells."""
    height, width = picture.shape[:2]
    row = picture[height // 2].mean(-1)
    return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * width / BITS)] > 125)


def write_video(
    path: Path,
    frames: int,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    rate: int = 30,
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    rotation: int = 0,
) -> Path:
    """Write numbered frames.

    Args:
        path: Its suffix chooses the container.
        frames: How many.
        codec: FFmpeg's name of the encoder.
        size: Height and width.
        rate: Frames per second.
        options: Of the encoder.
        times: Presentation times in units of 1 / rate; None: 0, 1, 2, ...
        rotation: Degrees that the container asks the player to turn the picture by.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(numbered_frame(number, size), format="bgr24")
            frame = picture.reformat(format="yuv420p", threads=1)
            frame.pts = times[number] if times else number
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, frames: int, template: str, *, first: int = 1) -> Path:
    """Write numbered frames as pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(frames):
        assert cv2.imwrite(str(folder / template.format(first + number)), numbered_frame(number))
    return folder


CLASSES = {
    "kinetics400": ("air drumming", "shaking hands", "zumba"),
    "something_something_v2": ("Turning something", "Holding something", "Pushing something from left to right"),
    "jester": ("Swiping Left", "Swiping Right", "No gesture"),
    "ucf101": ("ApplyEyeMakeup", "HandstandPushups", "YoYo"),
    "hmdb51": ("brush_hair", "ride_bike", "wave"),
    "list": ("archery", "bowling", "yoga"),
}


def write_dataset(dataset: str, folder: Path, *, frames: int = 12, per_class: int = 2, extracted: bool = False) -> Path:
    """Write a small data set of three classes as it is published: annotations, and videos of numbered frames.

    Args:
        dataset: A key of `CLASSES`.
        folder: Where.
        frames: Of each video.
        per_class: Videos of each class in each part.
        extracted: For "list": folders of frames ``img_00001.jpg`` (TSM's and mmaction2's rawframes), not videos.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    videos = [
        (part, label, number)
        for part in ("train", "validation")
        for label in range(len(CLASSES[dataset]))
        for number in range(per_class)
    ]
    _WRITERS[dataset](folder, videos, frames, extracted)
    return folder


def _write_kinetics400(folder: Path, videos: list, frames: int, _: bool) -> None:
    header, names = "label,youtube_id,time_start,time_end,split", CLASSES["kinetics400"]
    for part, file in (("train", "train.csv"), ("validation", "validate.csv")):
        rows = [(names[label], f"-{part[:1]}{label}_abc{n:03d}") for p, label, n in videos if p == part]
        lines = [f"{name},{identity},{7},{17},{part}" for name, identity in rows]
        (folder / file).write_text("\n".join([header, *lines]) + "\n")
        for name, identity in rows:
            write_video(folder / part / name.replace(" ", "_") / f"{identity}_000007_000017.mp4", frames)


def _write_something_something_v2(folder: Path, videos: list, frames: int, _: bool) -> None:
    names = CLASSES["something_something_v2"]
    labels, clips = folder / "labels", folder / "20bn-something-something-v2"
    labels.mkdir()
    (labels / "labels.json").write_text(json.dumps({name: str(place) for place, name in enumerate(names)}))
    for part in ("train", "validation"):
        items = []
        for identity, (p, label, _n) in enumerate(videos, 100):
            if p == part:
                template = names[label].replace("something", "[something]")
                items.append({"id": str(identity), "label": names[label].lower(), "template": template})
                write_video(clips / f"{identity}.webm", frames, codec="libvpx-vp9", rate=12, options=FAST_VP9)
        (labels / f"{part}.json").write_text(json.dumps(items))
    (labels / "test.json").write_text(json.dumps([{"id": "1"}]))


def _write_jester(folder: Path, videos: list, frames: int, _: bool) -> None:
    names = CLASSES["jester"]
    (folder / "jester-v1-labels.csv").write_text("\n".join(names) + "\n")
    for part in ("train", "validation"):
        rows = [(identity, label) for identity, (p, label, _n) in enumerate(videos, 1) if p == part]
        (folder / f"jester-v1-{part}.csv").write_text("".join(f"{i};{names[label]}\n" for i, label in rows))
        for identity, _label in rows:
            write_frames(folder / "20bn-jester-v1" / str(identity), frames, "{:05d}.jpg")


def _write_ucf101(folder: Path, videos: list, frames: int, _: bool) -> None:
    names, lists = CLASSES["ucf101"], folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes("".join(f"{i} {name}\r\n" for i, name in enumerate(names, 1)).encode())
    for part, side in (("train", "train"), ("validation", "test")):
        lines = []
        for p, label, n in videos:
            if p == part:
                path = f"{names[label]}/v_{names[label]}_g{n + 1 + 20 * (side == 'test'):02d}_c01.avi"
                write_video(folder / "UCF-101" / path, frames, codec="mpeg4", rate=25, options={"bf": "2"})
                lines.append(f"{path} {label + 1}" if side == "train" else path)
        (lists / f"{side}list01.txt").write_text("\n".join(lines) + "\n")


def _write_hmdb51(folder: Path, videos: list, frames: int, _: bool) -> None:
    names, lists = CLASSES["hmdb51"], folder / "testTrainMulti_7030_splits"
    lists.mkdir()
    for label, name in enumerate(names):
        lines = [f"unused_{name}.avi 0 "]
        for p, other, n in videos:
            if other == label:
                file = f"{p}_{name}_u_nm_np1_ba_goo_{n}.avi"
                write_video(folder / "hmdb51_org" / name / file, frames, codec="mpeg4", options={"bf": "2"})
                lines.append(f"{file} {1 if p == 'train' else 2} ")
        (lists / f"{name}_test_split1.txt").write_text("\n".join(lines) + "\n")


def _write_list(folder: Path, videos: list, frames: int, extracted: bool) -> None:
    names = CLASSES["list"]
    (folder / "category.txt").write_text("\n".join(names) + "\n")
    for part, file in (("train", "train_videofolder.txt"), ("validation", "val_videofolder.txt")):
        lines = []
        for p, label, n in videos:
            if p == part and extracted:
                path = write_frames(folder / names[label] / f"{part}_{n}", frames, "img_{:05d}.jpg")
                lines.append(f"{path.relative_to(folder)} {frames} {label}")
            elif p == part:
                path = write_video(folder / names[label] / f"{part}_{n}.mp4", frames)
                lines.append(f"{path.relative_to(folder)} {label}")
        (folder / file).write_text("\n".join(lines) + "\n")


FAST_VP9 = {"deadline": "realtime", "cpu-used": "8"}
_WRITERS = {
    "kinetics400": _write_kinetics400,
    "something_something_v2": _write_something_something_v2,
    "jester": _write_jester,
    "ucf101": _write_ucf101,
    "hmdb51": _write_hmdb51,
    "list": _write_list,
}
