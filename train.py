"""One training loop for every data set.

    python train.py --dataset toy2d                     a minute on a CPU: a flow from noise to a ring
    python train.py --resume --out runs/toy2d           go on where a run stopped

A run leaves OUT/checkpoint.pt, OUT/log.jsonl and its pictures. Everything drawn in a step comes from generators
seeded by (seed, block of steps, micro-batch), so the step number is the only state of randomness: a resumed run
equals the uninterrupted one bit for bit on a CPU. Time: t = 0 is data, t = 1 is noise.
Read next: `rf.py` for what `formulation.pair` computes, `sample.py` for what is done with a checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import toy2d
from rf import Formulation, formulation
from sample import Parser, Sampler, build, check_device, default_device, load_weights, positive, read_checkpoint

# ----------------------------------------------------------------------------------------------------
# What a run is made of: the flags' defaults for each data set, then what has no flag

PRESETS = {
    "toy2d": dict(
        network="mlp",
        formulation="rf",
        steps=27_000,
        batch_size=1024,
        lr=1e-2,
        warmup=500,  # steps of linear warm-up
        decay=True,  # then a cosine to 0; otherwise constant
        betas=(0.9, 0.99),
        ema=(0.99, 10),  # decay 0.99 every 10 steps
        dropout=0.1,  # of the label, for classifier-free guidance
        block=25,  # steps whose examples are drawn at once
        log_every=100,
        eval_every=1000,
        save_every=1000,
    ),
}


def make_parser() -> Parser:
    parser = Parser(description="Train a rectified flow (or any of the study's 61 formulations).")
    add = parser.add_argument
    add("--dataset", default="toy2d", help=f"one of {', '.join(PRESETS)} (default: toy2d)")
    add("--mixture", help=f"toy2d: {', '.join(toy2d.MIXTURES)} or FILE.json with means, covs, weights (default: ring)")
    add("--conditional", action="store_true", default=None, help="toy2d: give the network the mode's label")
    add("--formulation", help="path, prediction and density of t by the paper's name, as in 'rf/lognorm(0.00,1.00)'")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="examples per optimizer step")
    add("--lr", type=float, help="learning rate, after the warm-up")
    add("--seed", type=int, help="of everything drawn (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--out", type=File, help="the run's folder (default: runs/DATASET, numbered if taken)")
    add("--resume", action="store_true", help="go on with the run in --out (default: the last of runs/DATASET)")
    return parser


def configure(args: argparse.Namespace) -> tuple[dict, File, dict | None]:
    """(the run's configuration, its folder, the checkpoint to go on from or None). ValueError on bad input."""
    given = {key: value for key, value in vars(args).items() if value is not None and key not in ("out", "resume", "device")}
    if args.dataset not in PRESETS:
        raise ValueError(f"unknown data set {args.dataset!r}; choose from {', '.join(PRESETS)}")
    names = (File("runs") / f"{args.dataset}{f'-{i}' if i > 1 else ''}" for i in itertools.count(1))
    taken = list(itertools.takewhile(lambda name: (name / "checkpoint.pt").exists(), names))
    if args.resume:
        out = args.out or (taken[-1] if taken else File("runs") / args.dataset)
        checkpoint = read_checkpoint(out / "checkpoint.pt")
        config = checkpoint["config"]
        if "mixture" in given:
            given["mixture"] = toy2d.load_mixture(given["mixture"]).spec()
        for key, value in given.items():
            if key != "dataset" and config.get(key) != value:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} differs from the run in {out}: {config.get(key)}")
        return config, out, checkpoint
    config = {"dataset": args.dataset, "mixture": "ring", "conditional": False, "seed": 0, **PRESETS[args.dataset], **given}
    config["betas"], config["ema"] = list(config["betas"]), list(config["ema"])
    formulation(config["formulation"])  # so that a bad name ends here
    if not (config["lr"] > 0 and math.isfinite(config["lr"])):
        raise ValueError(f"--lr {config['lr']} is not a positive number")
    config["mixture"] = toy2d.load_mixture(config["mixture"]).spec()
    out = args.out or File("runs") / (f"{args.dataset}-{len(taken) + 1}" if taken else args.dataset)
    if (out / "checkpoint.pt").exists():
        raise ValueError(f"--out {out} holds a run already: --resume goes on with it, another --out keeps it")
    return config, out, None


# ----------------------------------------------------------------------------------------------------
# The examples: (z, t, target, *cond), a pure function of (seed, step)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of the numbers (their sum would make step 1 of seed 0 step 0 of seed 1)."""
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)


