"""Rectified flow and its relatives: (1)-(22) of *Scaling Rectified Flow Transformers* (SD3).

Sections 2 and 3: paths, predictions, timestep densities, the loss and its weights, the ODE solver.
Time convention, here and everywhere: t = 0 is data, t = 1 is noise; sampling runs from 1 to 0.
One idea carries the file: the network's input z = a x0 + b eps and its target p x0 + q eps are two
vectors in the plane of (x0, eps), so its output gives both back, without a branch for predictions.
Read next: `toy2d.py`, where p_t and u_t are exact; `mmdit.py`, the network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# f(z (B,...), t (B,), *cond) -> (B,...): a network or a velocity field
Field = Callable[..., Tensor]


def at_least_float32(t: Tensor | float) -> Tensor:
    """Coefficients of t are never computed in half precision."""
    t = torch.as_tensor(t)
    return t.to(torch.promote_types(t.dtype, torch.float32))


def expand(t: Tensor, z: Tensor) -> Tensor:
    """(B,) -> (B,1,...,1), to multiply z (B,...)."""
    return t.reshape(t.shape + (1,) * (z.dim() - t.dim()))


class Table:
    """Constants in float64: `like(t)` is on t's device and in its dtype, copied there once, as each
    copy to a GPU would wait for it."""

    def __init__(self, values: Tensor):
        self.values, self.copies = values, {}

    def like(self, t: Tensor) -> Tensor:
        key = t.device, t.dtype
        if key not in self.copies:
            self.copies[key] = self.values.to(t)
        return self.copies[key]


# --------------------------------------------------------------------------------------------------
# Paths: (2), (4), (5), (9), (10), and the table (13), (14), (17) of SD3 section 3


class Path:
    """(2): z_t = a_t x0 + b_t eps, eps ~ N(0, I), from data at t = 0 to noise at t = 1.

    A path is its coefficients(t) = (a, b, a', b') and time(log_snr), the inverse of log_snr(t);
    everything else follows. Training draws t inside [t_min, t_max] and sampling starts at t_max.
    All functions of t keep its shape.
    """

    t_min, t_max = 0.0, 1.0

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def time(self, log_snr: Tensor) -> Tensor:
        """The t in [0, 1] whose log-SNR this is."""
        raise NotImplementedError

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, a', b') at t, in float32 or better; the prime is d/dt."""
        return self._coefficients(at_least_float32(t))

    def a(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[0]

    def b(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[1]

    def da(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[2]

    def db(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[3]

    def c_in(self, t: Tensor) -> Tensor:
        """The scale of the network's input: it is called on c_in z. Only EDM's differs from 1."""
        return torch.ones_like(at_least_float32(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(a_t^2 / b_t^2)."""
        a, b, _, _ = self.coefficients(t)
        return 2 * torch.log(a / b)

    def dlog_snr(self, t: Tensor) -> Tensor:
        """lambda'_t = 2 (a'/a - b'/b)."""
        a, b, da, db = self.coefficients(t)
        return 2 * (da / a - db / b)

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(2), and (4) psi_t(x0 | eps): z_t = a_t x0 + b_t eps."""
        a, b, _, _ = self.coefficients(expand(t, x0))
        return a * x0 + b * eps

    def conditional_velocity(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(5), (9), (10): u_t(z | eps) = (a'/a) z - (b/2) lambda' eps. Undefined where a_t = 0.

        Written as (a'/a) z - (b a'/a - b') eps: in the form with lambda', b lambda' is 0 * inf at
        t = 0.
        """
        a, b, da, db = self.coefficients(expand(t, z))
        return da / a * z - (b * da / a - db) * eps

    def shift(self, t: Tensor, s: float) -> Tensor:
        """SD3 5.3.2: t_m = s t_n/(1 + (s - 1) t_n) on the RF path, s = sqrt(m/n).

        On any path: lambda_m = lambda_n - 2 log s.
        """
        return t if s == 1 else self.time(self.log_snr(t) - 2 * math.log(s))

    def grid(self, steps: int) -> Tensor:
        """The default times of `steps` steps: (steps + 1,) float64, from t_max down to t_min."""
        return torch.linspace(self.t_max, self.t_min, steps + 1, dtype=torch.float64)


class RectifiedFlow(Path):
    """(13): z_t = (1 - t) x0 + t eps, the straight line; its velocity is eps - x0."""

    def _coefficients(self, t):
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)

    def time(self, log_snr):
        return torch.sigmoid(-log_snr / 2)


class Cosine(Path):
    """(17): z_t = cos(pi t/2) x0 + sin(pi t/2) eps.

    With t_max < 1 for eps-prediction, which is singular at a = 0.
    """

    def __init__(self, t_max: float = 1.0):
        self.t_max = t_max

    def _coefficients(self, t):
        half_pi = math.pi / 2
        a = torch.sin(half_pi * (1 - t))  # float32's cos(pi t/2) is -4e-8 at t = 1
        b = torch.sin(half_pi * t)
        return a, b, -half_pi * b, half_pi * a

    def time(self, log_snr):
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


class LDMLinear(Path):
    """LDM-linear: a_t = sqrt(prod_{s<=t} (1 - beta_s)), b_t = sqrt(1 - a_t^2), T = 1000 steps.

    t in [0, 1] is index (T - 1) t of the table, log a^2 linear in between (so a' jumps at the
    entries). The noise is never pure, a_1 = 0.0683, and the data never quite clean, b_0 = 0.029:
    the last sampling step returns x0_hat.
    """

    def __init__(self):
        # beta_t = (sqrt(beta_0) + t/(T-1) (sqrt(beta_{T-1}) - sqrt(beta_0)))^2
        self._tabulate(
            torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
        )

    def _tabulate(self, beta: Tensor) -> None:
        self._log_a2 = Table(torch.log1p(-beta).cumsum(0))

    def _coefficients(self, t):
        table = self._log_a2.like(t)
        last = len(table) - 1
        i = (last * t).long().clamp(0, last - 1)
        start, end = table.take(i), table.take(i + 1)  # table[i] of one i would wait for a GPU
        slope = end - start
        log_a2 = start + (last * t - i) * slope
        a, b = torch.exp(log_a2 / 2), torch.sqrt(-torch.expm1(log_a2))
        da = a * slope * last / 2
        return a, b, da, -a * da / b  # a^2 + b^2 = 1

    def time(self, log_snr):
        log_a2 = torch.nn.functional.logsigmoid(log_snr)
        table = self._log_a2.like(log_snr)
        last = len(table) - 1
        i = (torch.searchsorted(-table, -log_a2.contiguous()) - 1).clamp(0, last - 1)
        return ((i + (log_a2 - table[i]) / (table[i + 1] - table[i])) / last).clamp(0, 1)


class DDPMLinear(LDMLinear):
    """DDPM-linear: the same with beta_t = beta_0 + t/(T-1) (beta_{T-1} - beta_0); a_1 = 0.00635."""

    def __init__(self):
        self._tabulate(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


class EDM(Path):
    """(14): z_t = x0 + b_t eps, b_t = exp F_N^-1(t | P_m, P_s^2).

    So for t ~ U (15): lambda_t ~ N(-2 P_m, (2 P_s)^2).

    b runs from 0 to infinity, so t stops short of both ends: at the quantiles 1e-4 and 1 - 1e-4 of
    sigma. sigma_data is (16)'s 0.5, a constant of the formulas; data have unit std all the same.
    """

    t_min, t_max = 1e-4, 1 - 1e-4

    def __init__(self, P_m: float = -1.2, P_s: float = 1.2, sigma_data: float = 0.5):
        if not (P_s > 0 and math.isfinite(P_m) and math.isfinite(P_s)):
            raise ValueError(
                f"EDM takes a finite P_m and P_s > 0, got P_m = {P_m:g}, P_s = {P_s:g}"
            )
        self.P_m, self.P_s, self.sigma_data = P_m, P_s, sigma_data

    def _coefficients(self, t):
        n = torch.special.ndtri(t)  # the standard normal quantile
        b = torch.exp(self.P_m + self.P_s * n)
        db = self.P_s * math.sqrt(2 * math.pi) * torch.exp(self.P_m + n * (self.P_s + n / 2))
        return torch.ones_like(t), b, torch.zeros_like(t), db

    def time(self, log_snr):
        return torch.special.ndtr((-log_snr / 2 - self.P_m) / self.P_s)

    def c_in(self, t):
        """c_in = 1/sqrt(sigma^2 + sigma_data^2), sigma = b_t."""
        return 1 / torch.sqrt(self.b(t) ** 2 + self.sigma_data**2)

    def grid(self, steps):
        """Karras et al. 2022 (5): sigma^(1/rho) uniform between the ends, rho = 7."""
        ends = torch.tensor([self.t_max, self.t_min], dtype=torch.float64)
        sigma_max, sigma_min = (self.b(ends) ** (1 / 7)).tolist()
        sigma = torch.linspace(sigma_max, sigma_min, steps + 1, dtype=torch.float64) ** 7
        return self.time(-2 * torch.log(sigma)).clamp(self.t_min, self.t_max)


class MatchedEDM(EDM):
    """z_t = x0 + b_t eps, the log-SNR another path's: b_t = t/(1-t) (rf), tan(pi t/2) (cosine).

    Our reading of `edm/rf` and `edm/cos`: the paper says only that they match "the log-SNR
    weighting".
    """

    def __init__(self, path: Path, sigma_data: float = 0.5):
        self.path, self.sigma_data = path, sigma_data

    def _coefficients(self, t):
        a, b, da, db = self.path.coefficients(t)
        return torch.ones_like(t), b / a, torch.zeros_like(t), (db - b * da / a) / a

    def time(self, log_snr):
        return self.path.time(log_snr)

    grid = Path.grid  # uniform in t


# --------------------------------------------------------------------------------------------------
# Predictions: what the network is asked for, as (p, q) of target = p x0 + q eps

PREDICTIONS: dict[str, Callable[[Path, Tensor], tuple[Tensor, Tensor]]] = {
    "velocity": lambda path, t: path.coefficients(t)[2:],  # (a', b'), the path's own velocity
    "eps": lambda path, t: (torch.zeros_like(t), torch.ones_like(t)),
    "x0": lambda path, t: (torch.ones_like(t), torch.zeros_like(t)),
    "v": lambda path, t: (
        -path.b(t),
        path.a(t),
    ),  # Salimans & Ho 2022, for variance-preserving paths
    # (16), EDM: p = (1 - c_skip)/c_out and q = -c_skip sigma/c_out, simplified: 1 - c_skip cancels
    # at small sigma
    "F": lambda path, t: (
        path.b(t) * path.c_in(t) / path.sigma_data,
        -path.sigma_data * path.c_in(t),
    ),
}


# --------------------------------------------------------------------------------------------------
# Timestep densities pi(t): how t is drawn. (How the loss is weighted then follows:
# `Formulation.weight`.)


def _draw(n: int, generator: torch.Generator | None, draw=torch.rand) -> Tensor:
    return draw(n, generator=generator, device=generator.device if generator else None)


class Uniform:
    """t ~ U(0, 1)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return _draw(n, generator)

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))


class LogitNormal:
    """(19): logit t ~ N(m, s^2)."""

    def __init__(self, m: float, s: float):
        if not (s > 0 and math.isfinite(m) and math.isfinite(s)):
            raise ValueError(f"lognorm(m,s) takes a finite m and s > 0, got m = {m:g}, s = {s:g}")
        self.m, self.s = m, s

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.sigmoid(self.m + self.s * _draw(n, generator, torch.randn))

    def density(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        inside = (t > 0) & (t < 1)  # 0 at both ends, where the formula is 0/0
        u = torch.logit(t.where(inside, 0.5))
        pi = torch.exp(-((u - self.m) ** 2) / (2 * self.s**2)) / (
            self.s * math.sqrt(2 * math.pi) * t * (1 - t)
        )
        return pi.where(inside, 0)


class Mode:
    """(20): t = f(u; s) = 1 - u - s (cos^2(pi u/2) - 1 + u), u ~ U(0, 1); s = 0 is uniform.

    f is decreasing for -1 <= s <= 2/(pi - 2) and only there; pi_mode = |d f^-1/dt| has no closed
    form.
    """

    def __init__(self, s: float):
        if not -1 <= s <= 2 / (math.pi - 2):
            raise ValueError(
                f"mode(s) is monotone only for -1 <= s <= 2/(pi-2) = 1.7519, got s = {s:g}"
            )
        self.s = s

    def f(self, u: Tensor) -> Tensor:
        return 1 - u - self.s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.f(_draw(n, generator)).clamp(0, 1)

    def density(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        lo, hi = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):  # u = f^-1(t) by bisection
            u = (lo + hi) / 2
            above = self.f(u) > t
            lo, hi = u.where(above, lo), hi.where(above, u)
        return 1 / torch.abs(1 + self.s - self.s * math.pi / 2 * torch.sin(math.pi * u))


class CosMap:
    """(21): t = f(u) = 1 - 1/(tan(pi u/2) + 1), u ~ U(0, 1): the cosine path's log-SNR, on rf."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        u = math.pi / 2 * _draw(n, generator)
        return torch.sin(u) / (torch.sin(u) + torch.cos(u))  # (21) without tan's pole

    def density(self, t: Tensor) -> Tensor:
        """(22)."""
        t = at_least_float32(t)
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


# --------------------------------------------------------------------------------------------------
# Formulations: the loss (8), (11), (12), its weights (16), (18), and what a trained network means


@dataclass(frozen=True)
class Formulation:
    """A path, what the network predicts on it (a key of PREDICTIONS), and training's density of t.

    A network is always called as network(c_in(t) z, t, *cond), with z (B,...), t (B,) in [0, 1].
    """

    name: str
    path: Path
    prediction: str
    density: Uniform | LogitNormal | Mode | CosMap = Uniform()
    shift: float = 1.0  # resolution-dependent, of training's t and of sampling's grid alike

    def _plane(self, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """a, b, p, q, c_in at t (B,), each (B,1,...,1)."""
        t = expand(at_least_float32(t), like)
        return (
            *self.path.coefficients(t)[:2],
            *PREDICTIONS[self.prediction](self.path, t),
            self.path.c_in(t),
        )

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Training's t (n,) ~ pi, clamped into [t_min, t_max] (`torch.rand` does return 0)."""
        t = self.path.shift(self.density.sample(n, generator), self.shift)
        return t.clamp(self.path.t_min, self.path.t_max)

    def pair(self, x0: Tensor, eps: Tensor, t: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input c_in (a x0 + b eps) and its target p x0 + q eps, both (B,...).

        The conditions do not matter here; they do for PeRFlow's pairs, which a teacher makes.
        """
        a, b, p, q, c_in = self._plane(t, x0)
        return c_in * (a * x0 + b * eps), p * x0 + q * eps

    def examples(
        self, x0: Tensor, *cond: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """(z, t, target, *cond), t ~ pi and eps ~ N(0, I) drawn: what a step of training needs."""
        device = generator.device if generator else x0.device
        t = self.draw(len(x0), generator).to(x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype).to(
            x0.device
        )
        z, target = self.pair(x0, eps, t)
        return z, t, target, *cond

    def loss(
        self, network: Field, x0: Tensor, *cond: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """(8), (11), (12) in one: E_{t ~ pi, eps} |network(c_in z_t, t) - target|^2, a scalar.

        The mean runs over batch and dimensions. What it weighs in the terms of L_w, `weight` tells.
        """
        z, t, target, *cond = self.examples(x0, *cond, generator=generator)
        return (network(z, t, *cond) - target).square().mean()

    def weight(self, t: Tensor) -> Tensor:
        """w_t = -2 pi(t) (det/a)^2 / lambda'_t, the constant included.

        The loss is L_w(x0) = -1/2 E_{t~U} w_t lambda'_t |eps_Theta - eps|^2.

        (18) t/(1-t) pi(t) for rf, (16) for EDM's F, sech(lambda/2)/pi for eps/cos, (2/pi)
        e^(-lambda/2) for v/cos. With lambda' = 2 (a' b - b' a)/(a b), so that nothing is 0 * inf
        at t = 0.
        """
        t = at_least_float32(t)
        a, b, da, db = self.path.coefficients(t)
        p, q = PREDICTIONS[self.prediction](self.path, t)
        pi = self.density.density(t)
        if self.shift != 1:  # the density of the shifted t, by the change of variables
            unshifted = self.path.shift(t, 1 / self.shift)
            pi = (
                self.density.density(unshifted)
                * self.path.dlog_snr(t)
                / self.path.dlog_snr(unshifted)
            )
        return pi * (a * q - b * p) ** 2 * b / (a * (a * db - b * da))

    def ends(self, network: Field) -> Callable[..., tuple[Tensor, Tensor]]:
        """What an output means: f(z, t, *cond) = (x0_hat, eps_hat), the ends of the line through z.

        z = a x0 + b eps and o = p x0 + q eps, solved for x0 and eps; det = a q - b p.
        """

        def ends(z: Tensor, t: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
            a, b, p, q, c_in = self._plane(t, z)
            o = network(c_in * z, at_least_float32(t), *cond)
            det = a * q - b * p
            return (q * z - b * o) / det, (a * o - p * z) / det

        return ends

    def velocity(self, network: Field) -> Field:
        """The velocity field v(z, t, *cond) = a' x0_hat + b' eps_hat, on this path."""
        ends = self.ends(network)

        def velocity(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            x0_hat, eps_hat = ends(z, t, *cond)
            _, _, da, db = self.path.coefficients(expand(t, z))
            return da * x0_hat + db * eps_hat

        return velocity

    def rectified(self, network: Field) -> Field:
        """The same network as a velocity field v(z, t, *cond) = eps_hat - x0_hat on the RF path.

        z/(a+b) lies on the RF path at b/(a+b). Beyond [t_min, t_max] the network is asked at the
        nearer end.
        """
        if self.prediction == "velocity" and isinstance(self.path, RectifiedFlow):
            return network  # it is one
        ends = self.ends(network)

        def rectified(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            t = self.path.time(RectifiedFlow().log_snr(t)).clamp(self.path.t_min, self.path.t_max)
            a, b, _, _ = self.path.coefficients(expand(t, z))
            x0_hat, eps_hat = ends((a + b) * z, t, *cond)
            return eps_hat - x0_hat

        return rectified

    def sample(
        self,
        network: Field,
        noise: Tensor,
        *cond: Tensor,
        steps: int,
        times: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """Standard noise (B,...) -> x0 (B,...) in `steps` first-order steps of the plane.

        z_s = a_s x0_hat + b_s eps_hat is Euler in t for rf, DDIM for variance-preserving paths,
        Euler in sigma for EDM. The last step returns x0_hat. `times` (steps + 1, decreasing)
        replaces the path's default grid (shifted).
        """
        if times is None:
            times = self.path.shift(self.path.grid(_positive(steps)), self.shift)
            times = times.clamp(self.path.t_min, self.path.t_max)
        times = _grid(times, steps, noise)
        ends = self.ends(network)
        z = self.path.b(times[0]) * noise
        for i in range(steps):
            x0_hat, eps_hat = ends(z, times[i].expand(len(z)), *cond)
            a, b, _, _ = self.path.coefficients(times[i + 1])
            z = a * x0_hat + b * eps_hat
        return x0_hat


_FORMULATIONS: dict[str, Callable[..., tuple]] = {  # name(arguments): path, prediction, density
    "rf": lambda: (RectifiedFlow(), "velocity"),
    "rf/lognorm(m,s)": lambda m, s: (RectifiedFlow(), "velocity", LogitNormal(m, s)),
    "rf/mode(s)": lambda s: (RectifiedFlow(), "velocity", Mode(s)),
    "rf/cosmap": lambda: (RectifiedFlow(), "velocity", CosMap()),
    "eps/linear": lambda: (LDMLinear(), "eps"),
    "v/linear": lambda: (LDMLinear(), "v"),
    "eps/ddpm": lambda: (DDPMLinear(), "eps"),
    "v/ddpm": lambda: (DDPMLinear(), "v"),
    "eps/cos": lambda: (Cosine(t_max=0.999), "eps"),
    "v/cos": lambda: (Cosine(), "v"),
    "edm(Pm,Ps)": lambda P_m, P_s: (EDM(P_m, P_s), "F"),
    "edm/rf": lambda: (MatchedEDM(RectifiedFlow()), "F"),
    "edm/cos": lambda: (MatchedEDM(Cosine()), "F"),
}

# The 61 of SD3's section 5.1. The grids of lognorm (5 x 6) and edm (5 x 3) are our reading of the
# paper's ranges.
STUDY: list[str] = [
    *("eps/linear", "v/linear", "eps/cos", "v/cos", "rf", "rf/cosmap", "edm/rf", "edm/cos"),
    *(f"rf/mode({s:.2f})" for s in (-1, -0.54, -0.08, 0.38, 0.83, 1.29, 1.75, 1)),
    *(
        f"rf/lognorm({m:.2f},{s:.2f})"
        for m in (-1, -0.5, 0, 0.5, 1)
        for s in (0.2, 0.6, 1, 1.4, 1.8, 2.2)
    ),
    *(f"edm({P_m:.2f},{P_s:.2f})" for P_m in (-1.2, -0.6, 0, 0.6, 1.2) for P_s in (0.6, 1.2, 1.8)),
]


def formulation(name: str, shift: float = 1.0) -> Formulation:
    """A formulation by the paper's name, as in "rf/lognorm(0.00,1.00)".

    ValueError on an unknown name or value.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be a positive number, got {shift:g}")
    match = re.fullmatch(r"([a-z/]+)(?:\(([^()]*)\))?", name)
    arguments = match[2].split(",") if match and match[2] is not None else []
    for pattern, build in _FORMULATIONS.items():
        head, _, parameters = pattern.rstrip(")").partition("(")
        if (
            match
            and match[1] == head
            and len(arguments) == len(parameters.split(",") if parameters else [])
        ):
            try:
                numbers = [float(argument) for argument in arguments]
            except ValueError:
                raise ValueError(
                    f"formulation {name!r}: the arguments of {pattern} must be numbers"
                ) from None
            return replace(Formulation(name, *build(*numbers)), shift=shift)
    raise ValueError(f"unknown formulation {name!r}; choose from {', '.join(_FORMULATIONS)}")


# --------------------------------------------------------------------------------------------------
# (1): dz = v(z, t) dt, from t = 1 down to t = 0

# Explicit Runge-Kutta: stage i looks ahead by c_i of the step along stage i-1; the step is the
# w-mean of the stages.
SOLVERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "euler": ((0,), (1,)),
    "heun": ((0, 1), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


def _positive(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


def _grid(times: Sequence[float] | Tensor, steps: int, z: Tensor) -> Tensor:
    """The solver's times, checked, beside z; in z's precision, but never half."""
    times = torch.as_tensor(times, dtype=torch.promote_types(z.dtype, torch.float32)).to(z.device)
    if len(times) != _positive(steps) + 1:
        raise ValueError(f"{steps} steps need {steps + 1} times, got {len(times)}")
    return times


def solve(
    velocity: Field,
    z: Tensor,
    *cond: Tensor,
    steps: int,
    t_start: float | Tensor = 1.0,
    t_end: float | Tensor = 0.0,
    method: str = "euler",
    times: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """(1): carry z (B,...) along dz = v(z, t, *cond) dt, by default from noise to data.

    Never scales z. t_start and t_end are numbers or (B,), each sample its own interval; `times`,
    (steps + 1,) or (steps + 1, B), replaces the uniform grid between them. ValueError on an
    unknown method or steps < 1.
    """
    if method not in SOLVERS:
        raise ValueError(f"unknown solver {method!r}; choose from {', '.join(SOLVERS)}")
    if times is None:
        how = {"dtype": torch.promote_types(z.dtype, torch.float32), "device": z.device}
        w = torch.linspace(0, 1, _positive(steps) + 1, **how)[:, None]
        start, end = (torch.as_tensor(t, **how) for t in (t_start, t_end))
        times = (1 - w) * start + w * end  # (steps + 1, 1) or (steps + 1, B)
    times = _grid(times, steps, z).reshape(steps + 1, -1).expand(-1, len(z))
    for t, s in zip(times, times[1:], strict=False):
        h = s - t
        k, dz = torch.zeros_like(z), torch.zeros_like(z)
        for c, w in zip(*SOLVERS[method], strict=True):
            k = velocity(z + expand(c * h, z) * k, t + c * h, *cond)
            dz = dz + w * k
        z = z + expand(h, z) * dz
    return z


def guide(velocity: Field, null_cond: Sequence[Tensor], scale: float) -> Field:
    """Guidance: v_uncond + scale (v_cond - v_uncond), in one batch of 2B; scale 1 is off.

    null_cond is aligned with *cond, each entry broadcast over the batch. Works on a velocity field
    as on a network.
    """
    if scale == 1:
        return velocity

    def guided(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        both = (
            torch.cat([c, torch.as_tensor(n).to(c).expand_as(c)])
            for c, n in zip(cond, null_cond, strict=True)
        )
        v_cond, v_uncond = velocity(torch.cat([z, z]), torch.cat([t, t]), *both).chunk(2)
        return v_uncond + scale * (v_cond - v_uncond)

    return guided
