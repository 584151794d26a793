"""The rivals of `studies.fewstep`: their formulas by hand, on maps that are exactly known, and the
budget that all of them share."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data import shapes
from data.toy import Toy
from perflow import PeRFlow
from rf import expand, formulation, solve
from sample import Sampler
from studies import fewstep, more, rivals, runs, times
from studies.rivals import DMD, METHODS, PATH, Match, PlainGAN, Skip, multistep
from studies.runs import judged, scan
from toy2d import load_mixture
from train import learning_rate
from training import options
from training.options import Recipe

MEAN, STD = torch.tensor([0.5, -1.0]), 0.4


def spread(t):
    """Of N(MEAN, STD^2) at t on the RF path."""
    return ((1 - t) ** 2 * STD**2 + t**2) ** 0.5


def velocity(z, t):
    t = expand(t, z)
    mean, var = (1 - t) * MEAN, spread(t) ** 2
    x0 = MEAN + (1 - t) * STD**2 / var * (z - mean)
    return (z - (1 - t) * MEAN) * t / var - x0


def carried(z, t, s):
    """The exact flow of this Gaussian from t to s."""
    t, s = expand(t, z), expand(s, z)
    return (1 - s) * MEAN + (z - (1 - t) * MEAN) * spread(s) / spread(t)


def exact_jump(K):
    """f(z, t) that leads along the exact flow to the end of its window."""

    def field(z, t):
        _, t_end = PeRFlow(None, PATH, K).window(t)
        step = (carried(z, t, t_end) - z) / expand(t_end - t, z)
        return step.nan_to_num()  # at t = 0, where it has no weight

    return field


def normal(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


# ---- Solvers
@pytest.mark.parametrize("kind", ["dpm", "deis"])
def test_multistep_is_exact_for_a_point(kind):
    """x0_hat is the point and eps_hat is constant along the way: any number of steps is exact."""
    z, point = normal(5), torch.tensor([0.3, 2.0])
    field = lambda z, t: (z - point) / expand(t, z)
    times = torch.tensor([1, 0.7, 0.25, 0.1, 0])
    torch.testing.assert_close(multistep(field, z, times, kind), point.expand(5, 2))


@pytest.mark.parametrize("kind", ["dpm", "deis"])
def test_multistep_is_of_second_order(kind):
    z, errors = normal(200).double(), []
    exact = carried(z, torch.tensor(0.9).double(), torch.tensor(0.1).double())
    for steps in (40, 80, 160):
        times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        errors.append((multistep(velocity, z, times, kind) - exact).abs().max().item())
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.3 < ratio < 5 for ratio in ratios), ratios


def test_deis_integrates_a_linear_eps_hat():
    """d(z/a)/d(b/a) = eps_hat; where that is e + d t, the second step is exact by quadrature."""
    e, d = torch.tensor([0.4, -1.0]).double(), torch.tensor([2.0, 0.5]).double()
    field = lambda z, t: ((e + d * expand(t, z)) - z) / (1 - expand(t, z))  # eps_hat = z + (1-t) v
    z, times = normal(3).double(), torch.tensor([0.8, 0.5, 0.2]).double()
    first = multistep(field, z, times[:2], "deis")  # of first order
    tau = torch.linspace(0.5, 0.2, 20_001, dtype=torch.float64)
    rho = tau / (1 - tau)
    integral = torch.trapezoid(e + d * tau[:, None], rho[:, None], dim=0)
    exact = 0.8 * (first / 0.5 + integral)
    torch.testing.assert_close(multistep(field, z, times, "deis"), exact, rtol=1e-6, atol=1e-6)


def test_dpm_is_that_of_diffusers():
    schedulers = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    times = torch.tensor([0.9, 0.7, 0.4, 0.2, 0])
    scheduler = schedulers(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0, solver_order=2
    )
    scheduler.set_timesteps(4)
    scheduler.sigmas = times.clone()
    scheduler.timesteps = torch.arange(4.0)
    scheduler._step_index = None
    z = normal(6)
    out = z
    for i, t in enumerate(times[:-1]):
        out = scheduler.step(velocity(out, t.expand(6)), scheduler.timesteps[i], out).prev_sample
    torch.testing.assert_close(multistep(velocity, z, times, "dpm"), out, rtol=1e-4, atol=1e-4)


# ---- Maps that skip the flow
@pytest.mark.parametrize("K, skip", [(1, 1 / 16), (4, 1 / 16), (2, 1 / 3), (4, 1)])
def test_the_exact_map_is_the_fixed_point_of_skipping(K, skip):
    """Its target is itself, to the error of the solver's one step, which is 0 for the exact flow
    in place of the solver."""
    objective = Skip(velocity, windows=K, times=None, skip=skip, method="rk4")
    z, t, _ = objective.examples(normal(500), generator=torch.Generator().manual_seed(1))
    m = objective._middle(t)
    first = (carried(z, t, m) - z) / expand(m - t, z)
    *same, target = objective.target(None, exact_jump(K), (z, t, first))
    assert same[0] is z and same[1] is t
    torch.testing.assert_close(target, exact_jump(K)(z, t), rtol=1e-3, atol=1e-4)


def test_skipping_walks_two_parts_of_the_way():
    """z + (t_end - t) target is where first and then second lead."""
    second = lambda z, t: torch.sin(3 * z) + expand(t, z)
    objective = Skip(velocity, second, skip=1 / 16, windows=4)
    z, t, first = objective.examples(normal(50), generator=torch.Generator().manual_seed(1))
    _, _, target = objective.target(None, None, (z, t, first))
    _, t_end = objective.window(t)
    m = torch.maximum(t - 1 / 16, t_end)
    z_m = z + expand(m - t, z) * first
    z_e = z_m + expand(t_end - m, z) * second(z_m, m)
    torch.testing.assert_close(z + expand(t_end - t, z) * target, z_e)
    euler = solve(velocity, z, steps=1, t_start=t, t_end=m)
    torch.testing.assert_close(z_m, euler)


def test_progressive_students_see_data_of_their_own(start, monkeypatch):
    seeds = []
    monkeypatch.setattr(rivals, "learned", lambda data, recipe, o, last: (
        seeds.append(recipe.seed), last
    )[1])  # fmt: skip
    rivals.progressive(*start)
    assert len({*seeds}) == len(seeds) == 7  # students of 64, 32, ..., 1 steps


def test_progressive_rows_lie_on_edges_and_meet_in_the_middle():
    seen = []
    spy = lambda z, t: (seen.append(t), velocity(z, t))[1]
    objective = Skip(spy, spy, skip=1 / 8, windows=4, times=1)
    rows = objective.examples(normal(1000), generator=torch.Generator().manual_seed(1))
    objective.target(None, None, rows)
    assert set(rows[1].tolist()) == {0.25, 0.5, 0.75, 1.0}
    assert [set(t.tolist()) for t in seen] == [{0.25, 0.5, 0.75, 1}, {0.125, 0.375, 0.625, 0.875}]


@pytest.mark.parametrize("K, steps", [(1, 1), (1, 2), (1, 5), (2, 4), (4, 4), (4, 11)])
def test_the_exact_map_samples_the_data_in_any_number_of_steps(K, steps):
    n, objective = 40_000, Skip(velocity, windows=K, times=None)
    x = objective.sample(
        exact_jump(K), normal(n), steps=steps, generator=torch.Generator().manual_seed(2)
    )
    error = 5 * STD / math.sqrt(n)  # five standard errors; of a standard deviation it is 1/sqrt(2)
    torch.testing.assert_close(x.mean(0), MEAN, atol=error, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((2,), STD), atol=error, rtol=0)


def test_a_windows_last_step_draws_nothing_into_it():
    """K steps of K windows are jumps from edge to edge: no noise is left in them."""
    objective, z = Skip(velocity, windows=4), normal(9)
    draw = lambda seed: objective.sample(
        exact_jump(4), z, steps=4, generator=torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(draw(0), carried(z, torch.tensor(1.0), torch.tensor(0.0)))
    assert torch.equal(draw(0), draw(1))


# ---- Matching distributions
ONE_RATE = Recipe(steps=1000, lr=1e-3, warmup=0)


def test_dmd_pushes_from_what_is_drawn_to_what_the_teacher_draws():
    """Both are Gaussians of one width: x0_hat differs by the distance of the means, times the share
    of the mean in it, b^2/(a^2 std^2 + b^2)."""
    away = torch.tensor([0.2, 0.1])
    critic = torch.nn.Module()
    critic.forward = lambda z, t: velocity(z - (1 - expand(t, z)) * away, t) - away
    critic.register_parameter("w", torch.nn.Parameter(torch.zeros(1)))
    dmd = DMD(velocity, critic, ONE_RATE)
    x = MEAN + away + STD * normal(64)
    torch.manual_seed(3)
    push = dmd.push(x)
    torch.manual_seed(3)
    z, t, _ = rivals.noised(x)
    x0 = z - expand(t, z) * velocity(z, t)
    share = expand(t**2 / spread(t) ** 2, z)
    size = (x - x0).abs().mean()
    torch.testing.assert_close(push, -share * away / size, rtol=1e-3, atol=1e-4)
    assert t.min() >= 0.02 and t.max() <= 0.98


def test_dmds_push_is_divided_by_each_pictures_own_mean():
    x = normal(4 * 3 * 5).reshape(2, 3, 4, 5)  # x, pictures of two sizes of error
    dmd = DMD(lambda z, t: 0 * z, torch.nn.Linear(1, 1), ONE_RATE)
    dmd.critic = lambda z, t: torch.ones_like(z)
    torch.manual_seed(3)
    push = dmd.push(x)
    torch.manual_seed(3)
    z, t, _ = rivals.noised(x)
    means = torch.stack([(a - b).abs().mean() for a, b in zip(x, z, strict=True)])
    torch.testing.assert_close(push, expand(t / means, z).expand_as(z))


def test_dmds_critic_learns_the_flow_of_what_is_drawn():
    """Its loss is smallest for the flow of x itself."""
    x = MEAN + STD * normal(20_000)
    losses = {}
    for name, field in (("own", velocity), ("other", lambda z, t: velocity(z - 0.3, t))):
        torch.manual_seed(0)
        critic = torch.nn.Linear(1, 1)
        dmd = DMD(None, critic, ONE_RATE)
        dmd.critic = field
        losses[name] = dmd.critic_loss(x, None)
    assert losses["own"] < 0.98 * losses["other"]


class Score(torch.nn.Linear):
    """A critic whose mean output is w z."""

    def forward(self, z, t):
        return super().forward(z)


def test_the_plain_gan_pushes_towards_what_the_critic_takes_for_data():
    torch.manual_seed(0)
    critic, x = Score(2, 2), normal(7)
    torch.manual_seed(5)
    push = PlainGAN(critic, ONE_RATE).push(x)
    torch.manual_seed(5)
    z, t, _ = rivals.noised(x)
    said = critic(z, t).mean(1, keepdim=True)
    expected = torch.sigmoid(-said) * expand(1 - t, z) * critic.weight.mean(0)
    torch.testing.assert_close(push, expected)


def test_the_critic_learns_to_tell_data():
    torch.manual_seed(0)
    critic = Score(2, 1)
    objective = PlainGAN(critic, replace(ONE_RATE, lr=0.05), updates=2)
    network = lambda z, t: z - z * 0.1 - 2  # draws x = 0.1 z + 2
    for seed in range(60):
        rows = objective.examples(
            normal(256) * 0.1 - 2, generator=torch.Generator().manual_seed(seed)
        )
        objective.target(network, None, rows)
    assert (
        critic(torch.full((1, 2), -2.0), None) > 0.2 > -0.2 > critic(torch.full((1, 2), 2.0), None)
    )


class Pushed(Match):
    critic_loss = lambda self, x, x0: self.critic.weight.sum() * 0
    push = lambda self, x: torch.full_like(x, 0.25)


def test_a_judged_rows_target_moves_x_and_a_pair_keeps_its_own():
    pairs = normal(30, 1), torch.ones(30), normal(30, 2)
    field = lambda z, t: 0.5 * z
    objective = Pushed(torch.nn.Linear(1, 1), ONE_RATE, pairs, weight=2)
    z, t, x0 = objective.examples(normal(8, 3), generator=torch.Generator().manual_seed(0))
    assert len(z) == 16 and torch.equal(x0[::2], normal(8, 3)) and (t == 1).all()
    rows = [(z_ == pairs[0]).all(1).nonzero().item() for z_ in z[1::2]]
    assert torch.equal(x0[1::2], pairs[2][rows])
    _, _, target = objective.target(field, None, (z, t, x0))
    assert torch.equal(target[1::2], x0[1::2])
    torch.testing.assert_close(z[::2] - target[::2], z[::2] - field(z[::2], t) + 2 * 0.25)
    alone = Pushed(torch.nn.Linear(1, 1), ONE_RATE)
    assert alone.reuse == 1 and len(alone.examples(normal(8))[0]) == 8


class Watched(Match):
    """What the critic is shown, and at which rate."""

    seen: list

    def critic_loss(self, x, x0):
        self.seen.append((x, self.optimizer.param_groups[0]["lr"]))
        return self.critic.weight.sum()

    push = lambda self, x: torch.zeros_like(x)


def test_the_critic_learns_five_times_from_new_draws_at_the_students_rate():
    recipe = Recipe(steps=4, lr=1e-3, warmup=0, decay=True)
    objective, z = Watched(torch.nn.Linear(1, 1), recipe), normal(6)
    objective.seen = []
    for _ in range(4):
        objective.target(lambda z, t: 0 * z, None, (z, torch.ones(6), z))
    xs, rates = zip(*objective.seen, strict=True)
    assert len({x.sum().item() for x in (*xs, z)}) == 21
    assert rates == pytest.approx([learning_rate(recipe, i // 5) for i in range(20)])
    assert rates[0] == 1e-3 and rates[-1] < 2e-4


def test_pairs_leave_out_a_solve_that_runs_away(start, monkeypatch):
    teacher, data, recipe = start
    far = lambda z: z[:, :1] > 1
    monkeypatch.setattr(rivals, "flow", lambda model: lambda z, t: torch.where(far(z), z / 0, z))
    noise, t, target = rivals.pairs_of(500, teacher, data, recipe)
    assert 300 < len(noise) == len(t) == len(target) < 500 and (noise[:, 0] <= 1).all()
    torch.testing.assert_close(noise - target, noise * math.exp(-1), atol=0.02, rtol=0)


# ---- The budget
TINY = dict(steps=28, batch_size=64, lr=1e-3, clip=1.0, dropout=0.0, block=2, threads=None)


@pytest.fixture
def start():
    data = Toy(Toy.Options("ring"))
    recipe = Recipe(**runs.TOY | TINY)
    torch.manual_seed(0)
    network = Toy.network(data.spec(), recipe).requires_grad_(False)
    config = vars(recipe) | {"spec": data.spec(), "dataset": "toy2d"}
    return Sampler(network, formulation("rf"), config), data, recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_same_evaluations_of_its_teacher(name, start, monkeypatch):
    """Two a row; DMD's pairs alone have one and a half, DMD without pairs one, the plain GAN none.
    The blocks that are drawn ahead and not used are not counted as steps."""
    teacher, data, recipe = start
    counted, original = [0], rivals.flow

    def counting(model):
        field = original(model)
        return lambda z, t, *cond: (
            counted.__setitem__(0, counted[0] + len(z)),
            field(z, t, *cond),
        )[1]

    monkeypatch.setattr(rivals, "flow", counting)
    before = copy.deepcopy(teacher.network.state_dict())
    students = METHODS[name].train(teacher, data, replace(recipe, block=1))
    assert all(torch.equal(w, before[key]) for key, w in teacher.network.state_dict().items())
    rows = 28 * 64
    fewer = {"its pairs alone": 1.5, "DMD2 without its GAN": 1, "plain GAN": 0}
    share = fewer.get(name, 2)
    ahead = 64 * 2 * 7  # one block is drawn in advance, of each round
    assert share * rows <= sum(counted) <= share * rows + ahead
    for n, model in students.items():
        x = model.sample(normal(5), steps=n, generator=torch.Generator().manual_seed(0))
        assert x.shape == (5, 2) and x.isfinite().all()
    able = (1,) if "DMD" in name or name in ("its pairs alone", "plain GAN") else rivals.COUNTS
    assert list(students) == [n for n in able if n >= min(students)]


@pytest.fixture
def little(monkeypatch):
    """A study of little runs, in threads: what is measured, not how well."""
    pool = SimpleNamespace(Pool=lambda n, initializer: ThreadPool(1))
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: pool)
    for recipe in (runs.TOY, options.PRESETS["toy2d"]):
        monkeypatch.setitem(recipe, "steps", 30)
    for recipe in (runs.TOY, options.PRESETS["toy2d"], options.PRESETS["toy2d student"]):
        monkeypatch.setitem(recipe, "batch_size", 64)
    changes = dict(depth=1, steps=2, precision="fp32", muon=0.0, compile=False)
    for key, value in changes.items():
        monkeypatch.setitem(runs.SHAPES, key, value)
    monkeypatch.setitem(options.PRESETS, "shapes student", dict(batch_size=16, block=1, lr=1e-3))
    monkeypatch.setattr(fewstep, "judged", lambda draw, scan: judged(draw, scan, 2, 2))
    monkeypatch.setattr(fewstep, "yardsticks", lambda draw, mixture: dict(
        energy=draw(normal(20)).square().mean().item(), outliers=0.5, total_variation=0.1
    ))  # fmt: skip


def test_the_study_keeps_its_teacher_and_its_runs(tmp_path, little, monkeypatch, capsys):
    base = fewstep.untrained("ring", "teacher", 0, 14, tmp_path)
    assert math.isfinite(base["floor"]["energy"])
    assert (tmp_path / "ring-0.pt").exists()
    counts = {name: [*base["scores"][name]] for name in ("RK4", "Heun", "ab2")}
    assert counts == dict(RK4=["4", "8"], Heun=["2", "4", "8"], ab2=["1", "2", "4", "8"])
    kept = tmp_path / "damaged-0.pt"
    for content in (b"", {"input.weight": 3}, [1]):
        torch.save(content, kept) if content else kept.write_bytes(content)
        kept.replace(runs.run_file(tmp_path, ("grid", 0)).with_suffix(".pt"))
        with pytest.raises(ValueError, match=r"grid-0.pt is damaged or no teacher of this study"):
            fewstep.teacher_of("grid", 0, tmp_path)
    euler = fewstep.teacher_of("ring", 0, tmp_path).sample(normal(20), steps=8).square().mean()
    assert base["scores"]["Euler (DDIM)"]["8"]["energy"] == pytest.approx(euler.item(), rel=1e-4)
    own = tmp_path / "own.json"
    own.write_text(json.dumps(load_mixture("grid").spec()))
    (tmp_path / "out").mkdir()
    fewstep.teacher_of(str(own), 0, tmp_path / "out")
    assert len([*(tmp_path / "out").iterdir()]) == 1  # whatever the mixture's file is called
    few = {name: METHODS[name] for name in ("progressive", "reflow", "PeRFlow, K = 2")}
    monkeypatch.setattr(fewstep, "METHODS", few)
    fewstep.run(["ring"], 2, 70, tmp_path / "runs")
    said = capsys.readouterr().out
    assert "| RK4 | – | – |" in said and "0.0e+00 ± 0.0e+00" in said  # the best less itself
    assert len(Image.open(tmp_path / "runs" / "fewstep-ring.png").getcolors(1 << 20)) > 50
    made = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*.json")]
    scans = [run for run in made if run["job"][3:] == [0]]
    assert all(len(run["scores"]) == 1 for run in scans) and 9 <= len(scans) <= 15
    assert sorted({run["job"][-1] for run in made}) == [0, 1, 2]


def test_a_scan_goes_on_while_its_best_rate_is_at_an_end():
    best, asked = {"inside": 1.0, "low": 1e-9, "high": 1e9}, []

    def score(name, lr):
        return math.nan if name == "inside" and lr == 2 else abs(math.log(lr / best[name]))

    def scores(pairs):
        asked.append(len(pairs))
        return [score(*pair) for pair in pairs]

    scans = scan(dict.fromkeys(best, 1.0), 2, scores)
    assert sorted(scans["inside"]) == [0.5, 1, 2] and scans["inside"][2] == math.inf
    assert sorted(scans["low"]) == [0.12, 0.25, 0.5, 1, 2]  # five, then it ends
    assert sorted(scans["high"]) == [0.5, 1, 2, 4, 8] and asked == [9, 11, 13]


def test_no_table_reports_what_a_scan_saw():
    """Other captions and other noise; the same ones each time."""
    seen = []

    def draw(noise, *cond):
        seen.append((noise.sum().item(), cond[0].sum((0, 1)).tolist()))
        return torch.ones_like(noise)

    for which in (False, False, True):
        judged(draw, which, 8, 0)
    assert seen[:2] == seen[2:4] and not any(
        a == b for a, b in zip(seen[:2], seen[4:], strict=True)
    )


def test_paired_differences_by_hand(monkeypatch):
    of = lambda *values: [{"1": dict(energy=v, total_variation=0, outliers=0)} for v in values]
    groups = {"Euler (DDIM)": of(9, 9), "reflow": of(1, 3), "DMD": of(2, 5)}
    monkeypatch.setattr(fewstep, "COUNTS", (1,))
    said = fewstep.tables(groups, text=False)
    rows = [line for line in said.splitlines() if line.startswith("| DMD")]
    assert rows[0].startswith("| DMD | 3.5e+00 ± 1.5e+00 |")
    assert rows[-1].startswith("| DMD | 1.5e+00 ± 5.0e-01 |")  # of 1 and 2, not of 3.5 and 2


@pytest.mark.parametrize("name", ["DMD", "plain GAN", "progressive", "PeRFlow, K = 2"])
def test_a_method_on_shapes(name, little, tmp_path, monkeypatch):
    """With its captions, and the teacher's guidance in every field that is learned from."""
    teacher = fewstep.teacher_of("shapes", 5, tmp_path)
    monkeypatch.setattr(fewstep, "teacher_of", lambda *job: teacher)
    scales, guided = set(), Sampler.guided
    spy = lambda self, cfg=1.0: (
        scales.add((self.network is teacher.network, cfg)),
        guided(self, cfg),
    )[1]
    monkeypatch.setattr(Sampler, "guided", spy)
    run = fewstep.trained("shapes", name, 1e-3, 1, 7, tmp_path)
    assert all(0 <= scores["wrong"] <= 1 for scores in run["scores"].values())
    assert ((True, 3.0) in scales) == (name != "plain GAN") and (True, 1.0) not in scales


