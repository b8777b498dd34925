"""Is this machine fit for LEMON? ``lemon doctor [--ray] [--path URI ...]`` checks and says how to mend.

``python -m lemon.doctor`` is the same.

Each check imports what it needs by itself, so that a missing package is a row of the table and not the end of it; only
the standard library is imported here. Exit code 0, or 1 where a check failed; a warning is no failure. No secret is
printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lemon.extras import DISTRIBUTION, missing_package_line
from lemon.runtime.secrets import guarded

GIB = 1 << 30
REINSTALL = "pip install 'lemon-nuclei[pipeline]', or make setup in a checkout"
_PATIENCE_S = 60  # for a check; a server or bucket that does not answer is a failure by then


@dataclass(frozen=True)
class Finding:
    """What a check found: ``ok``, ``warn`` or ``fail``, in words, and how to repair it."""

    state: str
    detail: str
    remedy: str = ""


Check = Callable[[], Finding]


def check_python(*, least: tuple[int, int] = (3, 11)) -> Finding:
    """The interpreter."""
    python = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] < least:
        return Finding("fail", python, f"Python {least[0]}.{least[1]} or newer: make PYTHON=python3.11 setup")
    return Finding("ok", python)


def check_packages() -> Finding:
    """Every package that LEMON asks for, in a version that it takes; those of extras may be absent."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return Finding("warn", f"lemon runs from {Path(__file__).parent.parent}, it is not installed", REINSTALL)
    from packaging.requirements import Requirement

    faults, absent, installed = [], set(), set()
    for text in requirements:
        one = Requirement(text)
        extra = _extra_of(one)
        if extra in ("all", "dev", "docs"):  # the others again, and tools
            continue
        try:
            installed_version = version(one.name)
        except PackageNotFoundError:
            absent |= {extra} if extra else set()
            faults += [] if extra else [f"{one.name} is missing"]
            continue
        installed.add(one.name)
        if not one.specifier.contains(installed_version, prereleases=True):
            faults.append(f"{one.name} {installed_version} is not {one.specifier}")
    if faults:
        return Finding("fail", "; ".join(faults), REINSTALL)
    without = f"; without the extras {', '.join(sorted(absent))}" if absent else ""
    return Finding("ok", f"{len(installed)} as they must be{without}")


def _extra_of(requirement: Any) -> str:
    """The extra that a requirement belongs to; empty where it always holds."""
    return str(requirement.marker).rpartition("extra == ")[2].strip("\"'") if requirement.marker else ""


def check_openslide() -> Finding:
    """OpenSlide opens a slide and reads a region."""
    from lemon.runtime.scratch import scratch_folder
    from lemon.slides.reader import SlideReader
    from lemon.slides.synthetic import make_tissue, write_pyramid

    with scratch_folder() as folder:
        path = folder / "slide.tiff"
        write_pyramid(path, make_tissue(512, seed=0).image, mpp=0.25)
        reader = SlideReader(path)
        detail = f"opened a pyramid of {reader.width_px} px at {reader.mpp:g} um/px"
        reader.close()
    return Finding("ok", detail)


def check_torch() -> Finding:
    """torch, and whether it can use the GPU that the driver sees."""
    import torch

    built = torch.version.cuda
    detail = f"torch {torch.__version__}, built {f'for CUDA {built}' if built else 'without CUDA'}"
    driver = _driver()
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return Finding("ok", f"{detail}; {torch.cuda.device_count()} GPU: {', '.join(sorted(names))}; driver {driver}")
    if driver is None:
        return Finding("ok", f"{detail}; no NVIDIA driver, so CPU only")
    if built is None:
        return Finding("fail", f"{detail}; driver {driver} is there", "a build of torch with CUDA: pip install torch")
    remedy = (
        f"a driver for CUDA {built} (13 needs 580 or newer), or an older torch; CUDA_VISIBLE_DEVICES must not be empty"
    )
    return Finding("fail", f"{detail}, but finds no GPU; driver {driver} is there", remedy)


