"""S3 through pyarrow: one client a bucket, endpoints and keys from where AWS's tools have them, errors as one line."""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse
from functools import cache

import pyarrow.fs as pafs

from lemon.runtime.secrets import holds_secret

MAX_ATTEMPTS = 8
"""Tries of a request that S3 answers with 500, 503 or not at all; they wait for longer each time, a minute in all."""

TIMEOUT_S = 20.0
"""Seconds until a connection, or an answer's next bytes, are given up."""

# As pyarrow words it: AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.
_AWS_ERROR = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during (\w+) operation:(.*)")
# The SDK writes what S3 answers into the buffer for the bytes that were asked for. Where that is smaller than the text
# of a 503, it fails in this way and does not ask again (pyarrow 25).
NO_ROOM = "Failed to flush response stream"

# Of a file that was removed after its size was asked for.
GONE = re.compile(r"AWS Error (NO_SUCH_KEY|RESOURCE_NOT_FOUND) during GetObject")

# pyarrow tells a status only where the SDK has no name for the error.
_STATUSES = {
    "SLOW_DOWN": "503",
    "SERVICE_UNAVAILABLE": "503",
    "INTERNAL_FAILURE": "500",
    "ACCESS_DENIED": "403",
    "SIGNATURE_DOES_NOT_MATCH": "403",
    "INVALID_ACCESS_KEY_ID": "403",
    "NO_SUCH_BUCKET": "404",
}


def bucket_and_prefix(uri: str) -> str:
    """bucket/prefix of a URI, which is shown in errors only where it holds no secret."""
    parts = urllib.parse.urlsplit(uri)
    if parts.query or holds_secret(uri):
        raise ValueError(
            f"{parts.scheme}://...: holds a key or an option; expected s3://bucket/prefix alone, the rest "
            "in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL or a profile"
        )
    if parts.scheme != "s3" or not parts.netloc:
        raise ValueError(f"{uri}: expected a local path or s3://bucket/prefix")
    return uri.removeprefix("s3://").rstrip("/")


def endpoint() -> tuple[str | None, str | None]:
    """Endpoint and region that the environment names."""
    env = os.environ
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    return env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"), region


@cache
def client(bucket: str, endpoint_url: str | None, region: str | None) -> pafs.S3FileSystem:
    """One client a process, endpoint and bucket, so that connections are used again."""
    if region is None and endpoint_url is None:
        with contextlib.suppress(OSError):  # what comes next tells it
            region = pafs.resolve_s3_region(bucket)
    host = urllib.parse.urlsplit(endpoint_url or "").hostname or (endpoint_url or "").partition(":")[0]
    return pafs.S3FileSystem(
        region=region or ("us-east-1" if endpoint_url else None),
        endpoint_override=endpoint_url,
        scheme="http" if host in ("localhost", "127.0.0.1", "::1") else "https",  # of an endpoint that names none
        connect_timeout=TIMEOUT_S,
        request_timeout=TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
        allow_delayed_open=True,  # a small file is one request and not three
    )


def reason_of(text: str) -> str | None:
    """The reason in an error of pyarrow's S3 client: HTTP status and words; None for another error."""
    match = _AWS_ERROR.search(" ".join(text.split()))
    if match is None:
        return None
    name, status, operation, words = match.groups()
    status = status or _STATUSES.get(name)
    words = re.split(r"; Details| \(Request ID", words)[0].strip().rstrip(".")
    reason = f"{f'HTTP {status}, ' if status else ''}{name} in {operation} after {MAX_ATTEMPTS} attempts at most"
    return f"{reason}: {words}" if words else reason
