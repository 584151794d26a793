"""SD3's figure 8 on shapes: does a larger MM-DiT learn better, and does the loss predict quality?

    python -m studies.scaling             an hour on two cores

Each depth has the same data, draws, steps and learning rate. The validation loss stands over steps
and over training FLOPs; the frontier is the best loss of any depth within that many FLOPs. The
exact reader's verdicts say whether a lower loss means better pictures, as SD3 claims."""

import itertools
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch

from data.pictures import plot, tile
from studies.architectures import POINTS, span_of, study
from studies.rank import rank_correlation
from studies.runs import markdown, mean_and_error
from training.options import Count, command


def frontier(points: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Of (FLOPs, loss, depth): those that no cheaper point beats, cheapest first."""
    best: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def curves_of(runs: list[dict]) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{depth: (steps, training FLOPs, validation loss)}, averaged over seeds."""
    curves = {}
    for depth in dict.fromkeys(run["job"][1] for run in runs):
        seeds = [run for run in runs if run["job"][1] == depth]
        losses = np.mean([[loss for _, _, loss in run["curve"]] for run in seeds], axis=0)
        steps = np.array([step for step, _, _ in seeds[0]["curve"]])
        curves[depth] = steps, steps * seeds[0]["flops"], losses
    return curves


def report(runs: list[dict]) -> str:
    """The table, the frontier in one line, and how well the loss predicts the reader's verdict."""
    heads = "depth", "weights", "TFLOPs", "validation loss", "seen: all right", "unseen: all right"
    rows, curves = [heads], curves_of(runs)
    for depth, (_, flops, _) in curves.items():
        seeds = [run for run in runs if run["job"][1] == depth]
        cells = [f"{depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M", f"{flops[-1] / 1e12:.3g}"]
        cells.append(mean_and_error([run["curve"][-1][2] for run in seeds], ".4f"))
        for pairs in ("seen", "unseen"):
            cells.append(mean_and_error([run[pairs]["all right"] for run in seeds], ".1%"))
        rows.append(cells)
    points = [(f, loss, d) for d, c in curves.items() for f, loss in zip(*c[1:], strict=True)]
    leads = itertools.groupby(frontier(points), key=lambda point: point[2])
    best = [f"depth {depth} from {next(lead)[0] / 1e12:.2g}" for depth, lead in leads]
    lines = [markdown(*rows), "", f"The lowest loss for its TFLOPs: {', '.join(best)}."]
    losses = [run["curve"][-1][2] for run in runs]
    for pairs in ("seen", "unseen"):
        r = rank_correlation(losses, [-run[pairs]["all right"] for run in runs])
        lines.append(f"Rank correlation of final loss and errors on {pairs} pairs: {r:.2f}.")
    return "\n".join(lines)


def draw(runs: list[dict]):
    """Draw log10 of the loss, over steps and over log10 FLOPs."""
    curves = curves_of(runs)
    span = span_of([np.log10(c[2][1:]) for c in curves.values()])
    flops = np.log10(np.concatenate([c[1][1:] for c in curves.values()]))
    frames: tuple[dict, dict] = {}, {}
    for depth, (steps, cost, losses) in curves.items():
        x = (np.log10(cost[1:]) - flops.min()) / (flops.max() - flops.min())
        for frame, at in zip(frames, (steps[1:] / steps[-1], x), strict=True):
            frame[f"depth {depth}"] = torch.tensor(at), torch.tensor(losses[1:]).log10()
    ends = f"10^{flops.min():.1f} to 10^{flops.max():.1f}"
    titles = "log10 loss over the share of the steps", f"log10 loss over FLOPs, {ends}"
    panels = [plot(f, title, *span) for f, title in zip(frames, titles, strict=True)]
    return tile([panels])


def run(
    depths: Annotated[list[Count], "of MM-DiT"] = (1, 2, 3, 4, 5, 6),
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    study([("MM-DiT", depth) for depth in depths], seeds, steps, out, report, draw, "scaling")


if __name__ == "__main__":
    command(run, __doc__)
