"""PeRFlow by independent routes: point masses, exact mixture fields, and the paper's algebra."""

import copy
import math

import pytest
import torch

import rf
from perflow import PeRFlow, delta, plug
from toy2d import MLP, GaussianMixture, curvature

F64 = torch.float64
RF, LDM, DDPM = rf.RectifiedFlow(), rf.LDMLinear(), rf.DDPMLinear()
UNEVEN = [0, 0.1, 0.5, 0.75, 1]
WINDOWS = [1, 2, 3, 4, 5, UNEVEN, [0, 1 / 3, 1]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture():
    covs = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.05], [-0.05, 0.3]], [[0.4, 0], [0, 0.15]]]
    return GaussianMixture([[1, 0.5], [-1, 0.2], [0.1, -1.2]], covs, [1, 2, 0.5])


def examples(n=64, seed=0):
    """x0, eps, t in float64; t holds the windows' edges and 0 too."""
    g = seeded(seed)
    eps, t = torch.randn(n, 2, generator=g, dtype=F64), torch.rand(n, generator=g, dtype=F64)
    t[:9] = torch.tensor([0, 0.1, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1, 1e-9], dtype=F64)
    return mixture().sample(n, g)[0].double(), eps, t


def close(x, y, rel=1e-9):
    torch.testing.assert_close(x, y, rtol=rel, atol=rel)


def untaught(z, t, *cond):
    """A teacher for what needs none."""
    raise AssertionError("the teacher was called")


# ---- windows


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_window_holds_t_and_its_start_belongs_to_it(windows, dtype):
    """t_{k-1} < t <= t_k of a thousand t and of every edge."""
    perflow = PeRFlow(untaught, RF, windows)
    t = torch.cat(
        [1 - torch.rand(1000, generator=seeded(), dtype=dtype), perflow.edges[1:].to(dtype)]
    )
    t_start, t_end = perflow.window(t)
    assert ((t_end < t) & (t <= t_start)).all()
    edges = perflow.edges.to(dtype)
    close(*(torch.stack(w) for w in (perflow.window(edges[1:]), (edges[1:], edges[:-1]))), rel=0)
    above = torch.nextafter(edges[:-1], torch.ones(()).to(edges))
    close(*(torch.stack(w) for w in (perflow.window(above), (edges[1:], edges[:-1]))), rel=0)
    assert perflow.window(torch.zeros(2, dtype=dtype))[1].tolist() == [0, 0]  # no window: the first


@pytest.mark.parametrize(
    "windows",
    [
        0,
        -1,
        [],
        [0],
        [0, 0.5],
        [0.1, 1],
        [0, 0.5, 0.5, 1],
        [0, 0.7, 0.3, 1],
        [1, 0],
        [0, math.nan, 1],
    ],
    ids=str,
)
def test_bad_windows_are_refused(windows):
    with pytest.raises(ValueError, match="windows"):
        PeRFlow(untaught, RF, windows)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"method": "midpoint"}, "unknown solver"),
        ({"evaluations": 0}, "evaluations"),
        ({"parameterization": "x0"}, "choose from velocity, epsilon, diff_eps"),
        ({"times": -1}, "times"),
        ({"reuse": 0}, "reuse"),
    ],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        PeRFlow(untaught, RF, **bad)


@pytest.mark.parametrize("path", [RF, rf.Cosine(), rf.formulation("eps/cos").path, rf.EDM()])
def test_epsilon_is_refused_where_lambda_is_infinite(path):
    with pytest.raises(ValueError, match="lambda_k = a_e/a_s is infinite"):
        PeRFlow(untaught, path, parameterization="epsilon")


def test_velocity_is_refused_on_an_infinite_path():
    with pytest.raises(ValueError, match="rectified"):
        PeRFlow(untaught, rf.EDM())


# ---- the solve


