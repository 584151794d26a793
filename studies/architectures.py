"""SD3's figure 4 on shapes: MM-DiT against three DiTs, and what each of its two texts is for.

    python -m studies.architectures       70 minutes on two cores

All have the same data, draws, steps and rate. A DiT has half the weights of an MM-DiT of its depth,
so the table has the others deeper, too. The exact reader judges pairs seen in training, or not."""

import math
import time
from functools import partial
from pathlib import Path as File
from typing import Annotated
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pictures import plot
from data.shapes import Shapes
from mmdit import HEAD_DIM, MMDiT, StreamBlock, attend, modulate
from rf import formulation
from sample import Sampler
from studies.runs import markdown, mean_and_error, run_missing
from train import State, batches, train, validation_loss
from training.folder import training_flops
from training.options import Count, Recipe, command, preset


# ---- The rivals: each has MM-DiT's embeddings, adaLN and final layer
class CrossBlock(StreamBlock):
    """Self-attention over the image, cross-attention to the text, MLP. The text stays as it is."""

    def __init__(self, width: int, qk_norm: bool):
        super().__init__(width, qk_norm)
        self.query, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, c: Tensor, context: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """c (B,D), context (B,L,D), x (B,N,D) -> context and x."""
        qkv, (gate, shift_mlp, scale_mlp, gate_mlp) = self.pre_attention(x, c)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # (B,heads,N,64)
        x = x + gate * self.attn.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        heads = lambda y: y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B,heads,.,64)
        q = heads(self.query(F.layer_norm(x, x.shape[-1:])))
        k, v = map(heads, self.key_value(context).chunk(2, dim=-1))
        x = x + self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return context, x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class CrossDiT(MMDiT):
    def __init__(self, depth: int, qk_norm: bool = False, **shape):
        super().__init__(depth, **shape)
        self.joint_blocks = nn.ModuleList(CrossBlock(self.width, qk_norm) for _ in range(depth))
        for name, layer in self.named_modules():
            self.initialize_layer(name, layer)
        for block in self.joint_blocks:  # so that each block starts as the identity
            nn.init.zeros_(block.proj.weight)


