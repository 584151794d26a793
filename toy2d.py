"""The 2-D laboratory: mixtures of Gaussians, where p_t (3), u_t (6) and the loss (7) are exact.

Here a trained network meets the truth, not another network. The file has the mixture, the small
network, the yardsticks (relative excess, energy distance, mode counts), and `Toy`, which is all of
it as the data of a run. Time, here and everywhere: t = 0 is data, t = 1 is noise. The mixture
computes in float64, whatever comes in, and returns the dtype of z.
Read next: `mmdit.py`, the large network, or `train.py`, which trains on these mixtures."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path as File
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

import pictures
from data import DATA, HELD_OUT, Data, seeded
from mmdit import ClassMMDiT
from options import reading
from rf import Field, Formulation, Generator, Pair, Path, RectifiedFlow, expand, solve


# ---- The data, and everything that is exactly known of it
class GaussianMixture:
    """x0 ~ sum_k w_k N(mu_k, Sigma_k): means (K,2), covs (K,2,2), weights (K,), tensors or lists.
    The weights are normalised. ValueError on shapes that do not fit, non-finite numbers, weights
    that are not positive, and matrices that are no covariance. A label is a component's index, and
    label K (null) stands for all of them. The mixture and all its arguments are on the CPU."""

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

    def scene(self) -> pictures.Scene:
        """p_t of the RF path as the background of pictures, with room for all modes."""
        reach = self.means.norm(dim=1) + 3.5 * self.variances.max(dim=1).values.sqrt()
        density = lambda z, t: self.log_density(z, t, RectifiedFlow()).exp()
        return pictures.Scene(density, 1.06 * max(2.6, reach.max().item()))


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
        raise ValueError(f"unknown mixture {name!r}; choose from {', '.join(MIXTURES)}, FILE.json")
    with reading(name, "mixture of means, covs and weights"):
        return GaussianMixture(**json.loads(File(name).read_text()))


# ---- The network
class MLP(nn.Module):
    """Three hidden layers of 64: forward(z (B,2), t (B,)[, labels (B,)]) -> (B,2).
    t enters as sin and cos of pi k t, k = 1..3. z enters times 6, so that the first layer resolves
    the modes. With `classes` > 0 a learned vector for each class, and one for the null label
    `classes`, joins the first layer."""

    def __init__(self, classes: int = 0, width: int = 64, frequencies: int = 3):
        super().__init__()
        self.null_cond = (torch.tensor(classes),) if classes else ()
        self.register_buffer("omega", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        self.input = nn.Linear(2 + 2 * frequencies, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        hidden = [nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.body = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, z: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        angle = t[:, None] * self.omega  # (B,3)
        h = self.input(torch.cat([6 * z, angle.sin(), angle.cos()], dim=1))  # (B,8) -> (B,64)
        if self.label is None:
            return self.body(h)
        labels = labels or (torch.full_like(t, self.label.num_embeddings - 1, dtype=torch.long),)
        return self.body(h + self.label(*labels))  # no labels are null labels


# ---- Yardsticks
def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x-y| - E|x-x'| - E|y-y'| of (n,2) and (m,2), without bias. So it may be below 0."""
    n, m = len(x), len(y)
    return 2 * _total(x, y) / (n * m) - _total(x, x) / (n * (n - 1)) - _total(y, y) / (m * (m - 1))


def _total(x: Tensor, y: Tensor) -> float:
    """The sum of |x_i - y_j| over all pairs."""
    x, y, exact = x.double(), y.double(), "donot_use_mm_for_euclid_dist"
    return sum(torch.cdist(rows, y, compute_mode=exact).sum().item() for rows in x.split(128))


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
    labels, eps = [labels] * conditional, torch.randn(n, 2, generator=generator)
    w = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # stratified: less noise
    t = path.t_min + (path.t_max - path.t_min) * w
    z, _ = formulation.pair(x0, eps, t)
    _, best = formulation.pair(*mixture.ends(path.interpolate(x0, eps, t), t, path, *labels), t)
    return ((network(z, t, *labels) - best).square().mean() / best.square().mean()).item()


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
    """What a sampler meets on a noise seed: data, labels and noise, (n,...), and the metrics of the
    exact field from this noise in 50 Heun steps."""
    generator = torch.Generator().manual_seed(seed)
    data, labels = mixture.sample(n, generator)
    noise, field = torch.randn(n, 2, generator=generator), mixture.field(RectifiedFlow())
    exact = solve(field, noise, *[labels] * conditional, steps=50, method="heun")
    return data, labels, noise, sample_metrics(exact, data, mixture)


