"""Rectified flow and its relatives: (1)-(22) of *Scaling Rectified Flow Transformers* (SD3).

First rectified flow itself, in a dozen lines; then what generalises them. One idea carries it: the
network's input a x0 + b eps and its target p x0 + q eps are two vectors in the plane of (x0, eps).
So from z and the output one can solve for both, whichever target was chosen: the *ends*.
Time, here and everywhere: t = 0 is data, t = 1 is noise; sampling runs from 1 down to 0.
Read next: `toy2d.py`, where p_t and u_t are exact, or `mmdit.py`, the network."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

Field = Callable[..., Tensor]  # f(z (B,...), t (B,), *cond) -> (B,...): a network or velocity field
Generator = torch.Generator | None  # None draws from PyTorch's own
Times = Sequence[float] | Tensor | None
Pair = tuple[Tensor, Tensor]
Rows = tuple[Tensor, ...]  # (z_in, t, target, *cond), batch first: what a step of training needs


# ---- Rectified flow, whole. The rest of this file generalises these lines.
def rectified_flow_loss(network, x0, generator=None):
    """(8) on the path (13): the network learns the velocity eps - x0 of the line from x0 to eps."""
    t = torch.rand(len(x0), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    a, b = expand(1 - t, x0), expand(t, x0)  # (B,1,...,1)
    z = a * x0 + b * eps
    target = eps - x0
    return (network(z, t) - target).square().mean()


def rectified_flow_sample(network, noise, steps):
    """(1) in Euler steps, from noise at t = 1 down to data at t = 0."""
    z, times = noise, torch.linspace(1, 0, steps + 1)
    for t, t_next in zip(times, times[1:], strict=False):
        z = z + (t_next - t) * network(z, t.expand(len(z)))
    return z


def at_least_float32(t: Tensor | float) -> Tensor:
    """t as a tensor. Coefficients of t are never computed in half precision."""
    t = torch.as_tensor(t)
    return t.to(torch.promote_types(t.dtype, torch.float32))


def expand(t: Tensor | float, z: Tensor) -> Tensor:
    """t (B,) -> (B,1,...,1), to multiply z (B,...). A number stands for all of the batch."""
    if not isinstance(t, Tensor):
        dtype = torch.promote_types(z.dtype, torch.float32)
        t = torch.full((len(z),), t, dtype=dtype, device=z.device)
    return t.reshape(t.shape + (1,) * (z.dim() - t.dim()))


def gaussian_like(x0: Tensor, generator: Generator = None) -> Tensor:
    """eps ~ N(0, I) of x0's shape, drawn on the generator's device and moved to x0's."""
    device = generator.device if generator else x0.device
    eps = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype)
    return eps.to(x0.device)


