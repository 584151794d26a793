"""Forks, as a stranger would write them: classes, and a line in a table each. They are the measure
of the house: data sets (digits, signals), formulations (x0, a coupling), objectives with a moving
target (consistency, mean flow), a network (a U-Net), and use as a library (a loop, editing).

CONTRIBUTING.md has a row for each kind. `life_cycle` is what every entry of a table lives through.
"""

import ast
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pytest
import test_rf
import test_train
import torch
from helpers import (
    QUICK,
    assert_one_line,
    in_process,
    life_cycle,
    run,
    same,
    small_recipe,
    stream,
    write_cifar,
)
from PIL import Image
from torch import nn

import data.base
import data.toy
import rf
import sample
import toy2d
import train
from data.base import Data, Dataset
from data.networks import NETWORKS
from training.options import Parser, Recipe

# ---- A: digits, labelled and unlabelled, one channel, with a flag of their own


class Digits(Dataset):
    """Ten patterns of 8 x 8 grey pixels under a little noise."""

    @dataclass
    class Options:
        unlabelled: Annotated[bool, "do not tell the network which digit it is"] = False

    recipe: ClassVar = dict(QUICK)

    def __init__(self, options):
        draw = np.random.default_rng(0)
        labels, patterns = np.arange(200) % 10, draw.choice([-1, 1], (10, 1, 8, 8))
        x0 = patterns[labels] + 0.1 * draw.standard_normal((200, 1, 8, 8))
        super().__init__(x0.astype(np.float32), *[labels] * (not options.unlabelled))


# ---- Signals: one dimension, a number as the condition, an own network and an own metric


class Signals(Data):
    """cos(2 pi f x + phase) at 32 points, f from 1 to 4."""

    recipe: ClassVar = dict(network="waves", lr=1e-3)
    place = torch.arange(32) / 32

    def __init__(self, options):
        pass

    def spec(self):
        return dict(shape=[1, 32], classes=0)

    def examples(self, n, generator):
        f, phase = 1 + 3 * torch.rand(n, generator=generator), torch.rand(n, generator=generator)
        return [torch.cos(2 * np.pi * (f[:, None] * self.place + phase[:, None]))[:, None], f]

    @classmethod
    def arguments(cls, spec):
        return dict(in_channels=1)

    @classmethod
    def conditions(cls, spec, n, label=None, data=None, generator=None):
        return [torch.linspace(1, 4, n) if label is None else torch.full((n,), float(label))]

    def metrics(self, model):
        f = torch.linspace(1, 4, 8)
        x0 = model.draw(8, f, steps=max(4, model.objective.fewest))
        basis = torch.exp(-2j * np.pi * f[:, None] * self.place)
        return {"off": 1 - (2 * (x0[:, 0] * basis).mean(1).abs() ** 2).mean().item()}

    @classmethod
    def write(cls, spec, file, x0, *cond, seed=0, device="cpu"):
        if file.suffix == ".npz":
            np.savez(file, x0, *cond)
        else:
            Image.fromarray((100 * x0[:, 0] + 128).numpy().clip(0, 255).astype("uint8")).resize(
                (128, 64)
            ).save(file)
        return file


class Waves(nn.Module):
    null_cond = (torch.tensor(0),)  # a whole number: f must stay the number that it is

    def __init__(self, depth, in_channels):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(34, 64), nn.SiLU(), nn.Linear(64, 32))

    def forward(self, z, t, f):
        return self.body(torch.cat([z[:, 0], t[:, None], f[:, None]], dim=1))[:, None]


# ---- A U-Net beside MM-DiT, for pictures with texts


class UNet(nn.Module):
    def __init__(self, depth, in_channels, context_dim, pooled_dim, **_):
        super().__init__()
        self.null_cond = torch.zeros(1, context_dim), torch.zeros(pooled_dim)
        self.text = nn.Linear(pooled_dim + 1, 8)
        self.start, self.down = (
            nn.Conv2d(in_channels, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, 2, padding=1),
        )
        self.up, self.out = (
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.Conv2d(8, in_channels, 3, padding=1),
        )

    def forward(self, x, t, context, pooled):
        high = self.start(x).relu()
        low = self.down(high) + self.text(torch.cat([pooled, t[:, None]], 1))[..., None, None]
        return self.out(high + self.up(low.relu()))


