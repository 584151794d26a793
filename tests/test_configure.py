"""From flags to a configuration: what does not go together ends in one line and leaves nothing."""

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, command, in_process, run_together

import sample
import toy2d
import train
from data.latents import Latents
from data.toy import Toy
from perflow import PeRFlow
from rf import formulation
from training.checkpoint import save
from training.configure import compose, configure, make_parser, resume_command
from training.options import PRESETS, Recipe, preset

# ---- bad input: status 2 and one line that names the value and the choices

BAD_TRAIN = [
    (["--dataset", "mnist"], ["'mnist'", "toy2d"]),
    (["--formulation", "ref"], ["'ref'", "rf/lognorm(m,s)"]),
    (["--formulation", "rf/lognorm(0)"], ["'rf/lognorm(0)'", "rf/lognorm(m,s)"]),
    (["--formulation", "rf/mode(3)"], ["1.7519", "s = 3"]),
    (["--mixture", "rong"], ["'rong'", "ring, grid, spiral"]),
    (["--mixture", "none.json"], ["none.json", "No such file"]),
    (["--steps", "0"], ["--steps: 0", "from 1 to 1,000,000,000"]),
    (["--steps", "-5"], ["--steps: -5", "from 1 to 1,000,000,000"]),
    (["--steps", "2000000000"], ["--steps", "from 1 to 1,000,000,000"]),
    (["--accumulate", "0"], ["--accumulate: 0", "at least 1"]),
    (["--seed", "4294967296"], ["--seed", "from -2,147,483,648 to 2,147,483,647"]),
    (["--init", ""], ["--init is empty"]),
    (["--perflow", ""], ["--perflow is empty"]),
    (["--out", ""], ["--out: the path is empty"]),
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


@pytest.mark.parametrize("args, says", BAD_TRAIN, ids=lambda x: " ".join(x))
def test_bad_input_to_train(args, says, tmp_path, monkeypatch, capsys):
    assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), *says)
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_bad_input_as_a_real_process(tmp_path):
    commands = command("--dataset", "mnist"), command("none.pt", script="sample.py")
    train, sample = run_together(*commands, cwd=tmp_path)
    assert_one_line(train, "'mnist'")
    assert_one_line(sample, "none.pt", "No such file")


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


def test_numbered_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def out():
        with contextlib.ExitStack() as held:
            return configure({}, held, sample.load)[1]

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
    assert_one_line(done, "--network mmdit differs from", "which has mlp")
    distil = ["--perflow", checkpoint, "--mixture", "grid"]
    run = in_process(train.main, distil, tmp_path, monkeypatch, capsys)
    assert_one_line(run, "--mixture grid differs from")
    turned = toy2d.load_mixture("ring").spec()
    turned["means"] = [[-y, x + 0.1] for x, y in turned["means"]]
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args), "--mixture", "turned.json"])
    train.main()
    assert sample.load(tmp_path / "runs/toy2d/checkpoint.pt").config["mixture"] == turned


# ---- ranks: a run goes on with the micro-batches that it began with


def test_a_resumed_run_keeps_its_micro_batches(finished, tmp_path, monkeypatch):
    """It had two, of two ranks: one rank accumulates twice, two do not; three cannot share them,
    nor can another --accumulate. An older checkpoint does not know."""
    content = sample.read(finished[0] / "checkpoint.pt")
    assert content["config"]["micro_batches"] == 1
    out = tmp_path / "run"
    out.mkdir()
    resumed = lambda **flags: composed(out, resume=True, **flags)
    for micros in (2, None):
        content["config"]["micro_batches"] = micros
        save(out / "checkpoint.pt", content)
        for world, given, accumulate in ((1, {}, 2), (2, {}, 1), (1, {"accumulate": 2}, 2)):
            monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", str(world))
            config = resumed(**given)
            expected = accumulate if micros else given.get("accumulate", 1)
            assert config["accumulate"] == expected and config["micro_batches"] == expected * world
    content["config"]["micro_batches"] = 2
    save(out / "checkpoint.pt", content)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 ranks with --accumulate 2 cannot go on"):
        resumed(accumulate=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks cannot go on with a run of 2 micro-batches a st"):
        resumed()


def test_the_resume_command_is_the_one_that_ran(monkeypatch):
    told = lambda given: resume_command(given, dict(dataset="toy2d"), Path("runs/x"))
    end = "train.py --dataset toy2d --resume --out runs/x"
    assert told({"steps": 3, "out": "runs/x"}) == f"python {end}"
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "4")
    given = dict(shard=True, no_report=True, device="cpu")
    assert told(given) == f"torchrun --nproc_per_node 4 {end} --shard --no-report --device cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert told({}) == f"torchrun --nproc_per_node 2 {end}"


