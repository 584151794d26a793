"""PeRFlow's plug and play: Delta W, added to models that were fine-tuned from the same teacher.

    python -m studies.delta               20 minutes on two cores

Each seed has a teacher, students of it, and copies of it that are fine-tuned on a mixture, turned
or moved. The table says by which factor Delta W lowers the copies' energy distance in 4 steps."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch

import perflow
from data.toy import Toy
from sample import Sampler
from studies.fewstep import recipe_of, solved
from studies.rivals import flow
from studies.runs import TOY, learned, markdown, mean_and_error, run_missing
from toy2d import GaussianMixture, load_mixture, yardsticks
from training.options import Count, Recipe, command, pick

CHANGES = {"5°": (5, 0), "10°": (10, 0), "22.5°": (22.5, 0), "moved 0.3": (0, 0.3)}
STUDENTS = {  # learning rate, steps, batch size, times a window
    "2e-3, 8000 of 1024 (the commands' choice)": (2e-3, 8000, 1024, 4),
    "1e-3, 3000 of 512": (1e-3, 3000, 512, 4),
    "3e-4, 3000 of 512": (3e-4, 3000, 512, 4),
    "1e-4, 3000 of 512": (1e-4, 3000, 512, 4),
    "1e-3, 3000 of 512, one time a window": (1e-3, 3000, 512, 1),
    "3e-4, 3000 of 512, one time a window": (3e-4, 3000, 512, 1),
}
UNTRAINED = "ab2 on (i/n)^1.5, no student"


def turned(mixture: GaussianMixture, degrees: float, shift: float) -> GaussianMixture:
    """The mixture turned about the origin and moved to the right."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    means = mixture.means @ turn.T + torch.tensor([shift, 0], dtype=torch.float64)
    return GaussianMixture(means, turn @ mixture.covs @ turn.T, mixture.weights)


def fine_tuned(teacher: Sampler, data: Toy, steps: int, seed: int = 0) -> Sampler:
    """The teacher after these many steps more, on these data."""
    changes = dict(steps=steps, lr=1e-3, warmup=100, seed=seed)
    return learned(data, pick(Recipe, teacher.config | changes), start=teacher)


def trained(mixture: str, seed: int, steps: int) -> dict:
    """All of one seed: {student: |Delta W|/|W|, the student's energy, and the factor by which its
    Delta W lowers that of each change}. `steps` are those of fine-tuning. Beside the students
    stands the best solver that needs none."""
    truth, data = load_mixture(mixture), Toy(Toy.Options(mixture))
    teacher = learned(data, Recipe(**TOY | dict(seed=seed)))
    energy = lambda draw, truth: yardsticks(draw, truth)["energy"]
    four = lambda model: partial(model.sample, steps=4)
    untrained = lambda model: partial(solved, flow(model), "ab2", 1.5, 4)
    models, none = {}, {"ratio": 0.0, "own": energy(untrained(teacher), truth)}
    for name, change in CHANGES.items():
        other = turned(truth, *change)
        model = fine_tuned(teacher, Toy(Toy.Options(other.spec())), steps, seed)
        models[name] = model, other, energy(four(model), other)
        none[name] = models[name][2] / energy(untrained(model), other)
    students = {UNTRAINED: none}
    for name, (lr, number, size, times) in STUDENTS.items():
        options = perflow.PeRFlow.Options(times=times)
        objective = perflow.PeRFlow.of(teacher.objective, options, teacher.guided)
        recipe = recipe_of(mixture, teacher, lr=lr, steps=number, batch_size=size, seed=seed)
        student = learned(data, recipe, objective, teacher)
        delta = perflow.delta(student.network, teacher.network)
        ratio = perflow.norm(delta) / perflow.norm(teacher.network.state_dict())
        students[name] = {"ratio": ratio, "own": energy(four(student), truth)}
        for change, (model, other, own) in models.items():
            plugged = replace(model, network=copy.deepcopy(model.network), objective=objective)
            perflow.plug(plugged.network, delta)
            students[name][change] = own / energy(four(plugged), other)
    return {"students": students}


def table(runs: list[dict]) -> str:
    rows = [["student: lr, steps", "ΔW/W", "its own energy", *CHANGES, "the worst at 10°"]]
    for name in (*STUDENTS, UNTRAINED):
        column = lambda key: [run["students"][name][key] for run in runs]
        cells = [name, f"{np.mean(column('ratio')):.2f}", mean_and_error(column("own"), ".1e")]
        cells += [mean_and_error(column(change), ".1f") for change in CHANGES]
        rows.append([*cells, f"{min(column('10°')):.1f}"])
    return markdown(*rows)


def run(
    mixture: Annotated[str, "ring, grid, spiral or FILE.json"] = "ring",
    seeds: Annotated[Count, "teachers, each with its students", 1, 1000] = 3,
    steps: Annotated[Count, "of fine-tuning"] = 3000,
    out: Annotated[File, "where runs are kept"] = File("runs/delta"),
) -> None:
    load_mixture(mixture)
    jobs = [(mixture, seed) for seed in range(seeds)]
    print("4-step energy distance of the fine-tuned model over that with Delta W:\n")
    print(table(run_missing(out, jobs, trained, steps, {"students"})))


if __name__ == "__main__":
    command(run, __doc__)
