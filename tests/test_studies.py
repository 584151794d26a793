"""The study's arithmetic on hand-made runs, its resume, and that its table comes from the files."""

import json
import math
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_train import assert_one_line, in_process

import sample
import toy2d
from options import command
from rf import STUDY, formulation
from studies import bench, delta, exact, figures, rank
from toy2d import load_mixture


def test_ranks_share_ties():
    assert rank.ranks([0.3, 0.1, 0.2]).tolist() == [3, 1, 2]
    assert rank.ranks([1, 0, 1, 1]).tolist() == [3, 1, 3, 3]
    assert rank.ranks([0.1, float("nan"), 0.2]).tolist() == [1, 3, 2]  # diverged is last


def test_rank_correlation():
    assert rank.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    d2 = sum((a - b) ** 2 for a, b in zip([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], strict=True))
    expected = 1 - 6 * d2 / (5 * 24)  # the textbook's formula without ties
    assert rank.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(expected)


def made_up(name, mixture, seed, energies):
    run = {"name": name, "mixture": mixture, "seed": seed, "steps": 7, "excess": 0.01}
    settings = zip(rank.STEPS, energies, strict=True)
    return run | {str(n): {"energy": e, "outliers": 0.02} for n, e in settings}


def test_mean_ranks_average_over_settings():
    runs = [
        made_up("rf", "ring", 0, [1, 1, 1, 9]),
        made_up("eps/linear", "ring", 0, [2, 2, 2, 3]),
        made_up("rf", "grid", 0, [1, 1, 1, 1]),
        made_up("eps/linear", "grid", 0, [2, 2, 2, 2]),
    ]
    names = ["rf", "eps/linear"]
    assert rank.mean_ranks(runs, names, rank.STEPS).tolist() == [9 / 8, 15 / 8]
    assert rank.mean_ranks(runs, names, [50]).tolist() == [1.5, 1.5]


def test_the_papers_table_is_whole():
    assert len(rank.PAPER) == 16 and all(formulation(name) for name in rank.PAPER)
    assert rank.PAPER["rf"] == (5.67, 6.50, 5.75)


def test_the_table_comes_from_the_saved_runs_and_only_missing_ones_are_made(tmp_path, monkeypatch):
    jobs = [(name, "ring", seed) for seed in (0, 1) for name in ("rf", "eps/linear", "v/cos")]
    for i, (name, mixture, seed) in enumerate(jobs):
        run = made_up(name, mixture, seed, [0.001 * (i + 1)] * 4)
        rank.run_file(tmp_path, name, mixture, seed).write_text(json.dumps(run))
    runs = rank.run_missing(tmp_path, jobs, 7)  # nothing is trained: the files are there
    table = rank.rank_table(runs, ["rf", "eps/linear", "v/cos"], ["ring"])
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| rf ")]
    assert rows[0][7] == "2.50" and rows[0][1] == "1.00"  # the mean of 1 and 4 thousandths; first
    assert "Rank correlation" in table
    with pytest.raises(ValueError, match="holds runs of 7 steps, not 8"):
        rank.run_missing(tmp_path, jobs, 8)


def test_one_real_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    """In a thread instead of a process, and with fewer samples, for speed."""
    reference = toy2d.reference
    monkeypatch.setattr(toy2d, "reference", lambda mixture, seed: reference(mixture, seed, 500))
    pool = SimpleNamespace(Pool=lambda initializer: ThreadPool(1))
    monkeypatch.setattr(rank.multiprocessing, "get_context", lambda kind: pool)
    job = ("rf/cosmap", "ring", 1)
    (run,) = rank.run_missing(tmp_path, [job], 30)
    file = rank.run_file(tmp_path, *job)
    assert json.loads(file.read_text()) == run and not list(tmp_path.glob("*.tmp"))
    assert run["steps"] == 30 and math.isfinite(run["50"]["energy"]) and run["excess"] < 2
    stamp = file.stat().st_mtime_ns
    assert rank.run_missing(tmp_path, [job], 30) == [run] and file.stat().st_mtime_ns == stamp