def test_the_untrained_rows_of_shapes(little, tmp_path):
    """One teacher for all seeds; the data are right, and a new network's flow is not."""
    scores = fewstep.untrained("shapes", "teacher", 0, 7, tmp_path)["scores"]
    assert [file.name for file in tmp_path.iterdir()] == ["shapes-0.pt"]
    assert scores["the data"]["1"]["wrong"] == 0 and scores["the data"]["1"]["distance"] < 1e-7
    assert scores["Heun"].keys() == {"2", "4", "8"} and scores["ab2"]["8"]["wrong"] > 0.5


def test_the_table_of_times(tmp_path, little, monkeypatch, capsys):
    """Each row has the teacher of its target and network; of two rates it is that of seed 0, which
    is not shown."""
    rows = ("mmdit", "velocity"), ("mlp", "velocity"), ("mlp", "diff_eps")
    targets = [("ring", *row) for row in rows]
    monkeypatch.setattr(times, "ROWS", targets)
    monkeypatch.setattr(times, "TIMES", (40, 16))
    times.run(2, 10, tmp_path)
    said = capsys.readouterr().out.splitlines()
    made = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    of = lambda *job: [run for run in made if run["job"][:4] == list(job)]
    assert len(made) == 2 * (1 + 2 * (2 + 2)) and len({run["job"][4] for run in made}) == 3
    assert {file.name for file in tmp_path.glob("*.pt")} == {"ring-mmdit-1.pt"} | {
        f"ring-{kind}{seed}.pt" for kind in ("", "eps%2Flinear-") for seed in (0, 1, 2)
    }
    energy = lambda run: run["student"]["4"]["energy"]
    told = [run for run in of(*targets[2], 16) if run["job"][5]]
    best = min((run for run in of(*targets[2], 16) if not run["job"][5]), key=energy)
    assert {run["job"][4] for run in told} == {best["job"][4]}
    mean = sum(run["student"]["4"]["energy"] for run in told) / len(told)
    assert said[-1].startswith("| ring, mlp, diff_eps: energy |") and f"| {mean:.1e} ± " in said[-1]


