"""SD3's figure 4 on shapes: MM-DiT against three rivals.

    python -m studies.architectures       two hours on two cores

All have the same data and draws, and a rate of their own: the best in half as many steps (1,000 at
most) on a seed that is not reported. A DiT has about half the weights of an MM-DiT of its depth, so
the table has a deeper one, too. What a network has not learned is its excess over the exact field,
the best answer there is."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch

from data.networks import NETWORKS
from data.shapes import Shapes
from sample import Sampler
from studies.curves import Panel, draw_curves
from studies.runs import (
    POINTS,
    SHAPES,
    judged,
    learned,
    markdown,
    mean_and_error,
    run_missing,
    scan,
)
from train import validation_loss
from training.folder import training_flops
from training.options import Count, Recipe, command

VARIANTS = [(name, 4) for name in NETWORKS if name != "mlp"] + [("dit", 5)]
SCANNED = 1000  # steps of a scan, at most
STEPS = (5, 10, 25)  # of sampling, at guidance 3; all figures in the last one


# ---- A run
def trained(name: str, depth: int, lr: float, seed: int, steps: int) -> dict:
    """The validation loss over steps and over seconds of training; its floor, and the relative
    excess by t; what is judged at guidance 3, by steps of sampling. Seed 0 is the scan's."""
    data, curve = Shapes(Shapes.Options()), []
    recipe = Recipe(**SHAPES | dict(network=name, depth=depth, lr=lr, steps=steps, seed=seed))
    held_out = data.held_out(recipe.validation)
    flops = recipe.batch_size * training_flops(data.network(data.spec(), recipe), *held_out)
    spent, since = 0.0, time.perf_counter()

    def watch(step: int, sampler: Sampler) -> None:
        nonlocal spent, since
        spent += time.perf_counter() - since
        objective = sampler.objective
        loss = validation_loss(objective.field(sampler.guided()), objective, *held_out)
        curve.append((step, spent, loss))
        since = time.perf_counter()

    sampler = learned(data, recipe, watch=watch)
    _, floor, error, power = data.errors(sampler, recipe.validation).T
    excess = [error.mean() / power.mean(), *(error / power)]
    draw = lambda n: partial(sampler.sample, steps=n, cfg=3.0)
    numbers = STEPS if seed else ()
    scores = {str(n): judged(draw(n), spread=256 * (n == STEPS[-1])) for n in numbers}
    run = dict(curve=curve, flops=flops, floor=floor.mean().item(), scores=scores)
    size = sum(p.numel() for p in sampler.network.parameters())
    return run | dict(parameters=size, excess=torch.stack(excess).tolist())


KEYS = {"curve", "flops", "floor", "scores", "parameters", "excess"}


