"""SD3's figure 4 on shapes: MM-DiT against DiT, CrossDiT and UViT, and what each text path is for.

    python -m studies.architectures       70 minutes on two cores

All have the same data, draws, steps and learning rate. At equal depth MM-DiT has about twice the
weights of a DiT, so the table has the others at a depth of equal weights, too, and says what a step
costs. The exact reader judges samples of captions whose pairs were seen in training, or not."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path as File
from typing import Annotated

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


# ---- The rivals of section 5.2: each has MM-DiT's embeddings, adaLN and final layer
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


class UViT(MMDiT):
    """One sequence of text and image tokens, and long skips from each block of the first half to
    its mirror image. They start at zero, so a new network is a DiT."""

    def __init__(self, depth: int, **shape):
        super().__init__(depth, **shape, shared=True)
        self.skips = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(depth // 2))
        for skip in self.skips:
            nn.init.zeros_(skip.weight), nn.init.zeros_(skip.bias)

    def mixed(self, c: Tensor, context: Tensor, x: Tensor) -> Tensor:
        """c (B,D), context (B,L,D), x (B,N,D) -> x after all blocks."""
        tokens = torch.cat([context, x], dim=1)  # (B,L+N,D)
        outputs = []  # of the first half's blocks
        for i, block in enumerate(self.joint_blocks):
            if i >= len(self.joint_blocks) - len(self.skips):
                skip = self.skips[len(outputs) - 1]
                tokens = tokens + skip(outputs.pop())
            tokens = self.computed(block, c, tokens)
            if i < len(self.skips):
                outputs.append(tokens)
        return tokens[:, context.shape[1] :]


def half_blind(part: str) -> type[MMDiT]:
    """An MM-DiT that is shown zeros for one of its two texts."""

    class HalfBlind(MMDiT):
        def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
            if part == "context":
                return super().forward(x, t, context, 0 * pooled)
            return super().forward(x, t, 0 * context, pooled)

    return HalfBlind


NETWORKS = {
    "MM-DiT": MMDiT,
    "DiT": partial(MMDiT, shared=True),
    "CrossDiT": CrossDiT,
    "UViT": UViT,
    "MM-DiT, c_ctxt alone": half_blind("context"),
    "MM-DiT, c_vec alone": half_blind("pooled"),
}
VARIANTS = [(name, 4) for name in NETWORKS] + [("DiT", 5), ("CrossDiT", 5), ("UViT", 5)]
POINTS = 10  # of the curves
RIGHT = ("all right", "shapes")  # two of the reader's verdicts


# ---- A run: train, and look at the average of the weights ten times on the way
def network_of(name: str, depth: int) -> nn.Module:
    """As `Shapes.network`, with another class."""
    model = Shapes.network({}, Recipe(depth=1))
    network = NETWORKS[name](
        depth,
        in_channels=3,
        patch_size=model.patch_size,
        pos_embed_max_size=model.pos_embed_max_size,
        context_dim=model.null_cond[0].shape[-1],
        pooled_dim=model.null_cond[1].shape[-1],
        qk_norm=True,
    )
    network.null_cond = model.null_cond
    return network


def trained(job: tuple[str, int, int], steps: int, judged: int = 400) -> dict:
    """The run (network, depth, seed): validation loss over steps and over seconds of training,
    then how often samples are right, of seen and of unseen pairs, at guidance 3."""
    torch.set_num_threads(1)
    name, depth, seed = job
    data, curve, spent = Shapes(Shapes.Options()), [], 0.0
    recipe = Recipe(**preset("shapes") | dict(depth=depth, steps=steps, seed=seed))
    torch.manual_seed(seed)
    objective, state = formulation(recipe.formulation), State(network_of(name, depth), recipe)
    sampler = Sampler(state.average, objective, dict(spec=data.spec(), precision=recipe.precision))
    held_out = data.held_out(recipe.validation)

    def look() -> None:
        loss = validation_loss(objective.field(sampler.guided()), objective, *held_out)
        curve.append((state.step, spent, loss))

    def watched(stream: Iterator) -> Iterator:
        nonlocal spent
        for batch in stream:
            start = time.perf_counter()
            yield batch
            spent += time.perf_counter() - start
            if state.step % (steps // POINTS) == 0:
                look()

    stream = batches(data, objective, recipe, state.network.null_cond)
    train(state, objective, watched(stream), recipe)
    stream.close()
    look()
    right = {}
    for pairs, new in (("seen", False), ("unseen", True)):
        right[pairs] = data.right(sampler, judged, new, steps=25, cfg=3.0)
    flops = recipe.batch_size * training_flops(state.network, *held_out)
    size = sum(p.numel() for p in state.network.parameters())
    return dict(job=job, steps=steps, curve=curve, flops=flops, parameters=size, **right)


# ---- The table and the picture
def pace(runs: list[dict]) -> float:
    """Seconds a step, of the seed that was disturbed least."""
    return min(run["curve"][-1][1] / run["steps"] for run in runs)


def loss_at(run: dict, step: float) -> float:
    """The validation loss between two points of the curve."""
    at, _, losses = zip(*run["curve"], strict=True)
    return float(np.exp(np.interp(step, at, np.log(losses))))


def table(runs: list[dict]) -> str:
    heads = ["network", "weights", "ms a step", "validation loss", "at equal time"]
    heads += [f"{pairs}: {what}" for pairs in ("seen", "unseen") for what in RIGHT]
    rows = [heads]
    groups = {v: [r for r in runs if tuple(r["job"][:2]) == v] for v in VARIANTS}
    fastest = min(map(pace, groups.values()))
    for (name, depth), seeds in groups.items():
        cells = [f"{name}, depth {depth}", f"{seeds[0]['parameters'] / 1e6:.1f}M"]
        cells.append(f"{1e3 * pace(seeds):.0f}")
        cells.append(mean_and_error([run["curve"][-1][2] for run in seeds], ".4f"))
        step = seeds[0]["steps"] * fastest / pace(seeds)
        cells.append(mean_and_error([loss_at(run, step) for run in seeds], ".4f"))
        for pairs in ("seen", "unseen"):
            cells += [mean_and_error([run[pairs][what] for run in seeds], ".1%") for what in RIGHT]
        rows.append(cells)
    return markdown(*rows)


def draw(runs: list[dict]):
    """The curves of equal depth, averaged over seeds: log10 of the loss over the share of steps."""
    curves = {}
    for name in NETWORKS:
        seeds = [run["curve"] for run in runs if run["job"][:2] == [name, VARIANTS[0][1]]]
        y = torch.tensor([[loss for _, _, loss in curve] for curve in seeds]).log10().mean(0)
        curves[name] = torch.arange(1, len(y) + 1) / len(y), y
    span = span_of([y[1:] for _, y in curves.values()])
    return plot(curves, "log10 validation loss, over the share of the steps", *span)


def span_of(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The tenths between which these curves lie."""
    ends = np.concatenate(curves)
    return math.floor(10 * ends.min()) / 10, math.ceil(10 * ends.max()) / 10


def study(
    variants: list[tuple[str, int]], seeds: int, steps: int, out: File,
    report: Callable, draw: Callable, name: str,
) -> None:  # fmt: skip
    """Make the runs of these (network, depth), print their table and draw OUT/NAME.png."""
    jobs = [(*variant, seed) for seed in range(seeds) for variant in variants]
    keys = {"curve", "flops", "parameters", "seen", "unseen"}
    runs = run_missing(out, jobs, partial(trained, steps=steps), steps, keys)
    print(report(runs))
    draw(runs).save(out / f"{name}.png")
    print(f"\nwrote {out}/{name}.png")


def run(
    seeds: Annotated[Count, "runs of each", 1, 1000] = 3,
    steps: Annotated[Count, "training steps of a run", POINTS, 10**6] = 2000,
    out: Annotated[File, "where runs are kept"] = File("runs/networks"),
) -> None:
    study(VARIANTS, seeds, steps, out, table, draw, "architectures")


if __name__ == "__main__":
    command(run, __doc__)
