"""How fast the code is: the toy's step against a bare loop, MM-DiT's against a large matmul.

    python -m studies.bench --depth 12 --precision bf16 --compile --batch-size 64
    python -m studies.bench --plan --depth 38 --size 1024 --gpus 8 --precision bf16

The toy's loops take turns, so a busy moment hits all of them; the table has medians of rounds."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from torch.utils.benchmark import Timer

import toy2d
from data.toy import Toy
from mmdit import MMDiT
from rf import formulation
from studies.plan import PAPER, planned
from train import State, batches, train
from training.folder import training_flops
from training.options import Count, Recipe, command, preset
from training.ranks import autocast, check_device, compile_blocks


def bare_loop(mixture: toy2d.GaussianMixture, size: int, block: int, fused: bool) -> Iterator:
    """The shortest loop for rf: no EMA, no schedule, no log. It draws `block` batches at once."""
    network = toy2d.MLP()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=fused)
    while True:
        x0, _ = mixture.sample(size * block)
        t, eps = torch.rand(size * block), torch.randn(size * block, 2)
        rows = ((1 - t)[:, None] * x0 + t[:, None] * eps, t, eps - x0)
        for z, t, target in zip(*(x.split(size) for x in rows), strict=True):
            loss = (network(z, t) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def bench_toy(rounds: int) -> None:
    torch.set_num_threads(1)
    data, objective = Toy(Toy.Options()), formulation("rf")
    recipe = Recipe(**preset("toy2d"))
    steps, size = 10 * recipe.block, recipe.batch_size
    state, stream = State(toy2d.MLP(), recipe), batches(data, objective, recipe)
    ours = lambda: train(state, objective, stream, replace(recipe, steps=state.step + steps))
    bare = bare_loop(data.mixture, size, recipe.block, fused=True)
    plain = bare_loop(data.mixture, size, 1, fused=False)
    loops: dict[str, Callable] = {
        "train.py": ours,
        "bare loop": lambda: [next(bare) for _ in range(steps)],
        "bare, plain Adam, batches one by one": lambda: [next(plain) for _ in range(steps)],
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            times[name].append((time.perf_counter() - start) / steps)
    stream.close()
    print(f"{'':38}{'us a step':>10}{'train.py is':>14}")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["train.py"], seconds, strict=True)]
        step, ratio = statistics.median(seconds[1:]), statistics.median(ratios[1:])
        print(f"{name:38}{1e6 * step:10.0f}{ratio:13.2f}x")


def run(
    rounds: Annotated[
        Count, "of 250 steps of the toy, and a quarter second of MM-DiT", 1, 1000
    ] = 12,
    depth: Annotated[Count, "of MM-DiT: blocks, heads, width / 64", 1, 256] = 6,
    scale: Annotated[Count, "latents of 32 SCALE, 256 SCALE^2 tokens", 1, 16] = 1,
    context: Annotated[Count, "context tokens", 1, 10_000] = 77,
    batch_size: Annotated[Count, "of MM-DiT", 1, 2**16] = 4,
    precision: Annotated[Literal["fp32", "bf16"], "of MM-DiT"] = "fp32",
    compile: Annotated[bool, "torch.compile the network"] = False,
    device: Annotated[str | None, "cpu, cuda, ..."] = None,
    plan: Annotated[bool, "no clock: what the paper's depths and --depth need, on paper"] = False,
    size: Annotated[Count, "of the pictures, for --plan", 64, 8192] = 1024,
    gpus: Annotated[Count, "for --plan", 1, 10_000] = 8,
) -> None:
    if plan:
        pictures = f"{size} x {size} pixels, {batch_size} of them"
        print(f"{pictures} on each of {gpus} GPUs, {precision}:\n")
        print(planned(sorted({*PAPER, depth}), size, batch_size, gpus, precision))
        return
    threads, device = torch.get_num_threads(), check_device(device)
    bench_toy(rounds)
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    side, noise = 16 * scale, partial(torch.randn, device=device)  # patches of 2 x 2
    network = MMDiT(depth, pos_embed_max_size=side).to(device)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)  # at the start almost all gradients are zeros
    if compile:
        compile_blocks(network)
    x = noise(batch_size, 16, 2 * side, 2 * side)
    cond = noise(batch_size, context, 4096), noise(batch_size, 2048)

    def step() -> None:
        network.zero_grad()
        with autocast(precision, device):
            out = network(x, torch.rand(batch_size, device=device), *cond)
        out.float().square().mean().backward()

    n = 8192 if device.type == "cuda" else 2048
    a, b = noise(2, n, n, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    product = torch.empty_like(a)
    timed = lambda call: Timer("call()", globals={"call": call}, num_threads=threads)
    median = lambda call: timed(call).blocked_autorange(min_run_time=rounds / 4).median
    matmul = 2 * n**3 / median(lambda: torch.mm(a, b, out=product))
    seconds, weights = median(step), sum(p.numel() for p in network.parameters())
    rate = batch_size * training_flops(network, x, *cond) / seconds
    compiled = " compiled" if compile else ""
    setting = f"{side**2} + {context} tokens, batch {batch_size}, {precision}{compiled}, {device}"
    print(f"MM-DiT depth {depth}, {weights / 1e6:.1f}M parameters, {setting}")
    print(f"forward + backward {1e3 * seconds:.1f} ms, {rate / 1e12:.3f} TFLOP/s")
    print(f"a {n} x {n} matmul {matmul / 1e12:.3f} TFLOP/s: {rate / matmul:.0%} of it is reached")


if __name__ == "__main__":
    command(run, __doc__)
