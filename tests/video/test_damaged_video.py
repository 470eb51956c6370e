"""Damaged video: nothing crashes, nothing hangs, and what was not decoded is not recognized."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("av")
SEEDS, WORKERS = 200, 2
LONGEST = 10.0  # seconds without a word of a worker


def trusted(said: list[tuple[float, str]]) -> int:
    """How many frames were decoded and build on none that was not; failures at the end are the end."""
    count, broken = 0, False
    while said and said[-1][1] == "x":
        said = said[:-1]
    for _, kind in said:
        broken = kind == "x" or (broken and kind in "PB")
        count += not broken
    return count


def play(engine: Path, folder: Path, first: int, end: int) -> list[dict[str, Any]]:
    """Let a process play damaged videos, and see that it neither crashes nor hangs."""
    command = [sys.executable, str(Path(__file__).with_name("damaged_worker.py")), str(engine), str(folder)]
    process = subprocess.Popen(
        [*command, str(first), str(end)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None

    def listen(lines: Any = process.stdout) -> None:
        for line in lines:
            said.put(line)
        said.put(None)

    threading.Thread(target=listen, daemon=True).start()
    records: list[dict[str, Any]] = []
    try:
        # The first word comes after the imports.
        line = said.get(timeout=60)
        while line is not None:
            records.append(json.loads(line))
            line = said.get(timeout=LONGEST)
        assert process.wait(LONGEST) == 0, (records[-1:], process.stderr.read() if process.stderr else "")
    except queue.Empty:
        pytest.fail(f"no word for {LONGEST:g} s after {records[-1:]}")
    finally:
        process.kill()
        process.communicate()
    return [record for record in records if "seed" in record]


@pytest.mark.slow
def test_damaged_h264_neither_crashes_nor_hangs_nor_is_made_up(tiny_engine: Any, tmp_path: Path) -> None:
    share = SEEDS // WORKERS
    outcomes: list[list[dict[str, Any]]] = [[] for _ in range(WORKERS)]

    def work(which: int) -> None:
        outcomes[which] = play(tiny_engine.path, tmp_path, which * share, (which + 1) * share)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [record for outcome in outcomes for record in outcome]
    assert sorted(record["seed"] for record in records) == list(range(SEEDS))
    played = [record for record in records if record["error"] is None]
    assert len(played) > SEEDS / 2
    for record in played:
        results, said = record["results"], [tuple(pair) for pair in record["said"]]
        times = [time for time, _, _ in results]
        assert times == sorted(times) and all(later > earlier for earlier, later in pairwise(times))
        # No frame was numbered that was not decoded, and none of those that build on one.
        frames = 1 + max((frame for _, frame, _ in results), default=-1)
        assert frames <= trusted(said)
        assert not results or results[0][2]
    # It is a test of something: frames were left out, and streams were refused.
    assert sum(record["dropped"] for record in played) > 20
    for record in records:
        if record["error"] is not None:
            assert "is not a video that can be decoded" in record["error"] or "holds no frame" in record["error"]