def drop(cond: list[Tensor], null_cond: tuple[Tensor, ...], rate: float, generator: torch.Generator) -> list[Tensor]:
    """Replace each condition's rows by the null one at this rate, for classifier-free guidance."""
    kept = []
    for c, null in zip(cond, null_cond, strict=True):
        dropped = torch.rand(len(c), generator=generator) < rate
        kept.append(torch.where(dropped.reshape(-1, *[1] * (c.dim() - 1)), null.to(c), c))
    return kept


def examples(
    config: dict, objective: Formulation, mixture: toy2d.GaussianMixture, null_cond: tuple[Tensor, ...], start: int
) -> Iterator[tuple[Tensor, ...]]:
    """(z, t, target, *cond) of step start, start + 1, ...: drawn in whole blocks of steps, the next one in advance."""
    size = config["block"]

    @torch.no_grad()
    def block(number: int) -> list[tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        generator = seeded(config["seed"], number)
        x0, labels = mixture.sample(size * config["batch_size"], generator)
        cond = drop([labels] if config["conditional"] else [], null_cond, config["dropout"], generator)
        t = objective.draw(len(x0), generator)
        z, target = objective.pair(x0, torch.randn(x0.shape, generator=generator), t)
        return list(zip(*(x.split(config["batch_size"]) for x in (z, t, target, *cond)), strict=True))

    with ThreadPoolExecutor(1) as thread:
        number, skip = divmod(start, size)
        coming = thread.submit(block, number)
        for number in itertools.count(number + 1):
            steps, coming = coming.result(), thread.submit(block, number)
            yield from steps[skip:]
            skip = 0


# ----------------------------------------------------------------------------------------------------
# The step


def learning_rate(config: dict, step: int) -> float:
    """Linear warm-up, then constant or, with decay, a cosine to 0."""
    decay = 0.5 * (1 + math.cos(math.pi * step / config["steps"])) if config["decay"] else 1
    return config["lr"] * min(1, (step + 1) / config["warmup"]) * decay


def make_optimizer(network: nn.Module, config: dict) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=config["lr"], betas=tuple(config["betas"]), fused=True)


