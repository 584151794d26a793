"""The loop: its draws, resumption to the bit, kills, and one line on bad input."""

import contextlib
import copy
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import TINY, quick
from test_rf import every_formulation
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import toy2d
import train
from checkpoint import save, start_from
from configure import compared, configure
from data import DATA, NOISE, Data, Dataset, Latents, seeded
from options import Recipe
from perflow import PeRFlow
from rf import formulation
from toy2d import MLP, Toy, load_mixture

ROOT = Path(__file__).parent.parent
SHORT = ["--steps", "450", "--batch-size", "32"]


def command(*args, script="train.py"):
    return [sys.executable, str(ROOT / script), *map(str, args)]


FAST = """
import sys; sys.path.insert(0, {root!r})
import toy2d, train
recipe = toy2d.Toy.recipe
toy2d.Toy.recipe = staticmethod(lambda options: recipe(options) | {changes})
toy2d.Toy.report = lambda *args: 0
train.main()
"""


def fast_command(*args, changes):
    """The same, changed in its recipe and without the table and the pictures at the end."""
    return [sys.executable, "-c", FAST.format(root=str(ROOT), changes=changes), *map(str, args)]


def run(monkeypatch, *args, main=train.main):
    """The command in this process, to a good end."""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, args)])
    main()


def run_together(*commands, **how):
    """Processes side by side, each to its end."""
    how |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*map(str, command)], **how) for command in commands]
    told = [process.communicate(timeout=300) for process in processes]
    pairs = zip(processes, told, strict=True)
    return [subprocess.CompletedProcess(p.args, p.returncode, *texts) for p, texts in pairs]


def same(a, b):
    """Equal to the bit, through nested dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def toy(**options):
    return Toy(Toy.Options(**options))


def small_recipe(**changes):
    return Recipe(**Toy.recipe(Toy.Options()) | dict(batch_size=32, steps=300) | changes)


def stream(recipe, start=0, rank=0, world=1, data=None):
    data = data or toy()
    network, objective = data.network(data.spec(), recipe), formulation(recipe.formulation)
    return train.batches(data, objective, recipe, network.null_cond, start, rank, world)


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


def kill_and_resume(kills, tmp_path, monkeypatch):
    """kill -9 at random moments (each log line is saved here): it ends as if never killed."""
    often = dict(block=5, log_every=5, save_every=5, eval_every=500)
    flags = ["--dataset", "toy2d", "--steps", 300 * kills, "--batch-size", 16]
    out, whole, rng = tmp_path / "killed", tmp_path / "whole", random.Random(0)
    resume = ["--resume", "--out", out]
    for kill in range(kills):
        args = resume if kill else [*flags, "--out", out]
        before = sample.read(out / "checkpoint.pt")["step"] if kill else 0
        process = subprocess.Popen(fast_command(*args, changes=often), stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            (out / "checkpoint.pt").exists() and sample.read(out / "checkpoint.pt")["step"] > before
        ):
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert sample.read(out / "checkpoint.pt")["step"] > before
    recipe = Toy.recipe
    monkeypatch.setattr(Toy, "recipe", staticmethod(lambda options: recipe(options) | often))
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    run(monkeypatch, *resume)
    run(monkeypatch, *flags, "--out", whole)
    assert same(sample.read(out / "checkpoint.pt"), sample.read(whole / "checkpoint.pt"))
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert not (out / "checkpoint.tmp").exists()


def test_kill_9_loses_nothing(tmp_path, monkeypatch, own_process):
    kill_and_resume(2, tmp_path, monkeypatch)


@pytest.mark.slow
def test_kill_9_loses_nothing_20_times(tmp_path, monkeypatch, own_process):
    kill_and_resume(20, tmp_path, monkeypatch)


def test_a_failing_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save(path, {"step": 1})

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"step": 2})
    assert torch.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_previous_checkpoint(
    finished, tmp_path, monkeypatch, capsys, own_process
):
    """A file-size limit below a checkpoint's stands for the disk: one line, and nothing is lost."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = (out / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        more = "--resume", "--out", out, "--steps", 600
        done = in_process(train.main, more, tmp_path, monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.tmp"))


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


@pytest.mark.parametrize("conditions", [1, 2, 3])
def test_a_tenth_of_the_examples_loses_all_conditions(conditions):
    """Each of n is dropped by itself at 0.1^(1/n): 0.1 of labels, 0.464 of SD3's three encoders."""
    n, nulls = 50_000, [torch.tensor(8)] * conditions
    labels = [torch.zeros(n).long()] * conditions
    dropped = torch.stack(Data().drop(labels, nulls, 0.1, torch.Generator())) == 8
    rate = 0.1 ** (1 / conditions)
    for share, expected in (
        (dropped.double().mean(1), rate),
        (dropped.all(0).double().mean(), 0.1),
    ):
        assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / n) ** 0.5
    text, null = torch.ones(100, 3, 2, dtype=torch.float16), torch.zeros(3, 2)
    (kept,) = Data().drop([text], [null], 0.5, torch.Generator())
    assert kept.dtype == torch.float32 and kept.unique().tolist() == [0, 1]