# ---- A coupling of noise and data: minibatch optimal transport (Pooladian et al. 2023)


class OptimalTransport(rf.Formulation):
    def noise(self, x0, generator=None):
        """Each swap of two noises makes the way shorter, until none does."""
        eps, one = rf.gaussian_like(x0, generator), torch.arange(len(x0))
        cost = torch.cdist(x0.flatten(1), eps.flatten(1)) ** 2
        for _ in range(10 * len(x0)):
            stay = cost.diagonal()
            gain = stay[:, None] + stay - cost - cost.T
            i, j = divmod(gain.argmax().item(), len(x0))
            if gain[i, j] <= 1e-6:
                break
            order = one.clone()
            order[[i, j]] = order[[j, i]]
            eps, cost = eps[order], cost[:, order]
        return eps


# ---- An objective without a teacher: MeanFlow (Geng et al. 2025), with a jvp of the network


class MeanFlow(rf.Objective):
    """u(z, t, r) is the mean velocity from t to r: u = v - (t - r) du/dt."""

    path, times_given = rf.RectifiedFlow(), 2

    of = classmethod(lambda cls, formula, options, guided=None: cls())

    def field(self, network):
        twice = lambda t: t if t.dim() == 2 else torch.stack([t, t], dim=1)
        return lambda z, t, *cond: network(z, twice(t), *cond)

    velocity = rectified = field

    def examples(self, x0, *cond, generator=None):
        r, t = torch.rand(2, len(x0), generator=generator).sort(0).values
        eps = self.noise(x0, generator)
        times = torch.stack([t, r], dim=1)
        return self.path.interpolate(x0, eps, t), times, eps - x0, *cond

    @torch.no_grad()
    def target(self, network, average, rows):
        z, times, v, *cond = rows
        t, r = times.T
        u = lambda z, t: network(z, torch.stack([t, r], dim=1), *cond)
        du = torch.func.jvp(u, (z, t), (v, torch.ones_like(t)))[1]
        return z, times, v - rf.expand(t - r, z) * du, *cond

    def pair(self, x0, eps, t, *cond):
        return self.path.interpolate(x0, eps, t), eps - x0

    def grid(self, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def sample(self, network, noise, *cond, steps=1, times=None, method="euler", generator=None):
        z, times = noise, self.grid(steps).to(noise)
        for t, r in zip(times, times[1:], strict=False):
            z = z + (r - t) * network(z, torch.stack([t, r]).expand(len(z), 2), *cond)
        return z


# ---- Their lines in the tables, and the life of every entry


@pytest.fixture
def forked(monkeypatch):
    lines = (
        (sample.DATASETS, "digits", Digits),
        (sample.DATASETS, "signals", Signals),
        (NETWORKS, "waves", Waves),
        (NETWORKS, "unet", UNet),
        (NETWORKS, "mlp of two times", lambda **how: toy2d.MLP(**how, times_taken=2)),
        (rf._FORMULATIONS, "rf/ot", lambda: OptimalTransport("", rf.RectifiedFlow(), "velocity")),
        (sample.OBJECTIVES, "meanflow", MeanFlow),
    )
    for table, name, entry in lines:
        monkeypatch.setitem(table, name, entry)


TOY = ["--dataset", "toy2d"]
LIVES = {
    "toy2d": TOY,
    "toy2d, MM-DiT, labels": [*TOY, "--network", "mmdit", "--conditional"],
    "shapes": ["--dataset", "shapes"],
    "shapes, DiT": ["--dataset", "shapes", "--network", "dit"],
    "cifar10": ["--dataset", "cifar10"],
    "latents": ["--dataset", "latents"],
    "digits": ["--dataset", "digits"],
    "digits, unlabelled": ["--dataset", "digits", "--unlabelled"],
    "signals": ["--dataset", "signals"],
    "U-Net": ["--dataset", "shapes", "--network", "unet"],
    "rf/ot": [*TOY, "--formulation", "rf/ot"],
    "meanflow": [*TOY, "--meanflow", "--network", "mlp of two times"],
}


@pytest.mark.parametrize("name", LIVES)
def test_a_life_cycle(
    name, forked, tmp_path, monkeypatch, few_records, latents, own_process, request
):
    flags = LIVES[name]
    if "cifar10" in flags:
        flags = [*flags, "--data", write_cifar(tmp_path / "cifar")]
    if "latents" in flags:
        folder = shutil.copytree(latents, tmp_path / "latents")
        (folder / "meta.json").write_text(json.dumps({"vae": request.getfixturevalue("vae")}))
        flags = [*flags, "--data", folder]
    samples, student = life_cycle(flags, tmp_path, monkeypatch)
    assert all(np.isfinite(x).all() for x in samples) and (student is None) == (name == "meanflow")


def test_every_data_set_has_a_life():
    assert {flags[1] for flags in LIVES.values()} >= {*sample.DATASETS}


def test_the_report_of_a_data_set_that_has_none(forked, tmp_path, monkeypatch, capsys, own_process):
    """It writes samples; --condition asks for a number, which stays one."""
    monkeypatch.setattr(Signals, "recipe", QUICK | Signals.recipe)
    run(monkeypatch, "--dataset", "signals", "--out", tmp_path / "s")
    assert (tmp_path / "s" / "samples.png").exists()
    flags = [tmp_path / "s" / "checkpoint.pt", "--condition", 3.5, "--num", 3, "--steps", 1]
    run(monkeypatch, *flags, "--out", tmp_path / "x.npz", main=sample.main)
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [3.5] * 3
    capsys.readouterr()
    done = in_process(sample.main, [*flags, "--label", 3], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "--label 3 and --condition 3.5")


def test_a_number_is_no_class(finished, tmp_path, monkeypatch, capsys):
    """A float condition makes no classes, keeps its kind where it is dropped and guided, and a
    model of classes takes none."""
    f = np.linspace(0.5, 7.5, 20).astype(np.float32)
    assert Dataset(np.zeros((20, 1, 4, 4), np.float32), f).classes == 0
    cond, null = torch.tensor([3.5, 1.25]), torch.tensor(0)
    (kept,) = Data().drop([cond], [null], 0.0, torch.Generator())
    assert torch.equal(kept, cond)
    seen = rf.guide(lambda z, t, f: f[:, None] * z, [torch.tensor(0.5)], 2.0)
    labels = torch.tensor([3, 1])
    assert torch.equal(seen(torch.ones(2, 1), torch.ones(2), labels), 2 * labels[:, None] - 0.5)
    args = [finished[0] / "checkpoint.pt", "--condition", 3.5]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "--condition 3.5: this model is not conditioned on a number")


