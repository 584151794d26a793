"""The study's arithmetic on hand-made runs, its resume, and that its table comes from the files."""

import contextlib
import functools
import json
import math
import shutil
import sys
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_one_line, in_process
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import sample
import toy2d
from data.networks import CrossDiT, ResBlock, UViT
from data.toy import Toy
from mmdit import MMDiT, attend, modulate
from rf import STUDY, InputError, formulation
from studies import (
    architectures,
    bench,
    curves,
    delta,
    exact,
    fewstep,
    figures,
    more,
    rank,
    runs,
    scaling,
    times,
)
from studies.rivals import METHODS
from studies.runs import judged
from toy2d import load_mixture
from train import State, train
from training.options import Recipe, command

RESULTS = Path(__file__).parents[1] / "studies" / "results"


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
    settings = zip((*rank.STEPS, *rank.OTHERS), [*energies, *energies], strict=True)
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


def test_fronts_by_hand():
    wrong, distance = [0.1, 0.2, 0.3, 0.1, 0.3], [0.5, 0.4, 0.6, 0.5, 0.4]
    # the first and the fourth are equal: neither beats the other
    assert rank.fronts(wrong, distance).tolist() == [1, 1, 3, 1, 2]


def test_shapes_are_ranked_by_fronts():
    of = lambda name, seed, *pairs: (
        dict(name=name, mixture="shapes", seed=seed, excess=0.1)
        | {key: dict(wrong=w, distance=d) for key, (w, d) in zip(rank.TEXT, pairs, strict=True)}
    )
    made = [
        of("rf", 0, (0, 1), (0, 1), (0, 1), (0, 1), (1, 1)),
        of("v/cos", 0, (1, 2), (1, 2), (1, 2), (1, 0), (0, 0)),
        of("eps/linear", 0, (2, 3), (2, 3), (2, 3), (2, 3), (2, 2)),
    ]
    names = ["eps/linear", "rf", "v/cos"]
    assert rank.mean_ranks(made, names, rank.TEXT[:4], True).tolist() == [11 / 4, 1, 7 / 4]
    said = rank.rank_table(made, names, ["shapes"], True)
    assert said.splitlines()[2].startswith("| rf | 1.00 |")
    assert "100.0%" in said and "(guidance 3)" in said


def test_the_papers_table_is_whole():
    assert len(rank.PAPER) == 16 and all(formulation(name) for name in rank.PAPER)
    assert rank.PAPER["rf"] == (5.67, 6.50, 5.75)


def test_the_table_comes_from_the_saved_runs_and_only_missing_ones_are_made(tmp_path, monkeypatch):
    jobs = [(name, "ring", seed) for seed in (0, 1) for name in ("rf", "eps/linear", "v/cos")]
    for i, (name, mixture, seed) in enumerate(jobs):
        run = made_up(name, mixture, seed, [0.001 * (i + 1)] * 4)
        run |= {"job": jobs[i], "steps": 7}
        runs.run_file(tmp_path, jobs[i]).write_text(json.dumps(run))
    made = runs.run_missing(tmp_path, jobs, None, 7, ["name"])  # none: the files are there
    table = rank.rank_table(made, ["rf", "eps/linear", "v/cos"], ["ring"])
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    heads = [line for line in lines if line[0] in ("variant", "less rf")]
    rows = {name: [line for line in lines if line[0] == name] for name in ("rf", "v/cos")}
    cell = lambda i, head, name="rf": rows[name][i][heads[i].index(head)]
    assert cell(1, "ring 5: energy") == "2.50 ± 1.50"  # the mean of 1 and 4 thousandths
    assert cell(2, "ring 5: energy") == "0.00 ± 0.00"
    assert cell(2, "ring 5: energy", "v/cos") == "2.00 ± 0.00"  # seed by seed
    assert cell(0, "rank, all") == cell(0, "rank, 5, same times") == "1.00"
    assert "Rank correlations with the paper: " in table
    with pytest.raises(ValueError, match="holds runs of 7 steps, not 8"):
        runs.run_missing(tmp_path, jobs, None, 8, ["name"])


