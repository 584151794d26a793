"""What the papers show beside their large tables, each on the smallest problem that has it.

    python -m studies.more [--names NAME ...]      an hour on two cores

texts       SD3, section 4: one of the two texts is missing in sampling
captions    SD3, section 5.2.2: captions that tell less, and a mix of both
entropy     SD3, section 5.3.2: the attention with and without its norm
shift       SD3, section 5.3.2 and figure 6: the shift at 64 x 64, for the exact field
perflow     PeRFlow: K = 8, a fifth step in the first window, data that the teacher never saw
sync        PeRFlow: a student guided in sampling, by scales from 1 to 7"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import mmdit
from data.base import validation
from data.shapes import COLOURS, VOCABULARY, Shapes, posterior
from perflow import PeRFlow
from rf import InputError, expand, formulation, solve
from sample import Sampler
from studies.fewstep import data_of, recipe_of, teacher_of
from studies.rivals import PATH, straightened
from studies.runs import SHAPES, judged, learned, markdown, mean_and_error, run_missing
from toy2d import load_mixture, yardsticks
from training.options import Recipe, command


# ---- One text is missing in sampling
def texts(kept: str, seed: int, steps: int, out: File) -> dict:
    """`judged` of one model, trained with both texts, where the other is zeros."""
    model = teacher_of("shapes", seed, out)
    a, b = float(kept != "c_vec"), float(kept != "c_ctxt")
    draw = lambda noise, context, pooled: model.sample(noise, a * context, b * pooled, steps=steps)
    return judged(draw, spread=0)


# ---- Captions that tell less
class Told(Shapes):
    """Shapes whose captions name no colour, in this share of the examples."""

    poor: float

    def examples(self, n: int, generator: torch.Generator) -> list[Tensor]:
        x0, context, pooled = super().examples(n, generator)
        told = torch.tensor([word not in COLOURS for word in VOCABULARY]).float()
        rich = torch.rand(n, generator=generator) >= self.poor
        known = torch.where(rich[:, None], 1, told)  # (n, words)
        word = context[..., : len(VOCABULARY)] * known[:, None]
        here = (word.sum(-1, keepdim=True) > 0).float()  # a word that is not told has no place
        return [x0, torch.cat([word, here * context[..., len(VOCABULARY) :]], -1), pooled * known]


def captions(poor: float, seed: int, steps: int, out: File) -> dict:
    """`judged` by whole captions, after training with a share of poor ones."""
    data = Told(Shapes.Options())
    data.poor = poor
    model = learned(data, Recipe(**SHAPES | dict(steps=steps, seed=seed)))
    return judged(partial(model.sample, steps=25, cfg=3.0), spread=0)


# ---- The attention, with and without the norm of q and k
class Bare(Shapes):
    """Shapes for a network without the norm."""

    @classmethod
    def arguments(cls, spec):
        return super().arguments(spec) | dict(qk_norm=False)


def entropy(normed: bool, lr: float, seed: int, steps: int, out: File) -> dict:
    """Of a network with the norm or without, at this rate: its relative excess; by steps of
    training the mean entropy of its attention over that of equal weights, and its largest logit, on
    held-out rows."""
    data = (Shapes if normed else Bare)(Shapes.Options())
    recipe = Recipe(**SHAPES | dict(steps=steps, lr=lr, seed=seed))
    objective, seen = formulation(recipe.formulation), []
    z, t, _, *cond = next(validation(objective, *data.held_out(64)))

    def looked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q.float() @ k.float().mT) / mmdit.HEAD_DIM**0.5
        p = logits.softmax(-1)
        seen.append(((-(p * p.clamp(min=1e-30).log()).sum(-1)).mean().item(), logits.max().item()))
        return attend(q, k, v)

    attend, curve = mmdit.attend, []

    def watch(step: int, sampler: Sampler) -> None:
        mmdit.attend = looked
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            sampler.guided()(z, t, *cond)
        mmdit.attend = attend
        entropies, logits = zip(*seen, strict=True)
        full = math.log(cond[0].shape[1] + (z.shape[-1] // 8) ** 2)
        curve.append((step, float(np.mean(entropies)) / full, max(logits)))
        seen.clear()

    model = learned(data, recipe, watch=watch)
    _, _, error, power = data.errors(model, recipe.validation).mean(0).tolist()
    scores = {"excess": error / power}
    for step, share, logit in curve:
        scores |= {f"{step}: entropy": share, f"{step}: largest logit": logit}
    return scores


# ---- The shift: at 64 x 64 the pixels of 32 x 32, each four times
def large(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
    """The exact velocity (6) of such pictures z (n,3,64,64). The mean of four pixels has half the
    noise: it is a small picture at the time t' with (1 - t')/t' = 2 (1 - t)/t, which is what the
    shift by sqrt(m/n) = 2 undoes."""
    a, b = 1 - expand(t, z), expand(t, z)
    small = F.avg_pool2d(z, 2) / (a + b / 2)
    x0_hat = posterior(small, (b / 2 / (a + b / 2)).flatten(), PATH, *cond)[1]
    x0_hat = F.interpolate(x0_hat.to(z), scale_factor=2.0)
    return (z - x0_hat) / b


def shift(s: float, seed: int, steps: int, out: File) -> dict:
    """`judged` by s: the exact flow in four Euler steps, at shifted times."""
    times, generator = PATH.shift(PATH.grid(steps), s), torch.Generator().manual_seed(seed)

    def draw(noise: Tensor, *cond: Tensor) -> Tensor:
        noise = torch.randn(len(noise), 3, 64, 64, generator=generator)
        return F.avg_pool2d(solve(large, noise, *cond, times=times), 2)

    return judged(draw)


# ---- PeRFlow
def perflow(what: str, seed: int, steps: int, out: File) -> dict:
    """Of the ring: the energy distance of a student, by evaluations."""
    teacher, K = teacher_of("ring", seed, out), 8 if what == "K = 8" else 4
    data = data_of("grid" if what == "data of the grid" else "ring")
    recipe = recipe_of("ring", teacher, lr=8e-3, steps=steps, seed=seed)
    model = straightened(K, 4, teacher, data, recipe)[8]
    draw = lambda n: partial(model.sample, steps=n)
    energy = lambda n: yardsticks(draw(n), load_mixture("ring"))["energy"]
    return {f"{n} steps": energy(n) for n in (4, 5, 8, 9) if n >= K}


def sync(who: str, n: int, seed: int, steps: int, out: File) -> dict:
    """Of shapes, by the scale of guidance: a student of the plain teacher, guided in sampling, and
    the teacher, in n steps."""
    model, data = teacher_of("shapes", seed, out), data_of("shapes")
    if who == "student":
        dropout = model.config["dropout"]  # it is guided in sampling
        recipe = recipe_of("shapes", model, steps=steps, seed=seed, dropout=dropout)
        objective = PeRFlow.of(model.objective, PeRFlow.Options(), model.guided)
        model = learned(data, recipe, objective, model)
    scores = {}
    for cfg in (1.0, 3.0, 5.0, 7.0):
        found = judged(partial(model.sample, steps=n, cfg=cfg))
        scores |= {f"{cfg:g}: {key}": found[key] for key in ("seen", "unseen", "distance", "tv")}
    return scores


# ---- The table of jobs; a job ends with its seed
STUDIES: dict[str, tuple[Callable, list[tuple], int]] = {
    "texts": (texts, [("both",), ("c_ctxt",), ("c_vec",)], 25),
    "captions": (captions, [(0.0,), (1.0,), (0.5,)], 2000),
    "entropy": (entropy, [(True, 3e-3), (False, 3e-3), (True, 1.2e-2), (False, 1.2e-2)], 2000),
    "shift": (shift, [(1.0,), (1.5,), (2.0,), (3.0,), (4.0,), (6.0,)], 4),
    "perflow": (perflow, [("K = 4",), ("K = 8",), ("data of the grid",)], 8000),
    "sync": (sync, [("teacher", 25), ("teacher", 4), ("student", 4)], 1500),
}
SEEDS = {"captions": (1,), "entropy": (1,), "perflow": (1, 2, 3)}  # else 0


def worked(name: str, *job, steps: int, out: File) -> dict:
    return {"scores": STUDIES[name][0](*job, steps=steps, out=out)}


def run(
    names: Annotated[list[str], "of the studies"] = tuple(STUDIES),
    out: Annotated[File, "where runs are kept"] = File("runs/fewstep"),
) -> None:
    if unknown := {*names} - {*STUDIES}:
        raise InputError(f"unknown study {min(unknown)!r}; choose from {', '.join(STUDIES)}")
    for name in names:
        work, variants, steps = STUDIES[name]
        seeds = SEEDS.get(name, (0,))
        jobs = [(name, *variant, seed) for variant in variants for seed in seeds]
        runs = run_missing(out, jobs, partial(worked, out=out), steps, {"scores"})
        found = [run["scores"] for run in runs]
        keys = [*dict.fromkeys(key for scores in found for key in scores)]
        rows = [["", *keys]]
        for i, variant in enumerate(variants):
            group = found[i * len(seeds) : (i + 1) * len(seeds)]
            values = [[scores[key] for scores in group if key in scores] for key in keys]
            cells = [mean_and_error(v, ".3g") if v else "–" for v in values]
            rows.append([", ".join(map(str, variant)), *cells])
        print(f"\n{name}: {work.__doc__}\n\n{markdown(*rows)}")


if __name__ == "__main__":
    command(run, __doc__)
