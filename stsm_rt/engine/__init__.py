"""Engines: one file per runtime behind one protocol."""

from stsm_rt.engine.base import Engine, embedded_engine

__all__ = ["Engine", "embedded_engine"]