def test_one_real_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    """In a thread instead of a process, and with fewer samples, for speed."""
    reference = toy2d.reference
    monkeypatch.setattr(toy2d, "reference", lambda mixture, seed: reference(mixture, seed, 500))
    pool = SimpleNamespace(Pool=lambda n, initializer: ThreadPool(n))
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: pool)
    job = ("rf/cosmap", "ring", 1)
    monkeypatch.setitem(runs.TOY, "batch_size", 64)
    made = lambda: runs.run_missing(tmp_path, [job], rank.trained, 30, ["name"])
    (run,) = made()
    file = runs.run_file(tmp_path, job)
    assert json.loads(file.read_text()) == run and not list(tmp_path.glob("*.tmp"))
    assert run["steps"] == 30 and math.isfinite(run["50"]["energy"]) and run["excess"] < 2
    assert run["5"] != run["5, same times"] and run["5"] != run["5, raw weights"]
    stamp = file.stat().st_mtime_ns
    assert made() == [run] and file.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "change, says",
    [
        ({"job": ["rf", "ring", 1]}, "it is of the job"),  # copied from another
        ({"excess": "low"}, "excess is not of numbers"),
        ({"curve": [[1, [2, None]]]}, "curve is not of numbers"),
        ({"seen": {"right": True}}, "seen is not of numbers"),
        ({"steps": "many"}, "steps is not of numbers"),
        ({"name": "v/cos"}, "name is not of numbers"),  # of another job
        ({}, None),
    ],
)
def test_a_kept_run_is_its_jobs_and_of_numbers(change, says, tmp_path):
    job, keys = ("rf", "ring", 0), {"name", "excess", "curve", "seen"}
    run = dict(job=job, steps=7, name="rf", excess=0.1, curve=[[1, 2.0]], seen={"right": math.nan})
    runs.run_file(tmp_path, job).write_text(json.dumps(run | change))
    with pytest.raises(ValueError, match=says) if says else contextlib.nullcontext():
        runs.run_missing(tmp_path, [job], None, 7, keys)


def test_file_names_of_all_formulations_differ(tmp_path):
    assert len({runs.run_file(tmp_path, (name, "ring", 0)) for name in STUDY}) == 61


@functools.cache
def exact_ring(name, steps, method):
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    return exact.exact_samples(formulation(name), load_mixture("ring"), noise, steps, method)


@pytest.mark.parametrize("method", ["first order", "heun", "rk4"])
@pytest.mark.parametrize("name", ["rf", "v/cos", "edm/rf"])
def test_exact_samples_converge_to_the_same_points(name, method):
    """More steps of any solver on any path bring the same noise to the mixture's modes."""
    x, with_rf = exact_ring(name, 100, method), exact_ring("rf", 200, "rk4")
    assert (toy2d.mahalanobis(x, load_mixture("ring")).min(1).values < 5).float().mean() > 0.95
    assert (x - with_rf).norm(dim=1).median() < (0.1 if method == "first order" else 0.02)


def test_what_the_exact_field_of_shapes_draws(monkeypatch):
    """In four unguided steps true pictures of their captions, in one not; the data have no error.
    Away from the field of no caption, which knows seen pairs alone, unseen ones are lost."""
    monkeypatch.setattr(exact, "judged", lambda draw: judged(draw, False, 8, 8))
    lines = exact.text_table().splitlines()
    rows = {tuple(r[:2]): r[2:] for r in (line.strip("| ").split(" | ") for line in lines[2:])}
    assert rows["1", "4"][:2] == ["100.0%", "100.0%"] and float(rows["1", "4"][2]) < 0.01
    assert float(rows["1", "1"][2]) > 0.1 and float(rows["3", "25"][2]) > 0.1
    assert rows["3", "25"][0] == "100.0%" != rows["3", "25"][1]
    assert float(rows["3", "2"][2]) > float(rows["1", "2"][2])
    data = lines[-1].strip("| ").split("|")
    assert [cell.strip() for cell in data[2:5]] == ["100.0%", "100.0%", "0.0000"]


