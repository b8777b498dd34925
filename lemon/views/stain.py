"""Stain augmentation: Reinhard's transfer to templates drawn from a Gaussian mixture (RandStainNA and its GMM variant).

Sources: Reinhard et al. (2001), Color transfer between images; Shen et al. (2022), RandStainNA (arXiv 2206.12694); the
LEMON paper's gmm1 and gmm10 policies. A template is a 6-vector, three channel means and three channel standard
deviations of an image in LAB, HSV or HED; the mixture is fitted to those of the training cells.

DEVIATION: the original can draw a negative standard deviation, which inverts a channel; here it is clamped. It rescales
HED image by image; here HED keeps scikit-image's scale. Its hue is clipped at 0 and 255; here it wraps at 180.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError

from lemon.errors import ConfigError, DamagedError
from lemon.views.colorspace import SPACES, Space, from_space, to_space
from lemon.views.images import check_images

FIT_CHUNK = 1024
"""Images converted at a time by the fit: 90 MB of float32 at 60 px."""
_FLAT_STD = 1e-6
"""Below this a channel is constant; dividing by it would only scale rounding errors."""
_SMALLEST_STD_SHARE = 0.1
"""A drawn standard deviation is at least this share of its component's mean, so no draw flattens or inverts a cell."""


class StainDraw(NamedTuple):
    """One draw of stain parameters a sample: templates for Reinhard, perturbations for Macenko."""

    apply: torch.Tensor  # [B] bool: samples that are recoloured
    shift: torch.Tensor  # [B, 3] target means, or [B, 2] shifts of the concentrations
    scale: torch.Tensor  # [B, 3] target standard deviations, or [B, 2] factors of the concentrations


def image_statistics(images_u8: torch.Tensor, *, space: Space) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel means and (population) standard deviations of each image.

    Args:
        images_u8: [B, H, W, 3] uint8 RGB.
        space: ``lab`` or ``hsv`` (OpenCV's 8-bit scale) or ``hed`` (skimage.color.rgb2hed's scale).

    Returns:
        means and standard deviations, each [B, 3] float32.
    """
    check_images(images_u8)
    _, mean, std = _centred(images_u8, space=space)
    return mean, std


def reinhard(
    images_u8: torch.Tensor, *, space: Space, target_mean: torch.Tensor, target_std: torch.Tensor
) -> torch.Tensor:
    """Give each image the channel means and standard deviations of its target: (x - mean) * (t_std / std) + t_mean.

    Args:
        images_u8: [B, H, W, 3] uint8 RGB.
        space: where the transfer happens: ``lab``, ``hsv`` or ``hed``.
        target_mean, target_std: [B, 3], in OpenCV's 8-bit scale for LAB and HSV (hue 0 to 180), in
            skimage.color.rgb2hed's scale for HED.

    Returns:
        [B, H, W, 3] uint8 RGB on the images' device. A constant channel takes the target's mean.

    Raises:
        ValueError: for images or targets of another shape or type, or an unknown space.
    """
    check_images(images_u8)
    count = images_u8.shape[0]
    mean, std = (torch.as_tensor(t).to(images_u8.device, torch.float32) for t in (target_mean, target_std))
    for name, target in (("target_mean", mean), ("target_std", std)):
        if tuple(target.shape) != (count, 3):
            raise ValueError(f"{name}: got shape {list(target.shape)}; expected [{count}, 3], one row an image")
    everywhere = torch.ones(count, dtype=torch.bool, device=images_u8.device)
    return recolor(images_u8, [StainDraw(everywhere, mean, std)], space=space)[0]


def recolor(images_u8: torch.Tensor, draws: Sequence[StainDraw], *, space: Space) -> list[torch.Tensor]:
    """Reinhard's transfer of the same images to several draws; the conversion and statistics are shared.

    Images [B, H, W, 3] uint8 -> one such tensor a draw; samples whose ``apply`` is False come back unchanged.
    """
    centred, _, std = _centred(images_u8, space=space)
    recolored = []
    for draw in draws:
        ratio = draw.scale / std.clamp_min(_FLAT_STD)
        rgb = from_space(centred * ratio[:, :, None] + draw.shift[:, :, None], space=space)
        channels_last = rgb.permute(0, 2, 1).reshape(images_u8.shape)
        recolored.append(torch.where(draw.apply[:, None, None, None], channels_last, images_u8))
    return recolored


def _centred(images_u8: torch.Tensor, *, space: Space) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values less their mean [B, 3, P], the means [B, 3] and the standard deviations [B, 3]."""
    planar = images_u8.flatten(1, 2).transpose(1, 2).contiguous()  # [B, 3, P]
    values = to_space(planar, space=space)
    mean = values.mean(dim=2)
    centred = values.sub_(mean[:, :, None])
    return centred, mean, centred.square().mean(dim=2).sqrt()


def statistics_name(space: str, components: int) -> str:
    """Name of a file of statistics beside a cells table, as ``stain_lab_gmm10.json``."""
    return f"stain_{space}_gmm{components}.json"