# ---- Paths: (2), (4), (5), (9), (10), and the table (13), (14), (17) of SD3 section 3
class Path:
    """(2): z_t = a_t x0 + b_t eps, eps ~ N(0, I), from data at t = 0 to noise at t = 1.
    A path is its coefficients (a, b, a', b') at t, and time(log_snr), the t in [0, 1] that has this
    log-SNR; everything else follows. Training draws t inside [t_min, t_max], and the default `grid`
    runs from t_max to t_min. All functions of t keep its shape."""

    t_min, t_max = 0.0, 1.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(a, b, a', b') at t, in float32 or better; the prime is d/dt."""
        return self._coefficients(at_least_float32(t))

    a = lambda self, t: self.coefficients(t)[0]
    b = lambda self, t: self.coefficients(t)[1]
    da = lambda self, t: self.coefficients(t)[2]
    db = lambda self, t: self.coefficients(t)[3]

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

    def derivative(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(4): psi'_t(x0 | eps) = a'_t x0 + b'_t eps."""
        _, _, da, db = self.coefficients(expand(t, x0))
        return da * x0 + db * eps

    def invert(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(4): psi_t^-1(z | eps) = (z - b_t eps)/a_t. It is undefined where a_t = 0."""
        a, b, _, _ = self.coefficients(expand(t, z))
        return (z - b * eps) / a

    def conditional_velocity(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(5): u_t(z | eps) = psi'_t(psi_t^-1(z | eps) | eps). It is undefined where a_t = 0.
        Written out it is (9), (a'/a) z - (b a'/a - b') eps, and (10), (a'/a) z - (b/2) lambda' eps.
        The form with lambda' is not used, as b lambda' is 0 * inf at t = 0."""
        return self.derivative(self.invert(z, eps, t), eps, t)

    def shift(self, t: Tensor, s: float) -> Tensor:
        """SD3 5.3.2: t_m = s t_n/(1 + (s - 1) t_n) on the RF path, s = sqrt(m/n).
        On any path: lambda_m = lambda_n - 2 log s."""
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
    """(17): z_t = cos(pi t/2) x0 + sin(pi t/2) eps."""

    def _coefficients(self, t):
        half_pi = math.pi / 2
        a = torch.sin(half_pi * (1 - t))  # float32's cos(pi t/2) is -4e-8 at t = 1
        b = torch.sin(half_pi * t)
        return a, b, -half_pi * b, half_pi * a

    def time(self, log_snr):
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


@cache
def constants(table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A table beside t, moved there once: each move to a GPU would make the CPU wait for it."""
    return table.to(device, dtype)


class LDMLinear(Path):
    """LDM-linear: a_t = sqrt(prod_{s<=t} (1 - beta_s)), b_t = sqrt(1 - a_t^2), T = 1000 steps.
    t in [0, 1] is index (T - 1) t of the table. log a^2 is linear between entries; a' jumps at each
    entry. Noise is never pure, a_1 = 0.0683, nor are data quite clean, b_0 = 0.029: the last
    sampling step returns x0_hat."""

    # beta_t = (sqrt(beta_0) + t/(T-1) (sqrt(beta_{T-1}) - sqrt(beta_0)))^2
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    _log_a2 = torch.log1p(-beta).cumsum(0)

    def _coefficients(self, t):
        table = constants(self._log_a2, t.device, t.dtype)
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
        table = constants(self._log_a2, log_snr.device, log_snr.dtype)
        last = len(table) - 1
        i = (torch.searchsorted(-table, -log_a2.contiguous()) - 1).clamp(0, last - 1)
        return ((i + (log_a2 - table[i]) / (table[i + 1] - table[i])) / last).clamp(0, 1)


class DDPMLinear(LDMLinear):
    """DDPM-linear: the same with beta_t = beta_0 + t/(T-1) (beta_{T-1} - beta_0); a_1 = 0.00635."""

    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    _log_a2 = torch.log1p(-beta).cumsum(0)


class EDM(Path):
    """(14): z_t = x0 + b_t eps, b_t = exp F_N^-1(t | P_m, P_s^2).
    So for t ~ U (15) holds: lambda_t ~ N(-2 P_m, (2 P_s)^2).
    b runs from 0 to infinity, so t stops short of both ends: at the quantiles 1e-4 and 1 - 1e-4 of
    sigma. (16) fixes sigma_data = 0.5. Our data have standard deviation 1; we keep the paper's 0.5.
    (16)'s c_noise = log(sigma)/4 is not used: our networks take t itself, which rises with it."""

    t_min, t_max, sigma_data = 1e-4, 1 - 1e-4, 0.5

    def __init__(self, P_m: float = -1.2, P_s: float = 1.2):
        if not (P_s > 0 and math.isfinite(P_m) and math.isfinite(P_s)):
            raise InputError(f"EDM takes a finite P_m and P_s > 0, got {P_m:g} and {P_s:g}")
        self.P_m, self.P_s = P_m, P_s

    def _coefficients(self, t):
        n = torch.special.ndtri(t)  # the standard normal quantile; n' = sqrt(2 pi) exp(n^2/2)
        b = torch.exp(self.P_m + self.P_s * n)
        # b' = P_s n' b, in one exponential
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
    """z_t = x0 + b_t eps with another path's log-SNR: b_t = t/(1-t) (rf), tan(pi t/2) (cosine).
    Our reading of `edm/rf`, `edm/cos`: the paper says that they match "the log-SNR weighting"."""

    def __init__(self, path: Path):
        self.path, self.time = path, path.time

    def _coefficients(self, t):
        a, b, da, db = self.path.coefficients(t)
        return torch.ones_like(t), b / a, torch.zeros_like(t), (db - b * da / a) / a

    grid = Path.grid  # uniform in t


# ---- Predictions: what the network is asked for, as (p, q) of target = p x0 + q eps.
# Input and target give back both ends of the line as long as det = a q - b p is not 0. It is 0 for
# eps where a = 0 and for x0 where b = 0; `Formulation` keeps t away from there.
def edm_prediction(path: EDM, t: Tensor) -> Pair:
    """(16), F: p = (1 - c_skip)/c_out, q = -c_skip sigma/c_out, with c_skip = sigma_d^2 c_in^2 and
    c_out = sigma sigma_d c_in. Simplified, as 1 - c_skip would cancel at small sigma."""
    c_in = path.c_in(t)
    return path.b(t) * c_in / path.sigma_data, -path.sigma_data * c_in


PREDICTIONS: dict[str, Callable[[Path, Tensor], Pair]] = {
    "velocity": lambda path, t: path.coefficients(t)[2:],  # (a', b'), the path's own velocity
    "eps": lambda path, t: (torch.zeros_like(t), torch.ones_like(t)),
    "x0": lambda path, t: (torch.ones_like(t), torch.zeros_like(t)),
    "v": lambda path, t: (-path.b(t), path.a(t)),  # Salimans & Ho 2022, where a^2 + b^2 = 1
    "F": edm_prediction,
}


# ---- Densities pi(t): how t is drawn. The loss carries no weight (omega = 1); `Formulation.weight`
# says which w_t of the paper this equals.
def draws(n: int, generator: Generator, draw=torch.rand) -> Tensor:
    """n draws of U(0, 1), or of another law, on the generator's device."""
    return draw(n, generator=generator, device=generator.device if generator else None)


class Uniform:
    """t ~ U(0, 1)."""

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        return draws(n, generator)

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))


