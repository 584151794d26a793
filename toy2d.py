"""The 2-D laboratory: mixtures of Gaussians, where p_t (3), u_t (6) and the loss (7) are exact.

Here a trained network meets the truth, not another network. The file has the mixture, the small
network, and the yardsticks (relative excess, energy distance, mode counts).
Time, here and everywhere: t = 0 is data, t = 1 is noise. The mixture computes in float64.
Read next: `mmdit.py`, the large network, or `train.py`, which trains on these mixtures."""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor, nn

from rf import Field, Formulation, Generator, InputError, Pair, Path, RectifiedFlow, expand, solve


# ---- The data, and everything that is exactly known of it
class GaussianMixture:
    """x0 ~ sum_k w_k N(mu_k, Sigma_k): means (K,2), covs (K,2,2), weights (K,), tensors or lists.
    The weights are normalised. A label is a component's index; K (null) stands for all of them. The
    mixture and all its arguments are on the CPU. ValueError on what is no mixture."""

    def __init__(self, means, covs, weights):
        try:
            arrays = [torch.as_tensor(x, dtype=torch.float64) for x in (means, covs, weights)]
        except (TypeError, ValueError) as error:
            raise ValueError(f"means, covs, weights must be arrays of numbers: {error}") from None
        self.means, self.covs, weights = arrays
        K, shapes = weights.numel(), [tuple(x.shape) for x in arrays]
        if K == 0 or shapes != [(K, 2), (K, 2, 2), (K,)]:
            got = str(shapes)[1:-1]
            raise ValueError(f"means, covs, weights must be (K,2), (K,2,2), (K,), got {got}")
        if not all(x.isfinite().all() for x in arrays) or not (weights > 0).all():
            raise ValueError("means and covs must be finite and weights positive")
        self.weights = weights / weights.sum()
        # Sigma_k = U_k diag(s_k) U_k^T: (K,2), (K,2,2)
        self.variances, self.axes = torch.linalg.eigh(self.covs)
        negative = (self.variances < -1e-12 * self.covs.abs().max()).any()
        if negative or not torch.allclose(self.covs, self.covs.mT):
            raise ValueError("covs must be symmetric and positive semi-definite")
        self.variances = self.variances.clamp(min=1e-200)  # of a point: no 0/0 at t = 0

    def standardized(self) -> "GaussianMixture":
        """The same mixture at mean 0 and unit standard deviation (one scale for both axes)."""
        mean = self.weights @ self.means
        var = self.weights @ (((self.means - mean) ** 2).sum(1) + self.variances.sum(1)) / 2
        return GaussianMixture((self.means - mean) / var.sqrt(), self.covs / var, self.weights)

    def component(self, label: int) -> "GaussianMixture":
        """One component alone: what a class-conditional model draws for this label."""
        return GaussianMixture(self.means[[label]], self.covs[[label]], self.weights[[label]])

    def spec(self) -> dict[str, list]:
        """Plain lists, from which the constructor makes the same mixture again."""
        return {name: getattr(self, name).tolist() for name in ("means", "covs", "weights")}

    def sample(self, n: int, generator: Generator = None) -> Pair:
        """x (n,2) in float32 and the components they came from (n,)."""
        labels = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        xi = torch.randn(n, 1, 2, generator=generator)
        factors = self.axes * self.variances.sqrt()[:, None]  # (K,2,2), U sqrt(s)
        return self.means.float()[labels] + (factors.float()[labels] * xi).sum(-1), labels

    def _components(self, z: Tensor, t: Tensor, path: Path) -> tuple[Tensor, ...]:
        """Each component of p_t, N(a mu_k, a^2 Sigma_k + b^2 I): log density, offset, variances."""
        a, b, _, _ = path.coefficients(torch.as_tensor(t).double().reshape(-1, 1, 1))  # (B,1,1)
        offset = z.double()[:, None] - a * self.means
        offset = torch.einsum("bki,kij->bkj", offset, self.axes)  # (B,K,2)
        var = a**2 * self.variances + b**2
        log_p = -0.5 * (offset**2 / var + torch.log(2 * math.pi * var)).sum(-1)  # (B,K)
        return log_p, offset, var, a, b

    def log_density(self, z: Tensor, t: Tensor | float, path: Path) -> Tensor:
        """(3): log p_t(z), (B,), for z (B,2) and t (B,) or one number."""
        log_p = self._components(z, t, path)[0]
        return torch.logsumexp(log_p + self.weights.log(), dim=1).to(z.dtype)

    def ends(self, z: Tensor, t: Tensor | float, path: Path, labels: Tensor | None = None) -> Pair:
        """E[x0 | z_t = z] and E[eps | z_t = z], (B,2) each; given labels (B,), of those modes."""
        log_p, offset, var, a, b = self._components(z, t, path)
        log_r = log_p + self.weights.log()
        if labels is not None:
            K = len(self.weights)
            others = (labels[:, None] != torch.arange(K)) & (labels[:, None] != K)
            log_r = log_r.masked_fill(others, -torch.inf)
        r = torch.softmax(log_r, dim=1)  # (B,K), p(k | z)
        # With C = a^2 Sigma + b^2 I: E[x0 | z, k] = mu + a Sigma C^-1 (z - a mu) and
        # E[eps | z, k] = b C^-1 (z - a mu)
        moved = torch.einsum("bk,bkj,kij->bi", r, a * self.variances * offset / var, self.axes)
        eps = torch.einsum("bk,bkj,kij->bi", r, b * offset / var, self.axes)
        return (moved + r @ self.means).to(z.dtype), eps.to(z.dtype)

    def velocity(
        self, z: Tensor, t: Tensor | float, path: Path, labels: Tensor | None = None
    ) -> Tensor:
        """(6): u_t(z) = E[a' x0 + b' eps | z_t = z], (B,2). It never divides by a."""
        ends = self.ends(z.double(), t, path, labels)
        return path.derivative(*ends, expand(t, z.double()).double()).to(z.dtype)

    def field(self, path: Path) -> Field:
        """The exact velocity field v(z, t, *labels) on this path."""
        return lambda z, t, *labels: self.velocity(z, t, path, *labels)


