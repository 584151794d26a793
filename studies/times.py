"""How many discrete times PeRFlow needs: N = 1000, 200 and 40 of its code, and 16, ours.

    python -m studies.times        70 minutes on two cores

All by the code's rules: K = 4 windows, a solve of 8 DDIM steps for each row, one time a solve; for
each of its targets: the velocity, eps* of DDIM, and SD1.5's diff_eps. The MLP's rate is the better
one of two on seed 0, which is not reported; an MM-DiT has one rate."""

from functools import partial
from pathlib import Path as File
from typing import Annotated

from perflow import PeRFlow
from studies.fewstep import METRICS, data_of, measured, recipe_of, teacher_of
from studies.runs import learned, markdown, mean_and_error, run_missing
from training.options import Count, command

TIMES = (1000, 200, 40, 16)
TARGETS = {"velocity": {}, "epsilon": {"formulation": "eps/linear"}}  # and its teacher's changes
TARGETS["diff_eps"] = TARGETS["epsilon"]
ROWS = [(problem, "mlp", target) for problem in ("ring", "grid") for target in TARGETS]
ROWS += [("ring", "mmdit", "velocity"), ("shapes", "mmdit", "velocity")]
RATES = {"mlp": (8e-3, 2e-3), "mmdit": (1e-3,), "shapes": (5e-4,)}
PART = {"mlp": 1, "mmdit": 4, "shapes": 10}  # a student has steps // PART
SHOWN = "energy", "wrong", "distance", "tv"


def kind(problem: str, network: str) -> str:
    """The key of RATES and PART."""
    return "shapes" if problem == "shapes" else network


def trained(
    problem: str, network: str, target: str, N: int, lr: float, seed: int, steps: int, out: File
) -> dict:
    """{evaluations: scores} of a student, and of its teacher's first-order steps."""
    text = problem == "shapes"
    changes = TARGETS[target] | ({"network": network} if network == "mmdit" and not text else {})
    teacher, data = teacher_of(problem, seed, out, **changes), data_of(problem)
    guidance = dict(guidance="fixed", teacher_cfg=teacher.cfg) if text else {}
    settings = dict(times=N // 4, evaluations=8, parameterization=target, method="euler", reuse=1)
    options = PeRFlow.Options(**settings, **guidance)
    objective = PeRFlow.of(teacher.objective, options, teacher.guided)
    steps //= PART[kind(problem, network)]
    recipe = recipe_of(problem, teacher, lr=lr, steps=steps, seed=seed)
    student = learned(data, recipe, objective, teacher)
    draw = lambda model, n: measured(problem, False, partial(model.sample, steps=n))
    models = {"student": student, "teacher": teacher}
    return {name: {str(n): draw(model, n) for n in (4, 8)} for name, model in models.items()}


def run(
    seeds: Annotated[Count, "students of an MLP; an MM-DiT has one", 1, 1000] = 3,
    steps: Annotated[Count, "of training; an MM-DiT has 1/4, on shapes 1/10", 10, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/fewstep"),
) -> None:
    keys = {"student", "teacher"}
    made = lambda jobs: run_missing(out, jobs, partial(trained, out=out), steps, keys)
    energy = lambda run: run["student"]["4"]["energy"]  # MLPs alone have a choice, of points
    rates = lambda row: RATES[kind(*row[:2])]
    cells = [(*row, N) for row in ROWS for N in TIMES]
    best = {cell: rates(cell)[0] for cell in cells}
    scanned = [cell for cell in cells if len(rates(cell)) > 1]
    tried = made([(*cell, lr, 0) for cell in scanned for lr in rates(cell)])
    for run in sorted(tried, key=energy, reverse=True):
        best[tuple(run["job"][:4])] = run["job"][4]
    numbers = lambda cell: range(1, 1 + (seeds if cell[1] == "mlp" else 1))
    runs = made([(*cell, best[cell], seed) for cell in cells for seed in numbers(cell)])
    rows = [["problem, network, target: in 4 steps", "teacher", *(f"N = {N}" for N in TIMES)]]
    for row in ROWS:
        of = {N: [run for run in runs if run["job"][:4] == [*row, N]] for N in TIMES}
        groups = [("teacher", of[TIMES[0]]), *(("student", group) for group in of.values())]
        forms = METRICS[row[0] == "shapes"]
        for metric in filter(forms.get, SHOWN):
            values = ([run[who]["4"][metric] for run in group] for who, group in groups)
            shown = [mean_and_error(v, forms[metric]) for v in values]
            rows.append([f"{', '.join(row)}: {metric}", *shown])
    print(markdown(*rows))


if __name__ == "__main__":
    command(run, __doc__)
