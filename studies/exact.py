"""What each path costs by itself: the exact field in a few steps. Nothing is trained.

    python -m studies.exact [--text]

The table has the energy distance above that of the converged exact field, in thousandths; ± over
three draws of noise."""

import itertools
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

import toy2d
from data.shapes import NONE, conditions_of, field
from data.toy import number
from rf import EDM, Field, Formulation, RectifiedFlow, formulation, guide, solve
from studies.runs import judged, markdown, mean_and_error, true_pictures
from training.options import command

SHOWN = ("rf", "v/cos", "v/linear", "edm(-1.20,1.20)", "edm/rf", "edm/cos")
COUNTS = (1, 2, 5, 10, 25, 50)


def exact_network(formula: Formulation, mixture: toy2d.GaussianMixture) -> Field:
    """The best network there is, E[target | z], with the call of any network."""
    ends = lambda z_in, t: mixture.ends(z_in / formula.path.c_in(t)[:, None], t, formula.path)
    return lambda z_in, t: formula.pair(*ends(z_in, t), t)[1]


def exact_samples(formula: Formulation, mixture, noise: Tensor, steps: int, method: str) -> Tensor:
    """The exact field's samples on the path's default grid; the last step gives x0_hat. heun and
    rk4 step in sigma instead of t where a = 1 (EDM); first order is the plane's step."""
    if method == "first order":
        return formula.sample(exact_network(formula, mixture), noise, steps=steps)
    path, times = formula.path, formula.path.grid(steps)
    field, clock = mixture.field(path), times
    if isinstance(path, EDM):
        field = lambda z, sigma: mixture.ends(z, path.time(-2 * sigma.double().log()), path)[1]
        clock = path.b(times)
    z = solve(field, path.b(times[0]).float() * noise, times=clock, method=method)
    return mixture.ends(z, times[-1:].clamp(min=1e-6), path)[0]


def text_table() -> str:
    """Of shapes, by guidance and Euler steps: what `judged` says of the exact field's samples. The
    null condition's field rules unseen pairs out, so guidance away from it leaves the data."""
    exact, null_cond = field(RectifiedFlow()), conditions_of(torch.tensor([NONE]))
    null_cond = [c[0] for c in null_cond]
    keys = dict(seen=".1%", unseen=".1%", distance=".4f", tv=".3f", floor=".3f", chi2=".2f")
    keys |= dict(mutual=".2f", same=".2f")
    rows = [["guidance", "steps", *keys]]
    for cfg, steps in itertools.product((1, 3), (1, 2, 4, 8, 25)):
        scores = judged(partial(solve, guide(exact, null_cond, cfg), steps=steps))
        cells = (number(scores[key], form) for key, form in keys.items())
        rows.append([f"{cfg}", f"{steps}", *cells])
    scores = judged(true_pictures())
    rows.append(["the data", "", *(number(scores[key], form) for key, form in keys.items())])
    return markdown(*rows)


def run(
    mixtures: Annotated[list[str], "also NAME-unscaled"] = ("ring",),
    text: Annotated[bool, "the exact field of shapes instead"] = False,
) -> None:
    if text:
        print(text_table())
    for name in () if text else mixtures:
        mixture = toy2d.load_mixture(name)
        draws = [toy2d.reference(mixture, seed) for seed in range(3)]
        rows = [["path", "solver", *(f"{n} steps" for n in COUNTS)]]
        for key, method in itertools.product(SHOWN, ("first order", "heun", "rk4")):
            row = [key, method]
            for n in COUNTS:
                found = []
                for data, _, noise, best in draws:
                    x = exact_samples(formulation(key), mixture, noise, n, method)
                    found.append(1e3 * (toy2d.energy_distance(x, data) - best["energy"]))
                row.append(mean_and_error(found, ".2f"))
            rows.append(row)
        print(f"\n{name}\n\n{markdown(*rows)}")


if __name__ == "__main__":
    command(run, __doc__)
