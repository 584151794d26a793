"""SD3's Table 1 (section 5.1) on points and on shapes: which formulation samples best, in how many
steps?

    python -m studies.rank                     half an hour on two cores; --all for the paper's 61
    python -m studies.rank --problems shapes   an hour and a half

Points are ranked by energy distance. Shapes are ranked as the paper ranks pictures, by the index of
the Pareto front: its CLIP and FID are our wrong captions and distance to the data."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch

import toy2d
from data.shapes import Shapes
from data.toy import Toy
from rf import STUDY, formulation, solve
from studies.runs import SHAPES, TOY, judged, learned, markdown, mean_and_error, run_missing
from training.options import Count, Recipe, command

PAPER = {  # mean rank over all settings, at 5 steps, at 50 steps
    "rf/lognorm(0.00,1.00)": (1.54, 1.25, 1.50),
    "rf/lognorm(1.00,0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50,0.60)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50,1.00)": (2.83, 1.50, 2.50),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0.00,0.60)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "edm(0.60,1.20)": (9.00, 13.00, 9.00),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.20,1.20)": (15.58, 20.25, 15.00),
}
STEPS = (5, 10, 25, 50)  # of points, by averaged weights on each path's own grid of times
OTHERS = ("5, same times", "50, same times", "5, raw weights", "50, raw weights")
TEXT = ("5 at 1", "25 at 1", "5 at 3", "25 at 3", "5 at 3, same times")  # of shapes: at guidance


def points(name: str, mixture: str, seed: int, steps: int) -> dict:
    """Train, sample, and measure the samples against the exact field's from the same noise. *Same
    times*: all variants are flows on the RF path, on a uniform grid."""
    truth, raw = toy2d.load_mixture(mixture), {}
    recipe = Recipe(**TOY | dict(formulation=name, steps=steps, seed=seed))
    model = learned(Toy(Toy.Options(mixture)), recipe, raw=raw)
    excess = toy2d.relative_excess(model.network, model.objective, truth)
    data, _, noise, exact = toy2d.reference(truth, seed)
    same = lambda n: solve(model.objective.rectified(model.network), noise, steps=n)
    other = replace(model, network=raw["network"])
    draws = {str(n): partial(model.sample, noise, steps=n) for n in STEPS}
    for n in (5, 50):
        draws[f"{n}, same times"] = partial(same, n)
        draws[f"{n}, raw weights"] = partial(other.sample, noise, steps=n)
    run = dict(name=name, mixture=mixture, seed=seed, excess=excess)
    with torch.no_grad():
        for key, draw in draws.items():
            m = toy2d.sample_metrics(draw(), data, truth)
            run[key] = {"energy": m["energy"] - exact["energy"], "outliers": m["outliers"]}
    return run


def pictures(name: str, problem: str, seed: int, steps: int) -> dict:
    """The same on shapes: wrong captions and distance, at guidance 1 and 3."""
    data = Shapes(Shapes.Options())
    recipe = Recipe(**SHAPES | dict(formulation=name, steps=steps, seed=seed))
    model = learned(data, recipe)
    _, _, error, power = data.errors(model, recipe.validation).mean(0).tolist()
    run = dict(name=name, mixture=problem, seed=seed, excess=error / power)
    for key in TEXT:
        n, cfg = int(key.split()[0]), int(key.split()[2].strip(","))
        draw = partial(model.sample, steps=n, cfg=cfg)
        if "same" in key:
            field = model.objective.rectified(model.guided(cfg))
            draw = lambda noise, *cond, field=field, n=n: solve(field, noise, *cond, steps=n)
        scores = judged(draw, spread=0)
        wrong = 1 - (scores["seen"] + scores["unseen"]) / 2
        run[key] = {"wrong": wrong, "distance": scores["distance"]}
    return run


def trained(name: str, problem: str, seed: int, steps: int) -> dict:
    return (pictures if problem == "shapes" else points)(name, problem, seed, steps)


def ranks(values: list[float]) -> np.ndarray:
    """Rank 1 for the smallest. Equal values share their mean rank; what diverged (nan) is last."""
    values = np.nan_to_num(np.asarray(values, dtype=float), nan=np.inf)
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def fronts(wrong: list[float], distance: list[float]) -> np.ndarray:
    """The index of each one's Pareto front, from 1 on: what is left when better fronts are gone."""
    left, index = set(range(len(wrong))), np.zeros(len(wrong))
    beats = lambda i, j: (
        wrong[i] <= wrong[j]
        and distance[i] <= distance[j]
        and (wrong[i] < wrong[j] or distance[i] < distance[j])
    )
    while left:
        front = {j for j in left if not any(beats(i, j) for i in left)}
        index[list(front)] = index.max() + 1
        left -= front
    return index


