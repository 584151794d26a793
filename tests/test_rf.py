"""Equations (1)-(22) by other routes: autograd, Monte Carlo with its error bar, quadrature."""

import math

import pytest
import torch

import rf
from rf import (
    EDM,
    PREDICTIONS,
    STUDY,
    Cosine,
    CosMap,
    Formulation,
    LogitNormal,
    Mode,
    Uniform,
    formulation,
    solve,
)
from toy2d import GaussianMixture

F64 = torch.float64
PATHS = {
    "rf": rf.RectifiedFlow(),
    "cosine": Cosine(),
    "ldm": rf.LDMLinear(),
    "ddpm": rf.DDPMLinear(),
    "edm": EDM(),
    "edm/rf": rf.MatchedEDM(rf.RectifiedFlow()),
    "edm/cos": rf.MatchedEDM(Cosine()),
}
DENSITIES = [
    Uniform(),
    LogitNormal(0, 1),
    LogitNormal(-0.5, 0.6),
    LogitNormal(1, 2.2),
    Mode(1.29),
    Mode(-0.5),
    CosMap(),
]
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
# the 61, and every other name of the table that takes no arguments: a new one is tested at once
NAMES = [*STUDY, *(name for name in rf._FORMULATIONS if "(" not in name and name not in STUDY)]
every_formulation = pytest.mark.parametrize("name", NAMES)


def mixture():
    """Three anisotropic components of unequal weight."""
    covs = [[[0.09, 0.03], [0.03, 0.05]], [[0.02, -0.01], [-0.01, 0.08]], [[0.2, 0], [0, 0.01]]]
    return GaussianMixture([[1, 0.5], [-1, 0.2], [0.1, -1.2]], covs, [1, 2, 0.5])


def inner(n, path=None, margin=0.02):
    """n times inside [t_min, t_max], off the linear paths' table entries (where a' jumps)."""
    return torch.linspace(margin, 1 - margin, n, dtype=F64) + 0.0001234


def derivative(f, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad((f(t) + 0 * t).sum(), t)[0]  # 0 t: a may be constant


def close(x, y, rel=1e-9):
    torch.testing.assert_close(x, y, rtol=rel, atol=rel)


# ---- paths


@paths
def test_coefficients_derivatives_match_autograd(path):
    """a', b' and lambda' of every path against autograd of a, b and lambda."""
    t = inner(50)
    close(path.da(t), derivative(path.a, t))
    close(path.db(t), derivative(path.b, t))
    close(path.dlog_snr(t), derivative(path.log_snr, t), 1e-8)


@paths
def test_velocity_5_9_10_is_the_derivative_of_2(path):
    """(5), psi'_t(psi_t^-1(z)), by autograd through (2); (9) = (10), closed; a' x0 + b' eps."""
    g = torch.Generator().manual_seed(0)
    t = inner(40)
    x0, eps = torch.randn(2, 40, 3, dtype=F64, generator=g)
    z = path.interpolate(x0, eps, t)
    _, dz = torch.func.jvp(lambda t: path.interpolate(x0, eps, t), (t,), (torch.ones_like(t),))
    u = path.conditional_velocity(z, eps, t)
    close(u, dz)
    half = (path.b(t) / 2 * path.dlog_snr(t))[:, None]
    close(u, (path.da(t) / path.a(t))[:, None] * z - half * eps, 1e-8)


def test_endpoints():
    """a_0 = 1, b_0 = 0, a_1 = 0, b_1 = 1 in float32 too, and what other paths do there."""
    ends = torch.tensor([0.0, 1.0])
    for path in (rf.RectifiedFlow(), Cosine()):
        assert path.a(ends).tolist() == [1, 0] and path.b(ends).tolist() == [0, 1]
    ldm, ddpm = rf.LDMLinear(), rf.DDPMLinear()
    assert ldm.a(ends).tolist() == pytest.approx([0.99957, 0.0683], abs=5e-5)
    assert ldm.b(ends)[0].item() == pytest.approx(0.02915, abs=1e-4)
    assert ddpm.a(ends)[1].item() == pytest.approx(0.00635, abs=5e-6)
    edm = EDM(-1.2, 1.2)
    assert edm.t_min == 1e-4 and edm.db(ends).isinf().all()
    assert edm.b(torch.tensor(edm.t_max, dtype=F64)).log().item() == pytest.approx(
        -1.2 + 3.719 * 1.2, abs=1e-3
    )
    assert formulation("eps/cos").path.t_max == 0.999 and formulation("v/cos").path.t_max == 1


def test_linear_schedules_are_the_published_products():
    """a against the product of (1 - beta), beta as published."""
    for path, beta in (
        (rf.DDPMLinear(), [1e-4 + i / 999 * (0.02 - 1e-4) for i in range(1000)]),
        (
            rf.LDMLinear(),
            [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)],
        ),
    ):
        for i in (0, 1, 499, 998, 999):
            a = math.sqrt(math.prod(1 - b for b in beta[: i + 1]))
            assert path.a(torch.tensor(i / 999, dtype=F64)).item() == pytest.approx(a, rel=1e-10)


@paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_time_inverts_log_snr(path, dtype):
    """The t of a log-SNR is that t again, on every path."""
    t = inner(200).to(dtype)
    tolerance = 1e-9 if dtype == F64 else 2e-5
    torch.testing.assert_close(path.time(path.log_snr(t)), t, rtol=0, atol=tolerance)
    assert path.time(path.log_snr(t.reshape(10, 20))).shape == (10, 20)


@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_coefficients_keep_float32_accuracy(path, dtype):
    """Coefficients of half and single precision t against float64."""
    t = torch.linspace(0.001, 0.999, 300).to(dtype)
    t = t[(t > 0) & (t < 1)]
    for got, exact in zip(path.coefficients(t), path.coefficients(t.double()), strict=True):
        assert got.dtype == torch.float32
        # a and b to a few ulp; the linear paths' slopes may fall on the neighbouring table entry
        torch.testing.assert_close(
            got.double(), exact, rtol=3e-3 if "Linear" in type(path).__name__ else 5e-6, atol=1e-6
        )
    for got, exact in zip(path.coefficients(t)[:2], path.coefficients(t.double())[:2], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=5e-6, atol=0)


def test_edm_log_snr_is_normal_15():
    """Kolmogorov's distance of 100,000 lambda to N(-2 P_m, (2 P_s)^2)."""
    t = torch.rand(100_000, dtype=F64, generator=torch.Generator().manual_seed(0))
    lam = EDM(-0.6, 1.8).log_snr(t)
    assert ks(
        lam.sort().values, torch.special.ndtr((lam.sort().values - 1.2) / 3.6)
    ) < 1.63 / math.sqrt(len(t))


# ---- predictions and the loss


@every_formulation
def test_ends_of_the_exact_output_are_exact(name):
    """o = p x0 + q eps gives back x0, eps and a' x0 + b' eps."""
    f = formulation(name)
    g = torch.Generator().manual_seed(0)
    t = (
        torch.linspace(f.path.t_min, f.path.t_max, 41, dtype=F64)[:40]
        + (f.path.t_max - f.path.t_min) / 99.1
    )
    x0, eps = torch.randn(2, 40, 2, 3, dtype=F64, generator=g)
    z, target = f.pair(x0, eps, t)
    network = lambda z_in, t_in: (close(z_in, z), target)[1]
    x0_hat, eps_hat = f.ends(network)(f.path.interpolate(x0, eps, t), t)
    rtol = 1e-7
    close(x0_hat, x0, rtol), close(eps_hat, eps, rtol)
    if name != "eps/cos" and "edm" not in name:
        close(
            f.velocity(network)(f.path.interpolate(x0, eps, t), t),
            f.path.conditional_velocity(f.path.interpolate(x0, eps, t), eps, t),
            1e-6,
        )


