"""From a checkpoint to samples: load, solve, guide, write.

    python sample.py runs/toy2d/checkpoint.pt --num 5000 --steps 20 --out samples.png

A checkpoint holds its own configuration: nothing else is needed, and no pickle in it is ever
executed. Sampling integrates from t = 1 (noise) down to t = 0 (data). In a notebook, three lines
are enough:

    sampler = sample.load("runs/toy2d/checkpoint.pt")
    x0 = sampler.sample(torch.randn(1000, 2), steps=50)

Read next: `train.py`, which writes the checkpoints.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import data
import toy2d
from data import Parser, positive
from mmdit import ClassMMDiT, MMDiT
from perflow import PeRFlow, plug
from rf import SOLVERS, Field, Formulation, RectifiedFlow, formulation, guide, solve


def open_dataset(config: dict):
    """The mixture, or the images or latents in the folder config["data"]."""
    if config["dataset"] == "toy2d":
        return toy2d.GaussianMixture(**config["mixture"])
    if not config["data"]:
        raise ValueError(f"--dataset {config['dataset']} needs --data DIR")
    return (data.Cifar10 if config["dataset"] == "cifar10" else data.Latents)(config["data"])


def build(config: dict) -> nn.Module:
    """A configuration's network, freshly initialised; `null_cond` is its null condition."""
    if config["dataset"] == "toy2d":
        classes = len(config["mixture"]["weights"]) if config["conditional"] else 0
        if config["network"] == "mlp":
            return toy2d.MLP(classes)
        return ClassMMDiT(
            classes, config["depth"], in_channels=2, patch_size=1, pos_embed_max_size=1, tokens=1
        )
    spec = config["spec"]
    channels, *size = spec["shape"]
    if size[0] % 2 or size[1] % 2:
        raise ValueError(f"latents of {size[0]} x {size[1]} do not divide into patches of 2 x 2")
    shape = dict(
        depth=config["depth"], in_channels=channels, patch_size=2, pos_embed_max_size=max(size) // 2
    )
    if spec["classes"]:
        return ClassMMDiT(spec["classes"], **shape, qk_norm=True)
    context, pooled = spec["context"], spec["pooled"]
    network = MMDiT(**shape, context_dim=context[-1], pooled_dim=pooled[-1], qk_norm=True)
    network.null_cond = (torch.zeros(context), torch.zeros(pooled))
    return network


@dataclass
class Sampler:
    """A trained network (its EMA weights), and how to sample from it."""

    network: nn.Module
    formulation: Formulation
    config: dict
    step: int
    flow: PeRFlow | None = None  # of a PeRFlow student

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def velocity(self) -> Field:
        """The network as a velocity field v(z, t, *cond) on the RF path, whatever it predicts.

        (A PeRFlow student's of the epsilon parameterization is on its teacher's path.)
        """
        if self.flow:
            return self.flow.velocity(student_field(self.config, self.formulation, self.network))
        return self.formulation.rectified(self.network)

    @torch.no_grad()
    def sample(
        self, noise: Tensor, *cond: Tensor, steps: int, method: str = "euler", cfg: float = 1.0
    ) -> Tensor:
        """Standard noise (B,...) -> x0 (B,...). ValueError on an unknown method or steps < 1.

        euler is the formulation's own first-order step on its own grid (DDIM for variance-
        preserving paths); heun and rk4 solve `velocity`. A PeRFlow student takes Euler steps inside
        its windows, and no other. cfg is the scale of classifier-free guidance, 1 is off.
        """
        null_cond = [c.to(noise.device) for c in self.network.null_cond]
        network = guide(self.network, null_cond, cfg)
        with torch.autocast(
            noise.device.type, torch.bfloat16, enabled=self.config["precision"] == "bf16"
        ):
            if self.flow:
                if method != "euler":
                    raise ValueError(f"a PeRFlow student takes euler steps, not {method!r}")
                if cfg != 1 and self.config["guidance"] == "fixed":
                    raise ValueError(f"this student's guidance is fixed: cfg {cfg:g} adds to it")
                student = student_field(self.config, self.formulation, network)
                return self.flow.sample(student, noise, *cond, steps=steps)
            if method == "euler":
                return self.formulation.sample(network, noise, *cond, steps=steps)
            path = RectifiedFlow()
            times = path.shift(path.grid(steps), self.formulation.shift)
            return solve(
                self.formulation.rectified(network),
                noise,
                *cond,
                steps=steps,
                times=times,
                method=method,
            )