# ---- What does not fit is one line; a fork's own bug keeps its traceback


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--dataset", "shapes", "--network", "mlp"], "--network mlp is not for Shapes: got an"),
        (
            [*TOY, "--network", "vgg"],
            "unknown network 'vgg'; choose from mlp, mmdit, dit, crossdit",
        ),
        ([*TOY, "--meanflow"], "--network mlp takes 1 times, and meanflow gives 2"),
        ([*TOY, "--network", "mlp of two times"], "takes 2 times, and rf gives 1"),
        ([*TOY, "--skips", 3], "unrecognized arguments: --skips 3"),
    ],
)
def test_what_does_not_fit_is_one_line(flags, says, forked, tmp_path, monkeypatch, capsys):
    done = in_process(train.main, flags, tmp_path, monkeypatch, capsys)
    assert_one_line(done, says)
    assert not [*tmp_path.rglob("checkpoint.pt")]


def test_two_data_sets_that_define_one_flag_differently_are_an_error_at_start():
    def of(annotation):
        def options(scale: annotation = 1):
            """A data set's."""

        return options

    parser = Parser()
    parser.add_options(of(Annotated[int, "of it"]), "a")
    parser.add_options(of(Annotated[int, "of it"]), "b")
    assert parser.parse_args(["--scale", "3"]).scale == 3
    with pytest.raises(ValueError, match="c and a, b define --scale differently"):
        parser.add_options(of(Annotated[float, "of it"]), "c")


