"""The paper's experiments, and how fast this code is.

    python study.py bench                    the toy's training step against a bare loop
    python study.py mmdit --depth 12         MM-DiT against a large matmul

Time: t = 0 is data, t = 1 is noise. Read before: `rf.py` for the formulations, `train.py` for the
loop.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import toy2d
import train
from data import Parser, positive
from mmdit import MMDiT
from rf import formulation
from sample import check_device, default_device


def bare_loop(
    network: torch.nn.Module, mixture: toy2d.GaussianMixture, size: int, block: int, fused: bool
) -> Iterator:
    """What one would write for rf alone: no EMA, no schedule, no log; `block` batches drawn at
    once.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.9, 0.99), fused=fused)
    while True:
        x0, _ = mixture.sample(size * block)
        t, eps = torch.rand(size * block), torch.randn(size * block, 2)
        z, target = (1 - t)[:, None] * x0 + t[:, None] * eps, eps - x0
        for z_i, t_i, target_i in zip(
            z.split(size), t.split(size), target.split(size), strict=True
        ):
            loss = (network(z_i, t_i) - target_i).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def our_loop(network: torch.nn.Module, mixture: toy2d.GaussianMixture, config: dict) -> Iterator:
    """What train.py runs: `examples` and `update`, with the EMA and the schedule."""
    ema, optimizer = (
        [p.detach().clone() for p in network.parameters()],
        train.make_optimizer(network, config),
    )
    cpu = torch.device("cpu")
    source = train.make_source(config, mixture, cpu, 0, 1)
    for step, batch in enumerate(train.examples(config, formulation("rf"), source, (), 0, 0, cpu)):
        train.update(network, network, ema, optimizer, config, step, [batch])
        yield


def bench(args: argparse.Namespace) -> None:
    """The loops take turns, so that a busy moment hits all; medians of the rounds' ratios."""
    torch.set_num_threads(1)
    mixture, network = toy2d.load_mixture("ring"), toy2d.MLP()
    config = train.DEFAULTS | train.PRESETS["toy2d"] | {"dataset": "toy2d"}
    size, block = config["batch_size"], config["block"]
    loops = {
        "train.py": our_loop(copy.deepcopy(network), mixture, config),
        "bare loop": bare_loop(copy.deepcopy(network), mixture, size, block, fused=True),
        "bare, plain Adam, batches one by one": bare_loop(
            copy.deepcopy(network), mixture, size, 1, fused=False
        ),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds + 1):
        rounds.append(
            {name: seconds(loop, 10 * block) / (10 * block) for name, loop in loops.items()}
        )
    print(f"{'':38}{'us a step':>10}{'train.py is':>14}")
    for name in loops:
        step = statistics.median(r[name] for r in rounds[1:])
        ratio = statistics.median(r["train.py"] / r[name] for r in rounds[1:])
        print(f"{name:38}{1e6 * step:10.0f}{ratio:13.2f}x")


def bench_mmdit(args: argparse.Namespace) -> None:
    """MM-DiT's forward and backward on noise: size, time, and FLOP/s against a large matmul's in
    the same run.
    """
    device, dtype = (
        check_device(args.device),
        {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision],
    )
    torch.backends.cuda.matmul.allow_tf32 = True
    side = 16 * args.scale  # latents of 32 x 32 in patches of 2: 256 tokens
    network = MMDiT(args.depth, pos_embed_max_size=side, qk_norm=args.precision == "bf16").to(
        device
    )
    model = torch.compile(network) if args.compile else network
    x, t = (
        torch.randn(args.batch_size, 16, 2 * side, 2 * side, device=device),
        torch.rand(args.batch_size, device=device),
    )
    context = torch.randn(args.batch_size, args.context, 4096, device=device)
    pooled = torch.randn(args.batch_size, 2048, device=device)

    def step() -> None:
        network.zero_grad()
        with train.autocast({"precision": args.precision}, device):
            out = model(x, t, context, pooled)
        out.float().square().mean().backward()

    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / timed(lambda: a @ b, device)
    time_step = timed(step, device)
    flops = (
        3 * args.batch_size * network.flops(2 * side, 2 * side, args.context)
    )  # backward is twice forward
    size = sum(p.numel() for p in network.parameters())
    tokens = f"{side * side} + {args.context} tokens, batch {args.batch_size}"
    print(
        f"MM-DiT depth {args.depth}, {size / 1e6:.1f}M parameters, {tokens}, {args.precision}, {device}"
    )
    print(f"forward + backward {1e3 * time_step:.1f} ms, {flops / time_step / 1e12:.3f} TFLOP/s")
    print(
        f"a {n} x {n} matmul {matmul / 1e12:.3f} TFLOP/s: {flops / time_step / matmul:.0%} of it is reached"
    )


def timed(run: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """The median time of a call in seconds, after two to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def seconds(loop: Iterator, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return time.perf_counter() - start


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "bench", help="the training step against a bare loop, interleaved"
    ).add_argument
    add("--rounds", type=positive, default=12, help="of 250 steps each (default: 12)")
    add = commands.add_parser("mmdit", help="MM-DiT's speed against a large matmul's").add_argument
    add("--depth", type=positive, default=6, help="blocks, heads, width / 64 (default: 6)")
    add(
        "--scale",
        type=positive,
        default=1,
        help="latents of 32 SCALE, 256 SCALE^2 tokens (default: 1)",
    )
    add("--context", type=positive, default=77, help="context tokens (default: 77)")
    add("--batch-size", type=positive, default=4, help="(default: 4)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: fp32)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", default=default_device(), help="cpu, cuda, ...")
    args = parser.parse_args()
    with parser.one_line_errors():
        run: Callable = {"bench": bench, "mmdit": bench_mmdit}[args.command]
        run(args)


if __name__ == "__main__":
    main()