def test_pictures(tmp_path):
    figures.run(out=tmp_path)
    assert len(Image.open(tmp_path / "paths.png").getcolors(1 << 20)) > 100


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
    options = Toy.Options(teacher.config["mixture"], conditional=True)
    own = delta.fine_tuned(teacher, Toy(options), 40)
    pairs = zip(own.network.parameters(), teacher.network.parameters(), strict=True)
    change = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    norm = torch.stack([p.norm() for p in teacher.network.parameters()]).norm()
    assert 0 < change < 0.2 * norm
    turned = delta.turned(load_mixture("grid"), 90, 0.5)
    means = load_mixture("grid").means
    torch.testing.assert_close(turned.means[:, 0], 0.5 - means[:, 1])
    torch.testing.assert_close(turned.means[:, 1], means[:, 0])


def test_delta_measures_students_and_what_their_delta_lowers(monkeypatch):
    """With little of everything: the numbers are there and the student is another network."""
    reference = toy2d.reference
    monkeypatch.setitem(runs.TOY, "steps", 100)
    monkeypatch.setattr(toy2d, "reference", lambda m, seed, *rest: reference(m, seed, 200))
    monkeypatch.setattr(delta, "STUDENTS", {"slow": (1e-5, 20, 64, 4), "fast": (1e-3, 20, 64, 1)})
    run = delta.trained("ring", 0, steps=20)
    slow, fast = run["students"]["slow"], run["students"]["fast"]
    assert 0 < slow["ratio"] < 0.1 * fast["ratio"] and slow["ratio"] < 1e-3
    assert all(x[change] > 0 for x in (slow, fast) for change in delta.CHANGES)
    assert slow["own"] != fast["own"]
    none = run["students"][delta.UNTRAINED]
    other = {"students": {"slow": slow, "fast": {key: 2 * x for key, x in fast.items()}}}
    other["students"][delta.UNTRAINED] = none
    said = delta.table([run, other]).splitlines()
    assert f"| {none['10°']:.1f} ± 0.0 |" in said[4]
    assert said[2].startswith("| slow |") and f"| {fast['10°']:.1f} |" in said[3]


def test_bench_prints_its_two_tables(capsys, monkeypatch):
    monkeypatch.setitem(runs.TOY, "block", 5)
    started = ["train.py", "sample.py", "data.encode", "studies.rank"]
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **how: None)  # seconds each
    bench.run(rounds=1, depth=1, context=4, batch_size=1)
    printed = capsys.readouterr().out
    assert "bare loop" in printed and "MM-DiT depth 1" in printed
    assert [line.split()[0] for line in printed.splitlines()[:5]] == ["import", *started]
    parts = [line for line in printed.splitlines() if line.startswith("shapes: ")]
    assert len(parts) == 5 and abs(sum(int(p.split()[-1][:-1]) for p in parts[:-1]) - 100) <= 2