def _driver() -> str | None:
    """Version of the NVIDIA driver, as nvidia-smi tells it; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        versions = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return versions[0] if versions else None


def check_encoder() -> Finding:
    """timm builds the encoder that comes with the package, and it embeds a cell."""
    import numpy as np
    import timm

    import lemon

    encoder = lemon.load_encoder("lemon_mini")
    features = encoder.embed(np.full((1, 60, 60, 3), 200, np.uint8))
    if not features.isfinite().all():
        return Finding("fail", f"timm {timm.__version__}: lemon_mini's features are not finite", REINSTALL)
    return Finding("ok", f"timm {timm.__version__}: lemon_mini embeds a cell in {features.shape[1]} values")


def check_ray(*, start: bool) -> Finding:
    """Ray's version, and that it can start here or answers at RAY_ADDRESS; with ``start`` it does, and runs a task."""
    from lemon.errors import ConfigError
    from lemon.runtime.cluster import check_address, ray_address, ray_version, temporary_folder, try_ray

    address = ray_address()
    try:
        if address is None:
            temporary_folder()
        else:
            check_address(address)
        ran = try_ray() if start else ""
    except ConfigError as error:
        problem, _, remedy = str(error).rpartition(": ")
        return Finding("fail", f"{ray_version()}; {problem or remedy}", remedy)
    if start:
        return Finding("ok", f"{ray_version()}: {f'joined {address}' if address else 'started here'}, {ran}")
    return Finding("ok", f"{ray_version()} (--ray {f'joins {address}' if address else 'starts one'} and runs a task)")


def check_mlflow() -> Finding:
    """The place where runs go."""
    import requests

    from lemon.runtime.cluster import ray_address
    from lemon.runtime.tracking import reach, tracking_uri, version

    uri = tracking_uri()
    detail, set_by = f"{version()}; runs go to {uri}", "MLFLOW_TRACKING_URI"
    try:
        reach(uri)
    except requests.HTTPError as error:
        remedy = f"is {set_by} right? a server may want a login"
        return Finding("fail", f"{detail}, which answers {error.response.status_code}", remedy)
    except OSError as error:
        remedy = f"start the server (make ui, cluster/mlflow_server.sh) or mend {set_by}"
        return Finding("fail", f"{detail}: {error}", remedy)
    if uri.startswith("sqlite:") and ray_address() is not None:
        remedy = f"start a server that all nodes reach and set {set_by}: cluster/README.md"
        return Finding("warn", f"{detail} on this node, which other nodes do not see", remedy)
    return Finding("ok", detail)


def check_configs() -> Finding:
    """Every shipped variant and preset is read."""
    from lemon.runtime.config import read_all

    return Finding("ok", f"{len(read_all())} variants and presets")


def check_storage(path: str) -> Finding:
    """A file is written, listed, read and deleted."""
    from lemon.runtime.records import INTERNAL_FOLDER
    from lemon.runtime.store import Store

    store, name = Store(path), f"{INTERNAL_FOLDER}/doctor-{uuid.uuid4().hex[:8]}"
    store.write_internal(name, b"lemon")
    try:
        if name not in store.list(INTERNAL_FOLDER) or store.read_bytes(name) != b"lemon":
            return Finding("fail", f"{path}: what was written is not found again", "is it the same bucket everywhere?")
    finally:
        store.remove_internal(name)
        store.remove_empty(INTERNAL_FOLDER)
    return Finding("ok", f"{path}: written, listed, read, deleted")


def check_folders(folders: Sequence[Path]) -> Finding:
    """Folders that LEMON and Ray write to."""
    faults = []
    for folder in folders:
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            faults.append(f"{folder}: {error.strerror}")
    remedy = "chown or chmod them; cache=FOLDER and TMPDIR name other ones"
    return Finding("fail", "; ".join(faults), remedy) if faults else Finding("ok", ", ".join(map(str, folders)))


def check_disk(folder: Path, *, warn_gib: float = 20, fail_gib: float = 2) -> Finding:
    """Free disk; Ray stops making objects on a disk that is 95 % full."""
    usage = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists()))
    free, full = usage.free / GIB, 1 - usage.free / usage.total
    detail = f"{free:,.0f} GiB free at {folder}, {full:.0%} full"
    if free < fail_gib or full > 0.95:
        return Finding("fail", detail, "free some, or give another folder (TMPDIR, cache=, output=)")
    return Finding("warn", detail, "ten million cells are 108 GB") if free < warn_gib else Finding("ok", detail)


