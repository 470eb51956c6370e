"""Watch a camera or a video and see what people do; the same as the command `stsm-rt webcam`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stsm_rt.webcam import main

if __name__ == "__main__":
    sys.exit(main())
