"""Few steps from a caption: the methods of `studies.rivals` on shapes.

    python -m studies.fewshapes runs/shapes/checkpoint.pt        an hour on two cores

Each method learns once. The exact reader says how often a picture shows all of its caption."""

import time
from functools import partial
from pathlib import Path as File
from typing import Annotated

import sample
from data.shapes import Shapes
from rf import InputError
from studies.rivals import COUNTS, METHODS
from studies.runs import markdown, run_missing
from training.checkpoint import digest
from training.options import Recipe, command, pick, preset


def painted(checksum: str, name: str, lr: float, seed: int, steps: int, checkpoint: File) -> dict:
    """{evaluations: [the share of samples that are all right, for seen and for unseen captions]},
    and seconds of training. The method "teacher" trains nothing."""
    teacher, data = sample.load(checkpoint), Shapes(Shapes.Options())
    changes = preset("shapes student") | dict(lr=lr, steps=steps, seed=seed, dropout=0.0)
    recipe = pick(Recipe, teacher.config | changes)
    start, students = time.perf_counter(), dict.fromkeys(COUNTS, teacher)
    if name in METHODS:
        students = METHODS[name].train(teacher, data, recipe)
    seconds = time.perf_counter() - start
    right = lambda n, new: data.right(students[n], 200, new, steps=n)["all right"]
    scores = {str(n): [right(n, False), right(n, True)] for n in students}
    return dict(scores=scores, seconds=seconds)


def table(runs: list[dict]) -> str:
    rows = [["method", *map(str, COUNTS), "seconds"]]
    for run in runs:
        shares = [run["scores"].get(str(n), ()) for n in COUNTS]  # (seen, unseen)
        cells = [", ".join(f"{share:.1%}" for share in pair) or "–" for pair in shares]
        rows.append([run["job"][1], *cells, f"{run['seconds']:.0f}"])
    return markdown(*rows)


def run(
    checkpoint: Annotated[File, "of shapes, that train.py wrote"],
    lr: Annotated[float, "of all methods", 1e-30, 1e30] = 5e-4,
    out: Annotated[File, "where runs are kept"] = File("runs/fewshapes"),
) -> None:
    teacher = sample.load(checkpoint)
    if teacher.config["dataset"] != "shapes":
        raise InputError(f"{checkpoint} is of {teacher.config['dataset']}, not of shapes")
    checksum, steps = f"{digest(teacher.network):08x}", preset("shapes student")["steps"]
    jobs = [(checksum, name, lr, 0) for name in ("teacher", *METHODS)]
    work = partial(painted, checkpoint=checkpoint)
    runs = run_missing(out, jobs, work, steps, {"scores", "seconds"})
    print("all right, of 200 captions of seen and 200 of unseen pairs, by evaluations:\n")
    print(table(runs))


if __name__ == "__main__":
    command(run, __doc__)