def broken(*args, **options):
    raise ValueError("too many values to unpack")


@pytest.mark.parametrize("name", ["examples", "metrics", "write", "arguments"])
def test_a_forks_own_bug_keeps_its_traceback(
    name, forked, tmp_path, monkeypatch, own_process, capsys
):
    monkeypatch.setattr(Signals, "recipe", QUICK | Signals.recipe)
    monkeypatch.setattr(Signals, name, broken)
    with pytest.raises(ValueError, match="too many values") as caught:
        run(monkeypatch, "--dataset", "signals", "--out", tmp_path / "s")
    assert caught.traceback[-1].name == "broken"


@pytest.mark.parametrize(
    "of, call, says",
    [
        (Data, "write", "Bare needs `write(cls, spec, file, x0, *cond, seed, device) -> the file`"),
        (Data, "spec", "Bare needs `spec(self) -> dict(shape=[C, H, W], classes=K), or more`"),
        (Data, "held_out", "Bare needs `examples(self, n, generator) -> [x0, *cond]`"),
        (rf.Objective, "sample", "Bare needs `sample(self, network, noise, *cond, steps, times,"),
        (rf.Objective, "of", "Bare needs `of(cls, formula, options, guided) -> the objective`"),
    ],
)
def test_a_missing_name_says_what_to_write(of, call, says):
    bare = type("Bare", (of,), {})()
    with pytest.raises(NotImplementedError, match=re.escape(says)):
        getattr(bare, call)(*[0] * (call == "held_out"))


# ---- The coupling


def test_a_coupling_meets_one_batch_at_a_time(forked, monkeypatch):
    """In training, whose blocks are of many batches, in validation, and in a student's starts."""
    met, noise = [], OptimalTransport.noise
    monkeypatch.setattr(
        OptimalTransport, "noise", lambda *a, **k: (met.append(len(a[1])), noise(*a, **k))[1]
    )
    objective, recipe, data = rf.formulation("rf/ot"), small_recipe(block=3), toy2d_data()
    rows = next(train.batches(data, objective, recipe))[0]
    assert {*met} == {32} and len(met) >= 3 and len(rows[0]) == 32
    met.clear()
    train.validation_loss(lambda z, t: z, objective, *data.held_out(70), batch_size=32)
    assert met == [32, 32, 6]
    student = sample.OBJECTIVES["perflow"]
    student = student.of(objective, student.Options(reuse=1), lambda cfg: lambda z, t: z)
    met.clear()
    next(train.batches(data, student, recipe))
    assert {*met} == {32} and student.coupled
    independent = rf.formulation("rf")
    assert not independent.coupled and objective.name == "rf/ot" and objective.coupled


def toy2d_data():
    return data.toy.Toy(data.toy.Toy.Options())


def test_a_coupling_makes_ways_short_and_keeps_the_noise_normal(forked):
    objective, x0 = rf.formulation("rf/ot"), toy2d.load_mixture("ring").sample(64)[0]
    generator = lambda: torch.Generator().manual_seed(0)
    eps, coupled = rf.gaussian_like(x0, generator()), objective.noise(x0, generator())
    assert torch.equal(eps.sort(0).values, coupled.sort(0).values)
    assert (coupled - x0).square().mean() < 0.5 * (eps - x0).square().mean()


def test_the_excess_is_shown_only_of_independent_pairs(forked):
    for name, shown in (("rf/ot", {}), ("rf", {"excess"})):
        sampler = sample.Sampler(toy2d.MLP(), rf.formulation(name))
        assert {*toy2d_data().metrics(sampler)} == {*shown}


# ---- MeanFlow


