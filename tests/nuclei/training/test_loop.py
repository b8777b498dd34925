from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from lemon.nuclei.hoverfast import Architecture, HoverFastNet
from lemon.nuclei.training.blocked import use_blocks
from lemon.nuclei.training.loop import Recipe, SegmenterTrainer, TrainingStoppedError
from lemon.nuclei.training.loss import HoverFastLoss
from lemon.nuclei.training.windows import Bank
from tests.nuclei.training.made_up import labelled

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Architecture(depth=2, wf=2)


def trainer(*, seed: int = 0, log: list[Mapping[str, float]] | None = None, **recipe: float) -> SegmenterTrainer:
    torch.manual_seed(seed)
    bank = Bank.of([labelled(size_px=128, seed=s) for s in range(2)], device="cpu")
    settings = Recipe(**{"steps": 30, "batch": 2, "window_px": 64, "warmup_steps": 3, "learning_rate": 1e-2, **recipe})  # type: ignore[arg-type]
    told = None if log is None else lambda metrics, step: log.append({**metrics, "step": step})
    return SegmenterTrainer(HoverFastNet(TINY), bank, settings, HoverFastLoss((0.4, 0.6)), log=told, log_every=5)


def test_the_loss_falls() -> None:
    log: list[Mapping[str, float]] = []
    trainer(log=log).run(until=30)
    assert [m["step"] for m in log] == [5, 10, 15, 20, 25, 30]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["lr"] == 0


@pytest.mark.slow
def test_a_run_that_stops_and_goes_on_equals_one_that_did_not() -> None:
    whole, first = trainer(), trainer()
    whole.run(until=30)
    first.run(until=15)
    state = first.state()
    second = trainer(seed=9)
    second.load_state(state)
    second.run(until=30)
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, second.averaged.state_dict()[name]), name


def test_averaged_weights_lag_behind_the_newest() -> None:
    run = trainer(steps=3)
    start = run.averaged.last.weight.clone()
    run.run(until=3)
    new, mean = run.net.last.weight.detach(), run.averaged.last.weight
    assert not torch.equal(mean, new)
    assert (mean - new).norm() < (start - new).norm()


def test_a_loss_that_is_not_finite_stops_training() -> None:
    run = trainer()
    with torch.no_grad():
        run.net.last.bias.fill_(torch.nan)
    with pytest.raises(TrainingStoppedError, match="nan before step 5"):
        run.run(until=30)


def test_a_network_in_blocks_computes_the_same_with_the_same_parameters() -> None:
    torch.manual_seed(0)
    net = HoverFastNet(Architecture()).double().eval()
    images = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    names, expected = list(net.state_dict()), net(images)
    use_blocks(net, max_channels=32, kernels=(3, 7))
    assert list(net.state_dict()) == names
    for ours, theirs in zip(net(images), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_network_in_training_form_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in HoverFastNet(Architecture()).parameters()) == 947_732