def student_field(config: dict, formula: Formulation, network: Field) -> Field:
    """What a PeRFlow student trains as: a velocity field on the RF path, or the eps-network."""
    return network if config["parameterization"] == "epsilon" else formula.rectified(network)


def perflow_of(config: dict, formula: Formulation, teacher: Field | None = None) -> PeRFlow | None:
    """The PeRFlow of a student's configuration; sampling needs no teacher.

    None for other models.
    """
    if not config.get("perflow"):
        return None
    kept = ("windows", "solver_steps", "parameterization", "gap", "reuse")
    how = {key: config[key] for key in kept} | {"method": "heun"}
    if config["parameterization"] == "epsilon":
        if formula.prediction != "eps":
            raise ValueError(f"{formula.name} predicts no eps: --parameterization velocity fits it")
        return PeRFlow(teacher and formula.velocity(teacher), formula.path, **how)
    return PeRFlow(teacher and formula.rectified(teacher), RectifiedFlow(), **how)


CHECKPOINT_KEYS = {"config", "step", "network", "ema", "optimizer"}


def read_torch(path: str | File, kind: str, keys: set[str]) -> dict:
    """A file of torch.save, on the CPU. ValueError, in one line, on anything not whole."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{kind} {path}: {error.strerror or error}") from None
    except Exception as error:  # of many kinds on damaged files, and on pickles it refuses to run
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{kind} {path} is damaged or no {kind}: {reason[:120]}") from None
    missing = keys - content.keys() if isinstance(content, dict) else keys
    if missing:
        raise ValueError(f"{path} is no {kind} of this project: no {', '.join(sorted(missing))}")
    return content


def read_checkpoint(path: str | File) -> dict:
    """The checkpoint's dict, on the CPU. ValueError where it is missing, damaged or none."""
    return read_torch(path, "checkpoint", CHECKPOINT_KEYS)


