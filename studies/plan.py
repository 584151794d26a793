"""What a depth costs, on paper: `python -m studies.bench --plan --depth 38 --size 1024 --gpus 8`.

The network is built of fake tensors, which have shapes and no values, so any depth fits. A rank
holds for each weight 4 bytes of it, of its gradient and of its average, and 8 of Adam's moments;
under bf16 2 more of its rounded copy; and what the forward pass leaves for the backward pass, which
is less where the training checkpoints, from depth 30 on. With --shard all but the last is divided
among the ranks, and two blocks at a time are whole."""

from collections.abc import Callable, Iterable
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmdit
from data.base import CHECKPOINTED
from mmdit import MMDiT
from studies.runs import markdown
from training.folder import training_flops
from training.ranks import autocast

PAPER = (15, 18, 21, 30, 38)  # SD3's depths
TOKENS = 77 + 77  # CLIP's and T5's


class FusedAttention(torch.autograd.Function):
    """What a GPU's fused kernel keeps: q, k, v, the output and a logarithm for each query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def left_for_backward(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps after call(), each storage once, without those of known tensors."""
    known = {x.untyped_storage()._cdata for x in known}
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage  # held, or its number may come again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    del result
    return sum(storage.nbytes() for storage in storages.values())


def activations(network: MMDiT, precision: str, *inputs: Tensor) -> tuple[int, int]:
    """Bytes that the network's forward pass leaves; and with activation checkpointing, which keeps
    what goes into each block, and all of one block while that is computed again."""
    weights = [*network.parameters(), *network.buffers()]
    latent, _, context, _ = inputs
    B, tokens = len(latent), latent[0, 0].numel() // network.patch_size**2
    streams = [torch.empty(B, n, network.width) for n in (context.shape[1], tokens)]
    c = torch.empty(B, network.width)
    for stream in (*streams, c):
        stream.requires_grad_()
    attend = mock.patch.object(mmdit, "attend", FusedAttention.apply)
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
    batch_size of them on each rank."""
    heads = ["depth", "weights", "PFLOPs a step", "weights, gradients, moments, average"]
    heads += ["activations", "checkpointed", "a rank", f"a rank of {gpus}, --shard"]
    rows = [heads]
    side, G = size // 8, lambda n: f"{n / 1e9:.3g} GB"
    for depth in depths:
        shape = dict(pos_embed_max_size=max(side // 2, 64), qk_norm=True)
        inputs = (batch_size, 16, side, side), (batch_size,), (batch_size, TOKENS, 4096)
        with FakeTensorMode():
            network = MMDiT(depth, **shape)
            x, t, context = map(torch.empty, inputs)
            pooled = torch.empty(batch_size, 2048)
            whole, checkpointed = activations(network, precision, x, t, context, pooled)
        with torch.device("meta"):
            texts = torch.empty(1, TOKENS, 4096), torch.empty(1, 2048)
            flops = training_flops(MMDiT(depth, **shape), torch.empty(1, 16, side, side), *texts)
        P = sum(w.numel() for w in network.parameters())
        block = sum(w.numel() for w in network.joint_blocks[0].parameters())
        copy = 2 if precision == "bf16" else 0
        left = checkpointed if depth >= CHECKPOINTED else whole
        alone = (20 + copy) * P + left
        shared = 20 * P / gpus + 2 * (copy or 4) * block + 4 * block + left
        parts = " + ".join(f"{n * P / 1e9:.3g}" for n in (4, 4, 8, 4)) + " GB"
        cells = f"{depth}", f"{P / 1e9:.3g}B", f"{batch_size * gpus * flops / 1e15:.3g}", parts
        rows.append([*cells, *map(G, (whole, checkpointed, alone, shared))])
    return markdown(*rows)
