"""From a checkpoint to samples: the notebook's three lines and the command."""

import os
import sys
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_one_line, in_process
from PIL import Image

import sample
from data.shapes import Shapes
from perflow import PeRFlow
from rf import formulation, solve
from training.checkpoint import save
from training.options import Recipe, preset


@pytest.fixture
def sampler(finished):
    return sample.load(finished[0] / "checkpoint.pt")


def test_load_gives_the_ema_weights(finished, sampler):
    checkpoint = sample.read(finished[0] / "checkpoint.pt")
    assert all(v.equal(checkpoint["ema"][k]) for k, v in sampler.network.state_dict().items())
    assert sampler.step == 450 and sampler.config["formulation"] == "rf"


def test_sampler_methods_agree_with_solve(sampler):
    noise, label = torch.randn(20, 2), torch.arange(20) % 8
    for method in ("euler", "heun", "rk4"):
        x0 = sampler.sample(noise, label, steps=12, method=method)
        direct = solve(sampler.velocity, noise, label, steps=12, method=method)
        torch.testing.assert_close(x0, direct, rtol=1e-3, atol=1e-4)
    guided = sampler.sample(noise, label, steps=4, cfg=3.0)
    velocity = partial(sampler.velocity, cfg=3.0)
    torch.testing.assert_close(guided, solve(velocity, noise, label, steps=4))
    sampler.cfg = 3.0  # of calls that name none, of both
    torch.testing.assert_close(guided, solve(sampler.velocity, noise, label, steps=4))
    sampler.cfg = 1.0
    assert not torch.allclose(guided, sampler.sample(noise, label, steps=4))
    null = torch.full((20,), 8)
    torch.testing.assert_close(
        sampler.sample(noise, label, steps=4, cfg=0.0), sampler.sample(noise, null, steps=4)
    )


def test_command_writes_png_and_npz(finished, tmp_path, monkeypatch, capsys):
    for out, flags in (
        ("a.png", ["--solver", "heun"]),
        ("b.npz", ["--label", "2", "--cfg", "2", "--seed", "5"]),
    ):
        args = [finished[0] / "checkpoint.pt", "--num", 200, "--steps", 8, *flags]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args), "--out", out])
        monkeypatch.chdir(tmp_path)
        sample.main()
        printed = capsys.readouterr().out
        assert "energy distance" in printed and "exact field" in printed and out in printed
    assert Image.open(tmp_path / "a.png").size[0] > 400
    arrays = np.load(tmp_path / "b.npz", allow_pickle=False)
    assert arrays["arr_0"].shape == (200, 2) and (arrays["arr_1"] == 2).all()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--solver", "rk5"], "invalid choice: 'rk5'"),
        (["--label", "8"], "--label 8 is out of range; choose from 0 to 7"),
        (["--label", "-1"], "--label -1 is out of range"),
        (["--steps", "0"], "from 1 to 100,000"),
        (["--num", "0"], "from 1 to 10,000,000"),
        (["--out", "x.jpg"], "must end in .png or .npz"),
        (["--out", "/proc/nowhere/x.png"], "/proc/nowhere"),
        (["--device", "cuda:9"], "'cuda:9'"),
    ],
    ids=" ".join,
)
def test_bad_input(finished, tmp_path, monkeypatch, capsys, flags, says):
    done = in_process(
        sample.main, [finished[0] / "checkpoint.pt", *flags], tmp_path, monkeypatch, capsys
    )
    assert_one_line(done, says)
    assert list(tmp_path.iterdir()) == []


def test_samples_at_own_times(sampler):
    """`times` replaces the grid, and `steps` need not be said twice."""
    noise, label = torch.randn(6, 2), torch.arange(6)
    times = [1.0, 0.6, 0.3, 0.0]
    got = sampler.sample(noise, label, times=times)
    torch.testing.assert_close(got, solve(sampler.velocity, noise, label, times=times))
    uniform = [1.0, 0.75, 0.5, 0.25, 0.0]
    torch.testing.assert_close(
        sampler.sample(noise, label, times=uniform), sampler.sample(noise, label, steps=4)
    )
    for method in ("heun", "rk4", "ab2"):
        x0 = sampler.sample(noise, label, times=times, method=method)
        direct = solve(sampler.velocity, noise, label, times=times, method=method)
        torch.testing.assert_close(x0, direct)
    with pytest.raises(ValueError, match="3 steps need 4 times, got 5"):
        sampler.sample(noise, label, steps=3, times=uniform)