@pytest.mark.parametrize("path", [RF, rf.Cosine(), LDM, DDPM], ids=lambda path: type(path).__name__)
def test_ends_reach_the_true_flow_to_the_solvers_order(path):
    """Truth: dz = u_t dt in small steps of t, not in the plane's coordinates."""
    x0, eps, t = examples()
    field = mixture().field(path)
    t_start, t_end = PeRFlow(field, path, UNEVEN).window(t)
    z_start = path.interpolate(x0, eps, t_start)
    # near t = 0 a linear path's b is no polynomial of t: equal steps of sqrt(t)
    w = torch.linspace(0, 1, 1501, dtype=F64)[:, None]
    times = ((1 - w) * t_start.sqrt() + w * t_end.sqrt()) ** 2
    truth = rf.solve(field, z_start, steps=1500, times=times, method="heun")
    for method, order in (("euler", 1), ("heun", 2), ("rk4", 4)):
        errors = []
        for evaluations in (16, 32, 64):
            perflow = PeRFlow(field, path, UNEVEN, evaluations, method=method)
            start, end = perflow.solve_window(x0, eps, t)
            close(start, z_start)
            errors.append((end - truth).square().mean().sqrt().item())
        if order == 4 and path in (LDM, DDPM):  # the truth and u_t have kinks at 999 table entries
            assert errors[-1] < 5e-6
        else:
            assert abs(math.log2(errors[0] / errors[-1]) / 2 - order) < 0.3


def test_euler_on_a_linear_path_is_ddim():
    """z_s = a_s x0_hat + b_s eps_hat with the exact posterior means, on the same times."""
    x0, eps, _ = examples()
    perflow = PeRFlow(mixture().field(LDM), LDM, [0, 0.3, 1], 5, method="euler")
    z_start, z_end = perflow.solve_window(x0, eps, torch.full((64,), 0.7, dtype=F64))
    a, b = (f(torch.tensor([1.0, 0.3], dtype=F64)) for f in (LDM.a, LDM.b))
    r = torch.linspace(*(b / (a + b)).tolist(), 6, dtype=F64)
    z, times = z_start, LDM.time(2 * torch.log((1 - r) / r))
    for t, s in zip(times, times[1:], strict=False):
        x0_hat, eps_hat = mixture().ends(z, t, LDM)
        z = LDM.a(s) * x0_hat + LDM.b(s) * eps_hat
    close(z_end, z, 1e-6)


@pytest.mark.parametrize("method, calls", [("euler", 8), ("heun", 8), ("rk4", 8)])
@pytest.mark.parametrize("path", [RF, LDM], ids=["rf", "ldm"])
def test_the_batched_solve_equals_one_per_window_and_sees_its_own_window(method, calls, path):
    x0, eps, t = examples()
    field, seen = mixture().field(path), []
    labels = torch.arange(len(t)) % 4

    def teacher(z, t, labels):
        seen.append(t)
        return field(z, t, labels)

    perflow = PeRFlow(teacher, path, 3, method=method)
    z_start, z_end = perflow.solve_window(x0, eps, t, labels)
    t_start, t_end = perflow.window(t)
    assert len(seen) == calls  # for the whole batch
    slack = 1e-9  # of a change of coordinates and back
    assert all(((t_end - slack <= s) & (s <= t_start + slack)).all() for s in seen)
    for edge in t_start.unique():
        rows = t_start == edge
        alone = perflow.solve_window(x0[rows], eps[rows], t[rows], labels[rows])
        close(alone[0], z_start[rows], 1e-12)
        close(alone[1], z_end[rows], 1e-12)


def test_one_window_is_reflow_from_pure_noise():
    """K = 1 starts at eps itself, and its target is eps less where the flow ends."""
    x0, eps, t = examples()
    perflow = PeRFlow(mixture().field(RF), RF, 1)
    z_start, z_end = perflow.solve_window(x0, eps, t)
    close(z_start, eps)
    z_t, target = perflow.pair(x0, eps, t)
    close(target, eps - z_end)
    close(z_t, (1 - t[:, None]) * z_end + t[:, None] * eps)


