"""The paper's experiments, and how fast this code is.

    python study.py rank                     SD3's Table 1 (section 5.1), about 20 minutes
    python study.py delta TEACHER DELTA      PeRFlow's Delta W on customised models
    python study.py exact                    what each path costs, with the exact field
    python study.py paths, densities         pictures of both
    python study.py bench                    the toy's training step against a bare loop, and
                                             MM-DiT's against a large matmul

Time: t = 0 is data, t = 1 is noise. Read before: `rf.py` for the formulations, `train.py` for the
loop.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path as File

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import sample
import toy2d
import train
from data import Parser, positive
from mmdit import MMDiT
from rf import EDM, STUDY, Field, Formulation, formulation, solve
from sample import check_device, default_device


def bare_loop(
    network: torch.nn.Module, mixture: toy2d.GaussianMixture, size: int, block: int, fused: bool
) -> Iterator:
    """What one would write for rf alone: no EMA, schedule or log; `block` batches drawn at once."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=fused)
    while True:
        x0, _ = mixture.sample(size * block)
        t, eps = torch.rand(size * block), torch.randn(size * block, 2)
        z, target = (1 - t)[:, None] * x0 + t[:, None] * eps, eps - x0
        for z_i, t_i, target_i in zip(
            z.split(size), t.split(size), target.split(size), strict=True
        ):
            loss = (network(z_i, t_i) - target_i).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def our_loop(network: torch.nn.Module, mixture: toy2d.GaussianMixture, config: dict) -> Iterator:
    """What train.py runs: `examples` and `update`, with the EMA and the schedule."""
    ema, optimizer = (
        [p.detach().clone() for p in network.parameters()],
        train.make_optimizer(network, config),
    )
    cpu = torch.device("cpu")
    source = train.make_source(config, mixture, cpu, 0, 1)
    for step, batch in enumerate(train.examples(config, formulation("rf"), source, (), 0, 0, cpu)):
        train.update(network, network, ema, optimizer, config, step, [batch])
        yield


def bench(args: argparse.Namespace) -> None:
    """Both halves of the project: the toy's loop, then the network of images."""
    threads = torch.get_num_threads()
    bench_toy(args)
    torch.set_num_threads(threads)
    bench_mmdit(args)


def bench_toy(args: argparse.Namespace) -> None:
    """The loops take turns, so that a busy moment hits all; medians of the rounds' ratios."""
    torch.set_num_threads(1)
    mixture, network = toy2d.load_mixture("ring"), toy2d.MLP()
    config = train.DEFAULTS | train.PRESETS["toy2d"] | {"dataset": "toy2d"}
    size, block = config["batch_size"], config["block"]
    loops = {
        "train.py": our_loop(copy.deepcopy(network), mixture, config),
        "bare loop": bare_loop(copy.deepcopy(network), mixture, size, block, fused=True),
        "bare, plain Adam, batches one by one": bare_loop(
            copy.deepcopy(network), mixture, size, 1, fused=False
        ),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds + 1):
        rounds.append(
            {name: seconds(loop, 10 * block) / (10 * block) for name, loop in loops.items()}
        )
    print(f"{'':38}{'us a step':>10}{'train.py is':>14}")
    for name in loops:
        step = statistics.median(r[name] for r in rounds[1:])
        ratio = statistics.median(r["train.py"] / r[name] for r in rounds[1:])
        print(f"{name:38}{1e6 * step:10.0f}{ratio:13.2f}x")


