from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lemon.nuclei.hoverfast import Architecture, HoverFast, HoverFastNet, load_checkpoint
from lemon.nuclei.training import (
    HoverFastLoss,
    Tiles,
    class_weights_of,
    gradient_kernel,
    make_targets,
    read_pair,
    train,
)

TINY = Architecture(depth=2, wf=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiles this small gain nothing from threads, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blobs(*, size_px: int = 64, seed: int = 0) -> np.ndarray:
    """Instance map int32 of discs on a jittered grid, some cut by the border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size_px, :size_px]
    instances = np.zeros((size_px, size_px), np.int32)
    label = 0
    for cy in range(0, size_px, 22):
        for cx in range(0, size_px, 22):
            label += 1
            jx, jy, radius = rng.uniform(-2, 2), rng.uniform(-2, 2), rng.uniform(5, 8)
            instances[(x - cx - jx) ** 2 + (y - cy - jy) ** 2 <= radius**2] = label
    return instances


def stored_pair(folder: Path, *, seed: int = 0, size_px: int = 64) -> tuple[Path, Path]:
    """An image, dark where nuclei are, and its instance map."""
    instances = blobs(seed=seed, size_px=size_px)
    image = np.where(instances[..., None] > 0, (110, 70, 140), (235, 200, 220)).astype(np.uint8)
    paths = folder / f"{seed}.png", folder / f"{seed}_inst.npz"
    Image.fromarray(image).save(paths[0])
    np.savez_compressed(paths[1], inst_map=instances.astype(np.uint16))
    return paths


def test_maps_run_from_minus_one_to_one_across_each_nucleus() -> None:
    instances = blobs()
    targets = make_targets(instances)
    assert targets.hv_maps.min() == -1
    assert targets.hv_maps.max() == 1
    assert (targets.hv_maps[:, instances == 0] == 0).all()
    inside = [n for n in np.unique(instances) if n and (targets.weight[instances == n] == 1).all()]
    assert len(inside) >= 4
    for label in inside:
        ys, xs = np.nonzero(instances == label)
        horizontal, vertical = targets.hv_maps[:, ys, xs]
        assert (horizontal[xs == xs.min()] == -1).all()
        assert (horizontal[xs == xs.max()] == 1).all()
        assert (vertical[ys == ys.min()] == -1).all()
        assert (vertical[ys == ys.max()] == 1).all()
        assert np.corrcoef(horizontal, xs)[0, 1] > 0.999


def test_maps_of_a_mirrored_tile_are_mirrored_and_change_sign() -> None:
    instances = blobs()
    plain, mirrored = make_targets(instances), make_targets(np.ascontiguousarray(instances[:, ::-1]))
    assert np.allclose(mirrored.hv_maps[0], -plain.hv_maps[0][:, ::-1], atol=1e-6)
    assert np.allclose(mirrored.hv_maps[1], plain.hv_maps[1][:, ::-1], atol=1e-6)


def test_maps_of_a_transposed_tile_change_places() -> None:
    instances = blobs()
    plain, turned = make_targets(instances), make_targets(np.ascontiguousarray(instances.T))
    assert np.allclose(turned.hv_maps, plain.hv_maps[::-1].transpose(0, 2, 1), atol=1e-6)


def test_nuclei_that_the_border_cuts_weigh_nothing() -> None:
    instances = blobs()
    targets = make_targets(instances)
    cut = set(np.unique(np.concatenate([instances[0], instances[-1], instances[:, 0], instances[:, -1]]))) - {0}
    assert cut
    assert np.array_equal(targets.weight == 0, np.isin(instances, list(cut)))
    assert (targets.hv_maps[:, targets.weight == 0] == 0).all()


def test_edges_are_the_background_around_nuclei() -> None:
    targets = make_targets(blobs())
    assert targets.edge.any()
    assert not (targets.edge & targets.mask).any()
    lonely = np.zeros((11, 11), np.int32)
    lonely[5, 5] = 1
    assert make_targets(lonely).edge.sum() == 24
    assert (make_targets(lonely).hv_maps == 0).all()  # one pixel has no sides


def test_targets_need_an_integer_map() -> None:
    with pytest.raises(ValueError, match="integer"):
        make_targets(np.zeros((4, 4)))


def perfect(instances: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Outputs that say exactly what the targets say, and the targets as a batch of one."""
    targets = make_targets(instances)
    mask = torch.from_numpy(targets.mask).long()[None]
    logits = 40.0 * (torch.stack((1 - mask, mask), dim=1) - 0.5)
    batch = {
        "mask": mask,
        "hv_maps": torch.from_numpy(targets.hv_maps)[None],
        "weight": torch.from_numpy(targets.weight)[None],
        "edge": torch.from_numpy(targets.edge)[None],
    }
    return logits, batch["hv_maps"].clone(), batch


def test_every_term_of_the_loss_vanishes_at_the_targets_and_only_there() -> None:
    logits, hv_maps, batch = perfect(blobs())
    criterion = HoverFastLoss((0.3, 0.7))
    assert all(abs(term.item()) < 1e-4 for term in criterion(logits, hv_maps, batch).values())
    worse = criterion(
        -logits, hv_maps + 0.1 * torch.randn(hv_maps.shape, generator=torch.Generator().manual_seed(0)), batch
    )
    assert all(term.item() > 1e-2 for name, term in worse.items() if name != "gradients")
    assert worse["gradients"].item() > 1e-4


def test_the_maps_of_cut_nuclei_do_not_count() -> None:
    logits, hv_maps, batch = perfect(blobs())
    hv_maps[:, :, batch["weight"][0] == 0] = 5.0
    assert HoverFastLoss((0.5, 0.5))(logits, hv_maps, batch)["maps"].item() == 0


def test_the_terms_have_the_published_weights() -> None:
    instances = np.zeros((16, 16), np.int32)
    instances[4:12, 4:12] = 1
    _, hv_maps, batch = perfect(instances)
    terms = HoverFastLoss((1.0, 1.0))(torch.zeros(1, 2, 16, 16), hv_maps + 1, batch)
    assert terms["maps"].item() == pytest.approx(14.0)
    edges = batch["edge"].float().mean().item()
    assert terms["cross_entropy"].item() == pytest.approx(np.log(2) * (1 + 0.1 * edges))
    overlap, truth, said = 0.5 * 64, 64, 0.5 * 256
    assert terms["dice"].item() == pytest.approx((1 - 2 * overlap / (truth + said)) / 6, rel=1e-4)


def test_the_gradient_kernel_is_odd_along_its_axis() -> None:
    kernel = gradient_kernel(11)
    assert kernel.shape == (11, 11)
    assert torch.equal(kernel.flip(1), -kernel)
    assert torch.equal(kernel.flip(0), kernel)
    assert kernel[5, 6] == 1
    assert kernel[6, 6] == 0.5


def test_class_weights_are_inverse_frequencies(tmp_path: Path) -> None:
    pairs = [stored_pair(tmp_path, seed=seed) for seed in range(2)]
    share = np.mean([blobs(seed=seed) > 0 for seed in range(2)])
    background, nucleus = class_weights_of(pairs)
    assert background == pytest.approx(share)
    assert nucleus == pytest.approx(1 - share)


def test_windows_turn_image_and_map_alike_and_repeat_for_a_seed(tmp_path: Path) -> None:
    tiles = Tiles([stored_pair(tmp_path)], size_px=48, seed=3)
    seen = []
    for tiles.epoch in range(6):
        item, again = tiles[0], tiles[0]
        assert torch.equal(item["image"], again["image"])
        dark = item["image"][0] < 0.6
        assert torch.equal(dark, item["mask"].bool())
        seen.append(item["image"])
    assert len({image.numpy().tobytes() for image in seen}) > 3


def test_an_image_smaller_than_the_window_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="smaller than the window"):
        Tiles([stored_pair(tmp_path)], size_px=65, seed=0)[0]


