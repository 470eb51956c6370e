"""Lists of labelled videos, read from the annotations that a data set is published with, and found on the disk."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from stsm_rt.errors import UserError
from stsm_rt.train.annotation_formats import FORMATS, Listing

PARTS = ("train", "validation", "test")
_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


@dataclass(frozen=True)
class VideoRecord:
    """A labelled video.

    Attributes:
        path: The video file, or the folder of its extracted frames.
        label: Index into the list's classes.
        frames: Of a folder of extracted frames, how many there are where a list says so; None: count them.
        template: Of a folder of extracted frames, the name of frame n, such as ``img_{:05d}.jpg``; None: a video file.
        frame_rate: Frames per second of a folder of extracted frames, where it is known.
    """

    path: Path
    label: int
    frames: int | None = None
    template: str | None = None
    frame_rate: float | None = None


@dataclass(frozen=True)
class VideoList:
    """A part of a data set.

    Attributes:
        records: The videos that are there, in the order of the annotations.
        classes: Names.
        missing: Videos that the annotations list and the disk does not hold, by the names they should have.
    """

    records: tuple[VideoRecord, ...]
    classes: tuple[str, ...]
    missing: tuple[str, ...] = ()


def load_videos(
    dataset: str,
    folder: Path,
    part: str,
    *,
    split: int = 1,
    annotations: Path | None = None,
    image_template: str | None = None,
    frame_rate: float | None = None,
    missing: float = 0.01,
) -> VideoList:
    """Read a part of a data set.

    Args:
        dataset: A key of `annotation_formats.FORMATS`: "kinetics400", "something_something_v2", "jester", "ucf101",
            "hmdb51", or "list" for the list files of TSM and mmaction2.
        folder: Where the videos are, in any arrangement that the set is distributed or extracted in.
        part: "train", "validation" or "test".
        split: Of UCF101 and HMDB51: 1, 2 or 3.
        annotations: Folder with the annotation files, or for "list" the list file itself; None: they are in `folder`
            or in a folder in it.
        image_template: Name of frame n of a folder of extracted frames, such as ``img_{:05d}.jpg``; None: videos, or
            the template that the set is published with (Jester).
        frame_rate: Of extracted frames, where it is not that of the set.
        missing: Share of the listed videos that the disk may lack.

    Raises:
        UserError: No such set or part, annotations that are missing or malformed, a label without a class, or too many
            missing videos.
    """
    if dataset not in FORMATS:
        raise UserError(f"unknown dataset {dataset!r}; expected one of {', '.join(FORMATS)}")
    form = FORMATS[dataset]
    if part not in form.parts:
        raise UserError(f"{dataset} has the parts {', '.join(form.parts)}, not {part!r}")
    if not folder.is_dir():
        raise UserError(f"expected the videos of {dataset} in the folder {folder}, which does not exist")
    template = image_template or form.image_template
    if template is not None:
        _check_template(template)
    source = folder if annotations is None else annotations
    if not source.exists():
        raise UserError(f"expected the annotations of {dataset} in {source}, which does not exist")
    listing = form.read(source, part, split)
    if not listing.entries:
        raise UserError(f"{listing.source} lists no video; expected the {part} list of {dataset}")
    extracted = listing.entries[0].frames is not None if dataset == "list" else template is not None
    if extracted and template is None:
        raise UserError(
            f"{listing.source} lists folders of extracted frames; say how these are named, such as img_{{:05d}}.jpg"
        )
    found = _find(folder, listing, extracted)
    rate = (frame_rate or form.frame_rate) if extracted else None
    records = tuple(
        VideoRecord(path, entry.label, entry.frames, template if extracted else None, rate)
        for entry, path in zip(listing.entries, found, strict=True)
        if path is not None
    )
    lacking = tuple(entry.names[0] for entry, path in zip(listing.entries, found, strict=True) if path is None)
    if len(lacking) > missing * len(found):
        kind = "folders of frames" if extracted else "videos"
        raise UserError(
            f"{len(lacking)} of the {len(found)} {kind} in {listing.source} are not in {folder}, more than the limit "
            f"of {missing:.2%}, the first is {lacking[0]}; complete the data, or raise the limit with --missing"
        )
    return VideoList(records, listing.classes, lacking)


def _check_template(template: str) -> None:
    try:
        distinct = template.format(1) != template.format(2)
    except (IndexError, KeyError, ValueError):
        distinct = False
    if not distinct:
        raise UserError(f"expected a name with a number such as img_{{:05d}}.jpg, got {template!r}")


def _find(folder: Path, listing: Listing, extracted: bool) -> list[Path | None]:
    """Where each entry is; None: nowhere."""
    if listing.by_stem:
        places = _by_stem(folder, {name for entry in listing.entries for name in entry.names}, extracted)
        return [next((places[name] for name in entry.names if name in places), None) for entry in listing.entries]
    exists = Path.is_dir if extracted else Path.is_file
    some = {name.split("/")[0] for entry in listing.entries[:100] for name in entry.names}
    below = (Path(entry.path) for entry in _entries(folder) if entry.is_dir())
    roots = itertools.chain([folder], below)
    root = next((root for root in roots if any((root / name).exists() for name in some)), folder)
    return [next((root / name for name in entry.names if exists(root / name)), None) for entry in listing.entries]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror})") from error


def _by_stem(folder: Path, stems: set[str], extracted: bool) -> dict[str, Path]:
    """Videos (or folders of frames) with these names, wherever they are below a folder; the first of equals."""
    places: dict[str, Path] = {}
    folders = [folder]
    for here in folders:  # which grows while it is gone through
        for entry in _entries(here):
            stem, suffix = os.path.splitext(entry.name)
            if not entry.is_dir():
                if not extracted and stem in stems and suffix.lower() in _VIDEOS:
                    places.setdefault(stem, Path(entry.path))
            elif extracted and entry.name in stems:
                places.setdefault(entry.name, Path(entry.path))
            else:
                folders.append(Path(entry.path))
    return places
