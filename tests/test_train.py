"""The loop: its draws, what it learns, its students, and resumption to the bit."""

import copy
import itertools
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import SHORT, in_process, run, same, small_recipe, stream, toy
from ranks import TINY, quick
from test_rf import every_formulation

import data.toy
import sample
import toy2d
import train
from data.base import DATA, NOISE, Dataset, seeded
from data.latents import Latents
from data.toy import Toy
from rf import formulation
from toy2d import MLP, load_mixture
from training.ranks import autocast


def test_a_run_leaves_everything(finished):
    out, done = finished
    assert {file.name for file in out.iterdir()} == {
        "checkpoint.pt",
        "log.jsonl",
        "flow.png",
        "field.png",
        "flow.gif",
    }
    for metric in ("relative excess", "energy distance", "total variation", "4 sigma"):
        assert metric in done.stdout
    assert "next: python sample.py" in done.stdout
    assert "loss=" in done.stderr and "excess=" in done.stderr  # the progress bar
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200, 300, 400, 450]
    assert {"loss", "lr", "val_loss", "excess"} <= lines[-1].keys() and lines[-1]["loss"] < lines[
        0
    ]["loss"]
    checkpoint = sample.read(out / "checkpoint.pt")
    assert checkpoint.keys() == {"config", "step", "losses", "network", "ema", "optimizer"}
    assert checkpoint["step"] == 450


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_is_bit_identical(
    finished, tmp_path, monkeypatch, capsys, own_process, number
):
    """A signal saves and says how to resume; all ends as the uninterrupted run's."""
    whole, _ = finished
    out = tmp_path / "part"
    flags = ["--dataset", "toy2d", "--conditional", "--out", out, *SHORT, "--seed", 3]
    log = train.Run.log

    def log_and_kill(run, *args):
        log(run, *args)
        if not run.signals:  # a second one would end this process
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "log", log_and_kill)
        done = in_process(train.main, flags, tmp_path, monkeypatch, capsys)
    assert done.returncode == 128 + number and f"--resume --out {out}" in done.stdout
    step = sample.read(out / "checkpoint.pt")["step"]
    assert 0 < step < 450 and f"saved step {step}" in done.stdout
    with (out / "log.jsonl").open("a") as file:  # a kill may leave a later and a half line
        file.write('{"step": 9000, "loss": 1}\n{"ste')
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    run(monkeypatch, "--resume", "--out", out)
    assert same(sample.read(out / "checkpoint.pt"), sample.read(whole / "checkpoint.pt"))
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_a_disk_that_fills_up_in_the_report_is_one_line(finished, monkeypatch, capsys, own_process):
    def full_disk(*args):
        raise OSError(28, "No space left on device", "flow.png")

    monkeypatch.setattr(Toy, "report", full_disk)
    args = ["--resume", "--out", finished[0]]  # which is done but for its report
    done = in_process(train.main, args, finished[0], monkeypatch, capsys)
    assert done.returncode == 2 and done.stderr.endswith("No space left on device: 'flow.png'\n")


# ---- the pieces


def test_examples_are_a_function_of_seed_and_step():
    data, recipe = toy(conditional=True), small_recipe()
    whole = stream(recipe, data=data)
    batches = [next(whole) for _ in range(60)]
    for start in (1, 25, 37):
        later = stream(recipe, start, data=data)
        assert all(same(next(later), batches[i]) for i in range(start, 60))
    other = next(stream(small_recipe(seed=1), data=data))
    assert not same(batches[0], batches[1]) and not same(other, batches[0])
    (rows,) = batches[0]  # one micro-batch
    assert [len(x) for x in rows] == [32] * 4


def test_micro_batches_are_those_of_the_ranks():
    """Two ranks see what one that accumulates twice sees, each of them once."""
    one = next(stream(small_recipe(accumulate=2)))
    ranks = [next(stream(small_recipe(), rank=rank, world=2)) for rank in (0, 1)]
    assert len(one) == 2 and same(list(one), [rows for (rows,) in ranks])
    assert not same(one[0], one[1]) and len(one[0][0]) == 16


