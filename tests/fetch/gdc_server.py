"""A Genomic Data Commons on loopback: answers POST /files and GET /data/<uuid>, and misbehaves as it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """A file that the server has.

    ``faults`` are used up, one a request: ("status", 500), ("status", 429, seconds), ("cut", n) and ("reset", n) after
    n bytes, ("stall", n) until the server is closed, ("slow", n) a block of n bytes each 50 ms, ("whole",) whatever
    range was asked for, ("whole", n) and that cut, ("garbage",), ("page",). ``always`` is the fault of all other
    requests.
    """

    name: str
    content: bytes
    project: str = "TCGA-BRCA"
    patient: str = ""
    access: str = "open"
    strategy: str = "Diagnostic Slide"
    faults: list[tuple[Any, ...]] = field(default_factory=list)
    always: tuple[Any, ...] = ()

    @property
    def file_id(self) -> str:
        """Made from the name."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, self.name))

    @property
    def md5(self) -> str:
        """Of the right content."""
        return hashlib.md5(self.content).hexdigest()

    @property
    def slide_id(self) -> str:
        """The name without its suffix."""
        return self.name.rpartition(".")[0]

    def record(self) -> dict[str, Any]:
        """What the API knows of it."""
        case = {"submitter_id": self.patient or self.name[:12], "project": {"project_id": self.project}}
        return {
            "file_id": self.file_id,
            "file_name": self.name,
            "md5sum": self.md5,
            "file_size": len(self.content),
            "data_type": "Slide Image",
            "data_format": "SVS",
            "experimental_strategy": self.strategy,
            "access": self.access,
            "cases": [case],
        }


@dataclass(frozen=True)
class Request:
    """A request that came in: when, for what, from which byte."""

    at_s: float
    path: str
    offset: int


class GdcServer:
    """Serves until its block ends; ``url`` is the address of the API."""

    def __init__(self, *files: Served) -> None:
        self.files = {file.file_id: file for file in files}
        self.requests: list[Request] = []
        self.answer: bytes | None = None  # to all questions, instead of the right one
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gdc": self}))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def asked(self, file: Served) -> list[Request]:
        """The requests for a file."""
        return [request for request in self.requests if request.path.endswith(file.file_id)]

    def offsets(self, file: Served) -> list[int]:
        """The first byte of each request for a file."""
        return [request.offset for request in self.asked(file)]

    def downloads(self) -> int:
        """Requests for files, of whatever part."""
        return sum(request.path.startswith("/data/") for request in self.requests)


@contextlib.contextmanager
def serving(*files: Served) -> Iterator[GdcServer]:
    """A server of these files, for the length of a block."""
    gdc = GdcServer(*files)
    thread = threading.Thread(target=gdc.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield gdc
    finally:
        gdc.closing.set()
        gdc.http.shutdown()
        gdc.http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gdc: GdcServer

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.gdc.requests.append(Request(time.time(), self.path, 0))
        if self.path != "/files":
            self._answer(404, b"no such endpoint")
            return
        assert query["filters"]["op"] == "and"
        found = [
            record
            for record in (file.record() for file in self.gdc.files.values())
            if all(_holds(record, term) for term in query["filters"]["content"])
        ]
        name, _, order = query["sort"].partition(":")
        found.sort(key=lambda record: record[name], reverse=order == "desc")
        page = found[query["from"] : query["from"] + query["size"]]
        roots = {path.split(".")[0] for path in query["fields"].split(",")}
        hits = [{key: value for key, value in record.items() if key in roots} for record in page]
        pagination = {"total": len(found), "count": len(hits), "from": query["from"], "size": query["size"]}
        answer = json.dumps({"data": {"hits": hits, "pagination": pagination}, "warnings": {}}).encode()
        self._answer(200, answer if self.gdc.answer is None else self.gdc.answer)

    def do_GET(self) -> None:
        offset = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.gdc.requests.append(Request(time.time(), self.path, offset))
        file = self.gdc.files.get(self.path.removeprefix("/data/"))
        if file is None:
            self._answer(404, b"no such file")
            return
        kind, *details = (file.faults.pop(0) if file.faults else file.always) or ("none",)
        content = bytes(len(file.content)) if kind == "garbage" else file.content
        if kind == "status":
            headers = {"Retry-After": str(details[1])} if len(details) > 1 else {}
            self._answer(details[0], b"not now", **headers)
        elif kind == "page":
            self._answer(200, b"<html>please log in</html>")
        elif kind == "whole" or "Range" not in self.headers:
            self._send(200, content, kind, *details)
        else:
            span = f"bytes {offset}-{len(content) - 1}/{len(content)}"
            self._send(206, content[offset:], kind, *details, **{"Content-Range": span})

    def _send(self, status: int, body: bytes, kind: str, *details: Any, **headers: str) -> None:
        """Announce a body, and send it as the fault allows."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if kind == "slow":
            for start in range(0, len(body), details[0]):
                self.wfile.write(body[start : start + details[0]])
                if self.gdc.closing.wait(0.05):
                    return
            return
        cut = kind in ("cut", "reset", "stall", "whole") and bool(details)
        self.wfile.write(body[: details[0]] if cut else body)
        self.wfile.flush()
        if kind == "stall":
            self.gdc.closing.wait()
        if kind == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = cut

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self._send(status, body, "none", **{"Content-Type": "application/json", **headers})

    def handle(self) -> None:
        """A client that goes away is no news."""
        with contextlib.suppress(ConnectionError):
            super().handle()


def _holds(record: dict[str, Any], term: dict[str, Any]) -> bool:
    assert term["op"] == "in"
    name = term["content"]["field"]
    value = record["cases"][0]["project"]["project_id"] if name == "cases.project.project_id" else record[name]
    return value in term["content"]["value"]
