"""Few steps: PeRFlow against every rival that its paper names, on the ring, the grid and shapes.

    python -m studies.fewstep       two hours on two cores
    python -m studies.fewstep --problems shapes --seeds 3 --steps 400       an hour and a half

The study trains its teachers. Learning rates are scanned on a seed and on noise of their own, the
same number for each method, on shapes in half as many steps; the best one meets the seeds that are
reported."""

import time
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from data.pictures import WARM, Canvas, hues, tile
from data.shapes import Shapes
from data.toy import Toy, number, scene
from rf import SOLVERS, Field, formulation, solve
from sample import Sampler
from studies.rivals import COUNTS, METHODS, flow, multistep, pair_count
from studies.runs import (
    SHAPES,
    TOY,
    judged,
    learned,
    markdown,
    mean_and_error,
    run_file,
    run_missing,
    scan,
    true_pictures,
)
from toy2d import load_mixture, yardsticks
from training.checkpoint import load_weights, save
from training.options import Count, Recipe, command, pick, preset, reading
from training.ranks import compile_blocks

UNTRAINED = {"Euler (DDIM)": ("euler", 1), "Heun": ("heun", 1), "RK4": ("rk4", 1)}
for name, solver in {"DPM-Solver++(2M)": "dpm", "DEIS": "deis", "ab2": "ab2"}.items():
    UNTRAINED |= {name: (solver, 1), f"{name} on (i/n)^1.5": (solver, 1.5)}  # and the times' power
METRICS = {  # form of a figure, by problem: the first one chooses rates
    True: dict(wrong=".1%", seen=".1%", unseen=".1%", distance=".4f", tv=".3f", floor=".3f",
               chi2=".2f", mutual=".2f", same=".2f"),
    False: dict(energy=".1e", total_variation=".4f", outliers=".1%"),
}  # fmt: skip


def headline(problem: str) -> tuple[str, str]:
    """The metric that chooses rates, and its form."""
    return next(iter(METRICS[problem == "shapes"].items()))


def solved(field: Field, solver: str, power: float, steps: int, noise: Tensor, *cond) -> Tensor:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** power
    held = lambda z, t: field(z, t, *cond)
    if solver in SOLVERS:
        return solve(held, noise, times=times, method=solver)
    return multistep(held, noise, times, solver)


def data_of(problem: str):
    return Shapes(Shapes.Options()) if problem == "shapes" else Toy(Toy.Options(problem))


def teacher_of(problem: str, seed: int, out: File, **changes: str) -> Sampler:
    """A model as `train.py` trains it, with these changes, kept in `out`: one a seed; of shapes one
    for all."""
    text = problem == "shapes"
    data, seed = data_of(problem), 0 if text else seed
    own = preset("toy2d --network mmdit") if "network" in changes else TOY
    base = SHAPES if text else own
    recipe = Recipe(**base | changes | dict(seed=seed))
    file = run_file(out, (problem, *changes.values(), seed)).with_suffix(".pt")
    if not file.exists():
        save(file, learned(data, recipe).network.state_dict())
    network = data.network(data.spec(), recipe).requires_grad_(False)
    if recipe.compile:
        compile_blocks(network)
    with reading(file, "teacher of this study"):
        load_weights(network, torch.load(file, weights_only=True), file)
    config = vars(recipe) | dict(spec=data.spec(), dataset="shapes" if text else "toy2d")
    return Sampler(network, formulation(recipe.formulation), config)


def measured(problem: str, scan: bool, draw) -> dict[str, float]:
    """The METRICS of draw(noise, *cond) -> x0. No table reports the captions of a scan."""
    if problem != "shapes":
        return yardsticks(draw, load_mixture(problem))
    scores = judged(draw, scan)
    return scores | dict(wrong=1 - (scores["seen"] + scores["unseen"]) / 2)