def test_noise_is_independent_of_the_data():
    """Within the modes too: data x0 = mu + L xi and eps drawn from one state had eps = xi."""
    mixture, data = load_mixture("ring"), toy(conditional=True)
    batches = itertools.islice(stream(small_recipe(batch_size=4096), data=data), 25)
    z, t, v, label = (torch.cat(x) for x in zip(*(rows for (rows,) in batches), strict=True))
    x0, eps = z - t[:, None] * v, z + (1 - t[:, None]) * v  # rf: z = (1 - t) x0 + t eps
    kept = label < 8
    xi = (x0 - mixture.means.float()[label.clamp(max=7)])[kept]
    n = len(xi)
    for column in range(2):
        for row in (eps[kept], eps[kept].roll(1, 0), t[kept, None].expand(-1, 2)):
            corr = torch.corrcoef(torch.stack([xi[:, column], row[:, column]]))[0, 1]
            assert abs(corr) < 5 / n**0.5


def test_a_network_in_the_thread_that_draws_leaves_the_cache_of_casts_alone(monkeypatch):
    """PyTorch may hang where one thread clears it and another one compiles."""
    data, cleared = toy(), []
    own, bf16 = data.batch, partial(autocast, "bf16", torch.device("cpu"))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1))

    def batch(*args):
        with bf16():
            return own(*args)

    monkeypatch.setattr(data, "batch", batch)
    next(stream(small_recipe(), data=data))
    assert not cleared
    with bf16():
        pass
    assert cleared


def test_learning_rate_warms_up_and_decays():
    recipe = small_recipe(steps=1000, warmup=100, lr=2.0)
    rate = lambda step, **changes: train.learning_rate(replace(recipe, **changes), step)
    assert rate(0) == pytest.approx(0.02) and rate(500) == pytest.approx(1)
    assert rate(999) < 1e-5 and rate(999, decay=False) == 2
    assert rate(0, warmup=1000) == pytest.approx(0.02)  # at most a tenth of the run is warm-up


