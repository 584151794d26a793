"""The 2-D laboratory: mixtures of Gaussians, where p_t (3), u_t (6) and loss (7) are exact.

Here a trained network is compared with the truth, not with another network: relative excess,
paired energy distance, mode counts. Also the small network, and the pictures. Time: t = 0 is data,
t = 1 is noise. All of the mixture's arithmetic is float64 inside, whatever comes in; results come
back in the dtype of z. Read next: `train.py`, which trains on these mixtures, and `study.py`,
which compares the 61 formulations on them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path as File
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from rf import Field, Formulation, Path, RectifiedFlow, solve

# --------------------------------------------------------------------------------------------------
# The data, and everything that is exactly known of it


class GaussianMixture:
    """x0 ~ sum_k w_k N(mu_k, Sigma_k): means (K,2), covs (K,2,2), weights (K,), tensors or lists.

    The weights are normalised. ValueError on shapes that do not fit, non-finite numbers, weights
    that are not positive, and matrices that are no covariance. A label is a component's index;
    label K (null) means all of them. It lives on the CPU, and so does what is asked of it.
    """

    def __init__(self, means, covs, weights):
        try:
            self.means, self.covs, weights = (
                torch.as_tensor(x, dtype=torch.float64) for x in (means, covs, weights)
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"means, covs and weights must be arrays of numbers: {error}"
            ) from None
        shapes = [tuple(x.shape) for x in (self.means, self.covs, weights)]
        K = weights.numel()
        if K == 0 or shapes != [(K, 2), (K, 2, 2), (K,)]:
            raise ValueError(
                f"means, covs, weights must be (K,2), (K,2,2), (K,), got {str(shapes)[1:-1]}"
            )
        if (
            not all(x.isfinite().all() for x in (self.means, self.covs, weights))
            or not (weights > 0).all()
        ):
            raise ValueError("means and covs must be finite and weights positive")
        self.weights = weights / weights.sum()
        self.variances, self.axes = torch.linalg.eigh(
            self.covs
        )  # Sigma_k = U_k diag(s_k) U_k^T: (K,2), (K,2,2)
        if (
            not torch.allclose(self.covs, self.covs.mT)
            or (self.variances < -1e-12 * self.covs.abs().max()).any()
        ):
            raise ValueError("covs must be symmetric and positive semi-definite")
        self.variances = self.variances.clamp(min=1e-200)  # of a point: no 0/0 at t = 0

    def standardized(self) -> GaussianMixture:
        """The same mixture at mean 0 and unit standard deviation (one scale for both axes)."""
        mean = self.weights @ self.means
        var = self.weights @ (((self.means - mean) ** 2).sum(1) + self.variances.sum(1)) / 2
        return GaussianMixture((self.means - mean) / var.sqrt(), self.covs / var, self.weights)

    def component(self, label: int) -> GaussianMixture:
        """One component alone: what a class-conditional model draws for this label."""
        return GaussianMixture(self.means[[label]], self.covs[[label]], self.weights[[label]])

    def spec(self) -> dict[str, list]:
        """Plain lists, from which the constructor makes the same mixture again."""
        return {
            "means": self.means.tolist(),
            "covs": self.covs.tolist(),
            "weights": self.weights.tolist(),
        }

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (n,2) in float32 and the components they came from (n,)."""
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        xi = torch.randn(n, 1, 2, generator=generator)
        factors = self.axes * self.variances.sqrt()[:, None]  # (K,2,2), U sqrt(s)
        return self.means.float()[labels] + (factors.float()[labels] * xi).sum(-1), labels

    def _components(self, z: Tensor, t: Tensor, path: Path) -> tuple[Tensor, ...]:
        """Each component of p_t, N(a mu_k, a^2 Sigma_k + b^2 I): log density, offset, variances."""
        a, b, _, _ = path.coefficients(t.double().reshape(-1, 1, 1))  # (B,1,1) or (1,1,1)
        offset = torch.einsum(
            "bki,kij->bkj", z.double()[:, None] - a * self.means, self.axes
        )  # (B,K,2)
        var = a**2 * self.variances + b**2
        log_p = -0.5 * (offset**2 / var + torch.log(2 * math.pi * var)).sum(-1)  # (B,K)
        return log_p, offset, var, a, b

    def log_density(self, z: Tensor, t: Tensor, path: Path) -> Tensor:
        """(3): log p_t(z), (B,), for z (B,2) and t (B,) or ()."""
        log_p = self._components(z, t, path)[0]
        return torch.logsumexp(log_p + self.weights.log(), dim=1).to(z.dtype)

    def ends(
        self, z: Tensor, t: Tensor, path: Path, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[x0 | z_t = z] and E[eps | z_t = z], (B,2) each; given labels (B,), of those modes."""
        log_p, offset, var, a, b = self._components(z, t, path)
        log_r = log_p + self.weights.log()
        if labels is not None:
            K = len(self.weights)
            others = (labels[:, None] != torch.arange(K)) & (labels[:, None] != K)
            log_r = log_r.masked_fill(others, -torch.inf)
        r = torch.softmax(log_r, dim=1)  # (B,K), p(k | z)
        # E[x0 | z, k] = mu + a Sigma C^-1 (z - a mu) and E[eps | z, k] = b C^-1 (z - a mu), C =
        # a^2 Sigma + b^2 I
        x0 = (
            torch.einsum("bk,bkj,kij->bi", r, a * self.variances * offset / var, self.axes)
            + r @ self.means
        )
        eps = torch.einsum("bk,bkj,kij->bi", r, b * offset / var, self.axes)
        return x0.to(z.dtype), eps.to(z.dtype)

    def velocity(self, z: Tensor, t: Tensor, path: Path, labels: Tensor | None = None) -> Tensor:
        """(6): u_t(z) = E[a' x0 + b' eps | z_t = z], (B,2). Never divides by a."""
        _, _, da, db = path.coefficients(t.double().reshape(-1, 1))
        x0, eps = self.ends(z.double(), t, path, labels)
        return (da * x0 + db * eps).to(z.dtype)

    def field(self, path: Path) -> Field:
        """The exact velocity field v(z, t, *labels) on this path."""
        return lambda z, t, *labels: self.velocity(z, t, path, *labels)


def _ring() -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    means = 4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(
        means, 0.3**2 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2), torch.ones(8)
    )


def _grid() -> GaussianMixture:
    means = 2 * torch.cartesian_prod(*[torch.arange(-2.0, 3, dtype=torch.float64)] * 2)
    return GaussianMixture(
        means, 0.15**2 * torch.eye(2, dtype=torch.float64).expand(25, 2, 2), torch.ones(25)
    )


def _spiral() -> GaussianMixture:
    """Twelve elongated components along a spiral, the outer ones longer and heavier."""
    k = torch.arange(12, dtype=torch.float64)
    angle = 2 * math.pi * torch.sqrt((k + 1) / 6)
    radius = angle / 2
    along = torch.stack(
        [angle.cos() - angle * angle.sin(), angle.sin() + angle * angle.cos()], dim=1
    )
    along = along / along.norm(dim=1, keepdim=True)
    across = along.flip(1) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    length, width = 0.25 + 0.05 * k, 0.16
    covs = (length**2)[:, None, None] * along[:, :, None] * along[:, None]
    covs = covs + width**2 * across[:, :, None] * across[:, None]
    return GaussianMixture(
        radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1), covs, 1 + k / 4
    )


MIXTURES = {"ring": _ring, "grid": _grid, "spiral": _spiral}


def load_mixture(name: str) -> GaussianMixture:
    """A named mixture, standardized, or FILE.json (means, covs, weights), taken as it is.

    ValueError where the name is unknown, the file missing or its content no mixture.
    """
    if name in MIXTURES:
        return MIXTURES[name]().standardized()
    if not name.endswith(".json"):
        raise ValueError(
            f"unknown mixture {name!r}; choose from {', '.join(MIXTURES)}, or give a FILE.json"
        )
    try:
        return GaussianMixture(**json.loads(File(name).read_text()))
    except OSError as error:
        raise ValueError(f"mixture {name}: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"mixture {name}: {error}; it needs means (K,2), covs (K,2,2), weights (K,)"
        ) from None


# --------------------------------------------------------------------------------------------------
# The network


class MLP(nn.Module):
    """Three hidden layers of 64: forward(z (B,2), t (B,)[, labels (B,)]) -> (B,2).

    t enters as sin and cos of pi k t, k = 1..3; z times 6, so that the first layer resolves the
    modes. With `classes` > 0 a learned vector per class, and one for the null label `classes`,
    joins the first layer.
    """

    def __init__(self, classes: int = 0, width: int = 64, frequencies: int = 3):
        super().__init__()
        self.null_cond = (torch.tensor(classes),) if classes else ()
        self.register_buffer("omega", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        self.input = nn.Linear(2 + 2 * frequencies, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.body = nn.Sequential(
            *(
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2),
            )
        )

    def forward(self, z: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        angle = t[:, None] * self.omega  # (B,3)
        h = self.input(torch.cat([6 * z, angle.sin(), angle.cos()], dim=1))  # (B,8) -> (B,64)
        if self.label is None:
            return self.body(h)
        labels = labels or (torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.long),)
        return self.body(h + self.label(*labels))  # no labels are null labels


# --------------------------------------------------------------------------------------------------
# Yardsticks


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x-y| - E|x-x'| - E|y-y'| of (n,2) and (m,2): no bias, no root, maybe below 0."""
    n, m = len(x), len(y)
    return 2 * _total(x, y) / (n * m) - _total(x, x) / (n * (n - 1)) - _total(y, y) / (m * (m - 1))


def _total(x: Tensor, y: Tensor) -> float:
    """The sum of |x_i - y_j| over all pairs."""
    x, y = x.double(), y.double()
    return sum(
        torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").sum().item()
        for rows in x.split(128)
    )


def mahalanobis(x: Tensor, mixture: GaussianMixture) -> Tensor:
    """The distance of x (n,2) from each mode in its own standard deviations, (n,K)."""
    offset = torch.einsum("bki,kij->bkj", x.double()[:, None] - mixture.means, mixture.axes)
    return (offset**2 / mixture.variances).sum(-1).sqrt()


@lru_cache(maxsize=4)
def _excess_examples(
    formulation: Formulation, mixture: GaussianMixture, conditional: bool, n: int, seed: int
):
    """Network inputs z, t (and labels) with E[target | z], the best that a network can answer."""
    generator = torch.Generator().manual_seed(seed)
    path = formulation.path
    x0, labels = mixture.sample(n, generator)
    labels = (labels,) if conditional else ()
    eps = torch.randn(n, 2, generator=generator)
    w = (
        torch.arange(n) + torch.rand(n, generator=generator)
    ) / n  # t stratified: less noise, no bias
    t = path.t_min + (path.t_max - path.t_min) * w
    z, _ = formulation.pair(x0, eps, t)
    _, target = formulation.pair(*mixture.ends(path.interpolate(x0, eps, t), t, path, *labels), t)
    return z, t, labels, target


@torch.no_grad()
def relative_excess(
    network: Field,
    formulation: Formulation,
    mixture: GaussianMixture,
    conditional=False,
    n: int = 65536,
    seed: int = 0,
) -> float:
    """E |o_Theta - E[target | z]|^2 / E |E[target | z]|^2, t ~ U[t_min, t_max], z ~ p_t; 0 is best.

    For rf it is (7) over E|u_t|^2: the loss (8) without the part that no network can learn away.
    """
    z, t, labels, target = _excess_examples(formulation, mixture, conditional, n, seed)
    return ((network(z, t, *labels) - target).square().mean() / target.square().mean()).item()


class Reference(NamedTuple):
    """What a sampler meets on a noise seed: all (n,2), the labels, the exact field's figures."""

    data: Tensor
    labels: Tensor
    noise: Tensor
    figures: dict[str, float]


@lru_cache(maxsize=8)
@torch.no_grad()
def reference(
    mixture: GaussianMixture, seed: int, n: int = 10_000, conditional: bool = False
) -> Reference:
    """Data, noise, and the figures of the exact field from this noise in 50 Heun steps."""
    generator = torch.Generator().manual_seed(seed)
    data, labels = mixture.sample(n, generator)
    noise = torch.randn(n, 2, generator=generator)
    exact = solve(
        mixture.field(RectifiedFlow()), noise, *[labels] * conditional, steps=50, method="heun"
    )
    return Reference(data, labels, noise, sample_figures(exact, data, mixture))


def sample_figures(x: Tensor, data: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """Of samples x (n,2): energy distance, total variation of the mode counts, outliers' share."""
    nearest = mahalanobis(x, mixture).min(dim=1)
    counts = torch.bincount(nearest.indices, minlength=len(mixture.weights)) / len(x)
    return {
        "energy": energy_distance(x, data),
        "total_variation": 0.5 * (counts - mixture.weights).abs().sum().item(),
        "outliers": (nearest.values > 4).double().mean().item(),
    }


def figures_table(rows: dict[str, Tensor], data: Tensor, mixture: GaussianMixture) -> str:
    """The sample figures of several sets of samples, as a table."""
    head = f"{'':26}{'energy distance':>17}{'total variation':>17}{'outliers':>10}"
    figures = {name: sample_figures(x[:10_000], data[:10_000], mixture) for name, x in rows.items()}
    row = "{:26}{energy:17.2e}{total_variation:17.4f}{outliers:10.2%}"
    return "\n".join([head] + [row.format(name, **f) for name, f in figures.items()])


@torch.no_grad()
def yardsticks(
    sampler: Callable[..., Tensor],
    mixture: GaussianMixture,
    conditional: bool = False,
    seeds: int = 3,
    n: int = 10_000,
) -> dict[str, float]:
    """sampler(noise (n,2)[, labels (n,)]) -> x0 against the exact field, the mean over seeds.

    Both start at the same noise and meet the same data.

    energy: the difference of the two energy distances (most of either is multinomial noise in the
    modes' counts) and energy_error, its standard error over seeds; total_variation and outliers,
    with the exact field's as exact_*.
    """
    rows = []
    for seed in range(seeds):
        data, labels, noise, exact = reference(mixture, seed, n, conditional)
        own = sample_figures(sampler(noise, *[labels] * conditional), data, mixture)
        rows.append(
            {
                **own,
                "energy": own["energy"] - exact["energy"],
                **{f"exact_{k}": v for k, v in exact.items()},
            }
        )
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return {
        **mean,
        "energy_error": float(
            np.std([row["energy"] for row in rows]) / math.sqrt(max(1, seeds - 1))
        ),
    }


# --------------------------------------------------------------------------------------------------
# Pictures: the density p_t as a glow, samples and trajectories on top, the same axes everywhere.
# All on the RF path, where the starting noise is N(0, I); a particle's hue is the angle it started
# at.

FRAME, INK = (13, 15, 24), (222, 226, 236)
GLOW = np.array([(13, 15, 24), (22, 32, 66), (38, 58, 112), (74, 92, 150), (128, 140, 184)])


class Canvas:
    """A panel over [-extent, extent]^2, drawn at twice its size and reduced: smooth edges."""

    def __init__(self, mixture: GaussianMixture, size: int = 340):
        reach = mixture.means.norm(dim=1) + 3.5 * mixture.variances.max(dim=1).values.sqrt()
        self.mixture, self.size, self.extent = (
            mixture,
            2 * size,
            1.06 * max(2.6, reach.max().item()),
        )
        self.image = Image.new("RGB", (2 * size, 2 * size), FRAME)

    def pixels(self, x: Tensor) -> np.ndarray:
        return ((x.numpy() / self.extent * [1, -1] + 1) * self.size / 2).astype(np.float32)

    def glow(self, t: float) -> Canvas:
        """p_t of the RF path, each picture's background; its root keeps the faint parts visible."""
        n = self.size // 4
        axis = torch.linspace(-1, 1, n, dtype=torch.float64) * self.extent
        grid = torch.stack([axis.expand(n, n), -axis[:, None].expand(n, n)], dim=-1).reshape(-1, 2)
        p = self.mixture.log_density(grid, torch.tensor(t), RectifiedFlow()).exp().sqrt()
        level = (p / p.max().clamp(min=1e-300) * (len(GLOW) - 1)).reshape(n, n).numpy()
        colour = np.stack(
            [np.interp(level, range(len(GLOW)), channel) for channel in GLOW.T], axis=-1
        )
        self.image.paste(
            Image.fromarray(colour.astype(np.uint8)).resize(
                (self.size,) * 2, Image.Resampling.BICUBIC
            )
        )
        return self

    def points(self, x: Tensor, colours: list[tuple[int, ...]], radius: float = 2.5) -> Canvas:
        draw = ImageDraw.Draw(self.image, "RGBA")
        for (u, v), colour in zip(self.pixels(x), colours, strict=True):
            draw.ellipse((u - radius, v - radius, u + radius, v + radius), fill=(*colour, 200))
        return self

    def lines(self, xs: Tensor, colours: list[tuple[int, ...]], alpha: int = 110) -> Canvas:
        """Trajectories xs (steps + 1, n, 2)."""
        draw = ImageDraw.Draw(self.image, "RGBA")
        for line, colour in zip(self.pixels(xs.transpose(0, 1)), colours, strict=True):
            draw.line([tuple(point) for point in line], fill=(*colour, alpha), width=2)
        return self

    def arrows(self, field: Field, t: float) -> Canvas:
        """A field at t, strong where p_t is large and faint where it is not."""
        axis = (torch.arange(15) / 7 - 1) * 0.93 * self.extent
        x = torch.cartesian_prod(axis, axis)
        t = torch.full((len(x),), t)
        v, p = field(x, t), self.mixture.log_density(x, t, RectifiedFlow()).exp()
        v = v * (0.12 * self.extent / v.norm(dim=1, keepdim=True).clamp(min=1.5))
        draw = ImageDraw.Draw(self.image, "RGBA")
        for (u, w), (u2, w2), strength in zip(
            self.pixels(x), self.pixels(x + v), p / p.max().clamp(min=1e-30), strict=True
        ):
            fill = (255, 214, 140, int(60 + 195 * strength**0.3))
            draw.line((u, w, u2, w2), fill=fill, width=3)
            draw.ellipse((u2 - 4, w2 - 4, u2 + 4, w2 + 4), fill=fill)
        return self

    def done(self, label: str = "") -> Image.Image:
        image = self.image.resize((self.size // 2,) * 2, Image.Resampling.LANCZOS)
        ImageDraw.Draw(image).text(
            (9, 6), label, INK, ImageFont.load_default(15), stroke_width=2, stroke_fill=FRAME
        )
        return image


def tile(rows: list[list[Image.Image]], title: str = "") -> Image.Image:
    """Panels of one size as a sheet, with a title above."""
    (w, h), gap, top = rows[0][0].size, 8, 40 if title else 8
    sheet = Image.new("RGB", (len(rows[0]) * (w + gap) + gap, len(rows) * (h + gap) + top), FRAME)
    ImageDraw.Draw(sheet).text((gap + 2, 9), title, INK, ImageFont.load_default(19))
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            sheet.paste(panel, (gap + j * (w + gap), top + i * (h + gap)))
    return sheet


def hues(x: Tensor) -> list[tuple[int, ...]]:
    """A bright colour for each point (n,2), by its angle."""
    hsv = torch.stack(
        [torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1, *torch.ones(2, len(x))], dim=1
    )
    hsv = (hsv * torch.tensor([255.0, 135.0, 255.0])).to(torch.uint8).numpy()[None]
    return [
        tuple(map(int, colour))
        for colour in np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))[0]
    ]


@torch.no_grad()
def trajectory(
    field: Field, z: Tensor, times: Tensor, *labels: Tensor, method: str = "heun"
) -> Tensor:
    """z at each of `times`, (len(times), n, 2)."""
    zs = [z]
    for t, s in zip(times, times[1:], strict=False):
        zs.append(solve(field, zs[-1], *labels, steps=1, t_start=t, t_end=s, method=method))
    return torch.stack(zs)


@torch.no_grad()
def draw_flow(field: Field, mixture: GaussianMixture, *null: Tensor, seed: int = 0) -> Image.Image:
    """From noise to data: the particles over p_t at five times, and the whole trajectories."""
    noise = torch.randn(900, 2, generator=torch.Generator().manual_seed(seed))
    null = tuple(c.expand(len(noise)) for c in null)
    zs, colours = trajectory(field, noise, torch.linspace(1, 0, 61), *null), hues(noise)
    panels = [
        Canvas(mixture).glow(t).points(zs[60 - round(60 * t)], colours)
        for t in (1, 0.75, 0.5, 0.25, 0)
    ]
    labels = ["t = 1, noise", "t = 0.75", "t = 0.50", "t = 0.25", "t = 0, data"]
    last = Canvas(mixture).lines(zs[:, :250], colours[:250]).done("trajectories")
    panels = [panel.done(label) for panel, label in zip(panels, labels, strict=True)] + [last]
    return tile([panels[:3], panels[3:]], "The learned flow, over the exact density p_t")


@torch.no_grad()
def draw_field(field: Field, mixture: GaussianMixture, *null: Tensor) -> Image.Image:
    """The learned field beside the exact one at three times, and their distance under p_t."""
    exact, path = mixture.field(RectifiedFlow()), RectifiedFlow()
    generator = torch.Generator().manual_seed(0)
    x0, eps, rows = (
        mixture.sample(20_000, generator)[0],
        torch.randn(20_000, 2, generator=generator),
        [[], []],
    )
    for t in (0.9, 0.5, 0.1):
        ts = torch.full((20_000,), t)
        z = path.interpolate(x0, eps, ts)
        v, u = field(z, ts, *(c.expand(len(z)) for c in null)), exact(z, ts)
        error = ((v - u).square().mean() / u.square().mean()).item()
        learned = (
            Canvas(mixture)
            .glow(t)
            .arrows(lambda z, t: field(z, t, *(c.expand(len(z)) for c in null)), t)
        )
        rows[0].append(learned.done(f"learned, t = {t}; relative error {error:.1e}"))
        rows[1].append(Canvas(mixture).glow(t).arrows(exact, t).done(f"exact, t = {t}"))
    return tile(
        rows, "The learned velocity v(z, t) and the exact u(z, t); samples move against the arrows"
    )


@torch.no_grad()
def draw_windows(fields: dict[str, Field], mixture, edges: list[float], *null: Tensor):
    """PeRFlow: trajectories of teacher and student from the same noise, with dots at the edges."""
    noise = torch.randn(120, 2, generator=torch.Generator().manual_seed(3))
    null = tuple(c.expand(len(noise)) for c in null)
    panels, colours = [], hues(noise)
    for name, field in fields.items():
        canvas, z = Canvas(mixture, 480).glow(0), noise
        for t, s in itertools.pairwise(edges):
            zs = trajectory(field, z, torch.linspace(t, s, 33), *null, method="euler")
            canvas.lines(zs, colours, 170).points(zs[-1], colours, 5 if s else 3)
            z = zs[-1]
        dots = ", ".join(f"{t:g}" for t in edges[1:])
        panels.append(canvas.done(f"{name}, dots at t = {dots}"))
    return tile([panels], "Trajectories from the same noise: straight inside each window")


def draw_samples(
    x: Tensor, mixture: GaussianMixture, colours: list[tuple[int, ...]] | None = None
) -> Image.Image:
    """Samples (n,2) beside as many from the mixture, at most 2000, over the exact density."""
    x = x[:2000].float().cpu()
    data, _ = mixture.sample(len(x), torch.Generator().manual_seed(1))
    warm = [(255, 214, 140)] * len(x)
    panels = [
        Canvas(mixture, 420).glow(0).points(points, c, 2)
        for points, c in ((x, colours or warm), (data, warm))
    ]
    return tile([[panels[0].done(f"{len(x)} samples"), panels[1].done("the data")]], "At t = 0")


@torch.no_grad()
def save_gif(
    file: File, field: Field, mixture: GaussianMixture, *null: Tensor, frames: int = 48
) -> None:
    """700 particles from noise to data, with short tails, over p_t; pauses at both ends."""
    noise = torch.randn(700, 2, generator=torch.Generator().manual_seed(2))
    null = tuple(c.expand(len(noise)) for c in null)
    zs, colours = trajectory(field, noise, torch.linspace(1, 0, frames + 1), *null), hues(noise)
    images = []
    for i in range(frames + 1):
        t = 1 - i / frames
        canvas = Canvas(mixture, 320).glow(t).lines(zs[max(0, i - 5) : i + 1], colours)
        images.append(canvas.points(zs[i], colours, 3).done(f"t = {t:.2f}"))
    palette = tile([images[:: max(1, frames // 4)]]).quantize(
        200
    )  # one for all, or colours flicker
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    pauses = [700] + [60] * (frames - 1) + [2500]
    how = dict(save_all=True, duration=pauses, loop=0, optimize=True)
    images[0].save(file, append_images=images[1:], **how)
