"""A secret is planted; then every file, line and run of MLflow that the jobs leave is searched for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.jobs.warm import run_job
from tests.probe.tasks.test_folder import write_crops
from tests.sweep.studies import sweep_words, write_cells

SECRET = "pl4nted+S3CRET/0123456789"
SPELLED = (b"pl4nted", b"S3CRET")
VARIABLES = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GDC_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_cells(folder / "cells")
    write_crops(folder / "data")
    return folder


def run(home: Path, job: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | dict.fromkeys(VARIABLES, SECRET)
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"} | variables
    done = run_job(job, words, env=environment, cwd=home)
    for place, content in {"stdout": done.stdout.encode(), "stderr": done.stderr.encode(), **files(home)}.items():
        assert not any(each in content for each in SPELLED), (job, place)
    return done


def files(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() + str(path).encode() for path in home.rglob("*") if path.is_file()}


REQUIRED = {
    "atlas": ("embeddings=e", "cells=c"),
    "curate": ("slides=s", "output=o"),
    "demo": (),
    "describe": ("embeddings=e", "cells=c"),
    "embed": ("model=lemon_mini", "cells=c", "output=o"),
    "fetch_tcga": ("organs=BRCA", "slides_per_organ=1", "output=o"),
    "fit_stain": ("cells=c",),
    "pretrain": ("cells=c", "output=o", "ssl=mocov3", "views=a1_gray", "encoder=vit_s8"),
    "probe": ("models=lemon_mini", "tasks=consep-type"),
    "report": (),
    "train_segmenter": ("data=d", "output=o"),
    "scaling_sweep": ("sweep=ssl_tiny", "cells=c", "tasks=consep-type", "output=o"),
}


@pytest.mark.parametrize("job", REQUIRED)
def test_a_secret_in_an_address_or_an_override_is_refused_untold(job: str, home: Path) -> None:
    key = "cells" if job == "fit_stain" else "output"
    short = SECRET[:10]  # too short to be told from a word by its value
    words = (f"{key}=s3://KEY:{short}@bucket/x", f"{key}=${{oc.env:HF_TOKEN}}", f"{key}=/a/{SECRET}", f"{SECRET}=1")
    for word in words:
        done = run(home, job, *REQUIRED[job], word)
        assert done.returncode == 2, (word, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "uri",
    [f"postgresql://me:{SECRET}@127.0.0.1:1/db", f"http://me:{SECRET}@127.0.0.1:1", f"nothing://me:{SECRET}@host"],
)
def test_the_password_of_mlflow_is_not_told_where_it_does_not_answer(uri: str, home: Path, tmp_path: Path) -> None:
    done = run(home, "report", f"output={tmp_path / 'report'}", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_no_job_leaves_a_secret_that_it_was_told(home: Path) -> None:
    """The whole chain in an environment that holds the secret."""
    small = [word.removeprefix("pretrain.") for word in sweep_words(home) if word.startswith("pretrain.")]
    places = {name: str(home / name) for name in ("cells", "encoder", "embeddings", "atlas", "probe", "out", "report")}
    chain: list[tuple[str, list[str]]] = [
        ("fit_stain", [f"cells={places['cells']}", "components=1", "n_cells=20"]),
        (
            "pretrain",
            [f"cells={places['cells']}", f"output={places['encoder']}", "variant=smoke", *small, "epochs=4"]
            + ["register_as=lemon"],
        ),
        ("embed", [f"model={places['encoder']}", f"cells={places['cells']}", f"output={places['embeddings']}"]),
        (
            "atlas",
            [f"embeddings={places['embeddings']}", f"cells={places['cells']}", f"output={places['atlas']}"]
            + ["perplexity=5"],
        ),
        (
            "probe",
            [f"models=[{places['encoder']},volta:{home}/none]", "tasks=[folder:mine,folder:none]"]
            + [f"data={home / 'data'}", f"output={places['probe']}", "bootstrap=100"],
        ),
        ("scaling_sweep", [*sweep_words(home, "tasks=folder:mine"), "sweep=augmentation", "pretrain.epochs=4"]),
        ("report", [f"output={places['report']}", f"atlas={places['atlas']}"]),
    ]
    for job, words in chain:
        done = run(home, job, *words)
        assert done.returncode in (0, 3), (job, done.stderr)
    assert (home / "report" / "index.html").exists()