@torch.no_grad()
def yardsticks(
    sampler: Callable[..., Tensor], mixture: GaussianMixture,
    conditional: bool = False, seeds: int = 3, n: int = 10_000,
) -> dict[str, float]:  # fmt: skip
    """sampler(noise (n,2)[, labels (n,)]) -> x0 against the exact field, the mean over seeds.
    Both start at the same noise and meet the same data, so `energy` is the difference of the two
    energy distances: most of either is multinomial noise in the modes' counts. energy_error is its
    standard error over seeds; total_variation and outliers come with the exact field's, exact_*."""
    rows = []
    for seed in range(seeds):
        data, labels, noise, exact = reference(mixture, seed, n, conditional)
        own = sample_metrics(sampler(noise, *[labels] * conditional), data, mixture)
        own["energy"] -= exact["energy"]
        rows.append(own | {f"exact_{key}": value for key, value in exact.items()})
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
    """(len(edges) - 1,), noisiest interval first: mean |(z_e - z_s)/(t_e - t_s) - v|^2 along a
    field's own trajectories from z, over mean |(z_e - z_s)/(t_e - t_s)|^2. 0 is straight. The Euler
    steps never ask for v at an interval's end: a student's velocity jumps there."""
    ratios = []
    for t, t_end in zip(edges.to(z), edges[1:].to(z), strict=False):
        vs, h = [], (t_end - t) / steps
        for i in range(steps):
            vs.append(velocity(z, (t + i * h).expand(len(z)), *cond))
            z = z + h * vs[-1]
        v = torch.stack(vs)  # (steps,n,...)
        ratios.append((v.mean(0) - v).square().mean() / v.mean(0).square().mean())
    return torch.stack(ratios)


def shown(value: float, form: str) -> str:
    """A number for a table, which never has nan as a result."""
    return f"{value:{form}}" if math.isfinite(value) else "diverged"


def metrics_table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':26}{'energy distance':>17}{'total variation':>17}{'beyond 4 sigma':>16}"]
    for name, m in rows.items():
        energy, variation = shown(m["energy"], ".2e"), shown(m["total_variation"], ".4f")
        lines.append(f"{name:26}{energy:>17}{variation:>17}{shown(m['outliers'], '.2%'):>16}")
    return "\n".join(lines)