class LogitNormal:
    """(19): logit t ~ N(m, s^2)."""

    def __init__(self, m: float, s: float):
        if not (s > 0 and math.isfinite(m) and math.isfinite(s)):
            raise InputError(f"lognorm(m,s) takes a finite m and s > 0, got m = {m:g}, s = {s:g}")
        self.m, self.s = m, s

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        return torch.sigmoid(self.m + self.s * draws(n, generator, torch.randn))

    def density(self, t: Tensor) -> Tensor:
        """(19): 1/(s sqrt(2 pi)) 1/(t (1 - t)) exp(-(logit t - m)^2/(2 s^2)), and 0 at both ends,
        where the formula is 0/0."""
        t = at_least_float32(t)
        inside = (t > 0) & (t < 1)
        u = torch.logit(t.where(inside, 0.5))
        normal = torch.exp(-((u - self.m) ** 2) / (2 * self.s**2))
        pi = normal / (self.s * math.sqrt(2 * math.pi) * t * (1 - t))
        return pi.where(inside, 0)


class Mode:
    """(20): t = f(u; s) = 1 - u - s (cos^2(pi u/2) - 1 + u), u ~ U(0, 1); s = 0 is uniform.
    f is decreasing for -1 <= s <= 2/(pi - 2) and only there; pi_mode = |d f^-1/dt| has no closed
    form."""

    def __init__(self, s: float):
        if not -1 <= s <= 2 / (math.pi - 2):
            raise InputError(f"mode(s) is monotone for -1 <= s <= 2/(pi-2) = 1.7519, got s = {s:g}")
        self.s = s

    def f(self, u: Tensor) -> Tensor:
        return 1 - u - self.s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        return self.f(draws(n, generator)).clamp(0, 1)

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

    def sample(self, n: int, generator: Generator = None) -> Tensor:
        u = math.pi / 2 * draws(n, generator)
        return torch.sin(u) / (torch.sin(u) + torch.cos(u))  # (21) without tan's pole

    def density(self, t: Tensor) -> Tensor:
        """(22): 2/(pi - 2 pi t + 2 pi t^2)."""
        t = at_least_float32(t)
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


