"""LEMON as others get it: a wheel that works from an environment of its own, with and without the extras."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lemon.extras import DISTRIBUTION, EXTRAS, missing_package_line
from lemon.slides.synthetic import make_tissue, write_pyramid
from lemon.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = ("probe", "pipeline", "cluster", "find", "onnx", "spatialdata", "transformers", "umap")
IMPORTED_AS = {"faiss-cpu": "faiss", "psycopg2-binary": "psycopg2", "scikit-learn": "sklearn", "umap-learn": "umap"}


def run(
    *command: str | Path, folder: Path, code: int | None = 0, timeout_s: float = 500
) -> subprocess.CompletedProcess[str]:
    """A command in a folder, as a user has it: without the variables that lead to this checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        cwd=folder,
        env=environment,
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; make setup installs it")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the wheel and all extras, whose packages are those of these tests."""
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return install(wheel, tmp_path_factory.mktemp("all") / "env", packages=here)


def install(wheel: Path, folder: Path, *, packages: Sequence[Path | str]) -> Path:
    """A fresh environment with the wheel, which takes its other packages from folders; returns its ``bin``."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, folder=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("".join(f"{package}\n" for package in packages))
    return folder / "bin"


def needed(requirements: list[str]) -> Iterator[metadata.Distribution]:
    """The installed distributions that requirements lead to, by their own requirements."""
    left, seen = [Requirement(text) for text in requirements], set()
    while left:
        one = left.pop()
        key = (re.sub(r"[-_.]+", "-", one.name).lower(), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        found = metadata.distribution(one.name)
        yield found
        for text in found.requires or []:
            inner = Requirement(text)
            extras = [{"extra": extra} for extra in (*one.extras, "")]
            if inner.marker is None or any(inner.marker.evaluate(extra) for extra in extras):
                left.append(inner)


def link(distributions: Iterator[metadata.Distribution], folder: Path) -> Path:
    """A folder like site-packages that holds nothing but some distributions."""
    folder.mkdir()
    for distribution in distributions:
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            place = folder / top
            if not place.exists():
                place.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def test_the_extras_that_messages_name_are_those_of_the_project() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    declared = PROJECT["optional-dependencies"]
    assert set(declared) == {*OPTIONAL, "all", "dev", "docs"}
    for extra in OPTIONAL:
        names = {Requirement(text).name for text in declared[extra]} - {DISTRIBUTION}
        assert {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names} == set(EXTRAS[extra]), extra
    (everything,) = (Requirement(text) for text in declared["all"])
    assert everything.extras == set(OPTIONAL) - {"probe"}
    assert f"{DISTRIBUTION}[probe]" in declared["pipeline"]
    assert f"{DISTRIBUTION}[all]" in declared["dev"]


@pytest.mark.parametrize(
    ("module", "extra"), [("ray.data", "pipeline"), ("sklearn.linear_model", "probe"), ("numpy", None)]
)
def test_a_missing_package_is_named_with_its_extra(module: str, extra: str | None) -> None:
    told = missing_package_line(ModuleNotFoundError(f"No module named {module!r}", name=module))
    package = module.partition(".")[0]
    expected = f"the package {package} is not installed; expected pip install 'lemon-nuclei[{extra}]'"
    assert told == (expected if extra else None)


def test_what_a_release_says_of_itself_agrees() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert PROJECT["license"].startswith("MIT AND ")  # the weights in the package are not MIT's
    assert "\nlicense: MIT\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


def test_all_weights_that_come_with_the_package_have_a_card() -> None:
    folders = {path.parent for path in (ROOT / "lemon").rglob("released/*/*.safetensors")}
    assert len(folders) >= 2
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert "licence" in card.lower(), folder
        assert "## Scores" in card, folder


@pytest.mark.slow
@pytest.mark.ray
def test_a_wheel_in_a_fresh_environment_curates_a_slide_and_opens_its_encoder(programs: Path, tmp_path: Path) -> None:
    lemon, python = programs / "lemon", programs / "python"
    code = "import lemon, lemon.runtime.config as config; print(lemon.__file__, config.conf_dir())"
    where = run(python, "-c", code, folder=tmp_path)
    assert all(Path(path).is_relative_to(programs.parent) for path in where.stdout.split()), where.stdout
    assert run(lemon, "--version", folder=tmp_path).stdout == f"lemon {__version__}\n"
    assert "  curate " in run(lemon, "--help", folder=tmp_path).stdout
    assert run(lemon, "curat", folder=tmp_path, code=2).stderr.endswith("did you mean curate?\n")
    write_pyramid(tmp_path / "slide.tiff", make_tissue(700, seed=0, border_px=50).image, mpp=0.25)
    words = [f"slides={tmp_path / 'slide.tiff'}", "output=cells", "variant=smoke", "region_px=512"]
    done = run(lemon, "curate", *words, folder=tmp_path)
    assert "1 slides (1 done" in done.stdout
    assert (tmp_path / "cells" / "cells" / "slide.parquet").exists()
    assert run(lemon, "verify", "output=cells", folder=tmp_path)
    code = "import lemon, numpy; print(lemon.load_encoder('lemon_mini').embed(numpy.zeros((2, 60, 60, 3), 'u1')).shape)"
    assert run(python, "-c", code, folder=tmp_path).stdout == "torch.Size([2, 192])\n"


SHORT_DEMO = """
import sys
from lemon.cli import main
from lemon.demo import job
job.PRETRAIN = job.PRETRAIN.replace("images_per_epoch=2560 epochs=8", "images_per_epoch=640 epochs=2")
job.TRIAL = job.TRIAL.replace("images_per_epoch=1280", "images_per_epoch=256")
job.SHARES = (2, 1)
sys.exit(main(["demo", "synthetic=true"]))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_wheel_in_a_fresh_environment_runs_the_demo(programs: Path, tmp_path: Path) -> None:
    slide = tmp_path / "demo" / "slides" / "synthetic.tiff"  # a smaller one than the demo makes, which it then keeps
    slide.parent.mkdir(parents=True)
    write_pyramid(slide, make_tissue(1500, seed=0, border_px=100).image, mpp=0.25)
    (tmp_path / "short_demo.py").write_text(SHORT_DEMO)
    done = run(programs / "python", "short_demo.py", folder=tmp_path, timeout_s=1000)
    page = tmp_path / "demo" / "report" / "index.html"
    assert done.stdout.endswith(f"demo: the report is {page}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "short_demo.py"}


@pytest.mark.slow
def test_a_wheel_without_extras_finds_nuclei_and_embeds_them_and_a_stage_says_what_it_lacks(
    wheel: Path, tmp_path: Path
) -> None:
    packages = link(needed(PROJECT["dependencies"]), tmp_path / "packages")
    absent = {"ray", "mlflow", "sklearn", "anndata", "openTSNE", "pandas", "matplotlib"}
    assert not absent & {path.name for path in packages.iterdir()}
    programs = install(wheel, tmp_path / "env", packages=[packages])
    (tmp_path / "use.py").write_text(
        "import lemon\n"
        "from pathlib import Path\n"
        "from lemon.slides.synthetic import make_tissue, write_pyramid\n"
        "write_pyramid(Path('slide.tiff'), make_tissue(512, seed=0).image, mpp=0.25)\n"
        "with lemon.open_slide('slide.tiff') as slide:\n"
        "    image = slide.region(0, 0, width_px=512, height_px=512)\n"
        "cells = lemon.crop(image, lemon.segment(image))\n"
        "print(len(cells) > 20, tuple(lemon.load_encoder('lemon_mini').embed(cells).shape) == (len(cells), 192))\n"
        "try:\n"
        "    lemon.probes\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
        "try:\n"
        "    lemon.load_encoder('models:/lemon/1')\n"
        "except lemon.ConfigError as error:\n"
        "    print(error)\n"
    )
    first, second, third = run(programs / "python", "use.py", folder=tmp_path).stdout.splitlines()
    assert first == "True True"
    assert re.fullmatch(r"lemon\.probes: the package \w+ is not .* pip install 'lemon-nuclei\[probe\]'", second)
    assert re.fullmatch(r"encoder: models:/lemon/1: the package \w+ .* 'lemon-nuclei\[pipeline\]'", third)
    done = run(programs / "lemon", "curate", "slides=slide.tiff", "output=cells", folder=tmp_path, code=2)
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"curate: the package \w+ is not installed; .* pip install 'lemon-nuclei\[pipeline\]'", line)
    assert not (tmp_path / "cells").exists()