# ---- the line


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("parameterization", ["velocity", "epsilon"])
def test_a_point_mass_is_straight_already(windows, parameterization):
    """x0 = mu: on RF the target is the exact velocity (z - mu)/t; on LDM, eps itself is eps*."""
    mu = torch.tensor([0.3, -0.7], dtype=F64)
    _, eps, t = examples()
    x0, t = mu.expand_as(eps), t[1:]
    if parameterization == "velocity":
        perflow = PeRFlow(lambda z, t: (z - mu) / t[:, None], RF, windows, method="euler")
        z, target = perflow.pair(x0[1:], eps[1:], t)
        close(target, (z - mu) / t[:, None], 1e-6)  # t = 1e-9 costs digits
        close(z, RF.interpolate(x0[1:], eps[1:], t))
        noise, exact = eps, lambda z, t: (z - mu) / t[:, None]
        close(perflow.sample(exact, noise, steps=2 * perflow.windows), x0)
        assert curvature(exact, noise, perflow.edges.flip(0)).max() < 1e-20
    else:

        def teacher(z, t):
            return LDM.conditional_velocity(z, (z - LDM.a(t)[:, None] * mu) / LDM.b(t)[:, None], t)

        perflow = PeRFlow(teacher, LDM, windows, parameterization="epsilon")
        close(perflow.pair(x0[1:], eps[1:], t)[1], eps[1:], 1e-6)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("path", [RF, LDM], ids=["rf", "ldm"])
def test_z_t_lies_on_the_line(path, windows):
    """The distances to both ends are to the chord as t's to the edges are to the window."""
    x0, eps, t = examples()
    perflow = PeRFlow(mixture().field(path), path, windows)
    z_start, z_end = perflow.solve_window(x0, eps, t)
    z, target = perflow.pair(x0, eps, t)
    t_start, t_end = perflow.window(t)
    chord = (z_end - z_start).norm(dim=1)
    close((z - z_start).norm(dim=1) / chord, (t_start - t) / (t_start - t_end), 1e-6)
    close((z - z_end).norm(dim=1) / chord, (t - t_end) / (t_start - t_end), 1e-6)
    close(z + target * (t_end - t)[:, None], z_end)
    close(perflow.pair(x0, eps, t_start)[0], z_start, 0)


@pytest.mark.parametrize("path", [LDM, DDPM], ids=["ldm", "ddpm"])
@pytest.mark.parametrize("parameterization", ["epsilon", "diff_eps"])
def test_epsilon_gives_the_lines_slope_from_any_point_of_it(parameterization, path):
    """eps* as the student: the velocity is the chord, edges included; so both minimisers agree."""
    x0, eps, t = examples()
    perflow = PeRFlow(mixture().field(path), path, UNEVEN, parameterization=parameterization)
    slope = PeRFlow(mixture().field(path), path, UNEVEN).pair(x0, eps, t)[1]
    z, eps_star = perflow.pair(x0, eps, t)
    close(perflow.velocity(lambda z, t: eps_star)(z, t), slope, 1e-7)


def test_diff_eps_is_the_noise_that_leads_from_the_windows_end_to_its_start():
    """The forward process between two times, z_s = g z_e + sqrt(1 - g^2) eps; DDIM's eps* is the
    noise of a jump to x0 and back."""
    x0, eps, t = examples()
    perflow = PeRFlow(mixture().field(LDM), LDM, 3, parameterization="diff_eps")
    z_start, z_end = perflow.solve_window(x0, eps, t)
    g = LDM.a(perflow.window(t)[0]) / LDM.a(perflow.window(t)[1])
    noise = perflow.pair(x0, eps, t)[1]
    close(g[:, None] * z_end + (1 - g**2).sqrt()[:, None] * noise, z_start, 1e-7)


def test_epsilon_form_holds_for_any_lambda_and_eta():
    """With random lambda_k and eta_k the sampler's velocity is the line's slope."""
    x0, eps, t = examples()
    perflow = PeRFlow(mixture().field(LDM), LDM, 3, parameterization="epsilon")
    g = seeded(3)
    lambda_k, eta_k = (0.2 + 3 * torch.rand(64, 1, generator=g, dtype=F64) for _ in range(2))
    perflow._ddim = lambda *_: (lambda_k, eta_k)
    z_start, z_end = perflow.solve_window(x0, eps, t)
    t_start, t_end = perflow.window(t)
    z, eps_star = perflow.pair(x0, eps, t)
    close(lambda_k * z_start + eta_k * eps_star, z_end)
    slope = (z_end - z_start) / (t_end - t_start)[:, None]
    close(perflow.velocity(lambda z, t: eps_star)(z, t), slope, 1e-8)


