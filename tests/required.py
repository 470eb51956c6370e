"""What a test needs beyond the installed package: skipped where it is missing, but not in CI, where nothing may be."""

from __future__ import annotations

import importlib
import os
import shutil
from typing import NoReturn

import pytest


def required_module(name: str, install: str) -> None:
    """Skip the test, or fail it in CI, where a module cannot be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        _missing(f"{name} is not installed: {install}")


def required_program(name: str, install: str) -> str:
    """The path of a program; without it the test is skipped, or fails in CI."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    return found or _missing(f"{name} is not installed: {install}")


def _missing(message: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
