"""Few steps: PeRFlow against every rival that its paper names, on the ring and the grid.

    python -m studies.fewstep        an hour on two cores

All learn from the same teacher with as many of its evaluations, rows and steps. Learning rates are
scanned on the first seed, five a method; the best of them meets the other seeds. A method has as
many evaluations as its sampler can use: what it cannot do in so few is left out."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

import toy2d
from checkpoint import load_weights, save
from options import Count, Recipe, command
from pictures import WARM, Canvas, hues, tile
from rf import SOLVERS, Field, formulation, solve
from sample import Sampler
from studies.delta import learned
from studies.rivals import COUNTS, METHODS, flow, multistep, pair_count
from studies.runs import markdown, run_file, run_missing, shown
from toy2d import Toy, load_mixture, yardsticks

FACTORS = (1 / 4, 1 / 2, 1, 2, 4)

UNTRAINED = {  # name: (solver, the power of its times i/n)
    "Euler (DDIM)": ("euler", 1),
    "Heun": ("heun", 1),
    "RK4": ("rk4", 1),
    "DPM-Solver++(2M)": ("dpm", 1),
    "DPM-Solver++(2M) on (i/n)^1.5": ("dpm", 1.5),
    "DEIS": ("deis", 1),
    "DEIS on (i/n)^1.5": ("deis", 1.5),
    "ab2": ("ab2", 1),
    "ab2 on (i/n)^1.5": ("ab2", 1.5),
}


def few_steps(field: Field, noise: Tensor, solver: str, power: float, steps: int) -> Tensor:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power
    if solver in SOLVERS:
        return solve(field, noise, times=times, method=solver)
    return multistep(field, noise, times, solver)


# ---- A run: of the ring or the grid, judged by the exact field
def teacher_of(mixture: str, seed: int, out: File) -> Sampler:
    """A toy model as `train.py` trains it, kept in `out`."""
    data = Toy(Toy.Options(mixture))
    file = run_file(out, (mixture, seed)).with_suffix(".pt")
    recipe = Recipe(**data.recipe(data.options) | {"seed": seed})
    if not file.exists():
        model = learned(None, data, formulation(recipe.formulation), recipe)
        save(file, model.network.state_dict())
    network = Toy.network(data.spec(), recipe).requires_grad_(False)
    load_weights(network, torch.load(file, weights_only=True), file)
    return Sampler(network, formulation(recipe.formulation), vars(recipe) | {"spec": data.spec()})


@torch.no_grad()
def judged(draw: Callable[[Tensor], Tensor], mixture: str) -> dict[str, float]:
    scores = yardsticks(draw, load_mixture(mixture))
    return {key: scores[key] for key in ("energy", "outliers")}


def untrained(job: tuple[str, str, int], steps: int, out: File) -> dict:
    """The run (mixture, "teacher", seed): {solver: {evaluations: scores}} of the teacher, and its
    energy distance in 50 steps of Heun, which hardly errs."""
    torch.set_num_threads(1)
    mixture, _, seed = job
    field, scores = flow(teacher_of(mixture, seed, out)), {}
    for name, (solver, power) in UNTRAINED.items():
        stages, how = len(SOLVERS.get(solver, "1")[0]), dict(solver=solver, power=power)
        draws = {n: partial(few_steps, field, **how, steps=n // stages) for n in COUNTS}
        scores[name] = {str(n): judged(d, mixture) for n, d in draws.items() if n % stages == 0}
    floor = judged(partial(few_steps, field, solver="heun", power=1, steps=50), mixture)["energy"]
    return dict(job=job, steps=steps, scores=scores, floor=floor)


def trained(job: tuple[str, str, float, int], steps: int, out: File) -> dict:
    """The run (mixture, method, learning rate, seed): {evaluations: scores}, seconds of training,
    and 1,000 samples in the fewest evaluations."""
    torch.set_num_threads(1)
    mixture, name, lr, seed = job
    teacher, data = teacher_of(mixture, seed, out), Toy(Toy.Options(mixture))
    recipe = data.recipe(data.options) | data.distil
    recipe |= dict(lr=lr, steps=steps, seed=seed, dropout=0.0)
    start = time.perf_counter()
    students = METHODS[name].train(teacher, data, Recipe(**recipe))
    spent, scores = time.perf_counter() - start, {}
    for n, model in students.items():
        fresh = torch.Generator().manual_seed(1000 + seed)  # of samplers that draw
        draw = partial(model.sample, steps=n, generator=fresh)
        scores[str(n)] = judged(draw, mixture)
    n, model = next(iter(students.items()))
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    x0 = model.sample(noise, steps=n, generator=fresh).tolist()
    return dict(job=job, steps=steps, scores=scores, seconds=spent, samples=x0)


# ---- The tables and the picture
def energy(run: dict) -> float:
    """In its fewest evaluations."""
    found = next(iter(run["scores"].values()))["energy"]
    return found if math.isfinite(found) else math.inf


def cells(scores: Sequence[dict]) -> list[str]:
    """Of all seeds: the energy distance by evaluations, and the outliers in 1 and 4."""
    column = lambda n, key: [s[str(n)][key] for s in scores if str(n) in s]
    told = [shown(column(n, "energy"), ".1e") if column(n, "energy") else "–" for n in COUNTS]
    share = [f"{np.mean(c):.1%}" if (c := column(n, "outliers")) else "–" for n in (1, 4)]
    return told + share


def table(bases: list[dict], runs: list[dict]) -> str:
    heads = "outliers in 1", "in 4", "lr", "seconds", "pairs", "holds"
    rows = [["method", *map(str, COUNTS), *heads]]
    for name in UNTRAINED:
        rows.append([name, *cells([run["scores"][name] for run in bases]), *"––––"])
    pairs = f"{pair_count(runs[0]['steps'], Toy.distil['batch_size']):,}"
    for name, method in METHODS.items():
        own = [run for run in runs if run["job"][1] == name]
        spent = min(run["seconds"] for run in own)  # of the run that was disturbed least
        kept, lr = pairs if method.pairs else "–", own[0]["job"][2]
        told = f"{lr:g}", f"{spent:.0f}", kept, method.holds
        rows.append([name, *cells([run["scores"] for run in own]), *told])
    return markdown(*rows)


def draw(runs: list[dict], mixture: str):
    """What the first seed's students draw in their fewest evaluations, from the same noise."""
    truth, generator = load_mixture(mixture), torch.Generator().manual_seed(0)
    scene, colours = truth.scene(), hues(torch.randn(1000, 2, generator=generator))
    data, _ = truth.sample(1000, generator)
    panels = [Canvas(scene, 260).glow(0).points(data, [WARM] * 1000, 3).done("the data")]
    for run in runs:
        x = torch.tensor(run["samples"]).nan_to_num().clamp(-9, 9)
        n = next(iter(run["scores"]))
        label = f"{run['job'][1]}: {n} step{'s' * (n != '1')}"
        panels.append(Canvas(scene, 260).glow(0).points(x, colours, 3).done(label))
    return tile([panels[:7], panels[7:]])


