"""What two hostile campaigns found, one test a find: nothing mixes, nothing lies, no tracebacks.

The tests here try a few of each; `pytest -m slow tests/test_hostile.py` tries as many as the table
says, and loses none. (A loss is a traceback, or a damaged file that is taken for a whole one.)

The second campaign's finds, and where their tests are:

    ranks with different flags; another number of ranks    test_ranks, test_configure
    a full disk, an impossible --out, closed streams, ASCII, -OO    here, 12.
    encodings that were killed, other images, one's own files; captions; sizes    test_encode
    changed rows and parts of latents; a VAE that is not there    test_base, test_latents
    encoders, tokenizers, weights and factors of a released SD3    test_text, test_weights
    flags without effect, numbers that wrap around, empty values    test_configure, test_sample
    runs of another job, damaged teachers of a study    test_studies
    pipes instead of files    here, 12., and test_encode
    a mode that is dragged away    test_explore
"""

import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_one_line,
    command,
    fast_command,
    in_process,
    run,
    run_together,
    same,
)
from PIL import Image

import rf
import sample
import toy2d
import train
from data import encode as encoding
from data.base import Dataset
from data.latents import Latents, open_array, read_meta
from data.shapes import Shapes, conditions_of
from data.toy import Toy
from perflow import PeRFlow
from studies import bench, runs
from training import folder, options
from training.checkpoint import save

SHORT = ["--steps", 100, "--batch-size", 32]
LONG = ["--steps", 10**6, "--batch-size", 32]


@pytest.fixture
def quick(monkeypatch, own_process):
    """No table and no pictures at the end."""
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    monkeypatch.setattr(Dataset, "report", lambda *args: 0)


