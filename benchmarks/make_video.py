"""Write the video on which the loop is measured: the demo's clip as 640x480 H.264 at 30 frames per second.

Needs PyAV: ``pip install av``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np

from stsm_rt.video.fit import fit
from stsm_rt.video.sample import sample_clip
from stsm_rt.video.sources import open_source

WIDTH, HEIGHT, RATE = 640, 480, 30


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="another video (default: the sample clip)")
    parser.add_argument("out", type=Path, help="file to write (.mp4)")
    options = parser.parse_args()
    frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(options.out), "w") as container, open_source(options.source or sample_clip().path) as source:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture, _ in source:
            fit(picture, None, frame)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