def check_shared_memory(folder: Path = Path("/dev/shm"), *, warn_gib: float = 1) -> Finding:
    """Ray keeps its objects there, and workers of torch what they share."""
    if not folder.exists():
        return Finding("warn", f"no {folder}", "Ray falls back to files in TMPDIR, which are slow")
    size = shutil.disk_usage(folder).total / GIB
    if size < warn_gib:
        return Finding("warn", f"{folder} has {size:.2f} GiB", "docker run --shm-size=8g, or --ipc=host")
    return Finding("ok", f"{folder} has {size:,.1f} GiB")


def check_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> Finding:
    """CPUs of the machine against those that this process may use."""
    n_cpus = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cpus
    quota = _cpu_quota(cgroup)
    detail = f"{n_cpus} CPUs, {allowed} allowed" + (f", a limit of {quota:g}" if quota else "")
    usable = min(allowed, quota or allowed)
    if usable < n_cpus:
        remedy = f"libraries count {n_cpus}: set OMP_NUM_THREADS={max(1, int(usable))} and workers.cpus by hand"
        return Finding("warn", detail, remedy)
    return Finding("ok", detail)


def _cpu_quota(cgroup: Path) -> float | None:
    """CPUs that a container's cgroup (v2, else v1) allows; None: no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def examine(check: Check, *, patience_s: float = _PATIENCE_S) -> Finding:
    """A check's finding; what it raises, and that it does not end in time, are findings too."""
    findings: list[Finding] = []

    def attempt() -> None:
        try:
            findings.append(check())
        except ModuleNotFoundError as error:
            command = (missing_package_line(error) or REINSTALL).partition("expected ")
            findings.append(Finding("fail", f"the package {error.name} is missing", command[2] or command[0]))
        except BaseException as error:  # noqa: BLE001  (whatever is wrong with the machine is a row of the table)
            message = " ".join(str(error).split()) or "no message"
            findings.append(
                Finding("fail", f"{type(error).__name__}: {message[:400]}", "see what it names, or reinstall")
            )

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(patience_s)
    return (
        findings[0]
        if findings
        else Finding("fail", f"no answer in {patience_s:g} s", "is the server or bucket reachable?")
    )


def checks(*, start_ray: bool, paths: Sequence[str]) -> dict[str, Check]:
    """All checks by name, in the order of the table."""
    here, scratch, cache = Path.cwd(), Path(tempfile.gettempdir()), Path("~/.cache/lemon").expanduser()
    by_name: dict[str, Check] = {
        "python": check_python,
        "packages": check_packages,
        "cpus": check_cpus,
        "shared memory": check_shared_memory,
        "disk": partial(check_disk, here),
        "scratch disk": partial(check_disk, scratch),
        "folders": partial(check_folders, [here, scratch, cache]),
        "configs": check_configs,
        "openslide": check_openslide,
        "torch": check_torch,
        "encoder": check_encoder,
        "mlflow": check_mlflow,
        "ray": partial(check_ray, start=start_ray),
    }
    return by_name | {f"storage {number}": partial(check_storage, path) for number, path in enumerate(paths, 1)}


def main(words: Sequence[str] | None = None, *, prog: str = "python -m lemon.doctor") -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ray", action="store_true", help="start Ray (or join RAY_ADDRESS) and run a task")
    parser.add_argument("--path", nargs="+", default=[], metavar="URI", help="folders or s3:// prefixes to write to")
    options = parser.parse_args(words)
    with guarded():
        failed = sum(_row(name, check) for name, check in checks(start_ray=options.ray, paths=options.path).items())
        print(f"doctor: {failed} failed" if failed else "doctor: fit")
    return int(failed > 0)


def _row(name: str, check: Check) -> bool:
    """Print a row of the table; returns whether the check failed."""
    finding = examine(check, patience_s=120 if name == "ray" else _PATIENCE_S)
    print(f"{name:<14} {finding.state:<5} {finding.detail}")
    if finding.remedy:
        print(f"{'':<20} mend: {finding.remedy}", flush=True)
    return finding.state == "fail"


def script(words: Sequence[str] | None = None, *, prog: str = "python -m lemon.doctor") -> NoReturn:
    """``main``, and the end of the process: a check that hangs, in a library's thread, must not keep it."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    code = main(words, prog=prog)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    script()
