"""Keys and passwords stay where they are: URIs that hold one are refused, and all output is redacted.

A secret is recognised by what the environment calls it (``*_TOKEN``, ``*_PASSWORD``, ``AWS_SECRET_ACCESS_KEY`` ...) and
by its shape: the user and password of a URI, a signed query, a header, the tokens of known services.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
import urllib.parse
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

MIN_CHARACTERS = 6
"""Shorter values of the environment are left alone: they would be found in ordinary words."""

NO_CHANCE_CHARACTERS = 12
"""Settings that hold a secret of so many characters are refused: they are kept in files, where nothing is redacted."""

_WORDS = r"secret|password|passwd|passphrase|token|access_?key|api_?key|private_?key|credential|signature"
_SECRET_NAME = re.compile(rf"(?i){_WORDS}|(?:^|_)(?:key|pass|pwd|sas)(?:_|$)")
_HARMLESS_NAME = re.compile(r"(?i)^(?:old)?pwd$|_(?:file|path|dir|folder|home|mode|url|name)s?$")

# A user and password end before the path; a key with a slash in it is told from a path by the colon before it.
_USER = r"(?P<scheme>\b[A-Za-z][\w+.-]*://)(?:[^\s/@'\"<>]*|[^\s/@:'\"<>]*:(?!\d+/)[^\s'\"<>]*)@"
_URI_WITH_USER = re.compile(r"[A-Za-z][\w+.-]*://(?P<user>[^/@]*|[^/@:]*:(?!\d+/).*)@", re.DOTALL)
_IN_URIS = (
    (re.compile(_USER), r"\g<scheme>***@"),
    (re.compile(rf"(?i)([?&][^=&\s'\"]*(?:{_WORDS}|pwd|key|sig|auth)[^=&\s'\"]*=)[^&\s'\"<>]+"), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "***"),
    (re.compile(r"\b(?:hf_|gh[oprsu]_|github_pat_|glpat-|sk-)[\w-]{16,}"), "***"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), "***"),  # a JSON web token, as the GDC's
)
_IN_TEXTS = (
    (re.compile(rf"(?i)(\b[\w.-]*(?:{_WORDS})[\w.-]*=['\"]?)[^&\s'\",;<>]+"), r"\1***"),
    (re.compile(rf"(?i)(['\"][\w.-]*(?:{_WORDS})[\w.-]*['\"]\s*:\s*['\"])[^'\"]+"), r"\1***"),
    (re.compile(r"(?i)((?:authorization|x-auth-token|cookie)['\"]?\s*[:=]\s*['\"]?)[^'\"\r\n]+"), r"\1***"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), "***"),
)


def redacted(text: str) -> str:
    """The text with ``***`` in the place of whatever is, or looks like, a secret."""
    if known := _known():
        text = re.sub("|".join(map(re.escape, known)), lambda match: f"***{'@' * match[0].endswith('@')}", text)
    for shape, instead in (*_IN_URIS, *_IN_TEXTS):
        text = shape.sub(instead, text)
    return text


def holds_secret(uri: str) -> bool:
    """Whether a URI has a user, a password, a query of options or a port that is none; no part of it may be shown."""
    _, separator, rest = uri.partition("://")
    if not separator:
        return False
    place, _, path = rest.partition("/")
    port = place.partition(":")[2]
    query = bool(re.search(r"\?[^/]*=", f"{place}/{path}"))  # a question mark alone may be of a glob
    return query or "@" in place or bool(port and not port.isdigit()) or any(each.search(uri) for each, _ in _IN_URIS)


def names_secret(text: str) -> bool:
    """Whether a text holds a secret of the environment, one that is too long to be there by chance."""
    return any(len(each) >= NO_CHANCE_CHARACTERS and each in text for each in _known())


def is_secret_name(name: str) -> bool:
    """Whether a variable of the environment is named like a secret."""
    return bool(_SECRET_NAME.search(name)) and not _HARMLESS_NAME.search(name)


def _known() -> list[str]:
    """The secrets that the environment holds, in all their spellings, the longest first."""
    values, users = set(), set()
    for name, value in os.environ.items():
        if is_secret_name(name):
            values.add(value)
        if match := _URI_WITH_USER.match(value):  # as MLFLOW_TRACKING_URI; libraries show the password by itself
            values.add(match["user"].partition(":")[2])
            users.add(f"{match['user']}@")
    spellings = {each for value in values for each in _spellings(value) if len(each) >= MIN_CHARACTERS}
    return sorted(users | spellings, key=len, reverse=True)


def _spellings(value: str) -> set[str]:
    quoted = {urllib.parse.quote(value), urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value)}
    escaped = {repr(value)[1:-1], json.dumps(value)[1:-1], " ".join(value.split())}
    return {value.strip(), urllib.parse.unquote(value), *quoted, *escaped}


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """While the block runs, what is printed, logged or warned of is redacted; so is the traceback that ends it."""
    with contextlib.redirect_stdout(_Redacting(sys.stdout)), contextlib.redirect_stderr(_Redacting(sys.stderr)):
        try:
            yield
        except Exception:
            sys.excepthook = _print_redacted_traceback  # Python's own would print the traceback after this block
            raise


def _print_redacted_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


class _Redacting:
    """A text stream whose writer sees the stream, and whose reader sees no secret."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
