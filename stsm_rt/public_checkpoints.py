"""The public checkpoints that `stsm_rt.convert` reads: ``downloads.json`` beside this file.

Addresses and accuracies are those of the projects' own pages: torchvision's ``models``, the README and the online demo
of mit-han-lab/temporal-shift-module (commit 2854869), the model zoo of open-mmlab/mmaction2. torchvision and mmaction2
put the first eight digits of a file's SHA-256 into its name (``check_hash`` of `torch.hub.load_state_dict_from_url`,
mmaction2's ``tools/deployment/publish_model.py``); torchvision's full ones are those that independent public projects
pinned. mit-han-lab publishes none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

REGISTRY = Path(__file__).with_name("downloads.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A public file of weights that `stsm_rt.convert` reads.

    Attributes:
        name: On the command line.
        what: Network, data set and published accuracy, for people.
        url: Of the file.
        classes: Of its classifier.
        licence: Of the weights, or that none is stated.
        page: Where its publisher describes it.
        sha256: Of the file, 64 hexadecimal digits, or None: not known.
        sha256_prefix: The digits that its publisher put into the file's name, or None.
        size: Bytes, or None: not stated.
        labels: In the order of the classes, or () where the publisher gives them elsewhere.
        labels_page: Where the publisher gives the order of the classes, or None.
    """

    name: str
    what: str
    url: str
    classes: int
    licence: str
    page: str
    sha256: str | None = None
    sha256_prefix: str | None = None
    size: int | None = None
    labels: tuple[str, ...] = ()
    labels_page: str | None = None

    @property
    def file(self) -> str:
        """The file's name."""
        return urlsplit(self.url).path.rpartition("/")[2]


def checkpoints() -> dict[str, Checkpoint]:
    """The checkpoints of the registry, by name."""
    entries: list[dict[str, Any]] = json.loads(REGISTRY.read_text(encoding="utf-8"))
    found = [Checkpoint(**{**entry, "labels": tuple(entry.get("labels", ()))}) for entry in entries]
    return {checkpoint.name: checkpoint for checkpoint in found}
