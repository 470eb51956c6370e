"""The command ``python -m stsm_rt.download``: public checkpoints, verified and kept.

What is known of a file's SHA-256 has to be met (`stsm_rt.public_checkpoints`). Where nothing is known, the person says
what to expect or trusts the first download. The full SHA-256 is recorded beside the file and has to be met ever after.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stsm_rt.errors import UserError, report
from stsm_rt.fetch import discard, fetch
from stsm_rt.manifest import sha256_of
from stsm_rt.public_checkpoints import Checkpoint, checkpoints

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_DIGITS = 64  # of a SHA-256
_LARGEST = 1 << 32  # bytes, where the registry states no size
_LABELS = "labels.txt"


def cache_folder() -> Path:
    """This machine's folder for what can be downloaded again, with a folder of ours in it."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "")
        if not root.is_absolute():  # as the XDG base directory specification has it
            root = Path.home() / ".cache"
    return root / "stsm-rt" / "checkpoints"


def download(
    name: str,
    *,
    cache: Path | None = None,
    sha256: str | None = None,
    trust_first_use: bool = False,
    attempts: int = 5,
    timeout: float = 30.0,
    backoff: float = 1.0,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int | None], None] = lambda _, __: None,
) -> Path:
    """Get a checkpoint of the registry, from the cache or from its publisher.

    Several processes may ask for the same one: the first downloads it, the others wait.

    Args:
        name: Of the checkpoint.
        cache: Folder; None: `cache_folder`.
        sha256: What the file must have, 64 hexadecimal digits; None: what is published or recorded.
        trust_first_use: Take a file of which no SHA-256 is published, and record the one that it has.
        attempts: Failures in a row, none of which got further than those before, that end it.
        timeout: Seconds without a byte.
        backoff: Seconds before the second attempt; they double from one to the next.
        say: Told what is worth knowing on the way.
        progress: Told the bytes that are here and those of the whole file, where the server states them.

    Returns:
        The file. Its full SHA-256 is in ``<file>.sha256`` beside it, as ``sha256sum --check`` takes it.

    Raises:
        UserError: No such checkpoint, nothing to verify it by, a wrong hash (the file is removed), or it cannot be had
            or written.
    """
    known = checkpoints()
    if name not in known:
        raise UserError(f"there is no checkpoint {name!r}; python -m stsm_rt.download --list shows them")
    checkpoint = known[name]

    def transfer(partial: Path, expected: str | None) -> str:
        limit = checkpoint.size or _LARGEST
        return fetch(
            checkpoint.url,
            partial,
            expected=expected,
            limit=limit,
            attempts=attempts,
            timeout=timeout,
            backoff=backoff,
            say=say,
            progress=progress,
        )

    path = (cache or cache_folder()) / name / checkpoint.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_name(f"{path.name}.lock"), say):
            record = path.with_name(f"{path.name}.sha256")
            expected = _expected(checkpoint, record, sha256)
            if expected is None and not trust_first_use:
                raise UserError(
                    f"no SHA-256 of {name} is published, so it cannot be verified; give one with --sha256, or take "
                    "what the server sends and hold every later use to it with --trust-first-use"
                )
            if path.exists():
                digest = _verify_kept(path, expected or "")
            else:
                digest = _verify_new(path, expected or "", checkpoint, transfer)
            _write(record, f"{digest}  {path.name}\n")
            if checkpoint.labels:
                _write(path.with_name(_LABELS), "\n".join(checkpoint.labels) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {path.parent} ({error.strerror or error}); choose another folder with --cache"
        ) from error
    return path


def _verify_kept(path: Path, expected: str) -> str:
    digest = sha256_of(path)
    if not digest.startswith(expected):
        path.unlink()
        raise UserError(
            f"{path} has changed since it was downloaded: its SHA-256 is {digest}, expected {expected}; it was "
            "removed, so run the same command again"
        )
    return digest


def _verify_new(path: Path, expected: str, checkpoint: Checkpoint, transfer: Callable[[Path, str | None], str]) -> str:
    partial = path.with_name(f"{path.name}.part")
    digest = transfer(partial, expected or None)
    if not digest.startswith(expected):
        size = partial.stat().st_size
        discard(partial)
        stated = f" of {checkpoint.size}" if checkpoint.size else ""
        raise UserError(
            f"{checkpoint.url} is not what was published: its {size}{stated} bytes have the SHA-256 {digest}, expected "
            f"{expected}; they were removed, so try again later or see {checkpoint.page}"
        )
    os.replace(partial, path)
    discard(partial)
    return digest