# ---- Two errors: of a user, and of a class that is not finished
class InputError(ValueError):
    """What a user gave is no good: a command ends with it in one line. Any other error is a bug."""


def needed(call: str) -> Callable:
    """A stub for what a class has to bring. Its error says what to write."""

    def stub(of, *args, **options):
        name = of.__name__ if isinstance(of, type) else type(of).__name__
        raise NotImplementedError(f"{name} needs `{call}`")

    return stub


# ---- Formulations: the loss, its weight (16), (18), and what a trained network means
class Objective:
    """The face of an objective: what a network learns, and how that is sampled. A `Formulation`, a
    `PeRFlow` and a rival are one; a subclass brings what is `needed` here. Its rows (z_in, t,
    target, *cond) are drawn ahead by `examples`, in a thread of their own.
    x0, eps, noise, z_in and target are (B,...), t is (B,), or (B,times_given) in rows."""

    @dataclass
    class Options:
        """There is nothing to choose."""

    distils = False  # whether its flag is --NAME TEACHER, and not --NAME
    teacher_cfg = 1.0  # the guidance scale that the teacher has in training
    reuse = 1  # rows that `examples` makes of each datum
    fewest = 1  # steps in which `sample` works
    times_given = 1  # columns of t; the network's `times_taken`, by default 1, must be equal

    of = classmethod(needed("of(cls, formula, options, guided) -> the objective"))
    examples = needed("examples(self, x0, *cond, generator) -> (z_in, t, target, *cond)")
    pair = needed("pair(self, x0, eps, t, *cond) -> (z_in, target) of the validation loss")
    velocity = needed("velocity(self, network) -> v(z, t, *cond) on `path`")
    rectified = needed("rectified(self, network) -> v(z, t, *cond) on the RF path")
    grid = needed("grid(self, steps) -> (steps + 1,) times from 1 to 0")
    sample = needed("sample(self, network, noise, *cond, steps, times, method, generator) -> x0")

    def noise(self, x0: Tensor, generator: Generator = None) -> Tensor:
        """eps for x0, independent of it. A coupling of both is another `noise`: it meets the rows
        of one batch at a time."""
        return gaussian_like(x0, generator)

    @property
    def coupled(self) -> bool:
        return getattr(self.noise, "__func__", None) is not Objective.noise

    def target(self, network: Field, average: Field, rows: Rows) -> Rows:
        """The rows with their targets. An objective whose targets need the network or the average
        of its weights computes them here, in the step."""
        return rows

    def field(self, network: Field) -> Field:
        """What is fitted to the targets, f(z_in, t, *cond): the network itself."""
        return network

    def rows_loss(self, network: Field, average: Field, rows: Rows) -> Tensor:
        """E |field(z_in, t, *cond) - target|^2, a mean over rows and dimensions: the loss of all
        but those that bring another."""
        field = self.field(network)
        z_in, t, target, *cond = self.target(network, average, rows)
        output = field(z_in, t, *cond)
        return (output.to(target.dtype) - target).square().mean()

    def loss(self, network: Field, x0: Tensor, *cond, generator: Generator = None) -> Tensor:
        """`rows_loss` on fresh `examples` of x0 (B,...): a scalar."""
        return self.rows_loss(network, network, self.examples(x0, *cond, generator=generator))


MARGIN = 1e-3  # how far t stays from an end of the path where det = 0