def runs_of(variants: list, seeds: int, steps: int, out: File) -> list[dict]:
    """The runs of these (network, depth), of seeds that chose nothing, by rates that seed 0 chose
    for each network at its first depth here, in half as many steps, SCANNED at most."""
    made = partial(run_missing, work=trained, keys=KEYS)
    first = {}
    for name, depth in variants:
        first.setdefault(name, depth)

    def scores(pairs: list) -> list[float]:
        jobs = [(name, first[name], lr, 0) for name, lr in pairs]
        found = made(out / "scan", jobs, steps=min(SCANNED, steps // 2))
        return [run["excess"][0] for run in found]

    scans = scan(dict.fromkeys(first, SHAPES["lr"]), 2, scores)
    best = {name: min(found, key=found.get) for name, found in scans.items()}
    for name, found in scans.items():
        cells = ", ".join(f"{lr:g}: {found[lr]:.2e}" for lr in sorted(found))
        print(f"the scan of {name}'s rate (excess): {cells}")
    numbers = range(1, seeds + 1)
    jobs = [(name, depth, best[name], seed) for seed in numbers for name, depth in variants]
    return made(out / str(steps), jobs, steps=steps)


def grouped(runs: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """The runs of each (network, depth), by seed."""
    groups = {}
    for run in runs:
        groups.setdefault((run["job"][0], run["job"][1]), []).append(run)
    return groups


def loss_at(run: dict, step: float) -> float:
    """The validation loss between two points of the curve."""
    at, _, losses = zip(*run["curve"], strict=True)
    return float(np.exp(np.interp(step, at, np.log(losses))))


def table(runs: list[dict]) -> str:
    """One row a variant. Differences are to MM-DiT, seed by seed."""
    groups = grouped(runs)
    pace = lambda seeds: min(run["curve"][-1][1] / run["steps"] for run in seeds)  # seconds a step
    fastest = min(map(pace, groups.values()))
    last = str(STEPS[-1])
    heads = ["network", "weights", "rate", "ms a step", "loss above its floor after a tenth"]
    heads += ["after all steps", "at equal time", "excess", "less MM-DiT's"]
    keys = dict(seen=".1%", unseen=".1%", distance=".3f", tv=".3f", floor=".3f", same=".2f")
    rows = [[*heads, *keys]]
    mine = [run["excess"][0] for run in next(iter(groups.values()))]
    for (name, depth), seeds in groups.items():
        step = seeds[0]["steps"] * fastest / pace(seeds)
        above = lambda losses: [x - run["floor"] for x, run in zip(losses, seeds, strict=True)]
        after = lambda i: above(run["curve"][i][2] for run in seeds)
        losses = after(0), after(-1), above(loss_at(run, step) for run in seeds)
        excess = [run["excess"][0] for run in seeds]
        cells = [f"{name}, depth {depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M"]
        cells += [f"{seeds[0]['job'][2]:g}", f"{1e3 * pace(seeds):.0f}"]
        cells += [*(mean_and_error(x, ".4f") for x in losses), mean_and_error(excess, ".2e")]
        cells.append(mean_and_error(np.subtract(excess, mine), ".1e"))
        for key, form in keys.items():
            values = [run["scores"][last][key] for run in seeds]
            few = np.isnan(values).any()  # too few were right to count their places
            cells.append("–" if few else mean_and_error(values, form))
        rows.append(cells)
    times = ["network", *(f"t = {k}/16" for k in range(1, 16, 2))]
    by_t = [times]
    for (name, depth), seeds in groups.items():
        columns = zip(*(run["excess"][1:] for run in seeds), strict=True)
        by_t.append([f"{name}, depth {depth}", *(mean_and_error(c, ".1e") for c in columns)])
    return f"{markdown(*rows)}\n\nExcess by t:\n\n{markdown(*by_t)}"


def losses_of(runs: list[dict], name: Callable, x: Callable) -> dict:
    """Curves for a panel: {name(variant): (x(run, its points), loss above the floor (seeds,n))}."""
    curves = {}
    for variant, seeds in grouped(runs).items():
        points = np.array([run["curve"] for run in seeds])
        floors = np.array([[run["floor"]] for run in seeds])
        curves[name(variant)] = x(seeds[0], points.mean(0)), points[..., 2] - floors
    return curves


def draw(runs: list[dict], file: File) -> None:
    runs = [run for run in runs if run["job"][1] == VARIANTS[0][1]]
    y, name = "validation loss above its floor", lambda variant: variant[0]
    steps = losses_of(runs, name, lambda run, points: points[:, 0])
    seconds = losses_of(runs, name, lambda run, points: points[:, 1])
    panels = Panel("steps", y, steps), Panel("seconds of training, one thread", y, seconds)
    draw_curves(file, *panels)


def run(
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", 2 * POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    runs = runs_of(VARIANTS, seeds, steps, out)
    print(table(runs))
    draw(runs, out / "architectures.png")
    print(f"\nwrote {out}/architectures.png")


if __name__ == "__main__":
    command(run, __doc__)