# ---- what a start keeps, and where the values come from


@pytest.mark.parametrize(
    "kept, spec, fault",
    [
        ("network", dict(shape=[4, 16, 16], classes=7), None),
        ("network", dict(shape=[3, 8, 8]), "shape"),
        ("network", dict(context=[8, 24]), "context"),
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
            Latents.agreed(known | spec, known, "x", kept)
    else:
        assert Latents.agreed(known | spec, known, "x", kept) == known | spec


def composed(out, **given):
    with contextlib.ExitStack() as held:
        return configure(given | {"out": out}, held, sample.load)[0]


def test_a_folder_named_as_a_preset_chooses_none(tmp_path):
    """Only options that a row of the table names choose it, whatever a path says."""
    plain = composed(tmp_path, dataset="latents", data="elsewhere")
    assert plain.items() >= preset("latents").items()
    for data in ("shapes", "toy2d", "student", "x --network mmdit", "a student --guidance fixed"):
        assert composed(tmp_path, dataset="latents", data=data) == plain | {"data": data}


def test_a_class_s_own_recipe_wins_over_the_table_and_flags_over_both(tmp_path, monkeypatch):
    table = preset("toy2d --network mmdit")
    monkeypatch.setattr(Toy, "recipe", dict(steps=7, lr=0.5))
    config = composed(tmp_path, network="mmdit", lr=0.25)
    assert config.items() >= (table | dict(network="mmdit", steps=7, lr=0.25)).items()


def test_help_prints_the_whole_table_of_defaults(capsys):
    """Each row of PRESETS with each of its values, and every default of a Recipe."""
    parser = make_parser("")
    shown = " ".join(parser.format_help().split())
    assert "--dataset cifar10, --dataset latents: --data DATA" in shown  # both have it
    for row, values in {"every run": asdict(Recipe()), **PRESETS}.items():
        assert f"{row}: " + ", ".join(f"{key} {value}" for key, value in values.items()) in shown


def test_a_students_configuration_says_what_the_table_says(finished):
    """Its teacher's values, the rows of students, the flags; fixed guidance drops nothing."""
    teacher = sample.load(finished[0] / "checkpoint.pt").config
    for flags, changes in (
        ({}, preset("toy2d student")),
        ({"guidance": "fixed", "teacher_cfg": 2.0}, preset("toy2d student") | {"dropout": 0.0}),
        ({"lr": 8e-3, "times": 8}, preset("toy2d student") | {"lr": 8e-3}),
    ):
        config = compose(flags, "toy2d", "perflow", teacher, "the teacher", resume=False)
        expected = asdict(Recipe(**{k: teacher[k] for k in asdict(Recipe())} | changes))
        assert {key: config[key] for key in expected} == expected
        assert config["times"] == flags.get("times", 4) and config["evaluations"] == 8


@pytest.mark.parametrize("windows, evaluations", [(1, 32), (2, 16), (3, 11), (4, 8)])
def test_evaluations_are_of_one_window(windows, evaluations):
    """By default 32 from t = 1 to 0; the class counts what the flag counts."""
    options = PeRFlow.Options(windows=windows)
    assert options.evaluations == evaluations
    objective = PeRFlow.of(formulation("rf"), options, lambda cfg: lambda z, t: z)
    asked = []
    objective.teacher = lambda z, t: (asked.append(t), z)[1]
    objective.solve_window(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1))
    assert len(asked) == 2 * -(-evaluations // 2)  # whole steps of Heun, of two each