GROUPS = {  # keys of a run, and the column of PAPER that they answer, by whether they are shapes'
    False: {
        "all": (STEPS, 0), "5": ((5,), 1), "50": ((50,), 2),
        "5, same times": (OTHERS[:1], 1), "50, same times": (OTHERS[1:2], 2),
        "5, raw": (OTHERS[2:3], 1), "50, raw": (OTHERS[3:], 2),
    },
    True: {
        "all": (TEXT[:4], 0), "5 steps": (TEXT[:3:2], 1), "25 steps": (TEXT[1:4:2], 2),
        "guidance 1": (TEXT[:2], 0), "guidance 3": (TEXT[2:4], 0), "same times": (TEXT[4:], 1),
    },
}  # fmt: skip


def mean_ranks(runs: list[dict], names: list[str], keys: Sequence, text=False) -> np.ndarray:
    """The rank of each name, averaged over seeds, problems and these keys: (names,)."""
    order = ("wrong", "distance") if text else ("energy",)
    table = {}  # (problem, seed): the runs by name
    for run in runs:
        table.setdefault((run["mixture"], run["seed"]), {})[run["name"]] = run
    ranked = [
        (fronts if text else ranks)(*([same[name][str(key)][o] for name in names] for o in order))
        for same in table.values()
        for key in keys
    ]
    return np.mean(ranked, axis=0)


def rank_table(runs: list[dict], names: list[str], problems: list[str], text=False) -> str:
    """Three tables in Markdown, best mean rank first: the ranks; the figures; and the same less
    those of rf (or the first name), seed by seed. Then the correlations with the paper's ranks."""
    groups = GROUPS[text]
    columns = {g: mean_ranks(runs, names, keys, text) for g, (keys, _) in groups.items()}
    order = np.argsort(columns["all"], kind="stable")
    rows = [["variant", *(f"rank, {g}" for g in groups), "paper all", "5", "50"]]
    for i in order:
        paper = [f"{x:.2f}" for x in PAPER.get(names[i], ())] or ["–"] * 3
        rows.append([names[i], *(f"{column[i]:.2f}" for column in columns.values()), *paper])
    said = [markdown(*rows)]
    shown = [("wrong", 1, ".1%"), ("distance", 1, ".3f")] if text else [("energy", 1e3, ".2f")]
    cells = list(product(problems, TEXT if text else (*STEPS, *OTHERS), shown))
    heads = [f"{problem} {key}: {what}" for problem, key, (what, *_) in cells]

    def column(name: str, problem: str, key: str | int, what: str = "") -> np.ndarray:
        own = [run for run in runs if (run["name"], run["mixture"]) == (name, problem)]
        return np.array([run[str(key)][what] if what else run[key] for run in own])

    for base in (None, "rf" if "rf" in names else names[0]):
        of = lambda name, *key, base=base: column(name, *key) - (column(base, *key) if base else 0)
        title = f"less {base}" if base else "variant"
        rows = [[title, *heads, *(f"{problem}: excess" for problem in problems)]]
        for i in order:
            row = []
            for problem, key, (what, unit, form) in cells:
                values = unit * of(names[i], problem, key, what)
                row.append(mean_and_error(np.where(abs(values) < 1000, values, np.inf), form))
            row += [mean_and_error(of(names[i], p, "excess"), ".1e") for p in problems]
            rows.append([names[i], *row])
        said.append(markdown(*rows))
    known = [i for i, name in enumerate(names) if name in PAPER]
    if len(known) > 2:
        paper = np.array([PAPER[names[i]] for i in known]).T
        r = {g: rank_correlation(c[known], paper[groups[g][1]]) for g, c in columns.items()}
        unit = "" if text else "Energy distances in thousandths, above the exact field's. "
        r = ", ".join(f"{value:.2f} ({g})" for g, value in r.items())
        said.append(f"{unit}Rank correlations with the paper: {r}.")
    return "\n\n".join(said)


def run(
    all: Annotated[bool, "all 61 formulations instead of the table's 16"] = False,
    names: Annotated[list[str] | None, "these formulations only"] = None,
    problems: Annotated[list[str], "mixtures, also NAME-unscaled; or shapes"] = ("ring", "grid"),
    seeds: Annotated[Count | None, "runs of each (default: 3, of shapes 1)", 1, 1000] = None,
    steps: Annotated[Count | None, "training steps (default: the preset's)"] = None,
    out: Annotated[File, "where runs are kept"] = File("runs/study"),
) -> None:
    text = [*problems] == ["shapes"]
    if not text:
        _ = [toy2d.load_mixture(name) for name in problems]
    names = [*dict.fromkeys(names or (STUDY if all else PAPER))]
    _ = [formulation(name) for name in names]
    seeds, steps = seeds or (1 if text else 3), steps or (SHAPES if text else TOY)["steps"]
    jobs = [(n, m, s) for s in range(seeds) for m in problems for n in names]
    keys = {"name", "mixture", "seed", "excess", *map(str, TEXT if text else (*STEPS, *OTHERS))}
    table = rank_table(run_missing(out, jobs, trained, steps, keys), names, problems, text)
    file = out / f"table-{'-'.join(problems)}.md"
    file.write_text(table + "\n")
    print(f"{table}\n\nwrote {file}")


if __name__ == "__main__":
    command(run, __doc__)
