"""The dashboard and the alerts: every query asks for metrics that LEMON or Ray export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics
from ray.dashboard.modules.metrics import grafana_dashboard_factory
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from benchmarks.services import GRAFANA, dashboard_expressions
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.runtime import metrics
from lemon.runtime.config import load
from lemon.runtime.tracking import Run

FOLDER = GRAFANA.parents[1]
BOARD = json.loads(GRAFANA.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
ALERTS = [
    rule
    for group in yaml.safe_load((FOLDER / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


def exported() -> set[str]:
    """The names of what LEMON and Ray export."""
    nodes = {f"ray_{name}" for name in METRICS_GAUGES}
    autoscaler = {f"autoscaler_{name}" for name in vars(AutoscalerPrometheusMetrics("x")) if not name.startswith("_")}
    ray_dashboard = grafana_dashboard_factory.generate_default_grafana_dashboard()[0]
    named = set(re.findall(r"\bray_\w+", ray_dashboard))  # also of Ray's C++, which no list in Python has
    return {f"ray_{name}" for name in metrics.COUNTERS} | nodes | autoscaler | named


def test_every_query_asks_for_metrics_that_are_exported() -> None:
    known = exported()
    for expression in [*dashboard_expressions(), *(rule["expr"] for rule in ALERTS)]:
        names = set(re.findall(r"\b(?:ray|autoscaler)_\w+", expression))
        assert names
        assert names <= known, names - known


def test_every_counter_is_on_the_dashboard_and_in_the_readme() -> None:
    text, queries = (FOLDER / "README.md").read_text(), " ".join(dashboard_expressions())
    for name in metrics.COUNTERS:
        assert f"| `ray_{name}` |" in text
        assert f"ray_{name}" in queries


def test_every_alert_has_a_panel_with_a_red_line() -> None:
    lined = {
        panel["title"]
        for panel in PANELS
        if "red" in [step["color"] for step in panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])]
    }
    assert {rule["alert"] for rule in ALERTS} == lined
    assert len(ALERTS) == 6


def test_panels_have_the_fields_of_rays_own_dashboards_and_the_source_that_is_set_up() -> None:
    ray = json.loads(grafana_dashboard_factory.generate_default_grafana_dashboard()[0])
    nested = [inner for panel in ray["panels"] for inner in (panel, *panel.get("panels", []))]
    fields = {key for panel in nested for key in panel}
    assert BOARD.keys() <= ray.keys() | {"schemaVersion"}
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text())["datasources"]
    for panel in PANELS:
        assert panel.keys() <= fields | {"fieldConfig"}
        assert {panel["datasource"]["uid"], *(each["datasource"]["uid"] for each in panel["targets"])} == {
            source["uid"]
        }
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]}
    assert len(places) == len(BOARD["panels"]) == len({panel["id"] for panel in BOARD["panels"]})


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_prometheus_reads_its_settings_and_alerts() -> None:
    """Those of Kubernetes it cannot read where, as in Debian, it is built without Kubernetes."""
    command = ["promtool", "check", "config", "--lint=none", FOLDER / "prometheus" / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun_at", [0, 6])
def test_training_counts_every_cell_once_with_checkpoints_between_logs_and_after_a_resumption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun_at: int
) -> None:
    counted: list[dict[str, Any]] = []

    def note(stage: str, n_cells: int, **times: float) -> None:
        counted.append({"stage": stage, "n_cells": n_cells, **times})

    monkeypatch.setattr(pretraining, "count_cells", note)
    monkeypatch.setattr(Run, "log", lambda *_, **__: None)
    words = [f"cells={tmp_path}", f"output={tmp_path}", "batch=16", "images_per_epoch=224", "epochs=1"]
    config = load("pretrain", [*words, "log_every=4", "checkpoint_every=6", "ssl.warmup_epochs=0"], PretrainConfig)
    log = pretraining._Logger(Run("nowhere", "x"), config)
    for step in [step for step in range(begun_at + 1, 15) if step % 4 == 0 or step % 6 == 0 or step == 14]:
        values: Mapping[str, float] = {"loss": 1.0, "images_per_s": 32.0, "data_wait_share": 0.25}
        log(values, step)
        log({"effective_rank": 3.0}, step)  # of a checkpoint, which is no window
    assert sum(each["n_cells"] for each in counted) == (14 - begun_at) * 16
    assert sum(each["seconds"] for each in counted) == pytest.approx((14 - begun_at) * 16 / 32)
    assert sum(each["device_s"] for each in counted) == pytest.approx((14 - begun_at) * 16 / 32 * 0.75)
    assert {each["stage"] for each in counted} == {"pretrain"}


def test_outside_of_ray_nothing_is_counted_and_nothing_fails() -> None:
    before = metrics._counter.cache_info()
    metrics.count_slide("curate", status="done", n_cells=3, seconds=1.0, device_s=0.5)
    assert metrics._counter.cache_info() == before


def test_a_stopwatch_adds_up_blocks_also_of_those_that_raise() -> None:
    watch = metrics.Stopwatch()
    with watch.running():
        pass
    first = watch.seconds
    with pytest.raises(KeyError), watch.running():
        raise KeyError
    assert watch.seconds > first > 0


def test_the_folder_of_the_dashboard_is_mounted_where_grafana_is_told_to_look() -> None:
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounts = dict(re.findall(r"-v \$PWD/(\S+):(\S+)", (FOLDER / "README.md").read_text()))
    assert mounts["cluster/grafana/lemon.json"] == f"{provider['options']['path']}/lemon.json"
    assert {Path(name).name for name in mounts} == {path.name for path in (FOLDER / "grafana").iterdir()}