def test_both_parameterizations_have_one_minimiser():
    """Least squares over many examples at one (z, t): the mean eps* maps to the mean slope."""
    n, t = 4000, torch.full((4000,), 0.6, dtype=F64)
    x0, eps, _ = examples(n)
    both = [PeRFlow(mixture().field(LDM), LDM, parameterization=p) for p in ("velocity", "epsilon")]
    (z, slope), (_, eps_star) = (perflow.pair(x0, eps, t) for perflow in both)
    basis = torch.cat(
        [z, torch.ones(n, 1, dtype=F64)], dim=1
    )  # students linear in (z, 1), at this t
    fit = [torch.linalg.lstsq(basis, target).solution for target in (slope, eps_star)]
    close(both[1].velocity(lambda z, t: basis @ fit[1])(z, t), basis @ fit[0], 1e-6)


# ---- what training draws


@pytest.mark.parametrize("windows, times", [(4, 4), (4, 250), (3, 5), (1, 4), (UNEVEN, 3)], ids=str)
def test_discrete_times_are_the_official_ones_and_equally_likely(windows, times):
    """Against 1 - floor(uN)/N of the same u; each as often as the others."""
    n, perflow = 40_000, PeRFlow(untaught, RF, windows, times=times)
    t, u = perflow.draw(n, seeded()), torch.rand(n, generator=seeded())
    N = perflow.windows * times
    if windows != UNEVEN:
        torch.testing.assert_close(t, 1 - (u * N).floor() / N, rtol=0, atol=1e-6)
    t_start, t_end = perflow.window(t)
    within = (t_start - t) / (t_start - t_end) * times  # 0, 1, ..., times - 1 below the start
    torch.testing.assert_close(within, within.round(), rtol=0, atol=2e-4 * times)
    values, counts = t.unique(return_counts=True)
    assert len(values) == N and set(perflow.edges[1:].float().tolist()) <= set(values.tolist())
    chi2 = ((counts - n / N) ** 2 / (n / N)).sum().item()
    assert chi2 < N + 5 * math.sqrt(2 * N)  # its mean is N - 1, its variance 2 (N - 1)


def test_without_discrete_times_t_is_uniform():
    perflow = PeRFlow(untaught, RF, UNEVEN, times=None)
    t = perflow.draw(40_000, seeded())
    assert torch.equal(t, 1 - torch.rand(40_000, generator=seeded())) and (t > 0).all()
    assert torch.equal(PeRFlow(untaught, RF, UNEVEN, times=0).draw(40_000, seeded()), t)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_a_student_is_never_asked_below_the_trained_times_of_its_window(windows):
    """Where training drew no t, the answer is the one at the lowest t that it drew; above, and at
    all trained times, the student sees t itself."""
    perflow = PeRFlow(untaught, RF, windows)
    asked = perflow.field(lambda z, t: t)
    z = torch.zeros(1)
    trained = perflow.draw(10_000, seeded()).unique()
    close(asked(z, trained), trained, 1e-6)
    t = 1 - torch.rand(10_000, generator=seeded(1))
    t_start, t_end = perflow.window(t)
    lowest = t_end + (t_start - t_end) / 4
    close(asked(z, t), torch.maximum(t, lowest), 1e-6)
    assert all((perflow.window(asked(z, t))[k] == (t_start, t_end)[k]).all() for k in (0, 1))
    plain = PeRFlow(untaught, RF, windows, times=None)
    assert torch.equal(plain.field(lambda z, t: t)(z, t), t)


