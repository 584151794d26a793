"""Few steps: PeRFlow against every rival that its paper names, on the ring and the grid.

    python -m studies.fewstep        an hour on two cores

The first seed tries five learning rates a method; the other seeds take the best of them."""

import time
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from data.pictures import WARM, Canvas, hues, tile
from data.toy import Toy, number, scene
from rf import SOLVERS, Field, formulation, solve
from sample import Sampler
from studies.rivals import COUNTS, METHODS, flow, multistep, pair_count
from studies.runs import TOY, learned, markdown, mean_and_error, run_file, run_missing
from toy2d import load_mixture, yardsticks
from training.checkpoint import load_weights, save
from training.options import Count, Recipe, command, preset, reading

FACTORS = (1 / 4, 1 / 2, 1, 2, 4)  # of a method's rate
UNTRAINED = {"Euler (DDIM)": ("euler", 1), "Heun": ("heun", 1), "RK4": ("rk4", 1)}
for name, solver in {"DPM-Solver++(2M)": "dpm", "DEIS": "deis", "ab2": "ab2"}.items():
    UNTRAINED |= {name: (solver, 1), f"{name} on (i/n)^1.5": (solver, 1.5)}  # and the times' power


def solved(field: Field, solver: str, power: float, steps: int, noise: Tensor) -> Tensor:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power
    if solver in SOLVERS:
        return solve(field, noise, times=times, method=solver)
    return multistep(field, noise, times, solver)


def teacher_of(mixture: str, seed: int, out: File) -> Sampler:
    """A toy model as `train.py` trains it, kept in `out`."""
    data, file = Toy(Toy.Options(mixture)), run_file(out, (mixture, seed)).with_suffix(".pt")
    recipe = Recipe(**TOY | dict(seed=seed))
    if not file.exists():
        save(file, learned(data, recipe).network.state_dict())
    network = data.network(data.spec(), recipe).requires_grad_(False)
    with reading(file, "teacher of this study"):
        load_weights(network, torch.load(file, weights_only=True), file)
    return Sampler(network, formulation(recipe.formulation), vars(recipe) | {"spec": data.spec()})