def _expected(checkpoint: Checkpoint, record: Path, given: str | None) -> str | None:
    """All that is known of the file's SHA-256, which has to agree: the longest of it."""
    sources = {"the registry": checkpoint.sha256 or checkpoint.sha256_prefix}
    if record.exists():
        sources[f"the record {record}, to be deleted if it is out of date,"] = _recorded(record)
    if given is not None:
        sources["--sha256"] = given.lower()
        if len(given) != _DIGITS or not set(given.lower()) <= set("0123456789abcdef"):
            raise UserError(f"--sha256 takes {_DIGITS} hexadecimal digits, got {given!r}; copy them again")
    found = sorted(((digits, source) for source, digits in sources.items() if digits), key=lambda pair: len(pair[0]))
    for digits, source in found[:-1]:
        if not found[-1][0].startswith(digits):
            raise UserError(
                f"the SHA-256 of {checkpoint.name} is {digits} by {source} but {found[-1][0]} by {found[-1][1]}; "
                "find out which one is right"
            )
    return found[-1][0] if found else None


def _recorded(record: Path) -> str:
    return record.read_text(encoding="utf-8", errors="replace").partition(" ")[0]


@contextlib.contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a download; the system releases it when the process ends, however it ends."""
    with open(path, "ab") as file:
        waiting = False
        while not _lock(file.fileno()):
            if not waiting:
                say("another process is downloading this; waiting for it")
            waiting = True
            time.sleep(0.1)
        yield


def _lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _write(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def describe(checkpoint: Checkpoint, path: Path) -> str:
    """What was downloaded and how it becomes weights of ours, for people."""
    digest = _recorded(path.with_name(f"{path.name}.sha256"))
    if checkpoint.sha256 is not None:
        verified = "as is known"
    elif checkpoint.sha256_prefix is not None:
        verified = f"whose first {len(checkpoint.sha256_prefix)} digits are published; the rest is recorded"
    else:
        verified = "recorded; none is published"
    command = f"stsm-rt convert {shlex.quote(str(path))} -o {checkpoint.name}.safetensors"
    lines = [f"{path}", f"SHA-256 {digest} ({verified})", f"licence: {checkpoint.licence}"]
    if checkpoint.labels:
        command += f" --labels {shlex.quote(str(path.with_name(_LABELS)))}"
    elif checkpoint.labels_page is not None:
        lines.append(
            f"the names of its {checkpoint.classes} classes, for --labels FILE, are at {checkpoint.labels_page}"
        )
    return "\n".join([*lines, f"convert it with: {command}"])


class _Progress:
    """On a terminal, one line that is written over."""

    def __init__(self) -> None:
        self.next = 0.0
        self.shown = False

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and (now >= self.next or done == total):
            self.next, self.shown = now + 0.2, True
            share = f" of {total / 1e6:.1f} MB, {100 * done // total} %" if total else " MB"
            sys.stderr.write(f"\r{done / 1e6:.1f}{share}\x1b[K")
            sys.stderr.flush()

    def say(self, sentence: str) -> None:
        """Write a line of its own."""
        sys.stderr.write(f"{chr(10) if self.shown else ''}stsm-rt: {sentence}\n")
        self.shown = False


def _listing() -> str:
    lines = []
    for checkpoint in checkpoints().values():
        size = f"{checkpoint.size / 1e6:.1f} MB" if checkpoint.size else "size not stated"
        if checkpoint.sha256 is not None:
            verified = "SHA-256 known"
        elif checkpoint.sha256_prefix is not None:
            verified = f"first {len(checkpoint.sha256_prefix)} digits of its SHA-256 published"
        else:
            verified = "no SHA-256 published"
        lines += [
            checkpoint.name,
            f"  {checkpoint.what}; {size}; {verified}",
            f"  licence: {checkpoint.licence}",
            f"  {checkpoint.page}",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="stsm-rt download",
        description="Download a public checkpoint, verify it by its SHA-256 and keep it. A transfer that broke off is "
        "taken up where it ended.",
    )
    parser.add_argument("name", nargs="?", help="of the checkpoint, see --list")
    parser.add_argument("--list", action="store_true", help="show them all: what, size, hash, licence, source page")
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"where they are kept (default: {cache_folder()})")
    parser.add_argument("--sha256", metavar="HEX", help="what the file must have, 64 hexadecimal digits")
    parser.add_argument(
        "--trust-first-use",
        action="store_true",
        help="take a file of which no SHA-256 is published, and hold every later use to the one that it has",
    )
    options = parser.parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    progress = _Progress()
    try:
        if options.name is None:
            raise UserError("name a checkpoint, or see them with --list")
        path = download(
            options.name,
            cache=options.cache,
            sha256=options.sha256,
            trust_first_use=options.trust_first_use,
            say=progress.say,
            progress=progress,
        )
        if progress.shown:
            sys.stderr.write("\n")
        print(describe(checkpoints()[options.name], path))
    except UserError as error:
        if progress.shown:
            sys.stderr.write("\n")
        return report(error)
    except KeyboardInterrupt:
        progress.say("stopped; what has come is kept, the same command takes it up")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
