"""What programs may use of LEMON: it is all there, light to import, and works with arrays and plain values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lemon
from lemon.slides.synthetic import SyntheticTissue, make_tissue, write_pyramid

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tissue() -> SyntheticTissue:
    return make_tissue(512, seed=0)


def test_every_public_name_is_there_and_is_listed() -> None:
    assert lemon.__all__ == sorted(lemon.__all__)
    assert set(lemon.__all__) == {*lemon._PLACES, "__version__"}
    for name in lemon.__all__:
        assert getattr(lemon, name) is not None
        assert name in dir(lemon)


def test_every_public_function_says_what_it_takes() -> None:
    for name in set(lemon.__all__) - {"__version__"}:
        assert getattr(lemon, name).__doc__, name


def test_names_are_listed_before_anything_is_imported() -> None:
    code = (
        "import sys, lemon; assert set(lemon.__all__) <= set(dir(lemon));"
        "assert not {'torch', 'ray', 'mlflow', 'numpy', 'pydantic'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = lemon.no_such_name


def test_types_are_told_to_type_checkers() -> None:
    assert (Path(lemon.__file__).parent / "py.typed").exists()


def test_a_slide_gives_nuclei_crops_and_vectors(tmp_path: Path, tissue: SyntheticTissue) -> None:
    write_pyramid(tmp_path / "slide.tiff", tissue.image, mpp=0.25)
    with lemon.open_slide(tmp_path / "slide.tiff") as slide:
        image = slide.region(0, 0, width_px=512, height_px=512)
        assert "512 x 512 px at 0.25 um/px" in repr(slide)
    nuclei = lemon.segment(image)
    found = np.array([nucleus.centroid_px for nucleus in nuclei])
    distance = np.linalg.norm(found[:, None] - tissue.center_px[None], axis=2).min(axis=0)
    assert (distance < 6).mean() > 0.9  # the drawn nuclei are found
    cells = lemon.crop(image, nuclei)
    assert (cells.dtype, cells.shape) == (np.uint8, (len(nuclei), 60, 60, 3))
    encoder = lemon.load_encoder("lemon_mini")
    vectors = encoder.embed(cells)
    assert (vectors.dtype, tuple(vectors.shape)) == (torch.float32, (len(nuclei), encoder.width))
    assert set(lemon.measure(image, nuclei)) == {"area_um2", "eccentricity", "solidity", "hematoxylin_od_mean"}


def test_a_crop_is_centred_on_its_centroid_and_white_beyond_the_image() -> None:
    image = np.zeros((100, 120, 3), np.uint8)
    image[40:42, 70:72] = 200  # its centre lies at (70.5, 40.5)
    (inside, corner) = lemon.crop(image, np.array([[70.5, 40.5], [0.0, 0.0]]))
    assert np.argwhere(inside[..., 0]).tolist() == [[29, 29], [29, 30], [30, 29], [30, 30]]
    assert (corner[:29] == 255).all()
    assert (corner[31:, 31:] == 0).all()
    assert lemon.crop(image, []).shape == (0, 60, 60, 3)


def test_a_segmenter_is_opened_once_for_many_images(tissue: SyntheticTissue) -> None:
    large = lemon.load_segmenter("hematoxylin", min_area_um2=60.0)
    few, all_of_them = (lemon.segment(tissue.image, segmenter=each) for each in (large, "hematoxylin"))
    assert len(few) < len(all_of_them)
    pale = lemon.segment(tissue.image, samples=[tissue.image, tissue.image[:256]])
    assert abs(len(pale) - len(all_of_them)) < 0.2 * len(all_of_them)


def test_hoverfast_is_a_name_of_a_segmenter(tissue: SyntheticTissue) -> None:
    nuclei = lemon.segment(tissue.image[:256, :256], segmenter="hoverfast")
    assert nuclei
    assert all(nucleus.contour_px.shape[1] == 2 for nucleus in nuclei)


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((64, 64), np.uint8), r"uint8 \[64, 64\]"),
        (np.zeros((64, 64, 4), np.uint8), r"uint8 \[64, 64, 4\]"),
        (np.zeros((64, 64, 3), np.float32), r"float32 \[64, 64, 3\]"),
        ("slide.svs", "str"),
    ],
)
def test_an_image_of_another_kind_is_refused(image: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"^image: got {got}; expected RGB at 0.25 um/px"):
        lemon.segment(image)  # type: ignore[arg-type]


def test_an_unknown_segmenter_or_setting_is_one_line() -> None:
    expected = "auto, cellvit, hematoxylin, hoverfast, instanseg, stardist"
    with pytest.raises(lemon.ConfigError, match=rf"^segmenter: got 'hoverfst'; expected one of {expected}"):
        lemon.load_segmenter("hoverfst")
    with pytest.raises(lemon.ConfigError, match="batch: unknown key"):
        lemon.load_segmenter("hematoxylin", batch=2)
    with pytest.raises(lemon.ConfigError, match=r"absent\.pth"):
        lemon.load_segmenter("hoverfast", checkpoint="absent.pth")


@pytest.mark.parametrize(
    ("nuclei", "told"),
    [
        (np.array([[130.0, 5.0]]), r"centroid at \(130, 5\); expected px of the image, 120 x 100"),
        (np.array([[np.nan, 5.0]]), r"centroid at \(nan, 5\)"),
        (np.zeros((3, 3)), r"array \[3, 3\]; expected centroids \[N, 2\]"),
    ],
)
def test_centroids_of_another_kind_are_refused(nuclei: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lemon.crop(np.zeros((100, 120, 3), np.uint8), nuclei)


def test_views_losses_and_probes_take_arrays_of_cells(tissue: SyntheticTissue) -> None:
    cells = lemon.crop(tissue.image, lemon.segment(tissue.image))
    policy, generator = lemon.load_policy("a1_gray"), torch.Generator().manual_seed(0)
    views = lemon.make_views(torch.from_numpy(cells), policy=policy, generator=generator)
    assert [tuple(view.shape) for view in views] == [(len(cells), 3, 40, 40)] * 2
    vectors = lemon.load_encoder("lemon_mini").embed(cells)
    assert lemon.losses.moco_contrastive(vectors, vectors, temperature=0.2).isfinite()
    labels = (np.arange(len(cells)) % 2).astype(int)
    fitted = lemon.probes.fit_neighbours(vectors.numpy(), labels)
    assert fitted.model.predict(vectors.numpy()).shape == (len(cells),)


def test_an_encoder_says_in_two_lines_what_it_is_and_what_embed_gives() -> None:
    first, second = repr(lemon.load_encoder("lemon_mini")).splitlines()
    assert first == "Encoder 'lemon_mini': 2.7 M parameters on cpu"
    assert second == "  embed(uint8 [N, 60, 60, 3], RGB at 0.25 um/px) -> torch.float32 [N, 192]"


def test_the_card_of_lemon_mini_is_of_these_weights() -> None:
    card = Path(lemon.__file__).parent / "encoders" / "released" / "lemon_mini" / "README.md"
    assert lemon.load_encoder("lemon_mini").fingerprint in card.read_text()