def cells_of(text: str) -> dict[str, set[str]]:
    """{first cell: all other cells} of the rows of the tables in a text."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    table = {}
    for first, *cells in rows:
        cells = [cell.replace("e-0", "e-").replace("e+00", "e0") for cell in cells]
        table.setdefault(first, set()).update(cells)
    return table


def test_the_tables_in_results_are_those_of_the_kept_runs(tmp_path, monkeypatch, capsys):
    """Of the runs in runs.zip the commands print them again, cell by cell, and make no run."""
    pool = SimpleNamespace(Pool=lambda n, initializer: ThreadPool(1))
    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda kind: pool)
    monkeypatch.setattr(runs, "made", lambda job, **how: pytest.fail(f"{job} is made"))
    shutil.unpack_archive(RESULTS / "runs.zip", tmp_path)
    points, toy = tmp_path / "runs" / "study", tmp_path / "runs" / "fewstep"
    unscaled = ["rf", "eps/linear", "v/cos", "rf/lognorm(0.00,1.00)", "edm(-1.20,1.20)"]
    plugged = [*delta.STUDENTS, delta.UNTRAINED]
    few = [f"{', '.join(row)}: energy" for row in times.ROWS[:-1]]
    few += [f"{', '.join(times.ROWS[-1])}: {metric}" for metric in ("wrong", "distance", "tv")]
    kinds = "K = 4", "K = 8", "data of the grid", "both", "c_ctxt", "c_vec", "True, 0.003", "0.5"
    students = [name for name, method in METHODS.items() if method.text]
    networks, depths = architectures.VARIANTS, [("mmdit", depth) for depth in (4, 1, 2, 3)]
    asked = (networks, 3, 2000), (networks, 1, 4000), (depths, 3, 2000)
    found = [architectures.runs_of(*what, tmp_path / "runs" / "networks") for what in asked]
    for name, rows, commands in (
        ("rank", rank.PAPER, [
            partial(rank.run, out=points),
            partial(rank.run, problems=["shapes"], out=points),
            partial(rank.run, names=unscaled, problems=["ring-unscaled"], seeds=2, out=points),
        ]),
        ("more", [*kinds, "teacher, 25", "student, 4"], [partial(more.run, out=toy)]),
        ("fewshapes", [*fewstep.UNTRAINED, *students],
         [partial(fewstep.run, ["shapes"], 3, 400, toy)]),
        ("times", few, [partial(times.run, out=toy)]),
        ("fewgrid", [*fewstep.UNTRAINED, *METHODS], [partial(fewstep.run, ["grid"], out=toy)]),
        ("delta", plugged, [partial(delta.run, out=tmp_path / "runs" / "delta")]),
        ("architectures", [f"{network}, depth {depth}" for network, depth in networks],
         [lambda: print(*map(architectures.table, found[:2]), sep="\n")]),
        ("scaling", "1234", [lambda: print(scaling.report(found[2]))]),
    ):  # fmt: skip
        for print_tables in commands:
            print_tables()
        printed = cells_of(capsys.readouterr().out)
        kept = cells_of((RESULTS / f"{name}.md").read_text())
        assert kept.keys() >= {*rows}
        assert all(kept[row] <= printed[row] for row in rows), name


def test_a_table_shows_no_nan():
    runs = [made_up(name, "ring", 0, [math.nan] * 4) for name in ("rf", "v/cos")]
    table = rank.rank_table(runs, ["rf", "v/cos"], ["ring"])
    assert "nan" not in table and table.count("diverged") == 2 * 2 * 8


def test_bad_input(tmp_path, monkeypatch, capsys):
    for args, says in (
        (["--problems", "rong"], "'rong'; choose from ring, grid"),
        (["--names", "ref"], "'ref'; choose from rf"),
        (["--seeds", "0"], "from 1 to 1,000"),
    ):
        main = lambda: command(rank.run, rank.__doc__)
        assert_one_line(in_process(main, args, tmp_path, monkeypatch, capsys), says)


# ---- Architectures and scaling
def random_network(make, depth=2):
    """With weights that are no zeros anywhere."""
    torch.manual_seed(0)
    network = make(
        depth, in_channels=3, patch_size=8, pos_embed_max_size=4, context_dim=5, pooled_dim=6
    )
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network


def inputs():
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    return draw(2, 3, 32, 32), torch.tensor([0.2, 0.7]), draw(2, 8, 5), draw(2, 6)


def test_a_res_block_by_hand():
    """Against PyTorch's own norm over channels, convolutions and modulation."""
    torch.manual_seed(0)
    block, x, c = ResBlock(6, 4, 5), torch.randn(2, 6, 3, 3), torch.randn(2, 5)
    spread = lambda y: (y.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    norm = lambda y: (y - y.mean(1, keepdim=True)) / spread(y)
    silu = torch.nn.functional.silu
    y = block.first(silu(norm(x)))
    shift, scale = block.adaLN_modulation(c)[:, :, None, None].chunk(2, 1)
    y = block.second(silu(norm(y) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, c), block.shortcut(x) + y)
    assert block.shortcut.kernel_size == (1, 1) and ResBlock(4, 4, 5).shortcut(x) is x


def test_a_uvit_by_hand():
    """Its levels, with the grid's rows and columns written out."""
    uvit = random_network(UViT)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    c, context, x = draw(2, 128), draw(2, 8, 128), draw(2, 64, 128)
    narrow = lambda layer, y: y @ layer.weight.flatten(1).T + layer.bias  # of tokens
    grid = lambda y: torch.stack([y[:, 8 * i : 8 * i + 8] for i in range(8)], dim=1).movedim(-1, 1)
    fine = uvit.before(grid(narrow(uvit.narrow, x)), c)  # (2,64,8,8)
    patches = [fine[:, :, i : i + 2, j : j + 2] for i in range(0, 8, 2) for j in range(0, 8, 2)]
    low = torch.stack([p.flatten(1) for p in patches], dim=1)
    low = low @ uvit.down.weight.flatten(1).T + uvit.down.bias
    tokens = torch.cat([context, low], dim=1)
    for block in uvit.joint_blocks:
        tokens = block(c, tokens)
    up = narrow(uvit.up, tokens[:, 8:])
    up = torch.stack([up[:, i // 2 * 4 + j // 2] for i in range(8) for j in range(8)], dim=1)
    out = uvit.after(torch.cat([grid(up), fine], dim=1), c).flatten(2).mT
    expected = narrow(uvit.wide, out)
    torch.testing.assert_close(uvit.mixed(c, context, x), expected, rtol=1e-4, atol=1e-4)


def test_a_new_uvit_starts_with_nothing_of_its_text_and_learns_from_it():
    fresh = UViT(2, in_channels=3, patch_size=8, pos_embed_max_size=4, context_dim=5, pooled_dim=6)
    z, t, context, pooled = inputs()
    assert fresh(z, t, context, pooled).abs().max() == 0
    x, c = torch.randn(2, 64, 8, 8), torch.randn(2, 128)
    assert torch.equal(fresh.before(x, c), x)
    random = random_network(UViT)
    out = random(z, t, context, pooled)
    assert out.shape == z.shape
    assert (out - random(z, t, 2 * context, pooled)).abs().max() > 1e-3
    for side in (24, 20):
        with pytest.raises(ValueError, match=r"uvit takes squares|not divisible"):
            random(z[..., :side], t, context, pooled)
    with pytest.raises(ValueError, match="halves the patches, and their side is 1"):
        UViT(2, patch_size=1)


def test_a_cross_block_by_hand():
    block = random_network(CrossDiT).joint_blocks[0]
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    c, context, x = draw(2, 128), draw(2, 8, 128), draw(2, 16, 128)
    same, out = block(c, context, x)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c)[:, None].chunk(
        6, -1
    )
    heads = lambda y: y.reshape(2, -1, 2, 64).transpose(1, 2)
    merged = lambda y: y.transpose(1, 2).reshape(2, -1, 128)
    q, k, v = map(heads, block.attn.qkv(modulate(x, shift, scale)).chunk(3, -1))
    y = x + gate * block.attn.proj(merged(attend(q, k, v)))
    own = torch.nn.functional.layer_norm(y, (128,))
    k, v = map(heads, block.key_value(context).chunk(2, -1))
    weights = (heads(block.query(own)) @ k.mT / 8).softmax(-1)
    y = y + block.proj(merged(weights @ v))
    y = y + gate_mlp * block.mlp(modulate(y, shift_mlp, scale_mlp))
    assert same is context
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-4)


def test_a_new_cross_dit_starts_as_the_identity_and_learns_from_its_text():
    network = CrossDiT(2, context_dim=5, pooled_dim=6)
    c, context, x = torch.randn(2, 128), torch.randn(2, 3, 128), torch.randn(2, 4, 128)
    assert torch.equal(network.joint_blocks[0](c, context, x)[1], x)
    random = random_network(CrossDiT)
    z, t, context, pooled = inputs()
    assert (random(z, t, context, pooled) - random(z, t, 2 * context, pooled)).abs().max() > 1e-3


def curve_run(name, depth, seed, loss, right):
    """200 steps of 10 ms; the loss above its floor halves in each tenth and ends at `loss`."""
    curve = [[20 * i, 0.2 * i * depth / 4, 0.02 + loss * 2 ** (10 - i)] for i in range(1, 11)]
    scores = dict(seen=right, unseen=right, distance=0.1, tv=0.2, floor=0.1, same=1.0)
    scores = {str(n): scores | dict(seen=right * n / 25) for n in architectures.STEPS}
    run = dict(job=[name, depth, 3e-3, seed], steps=200, curve=curve, flops=1e9 * depth**3)
    run |= dict(floor=0.02, excess=[loss, *8 * [loss / 2]])
    return run | dict(parameters=1e6 * depth, scores=scores)


def test_losses_at_equal_time_by_hand(tmp_path):
    made = [
        curve_run(name, depth, seed, 0.1 + 0.1 * (name in ("mmdit", "dit")) * seed, 0.5 + seed / 10)
        for name, depth in architectures.VARIANTS
        for seed in (0, 1)
    ]
    assert architectures.loss_at(made[0], 200) == pytest.approx(0.12)
    middle = math.sqrt(0.12 * 0.22)
    assert architectures.loss_at(made[0], 190) == pytest.approx(middle)
    lines = architectures.table(made).split("\n\n")[0].splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in lines}
    slow = rows["| dit, depth 5"]  # at equal time it is at step 160
    assert slow[3:7] == ["12", "76.8000 ± 25.6000", "0.1500 ± 0.0500", "0.6000 ± 0.2000"]
    assert rows["| mmdit, depth 4"][8:10] == ["0.0e+00 ± 0.0e+00", "55.0% ± 5.0%"]
    assert rows["| dit, depth 4"][7:9] == ["1.50e-01 ± 5.00e-02", "0.0e+00 ± 0.0e+00"]  # in pairs
    architectures.draw(made, tmp_path / "curves.png")
    assert len(Image.open(tmp_path / "curves.png").getcolors(1 << 20)) > 50


def test_each_network_has_its_rate_by_runs_of_half_as_many_steps(monkeypatch, tmp_path, capsys):
    best, scanned = {"mmdit": 3e-3, "dit": 6e-3}, []

    def made(out, asked, work, steps, keys):
        scan = out == tmp_path / "scan"
        assert steps == (100 if scan else 200) and all(scan == (job[3] == 0) for job in asked)
        assert scan or out == tmp_path / "200"
        scanned.extend(asked if scan else [])
        return [dict(job=job, excess=[abs(math.log(job[2] / best[job[0]]))]) for job in asked]

    monkeypatch.setattr(architectures, "run_missing", made)
    variants = [("mmdit", 4), ("dit", 4), ("dit", 5)]
    found = architectures.runs_of(variants, 2, 200, tmp_path)
    asked = [(name, depth, best[name], seed) for seed in (1, 2) for name, depth in variants]
    assert [run["job"] for run in found] == asked
    assert "the scan of dit's rate" in capsys.readouterr()[0]
    assert {job[:2] for job in scanned} == {("mmdit", 4), ("dit", 4)}


def test_the_frontier_by_hand():
    points = [(4, 0.5, 2), (1, 0.9, 1), (2, 0.7, 1), (3, 0.8, 2), (8, 0.5, 3), (9, 0.4, 3)]
    assert scaling.frontier(points) == [(1, 0.9, 1), (2, 0.7, 1), (4, 0.5, 2), (9, 0.4, 3)]


def test_the_report_of_scaling(tmp_path):
    losses = {1: 0.4, 2: 0.3, 3: 0.2}
    made = [
        curve_run("mmdit", d, s, loss + s / 100, 1 - loss)
        for d, loss in losses.items()
        for s in (0, 1)
    ]
    said = scaling.report(made)
    assert "| 2 | 2.0M | 1.6 | 0.3050 ± 0.0050 | 3.0e-01 ± 5.0e-03 | 70.0% ± 0.0% |" in said
    assert "| 28.0% ± 0.0% | 21.0% ± 0.0% |" in said  # half of 0.7 (1 - 5/25), and of 10/25
    assert "Rank correlation of final loss and errors on seen pairs: 0.96" in said
    scaling.draw(made, tmp_path / "curves.png")
    assert len(Image.open(tmp_path / "curves.png").getcolors(1 << 20)) > 50


def test_curves_have_bands_ticks_and_a_name_at_each_end(tmp_path, monkeypatch):
    """Names do not lie on each other, and one error tells what is missing."""
    figure = pytest.importorskip("matplotlib.figure")
    made, Figure = [], figure.Figure

    def keep(*how, **options):
        made.append(Figure(*how, **options))
        return made[-1]

    monkeypatch.setattr(figure, "Figure", keep)
    ends = {name: [[3, 2, 1 + i / 1e4], [3, 2, 1.001 + i / 1e4]] for i, name in enumerate("abc")}
    even = {name: ([1, 10, 100], y) for name, y in ends.items()}
    panel = curves.Panel("steps", "loss", even)
    curves.draw_curves(tmp_path / "curves.png", panel, panel)
    axes = made[0].axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "steps"
    assert len(axes.collections) == len(axes.lines) == 3  # bands and curves
    texts = {text.get_text(): text for text in axes.texts}
    heights = sorted(texts[name].xyann[1] for name in "abc")
    assert set(texts) == {*"abc"} and np.diff(heights).min() > 0.04
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="the curves need matplotlib: pip install matplotlib"):
        curves.draw_curves(tmp_path / "no.png", panel)


