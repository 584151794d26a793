"""How fast the code is, and what a depth costs on paper.

    python -m studies.bench --depth 12 --precision bf16 --compile --batch-size 64
    python -m studies.bench --plan --depth 38 --size 1024 --gpus 8 --precision bf16

First the start of each command beside that of torch; the toy's loop beside bare ones; the parts of
a step of shapes. They take turns, so a busy moment hits all of them; the tables have medians.
MM-DiT's step stands beside a large matmul."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from timeit import timeit
from typing import Annotated, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer

import toy2d
from data.networks import CHECKPOINTED
from data.shapes import Shapes
from data.toy import Toy
from mmdit import MMDiT
from rf import formulation
from studies.runs import TOY, markdown
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
    recipe = Recipe(**TOY)
    steps, size = 10 * recipe.block, recipe.batch_size
    state, stream = State(toy2d.MLP(), recipe), batches(data, objective, recipe)
    ours = lambda: train(state, objective, stream, replace(recipe, steps=state.step + steps))
    bare = bare_loop(data.mixture, size, recipe.block, fused=True)
    plain = bare_loop(data.mixture, size, 1, fused=False)
    loops = {
        "train.py": ours,
        "bare loop": lambda: [next(bare) for _ in range(steps)],
        "bare, plain Adam, batches one by one": lambda: [next(plain) for _ in range(steps)],
    }
    one_round = lambda: [timeit(loop, number=1) / steps for loop in loops.values()]
    seconds = np.array([one_round() for _ in range(rounds + 1)])[1:]  # the first one warms up
    stream.close()
    medians, ratios = np.median(seconds, 0), np.median(seconds[:, :1] / seconds, 0)
    print(f"{'':38}{'us a step':>10}{'train.py is':>14}")
    for name, step, ratio in zip(loops, medians, ratios, strict=True):
        print(f"{name:38}{1e6 * step:10.0f}{ratio:13.2f}x")


def bench_shapes(rounds: int) -> None:
    """A step of `--dataset shapes`, in its parts; the data are drawn beside it, in a thread."""
    data, recipe = Shapes(Shapes.Options()), Recipe(**preset("shapes"))
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    objective = formulation(recipe.formulation)
    network = data.network(data.spec(), recipe)
    state, stream = State(network, recipe), batches(data, objective, recipe, network.null_cond)
    (rows,) = next(stream)
    stream.close()
    weights, average = list(network.parameters()), list(state.average.parameters())

    def learn() -> None:
        state.optimizer.zero_grad()
        with autocast(recipe.precision, torch.device("cpu")):
            objective.rows_loss(network, state.average, rows).backward()

    drawn = lambda: data.batch(0, 0, recipe.batch_size * recipe.block)
    learn()
    parts = {
        "forward and backward": learn,
        "the norm of the gradient": lambda: torch.nn.utils.clip_grad_norm_(weights, recipe.clip),
        "the optimizer": lambda: state.optimizer.step(recipe.lr),
        "the average": lambda: torch._foreach_lerp_(average, [w.detach() for w in weights], 0.1),
        f"the data of {recipe.block} steps": drawn,
    }
    one_round = lambda: [timeit(part, number=1) for part in parts.values()]
    seconds = np.median([one_round() for _ in range(4 * rounds)], axis=0)
    for name, part in zip(parts, seconds, strict=True):
        print(f"{'shapes: ' + name:38}{1e3 * part:10.1f} ms{part / seconds[:-1].sum():12.0%}")


def bench_starts(rounds: int) -> None:
    """The seconds until a command has read its flags, beside those that torch alone takes."""
    help_ = lambda *command: [sys.executable, *command, "--help"]
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        **{f"{name} --help": help_(name) for name in ("train.py", "sample.py")},
        **{f"{name} --help": help_("-m", name) for name in ("data.encode", "studies.rank")},
    }
    start = lambda words: timeit(partial(subprocess.run, words, capture_output=True), number=1)
    one_round = lambda: [start(words) for words in commands.values()]
    seconds = np.median([one_round() for _ in range(-(-rounds // 4))], axis=0)
    for name, each in zip(commands, seconds, strict=True):
        print(f"{name:38}{each:10.2f} s{each / seconds[0]:13.2f}x")


class FusedAttention(torch.autograd.Function):
    """What a GPU's fused kernel keeps: q, k, v, the output and a logarithm for each query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def left_for_backward(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps after call(), each storage once, without those of known tensors."""
    saved = []  # the storages are held, or one's number may come again
    pack = lambda x: (saved.append(x.untyped_storage()), x)[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    sizes = {storage._cdata: storage.nbytes() for storage in saved}
    return sum(sizes[i] for i in sizes.keys() - {x.untyped_storage()._cdata for x in known})


def activations(network: MMDiT, precision: str, *inputs: Tensor) -> tuple[int, int]:
    """Bytes that the network's forward pass leaves; and with activation checkpointing, which keeps
    what goes into each block, and all of one block while that is computed again."""
    weights = [*network.parameters(), *network.buffers()]
    latent, _, context, _ = inputs
    B, tokens = len(latent), latent[0, 0].numel() // network.patch_size**2
    empty = lambda *shape: torch.empty(*shape, network.width, requires_grad=True)
    streams, c = [empty(B, context.shape[1]), empty(B, tokens)], empty(B)
    attend = mock.patch("mmdit.attend", FusedAttention.apply)
    with attend, autocast(precision, torch.device("cpu")):
        whole = left_for_backward(lambda: network(*inputs), [*weights, *inputs])
        block, number = network.joint_blocks[0], len(network.joint_blocks)
        single = left_for_backward(lambda: block(c, *streams), [*weights, *streams, c])
    if precision == "bf16":  # the rounded copies of weights are counted by themselves
        whole -= 2 * sum(w.numel() for w in network.parameters())
        single -= 2 * sum(w.numel() for w in block.parameters())
    entering = sum(stream.nbytes for stream in streams)
    return whole, whole - number * single + number * entering + single


def planned(depths: Iterable[int], size: int, batch_size: int, gpus: int, precision: str) -> str:
    """The table, for pictures of size x size whose latents have an eighth of it and 16 channels,
    batch_size of them on each rank. The network is built of fake tensors, which have shapes and no
    values, so any depth fits. A rank holds for each weight 4 bytes of it, of its gradient and of
    its average, and 8 of Adam's moments; under bf16 2 more of its rounded copy; and what the
    forward pass leaves, which is less where the training checkpoints, from depth 30 on. With
    --shard all but the last is divided among the ranks, and two blocks at a time are whole."""
    heads = ["depth", "weights", "PFLOPs a step", "weights, gradients, moments, average"]
    heads += ["activations", "checkpointed", "a rank", f"a rank of {gpus}, --shard"]
    rows, side, copy = [heads], size // 8, 2 if precision == "bf16" else 0
    for depth in depths:
        with FakeTensorMode():
            network = MMDiT(depth, pos_embed_max_size=max(side // 2, 64), qk_norm=True)
            latent, t = torch.empty(batch_size, 16, side, side), torch.empty(batch_size)
            texts = 77 + 77, 4096  # of CLIP and of T5
            cond = torch.empty(batch_size, *texts), torch.empty(batch_size, 2048)
            whole, checkpointed = activations(network, precision, latent, t, *cond)
            flops = training_flops(network, latent, *cond)
        P = sum(w.numel() for w in network.parameters())
        block = sum(w.numel() for w in network.joint_blocks[0].parameters())
        left = checkpointed if depth >= CHECKPOINTED else whole
        alone = (20 + copy) * P + left
        shared = 20 * P / gpus + 2 * (copy or 4) * block + 4 * block + left
        parts = " + ".join(f"{n * P / 1e9:.3g}" for n in (4, 4, 8, 4)) + " GB"
        cells = f"{depth}", f"{P / 1e9:.3g}B", f"{batch_size * gpus * flops / 1e15:.3g}", parts
        sizes = whole, checkpointed, alone, shared
        rows.append([*cells, *(f"{n / 1e9:.3g} GB" for n in sizes)])
    return markdown(*rows)


def run(
    rounds: Annotated[Count, "of 250 steps of the toy, 4 of shapes, 1/4 s of MM-DiT", 1, 1000] = 12,
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
        depths = sorted({15, 18, 21, 30, 38, depth})  # SD3's
        print(planned(depths, size, batch_size, gpus, precision))
        return
    threads, device = torch.get_num_threads(), check_device(device)
    bench_starts(rounds)
    bench_toy(rounds)
    bench_shapes(rounds)
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
    a, b, c = noise(3, n, n, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    timed = lambda call: Timer("call()", globals={"call": call}, num_threads=threads)
    median = lambda call: timed(call).blocked_autorange(min_run_time=rounds / 4).median
    matmul = 2 * n**3 / median(lambda: torch.mm(a, b, out=c))
    seconds, weights = median(step), sum(p.numel() for p in network.parameters())
    rate = batch_size * training_flops(network, x, *cond) / seconds
    compiled = " compiled" if compile else ""
    setting = f"{side**2} + {context} tokens, batch {batch_size}, {precision}{compiled}, {device}"
    print(f"MM-DiT depth {depth}, {weights / 1e6:.1f}M parameters, {setting}")
    print(f"forward + backward {1e3 * seconds:.1f} ms, {rate / 1e12:.3f} TFLOP/s")
    print(f"a {n} x {n} matmul {matmul / 1e12:.3f} TFLOP/s: {rate / matmul:.0%} of it is reached")


if __name__ == "__main__":
    command(run, __doc__)