@dataclass(frozen=True)
class Formulation(Objective):
    """A path, what the network predicts on it (a key of PREDICTIONS), and training's density of t.
    A network is always called as network(c_in(t) z, t, *cond), with z (B,...), t (B,) in [0, 1].
    Where det = 0 at an end, t_min or t_max moves MARGIN inside: t_max = 0.999 for `eps/cos`.
    ValueError where det = 0 between the ends."""

    name: str
    path: Path
    prediction: str
    timesteps: Uniform | LogitNormal | Mode | CosMap = Uniform()
    shift: float = 1.0  # resolution-dependent, of training's t and of sampling's grid alike

    def __post_init__(self):
        path = copy.copy(self.path)
        t = torch.linspace(path.t_min, path.t_max, 1001, dtype=torch.float64)
        p, q = PREDICTIONS[self.prediction](path, t)
        det = path.a(t) * q - path.b(t) * p
        solvable = (det.isfinite() & (det != 0)).tolist()
        if not all(solvable[1:-1]):
            place = type(path).__name__
            raise ValueError(f"{self.prediction} on {place} says nothing of x0 and eps: det = 0")
        path.t_min += 0 if solvable[0] else MARGIN
        path.t_max -= 0 if solvable[-1] else MARGIN
        object.__setattr__(self, "path", path)

    def _plane(self, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """a, b, p, q, c_in at t (B,), each (B,1,...,1)."""
        t = at_least_float32(expand(t, like))
        a, b, _, _ = self.path.coefficients(t)
        return a, b, *PREDICTIONS[self.prediction](self.path, t), self.path.c_in(t)

    def draw(self, n: int, generator: Generator = None) -> Tensor:
        """Training's t (n,) ~ pi, clamped into [t_min, t_max] (`torch.rand` does return 0)."""
        t = self.path.shift(self.timesteps.sample(n, generator), self.shift)
        return t.clamp(self.path.t_min, self.path.t_max)

    def pair(self, x0: Tensor, eps: Tensor, t: Tensor, *cond: Tensor) -> Pair:
        """The network's input z_in = c_in (a x0 + b eps) and its target p x0 + q eps, both (B,...).
        Conditions change neither. They are taken because PeRFlow's pairs depend on them."""
        a, b, p, q, c_in = self._plane(t, x0)
        return c_in * (a * x0 + b * eps), p * x0 + q * eps

    def examples(self, x0: Tensor, *cond: Tensor, generator: Generator = None) -> Rows:
        """(z_in, t, target, *cond), with t ~ pi and eps ~ N(0, I) drawn.
        The `loss` on them, E |network(z_in, t) - target|^2, is L_w with w_t = `weight`(t). For the
        path's own velocity and t ~ U it is (8), which is (11). For eps the paper's (12) has another
        factor, ((b/2) lambda')^2, and for v on the cosine path (8) is pi^2/4 times this loss."""
        t = self.draw(len(x0), generator).to(x0.device)
        z_in, target = self.pair(x0, self.noise(x0, generator), t)
        return z_in, t, target, *cond

    def weight(self, t: Tensor) -> Tensor:
        """w_t = -2 pi(t) (det/a)^2 / lambda'_t, with which the loss is
        L_w(x0) = -1/2 E_{t~U} w_t lambda'_t |eps_Theta - eps|^2.
        One line is enough, as eps_Theta - eps = (a/det) (o - target). It gives (18), t/(1-t) pi(t),
        for rf, and the paper's other weights times pi(t) and a constant: sech(lambda/2) times 1/pi
        for eps/cos, e^(-lambda/2) times 2/pi for v/cos, (16) times 2/sigma_data^2 = 8 for F."""
        t = at_least_float32(t)
        a, b, da, db = self.path.coefficients(t)
        p, q = PREDICTIONS[self.prediction](self.path, t)
        pi = self.timesteps.density(t)
        if self.shift != 1:  # the density of the shifted t, by the change of variables
            u = self.path.shift(t, 1 / self.shift)
            pi = self.timesteps.density(u) * self.path.dlog_snr(t) / self.path.dlog_snr(u)
        # lambda' = 2 (a' b - b' a)/(a b), so that nothing is 0 * inf at t = 0
        return pi * (a * q - b * p) ** 2 * b / (a * (a * db - b * da))

    def ends(self, network: Field) -> Callable[..., Pair]:
        """What an output means: f(z, t, *cond) = (x0_hat, eps_hat), the ends of the line through z.
        z = a x0 + b eps and o = p x0 + q eps, solved for x0 and eps; det = a q - b p."""

        def ends(z: Tensor, t: Tensor, *cond: Tensor) -> Pair:
            a, b, p, q, c_in = self._plane(t, z)
            o = network(c_in * z, at_least_float32(t).expand(len(z)), *cond)
            det = a * q - b * p
            return (q * z - b * o) / det, (a * o - p * z) / det

        return ends

    def velocity(self, network: Field) -> Field:
        """The velocity field v(z, t, *cond) = a' x0_hat + b' eps_hat, on this path."""
        ends = self.ends(network)
        return lambda z, t, *cond: self.path.derivative(*ends(z, t, *cond), t)

    def rectified(self, network: Field) -> Field:
        """The same network as a velocity field v(z, t, *cond) = eps_hat - x0_hat on the RF path,
        whose point z/(a+b) at b/(a+b) is z here. Beyond [t_min, t_max] it is asked at the end."""
        if self.prediction == "velocity" and isinstance(self.path, RectifiedFlow):
            return network  # it is one
        ends = self.ends(network)

        def rectified(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            t = self.path.time(RectifiedFlow().log_snr(t)).clamp(self.path.t_min, self.path.t_max)
            a, b, _, _ = self.path.coefficients(expand(t, z))
            x0_hat, eps_hat = ends((a + b) * z, t, *cond)
            return eps_hat - x0_hat

        return rectified

    def grid(self, steps: int) -> Tensor:
        """The default times of `sample`: the path's grid, shifted; (steps + 1,) float64."""
        times = self.path.shift(self.path.grid(_positive(steps)), self.shift)
        return times.clamp(self.path.t_min, self.path.t_max)

    def sample(
        self, network: Field, noise: Tensor, *cond: Tensor,
        steps: int | None = None, times: Times = None, method: str = "euler",
        generator: Generator = None,
    ) -> Tensor:  # fmt: skip
        """Standard noise (B,...) -> x0 (B,...), in `steps` steps or at these `times` of the path,
        which fall from 1 to 0. (From another state, or to another time, `solve` the `velocity`.)
        `euler` computes the ends and puts them together again with the next a and b: Euler in t for
        rf, DDIM for variance-preserving paths, Euler in sigma for EDM. It ends with x0_hat. Other
        methods `solve` the network as a flow on the RF path, at the times of equal log-SNR. A
        generator is for objectives that draw fresh noise in sampling; a flow draws none."""
        if times is not None:
            times = _checked_times(times, steps, noise)
            if times[0] != 1 or times[-1] != 0 or (times[1:] >= times[:-1]).any():
                raise ValueError(f"times must fall from 1 to 0, got {times.tolist()}")
        flow = self.rectified(network)
        # a network on the RF path needs no ends: its Euler step is (1)
        if method != "euler" or flow is network:
            rf_path = RectifiedFlow()
            if times is None:  # uniform; for ab2, whose first step is Euler's, the first are longer
                grid = rf_path.grid(_positive(steps)) ** (1.5 if method == "ab2" else 1)
                times = rf_path.shift(grid, self.shift)
            elif flow is not network:
                times = rf_path.time(self.path.log_snr(times))
            return solve(flow, noise, *cond, times=times, method=method)
        times = _checked_times(self.grid(steps) if times is None else times, None, noise)
        times = times.clamp(self.path.t_min, self.path.t_max)
        ends = self.ends(network)
        z = self.path.b(times[0]) * noise
        for t, t_next in zip(times, times[1:], strict=False):
            x0_hat, eps_hat = ends(z, t.expand(len(z)), *cond)
            z = self.path.interpolate(x0_hat, eps_hat, t_next)
        return x0_hat


# ---- The paper's names
# name(arguments): path, prediction, density; or a Formulation of a class of its own
_FORMULATIONS: dict[str, Callable[..., tuple | Formulation]] = {
    "rf": lambda: (RectifiedFlow(), "velocity"),
    "rf/lognorm(m,s)": lambda m, s: (RectifiedFlow(), "velocity", LogitNormal(m, s)),
    "rf/mode(s)": lambda s: (RectifiedFlow(), "velocity", Mode(s)),
    "rf/cosmap": lambda: (RectifiedFlow(), "velocity", CosMap()),
    "eps/linear": lambda: (LDMLinear(), "eps"),
    "v/linear": lambda: (LDMLinear(), "v"),
    "eps/ddpm": lambda: (DDPMLinear(), "eps"),
    "v/ddpm": lambda: (DDPMLinear(), "v"),
    "eps/cos": lambda: (Cosine(), "eps"),
    "v/cos": lambda: (Cosine(), "v"),
    "edm(Pm,Ps)": lambda P_m, P_s: (EDM(P_m, P_s), "F"),
    "edm/rf": lambda: (MatchedEDM(RectifiedFlow()), "F"),
    "edm/cos": lambda: (MatchedEDM(Cosine()), "F"),
}

# The 61 of SD3's section 5.1. The grids of lognorm (5 x 6) and edm (5 x 3) are our reading of the
# paper's ranges. mode's first seven s are uniform in [-1, 1.75], the eighth is the paper's 1.0.
_M, _S = (-1, -0.5, 0, 0.5, 1), (0.2, 0.6, 1, 1.4, 1.8, 2.2)  # of lognorm
STUDY: list[str] = [
    *("eps/linear", "v/linear", "eps/cos", "v/cos", "rf", "rf/cosmap", "edm/rf", "edm/cos"),
    *(f"rf/mode({s:.2f})" for s in (-1, -0.54, -0.08, 0.38, 0.83, 1.29, 1.75, 1)),
    *(f"rf/lognorm({m:.2f},{s:.2f})" for m in _M for s in _S),
    *(f"edm({P_m:.2f},{P_s:.2f})" for P_m in (-1.2, -0.6, 0, 0.6, 1.2) for P_s in (0.6, 1.2, 1.8)),
]


def formulation(name: str, shift: float = 1.0) -> Formulation:
    """A formulation by the paper's name, as in "rf/lognorm(0.00,1.00)".
    ValueError on an unknown name or value."""
    if not (shift > 0 and math.isfinite(shift)):
        raise InputError(f"shift must be a positive number, got {shift:g}")
    match = re.fullmatch(r"([a-z0-9/]+)(?:\(([^()]*)\))?", name)
    head, arguments = (match[1], match[2].split(",") if match[2] else []) if match else ("", [])
    for pattern, build in _FORMULATIONS.items():
        known, *parameters = re.split("[(,)]+", pattern.rstrip(")"))
        if known == head and len(arguments) == len(parameters):
            try:
                numbers = [float(argument) for argument in arguments]
            except ValueError:
                raise InputError(f"{name!r}: the arguments of {pattern} must be numbers") from None
            built = build(*numbers)
            if isinstance(built, Formulation):
                return replace(built, name=name, shift=shift)
            return Formulation(name, *built, shift=shift)
    raise InputError(f"unknown formulation {name!r}; choose from {', '.join(_FORMULATIONS)}")


# ---- (1): dz = v(z, t) dt, from t = 1 down to t = 0
# Explicit Runge-Kutta: stage i looks ahead by c_i of the step along stage i-1; the step is the
# w-mean of the stages. ab2 (Adams-Bashforth), which is of neither paper, is an Euler step along the
# slope in the middle of the step, extrapolated from this evaluation and the last one: it is of
# second order, for one evaluation a step.
SOLVERS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "euler": ((0,), (1,)),
    "heun": ((0, 1), (1 / 2, 1 / 2)),
    "rk4": ((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "ab2": ((0,), (1,)),
}


def _positive(steps: int | None) -> int:
    if steps is None or steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


def _checked_times(times: Times, steps: int | None, z: Tensor) -> Tensor:
    """A solver's times beside z, in its precision but never in half. There must be steps + 1."""
    times = torch.as_tensor(times, dtype=torch.promote_types(z.dtype, torch.float32))
    if len(times) != _positive(len(times) - 1 if steps is None else steps) + 1:
        raise ValueError(f"{steps} steps need {steps + 1} times, got {len(times)}")
    return times.to(z.device)


def solve(
    velocity: Field, z: Tensor, *cond: Tensor,
    steps: int | None = None, t_start: float | Tensor = 1.0, t_end: float | Tensor = 0.0,
    times: Times = None, method: str = "euler",
) -> Tensor:  # fmt: skip
    """(1): carry z (B,...) along dz = v(z, t, *cond) dt, by default from noise to data.
    z is the state at t_start: the solver does not multiply it by b. t_start and t_end are numbers
    or (B,), each sample with its own interval. `times` is (steps + 1,) or (steps + 1, B); if None,
    the grid between them is uniform. ValueError on an unknown method or steps < 1."""
    if method not in SOLVERS:
        raise ValueError(f"unknown solver {method!r}; choose from {', '.join(SOLVERS)}")
    if times is None:
        like = {"dtype": torch.promote_types(z.dtype, torch.float32), "device": z.device}
        w = torch.linspace(0, 1, _positive(steps) + 1, **like)[:, None]
        start, end = (torch.as_tensor(t, **like) for t in (t_start, t_end))
        times = (1 - w) * start + w * end  # (steps + 1, 1) or (steps + 1, B)
    times = _checked_times(times, steps, z)
    times = times.reshape(len(times), -1).expand(-1, len(z))  # (steps + 1, B)
    last = None
    for t, t_next in zip(times, times[1:], strict=False):
        h = t_next - t
        k, dz = torch.zeros_like(z), torch.zeros_like(z)
        for c, w in zip(*SOLVERS[method], strict=True):
            k = velocity(z + expand(c * h, z) * k, t + c * h, *cond)
            dz = dz + w * k
        if method == "ab2":
            slope, (h_last, slope_last) = dz, last or (h, dz)
            half = (h / h_last / 2).nan_to_num()  # of the last step's length; h may be 0
            dz = slope + expand(half, z) * (slope - slope_last)
            last = h, slope
        z = z + expand(h, z) * dz
    return z


def guide(field: Field, null_cond: Sequence[Tensor], cfg: float) -> Field:
    """Classifier-free guidance: v_uncond + cfg (v_cond - v_uncond), in one batch of 2B; 1 is off.
    null_cond is aligned with *cond, each entry broadcast over the batch. The field is a velocity
    field or a network: velocities are affine in outputs. ValueError on other conditions."""
    if cfg == 1:
        return field

    def guided(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        if not len(cond) == len(null_cond) > 0:
            counts = f"{len(cond)} given, {len(null_cond)} null ones known"
            raise ValueError(f"cfg {cfg:g} needs conditions to guide by: {counts}")
        pairs = zip(cond, null_cond, strict=True)  # a float stays one, whatever the null's kind
        both = (torch.cat([c, torch.as_tensor(n).to(c.device).expand_as(c)]) for c, n in pairs)
        v_cond, v_uncond = field(torch.cat([z, z]), torch.cat([t, t]), *both).chunk(2)
        return v_uncond + cfg * (v_cond - v_uncond)

    return guided
