"""Plays damaged videos through the recognizer: ``damaged_worker.py ENGINE FOLDER FIRST END``, a JSON line for each."""

import json
import sys
import warnings
from pathlib import Path

import cv2
from damaged import damaged

from stsm_rt.errors import UserError
from stsm_rt.recognizer import Recognizer
from stsm_rt.video.sources import open_source


def decoded(path: Path) -> list[tuple[float, str]]:
    """What OpenCV says of each frame: its time, and the kind of its picture or "x" where it could not be decoded."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    said, failures = [], 0
    while capture.isOpened() and failures < 100:
        ok = capture.grab()
        failures = 0 if ok else failures + 1
        time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        said.append((time, chr(int(capture.get(cv2.CAP_PROP_FRAME_TYPE))) if ok else "x"))
    return said


def main() -> None:
    warnings.simplefilter("error")
    recognizer = Recognizer(sys.argv[1])
    for seed in range(int(sys.argv[3]), int(sys.argv[4])):
        suffix, data = damaged(seed)
        path = Path(sys.argv[2]) / f"{seed}.{suffix}"
        path.write_bytes(data)
        print(json.dumps({"begins": seed}), flush=True)
        error, results, size, dropped = None, [], None, 0
        try:
            with open_source(path) as source:
                size = source.size
                results = [(result.time, result.frame, result.warming_up) for result in recognizer.run(source)]
                dropped = source.dropped
        except UserError as refused:
            error = str(refused)
        said = decoded(path)
        line = {"seed": seed, "error": error, "results": results, "said": said, "dropped": dropped, "size": size}
        print(json.dumps(line), flush=True)
        path.unlink()


if __name__ == "__main__":
    main()
