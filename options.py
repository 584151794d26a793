"""What can be chosen: an option is a field of a dataclass or an argument of a function, and a flag.

Its annotation holds type and help text; without a text there is no flag. Without a default it is a
positional argument or, if keyword-only, a required flag. Values are plain: a checkpoint can hold
them. `Recipe` has the options of every run; data sets and objectives declare their own."""

import argparse
import contextlib
import inspect
import math
from collections.abc import Callable
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
    depth: Annotated[Count, "of the MM-DiT: blocks, heads, and width / 64"] = 8
    precision: Annotated[Literal["fp32", "bf16"], "of the network; all else is float32"] = "fp32"
    steps: Annotated[Count, "optimizer steps"] = 100_000
    batch_size: Annotated[Count, "examples of a step, over all ranks and accumulation"] = 256
    accumulate: Annotated[Count, "micro-batches of a step on each rank"] = 1
    lr: Annotated[float, "learning rate, after the warm-up"] = 1e-4
    compile: Annotated[bool, "torch.compile the network"] = False
    seed: Annotated[int, "of everything drawn"] = 0
    warmup: int = 1000  # steps of linear warm-up, but at most a tenth of the run
    decay: bool = False  # then constant; with decay, a cosine to 0
    beta2: float = 0.999  # of Adam, whose beta1 is 0.9
    eps: float = 1e-15  # of Adam, as in SD3's bf16 runs
    weight_decay: float = 0.0
    clip: float | None = 1.0  # of the gradient's norm
    ema_decay: float = 0.99  # of the average of the weights,
    ema_every: int = 100  # every so many steps
    dropout: float = 0.1  # share of the examples that lose all conditions
    block: int = 1  # steps whose examples are drawn at once
    log_every: int = 20
    eval_every: int = 1000
    save_every: int = 1000
    validation: int = 512  # held-out examples
    threads: int | None = None  # of the CPU; the default is PyTorch's

    def __post_init__(self):
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"--lr {self.lr} is not a positive number")


def names(cls: type) -> set[str]:
    return {field.name for field in fields(cls)}


def pick(cls: type, values: dict) -> Any:
    """The dataclass of those values that are its fields."""
    return cls(**{key: values[key] for key in names(cls) & values.keys()})


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    """An argparse parser that makes flags of options. Its errors are one line, its status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Bad input (ValueError, OSError) ends the command in one line, not in a traceback."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(error)

    def add_options(self, of: Callable, title: str, defaults: bool = True) -> None:
        """The flags of a dataclass or function."""
        group = self.add_argument_group(title)
        for name, option in inspect.signature(of).parameters.items():
            if get_origin(option.annotation) is not Annotated:
                continue
            kind, text = get_args(option.annotation)
            if get_origin(kind) in (Union, UnionType):  # X | None, X | dict: the flag is an X
                kind = get_args(kind)[0]
            how: dict[str, Any] = {"type": count if kind is Count else kind}
            if kind is bool:
                how = {"action": "store_true", "default": None}
            elif get_origin(kind) is Literal:
                how = {"choices": get_args(kind)}
            elif get_origin(kind) is list:
                how = {"type": get_args(kind)[0], "nargs": "+", "action": "extend"}
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
