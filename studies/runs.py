"""What all studies share: training by a function call, runs that are kept as files, and tables.

Missing runs are made side by side, one a thread; a run whose file exists is not made again."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as File
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.base import HELD_OUT, seeded
from data.shapes import SIZE, conditions_of, diversity, draw_rows, paint, row_of, rows_of, verdicts
from data.toy import number
from rf import InputError, formulation
from sample import Sampler
from train import State, batches, train
from training.folder import written
from training.options import Recipe, preset, reading
from training.ranks import compile_blocks

# Each run has one thread; a network on shapes is compiled, which halves the time
TOY = preset("toy2d")
SHAPES = preset("shapes") | dict(threads=1, compile=True)
POINTS = 10  # of a curve
SPREAD = "a red circle left of a blue square", "a red triangle above a blue circle"


def learned(
    data, recipe: Recipe, objective=None, start: Sampler | None = None,
    raw: dict | None = None, watch: Callable[[int, Sampler], None] | None = None,
) -> Sampler:  # fmt: skip
    """Train a network on these data, by default a new one, for the recipe's formulation. The
    Sampler has averaged weights; `raw` gets the network of the last step, and watch(step, sampler)
    is called ten times on the way."""
    objective = objective or formulation(recipe.formulation)
    torch.manual_seed(recipe.seed)
    network = data.network(data.spec(), recipe)
    if start:
        network.load_state_dict(start.network.state_dict())
    state = State(network, recipe)
    sampler = Sampler(state.average, objective, vars(recipe) | {"spec": data.spec()})
    for part in (network, state.average) if recipe.compile else ():
        compile_blocks(part)
    torch.manual_seed(recipe.seed)  # a critic draws the same, whatever the network has drawn
    stream = batches(data, objective, recipe, network.null_cond)

    def watched():
        for step, batch in enumerate(stream):
            if watch and step and step % (recipe.steps // POINTS) == 0:
                watch(step, sampler)
            yield batch

    train(state, objective, watched(), recipe)
    stream.close()
    if watch:
        watch(recipe.steps, sampler)
    if raw is not None:
        raw["network"] = network.eval()
    return sampler


@torch.no_grad()
def judged(draw: Callable, scan: bool = False, n: int = 200, spread: int = 256) -> dict:
    """Of draw(noise, *cond) -> x0 on shapes: the shares of n captions of seen and of n of unseen
    pairs that are all right, the mean distance to the nearest true picture, and the `diversity` of
    `spread` pictures of one caption, the mean over a seen and an unseen one; 0 leaves it out.
    Captions and noise are the same for all; a scan has others."""
    generator = seeded(0, int(scan), 4, HELD_OUT)

    def drawn(rows: Tensor) -> Tensor:
        noise = torch.randn(len(rows), 3, SIZE, SIZE, generator=generator)
        parts = (x.split(128) for x in (noise, *conditions_of(rows)))
        return torch.cat([draw(*part).float() for part in zip(*parts, strict=True)])

    rows = [draw_rows(n, generator, new) for new in (False, True)]
    seen, unseen = (verdicts(r, drawn(r)) for r in rows)
    one = [diversity(c, drawn(torch.full((spread,), row_of(c)))) for c in SPREAD if spread]
    distance = (seen["distance"] + unseen["distance"]) / 2
    scores = dict(seen=seen["all right"], unseen=unseen["all right"], distance=distance)
    keys = one[0] if one else ()
    return scores | {key: np.mean([d[key] for d in one]).item() for key in keys}


def true_pictures() -> Callable:
    """draw(noise, *cond) for `judged`: true pictures of these captions, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return lambda noise, context, pooled: paint(rows_of(context), generator)


def run_file(out: File, job: Sequence) -> File:
    return out / f"{quote('-'.join(map(str, job)), safe='(),')}.json"


def of_numbers(value) -> bool:
    """Whether a value of JSON has nothing else in its lists and dicts."""
    parts = [*value.values()] if isinstance(value, dict) else value
    return all(map(of_numbers, parts)) if isinstance(parts, list) else type(value) in (int, float)


def read_run(out: File, job: Sequence, keys) -> dict:
    """The run of this job. InputError where its file is another's, or holds what no run has."""
    with reading(file := run_file(out, job), "run of this study"):
        run = json.loads(file.read_text())
        if missing := {"job", "steps", *keys} - dict(run).keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if run["job"] != [*job]:
            raise ValueError(f"it is of the job {run['job']}")
        for key in ("steps", *keys):
            if run[key] not in job and not of_numbers(run[key]):
                raise ValueError(f"{key} is not of numbers")
    return run


def end_with_parent() -> None:
    """Make a worker leave when its parent, which waits for the results, is gone, even killed."""
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=watch, daemon=True).start()


def made(job: tuple, work: Callable, steps: int) -> dict:
    """The run of this job, in one thread."""
    torch.set_num_threads(1)
    return dict(job=job, steps=steps, **work(*job, steps=steps))


def run_missing(out: File, jobs: list[tuple], work: Callable, steps: int, keys) -> list[dict]:
    """The run of each job, a dict with these keys: read from `out`, or made by work(*job, steps)
    and written there. ValueError where a file is damaged or of other steps."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not run_file(out, job).exists()]
    present = [read_run(out, job, keys) for job in {*jobs} - {*missing}]
    if other := {run["steps"] for run in present} - {steps}:
        raise InputError(f"--out {out} holds runs of {min(other)} steps, not {steps}")
    # on Ctrl-C or a failed run the pool ends its workers; the files of finished runs stay
    workers = max(1, min(len(missing), os.cpu_count()))
    with multiprocessing.get_context("spawn").Pool(workers, end_with_parent) as pool:
        runs = pool.imap_unordered(partial(made, work=work, steps=steps), missing)
        for run in tqdm(runs, initial=len(present), total=len(jobs)):
            with written(run_file(out, run["job"])) as file:
                file.write(json.dumps(run).encode())
    return [read_run(out, job, keys) for job in jobs]


def scan(
    middles: dict[str, float], factor: float, scores: Callable
) -> dict[str, dict[float, float]]:
    """{name: {rate: score}}, the lowest is best: scores([(name, rate), ...]) on three rates each
    around its middle one; a scan goes on while its best rate is at an end, up to five rates."""
    tidy = lambda lr: float(f"{lr:.2g}")
    rates = {name: [tidy(lr * factor**i) for i in (-1, 0, 1)] for name, lr in middles.items()}
    for _ in range(3):
        pairs = [(name, lr) for name, lrs in rates.items() for lr in lrs]
        scans = {name: {} for name in rates}
        for (name, lr), score in zip(pairs, scores(pairs), strict=True):
            scans[name][lr] = np.nan_to_num(score, nan=np.inf, posinf=np.inf)
        for name, found in scans.items():
            best, low, high = min(found, key=found.get), min(found), max(found)
            if best in (low, high):
                rates[name].append(tidy(low / factor if best == low else high * factor))
    return scans


def mean_and_error(values: Sequence[float], form: str) -> str:
    """Mean ± standard error; a single value has no error."""
    mean = number(np.mean(values), form)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{mean} ± {error:{form}}" if np.isfinite(error) else mean


def markdown(*rows: Sequence[str]) -> str:
    """A table; the first row is its head."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
