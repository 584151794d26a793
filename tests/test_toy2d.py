"""The laboratory's exact formulas against autograd, Monte Carlo and each other."""

import json
import math

import pytest
import torch
from test_rf import F64, close, inner, mixture, paths

import toy2d
from rf import RectifiedFlow, formulation, solve
from toy2d import MIXTURES, MLP, GaussianMixture, energy_distance, load_mixture, relative_excess


@paths
def test_log_density_integrates_to_one(path):
    """On a fine grid, on every path."""
    m, axis = mixture(), torch.linspace(-12, 12, 401, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    for t in (0.1, 0.5):
        mass = (
            m.log_density(grid, torch.tensor(t, dtype=F64), path).exp().sum()
            * (axis[1] - axis[0]) ** 2
        )
        assert mass.item() == pytest.approx(1, abs=1e-6)


def test_log_density_at_t0_is_the_mixture():
    m, x = mixture(), torch.randn(50, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    parts = [
        torch.distributions.MultivariateNormal(mu, C).log_prob(x)
        for mu, C in zip(m.means, m.covs, strict=True)
    ]
    expected = torch.logsumexp(torch.stack(parts, 1) + m.weights.log(), 1)
    close(m.log_density(x, torch.zeros(50, dtype=F64), RectifiedFlow()), expected)


@paths
def test_continuity_equation(path):
    """dp/dt + div(p u) = 0, pointwise, by autograd: u_t carries p_t."""
    m, n = mixture(), 200
    g = torch.Generator().manual_seed(0)
    t = inner(n)
    z = path.interpolate(m.sample(n, g)[0].double(), torch.randn(n, 2, dtype=F64, generator=g), t)
    t.requires_grad_(), z.requires_grad_()
    p = m.log_density(z, t, path).exp()
    (dp_dt,) = torch.autograd.grad(p.sum(), t, create_graph=True)
    flux = p[:, None] * m.velocity(z, t, path)
    divergence = sum(
        torch.autograd.grad(flux[:, i].sum(), z, retain_graph=True)[0][:, i] for i in range(2)
    )
    scale = dp_dt.abs().max()
    assert ((dp_dt + divergence).abs().max() / scale).item() < 1e-9


def test_3_and_6_are_means_over_the_noise():
    """As printed: E_eps p_t(z | eps) is p_t(z), and E_eps u_t(z | eps) p_t(z | eps)/p_t(z) u_t(z);
    z given eps has the density of x0 = (z - b eps)/a over a^2. Within five standard errors."""
    m, n, path, exact = load_mixture("ring"), 400_000, RectifiedFlow(), dict(dtype=torch.float64)
    z, t = torch.tensor([[0.4, -0.9]], **exact), torch.tensor([0.6], **exact)
    eps = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zs, ts = z.expand(n, 2), t.expand(n)
    x0 = path.invert(zs, eps, ts)
    p = m.log_density(x0, 0.0, path).exp() / path.a(t) ** 2 / m.log_density(z, t, path).exp()
    u = path.conditional_velocity(zs, eps, ts)
    values = torch.cat([p[:, None], u * p[:, None]], dim=1)
    expected = torch.cat([torch.ones(1, 1), m.velocity(z, t, path)], dim=1)[0]
    error = values.std(0) / n**0.5
    assert ((values.mean(0) - expected).abs() < 5 * error).all() and error.max() < 0.02


@paths
def test_ends_6_match_posterior_monte_carlo(path):
    """E[x0 | z], E[eps | z] by weighing samples of x0 with p(z | x0), within 5 standard errors."""
    m, n = mixture(), 400_000
    x0 = m.sample(n, torch.Generator().manual_seed(0))[0].double()
    for t, z in ((0.3, [0.4, -0.2]), (0.6, [-0.5, 0.9])):
        t, z = torch.tensor(t, dtype=F64), torch.tensor([z], dtype=F64)
        a, b, da, db = path.coefficients(t)
        eps = (z - a * x0) / b
        w = torch.exp(-0.5 * eps.square().sum(1))
        w = w / w.sum()
        x0_hat, eps_hat = m.ends(z, t.expand(1), path)
        u = m.velocity(z, t.expand(1), path)
        for sample, exact in ((x0, x0_hat), (eps, eps_hat), (da * x0 + db * eps, u)):
            error = (w[:, None] ** 2 * (sample - exact) ** 2).sum(0).sqrt()
            assert ((w @ sample - exact[0]).abs() < 5 * error + 1e-9).all()


def test_labels_select_components_and_null_all():
    m, path = mixture(), RectifiedFlow()
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.full((6,), 0.4, dtype=F64)
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    got = m.field(path)(z, t, labels)
    for i, k in enumerate(labels.tolist()):
        one = m if k == 3 else m.component(k)
        close(got[i : i + 1], one.velocity(z[i : i + 1], t[:1], path))


def test_exact_field_transports_noise_to_the_mixture():
    """(1) from t = 1 to 0: p_1 arrives at p_0.

    By the density along the way (instantaneous change of variables) and by energy distance."""
    m = mixture()
    field = m.field(RectifiedFlow())
    noise = torch.randn(3000, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = solve(field, noise, steps=60, method="rk4")
    data, other = (
        m.sample(3000, torch.Generator().manual_seed(1))[0],
        m.sample(3000, torch.Generator().manual_seed(2))[0],
    )
    assert abs(energy_distance(x, data)) < 3 * abs(energy_distance(other, data)) + 2e-3
    assert energy_distance(noise, data) > 0.05
    z = noise[:20]
    jacobian = torch.autograd.functional.jacobian(
        lambda z: solve(field, z, steps=200, method="rk4").sum(0), z
    )
    log_det = torch.stack([jacobian[:, i].det().abs().log() for i in range(20)])
    x = solve(field, z, steps=200, method="rk4")
    one = torch.ones(20, dtype=F64)
    before, after = (m.log_density(y, t * one, RectifiedFlow()) for y, t in ((z, 1), (x, 0)))
    close(after + log_det, before, 1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_named_mixtures_have_unit_std_and_mean_zero(name):
    m = load_mixture(name)
    second = m.weights @ (m.means**2 + m.covs.diagonal(dim1=1, dim2=2))
    close(m.weights @ m.means, torch.zeros(2, dtype=F64))
    assert second.sum().item() / 2 == pytest.approx(1)
    x, labels = m.sample(200_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.square().mean().item() == pytest.approx(1, abs=0.01)
    counts = torch.bincount(labels, minlength=len(m.weights)) / len(x)
    assert (counts - m.weights).abs().max() < 5 * math.sqrt(0.25 / len(x))
    for k in (0, len(m.weights) - 1):
        part = x[labels == k].double()
        assert (part.mean(0) - m.means[k]).abs().max() < 0.02
        torch.testing.assert_close(torch.cov(part.T), m.covs[k], rtol=0.06, atol=2e-3)


def test_ring_and_grid_are_as_specified():
    ring, grid = MIXTURES["ring"](), MIXTURES["grid"]()
    assert ring.means.norm(dim=1).tolist() == pytest.approx([4] * 8) and ring.covs[
        0, 0, 0
    ].item() == pytest.approx(0.09)
    assert len(grid.weights) == 25 and grid.covs[3, 1, 1].item() == pytest.approx(0.0225)
    spiral = MIXTURES["spiral"]()
    assert (
        spiral.variances[:, 1] > 1.5 * spiral.variances[:, 0]
    ).all() and spiral.weights.std() > 0.01


def test_energy_distance_is_unbiased_and_right():
    """Against the double loop, and the closed form of two shifted point clouds' limit."""
    g = torch.Generator().manual_seed(0)
    n, m = 150, 140  # more than one block of rows
    x, y = torch.randn(n, 2, generator=g), torch.randn(m, 2, generator=g) + 0.5
    mean = lambda a, b, skip: sum(
        math.dist(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)
    )
    xs, ys = x.tolist(), y.tolist()
    expected = 2 * mean(xs, ys, False) / (n * m)
    expected -= mean(xs, xs, True) / (n * (n - 1)) + mean(ys, ys, True) / (m * (m - 1))
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-6)
    same = [energy_distance(*torch.randn(2, 50, 2, generator=g)) for _ in range(300)]
    assert abs(sum(same) / 300) < 5 * torch.tensor(same).std().item() / math.sqrt(300)


def test_relative_excess_is_7_over_the_power_of_u():
    """0 of the exact field, 1 of the answer 0, 0.01 of 1.1 times the exact field."""
    m, f = mixture(), formulation("rf")
    exact = m.field(RectifiedFlow())
    assert relative_excess(exact, f, m, n=4096) < 1e-12
    assert relative_excess(lambda z, t: 0 * z, f, m, n=4096) == pytest.approx(1)
    assert relative_excess(lambda z, t: 1.1 * exact(z, t), f, m, n=4096) == pytest.approx(
        0.01, rel=1e-4
    )
    assert (
        relative_excess(lambda z, t, label: exact(z, t, label), f, m, conditional=True, n=4096)
        < 1e-12
    )


def test_sample_metrics_of_known_samples():
    m = GaussianMixture([[0, 0], [10, 0]], [[[1, 0], [0, 4]]] * 2, [1, 3])
    x = torch.tensor([[0, 0], [3.9, 0], [4.1, 0], [0, 7.9], [0, 8.1], [10, 0], [10, 0], [10, 0]])
    metrics = toy2d.sample_metrics(x, x + 0.01, m)
    assert metrics["outliers"] == pytest.approx(2 / 8)  # (4.1, 0) and (0, 8.1)
    assert metrics["total_variation"] == pytest.approx(0.75 - 3 / 8)


def test_yardsticks_of_the_exact_field_are_zero():
    m = load_mixture("ring")
    y = toy2d.yardsticks(
        lambda z: solve(m.field(RectifiedFlow()), z, steps=50, method="heun"), m, seeds=1, n=500
    )
    assert y["energy"] == 0 and y["outliers"] == y["exact_outliers"]
    worse = toy2d.yardsticks(
        lambda z: solve(m.field(RectifiedFlow()), z, steps=3), m, seeds=1, n=500
    )
    assert worse["energy"] > 0.005


def test_points_and_lines_are_mixtures_too():
    """At t = 0 no 0/0: x0 is z there, and nothing is known of eps; the flow ends on the points."""
    mixture = GaussianMixture([[1, 0], [-1, 0]], [[[0, 0], [0, 0]], [[1, 0], [0, 0]]], [1, 1])
    z, t = torch.tensor([[1.0, 0], [-0.5, 0]]), torch.zeros(2)
    x0, eps = mixture.ends(z, t, RectifiedFlow())
    torch.testing.assert_close(x0, z)
    assert (eps == 0).all() and mixture.log_density(z, t, RectifiedFlow()).isfinite().all()
    x = solve(mixture.field(RectifiedFlow()), torch.randn(200, 2), steps=100, method="heun")
    assert x[:, 1].abs().max() < 0.05
    metrics = toy2d.sample_metrics(x, mixture.sample(200)[0], mixture)
    assert all(math.isfinite(value) for value in metrics.values())


def test_mlp_conditions_on_labels():
    net = MLP(classes=3)
    z, t = torch.randn(5, 2), torch.rand(5)
    assert not net(z, t, torch.zeros(5).long()).equal(net(z, t, torch.full((5,), 3)))
    assert net.null_cond[0] == 3 and MLP().null_cond == () and MLP()(z, t).shape == (5, 2)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "Expecting"),
        ("[1]", "no mixture of means"),
        ('{"means": [[0,0]]}', "missing"),
        ('{"means": [[0,0]], "covs": [[[1,0],[0,1]]], "weights": [1], "x": 1}', "unexpected"),
        ('{"means": [[0,0]], "covs": [[[1,0],[0,-1]]], "weights": [1]}', "positive semi-definite"),
        ('{"means": [[0,0]], "covs": [[[1,2],[0,1]]], "weights": [1]}', "symmetric"),
        ('{"means": [[0,0]], "covs": [[[1,0],[0,1]]], "weights": [0]}', "weights positive"),
        ('{"means": [[0,0,0]], "covs": [[[1,0],[0,1]]], "weights": [1]}', r"\(1, 3\)"),
        ('{"means": [["a",0]], "covs": [[[1,0],[0,1]]], "weights": [1]}', "numbers"),
        ('{"means": [[0,NaN]], "covs": [[[1,0],[0,1]]], "weights": [1]}', "finite"),
        ('{"means": [], "covs": [], "weights": []}', r"must be \(K,2\)"),
    ],
)
def test_bad_mixture_files_are_refused(tmp_path, text, says):
    file = tmp_path / "m.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        load_mixture(str(file))


def test_mixture_names_and_files(tmp_path):
    with pytest.raises(ValueError, match="unknown mixture 'rong'; choose from ring, grid, spiral"):
        load_mixture("rong")
    with pytest.raises(ValueError, match="No such file"):
        load_mixture(str(tmp_path / "none.json"))
    file = tmp_path / "m.json"
    file.write_text(json.dumps(mixture().spec()))
    close(load_mixture(str(file)).covs, mixture().covs)