def test_file_names_of_all_formulations_differ(tmp_path):
    assert len({rank.run_file(tmp_path, name, "ring", 0) for name in STUDY}) == 61


@pytest.mark.parametrize("method", ["first order", "heun", "rk4"])
@pytest.mark.parametrize("name", ["rf", "v/cos", "edm/rf"])
def test_exact_samples_converge_to_the_same_points(name, method):
    """More steps of any solver on any path bring the same noise to the mixture's modes."""
    mixture = load_mixture("ring")
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    x = exact.exact_samples(formulation(name), mixture, noise, 100, method)
    assert (toy2d.mahalanobis(x, mixture).min(1).values < 5).float().mean() > 0.95
    with_rf = exact.exact_samples(formulation("rf"), mixture, noise, 200, "rk4")
    assert (x - with_rf).norm(dim=1).median() < (0.1 if method == "first order" else 0.02)


def test_pictures(tmp_path):
    figures.run(out=tmp_path)
    for name in ("densities", "paths"):
        assert len(Image.open(tmp_path / f"{name}.png").getcolors(1 << 20)) > 100


def test_a_walk_starts_in_noise_and_ends_in_the_samples():
    formula, mixture = formulation("edm(-1.20,1.20)"), load_mixture("ring")
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    zs = figures.walk(formula, mixture, noise, 4)
    sigma = formula.path.b(torch.tensor(formula.path.t_max, dtype=torch.float64)).item()
    torch.testing.assert_close(zs[0], sigma * noise, rtol=1e-4, atol=1e-4)
    samples = exact.exact_samples(formula, mixture, noise, 4, "first order")
    assert len(zs) == 5 and torch.equal(zs[-1], samples)


def test_delta_fine_tunes_from_the_teacher(finished, monkeypatch):
    """On its own data the teacher stays where it is; a turned mixture is turned."""
    teacher = sample.load(finished[0] / "checkpoint.pt")
    options = toy2d.Toy.Options(teacher.config["mixture"], conditional=True)
    own = delta.fine_tuned(teacher, toy2d.Toy(options), 40)
    pairs = zip(own.network.parameters(), teacher.network.parameters(), strict=True)
    change = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    norm = torch.stack([p.norm() for p in teacher.network.parameters()]).norm()
    assert 0 < change < 0.2 * norm
    turned = delta.turned(load_mixture("grid"), 90, 0.5)
    means = load_mixture("grid").means
    torch.testing.assert_close(turned.means[:, 0], 0.5 - means[:, 1])
    torch.testing.assert_close(turned.means[:, 1], means[:, 0])


def test_bench_prints_its_two_tables(capsys):
    bench.run(rounds=1, depth=1, context=4, batch_size=1)
    printed = capsys.readouterr().out
    assert "train.py" in printed and "bare loop" in printed and "MM-DiT depth 1" in printed


def test_a_table_shows_no_nan():
    assert toy2d.shown(math.nan, ".2f") == toy2d.shown(math.inf, ".1%") == "diverged"
    runs = [made_up(name, "ring", 0, [math.nan] * 4) for name in ("rf", "v/cos")]
    table = rank.rank_table(runs, ["rf", "v/cos"], ["ring"])
    assert "nan" not in table and table.count("diverged") == 8
    away = toy2d.sample_metrics(
        torch.full((9, 2), math.nan), torch.zeros(9, 2), load_mixture("ring")
    )
    assert away["outliers"] == 1 and "nan" not in toy2d.metrics_table({"x": away})


def test_bad_input(tmp_path, monkeypatch, capsys):
    for args, says in (
        (["--mixtures", "rong"], "'rong'; choose from ring, grid"),
        (["--names", "ref"], "'ref'; choose from rf"),
        (["--seeds", "0"], "from 1 to 1,000"),
    ):
        main = lambda: command(rank.run, rank.__doc__)
        assert_one_line(in_process(main, args, tmp_path, monkeypatch, capsys), says)
