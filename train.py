"""One training loop for every data set and both objectives.

    python train.py --dataset toy2d                   a minute on a CPU: from noise to a ring
    python train.py --dataset cifar10 --data DIR --download   pictures, fetched into DIR
    python train.py --perflow runs/toy2d/checkpoint.pt        a few-step student of any checkpoint
    python train.py --resume --out runs/toy2d         go on where a run stopped
    torchrun --nproc_per_node 8 train.py --dataset latents --data DIR

A run leaves OUT/checkpoint.pt, OUT/log.jsonl and its pictures. Everything drawn in a step comes
from generators seeded by (seed, step, micro-batch), the micro-batches of a step counted over ranks
and accumulation alike, so the step number is the only state of randomness: a resumed run equals
the uninterrupted one bit for bit on a CPU, and two ranks equal one that accumulates twice. Time: t
= 0 is data, t = 1 is noise. Read next: `rf.py` for what `examples` computes, `sample.py` for what
is done with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path as File

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import perflow
import sample
import toy2d
from data import Parser, download, positive
from mmdit import MMDiT
from rf import Field, formulation, guide
from sample import Sampler, check_device, default_device

# --------------------------------------------------------------------------------------------------
# The knobs of a run: the flags' defaults for each data set, and what has no flag

IMAGES = dict(
    network="mmdit",
    formulation="rf/lognorm(0.00,1.00)",
    batch_size=256,
    warmup=1000,  # steps of linear warm-up
    decay=False,  # then constant; with decay, a cosine to 0
    betas=[0.9, 0.999],
    eps=1e-15,  # Adam's, as in SD3's bf16 runs
    weight_decay=0.0,
    clip=1.0,  # of the gradient's norm
    ema=[0.99, 100],  # decay 0.99 every 100 steps
    precision="bf16",
    block=1,  # steps whose examples are drawn at once
    log_every=20,
    eval_every=1000,
    save_every=1000,
    validation=512,  # held-out examples
    dropout=None,  # each condition's own rate: 0.1 of a label, 0.464 as each of SD3's text encoders
)
PRESETS = {
    "toy2d": dict(
        network="mlp",
        depth=2,  # of --network mmdit
        formulation="rf",
        steps=27_000,
        batch_size=1024,
        lr=1e-2,
        warmup=500,
        decay=True,
        betas=[0.9, 0.99],
        eps=1e-8,
        weight_decay=0.0,
        clip=None,
        ema=[0.99, 10],
        dropout=[0.1],
        precision="fp32",
        block=25,
        log_every=100,
        eval_every=1000,
        save_every=1000,
        validation=1024,
    ),
    "cifar10": IMAGES | dict(depth=8, steps=200_000, lr=3e-4),
    "latents": IMAGES | dict(depth=12, steps=500_000, lr=1e-4),
}
# --network mmdit on the toy
POINTS = dict(steps=6_000, batch_size=256, lr=2e-3, clip=1.0)
DEFAULTS = dict(
    mixture="ring",
    conditional=False,
    accumulate=1,
    compile=False,
    shift=1.0,
    seed=0,
    data=None,
    perflow=None,
    reuse=1,  # examples made of each datum
)
# A PeRFlow student takes its teacher's configuration but for these
PERFLOW = dict(
    windows=4,
    solver_steps=8,
    guidance="sync",
    teacher_cfg=1.0,
    parameterization="velocity",
    gap=0.25,
    reuse=4,  # draws of t that share a solve of the teacher
)
PERFLOW_PRESETS = {  # a held-out example costs eight solves
    "toy2d": dict(steps=8_000, batch_size=1024, lr=2e-3, clip=1.0),  # a solve may go astray
    "cifar10": dict(steps=20_000, batch_size=256, lr=1e-4, validation=128),
    "latents": dict(steps=20_000, batch_size=256, lr=5e-5, validation=128),
}
# Between a run and its resumption
MAY_CHANGE = ("steps", "accumulate", "compile", "data", "perflow")


def make_parser() -> Parser:
    shown = ("formulation", "steps", "batch_size", "lr", "depth", "precision")
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="Defaults by data set. "
        + ". ".join(f"{n}: " + ", ".join(f"{k} {p[k]}" for k in shown) for n, p in PRESETS.items()),
    )
    add = parser.add_argument
    add("--dataset", help=f"one of {', '.join(PRESETS)} (default: toy2d)")
    add("--data", help="folder of cifar-10-binary.tar.gz or its unpacked files, or of the latents")
    add("--download", action="store_true", help="cifar10: fetch the archive into --data first")
    add("--mixture", help=f"toy2d: {', '.join(toy2d.MIXTURES)} or FILE.json: means, covs, weights")
    add(
        "--conditional",
        action="store_true",
        default=None,
        help="toy2d: give the network the mode's label",
    )
    add(
        "--network",
        choices=["mlp", "mmdit"],
        help="toy2d: the small MLP (default) or a small MM-DiT",
    )
    add("--depth", type=positive, help="of the MM-DiT: blocks, heads, and width / 64")
    add(
        "--formulation",
        help="path, prediction and density of t by the paper's name, as in 'rf/lognorm(0.00,1.00)'",
    )
    add(
        "--shift",
        type=float,
        help="resolution-dependent shift sqrt(m/n) of t, in training and sampling (default: 1)",
    )
    add("--steps", type=positive, help="optimizer steps")
    add(
        "--batch-size",
        type=positive,
        help="examples per optimizer step, over all ranks and accumulation",
    )
    add("--accumulate", type=positive, help="micro-batches per step on each rank (default: 1)")
    add("--lr", type=float, help="learning rate, after the warm-up")
    add("--precision", choices=["fp32", "bf16"], help="of the network; all else is float32")
    add("--compile", action="store_true", default=None, help="torch.compile the network")
    add("--perflow", metavar="TEACHER", help="train a PeRFlow student of this checkpoint")
    add("--windows", type=positive, help="PeRFlow's K, its fewest steps; 1 is reflow (default: 4)")
    add("--solver-steps", type=positive, help="teacher's evaluations in a window (default: 8)")
    add(
        "--parameterization",
        choices=["velocity", "epsilon"],
        help="PeRFlow's target; epsilon for eps/linear teachers only (default: velocity)",
    )
    add(
        "--guidance",
        choices=["sync", "fixed"],
        help="PeRFlow: guide the student when sampling, or the teacher now (default: sync)",
    )
    add("--teacher-cfg", type=float, help="guidance scale of the teacher, for fixed (default: 1)")
    add("--seed", type=int, help="of everything drawn (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--out", type=File, help="the run's folder (default: runs/DATASET, numbered if taken)")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out (default: the last of runs/DATASET)",
    )
    return parser


def configure(args: argparse.Namespace) -> tuple[dict, File, dict | None]:
    """(the run's configuration, its folder, the checkpoint to go on from or None).

    ValueError on bad input.
    """
    given = {
        k: v
        for k, v in vars(args).items()
        if v is not None and k not in ("out", "resume", "device", "download")
    }
    student = "perflow" in given and not args.resume
    teacher = sample.load(given["perflow"]).config if student else {}
    if teacher.get("perflow"):
        raise ValueError(f"--perflow {args.perflow} is itself a PeRFlow student; take its teacher")
    name = given.setdefault("dataset", teacher.get("dataset", "toy2d"))
    if name not in PRESETS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(PRESETS)}")
    base = f"{name}-perflow" if student else name
    folders = (File("runs") / f"{base}{f'-{i}' if i > 1 else ''}" for i in itertools.count(1))
    taken = list(itertools.takewhile(lambda folder: (folder / "checkpoint.pt").exists(), folders))
    if "mixture" in given:
        given["mixture"] = toy2d.load_mixture(given["mixture"]).spec()
    if args.resume:
        out = args.out or (taken[-1] if taken else File("runs") / base)
        checkpoint = sample.read_checkpoint(out / "checkpoint.pt")
        config = checkpoint["config"]
        if "perflow" in given and not config["perflow"]:
            raise ValueError(f"--perflow {args.perflow}: the run in {out} is no PeRFlow student")
        for key, value in given.items():
            if (
                config.get(key) != value
                and key not in MAY_CHANGE
                and getattr(args, key) is not None
            ):
                flag = f"--{key.replace('_', '-')} {getattr(args, key)}"
                raise ValueError(
                    f"{flag} differs from the run in {out}, which has {str(config.get(key))[:80]}"
                )
        if given.get("steps", config["steps"]) < checkpoint["step"]:
            raise ValueError(f"--steps {args.steps}: {out} is at step {checkpoint['step']} already")
        return config | {key: given[key] for key in MAY_CHANGE if key in given}, out, checkpoint
    points = name == "toy2d" and given.get("network") == "mmdit"
    config = DEFAULTS | PRESETS[name] | (POINTS if points else {}) | given
    if student:
        for key in ("dataset", "mixture", "network", "depth", "formulation", "conditional"):
            if given.get(key, teacher[key]) != teacher[key]:
                flag = f"--{key} {getattr(args, key)}"
                raise ValueError(f"{flag} is not the teacher's, which is {str(teacher[key])[:80]}")
        config = teacher | PERFLOW | PERFLOW_PRESETS[name] | given
        scale, guidance = config["teacher_cfg"], config["guidance"]
        if guidance == "fixed":
            config["dropout"] = [0.0, 0.0]
        if guidance == "fixed" and name == "toy2d" and not config["conditional"]:
            raise ValueError("--guidance fixed needs a conditional teacher; this one is not")
        if (scale != 1) != (guidance == "fixed"):
            raise ValueError(
                f"--guidance {guidance} --teacher-cfg {scale:g} do not go together: fixed solves "
                "the teacher with a scale other than 1, sync without guidance"
            )
    elif unused := sorted(given.keys() & PERFLOW.keys()):
        raise ValueError(f"--{unused[0].replace('_', '-')} needs --perflow TEACHER")
    if name != "toy2d" and (
        toy := sorted(given.keys() & {"mixture", "conditional", "network"} - teacher.keys())
    ):
        raise ValueError(f"--{toy[0]} is for toy2d, not for {name}")
    if name == "toy2d" and "data" in given:
        raise ValueError("--data is for cifar10 and latents, not for toy2d")
    if not (config["lr"] > 0 and math.isfinite(config["lr"])):
        raise ValueError(f"--lr {config['lr']} is not a positive number")
    formula = formulation(config["formulation"], config["shift"])  # a bad name ends here,
    sample.perflow_of(config, formula)  # and what does not fit
    if isinstance(config["mixture"], str):
        config["mixture"] = toy2d.load_mixture(config["mixture"]).spec()
    out = args.out or File("runs") / (f"{base}-{len(taken) + 1}" if taken else base)
    if (out / "checkpoint.pt").exists() and int(os.environ.get("RANK", 0)) == 0:
        raise ValueError(
            f"--out {out} holds a run already: --resume goes on with it, another --out keeps it"
        )
    return config, out, None


# --------------------------------------------------------------------------------------------------
# The examples: (z, t, target, *cond), a pure function of (seed, step, micro-batch)


NOISE, FLIPS, DATA, HELD_OUT = range(4)  # what is drawn: each has generators of its own


def seeded(
    seed: int, block: int, micro: int, what: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator of the numbers' hash (by their sum, seed 0's step 1 were seed 1's step 0)."""
    numbers = [n & 0xFFFFFFFF for n in (seed, block, micro, what)]
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def drop(
    cond: list[Tensor], null_cond: Sequence[Tensor], rates: list[float], generator: torch.Generator
) -> list[Tensor]:
    """Replace each condition's rows by the null one at its rate, for classifier-free guidance.

    Text that is stored in float16 comes out in float32, as its null condition is.
    """
    kept = []
    for c, null, rate in zip(cond, null_cond, rates, strict=False):
        dropped = torch.rand(len(c), generator=generator, device=generator.device) < rate
        kept.append(torch.where(dropped.reshape(-1, *[1] * (c.dim() - 1)), null, c))
    return kept


def make_source(
    config: dict, dataset, device: torch.device, micro: int, micros: int
) -> Callable[[int], list[Tensor]]:
    """block -> [x0, *cond] on the device: a micro-batch's data for a block of steps."""
    size = config["batch_size"] // micros // config["reuse"]
    if config["dataset"] == "toy2d":
        draw = lambda block: dataset.sample(
            size * config["block"], seeded(config["seed"], block, micro, DATA)
        )
        return lambda block: [x.to(device) for x in draw(block)[: 1 + config["conditional"]]]

    def source(block: int) -> list[Tensor]:
        pin = (lambda x: x.pin_memory()) if device.type == "cuda" else (lambda x: x)
        batch = dataset.batch(config["seed"], block, size, micro, micros)
        x0, *cond = (pin(x).to(device, non_blocking=True) for x in batch)
        x0 = dataset.to_float(x0)
        if dataset.flip:
            generator = seeded(config["seed"], block, micro, FLIPS, device)
            flip = torch.rand(len(x0), 1, 1, 1, generator=generator, device=device) < 0.5
            x0 = torch.where(flip, x0.flip(3), x0)
        return [x0, *cond]

    return source


def examples(
    config: dict, objective, source, null_cond, start: int, micro: int, device: torch.device
) -> Iterator[tuple]:
    """(z, t, target, *cond) of step start, start + 1, ..., in whole blocks, the next in advance.

    null_cond is on the device.
    """
    size = config["block"]

    @torch.no_grad()
    def draw(block: int) -> list[tuple[Tensor, ...]]:
        if device.type == "cpu" and config["network"] == "mlp":
            torch.set_num_threads(1)  # this is a thread of its own
        x0, *cond = source(block)
        generator = seeded(config["seed"], block, micro, NOISE, device)
        cond = drop(cond, null_cond, config["dropout"], generator)
        rows = objective.examples(x0, *cond, generator=generator)  # reuse times as many
        return list(zip(*(x.split(len(x) // size) for x in rows), strict=True))

    with ThreadPoolExecutor(1) as thread:
        block, skip = divmod(start, size)
        coming = thread.submit(draw, block)
        while True:
            block += 1
            steps, coming = coming.result(), thread.submit(draw, block)
            yield from steps[skip:]
            skip = 0


# --------------------------------------------------------------------------------------------------
# The step


def learning_rate(config: dict, step: int) -> float:
    """Linear warm-up, then constant or, with decay, a cosine to 0."""
    decay = 0.5 * (1 + math.cos(math.pi * step / config["steps"])) if config["decay"] else 1
    return config["lr"] * min(1, (step + 1) / config["warmup"]) * decay


def make_optimizer(network: nn.Module, config: dict) -> torch.optim.Optimizer:
    betas, eps, weight_decay = tuple(config["betas"]), config["eps"], config["weight_decay"]
    return torch.optim.AdamW(
        network.parameters(), config["lr"], betas, eps, weight_decay, fused=True
    )


def autocast(config: dict, device: torch.device) -> contextlib.AbstractContextManager:
    """The network alone runs under it: coefficients of t, targets and the loss stay in float32."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if config["precision"] == "bf16"
        else contextlib.nullcontext()
    )


def update(
    field: Field,
    network: nn.Module,
    ema: list[Tensor],
    optimizer,
    config: dict,
    step: int,
    batches,
    no_sync=contextlib.nullcontext,
) -> Tensor:
    """One optimizer step on micro-batches (z, t, target, *cond): the loss (8), AdamW, the EMA.

    field is what is called: the network, maybe compiled, distributed, or seen as a velocity field.
    no_sync keeps DDP from adding up before the last micro-batch. Returns the loss, on the device.
    """
    total = 0
    optimizer.zero_grad()
    for i, (z, t, target, *cond) in enumerate(batches):
        last = i == len(batches) - 1  # DDP adds up over ranks only then
        with contextlib.nullcontext() if last else no_sync():
            with autocast(config, z.device):
                o = field(z, t, *cond)
            loss = (o.float() - target).square().mean() / len(batches)
            loss.backward()
        total = total + loss.detach()
    parameters = list(network.parameters())
    if config["clip"]:
        nn.utils.clip_grad_norm_(parameters, config["clip"])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    decay, every = config["ema"]
    if (step + 1) % every == 0:
        n = (step + 1) // every  # the first updates forget the initialisation faster
        torch._foreach_lerp_(
            ema, [p.detach() for p in parameters], 1 - min(decay, (1 + n) / (10 + n))
        )
    return total


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by the datasheets


def training_flops(config: dict, network: MMDiT) -> int:
    """Model FLOPs of one example, forward and backward (twice the forward)."""
    spec = config["spec"]
    context = 4 if spec["classes"] else spec["context"][0]
    return 3 * network.flops(*spec["shape"][1:], context)


# --------------------------------------------------------------------------------------------------
# Evaluation, of the EMA weights

EVALUATIONS = (1, 2, 4, 8, 16, 32, 100)  # at which a PeRFlow student meets its teacher


@torch.no_grad()
def validation_loss(network: Field, objective, x0: Tensor, *cond: Tensor) -> float:
    """The loss at t = (i + 1/2)/8, as some paths' ends are singular; fixed data and noise."""
    eps = torch.randn(x0.shape, generator=seeded(0, 1, 0, HELD_OUT)).to(x0.device)
    parts = torch.arange(len(x0)).split(max(1, 2**20 // x0[0].numel()))  # to bound the memory
    losses = []
    for t, rows in itertools.product((torch.arange(8) + 0.5) / 8, parts):
        t, rows_cond = t.to(x0.device).expand(len(rows)), [c[rows] for c in cond]
        z, target = objective.pair(x0[rows], eps[rows], t, *rows_cond)
        o = network(z, t, *rows_cond)
        losses.append((o.float() - target).square().flatten(1).mean(1))
    return torch.cat(losses).mean().item()


def evaluate(sampler: Sampler, dataset, validation: list[Tensor]) -> dict[str, float]:
    """What the log and the progress bar show."""
    config, network = sampler.config, sampler.network
    formula, flow = sampler.formulation, sampler.flow
    with autocast(config, validation[0].device):
        if flow:
            student = sample.student_field(config, formula, network)
            shown = lambda z, t, *cond: student(z, flow.clock(t), *cond)
            return {"val_loss": validation_loss(shown, flow, *validation)}
        figures = {"val_loss": validation_loss(network, formula, *validation)}
    if config["dataset"] == "toy2d" and validation[0].device.type == "cpu":
        conditional = config["conditional"]
        figures["excess"] = toy2d.relative_excess(network, formula, dataset, conditional, n=8192)
    return figures


def save_images(
    sampler: Sampler, x0: Tensor, out: File, columns: int, names: Sequence[str]
) -> None:
    """A grid as OUT.png; latents whose VAE is not to be had stay latents, OUT.npz."""
    images = sample.pictures(sampler, x0)
    if images is None:
        np.savez(out.with_suffix(".npz"), x0.numpy())
    else:
        sample.draw_grid(images, columns, names).save(out.with_suffix(".png"))


def save_grid(sampler: Sampler, out: File, dataset, cfg: float, steps: int = 50) -> None:
    """OUT/samples: eight of each of ten classes, or 80 held-out texts."""
    spec, names = sampler.config["spec"], []
    if spec["classes"]:
        cond, names = sample.class_rows(spec, columns=8)
    else:
        _, *cond = dataset.validation(80)
    x0 = sample.draw(sampler, cond, seed=0, steps=steps, cfg=cfg)
    save_images(sampler, x0, out / "samples", 8, names)


def report(sampler: Sampler, out: File, dataset) -> None:
    """At the end of a run: the toy's table and pictures, or a grid of samples."""
    config, network = sampler.config, sampler.network
    if config["dataset"] != "toy2d":
        save_grid(sampler, out, dataset, cfg=2.0)
        return
    excess = toy2d.relative_excess(network, sampler.formulation, dataset, config["conditional"])
    heun = lambda noise, *cond: sampler.sample(noise, *cond, steps=50, method="heun")
    y = toy2d.yardsticks(heun, dataset, config["conditional"])
    print(f"relative excess of the network's error {excess:.2e}")
    print(
        "10,000 samples in 50 Heun steps, and the exact field from the same noise; mean of 3 seeds:"
    )
    print(f"{'':26}{'learned':>12}{'exact':>12}{'difference':>12}")
    learned, exact, error = y["energy"] + y["exact_energy"], y["exact_energy"], y["energy_error"]
    print(
        f"{'energy distance':26}{learned:12.2e}{exact:12.2e}{y['energy']:12.2e}  (+- {error:.0e})"
    )
    for key, name in (
        ("total_variation", "total variation of modes"),
        ("outliers", "further than 4 sigma"),
    ):
        learned, exact = y[key], y["exact_" + key]
        print(f"{name:26}{learned:12.4f}{exact:12.4f}{learned - exact:12.4f}")
    field, null = sampler.velocity, network.null_cond
    toy2d.draw_flow(field, dataset, *null).save(out / "flow.png")
    toy2d.draw_field(field, dataset, *null).save(out / "field.png")
    toy2d.save_gif(out / "flow.gif", field, dataset, *null)
    of = " of all modes, without labels" * config["conditional"]
    print(f"pictures{of}: {out}/flow.png, {out}/field.png, {out}/flow.gif")


def report_student(sampler: Sampler, teacher: Sampler, out: File, dataset) -> None:
    """At the end of a PeRFlow run: delta.pt, and teacher against student at equal evaluations."""
    config, K = sampler.config, sampler.flow.windows
    counts = sorted({K, *EVALUATIONS})
    delta = perflow.delta(sampler.network, teacher.network)
    save(out / "delta.pt", {"delta": delta, "config": config})
    norm = lambda state: math.sqrt(sum(x.double().square().sum().item() for x in state.values()))
    change = norm(delta) / norm(teacher.network.state_dict())
    print(f"{out}/delta.pt: |Delta W|/|W| = {change:.3f}")
    if config["dataset"] != "toy2d":
        _, *cond = dataset.validation(8)
        sync, x0 = config["guidance"] == "sync", {}
        for name, model, cfg in (
            ("teacher", teacher, 2.0 if sync else config["teacher_cfg"]),
            ("student", sampler, 2.0 if sync else 1.0),
        ):
            steps = [n for n in counts if model is teacher or n >= K]
            x0[name] = {n: sample.draw(model, cond, seed=0, steps=n, cfg=cfg) for n in steps}
            names = [f"{n} step{'s' * (n > 1)}" for n in steps]
            save_images(model, torch.cat([*x0[name].values()]), out / name, len(cond[0]), names)
        save_grid(sampler, out, dataset, cfg, steps=K)
        print("rms distance to the teacher's samples in 100 evaluations, from the same noise:")
        print(f"{'evaluations':12}{'teacher':>12}{'student':>12}")
        for n in counts:
            far = [rows[n] - x0["teacher"][100] for rows in x0.values() if n in rows]
            print(f"{n:<12}" + "".join(f"{d.square().mean().sqrt():12.4f}" for d in far))
        print(f"pictures: {out}/teacher, {out}/student; in {K} steps {out}/samples")
        return
    print(f"{'':12}{'energy distance above the exact field':>40}{'further than 4 sigma':>28}")
    print(f"{'evaluations':12}{'teacher':>20}{'student':>20}{'teacher':>14}{'student':>14}")
    energy = {}
    for steps in counts:
        left, right = "", ""
        for model in (teacher, sampler):
            if model is sampler and steps < K:
                left, right = left + f"{'-':>20}", right + f"{'-':>14}"
                continue
            scale = config["teacher_cfg"] if model is teacher else 1.0
            run = functools.partial(model.sample, steps=steps, cfg=scale)
            y = toy2d.yardsticks(run, dataset, config["conditional"])
            energy[model is sampler, steps] = y["energy"]
            left += f"{y['energy']:13.2e} +-{y['energy_error']:.0e}"
            right += f"{y['outliers']:14.2%}"
        print(f"{steps:<12}{left}{right}")
    if K <= 4:
        gap = energy[False, 4] - energy[False, 100]
        closed = (energy[False, 4] - energy[True, 4]) / gap if gap else math.nan
        print(f"4-step gap (the teacher's 4 steps less its 100) closed: {closed:.1%}")
    reference = toy2d.reference(dataset, 0, 10_000, config["conditional"])
    cond = [reference.labels[:2000]] * config["conditional"]
    null_cond, own = teacher.network.null_cond, teacher.velocity
    if config["parameterization"] == "epsilon":  # both on the teacher's path
        own = teacher.formulation.velocity(teacher.network)
    guided = guide(own, null_cond, config["teacher_cfg"])
    fields = {"teacher": guided, "student": sampler.velocity}
    for name, field in fields.items():
        ratios = sampler.flow.straightness(field, reference.noise[:2000], *cond)
        windows = " ".join(f"{r:.1e}" for r in ratios.tolist())
        print(f"curvature of the {name}: mean {ratios.mean():.1e}, by window {windows}")
    edges = sampler.flow.edges.flip(0).tolist()
    toy2d.draw_windows(fields, dataset, edges, *null_cond).save(out / "windows.png")
    print(f"pictures: {out}/windows.png")


# --------------------------------------------------------------------------------------------------
# Files


def save(path: File, checkpoint: dict) -> None:
    """Write beside the old file, flush to the disk, rename: there is always a whole one."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)


def cut_log(path: File, step: int) -> None:
    """Keep the log's whole lines up to this step."""
    kept = 0
    with path.open("ab+") as log:
        log.seek(0)
        for line in log:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            kept += len(line)
        log.truncate(kept)


# --------------------------------------------------------------------------------------------------
# The run


def main() -> None:
    parser = make_parser()
    try:
        outcome = run(parser, parser.parse_args())
    except OSError as error:  # a full disk, say; the last checkpoint stays
        parser.error(" ".join(str(error).split()))
    # After `run`, whose DDP must be gone: the last owner of the group waits for its threads, and
    # DDP's destructor, unlike the group's own, would do so holding the lock that they wait for.
    if dist.is_initialized():
        dist.destroy_process_group()
    if outcome:
        sys.exit(outcome)


def run(parser: Parser, args: argparse.Namespace) -> str | int | None:
    """A whole run. Returns None, or what the process exits with: a message or a signal's code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with parser.one_line_errors():
        config, out, checkpoint = configure(args)
        name = args.device or default_device()
        device = check_device(
            f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and world > 1 else name
        )
        micros = world * config["accumulate"]
        parts = micros * config["reuse"]
        if config["batch_size"] % parts:
            raise ValueError(
                f"--batch-size {config['batch_size']} is no multiple of {parts}, which is "
                f"ranks x --accumulate x {config['reuse']} (examples of one solve)"
            )
        if args.download:
            if config["dataset"] != "cifar10" or not config["data"] or world > 1:
                raise ValueError("--download needs --dataset cifar10, --data and a single process")
            download(config["data"])
        dataset = sample.open_dataset(config)
        if config["dataset"] != "toy2d":
            if config.get("spec", dataset.spec()) != dataset.spec():
                trained = config["perflow"] or out
                raise ValueError(f"the data in {config['data']} are not those of {trained}")
            config["spec"] = dataset.spec()
            usual = [0.1] if config["spec"]["classes"] else [0.464, 0.464]
            config["dropout"] = config["dropout"] or usual
        formula = formulation(config["formulation"], config["shift"])
        torch.manual_seed(config["seed"])
        network = sample.build(config).to(device)
        teacher = None
        if config["perflow"]:
            teacher = sample.load(config["perflow"], device)
            sample.load_weights(network, teacher.network.state_dict(), config["perflow"])
        core = getattr(network, "mmdit", network)
        core.checkpointing = (config["depth"] or 0) >= 30  # activation checkpointing
        average = copy.deepcopy(network).requires_grad_(False).eval()
        optimizer = make_optimizer(network, config)
        start = 0
        if checkpoint:
            sample.load_weights(network, checkpoint["network"], out)
            sample.load_weights(average, checkpoint["ema"], out)
            optimizer.load_state_dict(checkpoint["optimizer"])
            start = checkpoint["step"]

        def save_at(step: int) -> None:
            if rank == 0:
                state = {
                    "network": network.state_dict(),
                    "ema": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                save(out / "checkpoint.pt", {"config": config, "step": step, **state})

        if world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "nccl" if device.type == "cuda" else "gloo"
            # an hour, as the others wait while rank 0 evaluates, draws and saves
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            cut_log(out / "log.jsonl", start)
        if not checkpoint:
            save_at(0)
        del checkpoint  # of 16 bytes a parameter
    threads = torch.get_num_threads()
    if config["network"] == "mlp":
        torch.set_num_threads(1)  # for this MLP two threads are slower than one
    torch.backends.cuda.matmul.allow_tf32 = True
    objective, flow = formula, None
    null_cond = [c.to(device) for c in network.null_cond]
    if teacher:
        guided = guide(teacher.network, null_cond, config["teacher_cfg"])

        def solved(z: Tensor, *rest: Tensor) -> Tensor:  # in a thread of its own, autocast too
            with autocast(config, z.device):
                return guided(z, *rest).float()

        objective = flow = sample.perflow_of(config, formula, solved)
    model = torch.compile(network) if config["compile"] else network
    if world > 1:
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        model = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    field = sample.student_field(config, formula, model) if flow else model
    no_sync = model.no_sync if world > 1 else contextlib.nullcontext
    streams = []
    for micro in range(rank * config["accumulate"], (rank + 1) * config["accumulate"]):
        source = make_source(config, dataset, device, micro, micros)
        streams.append(examples(config, objective, source, null_cond, start, micro, device))
    validation = []
    if rank == 0:
        if config["dataset"] == "toy2d":
            drawn = dataset.sample(config["validation"], seeded(0, 0, 0, HELD_OUT))
            x0, *cond = drawn[: 1 + config["conditional"]]
        else:
            x0, *cond = dataset.validation(config["validation"])
            x0 = dataset.to_float(x0)
        validation = [x.to(device) for x in (x0, *cond)]
    sampler = Sampler(average, formula, config, config["steps"], flow)

    # Ctrl-C and SIGTERM are noticed at log time; a second one ends the process at once
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((rate for name, rate in PEAK.items() if name in re.split("[ -]", chip)), 0)
    # MFU is of bf16's peak; a student's steps are its teacher's work too
    counted = peak and config["precision"] == "bf16" and config["dataset"] != "toy2d" and not flow
    losses: list[Tensor] = []
    saved, figures, ema = start, {}, list(average.parameters())
    log = (out / "log.jsonl").open("a") if rank == 0 else None
    steps = range(start, config["steps"])
    bar = tqdm(
        steps,
        initial=start,
        total=config["steps"],
        desc=str(out),
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 5,  # seconds: a log file is to stay small
        disable=rank > 0,
    )
    since = time.perf_counter()
    for step in bar:
        losses.append(
            update(
                field, network, ema, optimizer, config, step, [next(s) for s in streams], no_sync
            )
        )
        done = step + 1
        if done % config["log_every"] and done != config["steps"]:
            continue
        values = torch.stack([*losses, torch.tensor(float(len(stop)), device=device)])
        if world > 1:
            dist.all_reduce(values, dist.ReduceOp.SUM)
        *values, stopped = values.tolist()  # the loop's only synchronisation
        rate = len(values) * config["batch_size"] / (time.perf_counter() - since)
        losses.clear()
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            bar.close()
            return (
                f"the loss of step {done - len(values) + bad[0] + 1} is not finite: stopped. "
                f"The checkpoint of step {saved} is kept in {out}; a lower --lr may help"
            )
        if rank == 0:
            entry = {
                "step": done,
                "loss": sum(values) / len(values) / world,
                "lr": learning_rate(config, step),
            }
            if done % config["eval_every"] == 0 or done == config["steps"]:
                figures = evaluate(sampler, dataset, validation)
                entry |= figures
                if config["dataset"] != "toy2d" and done != config["steps"]:
                    save_grid(sampler, out, dataset, cfg=1.0)
            print(json.dumps(entry), file=log, flush=True)
            shown = {"loss": f"{entry['loss']:.3g}", **{k: f"{v:.2g}" for k, v in figures.items()}}
            shown["samples/s"] = tqdm.format_sizeof(rate)
            if counted:
                shown["MFU"] = f"{rate * training_flops(config, core) / peak / world:.0%}"
            bar.set_postfix(shown, refresh=False)
        if done % config["save_every"] == 0 or done == config["steps"] or stopped:
            save_at(done)
            saved = done
        if stopped:
            bar.close()
            if rank == 0:
                again = f"python train.py --dataset {config['dataset']} --resume --out {out}"
                print(f"stopped; saved step {done}. Go on with: {again}")
            return 128 + (stop or [signal.SIGTERM])[0]
        since = time.perf_counter()  # after evaluation and saving: the rate is training's alone
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # all is saved: the report may be cut short
    for stream in streams:
        stream.close()
    if rank == 0:
        torch.set_num_threads(threads)
        print("trained; now sampling, measuring and drawing", flush=True)  # minutes for an MM-DiT
        if config["dataset"] == "toy2d":
            average.cpu()
        if teacher:
            teacher.network.to(sampler.device)
            report_student(sampler, teacher, out, dataset)
        else:
            report(sampler, out, dataset)
        few = flow.windows if flow else 8 if config["dataset"] == "toy2d" else 50
        number = f"--num {2000 if config['dataset'] == 'toy2d' else 100} --steps {few}"
        print(f"next: python sample.py {out}/checkpoint.pt {number} --out samples.png")
    return None


if __name__ == "__main__":
    main()
