"""Processes that a drill or a test started, and ports for them."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterable

import psutil


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; none where it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that still runs."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on, and that no outgoing connection of this machine will take.

    A port that the system chooses is one of those that it also gives to outgoing connections: between this choice and
    the moment at which a server listens, any client on the machine may have it. Systems take those from 32768 on, Ray
    its workers' from 10002 to 19999.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        for port in random.SystemRandom().sample(range(20_000, 32_768), 12_768):
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError(f"no {count} free ports from 20000 to 32767")
