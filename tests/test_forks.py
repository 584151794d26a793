"""Four forks, as a stranger would write them: a class and a line in a table. They are the measure
of the house: A a data set, B a formulation, C an objective with a moving target, D library use."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import pytest
import test_rf
import test_train
import torch
from helpers import assert_one_line, in_process, run, same, small_recipe, stream
from PIL import Image
from torch import nn

import data.toy
import rf
import sample
import toy2d
import train
from data.base import Dataset
from training.options import Recipe

# ---- A: digits, labelled and unlabelled, one channel, with a flag of their own


class Digits(Dataset):
    """Ten patterns of 8 x 8 grey pixels under a little noise."""

    @dataclass
    class Options:
        unlabelled: Annotated[bool, "do not tell the network which digit it is"] = False

    recipe: ClassVar = dict(
        depth=1, lr=1e-3, steps=12, batch_size=16, warmup=1, log_every=3, eval_every=6,
        save_every=6, validation=10, ema_every=1,
    )  # fmt: skip
    distil: ClassVar = dict(steps=6, batch_size=16)

    def __init__(self, options):
        draw = np.random.default_rng(0)
        labels, patterns = np.arange(200) % 10, draw.choice([-1, 1], (10, 1, 8, 8))
        x0 = patterns[labels] + 0.1 * draw.standard_normal((200, 1, 8, 8))
        super().__init__(x0.astype(np.float32), *[labels] * (not options.unlabelled))


@pytest.mark.parametrize("flags", [[], ["--unlabelled"]], ids=["labelled", "unlabelled"])
def test_a_data_set_is_one_class(flags, tmp_path, monkeypatch, capsys, own_process):
    """Training, resumption to the bit, sampling, and a PeRFlow student."""
    monkeypatch.setitem(sample.DATASETS, "digits", Digits)
    whole, part, student = (tmp_path / name for name in ("whole", "part", "student"))
    new = ["--dataset", "digits", *flags, "--out"]
    run(monkeypatch, *new, whole)
    with monkeypatch.context() as patch:  # a signal that is noticed at the first log
        gather = train.Run.gather
        patch.setattr(train.Run, "gather", lambda run, losses: (gather(run, losses)[0], 1.0))
        with pytest.raises(SystemExit) as stopped:
            run(patch, *new, part)
    assert stopped.value.code == 128 + 15 and sample.read(part / "checkpoint.pt")["step"] == 3
    run(monkeypatch, "--dataset", "digits", "--resume", "--out", part)
    assert same(*(sample.read(out / "checkpoint.pt") for out in (whole, part)))
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12] and "val_loss" in lines[-1]
    assert (whole / "samples.png").exists()

    out = tmp_path / "x.npz"
    run(monkeypatch, whole / "checkpoint.pt", "--num", 20, "--steps", 2, "--out", out,
        main=sample.main)  # fmt: skip
    arrays = np.load(out)
    assert arrays["arr_0"].shape == (20, 8, 8, 3) and ("arr_1" in arrays) == (not flags)
    sheet = tmp_path / "x.png"
    run(monkeypatch, whole / "checkpoint.pt", "--num", 20, "--steps", 2, "--out", sheet,
        main=sample.main)  # fmt: skip
    assert Image.open(sheet).size[0] > 100

    few = ["--evaluations", 2, "--windows", 2, "--steps", 6]
    run(monkeypatch, "--perflow", whole / "checkpoint.pt", *few, "--out", student)
    assert {"teacher.png", "student.png", "samples.png", "delta.pt"} <= {
        file.name for file in student.iterdir()
    }
    assert "rms distance to the teacher's samples" in capsys.readouterr().out
    x0 = sample.load(student / "checkpoint.pt").draw(4, *[torch.arange(4)] * (not flags), steps=2)
    assert x0.shape == (4, 1, 8, 8) and x0.isfinite().all()


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

    path = rf.RectifiedFlow()

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
    def target(self, average, rows):
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
        def target(self, average, rows):
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
    """In a namespace of its own; its samples have the mean of its data."""
    (example,) = [block for block in BLOCKS if "class Own" in block]
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    assert names["x"].shape == (100, 4)
    assert (names["x"].mean(0) - names["x0"].mean(0)).abs().max() < 0.5


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