def test_the_report_of_an_objective_without_a_truth(
    forked, tmp_path, monkeypatch, capsys, own_process
):
    """Samples and pictures, and no relative excess."""
    few = lambda mixture, seed, n=0, c=False, whole=toy2d.reference: whole(mixture, seed, 300, c)
    monkeypatch.setattr(toy2d, "reference", few)
    monkeypatch.setattr(data.toy.Toy, "_draw_flow", lambda *args: None)
    monkeypatch.setattr(data.toy.Toy, "recipe", QUICK)
    run(monkeypatch, *LIVES["meanflow"], "--out", tmp_path / "m")
    said = capsys.readouterr().out
    assert "energy distance" in said and "relative excess" not in said


def test_mean_flow_knows_the_exact_mean_velocity(forked):
    """Of data at a point, x0 = 0: v = z/t, and u(z, t, r) = z/t for every r: its own target."""
    exact = lambda z, times: z / times[:, :1]
    objective = MeanFlow()
    rows = objective.examples(torch.zeros(100, 2), generator=torch.Generator().manual_seed(0))
    target = objective.target(exact, None, rows)[2]
    torch.testing.assert_close(target, exact(*rows[:2]), rtol=1e-4, atol=1e-4)
    assert objective.rows_loss(exact, None, rows) < 1e-8


def test_a_flag_of_other_data_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sample.DATASETS, "digits", Digits)
    done = in_process(train.main, ["--unlabelled"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "--unlabelled needs --dataset digits")
    args = ["--dataset", "digits", "--mixture", "grid"]
    done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "--mixture grid needs --dataset toy2d")


def test_an_unknown_data_set_in_a_checkpoint_is_one_line(
    tmp_path, monkeypatch, capsys, own_process
):
    with monkeypatch.context() as patch:
        patch.setitem(sample.DATASETS, "digits", Digits)
        patch.setattr(Digits, "report", lambda *args: None)
        run(patch, "--dataset", "digits", "--out", tmp_path / "run")
    capsys.readouterr()
    args = [tmp_path / "run" / "checkpoint.pt"]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "unknown dataset 'digits'; known are toy2d, shapes, cifar10, latents")


# ---- B: a formulation is one line, tested by every test that runs over the names

NAMED = [
    check
    for module in (test_rf, test_train)
    for check in vars(module).values()
    if any(test_rf.NAMES in mark.args for mark in getattr(check, "pytestmark", []))
]


@pytest.mark.parametrize("check", NAMED, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["rf/x0", "x0/cos", "rf/eps"])
def test_b_a_formulation_is_one_line(check, name, monkeypatch):
    path, prediction = {
        "rf/x0": (rf.RectifiedFlow, "x0"),
        "x0/cos": (rf.Cosine, "x0"),
        "rf/eps": (rf.RectifiedFlow, "eps"),
    }[name]
    monkeypatch.setitem(rf._FORMULATIONS, name, lambda: (path(), prediction))
    check(name)


def test_b_its_range_is_found_from_det(monkeypatch):
    """It stops short of an end where det = 0 and only there; what cannot be mended is refused."""
    for path, prediction, expected in (
        (rf.RectifiedFlow(), "x0", (1e-3, 1)),
        (rf.RectifiedFlow(), "eps", (0, 1 - 1e-3)),
        (rf.RectifiedFlow(), "velocity", (0, 1)),
        (rf.Cosine(), "v", (0, 1)),
        (rf.LDMLinear(), "x0", (0, 1)),  # b_0 = 0.029 and a_1 = 0.068: no end is singular
        (rf.LDMLinear(), "eps", (0, 1)),
        (rf.EDM(), "F", (1e-4, 1 - 1e-4)),
    ):
        f = rf.Formulation("", path, prediction)
        assert (f.path.t_min, f.path.t_max) == pytest.approx(expected, abs=0)
        assert (path.t_min, path.t_max) == (type(path).t_min, type(path).t_max)  # not changed
    monkeypatch.setitem(rf.PREDICTIONS, "z", lambda path, t: path.coefficients(t)[:2])
    with pytest.raises(ValueError, match="z on Cosine says nothing of x0 and eps: det = 0"):
        rf.Formulation("", rf.Cosine(), "z")  # the network's own input


# ---- C: consistency distillation, whose targets come from the average of the weights


