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
from studies.architectures import POINTS, network_runs, span_of
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


def curves_of(runs: list[dict]) -> dict[int, np.ndarray]:
    """{depth: (steps, training FLOPs, validation loss)}, averaged over seeds."""
    curves = {}
    for depth in dict.fromkeys(run["job"][1] for run in runs):
        seeds = [run for run in runs if run["job"][1] == depth]
        steps, _, losses = np.mean([run["curve"] for run in seeds], axis=0).T
        curves[depth] = np.stack([steps, steps * seeds[0]["flops"], losses])
    return curves


def report(runs: list[dict]) -> str:
    """The table, the frontier in one line, and how well the loss predicts the reader's verdict."""
    heads = "depth", "weights", "TFLOPs", "validation loss", "seen: all right", "unseen: all right"
    rows, curves = [heads], curves_of(runs)
    final_losses = lambda runs: [run["curve"][-1][2] for run in runs]
    shares = lambda runs, pairs: [run[pairs]["all right"] for run in runs]
    for depth, (_, flops, _) in curves.items():
        seeds = [run for run in runs if run["job"][1] == depth]
        cells = [f"{depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M", f"{flops[-1] / 1e12:.3g}"]
        cells.append(mean_and_error(final_losses(seeds), ".4f"))
        rows.append(cells + [mean_and_error(shares(seeds, p), ".1%") for p in ("seen", "unseen")])
    points = [(f, loss, d) for d, (_, *c) in curves.items() for f, loss in zip(*c, strict=True)]
    leads = itertools.groupby(frontier(points), key=lambda point: point[2])
    best = [f"depth {depth} from {next(lead)[0] / 1e12:.2g}" for depth, lead in leads]
    lines = [markdown(*rows), "", f"The lowest loss for its TFLOPs: {', '.join(best)}."]
    for pairs in ("seen", "unseen"):
        r = rank_correlation(final_losses(runs), [-share for share in shares(runs, pairs)])
        lines.append(f"Rank correlation of final loss and errors on {pairs} pairs: {r:.2f}.")
    return "\n".join(lines)


def draw(runs: list[dict]):
    """Draw log10 of the loss, over steps and over log10 FLOPs, from the second point on."""
    curves = {f"depth {d}": torch.tensor(c[:, 1:]) for d, c in curves_of(runs).items()}
    span = span_of([loss.log10() for _, _, loss in curves.values()])
    flops = torch.cat([flops.log10() for _, flops, _ in curves.values()])
    low, high = flops.min(), flops.max()
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
    runs = network_runs([("MM-DiT", depth) for depth in depths], seeds, steps, out)
    print(report(runs))
    draw(runs).save(out / "scaling.png")
    print(f"\nwrote {out}/scaling.png")


if __name__ == "__main__":
    command(run, __doc__)
