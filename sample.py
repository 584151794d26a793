"""From a checkpoint to samples: load, solve, guide, write.

    python sample.py runs/toy2d/checkpoint.pt --num 5000 --steps 20 --out samples.png

A checkpoint holds its own configuration: nothing else is needed, and no pickle in it is ever executed.
Sampling integrates from t = 1 (noise) down to t = 0 (data). In a notebook, three lines are enough:

    sampler = sample.load("runs/toy2d/checkpoint.pt")
    x0 = sampler.sample(torch.randn(1000, 2), steps=50)

Read next: `train.py`, which writes the checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor, nn

import toy2d
from rf import SOLVERS, Field, Formulation, formulation, guide, solve


def build(config: dict) -> nn.Module:
    """The network that a configuration describes, freshly initialised; `null_cond` is its null condition."""
    return toy2d.MLP(classes=len(config["mixture"]["weights"]) if config["conditional"] else 0)


@dataclass
class Sampler:
    """A trained network (its EMA weights), and how to sample from it."""

    network: nn.Module
    formulation: Formulation
    config: dict
    step: int

    @property
    def velocity(self) -> Field:
        """The network as a velocity field v(z, t, *cond) on the RF path, whatever it was trained to predict."""
        return self.formulation.rectified(self.network)

    @torch.no_grad()
    def sample(self, noise: Tensor, *cond: Tensor, steps: int, method: str = "euler", cfg: float = 1.0) -> Tensor:
        """Standard noise (B,...) -> x0 (B,...). ValueError on an unknown method or steps < 1.

        euler is the formulation's own first-order step on its own grid (DDIM for variance-preserving paths); heun
        and rk4 solve `velocity`. cfg is the scale of classifier-free guidance, 1 is off.
        """
        network = guide(self.network, self.network.null_cond, cfg)
        if method == "euler":
            return self.formulation.sample(network, noise, *cond, steps=steps)
        return solve(self.formulation.rectified(network), noise, *cond, steps=steps, method=method)


CHECKPOINT_KEYS = {"config", "step", "network", "ema", "optimizer"}


def read_checkpoint(path: str | File) -> dict:
    """The checkpoint's dict, on the CPU. ValueError, in one line, on anything that is not a whole checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # torch.load raises many kinds on damaged files, and on pickles it refuses to run
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or no checkpoint: {reason[:120]}") from None
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT_KEYS:
        raise ValueError(f"checkpoint {path} is not one of this project's: it needs {', '.join(sorted(CHECKPOINT_KEYS))}")
    return checkpoint


def load_weights(network: nn.Module, state: dict, origin: str | File) -> None:
    """Strict, with a one-line ValueError where the weights are another network's."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} holds the weights of another network: {reason[:200]}") from None


def load(path: str | File, device: str = "cpu") -> Sampler:
    """A Sampler from a checkpoint, with EMA weights. ValueError where it is missing, damaged or no checkpoint."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    try:
        network = build(config)
        formula = formulation(config["formulation"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: its configuration lacks {error}") from None
    load_weights(network, checkpoint["ema"], f"checkpoint {path}")
    return Sampler(network.to(check_device(device)).eval().requires_grad_(False), formula, config, checkpoint["step"])


# ----------------------------------------------------------------------------------------------------
# The command line, and what all commands share


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Bad input (ValueError, OSError) ends the command in one line, not in a traceback."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(" ".join(str(error).split()))


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def check_device(name: str) -> torch.device:
    """ValueError where the name is no device or the device is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"device {name!r} is not there; choose from {', '.join(there)}") from None
    return device


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def sample_toy(sampler: Sampler, args: argparse.Namespace) -> None:
    """Samples of a mixture: a picture or an .npz, and the yardsticks beside the exact field's."""
    mixture = toy2d.GaussianMixture(**sampler.config["mixture"])
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(args.num, 2, generator=generator)
    cond = ()
    if sampler.config["conditional"]:
        K = len(mixture.weights)
        if args.label is None:
            cond = (mixture.sample(args.num, generator)[1],)
        elif 0 <= args.label < K:
            cond = (torch.full((args.num,), args.label),)
            mixture = mixture.component(args.label)
        else:
            raise ValueError(f"--label {args.label} is out of range; choose from 0 to {K - 1}")
    elif args.label is not None or args.cfg != 1:
        raise ValueError("this checkpoint is unconditional: --label and --cfg need one trained with --conditional")
    device = next(sampler.network.parameters()).device
    x0 = sampler.sample(noise.to(device), *(c.to(device) for c in cond), steps=args.steps, method=args.solver, cfg=args.cfg)
    x0 = x0.cpu()
    if args.out.suffix == ".png":
        toy2d.draw_samples(x0, mixture, toy2d.hues(noise[:2000])).save(args.out)
    else:
        np.savez(args.out, x0.numpy(), *(c.numpy() for c in cond))
    if args.num > 1:
        data, _ = mixture.sample(args.num, generator)
        labels = cond if args.label is None else ()
        exact = mixture.field(toy2d.RectifiedFlow())
        best = solve(exact, noise, *labels, steps=50, method="heun")
        print(toy2d.figures_table({"samples": x0, "exact field, same noise": best}, data, mixture))
    print(f"wrote {args.out}")


def main() -> None:
    parser = Parser(description="Draw samples from a checkpoint.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint.pt that train.py wrote")
    parser.add_argument("--num", type=positive, default=2000, help="number of samples")
    parser.add_argument("--steps", type=positive, default=50, help="steps of the solver from t = 1 to 0")
    parser.add_argument("--solver", default="euler", help=f"one of {', '.join(SOLVERS)}")
    parser.add_argument("--cfg", type=float, default=1.0, help="scale of classifier-free guidance; 1 is off")
    parser.add_argument("--label", type=int, help="class of a conditional model; all classes if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise")
    parser.add_argument("--out", type=File, default=File("samples.png"), help="a .png picture or an .npz of arrays")
    parser.add_argument("--device", default=default_device(), help="cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    with parser.one_line_errors():
        if args.out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out {args.out} must end in .png or .npz")
        if args.solver not in SOLVERS:
            raise ValueError(f"unknown solver {args.solver!r}; choose from {', '.join(SOLVERS)}")
        sampler = load(args.checkpoint, args.device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sample_toy(sampler, args)


if __name__ == "__main__":
    main()