class Consistency(rf.Objective):
    """The student maps a point of the teacher's path to its end: f(z_t, t) = f(z_s, s), where the
    teacher leads from t to s = t - 1/steps, and the right side is the slow copy's."""

    path, distils = rf.RectifiedFlow(), True

    @dataclass
    class Options:
        skips: Annotated[int, "steps of the teacher from noise to data"] = 8

    def __init__(self, formula, options, guided=None):
        self.formula, self.options = formula, options
        self.teacher = guided and formula.rectified(guided())

    of = classmethod(lambda cls, formula, options, guided=None: cls(formula, options, guided))

    def jump(self, network):  # to the data: boundary f(z, 0) = z is built in
        v = self.formula.rectified(network)
        return lambda z, t, *cond: z - rf.expand(t, z) * v(z, t, *cond)

    field = rectified = velocity = lambda self, network: self.formula.rectified(network)

    def examples(self, x0, *cond, generator=None):
        h = 1 / self.options.skips
        t = h + (1 - h) * torch.rand(len(x0), generator=generator)
        z = self.path.interpolate(x0, rf.gaussian_like(x0, generator), t)
        z_s = rf.solve(self.teacher, z, *cond, steps=1, t_start=t, t_end=t - h)
        return z, t, z_s, *cond

    @torch.no_grad()
    def target(self, network, average, rows):
        z, t, z_s, *cond = rows
        x0 = self.jump(average)(z_s, t - 1 / self.options.skips, *cond)
        return z, t, (z - x0) / rf.expand(t, z), *cond

    def pair(self, x0, eps, t, *cond):
        return self.path.interpolate(x0, eps, t), eps - x0

    def grid(self, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def sample(self, network, noise, *cond, steps=None, times=None, method="euler", generator=None):
        z, times = noise, self.grid(steps) if times is None else times
        for t in times[:-1]:  # jump, then go back with fresh noise
            x0 = self.jump(network)(z, torch.full((len(z),), t, dtype=z.dtype), *cond)
            t_next = times[list(times).index(t) + 1]
            z = self.path.interpolate(x0, rf.gaussian_like(x0, generator), float(t_next))
        return x0


def test_c_an_objective_is_one_class(tmp_path, monkeypatch, capsys, own_process, finished):
    """Two equal runs and a resumed one are equal to the bit, though the target moves."""
    monkeypatch.setitem(sample.OBJECTIVES, "consistency", Consistency)
    reference = toy2d.reference  # the report is the real one, of fewer samples
    few = lambda mixture, seed, n=0, c=False: reference(mixture, seed, 300, c)
    for module in (toy2d, data.toy):
        monkeypatch.setattr(module, "reference", few)
    teacher = finished[0] / "checkpoint.pt"
    flags = ["--consistency", teacher, "--skips", 4, "--batch-size", 32]
    short = ["--steps", 150]
    run(monkeypatch, *flags, "--steps", 300, "--out", tmp_path / "one")
    monkeypatch.setattr(data.toy.Toy, "report", lambda *args: None)
    run(monkeypatch, *flags, "--steps", 300, "--out", tmp_path / "two")
    one, two = (sample.read(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert same(one, two) and one["config"]["skips"] == 4
    # with a constant rate, so that a shorter run is the beginning of a longer one
    monkeypatch.setattr(sample.DATASETS["toy2d"], "distil", {"decay": False, "warmup": 1})
    run(monkeypatch, *flags, "--steps", 300, "--out", tmp_path / "whole")
    run(monkeypatch, *flags, *short, "--out", tmp_path / "part")
    run(monkeypatch, "--resume", "--out", tmp_path / "part", "--steps", 300)
    assert same(*(sample.read(tmp_path / n / "checkpoint.pt") for n in ("whole", "part")))
    sampler, noise = sample.load(tmp_path / "one" / "checkpoint.pt"), torch.randn(6, 2)
    draw = lambda seed: sampler.sample(
        noise, torch.arange(6), steps=3, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert {"delta.pt", "windows.png"} <= {file.name for file in (tmp_path / "one").iterdir()}
    assert "4-step gap" in capsys.readouterr().out


def test_c_the_target_is_the_averages():
    """The loop asks for the target in the step, with the average as it then is."""
    seen = []

    class Spy(rf.Formulation):
        def target(self, network, average, rows):
            seen.append(next(average.parameters()).clone())
            return rows

    recipe = small_recipe(steps=3, ema_every=1, warmup=1)
    state, objective = (train.State(toy2d.MLP(), recipe), Spy("", rf.RectifiedFlow(), "velocity"))
    train.train(state, objective, stream(recipe), recipe)
    assert len(seen) == 3 and not torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], next(state.average.parameters()))


# ---- D: ten lines of library use, with an own network on an own tensor


class Own(nn.Module):
    null_cond = (torch.tensor(2),)

    def __init__(self):
        super().__init__()
        self.label, self.body = nn.Embedding(3, 16), nn.Linear(5, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, z, t, label):
        h = self.body(torch.cat([z, t[:, None]], dim=1)) + self.label(label)
        return self.out(h.relu())


def test_d_as_a_library(tmp_path, monkeypatch):
    x0 = torch.randn(500, 4) * 0.1 + torch.tensor([1.0, -1, 2, 0])
    labels = torch.arange(500) % 2
    # --- the ten lines
    recipe = Recipe(formulation="rf/lognorm(0.00,1.00)", steps=200, lr=1e-2)
    objective, state = rf.formulation(recipe.formulation), train.State(Own(), recipe)
    dataset = Dataset(x0, labels)
    train.train(state, objective, train.batches(dataset, objective, recipe, Own.null_cond), recipe)
    sampler = sample.Sampler(state.average, objective)
    x = sampler.sample(torch.randn(100, 4), labels[:100], times=[1, 0.7, 0.4, 0.1, 0], cfg=2.0)
    monkeypatch.chdir(tmp_path)
    state.save("own.pt")
    again = sample.load("own.pt", network=Own())
    # ---
    assert (x.mean(0) - x0.mean(0)).abs().max() < 0.5
    noise = torch.randn(9, 4)
    for some in (dict(steps=5), dict(steps=5, cfg=3.0), dict(times=[1, 0.5, 0], method="heun")):
        assert torch.equal(
            sampler.sample(noise, labels[:9], **some), again.sample(noise, labels[:9], **some)
        )
    assert again.objective.name == objective.name and again.step == 200


README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = [block.split("```")[0] for block in README.split("```python\n")[1:]]


def test_d_the_readmes_library_example_runs_as_it_stands():
    """In a namespace of its own; its samples have the mean of its data. Then it edits them: from
    t = 0.6 they stay near, and there and back is the identity."""
    (example,) = [block for block in BLOCKS if "class Own" in block]
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    x, x0 = names["x"], names["x0"]
    assert x.shape == (100, 4) and (x.mean(0) - x0.mean(0)).abs().max() < 0.5
    assert (names["back"] - x).abs().max() < 1e-3 < (names["noise"] - x).abs().max()
    assert (names["edited"].mean(0) - x0.mean(0)).abs().max() < 0.5


def test_d_the_readmes_dozen_lines_are_those_that_open_rf():
    (shown,) = [block for block in BLOCKS if "rectified_flow_loss" in block]
    source = {f.name: f for f in ast.parse(Path(rf.__file__).read_text()).body
              if isinstance(f, ast.FunctionDef)}  # fmt: skip
    names = [*source][:2]
    for function, name in zip(ast.parse(shown).body, names, strict=True):
        del source[name].body[0]  # the docstring
        assert ast.dump(function) == ast.dump(source[name])
    assert len([line for line in shown.splitlines() if line]) <= 14


def test_d_the_exact_field_takes_a_number_as_t():
    mixture, z = toy2d.load_mixture("ring"), torch.randn(7, 2)
    path, t = rf.RectifiedFlow(), torch.full((7,), 0.3)
    torch.testing.assert_close(mixture.velocity(z, 0.3, path), mixture.velocity(z, t, path))
    torch.testing.assert_close(path.interpolate(z, z + 1, 0.3), path.interpolate(z, z + 1, t))
    torch.testing.assert_close(mixture.log_density(z, 0.3, path), mixture.log_density(z, t, path))
