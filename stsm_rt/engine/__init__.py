"""Engines: one file per runtime behind one protocol."""

from stsm_rt.engine.base import Engine, embedded_engine, frame_rate_of

__all__ = ["Engine", "embedded_engine", "frame_rate_of"]