class SkipDiT(MMDiT):
    """A DiT with skips, zero at first, from each block of the first half to its mirror image.
    (SD3's UViT is a U-Net with a transformer in it; that of Bao et al. concatenates its skips.)"""

    def __init__(self, depth: int, **shape):
        super().__init__(depth, **shape, shared=True)
        self.skips = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(depth // 2))
        for p in self.skips.parameters():
            nn.init.zeros_(p)

    def mixed(self, c: Tensor, context: Tensor, x: Tensor) -> Tensor:
        """c (B,D), context (B,L,D), x (B,N,D) -> x after all blocks."""
        tokens, outputs = torch.cat([context, x], dim=1), []  # (B,L+N,D), then after each block
        for i, block in enumerate(self.joint_blocks):
            mirror = len(self.joint_blocks) - 1 - i
            if mirror < i:
                tokens = tokens + self.skips[mirror](outputs[mirror])
            tokens = self.computed(block, c, tokens)
            outputs.append(tokens)
        return tokens[:, context.shape[1] :]


def half_blind(part: str) -> type[MMDiT]:
    """An MM-DiT that sees this one of its two texts, and zeros for the other."""

    class HalfBlind(MMDiT):
        def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
            texts = (context, 0 * pooled) if part == "context" else (0 * context, pooled)
            return super().forward(x, t, *texts)

    return HalfBlind


NETWORKS = {
    "MM-DiT": MMDiT,
    "DiT": partial(MMDiT, shared=True),
    "CrossDiT": CrossDiT,
    "DiT with skips": SkipDiT,
    "MM-DiT, c_ctxt alone": half_blind("context"),
    "MM-DiT, c_vec alone": half_blind("pooled"),
}
VARIANTS = [(name, 4) for name in NETWORKS] + [("DiT", 5), ("CrossDiT", 5), ("DiT with skips", 5)]
VERDICTS = [(pairs, what) for pairs in ("seen", "unseen") for what in ("all right", "shapes")]
POINTS = 10  # of a curve


# ---- A run: train, and look at the average of the weights ten times on the way
def trained(name: str, depth: int, seed: int, steps: int, judged: int = 400) -> dict:
    """The validation loss over steps and over seconds of training, then how often samples are
    right, of seen and of unseen pairs, at guidance 3."""
    data, curve = Shapes(Shapes.Options()), []
    recipe = Recipe(**preset("shapes") | dict(depth=depth, steps=steps, seed=seed))
    torch.manual_seed(seed)
    data.network(data.spec(), Recipe(depth=1))  # the runs of README.md drew these weights first
    with mock.patch("data.shapes.MMDiT", NETWORKS[name]):
        network = data.network(data.spec(), recipe)
    objective, state = formulation(recipe.formulation), State(network, recipe)
    sampler = Sampler(state.average, objective, dict(spec=data.spec(), precision=recipe.precision))
    held_out = data.held_out(recipe.validation)

    def watched(stream):
        """The batches; a step of training lasts until the next one is asked for."""
        seconds = 0.0
        for batch in stream:
            start = time.perf_counter()
            yield batch
            seconds += time.perf_counter() - start
            if state.step % (steps // POINTS) == 0 or state.step == steps:
                field = objective.field(sampler.guided())
                curve.append((state.step, seconds, validation_loss(field, objective, *held_out)))

    stream = watched(batches(data, objective, recipe, network.null_cond))
    train(state, objective, stream, recipe)
    next(stream)  # the last step ends
    stream.close()
    right = lambda new: data.right(sampler, judged, new, steps=25, cfg=3.0)
    flops = recipe.batch_size * training_flops(network, *held_out)
    size = sum(p.numel() for p in network.parameters())
    return dict(curve=curve, flops=flops, parameters=size, seen=right(False), unseen=right(True))


def study(variants: list, seeds: int, steps: int, out: File, report, draw, name: str) -> None:
    """Make the runs of these (network, depth), print report(runs) and save draw(runs)."""
    jobs = [(*variant, seed) for seed in range(seeds) for variant in variants]
    keys = {"curve", "flops", "parameters", "seen", "unseen"}
    runs = run_missing(out, jobs, trained, steps, keys)
    print(report(runs))
    draw(runs).save(out / f"{name}.png")
    print(f"\nwrote {out}/{name}.png")


def loss_at(run: dict, step: float) -> float:
    """The validation loss between two points of the curve."""
    at, _, losses = zip(*run["curve"], strict=True)
    return float(np.exp(np.interp(step, at, np.log(losses))))


def table(runs: list[dict]) -> str:
    heads = ["network", "weights", "ms a step", "validation loss", "at equal time"]
    rows = [heads + [f"{pairs}: {what}" for pairs, what in VERDICTS]]
    groups = {v: [run for run in runs if tuple(run["job"][:2]) == v] for v in VARIANTS}
    pace = lambda seeds: min(run["curve"][-1][1] / run["steps"] for run in seeds)  # seconds a step
    fastest = min(map(pace, groups.values()))
    for (name, depth), seeds in groups.items():
        step = seeds[0]["steps"] * fastest / pace(seeds)
        losses = [run["curve"][-1][2] for run in seeds], [loss_at(run, step) for run in seeds]
        shares = [[run[pairs][what] for run in seeds] for pairs, what in VERDICTS]
        cells = [f"{name}, depth {depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M"]
        cells += [f"{1e3 * pace(seeds):.0f}", *(mean_and_error(x, ".4f") for x in losses)]
        rows.append(cells + [mean_and_error(x, ".1%") for x in shares])
    return markdown(*rows)


def draw(runs: list[dict]):
    """The curves of equal depth, averaged over seeds: log10 of the loss over the share of steps."""
    curves = {}
    for name, depth in VARIANTS[: len(NETWORKS)]:
        seeds = [run["curve"] for run in runs if run["job"][:2] == [name, depth]]
        y = torch.tensor(seeds)[..., 2].log10().mean(0)
        curves[name] = torch.arange(1, len(y) + 1) / len(y), y
    span = span_of([y[1:] for _, y in curves.values()])
    return plot(curves, "log10 validation loss, over the share of the steps", *span)


def span_of(curves: list[Tensor]) -> tuple[float, float]:
    """The tenths between which these curves lie."""
    ends = np.concatenate(curves)
    return math.floor(10 * ends.min()) / 10, math.ceil(10 * ends.max()) / 10


def run(
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    study(VARIANTS, seeds, steps, out, table, draw, "architectures")


if __name__ == "__main__":
    command(run, __doc__)