@dataclass(frozen=True, eq=False)
class StainStatistics:
    """A Gaussian mixture of K components over templates (three channel means, then three standard deviations)."""

    space: Space
    components: int
    weights: list[float]  # K, summing to 1
    means: list[list[float]]  # K x 6
    covariances: list[list[list[float]]]  # K x 6 x 6
    n_cells: int
    cells: str = ""
    """Fingerprint of the whole table that they were fitted to; empty where it is not known."""

    @property
    def fingerprint(self) -> str:
        """A hash of all numbers, by which a run names the statistics that it used."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file_name(self) -> str:
        """The name under which it lies beside a cells table, as ``stain_lab_gmm10.json``."""
        return statistics_name(self.space, self.components)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, atomically; ``path`` is local or s3://."""
        from lemon.runtime.store import locate

        store, name = locate(path)
        store.write_json(name, asdict(self) | {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StainStatistics:
        """Read what ``save`` wrote. Raises ValueError, one line, for a missing, unreadable or altered file."""
        from lemon.runtime.store import locate

        remedy = "fit it with `lemon fit-stain cells=...`"
        store, name = locate(path)
        try:
            fields = store.read_json(name)
            fingerprint = fields.pop("fingerprint", None)
            statistics = TypeAdapter(cls).validate_python(fields)
        except FileNotFoundError:
            raise ConfigError(f"stain statistics {path}: no such file; {remedy}") from None
        except (DamagedError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"stain statistics {path}: not a statistics file ({reason}); {remedy}") from None
        if statistics.fingerprint != fingerprint:
            raise ConfigError(f"stain statistics {path}: altered since it was fitted; {remedy}")
        return statistics


def fit_stain_statistics(images_u8: torch.Tensor, *, space: Space, components: int, seed: int) -> StainStatistics:
    """Fit a Gaussian mixture to the channel means and standard deviations of training cells.

    The six columns are standardised for the fit and the result is scaled back, so that scikit-learn's k-means start and
    regularisation treat a hue and a HED density alike.

    Args:
        images_u8: [N, 60, 60, 3] uint8 RGB.
        space: colour space of the statistics.
        components: Gaussians in the mixture; the paper uses 1 and 10.
        seed: of scikit-learn's initialisation.

    Raises:
        ValueError: for images of another kind, or fewer than 10 a component.
    """
    from sklearn.mixture import GaussianMixture

    check_images(images_u8)
    if space not in SPACES:
        raise ValueError(f"space: got {space!r}; expected one of {', '.join(SPACES)}")
    if components < 1 or len(images_u8) < 10 * components:
        raise ValueError(
            f"components: got {components} for {len(images_u8)} cells; expected 1 to {len(images_u8) // 10}"
        )
    chunks = [torch.cat(image_statistics(chunk, space=space), dim=1) for chunk in images_u8.split(FIT_CHUNK)]
    templates = torch.cat(chunks).double().cpu().numpy()  # [N, 6]
    centre, unit = templates.mean(axis=0), templates.std(axis=0).clip(min=_FLAT_STD)
    mixture = GaussianMixture(components, covariance_type="full", random_state=seed).fit((templates - centre) / unit)
    return StainStatistics(
        space=space,
        components=components,
        weights=mixture.weights_.tolist(),
        means=(mixture.means_ * unit + centre).tolist(),
        covariances=(mixture.covariances_ * unit[:, None] * unit[None, :]).tolist(),
        n_cells=len(images_u8),
    )


class _Mixture(NamedTuple):
    upper: torch.Tensor  # [K] cumulative weights
    means: torch.Tensor  # [K, 6]
    roots: torch.Tensor  # [K, 6, 6] Cholesky factors


@lru_cache(maxsize=16)
def _mixture(statistics: StainStatistics, device: torch.device) -> _Mixture:
    """The mixture as tensors, copied to the device once."""
    roots = torch.linalg.cholesky(torch.tensor(statistics.covariances, dtype=torch.float64))
    upper = torch.tensor(statistics.weights, dtype=torch.float64).cumsum(0)
    means = torch.tensor(statistics.means, dtype=torch.float64)
    return _Mixture(*(part.float().to(device) for part in (upper, means, roots)))


def draw_templates(
    statistics: StainStatistics, *, count: int, p: float, generator: torch.Generator, device: torch.device
) -> StainDraw:
    """One template an image from the mixture; an image takes its template with probability ``p``.

    All draws come from ``generator``, which lives on ``device``. Nothing waits for the device.
    """
    mixture = _mixture(statistics, device)
    uniform = torch.rand(count, 2, generator=generator, device=device)
    normal = torch.randn(count, 6, generator=generator, device=device)
    component = (uniform[:, :1] >= mixture.upper[:-1]).sum(dim=1)  # [B]
    offset = (mixture.roots[component] * normal[:, None, :]).sum(dim=2)  # [B, 6]; a sum, so TF32 cannot coarsen it
    centre = mixture.means[component]
    template = centre + offset
    std = torch.maximum(template[:, 3:], _SMALLEST_STD_SHARE * centre[:, 3:])
    return StainDraw(apply=uniform[:, 1] < p, shift=template[:, :3], scale=std)