def bench_mmdit(args: argparse.Namespace) -> None:
    """Forward and backward on noise: size, time, and FLOP/s beside a large matmul's."""
    device = check_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    side = 16 * args.scale  # latents of 32 x 32 in patches of 2: 256 tokens
    network = MMDiT(args.depth, pos_embed_max_size=side).to(device)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)  # at initialisation all gradients but few are zeros
    model = torch.compile(network) if args.compile else network
    B, noise = args.batch_size, partial(torch.randn, device=device)
    inputs = noise(B, 16, 2 * side, 2 * side), torch.rand(B, device=device)
    cond = noise(B, args.context, 4096), noise(B, 2048)

    def step() -> None:
        network.zero_grad()
        with train.autocast({"precision": args.precision}, device):
            out = model(*inputs, *cond)
        out.float().square().mean().backward()

    n = 8192 if device.type == "cuda" else 2048
    a, b = noise(2, n, n, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    product = torch.empty_like(a)
    matmul = 2 * n**3 / timed(lambda: torch.mm(a, b, out=product), device)
    time_step = timed(step, device)
    rate = 3 * B * network.flops(2 * side, 2 * side, args.context) / time_step  # backward is 2
    size = sum(p.numel() for p in network.parameters())
    tokens = f"{side * side} + {args.context} tokens, batch {B}"
    how = f"{args.precision}{' compiled' * args.compile}, {device}"
    print(f"MM-DiT depth {args.depth}, {size / 1e6:.1f}M parameters, {tokens}, {how}")
    print(f"forward + backward {1e3 * time_step:.1f} ms, {rate / 1e12:.3f} TFLOP/s")
    print(f"a {n} x {n} matmul {matmul / 1e12:.3f} TFLOP/s: {rate / matmul:.0%} of it is reached")


def timed(run: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """The median time of a call in seconds, after two to warm up."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def seconds(loop: Iterator, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# SD3's Table 1 in two dimensions

PAPER = {  # mean rank over all settings, at 5 steps, at 50 steps: Pareto fronts of CLIP and FID
    "rf/lognorm(0.00,1.00)": (1.54, 1.25, 1.50),
    "rf/lognorm(1.00,0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50,0.60)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50,1.00)": (2.83, 1.50, 2.50),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0.00,0.60)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "edm(0.60,1.20)": (9.00, 13.00, 9.00),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.20,1.20)": (15.58, 20.25, 15.00),
}
STEPS = (5, 10, 25, 50)


def study_mixture(name: str) -> toy2d.GaussianMixture:
    """A named mixture of unit standard deviation, or, with "-unscaled" behind, as it was before."""
    raw = name.removesuffix("-unscaled")
    if raw not in toy2d.MIXTURES:
        raise ValueError(f"unknown mixture {name!r}; choose from {', '.join(toy2d.MIXTURES)}")
    return toy2d.MIXTURES[raw]() if raw != name else toy2d.load_mixture(name)


@lru_cache(maxsize=4)
def cached_mixture(name: str) -> toy2d.GaussianMixture:
    return study_mixture(name)


def trained(name: str, mixture_name: str, seed: int, steps: int) -> dict:
    """One run of the study: train, sample the EMA weights with each number of steps, measure."""
    torch.set_num_threads(1)
    mixture, formula, cpu = cached_mixture(mixture_name), formulation(name), torch.device("cpu")
    config = train.DEFAULTS | train.PRESETS["toy2d"]
    config |= {"dataset": "toy2d", "steps": steps, "seed": seed, "formulation": name}
    torch.manual_seed(seed)
    network = toy2d.MLP()
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer, ema = train.make_optimizer(network, config), list(average.parameters())
    source = train.make_source(config, mixture, cpu, 0, 1)
    stream = train.examples(config, formula, source, (), 0, 0, cpu)
    for step, batch in zip(range(steps), stream, strict=False):
        train.update(network, network, ema, optimizer, config, step, [batch])
    stream.close()
    run = {"name": name, "mixture": mixture_name, "seed": seed, "steps": steps}
    run["excess"] = toy2d.relative_excess(average, formula, mixture)
    return run | {str(n): measured(formula, average, mixture, seed, n) for n in STEPS}


@torch.no_grad()
def measured(formula, network, mixture: toy2d.GaussianMixture, seed: int, steps: int) -> dict:
    """Energy distance above the exact field's from the same noise, and the share of outliers."""
    data, _, noise, exact = toy2d.reference(mixture, seed)
    figures = toy2d.sample_figures(formula.sample(network, noise, steps=steps), data, mixture)
    return {"energy": figures["energy"] - exact["energy"], "outliers": figures["outliers"]}


def run_file(out: File, name: str, mixture: str, seed: int) -> File:
    return out / f"{re.sub('[^a-z0-9.-]+', '_', name)}-{mixture}-{seed}.json"


@contextlib.contextmanager
def cancelling(pool: ProcessPoolExecutor) -> Iterator[None]:
    """On Ctrl-C or a failed run, do not start what still waits: finished runs are kept."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def run_missing(out: File, jobs: list[tuple[str, str, int]], steps: int) -> list[dict]:
    """The runs of these (name, mixture, seed): read from `out`, or made and kept there."""
    out.mkdir(parents=True, exist_ok=True)
    there = [run_file(out, *job) for job in jobs if run_file(out, *job).exists()]
    other = {json.loads(file.read_text())["steps"] for file in there} - {steps}
    if other:
        raise ValueError(f"--out {out} holds runs of {other.pop()} steps, not {steps}")
    missing = [job for job in jobs if not run_file(out, *job).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool, cancelling(pool):
        running = {pool.submit(trained, *job, steps): job for job in missing}
        bar = tqdm(as_completed(running), initial=len(jobs) - len(missing), total=len(jobs))
        for future in bar:
            file = run_file(out, *running[future])
            file.with_suffix(".tmp").write_text(json.dumps(future.result()))
            file.with_suffix(".tmp").replace(file)
    return [json.loads(run_file(out, *job).read_text()) for job in jobs]


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equals share their mean rank."""
    values = np.asarray(values, dtype=float)
    values = np.where(np.isnan(values), np.inf, values)  # diverged: last
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def mean_ranks(runs: list[dict], names: list[str], steps: Sequence[int]) -> np.ndarray:
    """Each name's rank by energy distance, averaged over seeds, mixtures and these step counts."""
    settings: dict[tuple, dict[str, float]] = {}
    for run in runs:
        for n in steps:
            key = run["mixture"], run["seed"], n
            settings.setdefault(key, {})[run["name"]] = run[str(n)]["energy"]
    return np.mean([ranks([s[name] for name in names]) for s in settings.values()], axis=0)


def rank_table(runs: list[dict], names: list[str], mixtures: Sequence[str]) -> str:
    """The study's table in Markdown, best mean rank first, and the correlation with the paper's."""
    columns = [mean_ranks(runs, names, steps) for steps in (STEPS, STEPS[:1], STEPS[-1:])]
    shown = [(m, n) for m in mixtures for n in STEPS]
    lines = [
        "| variant | rank all | 5 | 50 | paper all | 5 | 50 | "
        + " | ".join(f"{m} {n}" for m, n in shown)
        + " | outliers 50 | excess |",
        "|---|" + "---|" * (6 + len(shown) + 2),
    ]
    for i in np.argsort(columns[0], kind="stable"):
        own = [run for run in runs if run["name"] == names[i]]
        row = [f"{column[i]:.2f}" for column in columns]
        row += [f"{x:.2f}" for x in PAPER.get(names[i], ())] or ["–"] * 3
        for m, n in shown:
            energies = [run[str(n)]["energy"] for run in own if run["mixture"] == m]
            mean = 1e3 * np.mean(energies)
            row.append(f"{mean:.2f}" if mean < 1000 else "diverged")
        row.append(f"{np.mean([run['50']['outliers'] for run in own]):.1%}")
        row.append(f"{np.mean([run['excess'] for run in own]):.1e}")
        lines.append(f"| {names[i]} | " + " | ".join(row) + " |")
    known = [i for i, name in enumerate(names) if name in PAPER]
    if len(known) > 2:
        paper = np.array([PAPER[names[i]] for i in known]).T
        r = [rank_correlation(c[known], p) for c, p in zip(columns, paper, strict=True)]
        lines += [
            "",
            "Energy distances in thousandths, above the exact field's from the same noise. "
            f"Rank correlation with the paper: {r[0]:.2f} (all), {r[1]:.2f} (5 steps), "
            f"{r[2]:.2f} (50 steps); the paper ranks by Pareto fronts of CLIP and FID.",
        ]
    return "\n".join(lines)


def rank(args: argparse.Namespace) -> None:
    """Train the variants, as far as they are not there yet, and print and save the table."""
    names = args.names or (STUDY if args.all else list(PAPER))
    for name in names:
        formulation(name)
    for mixture in args.mixtures:
        study_mixture(mixture)
    jobs = [(n, m, s) for s in range(args.seeds) for m in args.mixtures for n in names]
    table = rank_table(run_missing(args.out, jobs, args.steps), names, args.mixtures)
    file = args.out / f"table-{'-'.join(args.mixtures)}.md"
    file.write_text(table + "\n")
    print(f"{table}\n\nwrote {file}")


# --------------------------------------------------------------------------------------------------
# PeRFlow's plug and play: Delta W on models fine-tuned from the same teacher


def turned(mixture: toy2d.GaussianMixture, degrees: float, shift: float) -> toy2d.GaussianMixture:
    """The mixture turned about the origin and moved to the right."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    means = mixture.means @ turn.T + torch.tensor([shift, 0], dtype=torch.float64)
    return toy2d.GaussianMixture(means, turn @ mixture.covs @ turn.T, mixture.weights)


def delta(args: argparse.Namespace) -> None:
    """Fine-tune the teacher on changed mixtures, plug Delta W in, and compare K-step samples."""
    torch.set_num_threads(1)
    teacher, cpu = sample.load(args.teacher), torch.device("cpu")
    if teacher.config["dataset"] != "toy2d" or teacher.flow:
        raise ValueError(f"{args.teacher} is no teacher on toy2d")
    mixture = toy2d.GaussianMixture(**teacher.config["mixture"])
    print("| customised by | steps | energy | with delta | lower by | outliers | with delta |")
    print("|---|---|---|---|---|---|---|")
    for degrees, shift in ((5, 0), (10, 0), (22.5, 0), (0, 0.3)):
        custom = turned(mixture, degrees, shift)
        config = teacher.config | {"steps": args.steps, "lr": 1e-3, "warmup": 100, "reuse": 1}
        network = copy.deepcopy(teacher.network).requires_grad_(True)
        average = copy.deepcopy(teacher.network)
        optimizer, ema = train.make_optimizer(network, config), list(average.parameters())
        source = train.make_source(config, custom, cpu, 0, 1)
        null = network.null_cond
        stream = train.examples(config, teacher.formulation, source, null, 0, 0, cpu)
        for step, batch in zip(range(args.steps), stream, strict=False):
            train.update(network, network, ema, optimizer, config, step, [batch])
        stream.close()
        own = replace(teacher, network=average)
        plugged = sample.plugged(replace(own, network=copy.deepcopy(average)), args.delta)
        K, y = plugged.flow.windows, []
        for model in (own, plugged):
            run = partial(model.sample, steps=K)
            y.append(toy2d.yardsticks(run, custom, config["conditional"]))
        ratio = y[0]["energy"] / y[1]["energy"]
        name = f"turning {degrees}°" if degrees else f"moving {shift}"
        energies = f"{y[0]['energy']:.2e} | {y[1]['energy']:.2e} +- {y[1]['energy_error']:.0e}"
        outliers = f"{y[0]['outliers']:.1%} | {y[1]['outliers']:.1%}"
        print(f"| {name} | {K} | {energies} | {ratio:.1f}x | {outliers} |", flush=True)


# --------------------------------------------------------------------------------------------------
# What a path costs by itself: the exact field in few steps, nothing trained

SHOWN = {
    "rf": "rf",
    "cosine": "v/cos",
    "LDM-linear": "v/linear",
    "EDM": "edm(-1.20,1.20)",
    "EDM, rf's log-SNR": "edm/rf",
    "EDM, cosine's log-SNR": "edm/cos",
}


def exact_network(formula: Formulation, mixture: toy2d.GaussianMixture) -> Field:
    """The best network there is: E[target | z], called as any network is."""

    def network(z_in: Tensor, t: Tensor) -> Tensor:
        z = z_in / formula.path.c_in(t)[:, None]
        return formula.pair(*mixture.ends(z, t, formula.path), t)[1]

    return network


def exact_samples(formula: Formulation, mixture, noise: Tensor, steps: int, method: str) -> Tensor:
    """The exact field's samples on the path's default grid, ending with x0_hat.

    first order: the plane step. heun, rk4: dz = u dt, in sigma instead of t where a = 1 (EDM).
    """
    if method == "first order":
        return formula.sample(exact_network(formula, mixture), noise, steps=steps)
    path = formula.path
    times = path.grid(steps)
    z = path.b(times[0]).float() * noise
    if isinstance(path, EDM):
        in_sigma = lambda z, sigma: mixture.ends(z, path.time(-2 * sigma.double().log()), path)[1]
        z = solve(in_sigma, z, steps=steps, times=path.b(times), method=method)
    else:
        z = solve(mixture.field(path), z, steps=steps, times=times, method=method)
    return mixture.ends(z, times[-1:].clamp(min=1e-6), path)[0]


@torch.no_grad()
def exact(args: argparse.Namespace) -> None:
    """The discretisation error of each path, by solver and number of steps."""
    counts = (1, 2, 5, 10, 25, 50)
    for name in args.mixtures:
        mixture = study_mixture(name)
        data, _, noise, best = toy2d.reference(mixture, 0)
        print(f"\n{name}: energy distance above the converged exact field's, in thousandths\n")
        print("| path | solver | " + " | ".join(f"{n} steps" for n in counts) + " |")
        print("|---|---|" + "---|" * len(counts))
        for label, key in SHOWN.items():
            for method in ("first order", "heun", "rk4"):
                row = []
                for n in counts:
                    x = exact_samples(formulation(key), mixture, noise, n, method)
                    row.append(toy2d.energy_distance(x, data) - best["energy"])
                cells = " | ".join(f"{1e3 * e:.2f}" if math.isfinite(e) else "–" for e in row)
                print(f"| {label} | {method} | {cells} |", flush=True)


@torch.no_grad()
def paths(args: argparse.Namespace) -> None:
    """The exact flow lines of each path, in its own coordinates, and five first-order steps."""
    mixture = toy2d.load_mixture(args.mixture)
    noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(3))
    colours, panels = toy2d.hues(noise), []
    for label, key in list(SHOWN.items())[:4]:
        formula, canvas = formulation(key), toy2d.Canvas(mixture, 420).glow(0)
        network = exact_network(formula, mixture)
        for steps, alpha in ((400, 90), (5, 230)):
            zs = []

            def spy(z_in: Tensor, t: Tensor) -> Tensor:
                zs.append(z_in / formula.path.c_in(t)[:, None])
                return network(z_in, t)

            zs.append(formula.sample(spy, noise, steps=steps))
            kept = slice(None) if steps > 5 else slice(0, 12)
            canvas.lines(torch.stack(zs)[:, kept], colours[kept], alpha)
        for z in zs:
            canvas.points(z[:12], [(255, 255, 255)] * 12, 4)
        panels.append(canvas.done(label))
    sheet = toy2d.tile(
        [panels[:2], panels[2:]], "Exact flow lines; in white, five first-order steps"
    )
    sheet.save(args.out)
    print(f"wrote {args.out}")


def plot(curves: dict[str, tuple[Tensor, Tensor]], title: str, size: int = 420) -> Image.Image:
    """Lines (x, y) in one frame, with a legend; y is cut to the frame, 0 to 4 or -12 to 12."""
    low, high = (0, 4) if min(y.min() for _, y in curves.values()) >= 0 else (-12, 12)
    image = Image.new("RGB", (2 * size, 2 * size), toy2d.FRAME)
    draw, left = ImageDraw.Draw(image), 70
    place = lambda x, y: (
        left + x * (2 * size - left - 30),
        (high - y) / (high - low) * 1.7 * size + 90,
    )
    font = ImageFont.load_default(26)
    for tick in range(5):
        y = low + (high - low) * tick / 4
        draw.line([place(0, y), place(1, y)], fill=(48, 54, 74), width=2)
        draw.text((8, place(0, y)[1] - 16), f"{y:g}", toy2d.INK, font)
        draw.text((place(tick / 4, low)[0] - 20, 2 * size - 44), f"{tick / 4:g}", toy2d.INK, font)
    angle = 2 * math.pi * torch.arange(len(curves)) / len(curves)
    colours = toy2d.hues(torch.stack([angle.cos(), angle.sin()], dim=1))
    rows = list(enumerate(zip(curves.items(), colours, strict=True)))
    for i, ((name, (x, y)), colour) in reversed(rows):  # wide ones first: equal curves show as rims
        y = y.clamp(low, high)
        points = [place(*point) for point in zip(x.tolist(), y.tolist(), strict=True)]
        draw.line(points, fill=colour, width=4 + i, joint="curve")
        draw.text((left + 16 if low == 0 else 2 * size - 330, 96 + 34 * i), name, colour, font)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    ImageDraw.Draw(image).text((36, 12), title, toy2d.INK, ImageFont.load_default(16))
    return image


def densities(args: argparse.Namespace) -> None:
    """SD3's figure 11, the densities of t for rf, and the log-SNR of every path."""
    t = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    sampled = ("rf", "rf/lognorm(0.00,1.00)", "rf/lognorm(0.50,0.60)", "rf/mode(1.29)", "rf/cosmap")
    pi = {name: (t, formulation(name).density.density(t)) for name in sampled}
    snr = {label: (t, formulation(key).path.log_snr(t)) for label, key in SHOWN.items()}
    left = plot(pi, "timestep densities pi(t) for rf, over t")
    right = plot(snr, "log-SNR lambda(t) of the paths, over t")
    toy2d.tile([[left, right]]).save(args.out)
    print(f"wrote {args.out}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "bench", help="the toy's step against a bare loop, MM-DiT's against a large matmul"
    ).add_argument
    add("--rounds", type=positive, default=12, help="of the toy, 250 steps each (default: 12)")
    add("--depth", type=positive, default=6, help="blocks, heads, width / 64 (default: 6)")
    add(
        "--scale",
        type=positive,
        default=1,
        help="latents of 32 SCALE, 256 SCALE^2 tokens (default: 1)",
    )
    add("--context", type=positive, default=77, help="context tokens (default: 77)")
    add("--batch-size", type=positive, default=4, help="(default: 4)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: fp32)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", default=default_device(), help="cpu, cuda, ...")
    add = commands.add_parser("rank", help="SD3's Table 1 on 2-D mixtures").add_argument
    add("--all", action="store_true", help="all 61 formulations instead of the table's 16")
    add("--names", nargs="+", help="these formulations only")
    add("--mixtures", nargs="+", default=["ring", "grid"], help="(default: ring grid)")
    add("--seeds", type=positive, default=3, help="runs of each (default: 3)")
    add("--steps", type=positive, default=11_000, help="training steps of a run (default: 11000)")
    add(
        "--out",
        type=File,
        default=File("runs/study"),
        help="where runs are kept (default: runs/study)",
    )
    add = commands.add_parser("delta", help="PeRFlow's Delta W on customised models").add_argument
    add("teacher", help="a toy2d checkpoint")
    add("delta", help="the delta.pt of a student of it")
    add("--steps", type=positive, default=3000, help="of fine-tuning (default: 3000)")
    add = commands.add_parser("exact", help="what each path costs without a network").add_argument
    add("--mixtures", nargs="+", default=["ring"], help="(default: ring)")
    add = commands.add_parser("paths", help="draw the exact flow lines of each path").add_argument
    add("--mixture", default="ring", help="(default: ring)")
    add("--out", type=File, default=File("paths.png"), help="(default: paths.png)")
    add = commands.add_parser(
        "densities", help="draw SD3's figure 11 and the log-SNRs"
    ).add_argument
    add("--out", type=File, default=File("densities.png"), help="(default: densities.png)")
    args = parser.parse_args()
    runs = {run.__name__: run for run in (bench, rank, delta, exact, paths, densities)}
    with parser.one_line_errors():
        runs[args.command](args)


if __name__ == "__main__":
    main()
