"""From the flags of a run to its configuration: plain values, which a checkpoint holds.

It starts from what the data set and the objective prefer, or from the run that goes on, the teacher
or the model to fine-tune; the flags come last. Here stand, too, the folder that a run takes and
what may differ between a run and the one that it starts from. Read next: `train.py`."""

import contextlib
import itertools
from dataclasses import asdict
from pathlib import Path as File

import sample
from checkpoint import DATASETS, OBJECTIVES, digest, read
from data import locked
from options import Parser, Recipe, names, pick, ranks

MAY_CHANGE = {"steps", "accumulate", "compile", "data", "download"}  # when a run is resumed
OF_NETWORK = {"dataset", "formulation", "depth"}  # what a start from weights keeps


def make_parser(description: str) -> Parser:
    described = []
    for name, kind in DATASETS.items():
        recipe = Recipe(**kind.recipe(kind.Options()))
        shown = ("formulation", "steps", "batch_size", "lr", "depth", "precision")
        described.append(f"{name}: " + ", ".join(f"{key} {getattr(recipe, key)}" for key in shown))
    epilog = f"Defaults by data set. {'. '.join(described)}."
    how = dict(epilog=epilog, conflict_handler="resolve")  # two data sets may share a flag
    parser = Parser(description=description, **how)
    add = parser.add_argument
    add("--dataset", help=f"one of {', '.join(DATASETS)} (default: toy2d)")
    for name in OBJECTIVES:
        add(f"--{name}", metavar="TEACHER", help=f"train a {name} student of this checkpoint")
    add("--init", metavar="MODEL", help="start from the weights of a checkpoint or a released SD3")
    add("--out", type=File, help="the run's folder (default: runs/DATASET, numbered if taken)")
    add("--resume", action="store_true", default=None, help="go on with --out, or the last run")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    how = dict(action="store_true", default=None)
    add("--shard", help="torchrun's ranks share weights and optimizer (FSDP2)", **how)
    parser.add_options(Recipe, "the loop", defaults=False)
    for flag, table in (("--dataset {}", DATASETS), ("--{} TEACHER", OBJECTIVES)):
        for name, kind in table.items():
            parser.add_options(kind.Options, flag.format(name))
    return parser


def configure(given: dict, held: contextlib.ExitStack) -> tuple:
    """(configuration, folder, the checkpoint to go on from, the model to start from) of the flags
    that were given. The folder is locked until `held` is closed. ValueError on bad flags."""
    objective = next((name for name in OBJECTIVES if name in given), None)
    teacher, init, resume = given.get(objective), given.get("init"), given.get("resume")
    if init and (teacher or resume):
        raise ValueError(f"--init {init} is for a new run that is no student's")
    load = lambda model: sample.load(model, given.get("device"))
    start, whose = load(teacher or init) if teacher or init else None, teacher or init
    origin = start.config if start else {}
    if origin.get("objective"):
        raise ValueError(f"{whose} is itself a student; take its teacher")
    own = ("out", "resume", "device", "init", "shard", objective)
    flags = {key: value for key, value in given.items() if key not in own}
    name, checkpoint = flags.get("dataset", origin.get("dataset", "toy2d")), None
    default = "-".join(filter(None, (name, objective)))
    out = choose(given.get("out"), default, bool(resume), held)
    if resume:
        checkpoint, whose = read(out / "checkpoint.pt"), f"the run in {out}"
        origin = checkpoint["config"]
        if teacher and origin["objective"] != objective:
            raise ValueError(f"--{objective} {teacher}: the run in {out} is no {objective} student")
        name, objective = flags.get("dataset", origin["dataset"]), origin["objective"]
        teacher = teacher or origin["teacher"]
        start = start or (load(teacher) if teacher else None)
        if flags.get("steps", origin["steps"]) < checkpoint["step"]:
            at = f"{out} is at step {checkpoint['step']} already"
            raise ValueError(f"--steps {flags['steps']}: {at}")
    config = compose(flags, name, objective, origin, bool(resume), whose)
    known = digest(start.network) if teacher else None
    if resume and known != origin.get("teacher_digest"):
        raise ValueError(f"{teacher} has other weights than the teacher of {whose}")
    return config | {"teacher": teacher, "teacher_digest": known}, out, checkpoint, start


