"""The mixtures as the data of a run."""

import math
import sys

import torch

import sample
import toy2d
import train
from data.toy import Toy, metrics_table, number
from toy2d import load_mixture


def test_toy_on_mmdit(tmp_path, monkeypatch, own_process):
    """The same network code on points: 2 x 1 x 1 latents."""
    out = tmp_path / "run"
    flags = f"--network mmdit --depth 1 --steps 20 --batch-size 16 --out {out}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    monkeypatch.setattr(Toy, "report", lambda *args: None)
    train.main()
    assert sample.load(out / "checkpoint.pt").sample(torch.randn(5, 2), steps=2).shape == (5, 2)


def test_a_table_of_metrics_shows_no_nan():
    assert number(math.nan, ".2f") == number(math.inf, ".1%") == "diverged"
    nowhere = torch.full((9, 2), math.nan)
    away = toy2d.sample_metrics(nowhere, torch.zeros(9, 2), load_mixture("ring"))
    assert away["outliers"] == 1 and "nan" not in metrics_table({"x": away})
