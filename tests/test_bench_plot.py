from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import pytest

pytest.importorskip("matplotlib")

from stsm_rt.bench_plot import plot
from stsm_rt.errors import UserError


def comparison(b: str, ratio: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"a": "r50 plain", "b": b, "ratio_median": ratio, "interval": interval, "pairs": 30}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_comparisons_are_drawn(suffix: str, tmp_path: Path):
    out = tmp_path / f"ratios{suffix}"

    plot([comparison("r50 tsm", 1.02, (1.01, 1.03)), comparison("r50 tsm naive", 1.1, None)], "steps", out)

    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if suffix == ".png":
        image = cv2.imread(str(out))
        assert image is not None and image.shape[1] > 1000 and (image < 128).any()
    else:
        assert "<svg" in out.read_text()


def test_more_comparisons_make_a_higher_picture(tmp_path: Path):
    for count in (1, 6):
        plot([comparison("r50 tsm", 1.02, (1.01, 1.03))] * count, "steps", tmp_path / f"{count}.png")

    low, high = (cv2.imread(str(tmp_path / f"{count}.png")) for count in (1, 6))
    assert low is not None and high is not None and high.shape[0] > 2 * low.shape[0] - 50


def test_nothing_to_draw_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to draw"):
        plot([], "steps", tmp_path / "ratios.png")


def test_a_folder_that_is_absent_is_said_and_nothing_is_left(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be written"):
        plot([comparison("r50 tsm", 1.02, None)], "steps", tmp_path / "absent" / "ratios.png")
    assert list(tmp_path.iterdir()) == []
