"""What several test files share: commands in this process or in others, small runs, small data."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data.cifar10 import FILES, RECORD, Cifar10
from data.latents import Latents
from data.toy import Toy
from rf import formulation
from training.checkpoint import DATASETS, OBJECTIVES
from training.options import Recipe, preset

ROOT = Path(__file__).parent.parent


SHORT = ["--steps", "450", "--batch-size", "32"]


# ---- Commands
def command(*args, script="train.py"):
    return [sys.executable, str(ROOT / script), *map(str, args)]


FAST = """
import sys; sys.path.insert(0, {root!r})
import data.toy, train
data.toy.Toy.recipe = {changes}
data.toy.Toy.report = lambda *args: 0
train.main()
"""


def fast_command(*args, changes):
    """The same, changed in its recipe and without the table and the pictures at the end."""
    return [sys.executable, "-c", FAST.format(root=str(ROOT), changes=changes), *map(str, args)]


def run(monkeypatch, *args, main=train.main):
    """The command in this process, to a good end."""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, args)])
    main()


def in_process(main, args, tmp_path, monkeypatch, capsys):
    """The command's main(), as a process would answer, but without the seconds of imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return subprocess.CompletedProcess(args, stopped.value.code, *capsys.readouterr())


def run_together(*commands, **how):
    """Processes side by side, each to its end."""
    how |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*map(str, command)], **how) for command in commands]
    told = [process.communicate(timeout=300) for process in processes]
    pairs = zip(processes, told, strict=True)
    return [subprocess.CompletedProcess(p.args, p.returncode, *texts) for p, texts in pairs]


def assert_one_line(done, *says):
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "error: " in done.stderr
    for text in says:
        assert text in done.stderr


def same(a, b):
    """Equal to the bit, through nested dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- A life cycle, by the commands, of whatever the tables hold
QUICK = dict(
    depth=1, precision="fp32", steps=6, batch_size=8, lr=1e-3, warmup=1, decay=False, block=2,
    log_every=2, eval_every=6, save_every=6, validation=4, ema_every=1, threads=None,
)  # fmt: skip


def life_cycle(new, out, patch):
    """Train with these flags; stop, and resume to the bit; sample to .png and .npz; distil; plug.
    The samples that the network, and its student, drew."""
    new, whole, part, student = ["--no-report", *new], out / "whole", out / "part", out / "student"
    for data_set in DATASETS.values():
        patch.setattr(data_set, "recipe", QUICK | data_set.recipe)
        patch.setattr(data_set, "distil", dict(steps=2, batch_size=8, validation=4))
    run(patch, *new, "--out", whole)
    with patch.context() as stopping:  # a signal that is noticed at the first log
        gather = train.Run.gather
        stopping.setattr(train.Run, "gather", lambda run, losses: (gather(run, losses)[0], 1.0))
        with pytest.raises(SystemExit) as stopped:
            run(stopping, *new, "--out", part)
    assert stopped.value.code == 128 + 15 and sample.read(part / "checkpoint.pt")["step"] == 2
    data = new[new.index("--dataset") : new.index("--dataset") + 2]
    run(patch, "--no-report", *data, "--resume", "--out", part)
    assert same(*(sample.read(place / "checkpoint.pt") for place in (whole, part)))
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and "val_loss" in lines[-1]

    def drawn(*args, steps=2):
        """Eight samples, as an .npz has them; the .png opens."""
        for file in (out / "x.png", out / "x.npz"):
            flags = ["--num", 8, "--steps", steps, "--out", file]
            run(patch, *args, *flags, main=sample.main)
        assert Image.open(out / "x.png").size[0] > 50
        return [*np.load(out / "x.npz").values()]

    samples = drawn(whole / "checkpoint.pt")
    assert len(samples[0]) == 8
    if OBJECTIVES.get(sample.read(whole / "checkpoint.pt")["config"]["objective"]):
        return samples, None
    few = ["--windows", 2, "--evaluations", 2, "--no-report", "--out", student]
    run(patch, "--perflow", whole / "checkpoint.pt", *few)
    own = drawn(student / "checkpoint.pt")
    plugged = drawn(whole / "checkpoint.pt", "--plug", student / "delta.pt")
    for one, other in zip(own, plugged, strict=True):
        assert np.abs(one.astype(float) - other.astype(float)).max() <= 1  # of 255, by rounding
    return samples, own


# ---- Small runs on the toy
def toy(**options):
    return Toy(Toy.Options(**options))


def small_recipe(**changes):
    return Recipe(**preset("toy2d") | dict(batch_size=32, steps=300, muon=0.0) | changes)


def stream(recipe, start=0, rank=0, world=1, data=None):
    data = data or toy()
    network, objective = data.network(data.spec(), recipe), formulation(recipe.formulation)
    return train.batches(data, objective, recipe, network.null_cond, start, rank, world)


# ---- Small data
N = 20  # records in a file, instead of 10,000


def cifar_files() -> dict[str, bytes]:
    """Six small files, every picture different, 0 and 255 among the pixels."""
    draw = np.random.default_rng(0)
    records = draw.integers(0, 256, (6, N, RECORD), np.uint8)
    records[..., 0] = draw.integers(0, 10, (6, N))
    return {name: r.tobytes() for name, r in zip(FILES, records, strict=True)}


def write_cifar(folder: Path, **changed: bytes) -> Path:
    """An unpacked folder; changed: the contents of a file by its stem."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in cifar_files().items():
        (folder / name).write_bytes(changed.get(name[:-4], raw))
    return folder


def cifar10(folder: Path) -> Cifar10:
    return Cifar10(Cifar10.Options(data=str(folder)))


def write_latents(folder: Path, rows: int = 40, meta=None, **arrays: np.ndarray | None) -> Path:
    """A good folder of latents with labels; arrays replaces some of them, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(1)
    good = {
        "latents": draw.standard_normal((rows, 4, 8, 6)).astype(np.float16),
        "labels": np.arange(rows) * 5 // rows,
    }
    for name, array in (good | arrays).items():
        if array is not None:
            np.save(folder / f"{name}.npy", array, allow_pickle=True)
    (folder / "meta.json").write_text(json.dumps({} if meta is None else meta))
    return folder


def read_latents(folder: Path) -> Latents:
    return Latents(Latents.Options(data=str(folder)))


def identity(x0: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x0]