def test_examples_reuse_each_solve_in_its_window():
    x0, _, _ = examples()
    field, calls = mixture().field(RF), []
    teacher = lambda *a: (calls.append(len(a[0])), field(*a))[1]
    perflow = PeRFlow(teacher, RF, 3, reuse=3)
    labels = torch.arange(len(x0)) % 4
    z, t, target, again = perflow.examples(x0, labels, generator=seeded())
    assert calls == [len(x0)] * 8 and len(z) == len(t) == len(target) == 3 * len(x0)
    assert (again == labels.repeat(3)).all()
    close(*(target.split(64)[:2]))  # one solve, one slope, other t
    assert (t[:64] != t[64:128]).any()
    drawn = perflow.draw(10_000, seeded()).unique()
    assert (t[:, None] - drawn).abs().amin(1).max() < 1e-6  # the discrete times, in the same window
    assert torch.equal(*(torch.stack(perflow.window(x)) for x in (t[:64], t[128:])))
    plain, generator = PeRFlow(field, RF, 3), seeded()
    plain.draw(len(x0), generator)
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    z2, target2 = plain.pair(x0.repeat(3, 1), eps.repeat(3, 1), t, again)
    close(z, z2, 1e-5)
    close(target, target2, 1e-5)


@pytest.mark.parametrize("runs_to", [math.inf, math.nan, 1e6])
def test_a_solve_that_runs_away_gives_its_place_to_another(runs_to):
    """With its t, target and condition, all of one row."""
    x0 = examples(32)[0].float()
    field, far = mixture().field(RF), lambda z: z[:, :1] > 1.5
    perflow = PeRFlow(lambda z, t, row: field(z, t), RF, 2, reuse=2)
    rows = perflow.examples(x0, torch.arange(32), generator=seeded())
    perflow.teacher = lambda z, t, row: torch.where(far(z), runs_to, field(z, t))
    left = perflow.examples(x0, torch.arange(32), generator=seeded())
    stayed = left[3] == rows[3]
    assert 20 < stayed.sum() < 64
    for before, after in zip(rows, left, strict=True):
        assert after.isfinite().all() and after.abs().max() < 100
        assert (after[stayed] == before[stayed]).all()
    first = left[3][~stayed].unique()
    assert len(first) == 1 and stayed[first]  # the first good row stands in for all others
    slopes = left[2][left[3] == first]
    close(slopes, slopes[:1].expand_as(slopes))


@pytest.mark.parametrize("times", [None, 4])
def test_loss(times):
    """Zero for a student that knows the line (a point mass), the same from the same generator."""
    mu = torch.tensor([0.3, -0.7])

    def exact(z, t):
        return (z - mu) / t[:, None]

    student = exact
    perflow = PeRFlow(exact, RF, 3, times=times)  # Heun would ask for 0/0 at t = 0

    x0 = mu.expand(256, 2)
    assert perflow.loss(student, x0, generator=seeded()) < 1e-6
    net = MLP()
    first, second, other = (perflow.loss(net, x0, generator=seeded(s)) for s in (1, 1, 2))
    assert first == second != other
    first.backward()
    assert net.input.weight.grad.abs().sum() > 0
    zero = perflow.loss(lambda z, t: torch.zeros_like(z), x0.repeat(100, 1), generator=seeded())
    expected = 1 + mu.square().mean()  # E |eps - mu|^2 per dimension
    assert abs(zero - expected) < 0.05


# ---- sampling


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("parameterization", ["velocity", "epsilon"])
def test_steps_never_cross_an_edge(windows, parameterization):
    """From K to 4K steps: every edge is a time, counts differ by one, the noisiest have more."""
    path = RF if parameterization == "velocity" else LDM
    perflow = PeRFlow(untaught, path, windows, parameterization=parameterization, times=None)
    K, edges = perflow.windows, perflow.edges
    for n in range(K, 4 * K + 1):
        times = perflow.grid(n)
        assert times[0] == 1 and times[-1] == 0 and len(times) == n + 1
        assert (times.diff() < 0).all() and all((times == edge).any() for edge in edges)
        counts = [
            ((times > s) & (times <= e)).sum().item()
            for s, e in zip(edges, edges[1:], strict=False)
        ]
        assert counts == sorted(counts) and max(counts) - min(counts) <= 1  # the noisiest get more
        seen = []
        student = lambda z, t: (seen.append(t[0]), z)[1]
        perflow.sample(student, torch.zeros(1, 2), steps=n)
        assert torch.equal(torch.stack(seen), times[:-1].float())
    with pytest.raises(ValueError, match=f"{K - 1} steps are too few for {K} windows"):
        perflow.grid(K - 1)