def update(network: nn.Module, ema: list[Tensor], optimizer, config: dict, step: int, batch: tuple[Tensor, ...]) -> Tensor:
    """One optimizer step on a batch (z, t, target, *cond): the loss (8), Adam, the EMA. Returns the loss, on the device."""
    z, t, target, *cond = batch
    loss = (network(z, t, *cond) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    decay, every = config["ema"]
    if (step + 1) % every == 0:
        n = (step + 1) // every  # the first updates forget the initialisation faster
        torch._foreach_lerp_(ema, [p.detach() for p in network.parameters()], 1 - min(decay, (1 + n) / (10 + n)))
    return loss.detach()


# ----------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def validation_loss(network: nn.Module, objective: Formulation, x0: Tensor, *cond: Tensor) -> float:
    """The loss at the midpoints t = (i + 1/2)/8 (the ends are singular for some paths), on fixed data and noise."""
    t = (torch.arange(8) + 0.5).repeat_interleave(len(x0)) / 8
    x0, *cond = (c.repeat(8, *[1] * (c.dim() - 1)) for c in (x0, *cond))
    z, target = objective.pair(x0, torch.randn(x0.shape, generator=seeded(1, 0)), t)
    return (network(z, t, *cond) - target).square().mean().item()


def evaluate(network: nn.Module, objective: Formulation, config: dict, mixture: toy2d.GaussianMixture, n: int) -> dict:
    """What the log and the progress bar show of the EMA weights."""
    x0, labels = mixture.sample(1024, seeded(2, 0))
    cond = (labels,) if config["conditional"] else ()
    return {
        "val_loss": validation_loss(network, objective, x0, *cond),
        "excess": toy2d.relative_excess(network, objective, mixture, config["conditional"], n),
    }


def report(sampler: Sampler, out: File) -> None:
    """The toy's table and pictures, from the EMA weights."""
    config, network = sampler.config, sampler.network
    mixture = toy2d.GaussianMixture(**config["mixture"])
    excess = toy2d.relative_excess(network, sampler.formulation, mixture, config["conditional"])
    heun = lambda noise, *cond: sampler.sample(noise, *cond, steps=50, method="heun")  # noqa: E731
    y = toy2d.yardsticks(heun, mixture, config["conditional"])
    print(f"relative excess of the network's error {excess:.2e}")
    print("10,000 samples in 50 Heun steps, mean over 3 noise seeds, and the exact field from the same noise:")
    print(f"{'':26}{'learned':>12}{'exact':>12}{'difference':>12}")
    print(f"{'energy distance':26}{y['energy'] + y['exact_energy']:12.2e}{y['exact_energy']:12.2e}{y['energy']:12.2e}"
          f"  (standard error {y['energy_error']:.0e})")
    for key, name in (("total_variation", "total variation of modes"), ("outliers", "further than 4 sigma")):
        learned, exact = y[key], y["exact_" + key]
        print(f"{name:26}{learned:12.4f}{exact:12.4f}{learned - exact:12.4f}")
    field, null = sampler.velocity, network.null_cond
    toy2d.draw_flow(field, mixture, *null).save(out / "flow.png")
    toy2d.draw_field(field, mixture, *null).save(out / "field.png")
    toy2d.save_gif(out / "flow.gif", field, mixture, *null)
    print(f"pictures: {out}/flow.png, {out}/field.png, {out}/flow.gif")


# ----------------------------------------------------------------------------------------------------
# The run


def save(path: File, checkpoint: dict) -> None:
    """Write beside the old checkpoint, flush to the disk, then rename: there is a whole one at every moment."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with parser.one_line_errors():
        config, out, checkpoint = configure(args)
        device = check_device(args.device or default_device())
        objective = formulation(config["formulation"])
        mixture = toy2d.GaussianMixture(**config["mixture"])
        torch.manual_seed(config["seed"])
        network = build(config).to(device)
        average = copy.deepcopy(network).requires_grad_(False)
        optimizer = make_optimizer(network, config)
        start = 0
        if checkpoint:
            load_weights(network, checkpoint["network"], out)
            load_weights(average, checkpoint["ema"], out)
            optimizer.load_state_dict(checkpoint["optimizer"])
            start = checkpoint["step"]
        out.mkdir(parents=True, exist_ok=True)
        cut_log(out / "log.jsonl", start)
        log = (out / "log.jsonl").open("a")

    def save_at(step: int) -> None:
        state = {"network": network.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}
        save(out / "checkpoint.pt", {"config": config, "step": step, **state})

    if not checkpoint:
        with parser.one_line_errors():
            save_at(0)
    stop: list[int] = []  # Ctrl-C and SIGTERM are noticed at log time; a second one ends the process at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

    torch.set_num_threads(1)  # for this MLP two threads are slower than one
    ema = list(average.parameters())
    losses: list[Tensor] = []
    saved, figures = start, {}
    stream = examples(config, objective, mixture, network.null_cond, start)
    bar = tqdm(range(start, config["steps"]), initial=start, total=config["steps"], desc=str(out), unit="step")
    for step in bar:
        losses.append(update(network, ema, optimizer, config, step, tuple(x.to(device) for x in next(stream))))
        done = step + 1
        if done % config["log_every"] and done != config["steps"]:
            continue
        values = torch.stack(losses).cpu()
        losses.clear()
        if not values.isfinite().all():
            bad = done - len(values) + int(values.isfinite().logical_not().nonzero()[0]) + 1
            bar.close()
            sys.exit(f"the loss of step {bad} is not finite: stopped. The checkpoint of step {saved} is kept in {out}; "
                     f"a lower --lr than {config['lr']} may help")
        entry = {"step": done, "loss": values.mean().item(), "lr": learning_rate(config, step)}
        if done % config["eval_every"] == 0 or done == config["steps"]:
            figures = evaluate(average, objective, config, mixture, n=8192)
            entry |= figures
        print(json.dumps(entry), file=log, flush=True)
        bar.set_postfix({"loss": f"{entry['loss']:.3f}", **{k: f"{v:.2g}" for k, v in figures.items()}}, refresh=False)
        if done % config["save_every"] == 0 or done == config["steps"] or stop:
            save_at(done)
            saved = done
        if stop:
            bar.close()
            print(f"stopped; saved step {done}. Go on with: python train.py --dataset {config['dataset']} --resume --out {out}")
            sys.exit(128 + stop[0])
    bar.close()
    stream.close()
    torch.set_num_threads(os.cpu_count() or 1)
    report(Sampler(average.cpu(), objective, config, config["steps"]), out)
    print(f"next: python sample.py {out}/checkpoint.pt --num 2000 --steps 8 --out samples.png")


if __name__ == "__main__":
    main()
