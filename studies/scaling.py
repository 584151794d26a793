"""SD3's figure 8 on shapes: does a larger MM-DiT learn better, and does the loss predict quality?

    python -m studies.scaling             an hour on two cores

The loss stands over steps and over training FLOPs; the frontier is the best loss of any depth
within that many FLOPs. Correlations say whether a lower loss means better pictures."""

import itertools
from pathlib import Path as File
from typing import Annotated

import torch

from data.pictures import plot, tile
from studies.architectures import POINTS, span_of, study
from studies.rank import rank_correlation
from studies.runs import markdown, mean_and_error
from training.options import Count, command


def frontier(points: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Of (FLOPs, loss, depth): those that are better than all cheaper ones, cheapest first."""
    points = sorted(points)
    return [p for i, p in enumerate(points) if all(p[1] < loss for _, loss, _ in points[:i])]


def curves_of(runs: list[dict]) -> dict[int, torch.Tensor]:
    """{depth: (steps, training FLOPs, validation loss)}, averaged over seeds."""
    curves = {}
    for depth in dict.fromkeys(run["job"][1] for run in runs):
        seeds = [run for run in runs if run["job"][1] == depth]
        steps, _, losses = torch.tensor([run["curve"] for run in seeds]).double().mean(0).T
        curves[depth] = torch.stack([steps, steps * seeds[0]["flops"], losses])
    return curves


def report(runs: list[dict]) -> str:
    """The table, the frontier in one line, and how well the loss predicts the reader's verdict."""
    heads = "depth", "weights", "TFLOPs", "validation loss", "seen: all right", "unseen: all right"
    rows, curves = [heads], curves_of(runs)
    losses = lambda runs: [run["curve"][-1][2] for run in runs]
    shares = lambda runs, pairs: [run[pairs]["all right"] for run in runs]
    for depth, (_, flops, _) in curves.items():
        seeds = [run for run in runs if run["job"][1] == depth]
        cells = [f"{depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M", f"{flops[-1] / 1e12:.3g}"]
        right = [mean_and_error(shares(seeds, pairs), ".1%") for pairs in ("seen", "unseen")]
        rows.append([*cells, mean_and_error(losses(seeds), ".4f"), *right])
    points = [(f, loss, d) for d, c in curves.items() for _, f, loss in c.T.tolist()]
    leads = itertools.groupby(frontier(points), key=lambda point: point[2])
    best = [f"depth {depth} from {next(lead)[0] / 1e12:.2g}" for depth, lead in leads]
    lines = [markdown(*rows), "", f"The lowest loss for its TFLOPs: {', '.join(best)}."]
    for pairs in ("seen", "unseen"):
        r = rank_correlation(losses(runs), [-share for share in shares(runs, pairs)])
        lines.append(f"Rank correlation of final loss and errors on {pairs} pairs: {r:.2f}.")
    return "\n".join(lines)


def draw(runs: list[dict]):
    """Draw log10 of the loss, over steps and over log10 FLOPs, from the second point on."""
    curves = {f"depth {d}": c[:, 1:] for d, c in curves_of(runs).items()}
    span = span_of([loss.log10() for _, _, loss in curves.values()])
    low, high = torch.cat([flops.log10() for _, flops, _ in curves.values()]).aminmax()
    by_steps = {d: (c[0] / c[0, -1], c[2].log10()) for d, c in curves.items()}
    by_flops = {d: ((c[1].log10() - low) / (high - low), c[2].log10()) for d, c in curves.items()}
    left = plot(by_steps, "log10 loss over the share of the steps", *span)
    right = plot(by_flops, f"log10 loss over FLOPs, 10^{low:.1f} to 10^{high:.1f}", *span)
    return tile([[left, right]])


def run(
    depths: Annotated[list[Count], "of MM-DiT"] = (1, 2, 3, 4, 5, 6),
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    study([("mmdit", depth) for depth in depths], seeds, steps, out, report, draw, "scaling")


if __name__ == "__main__":
    command(run, __doc__)
