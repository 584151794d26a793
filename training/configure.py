"""From the flags of a run to its configuration: plain values, which a checkpoint holds.

It starts from what the data set and the objective prefer, or from the run that goes on, the teacher
or the model to fine-tune; flags come last. Read next: `training/checkpoint.py`."""

import argparse
import contextlib
import itertools
import os
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path as File

from data.networks import NETWORKS
from rf import InputError
from training.checkpoint import DATASETS, OBJECTIVES, digest, read
from training.folder import locked
from training.options import PRESETS, Parser, Recipe, names, parse, pick, preset
from training.ranks import ranks

MAY_CHANGE = {"steps", "accumulate", "compile", "data", "download"}  # when a run is resumed
OF_NETWORK = {"dataset", "formulation", "network", "depth"}  # what a start from weights keeps


def make_parser(description: str) -> Parser:
    rows = {"every run": vars(Recipe()), **PRESETS}
    wrap = textwrap.TextWrapper(100, subsequent_indent="    ").fill
    said = lambda values: ", ".join(f"{key} {value}" for key, value in values.items())
    lines = [wrap(f"{row}: {said(values)}") for row, values in rows.items()]
    epilog = "\n".join(["defaults, and what a data set, an option or a student changes:", *lines])
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, epilog=epilog, formatter_class=layout)
    add = parser.add_argument
    add("--dataset", help=f"one of {', '.join(DATASETS)} (default: toy2d)")
    for name, objective in OBJECTIVES.items():
        if objective.distils:
            add(f"--{name}", metavar="TEACHER", help=f"train a {name} student of this checkpoint")
        else:
            add(f"--{name}", action="store_const", const=True, help=f"learn by {name}")
    add("--network", help=f"one of {', '.join(NETWORKS)} (default: toy2d mlp, else mmdit)")
    add("--init", metavar="MODEL", help="start from the weights of a checkpoint or a released SD3")
    folder = partial(parse, File, ())
    add("--out", type=folder, help="the run's folder (default: runs/DATASET, numbered if taken)")
    add("--resume", action="store_true", help="go on with --out, or the last run")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--shard", action="store_true", help="torchrun's ranks share weights and optimizer (FSDP2)")
    add("--no-report", action="store_true", help="end after the last step: no samples, no pictures")
    parser.add_options(Recipe, "the loop", defaults=False)
    for name, entry in (DATASETS | OBJECTIVES).items():
        parser.add_options(entry.Options, flag_of(name))
    return parser


def flag_of(name: str) -> str:
    """How a data set or an objective is chosen."""
    if name in DATASETS:
        return f"--dataset {name}"
    return f"--{name}" + " TEACHER" * OBJECTIVES[name].distils


def configure(given: dict, held: contextlib.ExitStack, load: Callable) -> tuple:
    """(configuration, folder, the checkpoint to go on from, the model to start from) of the flags.
    load(model, device) reads the model; `held` holds the folder's lock. ValueError on bad flags."""
    objective = next((name for name in OBJECTIVES if name in given), None)
    teacher = given[objective] if objective and OBJECTIVES[objective].distils else None
    init, resume = given.get("init"), bool(given.get("resume"))
    if init and (teacher or resume):
        raise InputError(f"--init {init} is for a new run that is no student's")
    # where it starts from
    origin = teacher or init
    start = load(origin, given.get("device")) if origin else None
    known = start.config if start else {}
    if known.get("objective"):
        student = OBJECTIVES[known["objective"]].distils
        what = "itself a student; take its teacher" if student else "no flow: take a formulation's"
        raise InputError(f"{origin} is {what}")
    # its folder
    not_kept = ("out", "resume", "device", "init", "shard", "no_report", objective)
    flags = {key: value for key, value in given.items() if key not in not_kept}
    data_set, checkpoint = flags.get("dataset", known.get("dataset", "toy2d")), None
    default = f"{data_set}-{objective}" if objective else data_set
    out = choose(given.get("out"), default, resume, held)
    # what it goes on with
    if resume:
        checkpoint, origin = read(out / "checkpoint.pt"), f"the run in {out}"
        known = checkpoint["config"]
        if objective not in (None, known["objective"]):
            raise InputError(f"--{objective}: the run in {out} is no {objective} student")
        if flags.get("steps", known["steps"]) < checkpoint["step"]:
            at = f"{out} is at step {checkpoint['step']} already"
            raise InputError(f"--steps {flags['steps']}: {at}")
        data_set, objective = flags.get("dataset", known["dataset"]), known["objective"]
        teacher = teacher or known["teacher"]
        if teacher and not start:
            start = load(teacher, given.get("device"))
    config = compose(flags, data_set, objective, known, origin, resume)
    before = checkpoint["config"].get("micro_batches") if checkpoint else None
    config |= shared_out(config["accumulate"], "accumulate" in flags, before)
    weights = digest(start.network) if teacher else None
    if resume and weights != known.get("teacher_digest"):
        raise InputError(f"{teacher} has other weights than the teacher of {origin}")
    return config | {"teacher": teacher, "teacher_digest": weights}, out, checkpoint, start


