"""Peak memory of the curation job against the number of slides: 1, 10 and 100 copies of one slide.

python -m benchmarks.memory [--slide FILE] [--copies 1 10 100]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.record import record
from lemon.slides.synthetic import make_tissue, write_pyramid

JOB = Path(__file__).resolve().parents[1] / "jobs" / "curate.py"


def main() -> None:
    """Run the job once for each number of copies and print its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slide", type=Path, help="default: a synthetic slide of 1500 px")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 10, 100])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        slide = options.slide or Path(scratch) / "one.tiff"
        if not options.slide:
            write_pyramid(slide, make_tissue(1500, seed=0, border_px=60).image, mpp=0.25)
        for copies in options.copies:
            rows.append(curate_copies(slide, copies, folder=Path(scratch) / str(copies)))
            told = "{copies:>4} slides: driver {driver_mb:>6.0f} MB, workers {workers_mb:>6.0f} MB, {seconds:.0f} s"
            print(told.format(**rows[-1]))
    record("memory", {"slide": slide.name, "runs": rows}, packages=("ray", "pyarrow"))


def curate_copies(slide: Path, copies: int, *, folder: Path) -> dict[str, float]:
    """Peak resident memory (MB) of the driver, and of the slide actor with its processes, over one job."""
    (folder / "slides").mkdir(parents=True)
    for index in range(copies):
        (folder / "slides" / f"s{index:04d}{slide.suffix}").symlink_to(slide)
    words = [f"slides={folder / 'slides'}", f"output={folder / 'out'}", "workers.actors=1"]
    start = time.monotonic()
    job = subprocess.Popen([sys.executable, str(JOB), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = {"driver_mb": 0.0, "workers_mb": 0.0}
    while job.poll() is None:
        peak = {name: max(peak[name], value) for name, value in resident(job.pid).items()}
        time.sleep(0.2)
    if job.returncode:
        raise SystemExit(f"the job failed with exit code {job.returncode}")
    return {"copies": copies, **peak, "seconds": time.monotonic() - start}


def resident(pid: int) -> dict[str, float]:
    """Resident MB now: of the driver, and of the actor (Ray names it ItemActor) and its worker processes together."""
    driver, workers = 0.0, 0.0
    try:
        process = psutil.Process(pid)
        driver = process.memory_info().rss / 1e6
        for child in process.children(recursive=True):
            line = " ".join(child.cmdline())
            if "ItemActor" in line or "multiprocessing.spawn" in line:
                workers += child.memory_full_info().uss / 1e6
    except psutil.Error:
        pass
    return {"driver_mb": driver, "workers_mb": workers}


if __name__ == "__main__":
    main()