def trained(args, tmp_path, monkeypatch):
    """train.py in this process, to a good end."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, *args)


def started(*args, cwd):
    """A real run, as soon as it has a first checkpoint."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = fast_command(*args, changes=dict(log_every=1, save_every=1))
    process = subprocess.Popen(command, cwd=cwd, **pipes)
    while not list(cwd.glob("**/log.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


# ---- 1. Two runs in one folder
def test_a_folder_belongs_to_one_run(tmp_path, monkeypatch, capsys, quick):
    first = started(*LONG, cwd=tmp_path)
    try:
        args = [*LONG, "--out", "runs/toy2d"]
        held = in_process(train.main, args, tmp_path, monkeypatch, capsys)
        assert_one_line(held, "runs/toy2d is in use by another process")
        trained(SHORT, tmp_path, monkeypatch)  # without --out it takes the next free number
    finally:
        first.kill()
        first.communicate()
    assert sample.read(tmp_path / "runs/toy2d-2/checkpoint.pt")["step"] == 100
    log = (tmp_path / "runs/toy2d/log.jsonl").read_bytes().splitlines()[:-1]
    assert [json.loads(line)["step"] for line in log] == [*range(1, len(log) + 1)]
    (tmp_path / "runs/toy2d/checkpoint.4711.tmp").touch()  # what a killed process leaves
    (tmp_path / "runs/toy2d/my-notes.txt.tmp").touch()  # what it does not
    step = sample.read(tmp_path / "runs/toy2d/checkpoint.pt")["step"]
    go_on = ["--resume", "--out", "runs/toy2d", "--steps", step + 1]
    trained(go_on, tmp_path, monkeypatch)  # the lock went with the process
    assert [file.name for file in tmp_path.glob("**/*.tmp")] == ["my-notes.txt.tmp"]


def test_a_temporary_file_has_the_number_of_its_process(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "save", lambda content, file: seen.append(Path(file.name).name))
    save(tmp_path / "checkpoint.pt", {})
    assert seen == [f"checkpoint.{os.getpid()}.tmp"]


# ---- 2. and 3. Another teacher, other data
def test_a_student_goes_on_with_its_own_teacher_only(
    finished, tmp_path, monkeypatch, capsys, quick
):
    teacher, student = tmp_path / "teacher.pt", tmp_path / "student"
    whole = torch.load(finished[0] / "checkpoint.pt")
    torch.save(whole, teacher)
    flags = ["--perflow", teacher, "--out", student, "--batch-size", 32]
    trained([*flags, "--steps", 2], tmp_path, monkeypatch)
    go_on = ["--resume", "--out", student, "--steps", 4]
    trained(go_on, tmp_path, monkeypatch)
    next(iter(whole["ema"].values())).view(-1)[0] += 1e-3  # the teacher's run went on
    torch.save(whole, teacher)
    capsys.readouterr()
    for args in (
        go_on,
        [*go_on, "--perflow", teacher],
        [*go_on, "--perflow", student / "checkpoint.pt"],
    ):
        done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
        assert_one_line(done)
        assert "other weights than the teacher" in done.stderr or "a student" in done.stderr


def test_other_data_of_the_same_shape_are_noticed(latents, tmp_path, monkeypatch, capsys, quick):
    folder = tmp_path / "latents"
    folder.mkdir()
    for file in latents.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    flags = ["--dataset", "latents", "--depth", 1, "--batch-size", 8, "--precision", "fp32"]
    trained([*flags, "--data", folder, "--steps", 1, "--out", "run"], tmp_path, monkeypatch)
    go_on = ["--resume", "--out", "run", "--steps", 2]
    x0 = np.load(folder / "latents.npy")
    parted = x0.copy()  # 64 rows from the first to the last are as they were
    parted[np.setdiff1d(np.arange(200), np.linspace(0, 199, 64).astype(int))] = 0
    for other in (x0 + np.float16(0.01), x0[:-1], parted):
        np.save(folder / "latents.npy", other)
        np.save(folder / "labels.npy", np.arange(len(other)) % 3)
        capsys.readouterr()
        done = in_process(train.main, go_on, tmp_path, monkeypatch, capsys)
        assert_one_line(done, "these data are not those of run", "digest")
    np.save(folder / "latents.npy", x0)
    np.save(folder / "labels.npy", np.arange(200) % 3)
    trained(go_on, tmp_path, monkeypatch)


# ---- 4. Damaged and edited checkpoints
def tried(file: Path, tmp_path, monkeypatch, capsys) -> str:
    """What --resume (up to its loop) and then `sample.load` say of a file: it must be one line."""
    monkeypatch.setattr(train, "train", lambda *args: "the loop began")
    capsys.readouterr()
    out = tmp_path / "edited"
    out.mkdir(exist_ok=True)
    file.replace(out / "checkpoint.pt")
    done = in_process(train.main, ["--resume", "--out", out], tmp_path, monkeypatch, capsys)
    said = str(done.returncode)
    if said != "the loop began":
        assert_one_line(done)
        said = done.stderr
    with contextlib.suppress(ValueError):
        sampler = sample.load(out / "checkpoint.pt")
        kind, spec = sample.DATASETS[sampler.config["dataset"]], sampler.config["spec"]
        cond = kind.conditions(spec, 2)
        kind.write(spec, out / "samples.png", sampler.draw(2, *cond, steps=4), *cond)
    return said


def bit_flips(n: int, finished, tmp_path, monkeypatch, capsys) -> None:
    """Every flip but those in the archive's padding and dates is noticed."""
    whole, rng = (finished[0] / "checkpoint.pt").read_bytes(), random.Random(n)
    before = torch.load(finished[0] / "checkpoint.pt")
    for _ in range(n):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped").write_bytes(raw)
        if tried(tmp_path / "flipped", tmp_path, monkeypatch, capsys) == "the loop began":
            assert same(torch.load(tmp_path / "edited/checkpoint.pt"), before)


VALUES = [
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    1e300,
    float("nan"),
    "",
    "x" * 9999,
    [],
    [1, 2],
    {},
    {1: 2},
]


def edits(n: int, file: Path, tmp_path, monkeypatch, capsys) -> None:
    """One value anywhere in config, spec, optimizer or step replaced or gone."""
    rng = random.Random(n)
    for _ in range(n):
        content = torch.load(file)
        at = content
        keys = rng.choice(
            [["config"], ["config", "spec"], ["optimizer"], ["optimizer", "state", 0], []]
        )
        for key in keys:
            at = at[key]
        key = rng.choice([*at])
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice([*VALUES, torch.zeros(3)])
        torch.save(content, tmp_path / "edit")
        tried(tmp_path / "edit", tmp_path, monkeypatch, capsys)


def test_bit_flips_in_a_checkpoint(finished, tmp_path, monkeypatch, capsys, own_process):
    bit_flips(20, finished, tmp_path, monkeypatch, capsys)


def test_edited_checkpoints(finished, tmp_path, monkeypatch, capsys, own_process):
    edits(60, finished[0] / "checkpoint.pt", tmp_path, monkeypatch, capsys)


def students_and_latents(finished, latents, tmp_path, monkeypatch) -> list[Path]:
    """Two more checkpoints: of a student, and of an MM-DiT on latents."""
    flags = ["--batch-size", 32, "--steps", 2]
    teacher = finished[0] / "checkpoint.pt"
    trained([*flags, "--perflow", teacher, "--out", "s"], tmp_path, monkeypatch)
    flags += ["--precision", "fp32", "--depth", 1]
    trained(
        [*flags, "--dataset", "latents", "--data", latents, "--out", "l"], tmp_path, monkeypatch
    )
    return [tmp_path / "s/checkpoint.pt", tmp_path / "l/checkpoint.pt"]


def test_edited_students_and_latents(finished, latents, tmp_path, monkeypatch, capsys, quick):
    for file in students_and_latents(finished, latents, tmp_path, monkeypatch):
        edits(20, file, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_bit_flips_and_edits_by_the_thousand(
    finished, latents, tmp_path, monkeypatch, capsys, quick
):
    for file in students_and_latents(finished, latents, tmp_path, monkeypatch):
        edits(400, file, tmp_path, monkeypatch, capsys)
    bit_flips(843, finished, tmp_path, monkeypatch, capsys)
    edits(800, finished[0] / "checkpoint.pt", tmp_path, monkeypatch, capsys)


def test_a_huge_number_in_a_checkpoint_allocates_nothing(finished, tmp_path, monkeypatch, capsys):
    content = torch.load(finished[0] / "checkpoint.pt")
    for part, key in (("config", "depth"), ("config", "block"), ("spec", "classes")):
        config = content["config"] | {"objective": None}
        config["spec"] = dict(config["spec"])
        (config if part == "config" else config["spec"])[key] = 10**9
        torch.save(content | {"config": config}, tmp_path / "huge.pt")
        done = in_process(sample.main, ["huge.pt"], tmp_path, monkeypatch, capsys)
        assert_one_line(done, f"{key} 1000000000 is not a whole number from")


def test_a_delta_is_checked_as_a_checkpoint_is(finished, tmp_path, monkeypatch, capsys):
    content = torch.load(finished[0] / "checkpoint.pt")
    student = {"objective": "perflow", "teacher": "t.pt", **asdict(PeRFlow.Options())}
    for config, says in (
        (content["config"] | student | {"windows": 10**9}, "windows 1000000000 is not"),
        (content["config"] | student | {"objective": None}, "another version: it has evaluations"),
        (content["config"], "no student"),
    ):
        torch.save({"config": config, "delta": content["ema"]}, tmp_path / "delta.pt")
        args = [finished[0] / "checkpoint.pt", "--plug", "delta.pt"]
        assert_one_line(in_process(sample.main, args, tmp_path, monkeypatch, capsys), says)
    torch.save({"config": content["config"] | student, "delta": [1]}, tmp_path / "delta.pt")
    assert_one_line(in_process(sample.main, args, tmp_path, monkeypatch, capsys), "delta.pt")


# ---- 5. Damaged arrays and texts
def test_bit_flips_in_the_header_of_an_array(tmp_path):
    """All 1,024 of them."""
    file, x = tmp_path / "latents.npy", np.ones((4, 3, 2, 2), np.float16)
    np.save(file, x)
    whole, taken = file.read_bytes(), 0
    for i in range(8 * 128):
        raw = bytearray(whole)
        raw[i // 8] ^= 1 << i % 8
        file.write_bytes(raw)
        with contextlib.suppress(ValueError):
            array = open_array(file, "(N,C,H,W)", "float16")
            assert array.size == x.size and array.nbytes == x.nbytes  # padding, or another order
            taken += 1
    assert taken < 512


DEEP, LONG_NUMBER = (
    "[" * 100_000,
    '{"scaling": 1' + "0" * 400 + ', "means": 1, "covs": 1, "weights": 1}',
)


@pytest.mark.parametrize(
    "text", [DEEP, LONG_NUMBER, '{"scaling": 1' + "0" * 5000 + "}", "[1]", "\ud800"]
)
def test_damaged_texts_are_named(text, tmp_path, finished, monkeypatch, capsys, own_process):
    raw = text.encode("utf-8", "surrogatepass")
    for name in ("meta.json", "mixture.json", "log.jsonl"):
        (tmp_path / name).write_bytes(raw + b"\n")
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        read_meta(tmp_path / "meta.json")
    with pytest.raises(ValueError, match=r"mixture.json is damaged"):
        toy2d.load_mixture(str(tmp_path / "mixture.json"))
    with pytest.raises(ValueError, match=r"log.jsonl is damaged"):
        folder.cut_log(tmp_path / "log.jsonl", 5)


def test_huge_labels_and_sides_are_refused(tmp_path):
    for shape, label, says in (
        ((4, 4, 4, 4), 10**9, "labels 0 to 1000000000"),
        ((4, 1, 2, 400_000), 0, "sides"),
    ):
        np.save(tmp_path / "latents.npy", np.zeros(shape, np.float16))
        np.save(tmp_path / "labels.npy", np.array([0, 0, 0, label]))
        (tmp_path / "meta.json").write_text("{}")
        with pytest.raises(ValueError, match=says):
            latents = Latents(Latents.Options(str(tmp_path)))
            Latents.network(latents.spec(), train.Recipe(depth=1))


# ---- 6. Numbers and names on the command line
@pytest.mark.parametrize(
    "main, args",
    [
        (train.main, ["--batch-size", 10**9]),
        (train.main, ["--dataset", "cifar10", "--depth", 10**9]),
        (train.main, ["--perflow", "x.pt", "--windows", 10**9]),
        (train.main, ["--seed", 10**30]),
        (train.main, ["--device", "hpu"]),
        (sample.main, ["x.pt", "--num", 10**12]),
        (sample.main, ["x.pt", "--steps", 10**12]),
        (lambda: options.command(bench.run, ""), ["--depth", 10**9]),
    ],
    ids=lambda x: str(x) if isinstance(x, list) else x.__module__,
)
def test_numbers_that_are_too_large(main, args, tmp_path, monkeypatch, capsys):
    done = in_process(main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, str(args[-1])[:6])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "told", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2"}]
)
def test_ranks_that_make_no_sense(told, tmp_path, monkeypatch, capsys):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    done = in_process(train.main, [], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "torchrun sets both")


# ---- 7. and 10. Nothing that is not finite is saved; a run that failed leaves nothing
def test_weights_that_explode_are_not_saved(tmp_path, monkeypatch, capsys, quick):
    args = ["--lr", "1e30", "--steps", 1, "--out", "run"]
    done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
    assert "after step 1 is not finite" in str(done.returncode)
    assert not (tmp_path / "run").exists()


def test_moments_that_explode_are_not_saved(tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr(Toy, "recipe", dict(log_every=1, save_every=1, eval_every=100))
    step = torch.optim.AdamW.step

    def poisoned(self, *args):
        step(self, *args)
        if (seen := next(iter(self.state.values())))["step"] == 3:
            seen["exp_avg_sq"].fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    done = in_process(train.main, [*SHORT, "--out", "run"], tmp_path, monkeypatch, capsys)
    assert "a weight or a moment after step 3" in str(done.returncode)
    assert "step 2 is kept" in done.returncode
    assert sample.read(tmp_path / "run/checkpoint.pt")["step"] == 2


# ---- 8. Pictures
def test_pictures_lie_as_their_camera_held_them(tmp_path):
    """The same picture, stored turned with a note of it."""
    pixels = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    files = (tmp_path / f"{name}.png" for name in ("upright", "turned"))
    upright, turned = (encoding.load_image(file, 64) for file in files)
    assert np.array_equal(upright, turned)


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path):
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(grey).save(tmp_path / "a.png")
    image = encoding.load_image(tmp_path / "a.png", 64)
    assert np.abs(image[0, 0].astype(float) - np.linspace(0, 255, 64)).max() <= 1


def test_what_is_no_picture_is_not_opened(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / "k").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"k/{name}.png")
    os.mkfifo(tmp_path / "k/pipe.png")
    Image.new("L", (4, 4)).save(tmp_path / "k/z.png", format="GIF")
    files, _ = encoding.find_images(tmp_path, False)
    assert [file.name for file in files] == ["a.png", "b.png", "c.png", "z.png"]
    assert [bool(encoding.unreadable(file, 4)) for file in files] == [False, False, False, True]


def test_encode_names_all_unreadable_pictures(tmp_path, monkeypatch):
    class Mean:
        def __init__(self, x):
            self.latent_dist, self.mean = self, x[:, :, ::2, ::2]

    config = dict(
        scaling_factor=1.0, shift_factor=0.0, latent_channels=3, block_out_channels=[1, 1]
    )
    model = type(
        "Vae", (), {"config": type("Config", (), config), "encode": lambda self, x: Mean(x)}
    )
    monkeypatch.setattr(encoding, "load_vae", lambda name, device: model())
    (tmp_path / "in/k").mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (4, 4)).save(tmp_path / f"in/k/{i:02}.png")
        if i % 3 == 1:
            (tmp_path / f"in/k/{i:02}.png").write_text("no picture")
    encode = lambda: encoding.encode(images=tmp_path / "in", out=tmp_path / "out", vae="v", size=4)
    with pytest.raises(ValueError, match=r"13 pictures cannot be read.*01.png.*28.png") as found:
        encode()
    assert str(found.value).count("cannot identify") == 10
    for i in range(1, 40, 3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"in/k/{i:02}.png")
    encode()
    assert np.load(tmp_path / "out/latents.npy").shape == (40, 3, 2, 2)


# ---- 9. The study
def test_damaged_runs_of_the_study_are_named(tmp_path):
    job = ("rf", "ring", 0)
    for text in ("", "{}", "[1]", '{"steps": "x"}'):
        runs.run_file(tmp_path, job).write_text(text)
        with pytest.raises(ValueError, match=r"rf-ring-0.json is damaged or no run"):
            runs.run_missing(tmp_path, [job], None, 5, ["name"])


def test_each_run_has_a_file_of_its_own(tmp_path):
    names = ["a/b", "a_b", "a b", "A/b", "a%2Fb"]
    files = [runs.run_file(tmp_path, (name, "x/m.json", 0)) for name in names]
    assert len({*files}) == 5 and all(file.parent == tmp_path for file in files)


def test_workers_of_the_study_end_with_their_parent(tmp_path):
    args = ["-m", "studies.rank", "--names", "rf", "--steps", 10**6, "--out", tmp_path]
    parent = subprocess.Popen(
        [sys.executable, *map(str, args)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while len(workers := children.read_text().split()) < 2:
        time.sleep(0.05)
    time.sleep(1)
    parent.kill()
    parent.wait()
    end = time.time() + 30
    gone = lambda pid: (
        not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    )
    while not all(map(gone, workers)):
        assert time.time() < end, "a worker outlived its parent"
        time.sleep(0.1)


# ---- 11. Signals
def test_ctrl_c_during_the_imports_is_silent(tmp_path):
    (tmp_path / "tqdm.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    commands = [command(script=script) for script in ("train.py", "sample.py")]
    commands.append([sys.executable, "-m", "data.encode"])
    how = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    for done in run_together(*commands, **how):
        assert done.returncode == -signal.SIGINT and done.stderr == "", done.args


SIGNALS = {
    "two, the second in the middle of a save": """
save, calls = torch.save, []
def interrupted(content, file):
    calls.append(1)
    save(content, file)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
torch.save = interrupted
""",
    "one, where steps take two seconds by the run's clock": """
clock, step, late = time.perf_counter, torch.optim.AdamW.step, []
time.perf_counter = lambda: clock() + 2 * len(late)
torch.optim.AdamW.step = lambda self, *args: (step(self, *args), late.append(print("step")),
    len(late) == 1 and os.kill(os.getpid(), signal.SIGINT))
""",
}


@pytest.fixture(scope="module")
def signalled(tmp_path_factory):
    """Real runs that send themselves signals, side by side: (folder, what became of it) of each."""
    outs = [tmp_path_factory.mktemp("signalled") / "run" for _ in SIGNALS]
    start = f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r}); import torch, train"
    commands = (
        [sys.executable, "-c", f"{start}\n{change}\ntrain.main()", *SHORT, "--out", out]
        for change, out in zip(SIGNALS.values(), outs, strict=True)
    )
    return [*zip(outs, run_together(*commands), strict=True)]


def test_a_second_signal_ends_at_once_and_the_next_run_removes_the_half_file(signalled):
    (out, done), _ = signalled
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr
    assert sample.read(out / "checkpoint.pt")["step"] == 0
    with folder.locked(out):
        assert {file.name for file in out.iterdir()} == {"checkpoint.pt", "log.jsonl"}


def test_a_stop_waits_for_one_step_where_steps_are_long(signalled):
    _, (out, done) = signalled
    assert done.returncode == 130 and done.stdout.count("step\n") == 1, done.stderr
    assert sample.read(out / "checkpoint.pt")["step"] == 1


def test_an_early_stop_leaves_the_log_as_it_would_have_been(tmp_path, monkeypatch, quick):
    """Stopped at step 150 of 300, where each 100 steps are a line of the log."""
    args = ["--steps", 300, "--batch-size", 32]
    trained([*args, "--out", "whole"], tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        stop = lambda run: run.state.step == 150 and not run.signals.append(signal.SIGINT)
        patch.setattr(train.Run, "interrupted", stop)
        with pytest.raises(SystemExit) as stopped:
            trained([*args, "--out", "part"], tmp_path, monkeypatch)
    assert stopped.value.code == 130
    checkpoint = sample.read(tmp_path / "part/checkpoint.pt")
    assert checkpoint["step"] == 150 and len(checkpoint["losses"]) == 50
    trained(["--resume", "--out", "part"], tmp_path, monkeypatch)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "part")]
    assert logs[0] == logs[1]


def test_a_refused_pickle_is_told_in_plain_words(tmp_path, monkeypatch, capsys):
    torch.save({"config": Path("x")}, tmp_path / "p.pt")
    done = in_process(sample.main, ["p.pt"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "a pickle of more than weights, which is not run")
    assert "\x1b" not in done.stderr and "weights_only" not in done.stderr


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys, own_process):
    """On a CPU and on a GPU, in the words of PyTorch."""
    cpu = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
    )
    for error in (cpu, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")):
        fails = lambda *args, error=error: (_ for _ in ()).throw(error)
        monkeypatch.setattr(rf.Objective, "rows_loss", fails)
        done = in_process(train.main, [*SHORT, "--out", "run"], tmp_path, monkeypatch, capsys)
        assert done.returncode == 2 and "error: out of memory: " in done.stderr
        assert "Traceback" not in done.stderr
        (tmp_path / "run/checkpoint.pt").unlink()


def test_a_lock_on_descriptor_0_holds_too(tmp_path, monkeypatch):
    """A process without an input gets 0 as its first descriptor."""
    monkeypatch.chdir(tmp_path)
    kept = os.dup(0)
    os.close(0)
    try:
        with (
            folder.locked(Path("held")),
            pytest.raises(BlockingIOError, match="--out held is in use by another process"),
            folder.locked(Path("held")),
        ):
            pass
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    assert not (tmp_path / "held").exists()


def test_a_file_system_without_locks_is_none_the_worse(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(folder.fcntl, "flock", flock)
    with folder.locked(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


# ---- 12. The second campaign: disks, streams, names, pipes
@contextlib.contextmanager
def small_disk(limit):
    """A file-size limit stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_a_full_disk_keeps_older_samples(name, finished, tmp_path, monkeypatch, capsys):
    out, args = tmp_path / name, [finished[0] / "checkpoint.pt", "--num", 3000, "--steps", 1]
    out.write_bytes(b"an older file")
    with small_disk(2000):
        done = in_process(sample.main, [*args, "--out", out], tmp_path, monkeypatch, capsys)
    assert done.returncode == 2 and "error: [Errno 27] File too large" in done.stderr
    assert out.read_bytes() == b"an older file" and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("data_set", [Dataset, Shapes])
@pytest.mark.parametrize("name", ["x.npz", "x.png"])
def test_pictures_are_written_whole_or_not_at_all(data_set, name, tmp_path):
    x0, file = torch.randn(9, 3, 32, 32).clamp(-1, 1), tmp_path / name
    cond = conditions_of(torch.arange(9)) if data_set is Shapes else []
    write = lambda: data_set.write(dict(shape=[3, 32, 32], classes=0), file, x0, *cond)
    assert write() == file
    whole = file.read_bytes()
    with small_disk(2000), pytest.raises(OSError, match="File too large"):
        write()
    assert file.read_bytes() == whole and [*tmp_path.iterdir()] == [file]


def test_a_full_disk_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, capsys, quick):
    with small_disk(2000):
        done = in_process(train.main, ["--out", "new"], tmp_path, monkeypatch, capsys)
    assert done.returncode == 2 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["folder.png", "x" * 250 + ".png", "link.png"])
def test_an_impossible_out_is_told_before_sampling(name, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere" / "x.png")
    monkeypatch.setattr(sample.Sampler, "draw", None)
    args = [finished[0] / "checkpoint.pt", "--out", name]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "No such file" if name == "link.png" else name[:50])


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with folder.written(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_streams_that_are_closed_or_know_no_umlaut(finished, tmp_path):
    """Real commands side by side: -OO, which strips docstrings; stderr closed from the start; a
    reader of stdout that is gone; a name that ASCII has not."""
    few = ["--steps", 25, "--batch-size", 8, "--no-report", "--out"]
    shell = lambda line, *args: ["sh", "-c", line, *command(*args)]
    optimized = command("--help")
    optimized.insert(1, "-OO")
    ascii_name = command(finished[0] / "checkpoint.pt", "--num", 5, "--steps", 1, "--out",
                         tmp_path / "\u00fc.npz", script="sample.py")  # fmt: skip
    # the report is one of few samples, in whose place stands a file
    report = "import sys; sys.path.insert(0, {!r}); import data.toy, train, pathlib\n"
    report += "data.toy.Toy.report = lambda data, model, out, teacher: (out / 'drawn').touch()\n"
    piped = [sys.executable, "-c", report.format(str(ROOT)) + "train.main()", *map(str, few[:4])]
    done = run_together(
        optimized,
        shell('exec "$0" "$@" 2>&-', *few, tmp_path / "closed"),
        ["sh", "-c", '"$0" "$@" | true', *piped, "--out", tmp_path / "piped"],
        ["env", "PYTHONIOENCODING=ascii", *ascii_name],
    )
    help_, closed, _, named = done
    assert help_.returncode == 0 and "--formulation" in help_.stdout
    assert (
        closed.returncode == 0 and sample.read(tmp_path / "closed" / "checkpoint.pt")["step"] == 25
    )
    assert sample.read(tmp_path / "piped" / "checkpoint.pt")["step"] == 25
    assert (tmp_path / "piped" / "drawn").exists()
    assert (
        named.returncode == 0 and "\\xfc.npz" in named.stdout and (tmp_path / "\u00fc.npz").exists()
    )


def test_a_pipe_is_no_checkpoint(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "x.pt")
    done = in_process(sample.main, [tmp_path / "x.pt"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "x.pt: it is no regular file")
    assert_one_line(
        in_process(sample.main, ["/dev/zero"], tmp_path, monkeypatch, capsys), "regular"
    )


@pytest.mark.parametrize("fault", [0.0, math.nan])
def test_a_delta_that_is_not_finite_is_not_plugged(fault, finished, tmp_path):
    checkpoint, file = sample.read(finished[0] / "checkpoint.pt"), tmp_path / "delta.pt"
    student = dict(objective="perflow", teacher="x", **vars(PeRFlow.Options()))
    delta = {key: w * 0 for key, w in checkpoint["ema"].items()}
    next(iter(delta.values()))[0] = fault
    save(file, dict(delta=delta, config=checkpoint["config"] | student))
    says = pytest.raises(ValueError, match="no delta: it holds values that are not finite")
    with says if fault else contextlib.nullcontext():
        sample.plugged(sample.load(finished[0] / "checkpoint.pt"), file)