def test_times_of_a_student_fall_and_hold_all_edges():
    perflow, noise = PeRFlow(untaught, RF, 2), torch.zeros(1, 2)
    still = lambda z, t: torch.zeros_like(z)
    assert perflow.sample(still, noise, times=[1, 0.8, 0.5, 0]).shape == (1, 2)
    for bad in ([0, 0.5, 1], [1, 0.5, 0.6, 0], [1, 0.5, 0.5, 0]):
        with pytest.raises(ValueError, match="times must fall from 1 to 0"):
            perflow.sample(still, noise, times=bad)
    with pytest.raises(ValueError, match=r"cross the window's edge at t = 0\.5"):
        perflow.sample(still, noise, times=[1, 0.6, 0])


@pytest.mark.parametrize("parameterization", ["velocity", "epsilon", "diff_eps"])
def test_a_perfect_student_samples_as_the_teacher_in_any_number_of_steps(parameterization):
    """Piecewise constant by construction: a student that knows where its window started."""
    path = RF if parameterization == "velocity" else LDM
    field, noise = mixture().field(path), torch.randn(32, 2, generator=seeded(), dtype=F64)
    perflow = PeRFlow(field, path, 3, 400, parameterization)
    state = {}

    def student(z, t):
        k = perflow.window(t)[0][0].item()
        if k not in state:  # the first step of a window: solve it
            x0, eps = torch.zeros_like(z), z / path.b(torch.tensor(k, dtype=F64))
            state[k] = perflow.pair(x0, eps, torch.full((32,), k, dtype=F64))[1]
        return state[k]

    once = perflow.sample(student, noise, steps=3)
    close(perflow.sample(student, noise, steps=8), once)
    t = torch.ones(32, dtype=F64)
    z = path.b(t)[:, None] * noise
    for k in (1, 2 / 3, 1 / 3):
        t = torch.full((32,), k, dtype=F64)
        z = perflow.solve_window(torch.zeros_like(z), z / path.b(t)[:, None], t)[1]
    close(once, z, 1e-7)


def test_curvature_of_a_known_field():
    """v = c + t d runs along a parabola: per window the mean of (v - mean v)^2 is h^2 |d|^2/12."""
    c, d = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.5, 3.0], dtype=F64)
    noise = torch.randn(10, 2, generator=seeded(), dtype=F64)
    edges = torch.tensor([1, 0.25, 0], dtype=F64)
    got = curvature(lambda z, t: c + t[:, None] * d, noise, edges, steps=500)
    expected = [
        (e - s) ** 2 * d.square().sum() / 12 / (c + (s + e) / 2 * d).square().sum()
        for s, e in ((0.25, 1), (0, 0.25))
    ]
    close(got, torch.stack(expected), 1e-2)


# ---- plug and play


def test_plugging_the_delta_onto_the_teacher_gives_the_student():
    """Weight by weight, to rounding; plugging twice warns."""
    torch.manual_seed(0)
    teacher, student = MLP(classes=3), MLP(classes=3)
    change = delta(student, teacher.state_dict())
    network = copy.deepcopy(teacher)
    plug(network, change)
    for key, w in network.state_dict().items():
        larger = torch.maximum(teacher.state_dict()[key].abs(), student.state_dict()[key].abs())
        assert ((w - student.state_dict()[key]).abs() <= 2**-23 * larger).all()
    with pytest.warns(UserWarning, match="delta already"):
        plug(network, change)


def test_shared_weights_are_plugged_once():
    def tied():
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        network[1].weight = network[0].weight
        return network

    teacher, student = tied(), tied()
    plug(teacher, delta(student, teacher))
    close(teacher[1].weight, student[1].weight, 1e-6)


@pytest.mark.parametrize("other", [MLP(classes=3), MLP(width=32)], ids=["keys", "shapes"])
def test_the_delta_of_another_network_is_refused(other):
    network = MLP()
    before = copy.deepcopy(network.state_dict())
    for call in (lambda: delta(other, network), lambda: plug(network, other.state_dict())):
        with pytest.raises(ValueError, match="another network"):
            call()
    assert all(torch.equal(w, before[key]) for key, w in network.state_dict().items())