# ---- The mixture as the data of a run
class Toy(Data):
    """A mixture as `train.py` sees data: batches, network, recipe, what is measured and drawn. On a
    GPU its models are measured at the end only, on the CPU, where the mixture is."""

    @dataclass
    class Options:
        mixture: Annotated[str | dict, f"{', '.join(MIXTURES)}, or FILE.json"] = "ring"
        conditional: Annotated[bool, "give the network the mode's label"] = False
        network: Annotated[Literal["mlp", "mmdit"], "the small MLP, or a small MM-DiT"] = "mlp"

        def __post_init__(self):
            if isinstance(self.mixture, str):  # the checkpoint holds the mixture, not its name
                self.mixture = load_mixture(self.mixture).spec()
            else:
                GaussianMixture(**self.mixture)  # an error where it is none

    @dataclass
    class Spec(Options, Data.Spec):
        def __post_init__(self):
            modes = len(GaussianMixture(**self.mixture).weights) * self.conditional
            if (self.shape, self.classes) != ([2], modes):
                raise ValueError(f"shape {self.shape} and {self.classes} classes do not fit")

    # what a student changes in its teacher's recipe; it clips, as a solve may go astray
    distil: ClassVar = dict(steps=8_000, batch_size=1024, lr=2e-3, clip=1.0)

    def __init__(self, options: Options):
        self.options, self.mixture = options, GaussianMixture(**options.mixture)
        self.conditional = options.conditional

    @staticmethod
    def recipe(options: Options) -> dict:
        """Two threads would slow the MLP down."""
        recipe = dict(formulation="rf", precision="fp32", depth=2, steps=27_000, batch_size=1024)
        recipe |= dict(lr=1e-2, warmup=500, decay=True, beta2=0.99, eps=1e-8, clip=None)
        recipe |= dict(ema_every=10, block=25, log_every=100, validation=1024, threads=1)
        mmdit = dict(steps=6_000, batch_size=256, lr=2e-3, clip=1.0, threads=None)
        return recipe | (mmdit if options.network == "mmdit" else {})

    def spec(self) -> dict:
        classes = len(self.mixture.weights) if self.conditional else 0
        return asdict(self.Spec([2], classes, **asdict(self.options)))

    def batch(self, seed: int, n: int, size: int, micro=0, micros=1, device="cpu") -> list[Tensor]:
        drawn = self.mixture.sample(size, seeded(seed, n, micro, DATA))
        return [x.to(device) for x in drawn[: 1 + self.conditional]]

    def held_out(self, n: int) -> list[Tensor]:
        return list(self.mixture.sample(n, seeded(0, 0, 0, HELD_OUT))[: 1 + self.conditional])

    @staticmethod
    def network(spec: dict, recipe) -> nn.Module:
        if spec["network"] == "mlp":
            return MLP(spec["classes"])
        shape = dict(in_channels=2, patch_size=1, pos_embed_max_size=1, tokens=1)
        return ClassMMDiT(spec["classes"], recipe.depth, **shape)

    @classmethod
    def conditions(cls, spec, n, label=None, data=None, generator=None):
        """Labels, where none is asked for, are as frequent as their modes."""
        if label is not None or not spec["classes"]:
            return super().conditions(spec, n, label)
        return [GaussianMixture(**spec["mixture"]).sample(n, generator)[1]]

    @classmethod
    def write(cls, spec: dict, file: File, x0: Tensor, *labels: Tensor, seed=0, **how) -> File:
        """A picture (.png) or arrays (.npz), and the metrics beside those of the exact field from
        the same noise, which `seed` draws again."""
        mixture, n = GaussianMixture(**spec["mixture"]), len(x0)
        if file.suffix == ".npz":
            np.savez(file, x0.numpy(), *(c.numpy() for c in labels))
        if labels and len(labels[0].unique()) == 1:
            mixture, labels = mixture.component(labels[0][0].item()), ()
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))[:10_000]
        data, _ = mixture.sample(max(2, n), seeded(seed, 1, 0, DATA))
        if file.suffix == ".png":
            hues, few = pictures.hues(noise[:2000]), data[: min(n, 2000)]
            pictures.draw_samples(mixture.scene(), x0[:2000], few, hues).save(file)
        if n > 1:
            few = [c[: len(noise)] for c in labels]
            best = solve(mixture.field(RectifiedFlow()), noise, *few, steps=50, method="heun")
            both = {"samples": x0, "exact field, same noise": best}
            rows = {k: sample_metrics(x[:10_000], data[:10_000], mixture) for k, x in both.items()}
            print(metrics_table(rows))
        return file

    # ---- What a run shows
    def metrics(self, model) -> dict[str, float]:
        """The relative excess of a formulation: of a student's targets no best answer is known."""
        if model.device.type != "cpu" or not isinstance(model.objective, Formulation):
            return {}
        how = dict(conditional=self.conditional, n=8192)
        return {"excess": relative_excess(model.guided(), model.objective, self.mixture, **how)}

    @torch.no_grad()
    def report(self, model, out: File, teacher=None) -> None:
        """At the end of a run: the table and the pictures of a flow, or of a student."""
        model.network.cpu()
        if teacher:
            teacher.network.cpu()
            self._compare(model, out, teacher)
            return
        excess = relative_excess(model.guided(), model.objective, self.mixture, self.conditional)
        print(f"relative excess of the network's error {shown(excess, '.2e')}")
        run = lambda noise, *cond: model.sample(noise, *cond, steps=50, method="heun")
        y = yardsticks(run, self.mixture, self.conditional)
        exact = {key: y[f"exact_{key}"] for key in ("energy", "total_variation", "outliers")}
        learned = y | {"energy": y["energy"] + exact["energy"]}
        print("10,000 samples in 50 Heun steps, the exact field's from the same noise; 3 seeds:")
        print(metrics_table({"learned": learned, "exact": exact}))
        difference, error = shown(y["energy"], ".2e"), shown(y["energy_error"], ".0e")
        print(f"difference of the energy distances {difference} (+- {error})")
        self._draw_flow(model, out)

    def _draw_flow(self, model, out: File) -> None:
        null, scene, path = model.network.null_cond, self.mixture.scene(), RectifiedFlow()
        field = lambda z, t: model.velocity(z, t, *(c.expand(len(z)) for c in null))
        exact, generator, errors = self.mixture.field(path), torch.Generator().manual_seed(0), {}
        zs = trajectory(field, torch.randn(900, 2, generator=generator), torch.linspace(1, 0, 49))
        pictures.draw_flow(scene, zs).save(out / "flow.png")
        pictures.save_gif(out / "flow.gif", scene, zs[:, :700])
        x0, _ = self.mixture.sample(20_000, generator)
        eps = torch.randn(20_000, 2, generator=generator)
        for t in (0.9, 0.5, 0.1):
            z = path.interpolate(x0, eps, t)
            u, v = exact(z, t), field(z, torch.full((len(z),), t))
            errors[t] = ((v - u).square().mean() / u.square().mean()).item()
        pictures.draw_field(scene, field, exact, errors).save(out / "field.png")
        of = " of all modes, without labels" * self.conditional
        print(f"pictures{of}: {out}/flow.png, {out}/field.png, {out}/flow.gif")

    def _compare(self, student, out: File, teacher) -> None:
        """A student and its teacher: yardsticks at equal evaluations, then the student's steps and
        the curvature of both, on the student's own path."""
        energy, flow = {}, student.objective

        def measure(model, steps: int) -> str:
            run = lambda noise, *cond: model.sample(noise, *cond, steps=steps)
            y = yardsticks(run, self.mixture, self.conditional)
            energy[model is student, steps] = y["energy"]
            error, outliers = f"{y['energy_error']:.0e}", shown(y["outliers"], ".2%")
            return f"{shown(y['energy'], '.2e')} +- {error}{outliers:>9}"

        print("energy distance above the exact field's, and the share further than 4 sigma:")
        self.compare(student, teacher, measure)
        if (True, 4) in energy:
            gap = energy[False, 4] - energy[False, 100]
            closed = (energy[False, 4] - energy[True, 4]) / gap if gap else math.nan
            print(f"4-step gap (the teacher's 4 steps less its 100) closed: {shown(closed, '.1%')}")
        _, labels, noise, _ = reference(self.mixture, 0, 10_000, self.conditional)
        cond, edges = [labels[:2000]] * self.conditional, flow.times(flow.fewest).float()
        few, walks = [c[:24] for c in cond], {}
        a, b, _, _ = (c[:, None, None] for c in flow.path.coefficients(edges))
        for name, v in (("teacher", flow.teacher), ("student", flow.velocity(student.guided()))):
            ratios = curvature(v, b[0] * noise[:2000], edges, *cond)
            windows = " ".join(shown(ratio, ".1e") for ratio in [ratios.mean(), *ratios])
            print(f"curvature of the {name}: mean, then by window: {windows}")
            steps = f"the {name} in {flow.fewest} step{'s' * (flow.fewest > 1)}"
            zs = trajectory(v, b[0] * noise[:24], edges, *few, method="euler")
            walks[steps] = zs / (a + b)  # on the RF path
        exact = self.mixture.field(RectifiedFlow())
        paths = trajectory(exact, noise[:24], torch.linspace(1, 0, 101), *few)
        pictures.draw_walks(self.mixture.scene(), paths, walks).save(out / "windows.png")
        print(f"pictures: {out}/windows.png")