def choose(out: File | None, default: str, resume: bool, held: contextlib.ExitStack) -> File:
    """The run's folder, locked until `held` is closed: --out, or runs/DEFAULT, which is numbered.
    To go on with, it is the last one that holds a run; for a new run, the first free one."""
    numbered = lambda n: File("runs") / (default if n == 1 else f"{default}-{n}")
    there = lambda folder: (folder / "checkpoint.pt").exists()
    free = next(n for n in itertools.count(1) if not there(numbered(n)))
    if resume and not out:
        out = numbered(max(1, free - 1))
    for n in itertools.count(free):
        folder = out or numbered(n)
        if ranks()[0] > 0:
            return folder  # rank 0 holds it for all
        try:
            held.enter_context(locked(folder))
            if there(folder) and not resume:
                what = "holds a run already: --resume it, or take another --out"
                raise BlockingIOError(f"--out {folder} {what}")
            return folder
        except BlockingIOError:
            if out:
                raise


def compose(flags: dict, name: str, objective: str | None, origin: dict, resume: bool, whose: str):
    """The configuration as plain values: the fields of Recipe and of both Options, dataset,
    objective and spec. It starts from the values of its origin: the run that is resumed, a
    student's teacher, or what tells the network of the model that is fine-tuned. Then come those
    that data and objective change, then the flags."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    kind, learner = DATASETS[name], OBJECTIVES.get(objective)
    options = pick(kind.Options, origin | flags)
    student = pick(learner.Options, origin | flags) if learner else None
    values, fixed = origin, origin.keys() - MAY_CHANGE
    if not resume and learner:
        values = origin | kind.distil | learner.recipe(student)
        fixed = OF_NETWORK | {"shift"} | names(kind.Options) - MAY_CHANGE
    elif not resume:
        fixed, kept = OF_NETWORK, (OF_NETWORK | {"shift"}) & origin.keys()
        values = kind.recipe(options) | {key: origin[key] for key in kept}
    config = asdict(pick(Recipe, values | flags)) | asdict(options)
    config |= asdict(student) if student else {}
    config |= dict(dataset=name, objective=objective, spec=origin.get("spec"))
    for flag, value in flags.items():
        shown = f"--{flag.replace('_', '-')}" + f" {value}" * (value is not True)
        if flag not in config:
            owners = [f"--dataset {n}" for n, k in DATASETS.items() if flag in names(k.Options)]
            owners += [f"--{n} TEACHER" for n, k in OBJECTIVES.items() if flag in names(k.Options)]
            raise ValueError(f"{shown} needs {' or '.join(owners)}")
        if origin and flag in fixed and config[flag] != origin[flag]:
            raise ValueError(f"{shown} differs from {whose}, which has {str(origin[flag])[:80]}")
    return config


def compared(spec: dict, known: dict | None, whose: str, kept: str) -> dict:
    """The spec of the data, of which is kept: "all", the run's that is resumed; the "shape" of what
    a teacher draws; the "kind" of network that a run starts from, whose classes and sizes may be
    others. A released one takes any size, and its shape is kept."""
    known = known or spec
    if "released" in spec:
        spec = spec | {"released": known.get("released")}
    keys = {"context", "pooled", "network"} | ({"shape", "classes"} if kept == "shape" else set())
    keys -= {"shape", "context"} if known.get("released") else set()
    other = [key for key in spec if spec[key] != known.get(key) and (kept == "all" or key in keys)]
    if kept == "kind" and not known.get("released") and spec["shape"][0] != known["shape"][0]:
        other.append("shape")
    if other:
        raise ValueError(f"these data are not those of {whose}: {', '.join(other)} differ")
    return spec
