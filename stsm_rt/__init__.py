"""Real-time action recognition, frame by frame, with shifted 2D networks."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stsm_rt.decision import Event
    from stsm_rt.engine import Engine
    from stsm_rt.errors import UserError
    from stsm_rt.insertion import insert_shift as insert_shift
    from stsm_rt.recognizer import Recognizer
    from stsm_rt.result import Result
    from stsm_rt.video.sources import open_source

__version__ = "0.1.0"

# Since 1.29 ONNX Runtime reports to its maker, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Engine", "Event", "Recognizer", "Result", "UserError", "open_source"]

_HOMES = {
    "Engine": "stsm_rt.engine",
    "Event": "stsm_rt.decision",
    "Recognizer": "stsm_rt.recognizer",
    "Result": "stsm_rt.result",
    "UserError": "stsm_rt.errors",
    "insert_shift": "stsm_rt.insertion",
    "open_source": "stsm_rt.video.sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
