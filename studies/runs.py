"""The runs of a study: made side by side, one a thread, each kept as a file and not made again.

And how their tables are written."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as File
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

import toy2d
from options import reading


def run_file(out: File, job: Sequence) -> File:
    return out / f"{quote('-'.join(map(str, job)), safe='(),')}.json"


def read_run(file: File, keys: Iterable[str]) -> dict:
    with reading(file, "run of this study"):
        run = json.loads(file.read_text())
        if missing := set(keys) - dict(run).keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
    return run


def end_with_parent() -> None:
    """In a worker: leave when the process that waits for the results is gone, even killed."""
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=watch, daemon=True).start()


def run_missing(
    out: File, jobs: list[tuple], work: Callable[[tuple], dict], steps: int, keys: Iterable[str]
) -> list[dict]:
    """The result of each job, a dict with these keys and its number of steps: read from `out`, or
    made by work(job) and kept there. ValueError where a file is damaged or of other steps."""
    out.mkdir(parents=True, exist_ok=True)
    keys = {*keys, "job", "steps"}
    missing = [job for job in jobs if not run_file(out, job).exists()]
    runs = {job: read_run(run_file(out, job), keys) for job in {*jobs} - {*missing}}
    if other := {run["steps"] for run in runs.values()} - {steps}:
        raise ValueError(f"--out {out} holds runs of {min(other)} steps, not {steps}")
    # on Ctrl-C or a failed run the pool ends its workers; finished runs are kept
    workers = max(1, min(len(missing), os.cpu_count()))
    with multiprocessing.get_context("spawn").Pool(workers, end_with_parent) as pool:
        made = pool.imap_unordered(work, missing)
        for run in tqdm(made, initial=len(jobs) - len(missing), total=len(jobs)):
            file = run_file(out, run["job"])
            half = file.with_suffix(f".{os.getpid()}.tmp")
            half.write_text(json.dumps(run))
            half.replace(file)
            runs[tuple(run["job"])] = read_run(file, keys)
    return [runs[job] for job in jobs]


def shown(values: Sequence[float], form: str) -> str:
    """Mean and standard error, which one run has not."""
    mean = toy2d.shown(np.mean(values), form)
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return mean if error is None or not np.isfinite(error) else f"{mean} ± {error:{form}}"


def markdown(*rows: Sequence[str]) -> str:
    """A table, of which the first row is the head."""
    head, *others = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])