def test_guidance_needs_conditions(tmp_path):
    from rf import formulation
    from toy2d import MLP

    unconditional = sample.Sampler(MLP(), formulation("rf"), {})
    with pytest.raises(ValueError, match="cfg 2 is not for this model"):
        unconditional.sample(torch.randn(3, 2), steps=2, cfg=2.0)
    conditional = sample.Sampler(MLP(3), formulation("rf"), {})
    with pytest.raises(ValueError, match="cfg nan is not for this model"):
        conditional.sample(torch.randn(3, 2), torch.arange(3), steps=2, cfg=float("nan"))
    with pytest.raises(ValueError, match=r"cfg 2 needs conditions .*: 0 given, 1 null ones"):
        conditional.sample(torch.randn(3, 2), steps=2, cfg=2.0)


def test_flags_that_do_not_go_together(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "none.txt").write_text("\n \n")
    checkpoint = finished[0] / "checkpoint.pt"
    for flags, says in (
        (["--prompt", "a", "--label", 1], "neither --label nor --data"),
        (["--prompt", "a", "--prompt", "b", "--num", 1], "at least the number of prompts, 2"),
        (["--prompts", "none.txt"], "--prompts none.txt is empty"),
        (["--no-t5"], "--no-t5 is for a model that draws what a --prompt says"),
        (["--size", 4], "--size 4: only a released SD3 draws in other sizes"),
        (["--data", "x"], "--data x: this model takes no conditions from a folder"),
        (["--seed", 2**32], "--seed: 4294967296 is not a whole number from"),
        (["--prompt", "a ring"], "this model takes no text"),
    ):
        done = in_process(sample.main, [checkpoint, *flags], tmp_path, monkeypatch, capsys)
        assert_one_line(done, says)


@pytest.mark.parametrize(
    "name, says",
    [
        ("prompts.txt", r"--prompt 'a\u2028b\x85c\x0cd': this model takes no text"),
        ("pipe", "pipe: it is no regular file"),
    ],
)
def test_a_prompt_ends_with_its_line(finished, tmp_path, monkeypatch, capsys, name, says):
    """And not at what splits lines in Unicode; a byte order mark is no letter of it."""
    (tmp_path / "prompts.txt").write_text("\ufeffa\u2028b\x85c\x0cd\n\n", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    args = [finished[0] / "checkpoint.pt", "--prompts", name]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, says)


def test_a_plugged_student_of_fixed_guidance_is_not_guided_again(finished, tmp_path):
    teacher = sample.load(finished[0] / "checkpoint.pt")
    options = asdict(PeRFlow.Options(guidance="fixed", teacher_cfg=3.0))
    config = teacher.config | options | {"objective": "perflow", "teacher": "t.pt", "dropout": 0.0}
    delta = {key: torch.zeros_like(w) for key, w in teacher.network.state_dict().items()}
    save(tmp_path / "delta.pt", {"config": config, "delta": delta})
    teacher.cfg = 3.0
    plugged = sample.plugged(teacher, tmp_path / "delta.pt")
    assert plugged.cfg == 1.0 and plugged.null_cond == ()


def test_draw_seeds_objectives_that_draw_in_sampling(sampler, monkeypatch):
    draws = lambda network, noise, *cond, generator=None, **how: torch.randn(
        noise.shape, generator=generator
    )
    monkeypatch.setattr(sampler, "objective", SimpleNamespace(sample=draws))
    label = torch.zeros(5, dtype=torch.long)
    once, again, other = (sampler.draw(5, label, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(once, noise)  # the fresh noise is not the starting noise


def test_prompts_in_a_notebook(finished):
    """Of a model with text `encode` gives its conditions; any other says that it takes none."""
    data = Shapes(Shapes.Options())
    recipe = Recipe(**preset("shapes") | dict(depth=1))
    config = vars(recipe) | dict(dataset="shapes", spec=data.spec())
    sampler = sample.Sampler(Shapes.network(data.spec(), recipe), formulation("rf"), config)
    cond = sampler.encode(["a red circle", "a blue cross"])
    assert [c.shape[0] for c in cond] == [2, 2]
    x0 = sampler.sample(torch.randn(2, 3, 32, 32), *cond, steps=1, cfg=3.0)
    assert x0.shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="this model takes no text"):
        sample.load(finished[0] / "checkpoint.pt").encode(["a red circle"])
    with pytest.raises(ValueError, match="a network of one's own"):
        sample.Sampler(torch.nn.Linear(1, 1), formulation("rf")).encode(["a red circle"])
