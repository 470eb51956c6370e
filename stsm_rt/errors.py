"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import re
import sys

# The authority of a URL up to its last "@"; then "user:password@" whose password holds a "/", "?" or "#" that
# should have been percent-encoded, told from "host:port/...@..." by the port being all digits.
_URL_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/:@]+:(?!\d+[/?#])\S*@)")
# What elements of GStreamer pipelines call them; a value in quotes may hold blanks.
_PROPERTIES = re.compile(
    r"""\b((?:user|proxy)-(?:id|pw)\s*=\s*)(?:"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?|(?:\\.|\S)+)"""
)
# What cameras call them in the path or the query of a URL. A value goes on up to the next "&", whatever it holds.
_URL = re.compile(r"(?<=://)\S+")
_KEYS = re.compile(
    r"([?&/;,](?:[\w.-]*(?:user|usr|login|pass|pwd|psw|auth|token|secret|signature|credential)[\w.-]*|"
    r"(?:[\w.-]*[_-])?(?:key|apikey|pw|sig|account))=)[^\s&]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replace the credentials of every URL and of every GStreamer element in a text by ``***``.

    Args:
        text: Any text, with or without URLs.

    Returns:
        The text with ``scheme://user:password@host`` turned into ``scheme://***@host``, ``?pwd=password`` in a URL into
        ``?pwd=***``, and ``user-pw=password`` into ``user-pw=***``.
    """
    text = _URL_CREDENTIALS.sub("***@", _PROPERTIES.sub(r"\1***", text))
    return _URL.sub(lambda url: _KEYS.sub(r"\1***", url[0]), text)


class UserError(Exception):
    """One sentence for a person: what was expected, what came, what to do.

    Credentials in URLs are redacted, so a message may quote what the person typed.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(redact(sentence))


def report(error: UserError) -> int:
    """Write an error as every command of stsm-rt does, and give the exit code.

    Args:
        error: The error that ended the command.

    Returns:
        The exit code, 2.
    """
    sys.stderr.write(f"stsm-rt: error: {error}\n")
    return 2