def report(mixture: str, bases: list[dict], scan: list[dict], runs: list[dict], out: File) -> None:
    print(f"\n{mixture}: energy distance above the exact field's, by evaluations\n")
    print(table(bases, runs))
    floor = shown([base["floor"] for base in bases], ".1e")
    print(f"\nThe teachers themselves have {floor} in 50 steps of Heun.")
    print(f"\n{mixture}: the scans, in the fewest evaluations; times the middle one\n")
    rows = [["method", "middle", *(f"{factor:g}" for factor in FACTORS)]]
    for name, method in METHODS.items():
        values = [energy(run) for run in scan if run["job"][1] == name]
        rows.append([name, f"{method.lr:g}", *(toy2d.shown(v, ".1e") for v in values)])
    print(markdown(*rows))
    file = run_file(out, ("fewstep", mixture)).with_suffix(".png")
    draw(runs[: len(METHODS)], mixture).save(file)
    print(f"\nwrote {file}")


def run(
    mixtures: Annotated[list[str], "of the toy"] = ("ring", "grid"),
    seeds: Annotated[Count, "teachers, each with its students", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a student", 70, 10**6] = 8000,
    out: Annotated[File, "where runs are kept"] = File("runs/fewstep"),
) -> None:
    for mixture in mixtures:
        load_mixture(mixture)
    # teachers, the scans on the first seed, the best of them on the others
    make = partial(run_missing, out, steps=steps)
    bases = make(
        jobs=[(m, "teacher", s) for m in mixtures for s in range(seeds)],
        work=partial(untrained, steps=steps, out=out),
        keys={"scores", "floor"},
    )
    work, keys = partial(trained, steps=steps, out=out), {"scores", "seconds", "samples"}
    rates = {name: [method.lr * factor for factor in FACTORS] for name, method in METHODS.items()}
    jobs = [(m, name, lr, 0) for m in mixtures for name in METHODS for lr in rates[name]]
    scan = make(jobs=jobs, work=work, keys=keys)
    of = itertools.groupby(scan, key=lambda run: run["job"][:2])  # neighbours: one scan each
    best = [min(own, key=energy)["job"][:3] for _, own in of]
    jobs = [(*choice, seed) for seed in range(seeds) for choice in best]
    runs = make(jobs=jobs, work=work, keys=keys)
    for mixture in mixtures:
        own = ([run for run in part if run["job"][0] == mixture] for part in (bases, scan, runs))
        report(mixture, *own, out)


if __name__ == "__main__":
    command(run, __doc__)
