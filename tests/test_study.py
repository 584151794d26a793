"""The study's arithmetic on hand-made runs, its resume, and that its table comes from the files."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_train import assert_one_line, in_process

import study
from rf import formulation
from toy2d import load_mixture


def test_ranks_share_ties():
    assert study.ranks([0.3, 0.1, 0.2]).tolist() == [3, 1, 2]
    assert study.ranks([1, 0, 1, 1]).tolist() == [3, 1, 3, 3]
    assert study.ranks([0.1, float("nan"), 0.2]).tolist() == [1, 3, 2]  # diverged is last


def test_rank_correlation():
    assert study.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert study.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    d2 = sum((a - b) ** 2 for a, b in zip([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], strict=True))
    expected = 1 - 6 * d2 / (5 * 24)  # the textbook's formula without ties
    assert study.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(expected)


def made_up(name, mixture, seed, energies):
    run = {"name": name, "mixture": mixture, "seed": seed, "steps": 7, "excess": 0.01}
    settings = zip(study.STEPS, energies, strict=True)
    return run | {str(n): {"energy": e, "outliers": 0.02} for n, e in settings}


def test_mean_ranks_average_over_settings():
    runs = [
        made_up("rf", "ring", 0, [1, 1, 1, 9]),
        made_up("eps/linear", "ring", 0, [2, 2, 2, 3]),
        made_up("rf", "grid", 0, [1, 1, 1, 1]),
        made_up("eps/linear", "grid", 0, [2, 2, 2, 2]),
    ]
    names = ["rf", "eps/linear"]
    assert study.mean_ranks(runs, names, study.STEPS).tolist() == [9 / 8, 15 / 8]
    assert study.mean_ranks(runs, names, [50]).tolist() == [1.5, 1.5]


def test_the_papers_table_is_whole():
    assert len(study.PAPER) == 16 and all(formulation(name) for name in study.PAPER)
    assert study.PAPER["rf"] == (5.67, 6.50, 5.75)


def test_the_table_comes_from_the_saved_runs_and_only_missing_ones_are_made(tmp_path, monkeypatch):
    jobs = [(name, "ring", seed) for seed in (0, 1) for name in ("rf", "eps/linear", "v/cos")]
    for i, (name, mixture, seed) in enumerate(jobs):
        run = made_up(name, mixture, seed, [0.001 * (i + 1)] * 4)
        study.run_file(tmp_path, name, mixture, seed).write_text(json.dumps(run))
    runs = study.run_missing(tmp_path, jobs, 7)  # nothing is trained: the files are there
    table = study.rank_table(runs, ["rf", "eps/linear", "v/cos"], ["ring"])
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| rf ")]
    assert rows[0][7] == "2.50" and rows[0][1] == "1.00"  # the mean of 1 and 4 thousandths; first
    assert "Rank correlation" in table
    with pytest.raises(ValueError, match="holds runs of 7 steps, not 8"):
        study.run_missing(tmp_path, jobs, 8)


def test_one_real_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    """In a thread instead of a process, and with fewer samples, for speed."""
    reference = study.toy2d.reference
    monkeypatch.setattr(
        study.toy2d, "reference", lambda mixture, seed: reference(mixture, seed, 500)
    )
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(1))
    job = ("rf/cosmap", "ring", 1)
    (run,) = study.run_missing(tmp_path, [job], 30)
    file = study.run_file(tmp_path, *job)
    assert json.loads(file.read_text()) == run and not list(tmp_path.glob("*.tmp"))
    assert run["steps"] == 30 and math.isfinite(run["50"]["energy"]) and run["excess"] < 2
    stamp = file.stat().st_mtime_ns
    assert study.run_missing(tmp_path, [job], 30) == [run] and file.stat().st_mtime_ns == stamp


def test_file_names_of_all_formulations_differ(tmp_path):
    assert len({study.run_file(tmp_path, name, "ring", 0) for name in study.STUDY}) == 61


@pytest.mark.parametrize("method", ["first order", "heun", "rk4"])
@pytest.mark.parametrize("name", ["rf", "v/cos", "edm/rf"])
def test_exact_samples_converge_to_the_same_points(name, method):
    """More steps of any solver on any path bring the same noise to the mixture's modes."""
    mixture = load_mixture("ring")
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    x = study.exact_samples(formulation(name), mixture, noise, 100, method)
    assert (study.toy2d.mahalanobis(x, mixture).min(1).values < 5).float().mean() > 0.95
    with_rf = study.exact_samples(formulation("rf"), mixture, noise, 200, "rk4")
    assert (x - with_rf).norm(dim=1).median() < (0.1 if method == "first order" else 0.02)


def test_pictures(tmp_path, monkeypatch):
    for command in ("densities", "paths"):
        monkeypatch.setattr(sys, "argv", ["study.py", command, "--out", str(tmp_path / "x.png")])
        study.main()
        assert len(study.Image.open(tmp_path / "x.png").getcolors(1 << 20)) > 100


def test_bad_input(tmp_path, monkeypatch, capsys):
    for args, says in (
        (["rank", "--mixtures", "rong"], "'rong'; choose from ring, grid"),
        (["rank", "--names", "ref"], "'ref'; choose from rf"),
        (["rank", "--seeds", "0"], "at least 1"),
    ):
        assert_one_line(in_process(study.main, args, tmp_path, monkeypatch, capsys), says)