def untrained(problem: str, _: str, seed: int, steps: int, out: File) -> dict:
    """The run (problem, "teacher", seed): {solver: {evaluations: scores}} of the teacher; and its
    scores in 50 steps of Heun, nearly without an error of the solver. Of shapes `studies.exact
    --text` has the exact field's, from the same noise."""
    teacher, scores = teacher_of(problem, seed, out), {}
    of = lambda *settings: measured(problem, False, partial(solved, flow(teacher), *settings))
    for name, (solver, power) in UNTRAINED.items():
        stages = len(SOLVERS[solver][0]) if solver in SOLVERS else 1  # evaluations of a step
        counts = [n for n in COUNTS if n % stages == 0]
        scores[name] = {str(n): of(solver, power, n // stages) for n in counts}
    if problem == "shapes":
        scores["the data"] = {"1": measured(problem, False, true_pictures())}
    return dict(scores=scores, floor=of("heun", 1, 50))


def student_preset(problem: str) -> dict:
    return preset("shapes student" if problem == "shapes" else "toy2d student")


def recipe_of(problem: str, teacher: Sampler, **changes) -> Recipe:
    """Of a student that is never guided: its teacher's, the preset, these changes."""
    return pick(Recipe, teacher.config | student_preset(problem) | dict(dropout=0.0) | changes)


def trained(problem: str, name: str, lr: float, seed: int, steps: int, out: File) -> dict:
    """{evaluations: scores}, seconds of training, and for a picture 1,000 samples of points in the
    fewest evaluations, of seed 1. Seed 0 is the scan's."""
    teacher, data = teacher_of(problem, seed, out), data_of(problem)
    recipe = recipe_of(problem, teacher, lr=lr, steps=steps, seed=seed)
    start = time.perf_counter()
    students = METHODS[name].train(teacher, data, recipe)
    seconds = time.perf_counter() - start
    generator = lambda seed: torch.Generator().manual_seed(seed)  # some samplers draw
    draw = lambda n: partial(students[n].sample, steps=n, generator=generator(1000 + seed))
    counts = sorted(students)[: 1 if seed == 0 else None]  # a scan looks at the fewest
    scores = {str(n): measured(problem, seed == 0, draw(n)) for n in counts}
    noise, samples = torch.randn(1000, 2, generator=generator(0)), []
    if problem != "shapes" and seed == 1:
        samples = draw(min(students))(noise).double().round(decimals=3).tolist()
    return dict(scores=scores, seconds=seconds, samples=samples)


# ---- Tables
def tables(groups: dict[str, list[dict]], text: bool) -> str:
    """groups {method: [{evaluations: scores}, ...]}, a seed each (of an untrained one on shapes one
    for all). A table of each metric, by evaluations; then some less those of the best student by
    the first one in as many evaluations: the mean of the differences seed by seed."""
    column = lambda name, n, key: [s[str(n)][key] for s in groups[name] if str(n) in s]
    metrics = METRICS[text]
    first = next(iter(metrics))
    able = {n: [m for m in groups if m in METHODS and column(m, n, first)] for n in COUNTS}
    best = {n: min(able[n], key=lambda m, n=n: np.mean(column(m, n, first))) for n in COUNTS}

    def table(key: str, less: bool) -> str:
        rows = [["method", *map(str, COUNTS)]]
        for name in groups:
            rows.append([name])
            for n in COUNTS:
                values, cell = column(name, n, key), "–"
                if values and not (text and np.isnan(values).any()):  # enough were right
                    base = column(best[n], n, key) if less else 0
                    cell = mean_and_error(np.subtract(values, base), metrics[key])
                rows[-1].append(cell)
        title = f"{key} less that of the best student" if less else key
        return f"{title}, by evaluations:\n\n{markdown(*rows)}"

    paired = (first, "distance", "tv") if text else (first,)
    said = [table(key, False) for key in metrics] + [table(key, True) for key in paired]
    return "\n\n".join(said)


def costs(scans: dict[str, dict[float, float]], runs: list[dict], form: str, pairs: int) -> str:
    """The scan of each method, its best rate first, and what its training takes."""
    rows = [["method", "rate", "other rates of the scan", "seconds", "pairs", "holds"]]
    for name, found in scans.items():
        seconds = min(run["seconds"] for run in runs if run["job"][1] == name)  # least disturbed
        best, *others = sorted(found, key=found.get)
        shown = lambda lr: f"{lr:g}: {number(found[lr], form)}"
        cells = shown(best), ", ".join(map(shown, sorted(others))), f"{seconds:.0f}"
        stored = f"{pairs:,}" if METHODS[name].pairs else "–"
        rows.append([name, *cells, stored, METHODS[name].networks])
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
    return tile([panels[i : i + 6] for i in range(0, len(panels), 6)])


# ---- The study
def study(problem: str, seeds: int, steps: int, out: File) -> None:
    """Make the runs of a problem, print its tables and draw its picture."""
    text, numbers = problem == "shapes", range(1, seeds + 1)
    key, form = headline(problem)
    jobs = [(problem, "teacher", seed) for seed in range(1 if text else seeds + 1)]
    teachers = run_missing(out, jobs, partial(untrained, out=out), steps, {"scores", "floor"})
    teachers = teachers if text else teachers[1:]
    keys = {"scores", "seconds", "samples"}
    made = partial(run_missing, work=partial(trained, out=out), keys=keys)
    chosen = {name: method for name, method in METHODS.items() if method.text or not text}
    usual = student_preset(problem)
    middles = {name: usual["lr"] if text else method.lr for name, method in chosen.items()}
    first = lambda run: next(iter(run["scores"].values()))[key]
    folder, length = (out / "scan", steps // 2) if text else (out, steps)

    def scores(pairs: list[tuple[str, float]]) -> map:
        jobs = [(problem, name, lr, 0) for name, lr in pairs]
        return map(first, made(folder, jobs, steps=length))

    scans = scan(middles, 3 if text else 2, scores)
    best = {name: min(found, key=found.get) for name, found in scans.items()}
    jobs = [(problem, name, lr, seed) for seed in numbers for name, lr in best.items()]
    runs = made(out, jobs, steps=steps)
    groups = {name: [run["scores"][name] for run in teachers] for name in teachers[0]["scores"]}
    for name in chosen:
        groups[name] = [run["scores"] for run in runs if run["job"][1] == name]
    floor = mean_and_error([run["floor"][key] for run in teachers], form)
    print(f"\n## {problem}\n\nThe teachers themselves, in 50 steps of Heun: {key} {floor}.\n")
    print(tables(groups, text))
    print(f"\nThe scans on seed 0 ({key}), and costs:\n")
    print(costs(scans, runs, form, pair_count(steps, usual["batch_size"])))
    if not text:
        file = run_file(out, ("fewstep", problem)).with_suffix(".png")
        draw(runs[: len(chosen)], problem).save(file)
        print(f"\nwrote {file}")


def run(
    problems: Annotated[list[str], "mixtures of the toy, or shapes"] = ("ring", "grid"),
    seeds: Annotated[Count, "students of each method", 1, 1000] = 5,
    steps: Annotated[Count | None, "of a student (default: its preset's)", 70, 10**6] = None,
    out: Annotated[File, "where runs are kept"] = File("runs/fewstep"),
) -> None:
    for problem in problems:
        if problem != "shapes":
            load_mixture(problem)
    out.mkdir(parents=True, exist_ok=True)
    for problem in problems:
        study(problem, seeds, steps or student_preset(problem)["steps"], out)


if __name__ == "__main__":
    command(run, __doc__)
