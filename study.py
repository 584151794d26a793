"""The paper's experiments, and how fast this code is.

    python study.py bench        the training step against a bare loop

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
from rf import formulation
from sample import Parser, positive


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
    args = parser.parse_args()
    with parser.one_line_errors():
        run: Callable = {"bench": bench}[args.command]
        run(args)


if __name__ == "__main__":
    main()