def _spots(means: Tensor, std: float) -> GaussianMixture:
    """Round components of equal weight."""
    covs = std**2 * torch.eye(2, dtype=torch.float64).expand(len(means), 2, 2)
    return GaussianMixture(means, covs, torch.ones(len(means)))


def _ring() -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    return _spots(4 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.3)


def _grid() -> GaussianMixture:
    return _spots(2 * torch.cartesian_prod(*[torch.arange(-2.0, 3).double()] * 2), 0.15)


def _spiral() -> GaussianMixture:
    """Twelve elongated components along a spiral, the outer ones longer and heavier."""
    k = torch.arange(12, dtype=torch.float64)
    angle = 2 * math.pi * torch.sqrt((k + 1) / 6)
    c, s = angle.cos(), angle.sin()
    along = torch.stack([c - angle * s, s + angle * c], dim=1)
    along = along / along.norm(dim=1, keepdim=True)
    across = along.flip(1) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    length, width = 0.25 + 0.05 * k, 0.16
    covs = (length**2)[:, None, None] * along[:, :, None] * along[:, None]
    covs = covs + width**2 * across[:, :, None] * across[:, None]
    return GaussianMixture(angle[:, None] / 2 * torch.stack([c, s], dim=1), covs, 1 + k / 4)


MIXTURES = {"ring": _ring, "grid": _grid, "spiral": _spiral}


