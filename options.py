"""What can be chosen: an option is a field of a dataclass or an argument of a function, and a flag.

Its annotation holds type, help text and, for numbers, the lowest and the highest good one; without
a text there is no flag. Without a default it is a positional argument or, if keyword-only, a
required flag. Values are plain: a checkpoint can hold them, and `pick` checks them wherever they
come from. `Recipe` has the options of every run; data sets and objectives declare their own."""

import argparse
import contextlib
import inspect
import os
import reprlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin

Count = NewType("Count", int)  # a whole number of at least 1


@dataclass
class Recipe:
    """The knobs of the loop and of the network; those with a text are flags. Data change some of
    them by `recipe`, and for students by `distil`; an objective may change some by its `recipe`."""

    formulation: Annotated[str, "path, prediction and density of t by the paper's name"] = "rf"
    shift: Annotated[float, "resolution-dependent shift sqrt(m/n), in training and sampling"] = 1.0
    depth: Annotated[Count, "of the MM-DiT: blocks, heads, and width / 64", 1, 256] = 8
    precision: Annotated[Literal["fp32", "bf16"], "of the network; all else is float32"] = "fp32"
    steps: Annotated[Count, "optimizer steps"] = 100_000
    batch_size: Annotated[
        Count, "examples of a step, over all ranks and accumulation", 1, 2**16
    ] = 256
    accumulate: Annotated[Count, "micro-batches of a step on each rank"] = 1
    lr: Annotated[float, "learning rate, after the warm-up", 1e-30, 1e30] = 1e-4
    compile: Annotated[bool, "torch.compile the network"] = False
    seed: Annotated[int, "of everything drawn"] = 0
    warmup: int = 1000  # steps of linear warm-up, but at most a tenth of the run
    decay: bool = False  # then constant; with decay, a cosine to 0
    beta2: Annotated[float, "", 0, 1] = 0.999  # of Adam, whose beta1 is 0.9
    eps: Annotated[float, "", 0, 1] = 1e-15  # of Adam, as in SD3's bf16 runs
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


def names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def pick(cls: type, values: dict) -> Any:
    """The dataclass of those values that are its fields. ValueError where one is of another type
    or out of range, as in a checkpoint that was damaged."""
    kinds = {field.name: field.type for field in fields(cls) if field.name in values}
    for name, kind in kinds.items():
        if fault := misfit(values[name], kind):
            raise ValueError(f"{name.replace('_', '-')} {fault}")
    return cls(**{name: values[name] for name in kinds})


def misfit(value: Any, kind: Any, *bounds: float) -> str:
    """What is wrong with a plain value of this annotation; nothing where it is a good one."""
    if get_origin(kind) is Annotated:
        kind, _, *bounds = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        faults = [misfit(value, each, *bounds) for each in get_args(kind)]
        return faults[0] * all(faults)
    if get_origin(kind) is list and isinstance(value, list):
        return next(filter(None, (misfit(each, *get_args(kind)) for each in value)), "")
    if get_origin(kind) is Literal:
        good, what = value in get_args(kind), f"one of {', '.join(map(str, get_args(kind)))}"
    elif kind in (Count, int, float):
        low, high = bounds or (1 if kind is Count else -(2**62), 2**62)
        good = type(value) in (int, kind) and low <= value <= high
        what = f"a{' whole' * (kind is not float)} number"
        shown = [f"{x:,}" if type(x) is int else f"{x:g}" for x in (low, high)]
        what += f" from {' to '.join(shown)}" if bounds else " of at least 1" * (kind is Count)
    else:
        good, what = type(value) is kind, f"a {kind.__name__}"
    return "" if good else f"{reprlib.repr(value)} is not {what}"


def plain(kind: Any) -> Any:
    """The type of one value of a flag: X of X | None, X | dict and list[X]."""
    return plain(get_args(kind)[0]) if get_origin(kind) in (Union, UnionType, list) else kind


def parser_of(kind: Any, *bounds: float) -> Callable[[str], Any]:
    """What argparse calls for a value."""

    def parse(text: str) -> Any:
        try:
            value = int(text) if kind is Count else kind(text)
        except ValueError:
            value = text
        if kind in (Count, int, float) and (fault := misfit(value, kind, *bounds)):
            raise argparse.ArgumentTypeError(fault)
        return value

    return parse


@contextlib.contextmanager
def reading(path: Any, kind: str) -> Iterator[None]:
    """Whatever goes wrong while a user's file is read ends in one line: the libraries that read
    damaged files raise errors of many kinds."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except Exception as error:
        if isinstance(error, RuntimeError) and no_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{path} is damaged or no {kind}: {reason}") from None


def no_memory(error: Exception) -> bool:
    """Whether this is Python's, or PyTorch's on a GPU or on a CPU, of too little memory."""
    told = any(words in str(error) for words in ("out of memory", "allocate memory"))
    return told or isinstance(error, MemoryError)


def ranks() -> tuple[int, int]:
    """(rank, number of ranks), as torchrun tells them. ValueError on what makes no sense."""
    told = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    rank, world = told if any(told) else ("0", "1")
    if not (str(rank).isdecimal() and str(world).isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK {rank} of WORLD_SIZE {world}: torchrun sets both")
    return int(rank), int(world)


class Parser(argparse.ArgumentParser):
    """An argparse parser that makes flags of options. Its errors are one line, its status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Bad input (ValueError, OSError) or Ctrl-C ends the command in one line, no traceback."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error):
                raise
            self.error(f"out of memory: {error}")
        except KeyboardInterrupt:
            self.exit(128 + signal.SIGINT, f"{self.prog}: stopped\n")

    def add_options(self, of: Callable, title: str, defaults: bool = True) -> None:
        """The flags of a dataclass or function."""
        group = self.add_argument_group(title)
        for name, option in inspect.signature(of).parameters.items():
            if get_origin(option.annotation) is not Annotated:
                continue
            kind, text, *bounds = get_args(option.annotation)
            if not text:
                continue
            how: dict[str, Any] = {"type": parser_of(plain(kind), *bounds)}
            if kind is bool:
                how = {"action": "store_true", "default": None}
            elif get_origin(kind) is Literal:
                how = {"choices": get_args(kind)}
            elif list in map(get_origin, (kind, *get_args(kind))):  # list[X], list[X] | None
                how |= {"nargs": "+", "action": "extend"}
            flag, given = "--" + name.replace("_", "-"), option.default is not option.empty
            if given and defaults and option.default not in (None, False):
                text += f" (default: {option.default})"
            elif option.kind is option.KEYWORD_ONLY and not given:
                how["required"] = True
            flag = flag if given or option.kind is option.KEYWORD_ONLY else name
            group.add_argument(flag, help=text.replace("%", "%%"), **how)

    def given(self) -> dict:
        """The options that the command line gives."""
        return {key: value for key, value in vars(self.parse_args()).items() if value is not None}


def command(run: Callable, description: str) -> None:
    """A whole command: run with the flags that are given, with one-line errors."""
    parser = Parser(description=description.split("\n\n")[0])
    parser.add_options(run, "options")
    given = parser.given()
    with parser.one_line_errors():
        run(**given)
