"""The small server of ``lemon atlas serve=true``: reads only, on this machine alone, to the page that it sent.

It listens on the loopback address. A request whose ``Host`` is another name is refused, because a page of elsewhere
whose name is made to lead here (DNS rebinding) would name itself; so is one that a page of elsewhere makes, which
browsers tell by ``Sec-Fetch-Site``. Only GET and HEAD are answered. A path is looked up among names; none is ever
taken for that of a file.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lemon.atlas.neighbours import MOST_NEIGHBOURS, Neighbours
from lemon.atlas.page import served_page
from lemon.atlas.served import Piece, Served
from lemon.atlas.tissue import Tissue

HOST = "127.0.0.1"

COPY_BYTES = 1 << 20

IDLE_S = 60.0  # after which a connection without a request is closed

JSON, BYTES, JPEG = "application/json", "application/octet-stream", "image/jpeg"

_TILE = re.compile(r"tissue/(\d{1,6})/(\d{1,2})/(\d{1,6})/(\d{1,6})")
_SLIDE = re.compile(r"data/slide-(\d{1,6})")

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class AtlasServer(ThreadingHTTPServer):
    """Serves an atlas at ``http://127.0.0.1:port/`` (0: any free port). Raises OSError where the port is taken."""

    daemon_threads = True
    is_open = True

    def __init__(self, served: Served, neighbours: Neighbours, *, port: int) -> None:
        self.served, self.neighbours, self.tissue = served, neighbours, Tissue(served.slides)
        self.page = served_page(served.title, served.subtitle, served.facts)
        super().__init__((HOST, port), _Handler)
        self.port = int(self.server_address[1])
        self.names = {f"{name}:{self.port}" for name in (HOST, "localhost")}

    def server_close(self) -> None:
        """Close the port and the slides; browsers that keep a connection are not answered either."""
        self.is_open = False
        super().server_close()
        self.tissue.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before an answer is complete is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def answer(self, target: str) -> tuple[str, bytes | Piece] | HTTPStatus:
        """Kind and content of what is asked for, or why there is none."""
        parts = urlsplit(target)
        path = parts.path.removeprefix("/")
        if path == "":
            return "text/html; charset=utf-8", self.page
        if path == "neighbours":
            return self._near(parts.query)
        if slide := _SLIDE.fullmatch(path):
            number = int(slide[1])
            if number >= len(self.served.slides):
                return HTTPStatus.NOT_FOUND
            return JSON, json.dumps(self.tissue.described(number)).encode()
        if tile := _TILE.fullmatch(path):
            jpeg = self.tissue.tile(*map(int, tile.groups()))
            return HTTPStatus.NOT_FOUND if jpeg is None else (JPEG, jpeg)
        piece = self.served.piece(path.removeprefix("data/")) if path.startswith("data/") else None
        return HTTPStatus.NOT_FOUND if piece is None else (JSON if path.endswith("ids") else BYTES, piece)

    def _near(self, query: str) -> tuple[str, bytes] | HTTPStatus:
        try:
            cell, wanted = (int(value) for name in ("cell", "k") for value in parse_qs(query)[name])
        except (KeyError, ValueError):
            return HTTPStatus.BAD_REQUEST
        if not (0 <= cell < self.served.count and 1 <= wanted <= MOST_NEIGHBOURS):
            return HTTPStatus.BAD_REQUEST
        return JSON, json.dumps(self.neighbours.of(cell, wanted).tolist()).encode()


class _Handler(BaseHTTPRequestHandler):
    server: AtlasServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lemon", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def _answer(self, *, with_content: bool) -> None:
        if not self.server.is_open:
            self.close_connection = True
            return
        send = partial(self._send, with_content=with_content)
        if self.headers.get_all("Host", []) != [host := self.headers.get("Host", "")] or host not in self.server.names:
            return send(HTTPStatus.FORBIDDEN, "text/plain", f"expected Host: {HOST}:{self.server.port}\n".encode())
        is_page = urlsplit(self.path).path == "/"
        if not is_page and self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return send(HTTPStatus.FORBIDDEN, "text/plain", b"asked by another page\n")
        try:
            found = self.server.answer(self.path)
        except OSError:  # a file of the output was taken away meanwhile
            found = HTTPStatus.INTERNAL_SERVER_ERROR
        if isinstance(found, HTTPStatus):
            return send(found, "text/plain", f"{found.phrase}\n".encode())
        return send(HTTPStatus.OK, *found)

    def _send(
        self,
        status: HTTPStatus,
        kind: str,
        content: bytes | Piece,
        *,
        with_content: bool = True,
    ) -> None:
        self.send_response(status)
        length = content.length if isinstance(content, Piece) else len(content)
        for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()
        if not with_content:
            return
        if isinstance(content, bytes):
            self.wfile.write(content)
            return
        with content.path.open("rb") as stream:
            stream.seek(content.start)
            if content.start == 0 and length == content.path.stat().st_size:
                shutil.copyfileobj(stream, self.wfile, COPY_BYTES)
            else:
                self.wfile.write(stream.read(length))

    def log_message(self, *_: Any) -> None:
        """Requests are no news."""


def serve(server: AtlasServer) -> None:
    """Answer until Ctrl-C."""
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
