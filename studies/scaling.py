"""SD3's figure 8 and Table 6 on shapes: does a larger MM-DiT learn better, does the loss predict
quality, and do larger ones need fewer steps?

    python -m studies.scaling             20 minutes after studies.architectures

The loss stands over steps and over training FLOPs; the frontier is the best loss of any depth
within that many FLOPs. Correlations say whether a lower loss means better pictures."""

import itertools
from pathlib import Path as File
from typing import Annotated

import numpy as np

from studies.architectures import STEPS, grouped, losses_of, runs_of
from studies.curves import Panel, draw_curves
from studies.rank import rank_correlation
from studies.runs import POINTS, markdown, mean_and_error
from training.options import Count, command


def frontier(points: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Of (FLOPs, loss, depth): those that are better than all cheaper ones, cheapest first."""
    points = sorted(points)
    return [p for i, p in enumerate(points) if all(p[1] < loss for _, loss, _ in points[:i])]


def report(runs: list[dict]) -> str:
    """The table, the frontier in one line, and how well the loss predicts the reader's verdict. A
    fall in few steps is the share of right pictures in 25 steps less that in as many, in pairs."""
    last = str(STEPS[-1])
    heads = ["depth", "weights", "TFLOPs", "loss above its floor", "excess", "seen", "unseen"]
    heads += [f"distance in {n} steps" for n in STEPS] + [f"fall in {n} steps" for n in STEPS[:-1]]
    rows, points = [heads], []
    above = lambda run: run["curve"][-1][2] - run["floor"]
    score = lambda run, n, key: run["scores"][str(n)][key]
    right = lambda run, n: (score(run, n, "seen") + score(run, n, "unseen")) / 2
    for (_, depth), seeds in grouped(runs).items():
        flops = seeds[0]["flops"] * seeds[0]["steps"] / 1e12
        cells = [f"{depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M", f"{flops:.3g}"]
        columns = [([above(run) for run in seeds], ".4f")]
        columns.append(([run["excess"][0] for run in seeds], ".1e"))
        columns += [([score(run, last, key) for run in seeds], ".1%") for key in ("seen", "unseen")]
        columns += [([score(run, n, "distance") for run in seeds], ".3f") for n in STEPS]
        falls = [[right(run, last) - right(run, n) for run in seeds] for n in STEPS[:-1]]
        columns += [(fall, ".1%") for fall in falls]
        rows.append(cells + [mean_and_error(values, form) for values, form in columns])
        for step, _, loss in np.mean([run["curve"] for run in seeds], axis=0).tolist():
            points.append((step * seeds[0]["flops"], loss, depth))
    leads = itertools.groupby(frontier(points), key=lambda point: point[2])
    best = [f"depth {depth} from {next(lead)[0] / 1e12:.2g}" for depth, lead in leads]
    lines = [markdown(*rows), "", f"The lowest loss for its TFLOPs: {', '.join(best)}."]
    for pairs in ("seen", "unseen"):
        errors = [-score(run, last, pairs) for run in runs]
        r = rank_correlation([above(run) for run in runs], errors)
        lines.append(f"Rank correlation of final loss and errors on {pairs} pairs: {r:.2f}.")
    return "\n".join(lines)


def draw(runs: list[dict], file: File) -> None:
    y, name = "validation loss above its floor", lambda variant: f"depth {variant[1]}"
    steps = losses_of(runs, name, lambda run, points: points[:, 0])
    flops = losses_of(runs, name, lambda run, points: points[:, 0] * run["flops"])
    draw_curves(file, Panel("steps", y, steps), Panel("FLOPs of training", y, flops))


def run(
    depths: Annotated[list[Count], "of MM-DiT; the rate of the first serves all"] = (4, 1, 2, 3),
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", 2 * POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    runs = runs_of([("mmdit", depth) for depth in depths], seeds, steps, out)
    runs = sorted(runs, key=lambda run: run["job"][1])
    print(report(runs))
    draw(runs, out / "scaling.png")
    print(f"\nwrote {out}/scaling.png")


if __name__ == "__main__":
    command(run, __doc__)