def test_a_map_of_another_size_than_its_image_is_named(tmp_path: Path) -> None:
    image, instances = stored_pair(tmp_path)
    np.savez_compressed(instances, inst_map=np.zeros((5, 5), np.uint16))
    with pytest.raises(ValueError, match="size of its image"):
        read_pair(image, instances)
    np.savez_compressed(instances, other=np.zeros((5, 5), np.uint16))
    with pytest.raises(ValueError, match="inst_map"):
        read_pair(image, instances)


def test_the_loss_falls_on_one_tile_and_the_checkpoint_opens(tmp_path: Path) -> None:
    pair = stored_pair(tmp_path)
    output = tmp_path / "run/net.pth"
    told: list[tuple[int, float, float]] = []
    losses = train(
        [pair] * 2, output=output, validation=[pair], architecture=TINY, epochs=12, batch=2, tile_px=64, device="cpu",
        learning_rate=1e-2, on_epoch=lambda *figures: told.append(figures),
    )  # fmt: skip
    assert len(losses) == len(told) == 12
    assert losses[-1] < 0.7 * losses[0]
    stored = torch.load(output, weights_only=True)
    assert stored["best_loss_on_test"] == min(figures[2] for figures in told)
    net = load_checkpoint(output)
    assert net.architecture == TINY
    image, _ = read_pair(*pair)
    (prediction,) = HoverFast(str(output), device="cpu", batch=1).predict(image[None])
    with torch.inference_mode():
        logits, _ = net(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    assert np.array_equal(prediction.mask, logits[0].argmax(0).bool().numpy())
    assert not list(tmp_path.rglob("*.partial"))


def test_training_repeats_for_a_seed(tmp_path: Path) -> None:
    pairs = [stored_pair(tmp_path, seed=seed) for seed in range(3)]
    runs = [
        train(
            pairs,
            output=tmp_path / f"{run}.pth",
            architecture=TINY,
            epochs=2,
            batch=2,
            tile_px=48,
            device="cpu",
            seed=5,
        )
        for run in range(2)
    ]
    assert runs[0] == runs[1]


def test_training_needs_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        train([], output=tmp_path / "net.pth")


def test_a_network_in_training_form_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in HoverFastNet(Architecture()).parameters()) == 947_732