def test_the_loop_is_adam_on_8_with_ema():
    """Against a plain autograd + non-fused Adam step, and the average's recursion."""
    recipe = small_recipe(steps=4, ema_decay=0.9, ema_every=2, warmup=1, decay=False, lr=1e-2)
    torch.manual_seed(0)
    network, plain = MLP(), MLP()
    plain.load_state_dict(network.state_dict())
    state = train.State(network, recipe)
    expected = [p.detach().clone() for p in plain.parameters()]
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2, betas=(0.9, 0.99))
    train.train(state, formulation("rf"), stream(recipe), recipe)
    for step, ((z, t, target),) in zip(range(4), stream(recipe), strict=False):
        reference.zero_grad()
        ((plain(z, t) - target) ** 2).mean().backward()
        reference.step()
        if step % 2:
            n = (step + 1) // 2
            decay = min(0.9, (1 + n) / (10 + n))
            pairs = zip(expected, plain.parameters(), strict=True)
            expected = [decay * e + (1 - decay) * p.detach() for e, p in pairs]
    ours = [*network.parameters(), *state.average.parameters()]
    for own, other in zip(ours, [*plain.parameters(), *expected], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert state.step == 4


def test_accumulating_is_one_large_batch():
    """The loss of a step is the mean over its micro-batches, and so is the gradient."""
    states = []
    for accumulate in (1, 2):
        recipe = small_recipe(steps=3, accumulate=accumulate, warmup=1)
        torch.manual_seed(0)
        states.append(train.State(MLP(), recipe))
        if accumulate == 1:  # the same rows in one micro-batch
            halves = stream(small_recipe(steps=3, accumulate=2, warmup=1))
            rows = ([tuple(map(torch.cat, zip(*two, strict=True)))] for two in halves)
        else:
            rows = stream(recipe)
        train.train(states[-1], formulation("rf"), rows, recipe)
    for one, two in zip(*(s.network.parameters() for s in states), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@every_formulation
def test_every_formulation_trains_200_steps(name):
    recipe = small_recipe(formulation=name, steps=200, warmup=20, batch_size=64)
    torch.manual_seed(0)
    state, objective = train.State(MLP(), recipe), formulation(name)
    before = copy.deepcopy(state.network)
    train.train(state, objective, stream(recipe), recipe)
    x0 = load_mixture("ring").sample(4096, seeded(0, 0, 0, DATA))[0]
    loss = lambda network: objective.loss(network, x0, generator=seeded(0, 0, 0, NOISE)).item()
    assert loss(state.network) < loss(before)  # on the same t and noise; nan is not less


def test_validation_loss_is_at_the_8_midpoints():
    seen = []
    network = lambda z, t: (seen.append(t), z)[1]
    train.validation_loss(network, formulation("rf"), torch.zeros(3, 2))
    assert [t.tolist() for t in seen] == [[(i + 0.5) / 8] * 3 for i in range(8)]


# ---- images, and other starts


def test_images_train_compiled_in_bf16_and_sample(latents, tmp_path, monkeypatch, own_process):
    """The loss falls, the checkpoint has no prefixes, sample.py writes latents as ADM's layout."""
    quick(Latents, monkeypatch.setattr)
    flags = ["--steps", 60, *TINY, "--precision", "bf16", "--compile"]
    run(monkeypatch, "--dataset", "latents", "--data", latents, "--out", tmp_path / "run", *flags)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["val_loss"] < 1.6
    out, checkpoint = tmp_path / "x.npz", tmp_path / "run" / "checkpoint.pt"
    run(monkeypatch, checkpoint, "--num", 7, "--steps", 3, "--out", out, main=sample.main)
    arrays = np.load(out)
    assert arrays["arr_0"].shape == (7, 4, 4, 4)
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_fine_tuning_starts_at_the_teachers_loss(tmp_path, monkeypatch, capsys, own_process):
    """From an MM-DiT of a ring: 200 steps on the ring turned by 5 degrees, none of them at noise,
    and one on a mixture of other classes."""
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    monkeypatch.setattr(Toy, "recipe", {"log_every": 10})
    start, tuned, grid = tmp_path / "start", tmp_path / "tuned", tmp_path / "grid"
    ring = toy2d.load_mixture("ring").spec()
    c, s = math.cos(math.radians(5)), math.sin(math.radians(5))
    ring["means"] = [[c * x - s * y, s * x + c * y] for x, y in ring["means"]]
    (tmp_path / "tilted.json").write_text(json.dumps(ring))
    small = ["--batch-size", 64, "--lr", 2e-3]
    how = ["--network", "mmdit", "--conditional", "--depth", 1]
    monkeypatch.chdir(tmp_path)
    for flags in (
        ["--dataset", "toy2d", *how, "--steps", 200, "--out", start],
        ["--init", start / "checkpoint.pt", *how, "--mixture", "tilted.json", "--steps", 200,
         "--out", tuned],
        ["--init", start / "checkpoint.pt", *how, "--mixture", "grid", "--steps", 1,
         "--out", grid, "--lr", 1e-30],
    ):  # fmt: skip
        run(monkeypatch, *small, *flags)
    said = capsys.readouterr().out
    assert "context.weight: 26 labels for 9, so all but null start anew" in said
    log = lambda out: [*map(json.loads, (out / "log.jsonl").read_text().splitlines())]
    noise, (*_, end) = 2.0, log(start)  # E|eps - x0|^2 a dimension, of a network that says 0
    assert end["val_loss"] < 0.8 * noise and log(start)[0]["loss"] > 0.9 * noise
    assert log(tuned)[0]["loss"] == pytest.approx(end["val_loss"], rel=0.1)
    assert max(entry["loss"] for entry in log(tuned)) < 0.8 * noise
    assert log(tuned)[-1]["val_loss"] < end["val_loss"]
    old = sample.read(start / "checkpoint.pt")["ema"]
    new = sample.read(grid / "checkpoint.pt")["network"]
    for key, w in new.items():
        if key in ("context.weight", "pooled.weight"):
            assert len(w) == 26 and torch.allclose(w[-1], old[key][-1], atol=1e-6)
            assert not torch.allclose(w[:8], old[key][:8], atol=1e-2)
        else:
            torch.testing.assert_close(w, old[key], rtol=0, atol=1e-6)


# ---- PeRFlow through the commands


@pytest.mark.parametrize("name, flags", [("rf", ["--guidance", "fixed", "--teacher-cfg", "2"]),
                                         ("eps/linear", ["--parameterization", "epsilon"]),
                                         ("edm(-1.20,1.20)", [])])  # fmt: skip
def test_perflow_students_train_sample_and_plug(
    tmp_path, monkeypatch, capsys, own_process, name, flags
):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    metrics = dict(energy=0.1, energy_error=0, outliers=0, total_variation=0)
    metrics |= {f"exact_{key}": value for key, value in metrics.items()}
    reference = toy2d.reference
    few = lambda mixture, seed, n, c: reference(mixture, seed, 2000, c)
    monkeypatch.setattr(data.toy, "reference", few)
    monkeypatch.setattr(data.toy, "yardsticks", lambda *args: metrics)  # both take seconds
    monkeypatch.setattr(Toy, "_draw_flow", lambda *args: None)
    compared, compare = set(), Toy._compare
    spy = lambda data, student, out, teacher: (
        compared.add(teacher.cfg), compare(data, student, out, teacher)
    )  # fmt: skip
    monkeypatch.setattr(Toy, "_compare", spy)
    common = ["--steps", 30, "--batch-size", 16]
    for args in (
        ["--formulation", name, "--conditional", "--out", teacher, *common],
        ["--perflow", teacher / "checkpoint.pt", "--out", student, *common, *flags],
    ):
        run(monkeypatch, *args)
    assert "4-step gap" in capsys.readouterr().out and (student / "windows.png").exists()
    assert compared == {2.0 if "fixed" in flags else 1.0}  # the teacher as it is solved
    sampler = sample.load(student / "checkpoint.pt")
    noise, label = torch.randn(6, 2), torch.arange(6)
    assert sampler.sample(noise, label, steps=4).isfinite().all()
    with pytest.raises(ValueError, match="3 steps are too few for 4 windows"):
        sampler.sample(noise, label, steps=3)
    if "fixed" in flags:
        with pytest.raises(ValueError, match=r"cfg 2 is not for this model.* fixed guidance"):
            sampler.sample(noise, label, steps=4, cfg=2.0)
    with pytest.raises(ValueError, match="takes euler steps"):
        sampler.sample(noise, label, steps=4, method="heun")
    average = sample.read(student / "checkpoint.pt")["ema"]
    plugged = sample.plugged(sample.load(teacher / "checkpoint.pt"), student / "delta.pt")
    for key, value in plugged.network.state_dict().items():
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        plugged.sample(noise, label, steps=4),
        sampler.sample(noise, label, steps=4),
        rtol=1e-3,
        atol=1e-3,
    )


def test_students_of_images_meet_their_teacher_from_the_same_noise(
    latents, tmp_path, monkeypatch, own_process
):
    """Grids with a row for each number of evaluations, from the student's K = 2 on."""
    changes = dict(warmup=1, log_every=5, save_every=5, validation=20, ema_decay=0.9, ema_every=1)
    for own in ("recipe", "distil"):
        monkeypatch.setattr(Latents, own, changes)
    grids = {}
    record = lambda spec, file, x0, *cond, **how: grids.update({file.stem: x0})
    monkeypatch.setattr(Dataset, "write", staticmethod(record))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    few = ["--windows", 2, "--evaluations", 2, "--batch-size", 16, "--steps", 5]
    for args in (
        ["--dataset", "latents", "--data", latents, "--out", teacher, *TINY, "--steps", 5],
        ["--perflow", teacher / "checkpoint.pt", "--data", latents, "--out", student, *few],
    ):
        run(monkeypatch, *args)
    assert len(grids["teacher"]) == 7 * 8 and len(grids["student"]) == 6 * 8
    noise = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = Latents(Latents.Options(str(latents))).held_out(8)[1]
    for name, folder, first, steps in (("teacher", teacher, 8, 2), ("student", student, 0, 2)):
        sampler = sample.load(folder / "checkpoint.pt")
        x0 = sampler.sample(noise, labels, steps=steps, cfg=2.0)
        torch.testing.assert_close(grids[name][first : first + 8], x0)
    assert (student / "delta.pt").exists()
