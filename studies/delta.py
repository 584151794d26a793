"""PeRFlow's plug and play: Delta W, added to models that were fine-tuned from the same teacher.

    python -m studies.delta TEACHER.pt DELTA.pt

The teacher is fine-tuned on its mixture turned or moved; the table has K-step samples without and
with the Delta W of a student that never saw the change."""

import copy
import math
from dataclasses import replace
from typing import Annotated

import torch

import sample
from options import Count, Recipe, command, pick
from toy2d import GaussianMixture, Toy, yardsticks
from train import State, batches, train


def turned(mixture: GaussianMixture, degrees: float, shift: float) -> GaussianMixture:
    """The mixture turned about the origin and moved to the right."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    means = mixture.means @ turn.T + torch.tensor([shift, 0], dtype=torch.float64)
    return GaussianMixture(means, turn @ mixture.covs @ turn.T, mixture.weights)


def fine_tuned(teacher: sample.Sampler, data: Toy, steps: int) -> sample.Sampler:
    """The teacher after so many more steps on these data."""
    recipe = pick(Recipe, teacher.config | {"steps": steps, "lr": 1e-3, "warmup": 100})
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    state = State(network, recipe)
    stream = batches(data, teacher.objective, recipe, network.null_cond)
    train(state, teacher.objective, stream, recipe)
    stream.close()
    return replace(teacher, network=state.average)


def run(
    teacher: Annotated[str, "a toy2d checkpoint"],
    delta: Annotated[str, "the delta.pt of a student of it"],
    steps: Annotated[Count, "of fine-tuning"] = 3000,
) -> None:
    torch.set_num_threads(1)
    model = sample.load(teacher)
    if model.config["dataset"] != "toy2d" or model.config["objective"]:
        raise ValueError(f"{teacher} is no teacher on toy2d")
    options = pick(Toy.Options, model.config)
    print("| customised by | steps | energy | with delta | lower by | outliers | with delta |")
    print("|---|---|---|---|---|---|---|")
    for degrees, shift in ((5, 0), (10, 0), (22.5, 0), (0, 0.3)):
        custom = turned(GaussianMixture(**options.mixture), degrees, shift)
        own = fine_tuned(model, Toy(replace(options, mixture=custom.spec())), steps)
        plugged = sample.plugged(replace(own, network=copy.deepcopy(own.network)), delta)
        K, y = plugged.objective.fewest, []
        for some in (own, plugged):
            draw = lambda noise, *cond, model=some: model.sample(noise, *cond, steps=K)
            y.append(yardsticks(draw, custom, options.conditional))
        name = f"turning {degrees}°" if degrees else f"moving {shift}"
        energies = f"{y[0]['energy']:.2e} | {y[1]['energy']:.2e} +- {y[1]['energy_error']:.0e}"
        outliers = f"{y[0]['outliers']:.1%} | {y[1]['outliers']:.1%}"
        times = f"{y[0]['energy'] / y[1]['energy']:.1f}x"
        print(f"| {name} | {K} | {energies} | {times} | {outliers} |", flush=True)


if __name__ == "__main__":
    command(run, __doc__)
