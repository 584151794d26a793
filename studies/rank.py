"""SD3's Table 1 (section 5.1) in two dimensions: which formulation samples best, in how many steps.

    python -m studies.rank                18 minutes on two cores; --all for the paper's 61

The table ranks by energy distance; the paper ranks by Pareto fronts of CLIP and FID."""

from pathlib import Path as File
from typing import Annotated

import numpy as np

import toy2d
from data.toy import Toy, number
from rf import STUDY, formulation
from studies.runs import TOY, learned, markdown, run_missing
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
STEPS = (5, 10, 25, 50)


def trained(name: str, mixture: str, seed: int, steps: int) -> dict:
    """Train, sample, and measure the samples against the exact field's from the same noise."""
    truth = toy2d.load_mixture(mixture)
    recipe = Recipe(**TOY | dict(formulation=name, steps=steps, seed=seed))
    model = learned(Toy(Toy.Options(mixture)), recipe)
    excess = toy2d.relative_excess(model.network, model.objective, truth)
    run = {"name": name, "mixture": mixture, "seed": seed, "excess": excess}
    points, _, noise, exact = toy2d.reference(truth, seed)
    for n in STEPS:
        m = toy2d.sample_metrics(model.sample(noise, steps=n), points, truth)
        run[str(n)] = {"energy": m["energy"] - exact["energy"], "outliers": m["outliers"]}
    return run


def ranks(values: list[float]) -> np.ndarray:
    """Rank 1 for the smallest. Equal values share their mean rank; what diverged (nan) is last."""
    values = np.nan_to_num(np.asarray(values, dtype=float), nan=np.inf)
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) + 1) / 2


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: the correlation of the ranks."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def mean_ranks(runs: list[dict], names: list[str], steps: list[int]) -> np.ndarray:
    """The rank of each name by energy distance, averaged over seeds, mixtures and these steps."""
    energies = lambda run: [run[str(n)]["energy"] for n in steps]
    table = [[energies(run) for run in runs if run["name"] == name] for name in names]
    return np.apply_along_axis(ranks, 0, table).mean((1, 2))  # (names, runs, steps) -> (names,)


def rank_table(runs: list[dict], names: list[str], mixtures: list[str]) -> str:
    """The table in Markdown, best mean rank first, and the correlation with the paper's ranks."""
    columns = [mean_ranks(runs, names, steps) for steps in (STEPS, STEPS[:1], STEPS[-1:])]
    settings = [(m, n) for m in mixtures for n in STEPS]
    heads = ["variant", "rank all", "5", "50", "paper all", "5", "50"]
    rows = [[*heads, *(f"{m} {n}" for m, n in settings), "outliers 50", "excess"]]
    for i in np.argsort(columns[0], kind="stable"):
        group = [run for run in runs if run["name"] == names[i]]
        row = [names[i], *(f"{column[i]:.2f}" for column in columns)]
        row += [f"{x:.2f}" for x in PAPER.get(names[i], ())] or ["–"] * 3
        for m, n in settings:
            mean = 1e3 * np.mean([run[str(n)]["energy"] for run in group if run["mixture"] == m])
            row.append(number(mean if mean < 1000 else np.inf, ".2f"))
        row.append(number(np.mean([run["50"]["outliers"] for run in group]), ".1%"))
        row.append(number(np.mean([run["excess"] for run in group]), ".1e"))
        rows.append(row)
    known = [i for i, name in enumerate(names) if name in PAPER]
    if len(known) <= 2:
        return markdown(*rows)
    paper = np.array([PAPER[names[i]] for i in known]).T
    r = [rank_correlation(c[known], p) for c, p in zip(columns, paper, strict=True)]
    unit = "Energy distances in thousandths, above the exact field's from the same noise"
    correlation = f"{r[0]:.2f} (all), {r[1]:.2f} (5 steps), {r[2]:.2f} (50 steps)"
    return f"{markdown(*rows)}\n\n{unit}. Rank correlation with the paper: {correlation}."


def run(
    all: Annotated[bool, "all 61 formulations instead of the table's 16"] = False,
    names: Annotated[list[str] | None, "these formulations only"] = None,
    mixtures: Annotated[list[str], "also NAME-unscaled"] = ("ring", "grid"),
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run"] = 11_000,
    out: Annotated[File, "where runs are kept"] = File("runs/study"),
) -> None:
    names = [*dict.fromkeys(names or (STUDY if all else PAPER))]
    _ = [formulation(name) for name in names] + [toy2d.load_mixture(name) for name in mixtures]
    jobs = [(n, m, s) for s in range(seeds) for m in mixtures for n in names]
    keys = {"name", "mixture", "seed", "excess", *map(str, STEPS)}
    table = rank_table(run_missing(out, jobs, trained, steps, keys), names, mixtures)
    file = out / f"table-{'-'.join(mixtures)}.md"
    file.write_text(table + "\n")
    print(f"{table}\n\nwrote {file}")


if __name__ == "__main__":
    command(run, __doc__)
