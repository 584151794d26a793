"""Few steps from a caption: the methods of `studies.rivals` on shapes.

    python -m studies.fewshapes runs/shapes/checkpoint.pt        an hour on two cores

Each method learns once from the same teacher, with as many of its evaluations, rows and steps. The
exact reader says how often all that a caption tells is right in what its student paints."""

import time
from functools import partial
from pathlib import Path as File
from typing import Annotated

import torch

import sample
from checkpoint import digest
from options import Recipe, command, pick
from shapes import Shapes
from studies.rivals import COUNTS, METHODS
from studies.runs import markdown, run_missing


def painted(job: tuple[str, str, float, int], steps: int, checkpoint: File) -> dict:
    """The run (teacher, method, learning rate, seed): {evaluations: [how often samples of seen and
    of unseen captions are all right]}; the method "teacher" has nothing to train."""
    torch.set_num_threads(1)
    _, name, lr, seed = job
    teacher, data = sample.load(checkpoint), Shapes(Shapes.Options())
    changes = data.distil | dict(lr=lr, steps=steps, seed=seed, dropout=0.0)
    recipe = pick(Recipe, teacher.config | changes)
    start, students = time.perf_counter(), dict.fromkeys(COUNTS, teacher)
    if name in METHODS:
        students = METHODS[name].train(teacher, data, recipe)
    spent, scores = time.perf_counter() - start, {}
    for n, model in students.items():
        right = [data.right(model, 200, new, steps=n)["all right"] for new in (False, True)]
        scores[str(n)] = right
    return dict(job=job, steps=steps, scores=scores, seconds=spent)


def table(runs: list[dict]) -> str:
    rows = [["method", *map(str, COUNTS), "seconds"]]
    for run in runs:
        told = [run["scores"].get(str(n)) for n in COUNTS]
        cells = [", ".join(f"{share:.1%}" for share in pair) if pair else "–" for pair in told]
        rows.append([run["job"][1], *cells, f"{run['seconds']:.0f}"])
    return markdown(*rows)


def run(
    checkpoint: Annotated[File, "of shapes, that train.py wrote"],
    lr: Annotated[float, "of all methods", 1e-30, 1e30] = 5e-4,
    out: Annotated[File, "where runs are kept"] = File("runs/fewshapes"),
) -> None:
    teacher = sample.load(checkpoint)
    if teacher.config["dataset"] != "shapes":
        raise ValueError(f"{checkpoint} is of {teacher.config['dataset']}, not of shapes")
    known, steps = f"{digest(teacher.network):08x}", Shapes.distil["steps"]
    jobs = [(known, name, lr, 0) for name in ("teacher", *METHODS)]
    work = partial(painted, steps=steps, checkpoint=checkpoint)
    runs = run_missing(out, jobs, work, steps, {"scores", "seconds"})
    print("all right, of 200 captions of seen and 200 of unseen pairs, by evaluations:\n")
    print(table(runs))


if __name__ == "__main__":
    command(run, __doc__)