@lru_cache(maxsize=8)
def load_mixture(name: str) -> GaussianMixture:
    """A named mixture, standardized or, as NAME-unscaled, as it is; or FILE.json (means, covs,
    weights). ValueError where the name is unknown, the file missing or its content no mixture."""
    raw = name.removesuffix("-unscaled")
    if raw in MIXTURES:
        return MIXTURES[raw]().standardized() if raw == name else MIXTURES[raw]()
    if not name.endswith(".json"):
        raise InputError(f"unknown mixture {name!r}; choose from {', '.join(MIXTURES)}, FILE.json")
    try:
        return GaussianMixture(**json.loads(File(name).read_text()))
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}") from None
    except Exception as error:  # JSON of anything can be in it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        good = "mixture of means, covs and weights"
        raise InputError(f"{name} is damaged or no {good}: {reason}") from None


# ---- The network
class MLP(nn.Module):
    """1 + depth hidden layers of 64: forward(z (B,C), t (B,)[, labels (B,)]) -> (B,C).
    t enters as sin and cos of pi k t, k = 1..3. z enters times 6, so that the first layer resolves
    the modes. With classes, a learned vector of each or of the null label joins it. A network of
    several times_taken gets them as the columns of t (B,times_taken)."""

    def __init__(
        self, classes: int = 0, depth: int = 2, in_channels: int = 2, width: int = 64,
        frequencies: int = 3, times_taken: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.null_cond, self.times_taken = (torch.tensor(classes),) if classes else (), times_taken
        self.register_buffer("omega", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        self.input = nn.Linear(in_channels + 2 * frequencies * times_taken, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.body = nn.Sequential(nn.SiLU(), *hidden, nn.Linear(width, in_channels))

    def forward(self, z: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        angle = (t.reshape(len(t), -1, 1) * self.omega).flatten(1)  # (B,3)
        h = self.input(torch.cat([6 * z, angle.sin(), angle.cos()], dim=1))  # (B,8) -> (B,64)
        if self.label is None:
            return self.body(h)
        labels = labels or (z.new_full((len(z),), self.label.num_embeddings - 1, dtype=torch.long),)
        return self.body(h + self.label(*labels))  # no labels are null labels


# ---- Yardsticks
def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x-y| - E|x-x'| - E|y-y'| of (n,2) and (m,2), without bias. So it may be below 0."""
    n, m = len(x), len(y)
    return 2 * _total(x, y) / (n * m) - _within(x) / (n * (n - 1)) - _within(y) / (m * (m - 1))


def _total(x: Tensor, y: Tensor) -> float:
    """The sum of |x_i - y_j| over all pairs."""
    x, y, exact = x.double(), y.double(), "donot_use_mm_for_euclid_dist"
    return sum(torch.cdist(rows, y, compute_mode=exact).sum().item() for rows in x.split(128))


def _within(x: Tensor) -> float:
    """_total(x, x) in half the time: each block of rows meets those after it."""
    blocks = [(rows, x[128 * (i + 1) :]) for i, rows in enumerate(x.split(128))]
    return sum(_total(rows, rows) + 2 * _total(rows, rest) for rows, rest in blocks)


def mahalanobis(x: Tensor, mixture: GaussianMixture) -> Tensor:
    """The distance of x (n,2) from each mode in its own standard deviations, (n,K)."""
    offset = torch.einsum("bki,kij->bkj", x.double()[:, None] - mixture.means, mixture.axes)
    return (offset**2 / mixture.variances).sum(-1).sqrt()


@torch.no_grad()
def relative_excess(
    network: Field, formulation: Formulation, mixture: GaussianMixture,
    conditional: bool = False, n: int = 65536, seed: int = 0,
) -> float:  # fmt: skip
    """E |o_Theta - E[target | z]|^2 / E |E[target | z]|^2, t ~ U[t_min, t_max], z ~ p_t; 0 is best.
    For rf it is (7) over E|u_t|^2. (7) and (8) differ by a constant, the part of the loss that no
    network can learn away, so the best answer to the target of (8) is its mean given z."""
    generator, path = torch.Generator().manual_seed(seed), formulation.path
    x0, labels = mixture.sample(n, generator)
    cond, eps = [labels] if conditional else [], torch.randn(n, 2, generator=generator)
    w = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # stratified: less noise
    t = path.t_min + (path.t_max - path.t_min) * w
    z, _ = formulation.pair(x0, eps, t)
    ends = mixture.ends(path.interpolate(x0, eps, t), t, path, *cond)
    _, best = formulation.pair(*ends, t)
    return ((network(z, t, *cond) - best).square().mean() / best.square().mean()).item()


def sample_metrics(x: Tensor, data: Tensor, mixture: GaussianMixture) -> dict[str, float]:
    """Of samples x (n,2): energy distance, total variation of the mode counts, outliers' share."""
    nearest = mahalanobis(x, mixture).min(dim=1)
    counts = torch.bincount(nearest.indices, minlength=len(mixture.weights)) / len(x)
    variation = 0.5 * (counts - mixture.weights).abs().sum().item()
    outliers = 1 - (nearest.values <= 4).double().mean().item()  # nan is one, too
    return dict(energy=energy_distance(x, data), total_variation=variation, outliers=outliers)


@lru_cache(maxsize=8)
@torch.no_grad()
def reference(mixture: GaussianMixture, seed: int, n: int = 10_000, conditional: bool = False):
    """What a sampler meets on a noise seed: data (n,2), conditions, noise (n,2), and the metrics of
    the exact field from this noise in 50 Heun steps."""
    generator = torch.Generator().manual_seed(seed)
    data, labels = mixture.sample(n, generator)
    cond, noise = [labels] if conditional else [], torch.randn(n, 2, generator=generator)
    exact = solve(mixture.field(RectifiedFlow()), noise, *cond, steps=50, method="heun")
    return data, cond, noise, sample_metrics(exact, data, mixture)


@torch.no_grad()
def yardsticks(
    sampler: Callable[..., Tensor], mixture: GaussianMixture,
    conditional: bool = False, seeds: int = 3, n: int = 10_000,
) -> dict[str, float]:  # fmt: skip
    """sampler(noise (n,2)[, labels (n,)]) -> x0 against the exact field, the mean over seeds.
    Both meet the same noise and data, so `energy` is the difference of two energy distances: most
    of either is multinomial noise in the modes' counts. energy_error is its standard error over
    seeds; total_variation and outliers come with the exact field's, exact_*."""
    rows = []
    for seed in range(seeds):
        data, cond, noise, exact = reference(mixture, seed, n, conditional)
        row = sample_metrics(sampler(noise, *cond), data, mixture)
        row["energy"] -= exact["energy"]
        rows.append(row | {f"exact_{key}": value for key, value in exact.items()})
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    spread = np.std([row["energy"] for row in rows]) / math.sqrt(max(1, seeds - 1))
    return mean | {"energy_error": float(spread)}


@torch.no_grad()
def trajectory(velocity: Field, z: Tensor, times: Tensor, *cond: Tensor, method="heun") -> Tensor:
    """z at each of `times`, (len(times), n, 2)."""
    zs = [z]
    for t, t_next in zip(times, times[1:], strict=False):
        zs.append(solve(velocity, zs[-1], *cond, times=[t, t_next], method=method))
    return torch.stack(zs)


@torch.no_grad()
def curvature(velocity: Field, z: Tensor, edges: Tensor, *cond: Tensor, steps: int = 32) -> Tensor:
    """(len(edges) - 1,), noisiest interval first: mean |chord - v|^2 along the field's trajectories
    from z, over mean |chord|^2; chord = (z_e - z_s)/(t_e - t_s), and 0 is straight. The Euler steps
    never ask for v at an interval's end: a student's velocity jumps there."""
    ratios = []
    for t, t_end in zip(edges.to(z), edges[1:].to(z), strict=False):
        vs, h = [], (t_end - t) / steps
        for i in range(steps):
            vs.append(velocity(z, (t + i * h).expand(len(z)), *cond))
            z = z + h * vs[-1]
        v = torch.stack(vs)  # (steps,n,...)
        ratios.append((v.mean(0) - v).square().mean() / v.mean(0).square().mean())
    return torch.stack(ratios)