def test_edm_prediction_is_the_published_preconditioning():
    """(16): D = c_skip z + c_out F, c_in = 1/sqrt(sigma^2 + sigma_d^2), written as Karras et al.

    do.
    """
    path, sigma_d = EDM(-0.6, 1.2), 0.5
    t = inner(30)
    sigma = path.b(t)
    c_skip, c_out = (
        sigma_d**2 / (sigma**2 + sigma_d**2),
        sigma * sigma_d / (sigma**2 + sigma_d**2).sqrt(),
    )
    p, q = PREDICTIONS["F"](path, t)
    close(p, (1 - c_skip) / c_out), close(q, -c_skip * sigma / c_out)
    close(path.c_in(t), 1 / (sigma**2 + sigma_d**2).sqrt())
    o, z = torch.randn(2, 30, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    x0_hat, _ = Formulation("", path, "F").ends(lambda z, t: o)(z, t)
    close(x0_hat, c_skip[:, None] * z + c_out[:, None] * o)
    small = torch.tensor([1e-4])  # float32 keeps p where 1 - c_skip would cancel
    close(
        PREDICTIONS["F"](path, small)[0].double(), PREDICTIONS["F"](path, small.double())[0], 1e-5
    )


@paths
def test_losses_8_11_12_agree_per_sample(path):
    """The three, written out as printed, on the same noise and output."""
    g = torch.Generator().manual_seed(0)
    t = inner(60)
    x0, eps, v = torch.randn(3, 60, 2, dtype=F64, generator=g)
    z = path.interpolate(x0, eps, t)
    a, b, da, _ = (c[:, None] for c in path.coefficients(t))
    lam = path.dlog_snr(t)[:, None]
    loss_8 = (v - path.conditional_velocity(z, eps, t)).square()
    loss_11 = (v - da / a * z + b / 2 * lam * eps).square()
    eps_theta = -2 / (lam * b) * (v - da / a * z)
    loss_12 = (-b / 2 * lam).square() * (eps_theta - eps).square()
    close(loss_11, loss_8, 1e-7), close(loss_12, loss_8, 1e-7)


class At:
    """A density that always draws this t."""

    def __init__(self, t):
        self.t = t

    def sample(self, n, generator=None):
        return torch.full((n,), self.t, dtype=F64)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_losses_8_and_12_are_loss_times_the_weight_that_makes_them_equal(t):
    """One velocity field, written as each prediction on the cosine path, at one t: `loss` is (8)
    for the path's own velocity; (12) = ((b/2) lambda')^2 loss for eps; (8) = pi^2/4 loss for v."""
    path, x0 = Cosine(), torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    own = lambda z, t: torch.tanh(z) - t[:, None]  # v_Theta

    def as_eps(z, t):  # eps_Theta := -2/(lambda' b) (v_Theta - (a'/a) z)
        a, b, da, _ = (c[:, None] for c in path.coefficients(t))
        return -2 / (path.dlog_snr(t)[:, None] * b) * (own(z, t) - da / a * z)

    as_v = lambda z, t: own(z, t) / (math.pi / 2)  # (a', b') = pi/2 (-b, a)
    loss = lambda prediction, network: Formulation("", path, prediction, At(t)).loss(
        network, x0, generator=torch.Generator().manual_seed(0)
    )
    at = torch.tensor(t, dtype=F64)
    loss_8 = loss("velocity", own)
    close((path.b(at) / 2 * path.dlog_snr(at)) ** 2 * loss("eps", as_eps), loss_8, 1e-7)
    close(math.pi**2 / 4 * loss("v", as_v), loss_8, 1e-7)
    eps = torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = path.interpolate(x0, eps, at.expand(50))
    u = path.conditional_velocity(z, eps, at.expand(50))
    close((own(z, at.expand(50)) - u).square().mean(), loss_8, 1e-9)  # (8) by (5)


@pytest.mark.parametrize(
    "name",
    [
        "rf",
        "rf/lognorm(0.50,0.60)",
        "eps/cos",
        "v/cos",
        "eps/linear",
        "v/linear",
        "edm(-1.20,1.20)",
    ],
)
def test_loss_is_L_w_with_the_one_line_weight(name):
    """E_t of the loss at (x0, eps) = -1/2 E_{t~U} w_t lambda'_t |eps_Theta - eps|^2: quadrature."""
    f = formulation(name)
    t = torch.linspace(0.02, 0.98, 20001, dtype=F64)  # both sides over the same range
    x0, eps = torch.tensor([[0.3, -1.1]], dtype=F64), torch.tensor([[0.7, 0.2]], dtype=F64)
    network = lambda z, t: torch.tanh(z + t[:, None])
    x0, eps = x0.expand(len(t), 2), eps.expand(len(t), 2)
    z, target = f.pair(x0, eps, t)
    left = f.timesteps.density(t) * (network(z, t) - target).square().mean(1)
    _, eps_hat = f.ends(network)(f.path.interpolate(x0, eps, t), t)
    right = -0.5 * f.weight(t) * f.path.dlog_snr(t) * (eps_hat - eps).square().mean(1)
    close(right, left, 1e-7)


WEIGHTS = {  # the paper's closed forms with their constants
    "rf": lambda t, lam: t / (1 - t),  # (13)
    "rf/lognorm(0.50,0.60)": lambda t, lam: t / (1 - t) * LogitNormal(0.5, 0.6).density(t),  # (18)
    "rf/mode(1.29)": lambda t, lam: t / (1 - t) * Mode(1.29).density(t),
    "rf/cosmap": lambda t, lam: t / (1 - t) * CosMap().density(t),
    "eps/cos": lambda t, lam: 1 / torch.cosh(lam / 2) / math.pi,  # (17)
    "v/cos": lambda t, lam: 2 / math.pi * torch.exp(-lam / 2),  # (17)
    "edm(-1.20,1.20)": lambda t, lam: 8 * gauss(lam, 2.4, 2.4) * (torch.exp(-lam) + 0.5**2),  # (16)
    "edm(0.60,1.80)": lambda t, lam: 8 * gauss(lam, -1.2, 3.6) * (torch.exp(-lam) + 0.5**2),
}


def gauss(x, m, s):
    return torch.exp(-((x - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_match_closed_forms(name):
    """The one line against t/(1-t) pi(t), sech(lambda/2)/pi, 2 e^(-lambda/2)/pi, 8 times (16)."""
    f, t = formulation(name), inner(50)
    close(f.weight(t), WEIGHTS[name](t, f.path.log_snr(t)), 1e-8)


def test_first_loss_of_a_zero_network_is_the_target_power():
    """E|eps - x0|^2 per dimension = 1 + E x0^2, within 5 standard errors; cond passes through."""
    x0 = 2 * torch.ones(200_000, 1)
    seen = []
    network = lambda z, t, label: (seen.append((t.shape, label)), torch.zeros_like(z))[1]
    loss = formulation("rf").loss(
        network, x0, torch.tensor(3), generator=torch.Generator().manual_seed(0)
    )
    assert seen[0][0] == (200_000,) and seen[0][1] == 3
    assert loss.item() == pytest.approx(5, abs=5 * math.sqrt(18 / 200_000))


def test_loss_reproduces_with_its_generator_and_draws_inside():
    f, x0 = formulation("edm(-1.20,1.20)"), torch.ones(64, 2)
    a, b = (
        f.loss(lambda z, t: z, x0, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert a == b
    t = formulation("edm(0.00,1.80)").draw(100_000, torch.Generator().manual_seed(0))
    assert t.min() >= 1e-4 and t.max() <= 1 - 1e-4


@pytest.mark.parametrize("name", ["rf", "v/cos"])
def test_gradients_of_7_and_8_agree(name):
    """(7) and (8) differ by a constant: equal gradients in Theta, within 5 standard errors."""
    f, m, n = formulation(name), mixture(), 200_000
    path = f.path
    g = torch.Generator().manual_seed(0)
    x0 = m.sample(n, g)[0].double()
    eps, t = torch.randn(n, 2, dtype=F64, generator=g), torch.rand(n, dtype=F64, generator=g)
    z = path.interpolate(x0, eps, t)
    features = torch.stack([z[:, 0], z[:, 1], t, torch.sin(3 * z[:, 0]), torch.ones(n)], 1)
    v = (features @ torch.linspace(-1, 1, 5, dtype=F64))[:, None]  # v_Theta, linear in Theta
    u = m.velocity(z, t, path)
    conditional = path.da(t)[:, None] * x0 + path.db(t)[:, None] * eps
    gradient = lambda target: 2 * (v - target).sum(1)[:, None] * features
    difference = gradient(conditional) - gradient(u)
    error = difference.std(0) / math.sqrt(n)
    assert (difference.mean(0).abs() < 5 * error).all()
    assert (gradient(u).mean(0).abs() > 20 * error).any()  # the test would see a wrong u
    assert (
        (v - conditional).square().mean() - (v - u).square().mean()
    ) > 0.1  # and the losses do differ


# ---- densities


def ks(x, cdf):
    """Kolmogorov-Smirnov statistic of sorted samples, given the cdf at them."""
    i = torch.arange(len(x), dtype=cdf.dtype)
    return torch.maximum(cdf - i / len(x), (i + 1) / len(x) - cdf).max().item()


@pytest.mark.parametrize(
    "density", DENSITIES, ids=lambda d: f"{type(d).__name__}{list(vars(d).values())}"
)
def test_densities_integrate_to_one_and_match_their_samplers(density):
    """Quadrature, and Kolmogorov's distance of 40,000 draws to the density's integral."""
    grid = torch.special.ndtr(torch.linspace(-7, 7, 40001, dtype=F64))  # dense at the ends
    cdf = torch.cumulative_trapezoid(density.density(grid), grid)
    assert cdf[-1].item() == pytest.approx(1, abs=1e-4)
    n = 40_000
    x = density.sample(n, torch.Generator().manual_seed(3)).double().sort().values
    assert x.shape == (n,) and x.min() >= 0 and x.max() <= 1
    at = torch.searchsorted(grid, x).clamp(1, len(cdf) - 1)
    assert ks(x, cdf[at - 1]) < 1.63 / math.sqrt(n)  # the 1% point


@pytest.mark.parametrize("s", [-1.0, 1.75, 2 / (math.pi - 2)])
def test_mode_at_its_ends_integrates_in_u(s):
    """pi_mode has poles there: int pi(t) dt = int pi(f(u)) |f'(u)| du."""
    density, u = Mode(s), (torch.arange(2000, dtype=F64) + 0.5) / 2000
    t = density.f(u)
    mass = density.density(t) * derivative(density.f, u).abs()
    close(mass, torch.ones_like(mass), 1e-3)
    assert Mode(0).density(t).tolist() == pytest.approx([1] * 2000)


def test_mode_is_20_as_printed():
    """f at u = 1/4, and the density where t is 1/2: |1/f'(1/2)|, f' = -1 - s + s pi/2 sin(pi u)."""
    u, half = torch.tensor(0.25, dtype=F64), torch.tensor(0.5, dtype=F64)
    for s in (-1, 0.38, 1.75):
        f = 1 - 0.25 - s * (math.cos(math.pi / 8) ** 2 - 1 + 0.25)
        assert Mode(s).f(u).item() == pytest.approx(f, rel=1e-12)
        at_half = 1 / (1 + s - s * math.pi / 2)
        assert Mode(s).density(half).item() == pytest.approx(at_half, rel=1e-9)


def test_cosmap_gives_rf_the_cosine_log_snr():
    """t = f(u), (21) as printed, has the cosine path's log-SNR at u; (22) is |1/f'| there."""
    u = inner(50)
    t = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)  # (21) as printed
    close(rf.RectifiedFlow().log_snr(t), Cosine().log_snr(u), 1e-9)
    close(
        CosMap().density(t),
        1 / derivative(lambda u: 1 - 1 / (torch.tan(math.pi / 2 * u) + 1), u),
        1e-9,
    )


def test_densities_at_the_ends():
    """Finite, and the limits, where the formulas are 0/0."""
    ends = torch.tensor([0.0, 1.0])
    assert LogitNormal(1, 2.2).density(ends).tolist() == [0, 0]
    assert CosMap().density(ends).tolist() == pytest.approx([2 / math.pi] * 2)


# ---- names


def test_the_study_has_61_names_that_mean_what_they_say():
    """4 + 9 + 30 + 1 + 15 + 2 names, their arguments in their places."""
    assert len(STUDY) == len(set(STUDY)) == 61
    heads = ("rf/lognorm", "rf/mode", "edm(", "edm/", "rf/cosmap")
    assert [sum(name.startswith(head) for name in STUDY) for head in heads] == [30, 8, 15, 2, 1]
    assert all(formulation(name).name == name for name in STUDY)
    assert formulation("rf/mode(1.29)").timesteps.s == 1.29
    f = formulation("rf/lognorm(-0.50,2.20)")
    assert (f.timesteps.m, f.timesteps.s, type(f.path)) == (-0.5, 2.2, rf.RectifiedFlow)
    assert (
        formulation("edm(-1.20,0.60)").path.P_m == -1.2
        and formulation("edm(-1.20,0.60)").path.P_s == 0.6
    )
    close(formulation("edm/cos").path.log_snr(inner(20)), Cosine().log_snr(inner(20)), 1e-9)
    close(
        formulation("edm/rf").path.log_snr(inner(20)), rf.RectifiedFlow().log_snr(inner(20)), 1e-9
    )


@pytest.mark.parametrize(
    "name, says",
    [
        ("ref", "unknown formulation 'ref'; choose from rf, rf/lognorm"),
        (
            "rf/lognorm(0)",
            "unknown formulation 'rf/lognorm(0)'; choose from rf, rf/lognorm\\(m,s\\)",
        ),
        ("rf/lognorm(0,x)", "must be numbers"),
        ("rf/lognorm(0,0)", "s > 0"),
        ("rf/lognorm(nan,1)", "finite m"),
        ("rf/mode(3)", "-1 <= s <= .*1.7519, got s = 3"),
        ("rf/mode(nan)", "monotone"),
        ("edm(0,-1)", "P_s > 0"),
        ("rf(1)", "unknown formulation"),
        ("", "unknown formulation"),
    ],
)
def test_bad_names_say_what_is_good(name, says):
    with pytest.raises(ValueError, match=says.replace("'rf/lognorm(0)'", "'rf/lognorm\\(0\\)'")):
        formulation(name)


# ---- the exact network in every formulation: ends, velocity, rectified, sample


def exact_network(f, m):
    """The conditional expectation of the target, from the network's own input."""

    def network(z_in, t):
        z = z_in / f.path.c_in(t).reshape(-1, 1)
        return f.pair(*m.ends(z, t, f.path), t)[1]

    return network


@every_formulation
def test_exact_network_gives_exact_ends_velocity_and_rectified_field(name):
    """E[target | z] as the network: the ends are the posterior means, both velocities (6)."""
    f, m = formulation(name), mixture()
    network, path = exact_network(f, m), f.path
    g = torch.Generator().manual_seed(0)
    n = 400
    t = path.t_min + (path.t_max - path.t_min) * torch.rand(n, dtype=F64, generator=g)
    z = path.interpolate(m.sample(n, g)[0].double(), torch.randn(n, 2, dtype=F64, generator=g), t)
    for got, exact in zip(f.ends(network)(z, t), m.ends(z, t, path), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        f.velocity(network)(z, t), m.velocity(z, t, path), rtol=1e-6, atol=1e-6
    )
    a, b, _, _ = path.coefficients(t)
    z_rf, t_rf = z / (a + b)[:, None], b / (a + b)
    exact = m.velocity(z_rf, t_rf, rf.RectifiedFlow())
    torch.testing.assert_close(f.rectified(network)(z_rf, t_rf), exact, rtol=1e-6, atol=1e-6)


@every_formulation
def test_sample_of_the_exact_network_lands_on_the_mixture(name):
    """Components' shares, means and covariances, within 5 standard errors and 100 steps' error.

    Sampling ends with x0_hat at the last time's noise level s = b/a, and so with the covariance C
    (C + s^2)^-1 C: the true C but for the EDM variants that never see little noise. Where the
    noise at t_max is not pure, the shares are biased: what the paper complains of in the linear
    schedules.
    """
    C = torch.tensor([[0.05, 0.02], [0.02, 0.1]], dtype=F64)
    f, m, n = (
        formulation(name),
        GaussianMixture([[1, 0.5], [-1, -0.5]], [C.tolist()] * 2, [1, 3]),
        1000,
    )
    noise = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = f.sample(exact_network(f, m), noise, steps=100)
    impure = (f.path.a(f.path.t_max) / f.path.b(f.path.t_max)).item()
    last = f.path.grid(100)[-2]
    shrunk = C @ torch.linalg.inv(C + (f.path.b(last) / f.path.a(last)) ** 2 * torch.eye(2)) @ C
    right = x[:, 0] > 0
    assert right.double().mean().item() == pytest.approx(0.25, abs=0.06 + 0.3 * impure)
    for mean, part in ((m.means[0], x[right]), (m.means[1], x[~right])):
        assert (part.mean(0) - mean).abs().max() < 5 * (0.1 / len(part)) ** 0.5 + 0.02
        assert (torch.cov(part.T) - shrunk).abs().max() < 5 * 0.1 * (2 / len(part)) ** 0.5 + 0.01


@every_formulation
def test_one_plane_step_is_exact_for_a_point_mass(name):
    """One or three steps of every formulation end at the point."""
    f, x0 = formulation(name), torch.tensor([[0.3, -0.7]], dtype=F64)
    noise = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def network(z_in, t):
        z = z_in / f.path.c_in(t)[:, None]
        a, b, _, _ = (c[:, None] for c in f.path.coefficients(t))
        return f.pair(x0.expand(len(z), 2), (z - a * x0) / b, t)[1]

    for steps in (1, 3):
        torch.testing.assert_close(
            f.sample(network, noise, steps=steps), x0.expand(5, 2), rtol=1e-6, atol=1e-6
        )


def test_one_euler_step_is_exact_for_a_point_mass_on_rf():
    """One step of `solve` from t = 1 to 0 ends at the point, on the straight path."""
    x0, z = torch.tensor([[2.0, -1.0]]), torch.randn(4, 2)
    v = rf.RectifiedFlow()
    velocity = lambda z, t: v.conditional_velocity(
        z * 0.999 + x0 * 0.001, z, torch.full((4,), 0.999)
    )
    torch.testing.assert_close(solve(lambda z, t: z - x0, z, steps=1), x0.expand(4, 2))
    torch.testing.assert_close(solve(velocity, z, steps=1), x0.expand(4, 2), rtol=1e-3, atol=1e-3)


def test_plane_step_is_ddim_and_euler():
    """A plane step is Euler in t (rf), Euler in sigma (edm), DDIM as published (eps/linear)."""
    z, o = torch.randn(2, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    times = [1, 0.9, 0.5, 0]  # the step from 0.9 to 0.5, between the z that both are asked at
    seen = {}
    for name in ("rf", "edm(0.00,1.20)", "eps/linear"):
        f, zs = formulation(name), []
        f.sample(lambda z, t: (zs.append(z / f.path.c_in(t)[:, None]), o)[1], z, times=times)
        seen[name] = zs[1:]
    z = seen["rf"][0]
    close(seen["rf"][1], z + (0.5 - 0.9) * o)
    path = EDM(0, 1.2)
    s, e = path.b(torch.tensor(0.9, dtype=F64)), path.b(torch.tensor(0.5, dtype=F64))
    z = seen["edm(0.00,1.20)"][0] / s
    d = (1 / (s**2 + 0.25)).sqrt()
    D = 0.25 * d**2 * s * z + s * 0.5 * d * o
    close(seen["edm(0.00,1.20)"][1], s * z + (e - s) * (s * z - D) / s)
    ldm = rf.LDMLinear()
    (a, a2), (b, b2) = (
        ldm.a(torch.tensor(times[1:3], dtype=F64)),
        ldm.b(torch.tensor(times[1:3], dtype=F64)),
    )
    z = seen["eps/linear"][0]
    close(seen["eps/linear"][1], a2 * (z - b * o) / a + b2 * o)


class Wave(torch.nn.Module):
    """A small network with weights, for what must agree to the last bit."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.7, -1.3]))

    def forward(self, z, t):
        return torch.sin(3 * z * self.w) + rf.expand(t, z) * z.flip(1)


@pytest.mark.parametrize("shape", [(64, 2), (8, 2, 4, 4)], ids=str)
def test_the_dozen_lines_are_rf_to_the_last_bit(shape):
    """Loss, its gradient, and Euler samples: of the lines that open rf.py and of `formulation`."""
    network, f = Wave() if len(shape) == 2 else lambda z, t: z * rf.expand(t, z), formulation("rf")
    seeded = lambda: torch.Generator().manual_seed(3)
    x0 = torch.randn(shape, generator=seeded())
    plain = rf.rectified_flow_loss(network, x0, seeded())
    whole = f.loss(network, x0, generator=seeded())
    assert torch.equal(plain, whole)
    if len(shape) == 2:
        gradients = [torch.autograd.grad(loss, network.w)[0] for loss in (plain, whole)]
        assert torch.equal(*gradients) and gradients[0].abs().min() > 0
    for steps in (1, 3, 7, 50):
        times = torch.linspace(1, 0, steps + 1)
        plain = rf.rectified_flow_sample(network, x0, steps)
        assert torch.equal(plain, f.sample(network, x0, times=times))
        torch.testing.assert_close(plain, f.sample(network, x0, steps=steps))


@pytest.mark.parametrize("name", ["rf", "eps/cos", "v/linear", "edm(0.00,1.20)"])
@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "ab2"])
def test_times_of_a_sample_fall_from_noise_to_data(name, method):
    """They are those of the path whatever the method, so that the first evaluations agree. What
    does not fall from 1 to 0 is refused: it would start from a state, which `solve` does."""
    f, seen, noise = formulation(name), [], torch.randn(5, 2)
    network = lambda z, t: (seen.append(t[0].item()), 0.1 * z)[1]
    f.sample(network, noise, times=[1, 0.7, 0.2, 0], method=method)
    stages = len(rf.SOLVERS[method][0])
    assert len(seen) == 3 * stages
    expected = [min(f.path.t_max, 1), 0.7, 0.2]
    assert seen[::stages] == pytest.approx(expected, abs=1e-4)
    for bad in ([0.9, 0.5, 0], [1, 0.5], [1, 0.5, 0.6, 0], [1, 0.5, 0.5, 0], [0, 0.5, 1]):
        with pytest.raises(ValueError, match="times must fall from 1 to 0"):
            f.sample(network, noise, times=bad, method=method)


def test_default_grids():
    """They fall from t_max to t_min: uniform in t, or of EDM in sigma^(1/7)."""
    for name in STUDY:
        f = formulation(name)
        grid = f.path.grid(10)
        assert grid.shape == (11,) and (grid.diff() < 0).all()
        assert grid[0].item() == pytest.approx(f.path.t_max) and grid[-1].item() == pytest.approx(
            f.path.t_min
        )
        if not name.startswith("edm("):
            close(grid.diff(), grid.diff().mean().expand(10))
    path = EDM()
    sigma = path.b(path.grid(6)) ** (1 / 7)  # Karras: uniform in sigma^(1/7)
    close(sigma.diff(), sigma.diff().mean().expand(6), 1e-7)


# ---- (1): solvers


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("rk4", 4), ("ab2", 2)])
def test_solvers_show_their_order(method, order):
    """The log-log slope of the error on the exact field, from t = 1 to 0.2."""
    m = mixture()
    field = m.field(rf.RectifiedFlow())
    z = torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    run = lambda steps, method: solve(field, z, steps=steps, t_end=0.2, method=method)
    truth = run(500, "rk4")
    steps = torch.tensor([40, 80, 160])
    errors = torch.stack([(run(int(n), method) - truth).norm() for n in steps])
    slope = -(errors[-1] / errors[0]).log() / (steps[-1] / steps[0]).log()
    assert slope.item() == pytest.approx(order, abs=0.25)


def test_solve_evaluates_once_a_stage_and_at_the_right_times():
    for method, expected in (
        ("euler", [1, 0.5]),
        ("heun", [1, 0.5, 0.5, 0]),
        ("rk4", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]),
        ("ab2", [1, 0.5]),
    ):
        seen = []
        solve(
            lambda z, t: (seen.append(t.tolist()), z)[1], torch.ones(2, 1), steps=2, method=method
        )
        assert seen == [[t] * 2 for t in expected]


def test_ab2_is_exact_on_slopes_linear_in_t_after_its_first_step():
    """On uneven times, and on intervals of no length."""
    times = torch.tensor([[1.0, 0.5], [0.7, 0.5], [0.25, 0.5], [0.2, 0.5], [0, 0.5]], dtype=F64)
    slope = lambda z, t: t[:, None] * torch.ones_like(z)
    z = solve(slope, torch.zeros(2, 1, dtype=F64), times=times, steps=4, method="ab2")
    close(z[:, 0], torch.tensor([-0.3 * 1 - 0.7**2 / 2, 0], dtype=F64))


@pytest.mark.parametrize("name", ["eps/cos", "edm(-1.20,1.20)", "v/cos"])
def test_times_of_ones_own_may_name_both_ends(name):
    """Where a path is singular, the network is asked just before."""
    formula = rf.formulation(name)
    x = formula.sample(lambda z, t: 0.1 * z, torch.randn(4, 2), times=[1, 0.5, 0])
    assert x.isfinite().all()


def test_ab2_takes_its_first_steps_longer():
    seen, formula = [], rf.formulation("rf", shift=3.0)
    network = lambda z, t: (seen.append(t[0].item()), z)[1]
    formula.sample(network, torch.ones(2, 1), steps=4, method="ab2")
    close(torch.tensor(seen), formula.path.shift((torch.arange(4, 0, -1) / 4) ** 1.5, 3.0), 1e-6)


def test_solve_takes_times_and_an_interval_per_sample():
    field = lambda z, t: torch.cos(t)[:, None] * torch.ones_like(z)
    z = torch.zeros(3, 1, dtype=F64)
    start, end = torch.tensor([1.0, 0.5, 0.7], dtype=F64), torch.tensor([0.0, 0.25, 0.7], dtype=F64)
    close(
        solve(field, z, steps=20, t_start=start, t_end=end, method="rk4")[:, 0],
        end.sin() - start.sin(),
        1e-8,
    )
    close(
        solve(field, z, steps=2, times=[1, 0.3, 0], method="euler")[:, 0],
        torch.full((3,), -0.7 * math.cos(1) - 0.3 * math.cos(0.3), dtype=F64),
    )
    with pytest.raises(ValueError, match="unknown solver 'rk5'; choose from euler, heun, rk4, ab2"):
        solve(field, z, steps=1, method="rk5")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        solve(field, z, steps=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        solve(field, z, steps=0, times=[1.0])
    with pytest.raises(ValueError, match="3 times, got 2"):
        solve(field, z, steps=2, times=[1, 0])


def test_solve_never_scales_and_keeps_dtype():
    z = torch.randn(4, 3, 2)
    assert solve(lambda z, t: 0 * z, z, steps=3) is not z
    assert solve(lambda z, t: 0 * z, z, steps=3).equal(z)


def test_guidance_is_one_doubled_batch():
    """v_uncond + s (v_cond - v_uncond), in one call with the null condition broadcast."""
    calls = []

    def field(z, t, label, context):
        calls.append(len(z))
        return z * label[:, None] + context.sum((1, 2))[:, None]

    z, t = torch.randn(3, 2), torch.rand(3)
    label, context = torch.tensor([1, 2, 3]), torch.randn(3, 4, 5)
    null = (torch.tensor(7), torch.zeros(4, 5))
    got = rf.guide(field, null, 2.5)(z, t, label, context)
    cond, uncond = (
        field(z, t, label, context),
        field(z, t, torch.full((3,), 7), torch.zeros(3, 4, 5)),
    )
    torch.testing.assert_close(got, uncond + 2.5 * (cond - uncond))
    assert calls == [6, 3, 3]
    assert rf.guide(field, null, 1) is field


# ---- 5.3.2: the resolution-dependent shift


@pytest.mark.parametrize("s", [1.0, 3.0, 0.5])
def test_shift_is_5_3_2_and_applied_once(s):
    """The formula as printed, in training's draws and in sampling's times."""
    t = torch.linspace(0, 1, 21, dtype=F64)
    shifted = s * t / (1 + (s - 1) * t)
    close(rf.RectifiedFlow().shift(t, s), shifted)
    f = formulation("rf/lognorm(0.00,1.00)", shift=s)
    draw = lambda f: f.draw(1000, torch.Generator().manual_seed(0)).double()
    u = draw(formulation("rf/lognorm(0.00,1.00)"))
    torch.testing.assert_close(draw(f), s * u / (1 + (s - 1) * u), rtol=1e-5, atol=1e-6)
    seen = []
    f.sample(lambda z, t: (seen.append(t[0].item()), z)[1], torch.ones(2, 2, dtype=F64), steps=20)
    close(torch.tensor(seen, dtype=F64), shifted.flip(0)[:-1])


def test_shifted_weight_holds_the_shifted_density():
    """(18) with the density of sigmoid(u + log s), u ~ N(m, 1): logit-normal, mean m + log s."""
    t = inner(50)
    shifted = formulation("rf/lognorm(0.50,1.00)", shift=3.0)
    close(shifted.weight(t), t / (1 - t) * LogitNormal(0.5 + math.log(3), 1).density(t), 1e-8)
    with pytest.raises(ValueError, match="positive number, got -1"):
        formulation("rf", shift=-1)