def test_one_real_run_of_an_architecture(monkeypatch):
    changes = dict(validation=8, batch_size=4, precision="fp32", compile=False)
    for key, value in changes.items():
        monkeypatch.setitem(runs.SHAPES, key, value)
    few = lambda draw, spread: judged(draw, False, 2, spread // 128)
    monkeypatch.setattr(architectures, "judged", few)
    run = architectures.trained("crossdit", 1, 3e-3, 1, steps=20)
    steps, spent, losses = zip(*run["curve"], strict=True)
    assert steps == tuple(range(2, 21, 2)) and sorted(spent) == list(spent)
    assert losses[-1] < losses[0] and run["flops"] > 1e7 and 0 < run["floor"] < losses[-1]
    assert len(run["excess"]) == 9 and 0 < run["excess"][0] < 2
    assert "tv" in run["scores"]["25"] and "tv" not in run["scores"]["5"]
    json.dumps(run)


# ---- the plan: what a depth needs, on paper


def allocated(call):
    """Bytes that are there after call() and were not before, by PyTorch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        kept = call()
    return sum(event.self_cpu_memory_usage for event in told.key_averages()), kept


def test_the_plan_is_what_torch_allocates():
    """Of a small network in float32: after the forward pass, with and without checkpointing, and
    after a step of training."""
    torch.manual_seed(0)
    network = MMDiT(3, qk_norm=True, pos_embed_max_size=16, context_dim=64, pooled_dim=32)
    draw = lambda: (torch.randn(4, 16, 32, 32), torch.rand(4), torch.randn(4, 20, 64))
    inputs = *draw(), torch.randn(4, 32)
    whole, checkpointed = bench.activations(network, "fp32", *inputs)
    with FakeTensorMode():
        fake = MMDiT(3, qk_norm=True, pos_embed_max_size=16, context_dim=64, pooled_dim=32)
        said = bench.activations(fake, "fp32", *draw(), torch.empty(4, 32))
    assert said == (whole, checkpointed)
    real, _ = allocated(lambda: network(*inputs))
    assert whole == pytest.approx(real, rel=0.02)
    streams = torch.randn(4, 20, 192), torch.randn(4, 256, 192)
    c, block = torch.randn(4, 192), network.joint_blocks[0]
    for x in (c, *streams):
        x.requires_grad_()
    one, _ = allocated(lambda: block(c, *streams))
    network.checkpointing = True
    real, _ = allocated(lambda: network(*inputs))
    assert checkpointed == pytest.approx(real + one, rel=0.05) and checkpointed < 0.6 * whole


def test_the_plan_counts_weights_gradients_moments_and_average():
    network = MMDiT(2, pos_embed_max_size=4, context_dim=64, pooled_dim=32)
    P = sum(w.numel() for w in network.parameters())
    recipe = Recipe(steps=1, batch_size=1)
    rows = [torch.randn(1, 16, 4, 4), torch.rand(1), torch.randn(1, 16, 4, 4)]
    rows += [torch.randn(1, 8, 64), torch.randn(1, 32)]

    def step():
        state = State(network, recipe)
        train(state, formulation("rf"), iter([[rows]]), recipe)
        return state

    real, _ = allocated(step)
    assert real == pytest.approx(16 * P, rel=0.03)  # beside the weights themselves
    text = bench.planned([1, 2], 256, 3, 4, "bf16").splitlines()
    one, two = (line.strip("| ").split(" | ") for line in text[2:])
    P = sum(w.numel() for w in MMDiT(2, qk_norm=True, pos_embed_max_size=64).parameters())
    assert two[1] == f"{P / 1e9:.3g}B"
    number = lambda cell: float(cell.split()[0])
    assert number(two[6]) == pytest.approx(22 * P / 1e9 + number(two[4]), rel=0.01)
    assert number(two[7]) < number(two[6]) and number(one[2]) < number(two[2])
