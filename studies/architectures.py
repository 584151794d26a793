"""SD3's figure 4 on shapes: MM-DiT against three DiTs, and what each of its two texts is for.

    python -m studies.architectures       70 minutes on two cores

All have the same data, draws, steps and rate. A DiT has half the weights of an MM-DiT of its depth,
so the table has the others deeper, too. The exact reader judges pairs seen in training, or not."""

import math
import time
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from data.networks import NETWORKS
from data.pictures import plot
from data.shapes import Shapes
from mmdit import MMDiT
from rf import formulation
from sample import Sampler
from studies.runs import SHAPES, markdown, mean_and_error, run_missing
from train import State, batches, train, validation_loss
from training.folder import training_flops
from training.options import Count, Recipe, command


# ---- Two networks more
def half_blind(part: str) -> type[MMDiT]:
    """An MM-DiT that sees this one of its two texts, and zeros for the other."""

    class HalfBlind(MMDiT):
        def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
            texts = (context, 0 * pooled) if part == "context" else (0 * context, pooled)
            return super().forward(x, t, *texts)

    return HalfBlind


for part in ("context", "pooled"):
    NETWORKS[f"mmdit, {part} alone"] = half_blind(part)
RIVALS = [name for name in NETWORKS if name != "mlp"]
VARIANTS = [(name, 4) for name in RIVALS] + [("dit", 5), ("crossdit", 5), ("skipdit", 5)]
VERDICTS = [(pairs, what) for pairs in ("seen", "unseen") for what in ("all right", "shapes")]
POINTS = 10  # of a curve


# ---- A run: train, and look at the average of the weights ten times on the way
def trained(name: str, depth: int, seed: int, steps: int, judged: int = 400) -> dict:
    """The validation loss over steps and over seconds of training, then how often samples are
    right, of seen and of unseen pairs, at guidance 3."""
    data, curve = Shapes(Shapes.Options()), []
    changes = dict(network=name, depth=depth, steps=steps, seed=seed)
    recipe = Recipe(**SHAPES | changes)
    torch.manual_seed(seed)
    data.network(data.spec(), Recipe(depth=1))  # the runs of README.md drew these weights first
    network = data.network(data.spec(), recipe)
    objective, state = formulation(recipe.formulation), State(network, recipe)
    sampler = Sampler(state.average, objective, dict(spec=data.spec(), precision=recipe.precision))
    held_out = data.held_out(recipe.validation)

    def watched(stream):
        """The batches; a step of training lasts until the next one is asked for."""
        seconds = 0.0
        for batch in stream:
            start = time.perf_counter()
            yield batch
            seconds += time.perf_counter() - start
            if state.step % (steps // POINTS) == 0 or state.step == steps:
                field = objective.field(sampler.guided())
                curve.append((state.step, seconds, validation_loss(field, objective, *held_out)))

    stream = watched(batches(data, objective, recipe, network.null_cond))
    train(state, objective, stream, recipe)
    next(stream)  # the last step ends
    stream.close()
    right = lambda new: data.right(sampler, judged, new, steps=25, cfg=3.0)
    flops = recipe.batch_size * training_flops(network, *held_out)
    size = sum(p.numel() for p in network.parameters())
    return dict(curve=curve, flops=flops, parameters=size, seen=right(False), unseen=right(True))


def study(variants: list, seeds: int, steps: int, out: File, report, draw, name: str) -> None:
    """Make the runs of these (network, depth), print report(runs) and save draw(runs)."""
    jobs = [(*variant, seed) for seed in range(seeds) for variant in variants]
    keys = {"curve", "flops", "parameters", "seen", "unseen"}
    runs = run_missing(out, jobs, trained, steps, keys)
    print(report(runs))
    draw(runs).save(out / f"{name}.png")
    print(f"\nwrote {out}/{name}.png")


def loss_at(run: dict, step: float) -> float:
    """The validation loss between two points of the curve."""
    at, _, losses = zip(*run["curve"], strict=True)
    return float(np.exp(np.interp(step, at, np.log(losses))))


def table(runs: list[dict]) -> str:
    heads = ["network", "weights", "ms a step", "validation loss", "at equal time"]
    rows = [heads + [f"{pairs}: {what}" for pairs, what in VERDICTS]]
    groups = {v: [run for run in runs if tuple(run["job"][:2]) == v] for v in VARIANTS}
    pace = lambda seeds: min(run["curve"][-1][1] / run["steps"] for run in seeds)  # seconds a step
    fastest = min(map(pace, groups.values()))
    for (name, depth), seeds in groups.items():
        step = seeds[0]["steps"] * fastest / pace(seeds)
        losses = [run["curve"][-1][2] for run in seeds], [loss_at(run, step) for run in seeds]
        shares = [[run[pairs][what] for run in seeds] for pairs, what in VERDICTS]
        cells = [f"{name}, depth {depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M"]
        cells += [f"{1e3 * pace(seeds):.0f}", *(mean_and_error(x, ".4f") for x in losses)]
        rows.append(cells + [mean_and_error(x, ".1%") for x in shares])
    return markdown(*rows)


def draw(runs: list[dict]):
    """The curves of equal depth, averaged over seeds: log10 of the loss over the share of steps."""
    curves = {}
    for name, depth in VARIANTS[: len(RIVALS)]:
        seeds = [run["curve"] for run in runs if run["job"][:2] == [name, depth]]
        y = torch.tensor(seeds)[..., 2].log10().mean(0)
        curves[name] = torch.arange(1, len(y) + 1) / len(y), y
    span = span_of([y[1:] for _, y in curves.values()])
    return plot(curves, "log10 validation loss, over the share of the steps", *span)


def span_of(curves: list[Tensor]) -> tuple[float, float]:
    """The tenths between which these curves lie."""
    ends = np.concatenate(curves)
    return math.floor(10 * ends.min()) / 10, math.ceil(10 * ends.max()) / 10


def run(
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    study(VARIANTS, seeds, steps, out, table, draw, "architectures")


if __name__ == "__main__":
    command(run, __doc__)
