"""PeRFlow's plug and play: Delta W, added to models that were fine-tuned from the same teacher.

    python -m studies.delta               9 minutes on two cores

For each seed there are a teacher, students of it with several learning rates, and the teacher
fine-tuned on its mixture turned or moved. The table says by how much Delta W lowers the 4-step
energy distance of models that its student never saw, and how good that student is itself."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch

import perflow
from checkpoint import start_from
from data import Dataset
from options import Count, Recipe, command, pick
from rf import formulation
from sample import Sampler
from studies.runs import markdown, run_missing, shown
from toy2d import GaussianMixture, Toy, load_mixture, yardsticks
from train import State, batches, train

CHANGES = {"5°": (5, 0), "10°": (10, 0), "22.5°": (22.5, 0), "moved 0.3": (0, 0.3)}
STUDENTS = {  # learning rate, steps, batch size
    "2e-3, 8000 of 1024 (the commands' choice)": (2e-3, 8000, 1024),
    "1e-3, 3000 of 512": (1e-3, 3000, 512),
    "3e-4, 3000 of 512": (3e-4, 3000, 512),
    "1e-4, 3000 of 512": (1e-4, 3000, 512),
}


def turned(mixture: GaussianMixture, degrees: float, shift: float) -> GaussianMixture:
    """The mixture turned about the origin and moved to the right."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    means = mixture.means @ turn.T + torch.tensor([shift, 0], dtype=torch.float64)
    return GaussianMixture(means, turn @ mixture.covs @ turn.T, mixture.weights)


def learned(start: Sampler | None, data: Dataset, objective, recipe: Recipe) -> Sampler:
    """A network trained on these data, from the weights of `start` or from none."""
    torch.manual_seed(recipe.seed)
    network = data.network(data.spec(), recipe)
    if start:
        start_from(network, start.network.state_dict(), "the start")
    state = State(network, recipe)
    torch.manual_seed(recipe.seed)  # of what a critic draws, whatever the network has drawn
    stream = batches(data, objective, recipe, network.null_cond)
    train(state, objective, stream, recipe)
    stream.close()
    return Sampler(state.average, objective, vars(recipe) | {"spec": data.spec()})


def fine_tuned(teacher: Sampler, data: Toy, steps: int, seed: int = 0) -> Sampler:
    """The teacher after so many more steps on these data."""
    changes = {"steps": steps, "lr": 1e-3, "warmup": 100, "seed": seed}
    return learned(teacher, data, teacher.objective, pick(Recipe, teacher.config | changes))


def trained(job: tuple[str, int], steps: int) -> dict:
    """All of one seed: {student: |Delta W|/|W|, its own energy, and what it lowers each change by}.
    steps are those of fine-tuning."""
    torch.set_num_threads(1)
    mixture, seed = load_mixture(job[0]), job[1]
    data = Toy(Toy.Options(mixture.spec()))
    recipe = Recipe(**data.recipe(data.options) | {"seed": seed})
    teacher = learned(None, data, formulation(recipe.formulation), recipe)
    energy = lambda model, truth: yardsticks(partial(model.sample, steps=4), truth)["energy"]
    own = {}
    for name, change in CHANGES.items():
        truth = turned(mixture, *change)
        own[name] = fine_tuned(teacher, Toy(Toy.Options(truth.spec())), steps, seed), truth
    students = {}
    for name, (lr, number, size) in STUDENTS.items():
        options = perflow.PeRFlow.Options()
        objective = perflow.PeRFlow.of(teacher.objective, options, teacher.guided)
        how = replace(recipe, lr=lr, steps=number, batch_size=size, clip=1.0)
        student = learned(teacher, data, objective, how)
        delta = perflow.delta(student.network, teacher.network)
        found = {"ratio": perflow.norm(delta) / perflow.norm(teacher.network.state_dict())}
        found["own"] = energy(student, mixture)
        for change, (model, truth) in own.items():
            plugged = replace(model, network=copy.deepcopy(model.network), objective=objective)
            perflow.plug(plugged.network, delta)
            found[change] = energy(model, truth) / energy(plugged, truth)
        students[name] = found
    return {"job": job, "steps": steps, "students": students}


def table(runs: list[dict]) -> str:
    heads = ["student: lr, steps", "ΔW/W", "its own energy", *CHANGES, "the worst at 10°"]
    rows = [heads]
    for name in STUDENTS:
        own = [run["students"][name] for run in runs]
        column = lambda key, own=own: [found[key] for found in own]
        cells = [name, f"{np.mean(column('ratio')):.2f}", shown(column("own"), ".1e")]
        cells += [f"{shown(column(change), '.1f')}" for change in CHANGES]
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
    print(table(run_missing(out, jobs, partial(trained, steps=steps), steps, {"students"})))


if __name__ == "__main__":
    command(run, __doc__)
