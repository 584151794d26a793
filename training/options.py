"""What can be chosen in a run. An option is a field of a dataclass or an argument of a function:

    x: Annotated[int, "help", 1, 9] = 3     the flag --x, a whole number from 1 to 9
    x: Annotated[int, "help", 1, 9]         a positional argument; if keyword-only, a required flag
    x: Annotated[int, "", 1, 9] = 3         no flag
    x: int = 3                              no flag, and no bounds

A checkpoint holds values as they are, and `pick` checks them. `Recipe` has the options of all runs;
data sets and objectives declare more. Read next: `training/configure.py`, from flags to values."""

import argparse
import contextlib
import inspect
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path as File
from types import UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin

import torch

from rf import InputError

Count = NewType("Count", int)  # a whole number of at least 1


@dataclass
class Recipe:
    """The knobs of the loop and of the network, with the defaults that `PRESETS` changes."""

    formulation: Annotated[str, "path, prediction and density of t by the paper's name"] = "rf"
    shift: Annotated[float, "resolution-dependent shift sqrt(m/n), in training and sampling"] = 1.0
    network: str = "mmdit"  # a name of `data.networks.NETWORKS`, by the flag --network
    depth: Annotated[Count, "blocks, heads and width / 64; of the MLP: layers", 1, 256] = 8
    precision: Annotated[Literal["fp32", "bf16"], "of the network; all else is float32"] = "fp32"
    steps: Annotated[Count, "optimizer steps", 1, 10**9] = 100_000
    batch_size: Annotated[Count, "examples of a step, over ranks and accumulation", 1, 2**16] = 256
    accumulate: Annotated[Count, "micro-batches of a step on each rank"] = 1
    lr: Annotated[float, "learning rate, after the warm-up", 1e-30, 1e30] = 1e-4
    compile: Annotated[bool, "torch.compile the network"] = False
    seed: Annotated[int, "of everything drawn", -(2**31), 2**31 - 1] = 0
    warmup: int = 1000  # steps of linear warm-up, but at most a tenth of the run
    decay: bool = False  # after the warm-up lr is constant; with decay it is a cosine to 0
    beta2: Annotated[float, "", 0, 1] = 0.999  # of Adam, whose beta1 is 0.9
    eps: Annotated[float, "", 0, 1] = 1e-15  # of Adam, as in SD3's bf16 runs
    muon: Annotated[float, "", 0, 1000] = 0.0  # Muon's rate for hidden matrices over lr; 0 is none
    weight_decay: float = 0.0
    clip: float | None = 1.0  # of the gradient's norm
    ema_decay: Annotated[float, "", 0, 1] = 0.99  # of the average of the weights,
    ema_every: Count = 100  # every so many steps
    dropout: Annotated[float, "", 0, 1] = 0.1  # share of the examples that lose all conditions
    block: Annotated[Count, "", 1, 1000] = 1  # steps whose examples are drawn at once
    log_every: Count = 20
    eval_every: Count = 1000
    save_every: Count = 1000
    validation: Annotated[Count, "", 1, 2**16] = 512  # held-out examples
    threads: Annotated[Count | None, "", 1, 1024] = None  # of the CPU; by default PyTorch's

    def __post_init__(self):
        if self.eval_every % self.log_every or self.save_every % self.log_every:
            raise ValueError("eval_every and save_every must be multiples of log_every")


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 faster than float32: a GPU, or a CPU that says so."""
    cpu = File("/proc/cpuinfo").read_text() if File("/proc/cpuinfo").exists() else ""
    return torch.cuda.is_available() or bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu))


# What a data set, one of its options or its students change in `Recipe`. Later rows win, flags over
# all. A class can bring a row along (`data.base.Data`). A student starts from its teacher's recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "toy2d": dict(
        formulation="rf", precision="fp32", network="mlp", depth=2, steps=6_000, batch_size=256,
        lr=2e-3, warmup=500, decay=True, beta2=0.99, eps=1e-8, ema_every=10, block=25,
        log_every=100, validation=1024,
    ),
    "toy2d --network mlp": dict(  # on one thread, as two would slow it down
        steps=4_000, batch_size=4096, lr=1e-2, muon=3.0, clip=None, threads=1
    ),
    # shapes are learned last, and from much noise: hence (0.5, 1) and small batches
    "shapes": dict(
        formulation="rf/lognorm(0.50,1.00)", depth=4, batch_size=32, lr=3e-3, warmup=200,
        decay=True, beta2=0.99, eps=1e-8, ema_decay=0.995, ema_every=1, block=8, log_every=50,
        eval_every=500, save_every=500, validation=256, steps=2_000, muon=7.0,
        precision="bf16" if fast_bf16() else "fp32",
    ),
    "cifar10": dict(
        formulation="rf/lognorm(0.00,1.00)", precision="bf16", depth=8, steps=200_000, lr=3e-4
    ),
    "latents": dict(
        formulation="rf/lognorm(0.00,1.00)", precision="bf16", depth=12, steps=500_000, lr=1e-4
    ),
    # a student needs a solve for each held-out example: hence fewer of them
    "student": dict(steps=20_000, batch_size=256, lr=1e-4, muon=0.0, validation=128),
    "toy2d student": dict(  # it clips, as a solve may run away
        steps=8_000, batch_size=1024, lr=2e-3, validation=1024, clip=1.0
    ),
    "shapes student": dict(steps=1_500, batch_size=32, lr=5e-4, validation=64),
    "latents student": dict(lr=5e-5),
    "student --guidance fixed": dict(dropout=0.0),  # it is never guided
}  # fmt: skip


def preset(words: str) -> dict[str, Any]:
    """The changes of all rows whose words are among these, as in preset("toy2d student"). Students
    have the rows with "student", other runs the rows without. A row can choose the network."""
    given, changes = set(words.split()), {}
    for row, values in PRESETS.items():
        row_words = set(row.split())
        if row_words <= given and ("student" in row_words) == ("student" in given):
            changes |= values
            if "--network" not in given and "network" in changes:
                given |= {"--network", changes["network"]}
    return changes


def names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def pick(cls: type, values: dict) -> Any:
    """The dataclass with those values that are its fields. ValueError where one is no good."""
    types = {field.name: field.type for field in fields(cls) if field.name in values}
    for name, annotation in types.items():
        if fault := misfit(values[name], annotation):
            raise InputError(f"{name.replace('_', '-')} {fault}")
    return cls(**{name: values[name] for name in types})


def misfit(value: Any, expected: Any, *bounds: float) -> str:
    """What is wrong with a plain value of this annotation; "" where it is good."""
    if get_origin(expected) is Annotated:
        expected, _, *bounds = get_args(expected)
    if get_origin(expected) in (Union, UnionType):
        faults = [misfit(value, option, *bounds) for option in get_args(expected)]
        return faults[0] if all(faults) else ""
    if get_origin(expected) is list and isinstance(value, list):
        return next(filter(None, (misfit(each, *get_args(expected)) for each in value)), "")
    if get_origin(expected) is Literal:
        choices = get_args(expected)
        good, wanted = value in choices, f"one of {', '.join(map(str, choices))}"
    elif expected in (Count, int, float):
        low, high = bounds or (1 if expected is Count else -(2**62), 2**62)
        good = type(value) in (int, expected) and low <= value <= high
        wanted = "a number" if expected is float else "a whole number"
        if bounds:
            limits = [f"{x:,}" if type(x) is int else f"{x:g}" for x in bounds]
            wanted += f" from {' to '.join(limits)}"
        elif expected is Count:
            wanted += " of at least 1"
    else:
        good, wanted = type(value) is expected, f"a {expected.__name__}"
    return "" if good else f"{reprlib.repr(value)} is not {wanted}"


def plain(annotation: Any) -> Any:
    """The type of one value of a flag: X of X | None, X | dict and list[X]."""
    nested = get_origin(annotation) in (Union, UnionType, list)
    return plain(get_args(annotation)[0]) if nested else annotation


def parse(expected: Any, bounds: Sequence[float], text: str) -> Any:
    if expected is File and not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        value = int(text) if expected is Count else expected(text)
    except ValueError:
        value = text
    if expected in (Count, int, float) and (fault := misfit(value, expected, *bounds)):
        raise argparse.ArgumentTypeError(fault)
    return value


@contextlib.contextmanager
def reading(path: Any, content: str) -> Iterator[None]:
    """Any error while a user's file is read, of many types, becomes an InputError of one line. A
    pipe or a device, of which a read may not end, is not read."""
    try:
        if File(path).exists() and not (File(path).is_file() or File(path).is_dir()):
            raise OSError("it is no regular file")
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        if isinstance(error, RuntimeError) and no_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise InputError(f"{path} is damaged or no {content}: {reason}") from None


def no_memory(error: Exception) -> bool:
    words = "out of memory", "allocate memory"
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def say(text: str) -> None:
    """Print at once. Where nobody reads any more (a closed pipe), the work goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """It makes flags of options. An error is one line, with status 2. A command that has a parser
    has streams to write to, into which any file name can be printed."""

    def __init__(self, *args, description: str | None = "", **settings):
        super().__init__(*args, description=(description or "").split("\n\n")[0], **settings)
        self.owners: dict[str, tuple] = {}  # of each option: its group and its annotation
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # it was closed
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
            getattr(sys, name).reconfigure(errors="backslashreplace")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Bad input, a fault of the system (OSError) or Ctrl-C ends the command in one line. Any
        other error keeps its traceback."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        except (InputError, OSError) as error:
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error):
                raise
            self.error(f"out of memory: {error}")
        except KeyboardInterrupt:
            self.exit(128 + signal.SIGINT, f"{self.prog}: stopped\n")

    def add_options(self, of: Callable, title: str, defaults: bool = True) -> None:
        group = self.add_argument_group(title)
        for name, option in inspect.signature(of).parameters.items():
            owner, known = self.owners.setdefault(name, (group, option.annotation))
            if known != option.annotation:
                raise ValueError(f"{title} and {owner.title} define --{name} differently")
            if owner is not group:
                owner.title += f", {title}" * (title not in owner.title)  # both have it
                continue
            if get_origin(option.annotation) is not Annotated:
                continue
            expected, text, *bounds = get_args(option.annotation)
            if not text:
                continue
            settings: dict[str, Any] = {"type": partial(parse, plain(expected), bounds)}
            if expected is bool:
                settings = {"action": "store_true", "default": None}
            elif get_origin(expected) is Literal:
                settings = {"choices": get_args(expected)}
            elif list in map(get_origin, (expected, *get_args(expected))):  # or list[X] | None
                settings |= {"nargs": "+", "action": "extend"}
            required = option.default is option.empty
            is_flag = not required or option.kind is option.KEYWORD_ONLY
            if is_flag:
                settings["required"] = required
            if defaults and option.default not in (None, False, option.empty):
                text += f" (default: {option.default})"
            flag = "--" + name.replace("_", "-") if is_flag else name
            group.add_argument(flag, help=text.replace("%", "%%"), **settings)

    def given(self) -> dict:
        given = {key: value for key, value in vars(self.parse_args()).items() if value is not None}
        if empty := [key.replace("_", "-") for key, value in given.items() if value == ""]:
            self.error(f"--{empty[0]} is empty")  # an unset variable of a shell
        return given


def command(run: Callable, description: str) -> None:
    """A whole command: call run with the given flags. Its errors are one line."""
    parser = Parser(description=description)
    parser.add_options(run, "options")
    given = parser.given()
    with parser.one_line_errors():
        run(**given)