def untrained(mixture: str, _: str, seed: int, steps: int, out: File) -> dict:
    """The run (mixture, "teacher", seed): {solver: {evaluations: scores}} of the teacher, and its
    energy distance in 50 steps of Heun, where the solver's error is small."""
    field, truth, scores = flow(teacher_of(mixture, seed, out)), load_mixture(mixture), {}
    for name, (solver, power) in UNTRAINED.items():
        stages = len(SOLVERS[solver][0]) if solver in SOLVERS else 1  # evaluations of a step
        draw = lambda n: partial(solved, field, solver, power, n // stages)
        scores[name] = {str(n): yardsticks(draw(n), truth) for n in COUNTS if n % stages == 0}
    floor = yardsticks(partial(solved, field, "heun", 1, 50), truth)["energy"]
    return dict(scores=scores, floor=floor)


def trained(mixture: str, name: str, lr: float, seed: int, steps: int, out: File) -> dict:
    """{evaluations: scores}, seconds of training, and 1,000 samples in the fewest evaluations."""
    teacher, data = teacher_of(mixture, seed, out), Toy(Toy.Options(mixture))
    recipe = TOY | preset("toy2d student")
    recipe |= dict(lr=lr, steps=steps, seed=seed, dropout=0.0)
    start = time.perf_counter()
    students = METHODS[name].train(teacher, data, Recipe(**recipe))
    seconds = time.perf_counter() - start
    generator = lambda seed: torch.Generator().manual_seed(seed)  # some samplers draw
    draw = lambda n: partial(students[n].sample, steps=n, generator=generator(1000 + seed))
    scores = {str(n): yardsticks(draw(n), load_mixture(mixture)) for n in students}
    samples = draw(min(students))(torch.randn(1000, 2, generator=generator(0)))
    return dict(scores=scores, seconds=seconds, samples=samples.tolist())


def cells(scores: list[dict]) -> list[str]:
    """Energy distances by evaluations, and the outliers in 1 and 4; – where they are too few."""
    column = lambda n, key: [s[str(n)][key] for s in scores if str(n) in s]
    energies = [mean_and_error(c, ".1e") if (c := column(n, "energy")) else "–" for n in COUNTS]
    outliers = [f"{np.mean(c):.1%}" if (c := column(n, "outliers")) else "–" for n in (1, 4)]
    return energies + outliers


def table(teachers: list[dict], runs: list[dict]) -> str:
    heads = "outliers in 1", "in 4", "lr", "seconds", "pairs", "holds"
    rows = [["method", *map(str, COUNTS), *heads]]
    for name in UNTRAINED:
        rows.append([name, *cells([run["scores"][name] for run in teachers]), *"––––"])
    pairs = f"{pair_count(runs[0]['steps'], preset('toy2d student')['batch_size']):,}"
    for name, method in METHODS.items():
        seeds = [run for run in runs if run["job"][1] == name]
        lr, seconds = seeds[0]["job"][2], min(run["seconds"] for run in seeds)  # least disturbed
        costs = f"{lr:g}", f"{seconds:.0f}", pairs if method.pairs else "–", method.networks
        rows.append([name, *cells([run["scores"] for run in seeds]), *costs])
    return markdown(*rows)


def draw(runs: list[dict], mixture: str):
    """Draw the samples of these students in their fewest evaluations, from the same noise."""
    truth, generator = load_mixture(mixture), torch.Generator().manual_seed(0)
    background, colours = scene(truth), hues(torch.randn(1000, 2, generator=generator))
    canvas = lambda: Canvas(background, 260).glow(0)
    data, _ = truth.sample(1000, generator)
    panels = [canvas().points(data, [WARM] * 1000, 3).done("the data")]
    for run in runs:
        n = next(iter(run["scores"]))
        label = f"{run['job'][1]}: {'1 step' if n == '1' else f'{n} steps'}"
        x = torch.tensor(run["samples"]).nan_to_num().clamp(-9, 9)
        panels.append(canvas().points(x, colours, 3).done(label))
    return tile([panels[:7], panels[7:]])


def study(mixture: str, seeds: int, steps: int, out: File) -> None:
    """Make the runs of a mixture, print its tables and draw its picture."""
    # teachers
    jobs = [(mixture, "teacher", seed) for seed in range(seeds)]
    teachers = run_missing(out, jobs, partial(untrained, out=out), steps, {"scores", "floor"})
    # scans on the first seed
    work, keys = partial(trained, out=out), {"scores", "seconds", "samples"}
    rates = [(name, method.lr * factor) for name, method in METHODS.items() for factor in FACTORS]
    scan = run_missing(out, [(mixture, *rate, 0) for rate in rates], work, steps, keys)
    scans = {name: [run for run in scan if run["job"][1] == name] for name in METHODS}
    # the best rates on all seeds, by the energy distance in the fewest evaluations
    energies = lambda run: [score["energy"] for score in run["scores"].values()]
    energy = lambda run: np.nan_to_num(energies(run)[0], nan=np.inf, posinf=np.inf)
    best = [min(group, key=energy)["job"][:3] for group in scans.values()]
    jobs = [(*choice, seed) for seed in range(seeds) for choice in best]
    runs = run_missing(out, jobs, work, steps, keys)
    print(f"\n{mixture}: energy distance above the exact field's, by evaluations\n")
    print(table(teachers, runs))
    floor = mean_and_error([run["floor"] for run in teachers], ".1e")
    print(f"\nThe teachers themselves have {floor} in 50 steps of Heun.")
    print(f"\n{mixture}: the scans, in the fewest evaluations; times the middle one\n")
    rows = [["method", "middle", *(f"{factor:g}" for factor in FACTORS)]]
    for name, group in scans.items():
        values = [number(energy(run), ".1e") for run in group]
        rows.append([name, f"{METHODS[name].lr:g}", *values])
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
    _ = [load_mixture(name) for name in mixtures]
    for mixture in mixtures:
        study(mixture, seeds, steps, out)


if __name__ == "__main__":
    command(run, __doc__)