def load_weights(network: nn.Module, state: dict, origin: str | File) -> None:
    """Strict, with a one-line ValueError where the weights are another network's."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{origin} holds the weights of another network: {reason[:200]}") from None


def load(path: str | File, device: str = "cpu") -> Sampler:
    """A Sampler from a checkpoint, with EMA weights.

    ValueError where it is missing, damaged or no checkpoint.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    try:
        network = build(config)
        formula = formulation(config["formulation"], config["shift"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: its configuration lacks {error}") from None
    load_weights(network, checkpoint["ema"], f"checkpoint {path}")
    network = network.to(check_device(device)).eval().requires_grad_(False)
    return Sampler(network, formula, config, checkpoint["step"], perflow_of(config, formula))


def plugged(sampler: Sampler, file: str | File) -> Sampler:
    """The sampler's network plus the Delta W of a PeRFlow student, and the student's windows.

    ValueError where the delta is of another network, formulation or no delta at all.
    """
    delta = read_torch(file, "delta", {"delta", "config"})
    own, config = sampler.config, delta["config"]
    if sampler.flow:
        raise ValueError(f"this model is a PeRFlow student already: {file} would be added twice")
    if own["formulation"] != config["formulation"]:
        raise ValueError(f"{file} is of a {config['formulation']}, not of a {own['formulation']}")
    plug(sampler.network, delta["delta"])
    flow = perflow_of(config, sampler.formulation)
    return replace(sampler, config={**config, **own, "perflow": config["perflow"]}, flow=flow)


# --------------------------------------------------------------------------------------------------
# The command line


def check_device(name: str) -> torch.device:
    """ValueError where the name is no device or the device is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # meta has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = (
            ["cpu"]
            + ["cuda"] * torch.cuda.is_available()
            + ["mps"] * torch.backends.mps.is_available()
        )
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(
            f"device {name!r} is not to be had ({reason}); choose from {', '.join(there)}"
        ) from None
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
        raise ValueError(
            "this model is unconditional: --label and --cfg need one trained with --conditional"
        )
    device = sampler.device
    x0 = sampler.sample(
        noise.to(device),
        *(c.to(device) for c in cond),
        steps=args.steps,
        method=args.solver,
        cfg=args.cfg,
    )
    x0 = x0.cpu()
    if args.out.suffix == ".png":
        toy2d.draw_samples(x0, mixture, toy2d.hues(noise[:2000])).save(args.out)
    else:
        np.savez(args.out, x0.numpy(), *(c.numpy() for c in cond))
    if args.num > 1:
        data, _ = mixture.sample(args.num, generator)
        labels = cond if args.label is None else ()
        exact = mixture.field(RectifiedFlow())
        best = solve(exact, noise, *labels, steps=50, method="heun")
        print(toy2d.figures_table({"samples": x0, "exact field, same noise": best}, data, mixture))
    print(f"wrote {args.out}")


def pictures(sampler: Sampler, x0: Tensor) -> np.ndarray | None:
    """x0 (B,C,H,W) as uint8 (B,H,W,3); None for latents whose VAE is not to be had here."""
    if sampler.config["dataset"] == "cifar10":
        return data.to_uint8(x0)
    try:
        return data.decode(x0, sampler.config["spec"]["meta"], str(sampler.device))
    except ValueError as error:
        print(f"not decoded: {error}")
        return None


def draw(
    sampler: Sampler,
    cond: Sequence[Tensor],
    seed: int,
    batch: int = 100,
    progress: bool = False,
    **how,
) -> Tensor:
    """Images or latents (n,C,H,W) in float32 on the CPU, one for each row of cond, in batches."""
    n, out = len(cond[0]), []
    generator = torch.Generator().manual_seed(seed)
    for rows in tqdm(torch.arange(n).split(batch), unit="batch", disable=not progress):
        noise = torch.randn(len(rows), *sampler.config["spec"]["shape"], generator=generator)
        inputs = (x.to(sampler.device) for x in (noise, *(c[rows] for c in cond)))
        out.append(sampler.sample(*inputs, **how).float().cpu())
    return torch.cat(out)


def draw_grid(images: np.ndarray, columns: int, names: Sequence[str] = ()) -> Image.Image:
    """Images (n,H,W,3) in rows of `columns`, small ones doubled, with a name before each row."""
    n, h, w, _ = images.shape
    zoom, gap = max(1, 64 // h), 2
    left = 90 if names else 0
    h, w = h * zoom + gap, w * zoom + gap
    sheet = Image.new("RGB", (left + columns * w + gap, -(-n // columns) * h + gap), "white")
    for i, image in enumerate(images):
        at = (left + i % columns * w + gap, i // columns * h + gap)
        sheet.paste(Image.fromarray(image).resize((w - gap, h - gap), Image.Resampling.NEAREST), at)
    for i, name in enumerate(names):
        ImageDraw.Draw(sheet).text(
            (6, i * h + h // 2 - 8), name[:12], "black", ImageFont.load_default(14)
        )
    return sheet


def class_rows(spec: dict, columns: int) -> tuple[tuple[Tensor], list[str]]:
    """Labels for a grid, a row for each of the first ten classes, and their names."""
    rows = min(10, spec["classes"])
    names = spec["names"] or [str(i) for i in range(rows)]
    return (torch.arange(rows).repeat_interleave(columns),), names[:rows]


def sample_images(sampler: Sampler, args: argparse.Namespace) -> None:
    """A labelled grid, or any number of samples as the ADM evaluator reads them.

    That is an .npz with arr_0 uint8 (N,H,W,3) and arr_1 the labels.
    """
    config, columns, names = sampler.config, 10, []
    spec = config["spec"]
    if not spec["classes"]:
        if args.label is not None:
            raise ValueError("this model takes text, not labels: --label does not apply")
        if args.data:
            latents = data.Latents(args.data)
            if any(latents.spec()[key] != spec[key] for key in ("context", "pooled")):
                raise ValueError(f"--data {args.data} does not hold texts of this model's shapes")
            _, *cond = latents.validation(args.num)
            cond = [c[torch.arange(args.num) % len(c)] for c in cond]
        else:
            cond = [null.expand(args.num, *null.shape) for null in sampler.network.null_cond]
    elif args.label is None:
        labels = torch.arange(args.num) % spec["classes"]
        if args.out.suffix == ".png":
            labels = labels.sort().values
            if spec["classes"] <= 10 and args.num % spec["classes"] == 0:
                columns, names = args.num // spec["classes"], class_rows(spec, 1)[1]
        cond = (labels,)
    elif 0 <= args.label < spec["classes"]:
        cond = (torch.full((args.num,), args.label),)
    else:
        raise ValueError(
            f"--label {args.label} is out of range; choose from 0 to {spec['classes'] - 1}"
        )
    x0 = draw(
        sampler, cond, args.seed, progress=True, steps=args.steps, method=args.solver, cfg=args.cfg
    )
    images = pictures(sampler, x0)
    if images is None:
        args.out = args.out.with_suffix(".npz")  # latents, as they are
    if args.out.suffix == ".npz":
        np.savez(args.out, x0.numpy() if images is None else images, *(c.numpy() for c in cond))
    else:
        draw_grid(images, columns, names).save(args.out)
    print(f"wrote {args.out}")


def main() -> None:
    parser = Parser(description="Draw samples from a checkpoint.")
    parser.add_argument("checkpoint", help="a checkpoint.pt that train.py wrote")
    parser.add_argument(
        "--num", type=positive, help="number of samples (default: 2000 points or 100 images)"
    )
    parser.add_argument(
        "--steps", type=positive, default=50, help="of the solver, from t = 1 to 0 (default: 50)"
    )
    parser.add_argument("--solver", default="euler", help=f"{', '.join(SOLVERS)} (default: euler)")
    parser.add_argument(
        "--cfg", type=float, default=1.0, help="scale of classifier-free guidance (default: 1, off)"
    )
    parser.add_argument(
        "--label", type=int, help="class of a conditional model; all classes if not given"
    )
    parser.add_argument("--plug", metavar="DELTA", help="add a PeRFlow delta.pt to the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: 0)")
    parser.add_argument(
        "--data", help="a folder of latents with text, whose held-out conditions are used"
    )
    parser.add_argument(
        "--out",
        type=File,
        default=File("samples.png"),
        help="a .png picture or an .npz of arrays (default: samples.png)",
    )
    parser.add_argument(
        "--device", default=default_device(), help="cpu, cuda, cuda:1, mps (default: cuda if there)"
    )
    args = parser.parse_args()
    with parser.one_line_errors():
        if args.out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out {args.out} must end in .png or .npz")
        if not math.isfinite(args.cfg):
            raise ValueError(f"--cfg {args.cfg} is not a finite number")
        if args.out.parent.is_dir() and not os.access(args.out.parent, os.W_OK):
            raise ValueError(f"--out {args.out}: {args.out.parent} is not writable")
        if args.solver not in SOLVERS:
            raise ValueError(f"unknown solver {args.solver!r}; choose from {', '.join(SOLVERS)}")
        sampler = load(args.checkpoint, args.device)
        if args.plug:
            sampler = plugged(sampler, args.plug)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        toy = sampler.config["dataset"] == "toy2d"
        args.num = args.num or (2000 if toy else 100)
        (sample_toy if toy else sample_images)(sampler, args)


if __name__ == "__main__":
    main()
