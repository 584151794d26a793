"""Checkpoints: {config, step, network, ema, optimizer}, and the tables of data sets and objectives.

A checkpoint is written whole or not at all. It is read with doubt, like a student's `delta.pt`: no
pickle in it is run, and nothing of its sizes is allocated before they are checked.
Read next: `training/folder.py`, where a run writes it."""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path as File
from typing import Annotated

import torch
from torch import nn

from data.base import checksum
from data.cifar10 import Cifar10
from data.latents import Latents
from data.networks import NETWORKS
from data.shapes import Shapes
from data.toy import Toy
from perflow import PeRFlow, same_network
from rf import InputError, formulation
from training.folder import written
from training.options import Count, Recipe, misfit, names, pick, reading
from training.ranks import ranks, share, whole

# The tables of names: classes with the methods of `data.base.Data`, and with those of `PeRFlow`
DATASETS = {"toy2d": Toy, "shapes": Shapes, "cifar10": Cifar10, "latents": Latents}
OBJECTIVES = {"perflow": PeRFlow}
# A configuration holds these beside a `Recipe` and the `Options` of both
CONFIG = {"dataset", "objective", "spec", "teacher", "teacher_digest", "micro_batches"}
NEWER = {"teacher_digest", "micro_batches"}  # which an older one lacks


def objective_of(config: dict, guided: Callable | None = None):
    """To train a student it needs guided(cfg), the teacher's network with guidance."""
    formula = formulation(config["formulation"], config["shift"])
    if not config["objective"]:
        return formula
    objective = OBJECTIVES[config["objective"]]
    return objective.of(formula, pick(objective.Options, config), guided)


def save(path: str | File, content: dict) -> None:
    """There is always a whole file. OSError on a full disk."""
    try:
        with written(File(path)) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch.save raises it on a full disk
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error


def read(path: str | File, expected: str = "checkpoint") -> dict:
    """A checkpoint or a "delta", on the CPU. ValueError, in one line, on anything else."""
    keys = {"checkpoint": {"step", "network", "ema", "optimizer"}, "delta": {"delta"}}[expected]
    with reading(path, expected):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load would not notice
                raise ValueError(f"{damaged} is damaged")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # its message advises to run it
            raise ValueError("it holds a pickle of more than weights, which is not run") from None
        present = content.keys() if isinstance(content, dict) else set()
        if missing := (keys | {"config"}) - present:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        if missing := CONFIG - content["config"].keys() - NEWER:
            raise ValueError(f"it is of an older version: no {', '.join(sorted(missing))}")
        check(content, expected)
    return content


def check(content: dict, expected: str) -> None:
    """An error of any type on what `configure.py` never makes. It allocates no such sizes. What a
    newer version has learned to choose gets its default."""
    config, known = content["config"], names(Recipe) | CONFIG
    for key, kind in (("teacher", str | None), ("micro_batches", Count | None)):
        if fault := misfit(config.setdefault(key, None), kind):
            raise ValueError(f"{key} {fault}")
    for key, table in (("dataset", DATASETS), ("objective", OBJECTIVES)):
        if config[key] not in (None, *table):
            raise ValueError(f"unknown {key} {config[key]!r}; known are {', '.join(table)}")
        if config[key]:
            config |= asdict(pick(table[config[key]].Options, config))
            known |= names(table[config[key]].Options)
    if unknown := config.keys() - known:
        raise ValueError(f"it is of another version: it has {', '.join(sorted(unknown))}")
    recipe, data = pick(Recipe, config), DATASETS.get(config["dataset"])
    config |= asdict(recipe)
    formulation(recipe.formulation, recipe.shift)
    if recipe.network not in NETWORKS:
        raise ValueError(f"unknown network {recipe.network!r}; known are {', '.join(NETWORKS)}")
    if expected == "delta":
        if not config["objective"]:
            raise ValueError("it is of no student")
        if not all(w.isfinite().all() for w in content["delta"].values()):
            raise ValueError("it holds values that are not finite")
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
    """A checksum of the weights, by which a resumed student knows its teacher."""
    return checksum(network.state_dict().values())


def load_weights(network: nn.Module, state: dict, origin: str | File, assign=False) -> None:
    """Load all weights. ValueError, in one line, where they are another network's."""
    present = network.state_dict()
    try:
        state = {key: share(w, present.get(key)) for key, w in state.items()}
        network.load_state_dict(state, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{origin} holds the weights of another network: {reason[:200]}") from None


def start_from(network: nn.Module, state: dict, origin: str | File) -> None:
    """`load_weights` for a new run. A position table of another size stays the network's. So do the
    vectors of labels, if there are other classes, but for the last, of the null label."""
    new, state = network.state_dict(), dict(state)
    tables = {f"{k}.weight" for k, m in network.named_modules() if isinstance(m, nn.Embedding)}
    for key in new.keys() & state.keys():
        old, shape = state[key], new[key].shape
        if shape == old.shape:
            continue
        if key.endswith("pos_embed") and shape[-1] == old.shape[-1]:
            state[key] = new[key]
        elif key in tables and shape[1:] == old.shape[1:]:
            if ranks()[0] == 0:
                print(f"{key}: {shape[0]} labels for {len(old)}, so all but null start anew")
            state[key] = torch.cat([whole(new[key])[:-1].to(old), old[-1:]])
    load_weights(network, state, origin)