def test_seeds_do_not_collide():
    numbers = itertools.product(range(10), range(10), range(5), range(4))
    assert len({seeded(*n).initial_seed() for n in numbers}) == 2000


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


# ---- images, ranks, accumulation


def test_a_killed_rank_ends_the_job_which_resumes(
    latents, tmp_path, monkeypatch, kill_a_rank, own_process
):
    out, script = tmp_path / "killed", tmp_path / "train_latents.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import ranks\nranks.quick(ranks.data.Latents)\nranks.train.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--dataset", "latents", "--data", str(latents), "--out", str(out), *TINY]
    command = [*launch, str(script), *flags, "--shard", "--steps", "4000"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert job.poll() is None
        time.sleep(0.05)
    kill_a_rank(job)
    step = sample.read(out / "checkpoint.pt")["step"]
    quick(Latents, monkeypatch.setattr)
    run(monkeypatch, *flags, "--steps", step + 10, "--resume", "--accumulate", 2)
    assert sample.read(out / "checkpoint.pt")["step"] == step + 10


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


def test_toy_on_mmdit(tmp_path, monkeypatch, own_process):
    """The same network code on points: 2 x 1 x 1 latents."""
    out = tmp_path / "run"
    flags = f"--network mmdit --depth 1 --steps 20 --batch-size 16 --out {out}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    monkeypatch.setattr(Toy, "report", lambda *args: None)
    train.main()
    assert sample.load(out / "checkpoint.pt").sample(torch.randn(5, 2), steps=2).shape == (5, 2)


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
    monkeypatch.setattr(toy2d, "reference", lambda m, seed, n, c: reference(m, seed, 2000, c))
    monkeypatch.setattr(toy2d, "yardsticks", lambda *args: metrics)  # both take seconds
    monkeypatch.setattr(Toy, "_draw_flow", lambda *args: None)
    common = ["--steps", 30, "--batch-size", 16]
    for args in (
        ["--formulation", name, "--conditional", "--out", teacher, *common],
        ["--perflow", teacher / "checkpoint.pt", "--out", student, *common, *flags],
    ):
        run(monkeypatch, *args)
    assert "4-step gap" in capsys.readouterr().out and (student / "windows.png").exists()
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
    recipe = Latents.recipe
    monkeypatch.setattr(Latents, "recipe", staticmethod(lambda o: recipe(o) | changes))
    monkeypatch.setattr(Latents, "distil", Latents.distil | changes)
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


def test_perflow_errors_are_one_line(finished, tmp_path, monkeypatch, capsys):
    teacher = finished[0] / "checkpoint.pt"
    bad = torch.load(teacher)
    bad["config"] |= {"objective": "perflow", **asdict(PeRFlow.Options())}
    torch.save(bad, tmp_path / "student.pt")
    folder = tmp_path / "empty"
    folder.mkdir()
    for args, says in (
        (["--perflow", teacher, "--mixture", "grid"], "--mixture grid differs from"),
        (["--perflow", teacher, "--dataset", "cifar10"], "--dataset cifar10 differs from"),
        (["--perflow", teacher, "--parameterization", "epsilon"], "predicts no eps"),
        (["--perflow", teacher, "--guidance", "fixed"], "do not go together"),
        (["--perflow", tmp_path / "student.pt"], "is itself a student"),
        (["--perflow", "none.pt"], "No such file"),
        (["--perflow", teacher, "--batch-size", "6"], "--batch-size 6 is no multiple of 4"),
        (["--resume", "--out", finished[0], "--steps", "5"], "is at step 450 already"),
        (["--windows", "4"], "--windows 4 needs --perflow TEACHER"),
        (["--perflow", teacher, "--resume", "--out", finished[0]], "is no perflow student"),
        (["--perflow", teacher, "--windows", "0"], "from 1 to 1,000"),
    ):
        assert_one_line(in_process(train.main, args, folder, monkeypatch, capsys), says)
        assert list(folder.iterdir()) == []


# ---- bad input: status 2 and one line that names the value and the choices


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def write_damaged(folder: Path, whole: Path) -> dict[str, Path]:
    import pickle

    files = {
        name: folder / f"{name}.pt"
        for name in ("truncated", "text", "empty", "bomb", "list", "other", "config", "old")
    }
    files["truncated"].write_bytes(whole.read_bytes()[:-2000])
    files["text"].write_text("hello")
    files["empty"].write_bytes(b"")
    files["bomb"].write_bytes(pickle.dumps(Bomb()))
    torch.save([1, 2], files["list"])
    checkpoint = torch.load(whole)
    torch.save({**checkpoint, "ema": {"weight": torch.zeros(1)}}, files["other"])
    torch.save({**checkpoint, "config": {}}, files["config"])
    old = {k: v for k, v in checkpoint["config"].items() if k not in ("objective", "beta2")}
    torch.save(
        {**checkpoint, "config": old | {"perflow": None, "betas": [0.9, 0.99]}}, files["old"]
    )
    return files


def assert_one_line(done, *says):
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "error: " in done.stderr
    for text in says:
        assert text in done.stderr


BAD_TRAIN = [
    (["--dataset", "mnist"], ["'mnist'", "toy2d"]),
    (["--formulation", "ref"], ["'ref'", "rf/lognorm(m,s)"]),
    (["--formulation", "rf/lognorm(0)"], ["'rf/lognorm(0)'", "rf/lognorm(m,s)"]),
    (["--formulation", "rf/mode(3)"], ["1.7519", "s = 3"]),
    (["--mixture", "rong"], ["'rong'", "ring, grid, spiral"]),
    (["--mixture", "none.json"], ["none.json", "No such file"]),
    (["--steps", "0"], ["--steps", "at least 1"]),
    (["--steps", "-5"], ["--steps", "at least 1"]),
    (["--batch-size", "0"], ["--batch-size: 0", "from 1 to 65,536"]),
    (["--lr", "nan"], ["--lr: nan"]),
    (["--lr", "-1"], ["--lr: -1"]),
    (["--device", "tpu9"], ["'tpu9'", "cpu"]),
    (["--device", "cuda:77"], ["'cuda:77'", "cpu"]),
    (["--out", "/proc/nowhere"], ["/proc/nowhere"]),
    (["--resume", "--out", "nothing"], ["nothing/checkpoint.pt", "No such file"]),
    (["--no-such-flag"], ["--no-such-flag"]),
    (["--shard"], ["--shard is for several ranks: torchrun --nproc_per_node"]),
    (["--data", "cifar"], ["--data cifar needs --dataset cifar10 or --dataset latents"]),
    (["--download"], ["--download needs --dataset cifar10"]),
    (["--download", "--dataset", "cifar10"], ["--dataset cifar10 needs --data DIR"]),
]


def in_process(main, args, tmp_path, monkeypatch, capsys):
    """The command's main(), as a process would answer, but without the seconds of imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return subprocess.CompletedProcess(args, stopped.value.code, *capsys.readouterr())


@pytest.mark.parametrize("args, says", BAD_TRAIN, ids=lambda x: " ".join(x))
def test_bad_input_to_train(args, says, tmp_path, monkeypatch, capsys):
    assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), *says)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_download_comes_before_the_data_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "download", lambda folder: print("fetched into", folder))
    args = ["--dataset", "cifar10", "--data", "here", "--download"]
    done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "no cifar-10-binary.tar.gz")
    assert done.stdout == "fetched into here\n"


def test_bad_input_as_a_real_process(tmp_path):
    commands = command("--dataset", "mnist"), command("none.pt", script="sample.py")
    train, sample = run_together(*commands, cwd=tmp_path)
    assert_one_line(train, "'mnist'")
    assert_one_line(sample, "none.pt", "No such file")


def test_a_taken_or_different_run_is_refused(finished, tmp_path, monkeypatch, capsys):
    out, _ = finished
    before = (out / "checkpoint.pt").read_bytes()
    for args, says in (
        (["--out", out], "holds a run already"),
        (["--resume", "--out", out, "--lr", "0.5"], "--lr 0.5 differs"),
        (["--resume", "--out", out, "--mixture", "grid"], "--mixture grid differs"),
    ):
        assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), says)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_bad_checkpoints_are_refused(finished, tmp_path, monkeypatch, capsys):
    says = {
        "other": "another network",
        "config": "older version",
        "list": "no config, ema, network, optimizer, step",
    }
    says["old"] = "it is of an older version: no"
    for name, file in write_damaged(tmp_path, finished[0] / "checkpoint.pt").items():
        done = in_process(sample.main, [file], tmp_path, monkeypatch, capsys)
        assert_one_line(done, file.name, says.get(name, "damaged or no checkpoint"))
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "samples.png").exists()


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys, own_process
):
    plain = train.squared_error
    calls = itertools.count()
    poison = lambda *args: plain(*args) * (float("nan") if next(calls) == 137 else 1)
    monkeypatch.setattr(train, "squared_error", poison)
    recipe = Toy.recipe
    monkeypatch.setattr(Toy, "recipe", staticmethod(lambda o: recipe(o) | {"save_every": 100}))
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # a second at each look
    monkeypatch.setattr(train, "time", clock)
    done = in_process(
        train.main, [*SHORT, "--out", tmp_path / "run"], tmp_path, monkeypatch, capsys
    )
    said = str(done.returncode)
    assert "samples/s=3.20k" in done.stderr  # 100 steps of 32 between two looks
    assert "the loss of step 138 is not finite" in said and "step 100 is kept" in said
    assert sample.read(tmp_path / "run" / "checkpoint.pt")["step"] == 100


def test_numbered_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def out():
        with contextlib.ExitStack() as held:
            return configure({}, held)[1]

    assert out() == Path("runs/toy2d")
    Path("runs/toy2d").mkdir(parents=True)
    (Path("runs/toy2d") / "checkpoint.pt").touch()
    assert out() == Path("runs/toy2d-2")


def test_a_start_may_have_other_data_of_the_same_shape_and_not_another_network(
    finished, latents, tmp_path, monkeypatch, capsys, own_process
):
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    checkpoint = finished[0] / "checkpoint.pt"
    args = ["--init", checkpoint, "--conditional", "--steps", 1, "--batch-size", 32]
    done = in_process(train.main, [*args, "--network", "mmdit"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "these data are not those of", "network differ")
    distil = ["--perflow", checkpoint, "--mixture", "grid"]
    run = in_process(train.main, distil, tmp_path, monkeypatch, capsys)
    assert_one_line(run, "--mixture grid differs from")
    turned = toy2d.load_mixture("ring").spec()
    turned["means"] = [[-y, x + 0.1] for x, y in turned["means"]]
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args), "--mixture", "turned.json"])
    train.main()
    assert sample.load(tmp_path / "runs/toy2d/checkpoint.pt").config["mixture"] == turned


def test_fine_tuning_starts_at_the_teachers_loss(tmp_path, monkeypatch, capsys, own_process):
    """From an MM-DiT of a ring: 200 steps on the ring turned by 5 degrees, none of them at noise,
    and one on a mixture of other classes."""
    recipe = Toy.recipe
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    monkeypatch.setattr(Toy, "recipe", staticmethod(lambda o: recipe(o) | {"log_every": 10}))
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


def test_weights_start_on_another_size():
    """A position table of another length is the network's own; another width is not the network."""
    torch.manual_seed(0)
    build = lambda size, depth=1: Dataset.network(
        dict(shape=[4, size, size], classes=2, context=None, pooled=None), Recipe(depth=depth)
    )
    small, large = build(8), build(16)
    table = large.mmdit.pos_embed.clone()
    start_from(large, small.state_dict(), "the small one")
    assert torch.equal(large.mmdit.pos_embed, table)
    assert torch.equal(large.mmdit.x_embedder.proj.weight, small.mmdit.x_embedder.proj.weight)
    with pytest.raises(ValueError, match="the small one holds the weights of another network"):
        start_from(build(8, depth=2), small.state_dict(), "the small one")
    with pytest.raises(ValueError, match="the large one holds the weights of another network"):
        sample.load_weights(small, large.state_dict(), "the large one")


@pytest.mark.parametrize(
    "kept, spec, fault",
    [
        ("kind", dict(shape=[4, 16, 16], classes=7), None),
        ("kind", dict(shape=[3, 8, 8]), "shape"),
        ("kind", dict(context=[8, 24]), "context"),
        ("shape", dict(classes=7), "classes"),
        ("shape", dict(shape=[4, 16, 16]), "shape"),
        ("shape", dict(names=["a"]), None),
        ("all", dict(names=["a"]), "names"),
    ],
)
def test_what_a_start_keeps(kept, spec, fault):
    known = dict(shape=[4, 8, 8], classes=3, context=None, pooled=None, names=None, released=None)
    if fault:
        with pytest.raises(ValueError, match=f"these data are not those of x: {fault} differ"):
            compared(known | spec, known, "x", kept)
    else:
        assert compared(known | spec, known, "x", kept) == known | spec


def test_training_flops_are_counted_in_the_loop():
    """Against PyTorch's own counter, forward and backward, to a tenth (it skips the rest)."""
    spec = {"shape": [4, 8, 8], "classes": 3, "names": None, "context": None, "pooled": None}
    network = Dataset.network(spec, Recipe(depth=2))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with FlopCounterMode(display=False) as counter:
        network(x, t, labels).square().mean().backward()
    counted = counter.get_total_flops() / 2
    assert train.training_flops(network, x, labels) == pytest.approx(counted, rel=0.1)
    one = torch.nn.Linear(5, 7)  # and by hand: two FLOPs a weight and token, thrice for a step
    assert train.training_flops(lambda x, t: one(x), torch.randn(4, 3, 5)) == 3 * 2 * 3 * 5 * 7
