"""The package itself: light to import, with its public names at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stsm_rt


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, stsm_rt; assert stsm_rt.__version__; "
        "assert not {'numpy', 'cv2', 'onnxruntime', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", stsm_rt.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(stsm_rt, name).__name__ == name
    assert name in dir(stsm_rt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = stsm_rt.Motor
