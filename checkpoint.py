"""Checkpoints: {config, step, network, ema, optimizer}, written whole or not at all, and read with
doubt: no pickle in them is run, and nothing of their sizes is allocated before they are checked.

`configure.py` makes their configuration. Here stand, too, the tables of the names that it holds."""

import os
import pickle
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path as File
from typing import Annotated

import torch
from torch import nn

from data import Cifar10, Latents
from options import Recipe, misfit, names, pick, ranks, reading
from parallel import share, whole
from perflow import PeRFlow, same_network
from rf import formulation
from shapes import Shapes
from toy2d import Toy

# The tables of names. A data set is a class with the methods of `toy2d.Toy` or `data.Dataset`. An
# objective is a formulation, or a student's: a class with the methods of `PeRFlow`.
DATASETS = {"toy2d": Toy, "shapes": Shapes, "cifar10": Cifar10, "latents": Latents}
OBJECTIVES = {"perflow": PeRFlow}


def save(path: str | File, content: dict) -> None:
    """Write beside the old file, flush to the disk, rename: there is always a whole one."""
    path = File(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | File, kind: str = "checkpoint") -> dict:
    """A checkpoint (or delta) on the CPU. ValueError, in one line, on anything not whole."""
    keys = {"checkpoint": {"step", "network", "ema", "optimizer"}, "delta": {"delta"}}[kind]
    with reading(path, kind):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load would not notice
                raise ValueError(f"{damaged} is damaged")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # its message advises to run it
            raise ValueError("it holds a pickle of more than weights, which is not run") from None
        there = content.keys() if isinstance(content, dict) else set()
        if missing := (keys | {"config"}) - there:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        expected = names(Recipe) | {"dataset", "objective", "spec", "teacher"}
        if lacking := expected - content["config"].keys():
            raise ValueError(f"it is of an older version: no {', '.join(sorted(lacking))}")
        check(content, kind)
    return content


def check(content: dict, kind: str) -> None:
    """That a configuration is one that `configure.py` makes, and that its network has the stored
    shapes, before anything of its sizes is allocated. If not, an error of any kind."""
    config = content["config"]
    if fault := misfit(config["teacher"], str | None):
        raise ValueError(f"teacher {fault}")
    for key, table in (("dataset", DATASETS), ("objective", OBJECTIVES)):
        if config[key] not in (None, *table):
            raise ValueError(f"unknown {key} {config[key]!r}; known are {', '.join(table)}")
        if config[key]:
            pick(table[config[key]].Options, config)
    recipe, data = pick(Recipe, config), DATASETS.get(config["dataset"])
    formulation(recipe.formulation, recipe.shift)
    if kind == "delta":
        if not config["objective"]:
            raise ValueError("it is of no student")
    elif fault := misfit(content["step"], Annotated[int, "", 0, recipe.steps]):
        raise ValueError(f"step {fault}")
    elif fault := misfit(content.get("losses", []), list[float]):
        raise ValueError(f"losses {fault}")
    elif data:
        config["spec"] |= asdict(pick(data.Spec, config["spec"]))
        with torch.device("meta"):
            network = data.network(config["spec"], recipe)
        for part in ("network", "ema"):
            same_network(network, content[part])


def digest(network: nn.Module) -> int:
    """Of the weights: a student remembers which teacher it learns from."""
    crc = 0
    for w in network.state_dict().values():
        crc = zlib.crc32(w.detach().cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def load_weights(network: nn.Module, state: dict, origin: str | File, assign=False) -> None:
    """Strict, with a one-line ValueError where the weights are another network's."""
    own = network.state_dict()
    try:
        state = {key: share(w, own.get(key)) for key, w in state.items()}
        network.load_state_dict(state, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} holds the weights of another network: {reason[:200]}") from None


def start_from(network: nn.Module, state: dict, origin: str | File) -> None:
    """The weights that a new run begins with. Two differences are meant to be: a position table of
    another size is the network's own, and so are the labels of other classes, but for the null one,
    the last. All else is `load_weights`."""
    own, state = network.state_dict(), dict(state)
    tables = {f"{k}.weight" for k, m in network.named_modules() if isinstance(m, nn.Embedding)}
    for key in own.keys() & state.keys():
        known, shape = state[key], own[key].shape
        if shape == known.shape:
            continue
        if key.endswith("pos_embed") and shape[-1] == known.shape[-1]:
            state[key] = own[key]
        elif key in tables and shape[1:] == known.shape[1:]:
            if ranks()[0] == 0:
                print(f"{key}: {shape[0]} labels for {len(known)}, so all but null start anew")
            state[key] = torch.cat([whole(own[key])[:-1].to(known), known[-1:]])
    load_weights(network, state, origin)
