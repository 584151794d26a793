"""The folder of a run: killed, or stopped by a loss that is not finite, it loses nothing."""

import itertools
import random
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import SHORT, fast_command, in_process, run, same
from torch.utils.flop_counter import FlopCounterMode

import rf
import sample
import train
from data.base import Dataset
from data.toy import Toy
from training import folder
from training.options import Recipe


def kill_and_resume(kills, tmp_path, monkeypatch):
    """kill -9 at random moments (each log line is saved here): it ends as if never killed."""
    often = dict(block=5, log_every=5, save_every=5, eval_every=500)
    flags = ["--dataset", "toy2d", "--steps", 300 * kills, "--batch-size", 16]
    out, whole, rng = tmp_path / "killed", tmp_path / "whole", random.Random(0)
    resume = ["--resume", "--out", out]
    monkeypatch.setattr(Toy, "recipe", often)
    monkeypatch.setattr(Toy, "report", lambda *args: 0)
    run(monkeypatch, *flags, "--out", whole)
    expected = sample.read(whole / "checkpoint.pt")  # the first `read` is slow, later ones are not
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
    run(monkeypatch, *resume)
    assert same(sample.read(out / "checkpoint.pt"), expected)
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert not (out / "checkpoint.tmp").exists()


def test_kill_9_loses_nothing(tmp_path, monkeypatch, own_process):
    kill_and_resume(2, tmp_path, monkeypatch)


@pytest.mark.slow
def test_kill_9_loses_nothing_20_times(tmp_path, monkeypatch, own_process):
    kill_and_resume(20, tmp_path, monkeypatch)


def test_a_non_finite_loss_stops_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys, own_process
):
    plain = rf.Objective.rows_loss
    calls = itertools.count()
    poison = lambda *args: plain(*args) * (float("nan") if next(calls) == 137 else 1)
    monkeypatch.setattr(rf.Objective, "rows_loss", poison)
    monkeypatch.setattr(Toy, "recipe", {"save_every": 100})
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # a second at each look
    for module in (train, folder):
        monkeypatch.setattr(module, "time", clock)
    done = in_process(
        train.main, [*SHORT, "--out", tmp_path / "run"], tmp_path, monkeypatch, capsys
    )
    said = str(done.returncode)
    assert "samples/s=3.20k" in done.stderr  # 100 steps of 32 between two looks
    assert "the loss of step 138 is not finite" in said and "step 100 is kept" in said
    assert sample.read(tmp_path / "run" / "checkpoint.pt")["step"] == 100


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
    assert folder.training_flops(network, x, labels) == pytest.approx(counted, rel=0.1)
    one = torch.nn.Linear(5, 7)  # and by hand: two FLOPs a weight and token, thrice for a step
    assert folder.training_flops(lambda x, t: one(x), torch.randn(4, 3, 5)) == 3 * 2 * 3 * 5 * 7