def shared_out(accumulate: int, given: bool, before: int | None) -> dict:
    """How many micro-batches a step has, over ranks and --accumulate. Each draws for itself, so a
    run goes on with as many as before, on any number of ranks that divides them."""
    world = ranks()[1]
    micros = before or world * accumulate
    if micros % world or (given and accumulate * world != micros):
        how = f"{world} ranks" + f" with --accumulate {accumulate}" * given
        raise InputError(f"{how} cannot go on with a run of {micros} micro-batches a step")
    return dict(accumulate=micros // world, micro_batches=micros)


def resume_command(given: dict, config: dict, out: File) -> str:
    """What to type to go on: as many ranks of this machine, and the flags that no run keeps."""
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE", ranks()[1])
    start = "python" if ranks()[1] == 1 else f"torchrun --nproc_per_node {ranks_here}"
    flags = "".join(f" --{key.replace('_', '-')}" for key in ("shard", "no_report") if key in given)
    flags += f" --device {given['device']}" if "device" in given else ""
    return f"{start} train.py --dataset {config['dataset']} --resume --out {out}{flags}"


def choose(out: File | None, default: str, resume: bool, held: contextlib.ExitStack) -> File:
    """The run's folder, locked until `held` is closed: --out, or runs/DEFAULT, which is numbered.
    To go on with, it is the last one that holds a run; for a new run, the first free one."""
    numbered = lambda n: File("runs") / (default if n == 1 else f"{default}-{n}")
    holds_run = lambda folder: (folder / "checkpoint.pt").exists()
    free = next(n for n in itertools.count(1) if not holds_run(numbered(n)))
    if resume and not out:
        out = numbered(max(1, free - 1))
    for n in itertools.count(free):
        folder = out or numbered(n)
        if ranks()[0] > 0:
            return folder  # rank 0 holds it for all
        try:
            held.enter_context(locked(folder))
            if holds_run(folder) and not resume:
                taken = "holds a run already: --resume it, or take another --out"
                raise BlockingIOError(f"--out {folder} {taken}")
            return folder
        except BlockingIOError:
            if out:
                raise


def compose(flags: dict, data_set: str, objective, known: dict, origin, resume: bool) -> dict:
    """The fields of Recipe and of both Options, dataset, objective and spec. `known` are the values
    of the origin: a resumed run, a teacher, or a model to fine-tune, of which only the network's
    are kept. `PRESETS` change them, then the flags. ValueError names one that may not."""
    if data_set not in DATASETS:
        raise InputError(f"unknown data set {data_set!r}; choose from {', '.join(DATASETS)}")
    data_class, objective_class = DATASETS[data_set], OBJECTIVES.get(objective)
    options = asdict(pick(data_class.Options, known | flags))
    if objective:
        options |= asdict(pick(objective_class.Options, known | flags))
    said = [f"--{key} {value}" for key, value in options.items()]
    words = [data_set, f"--{objective}", *(word for word in said if word in " ".join(PRESETS))]
    if network := (known | flags).get("network"):
        words.append(f"--network {network}")
    words = " ".join(words)
    if resume:
        values, fixed = known, known.keys() - MAY_CHANGE
    elif objective and objective_class.distils:
        values = known | preset(f"{words} student") | data_class.distil
        fixed = OF_NETWORK | {"shift"} | names(data_class.Options) - MAY_CHANGE
    else:
        network = {key: known[key] for key in (OF_NETWORK | {"shift"}) & known.keys()}
        values, fixed = preset(words) | data_class.recipe | network, OF_NETWORK
    config = asdict(pick(Recipe, values | flags)) | options
    if config["network"] not in NETWORKS:
        good = ", ".join(NETWORKS)
        raise InputError(f"unknown network {config['network']!r}; choose from {good}")
    config |= dict(dataset=data_set, objective=objective, spec=known.get("spec"))
    for flag, value in flags.items():
        shown = f"--{flag.replace('_', '-')}" + ("" if value is True else f" {value}")
        if flag not in config:
            tables = (DATASETS | OBJECTIVES).items()
            owners = [flag_of(name) for name, entry in tables if flag in names(entry.Options)]
            raise InputError(f"{shown} needs {' or '.join(owners)}")
        if known and flag in fixed and config[flag] != known[flag]:
            raise InputError(f"{shown} differs from {origin}, which has {str(known[flag])[:80]}")
    return config
