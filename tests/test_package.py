"""The package itself: light to import, with its public names at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """Its telemetry leaves a file among the temporary ones once it is imported; a variable of CI would silence it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    code = "import sys; from stsm_rt.engine import Engine; Engine.open(sys.argv[1])"
    engine = Path(__file__).parents[1] / "engines" / "actions_lite0_fp32.onnx"
    subprocess.run(
        [sys.executable, "-c", code, str(engine)],
        check=True,
        cwd=tmp_path,
        env=environment | {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert not list(tmp_path.iterdir())