# ---- What the papers show beside their tables
def test_large_pictures_have_the_exact_velocity():
    """Of 64 x 64 by brute force: the softmax over all places of a caption's pictures, each pixel
    four times."""
    caption, t = "a red circle", torch.tensor([0.3, 0.8])
    rows = torch.tensor([shapes.row_of(caption)] * 2)
    placed = shapes.placed_masks()[0, 12:20, 12:20].reshape(-1, 1, 32, 32).double()
    colour = 2 * torch.tensor(shapes.COLOURS["red"]).double()[:, None, None] - 1
    every = placed * colour + (1 - placed)
    every = every.repeat_interleave(2, 2).repeat_interleave(2, 3)  # (64,3,64,64)
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    z = expand(1 - t, noise) * every[[5, 40]] + expand(t, noise) * noise
    apart = (z[:, None] - expand(1 - t, z)[:, None] * every).square().flatten(2).sum(2)
    weights = (-apart / (2 * t[:, None] ** 2)).softmax(1)
    x0_hat = torch.einsum("ni,icxy->ncxy", weights, every)
    expected = (z - x0_hat) / expand(t, z)
    found = more.large(z, t.double(), *shapes.conditions_of(rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_poor_captions_name_no_colour():
    data = more.Told(more.Shapes.Options())
    generator = lambda: torch.Generator().manual_seed(3)
    data.poor = 0.0
    x0, context, pooled = data.examples(64, generator())
    expected = more.Shapes.examples(64, generator())
    assert all(torch.equal(a, b) for a, b in zip((x0, context, pooled), expected, strict=True))
    data.poor = 1.0
    _, poor, counts = data.examples(64, generator())
    colours = [shapes.VOCABULARY.index(colour) for colour in shapes.COLOURS]
    assert poor[..., colours].abs().sum() == counts[:, colours].sum() == 0
    others = [i for i in range(len(shapes.VOCABULARY)) if i not in colours]
    assert torch.equal(poor[..., others], context[..., others])
    (words, places), (_, full) = (c.split([len(shapes.VOCABULARY), 8], -1) for c in (poor, context))
    assert torch.equal(places, full * (words.sum(-1, keepdim=True) > 0))
    data.poor = 0.5
    _, mixed, _ = data.examples(400, generator())
    assert 0.4 < (mixed[..., colours].sum((1, 2)) > 0).float().mean() < 0.6


def test_the_entropy_of_equal_weights_is_one(little, tmp_path, monkeypatch):
    """At the start of training logits are small; the hook is gone afterwards."""
    attend = more.mmdit.attend
    for key in ("validation", "batch_size"):
        monkeypatch.setitem(runs.SHAPES, key, 8)
    scores = more.entropy(False, 1e-9, 1, 10, tmp_path)
    assert more.mmdit.attend is attend and len(scores) == 1 + 2 * 10
    assert 0.9 < scores["10: entropy"] <= 1 and scores["10: largest logit"] < 5


@pytest.mark.parametrize("name", ["texts", "shift", "perflow", "sync"])
def test_more_prints_a_table(name, little, tmp_path, monkeypatch, capsys):
    work, variants, _ = more.STUDIES[name]
    monkeypatch.setitem(more.STUDIES, name, (work, variants[-2:], 4))
    few = lambda draw, spread=2: judged(draw, False, 2, min(spread, 2))
    monkeypatch.setattr(more, "judged", few)
    energy = lambda draw, mixture: dict(energy=draw(normal(9)).mean().item())
    monkeypatch.setattr(more, "yardsticks", energy)
    more.run([name], tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n| ") == 1 + len(variants[-2:]) and ("±" in said) == (name == "perflow")
    with pytest.raises(ValueError, match="'shifts'; choose from texts, captions"):
        more.run(["shifts"], tmp_path)
