"""The networks of all data sets, by the name of `--network`: MM-DiT and figure 4's rivals of it.

A network takes texts as `MMDiT.forward` does; `ClassMMDiT` gives labels to it. A fork adds a line
to NETWORKS: its class is built with `depth` and what `Data.arguments` says of the data.
Read next: `data/base.py`."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import HEAD_DIM, MMDiT, StreamBlock, attend, modulate
from rf import InputError
from toy2d import MLP

CHECKPOINTED = 30  # networks this deep compute activations again, to need less memory


class ClassMMDiT(nn.Module):
    """Labels for an MM-DiT. SD3's takes texts and has none, so this is our choice: each class has
    learned context tokens and a learned pooled vector, which start as N(0,1), about the scale of a
    text encoder's output. Label `classes` is the null label. A point (C,) is a latent (C,1,1) with
    patch size 1. `network` has MMDiT's face; `shape` is MMDiT's, by name."""

    drawn_by_layers = True

    def __init__(
        self, classes: int, depth: int, tokens: int = 1, network: Callable = MMDiT,
        patch_size: int = 1, pos_embed_max_size: int = 1, **shape,
    ):  # fmt: skip
        super().__init__()
        dim = HEAD_DIM * depth
        shape |= dict(patch_size=patch_size, pos_embed_max_size=pos_embed_max_size)
        self.mmdit = network(depth, **shape, context_dim=dim, pooled_dim=dim)
        self.context = nn.Embedding(classes + 1, tokens * dim)
        self.pooled = nn.Embedding(classes + 1, dim)
        self.classes = classes
        self.null_cond = (torch.tensor(classes),) if classes else ()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B,C,H,W) or (B,C), t (B,), labels (B,) in 0..classes; no labels are null labels."""
        if labels is None:
            labels = torch.full_like(t, self.classes, dtype=torch.long)
        pooled = self.pooled(labels)  # (B,D)
        context = self.context(labels).unflatten(1, (-1, pooled.shape[1]))  # (B,tokens,D)
        latent = x[:, :, None, None] if x.dim() == 2 else x  # (B,C,H,W)
        return self.mmdit(latent, t, context, pooled).reshape(x.shape)


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


class ResBlock(nn.Module):
    """Two convolutions of 3 x 3, each after a norm of a token's channels; c modulates the second
    one, as adaLN does. It starts as the identity, or as the change of channels."""

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * outputs))
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B,inputs,H,W), c (B,D) -> (B,outputs,H,W)."""
        normed = lambda y, *mods: modulate(y.movedim(1, -1).flatten(1, 2), *mods)
        convolved = lambda conv, y: conv(F.silu(y).mT.unflatten(-1, x.shape[2:]))
        still = torch.zeros((), device=x.device)
        y = convolved(self.first, normed(x, still, still))
        y = normed(y, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1))
        return self.shortcut(x) + convolved(self.second, y)


class UViT(MMDiT):
    """That of SD3's figure 4, from Hoogeboom et al. 2023: a U-Net whose lowest level is a
    transformer, a DiT here. One level above it has patches of half the side, half the width, a
    ResBlock before and one after, and the skip between them, concatenated. Square pictures."""

    def __init__(self, depth: int, patch_size: int = 2, pos_embed_max_size: int = 192, **shape):
        if patch_size % 2:
            raise InputError(f"uvit halves the patches, and their side is {patch_size}")
        sizes = dict(patch_size=patch_size // 2, pos_embed_max_size=2 * pos_embed_max_size)
        super().__init__(depth, **sizes, **shape, shared=True)
        D, half = self.width, self.width // 2
        self.narrow, self.down = nn.Conv2d(D, half, 1), nn.Conv2d(half, D, 2, stride=2)
        self.before, self.after = ResBlock(half, half, D), ResBlock(D, half, D)
        self.up, self.wide = nn.Conv2d(D, half, 1), nn.Conv2d(half, D, 1)
        for name, layer in self.named_modules():
            self.initialize_layer(name, layer)
        for block in (self.before, self.after):
            nn.init.zeros_(block.second.weight)

    def mixed(self, c: Tensor, context: Tensor, x: Tensor) -> Tensor:
        """c (B,D), context (B,L,D), x (B,4N,D) of a square -> x after all levels."""
        side = math.isqrt(x.shape[1])
        if side**2 != x.shape[1] or side % 2:
            raise InputError(f"uvit takes squares of whole patches, not {x.shape[1] / 4:g} patches")
        x = self.before(self.narrow(x.mT.unflatten(-1, (side, side))), c)  # (B,D/2,side,side)
        low = self.down(x).flatten(2).mT  # (B,N,D)
        low = super().mixed(c, context, low).mT.unflatten(-1, (side // 2, side // 2))
        up = F.interpolate(self.up(low), scale_factor=2.0)
        return self.wide(self.after(torch.cat([up, x], dim=1), c)).flatten(2).mT


# ---- The table
def of_texts_or_labels(network: Callable[..., MMDiT]) -> Callable[..., nn.Module]:
    """How to build a network of MMDiT's face for texts or, in a ClassMMDiT, for labels."""

    def build(depth: int, classes: int | None = None, **arguments) -> nn.Module:
        inner = network(depth, **arguments) if classes is None else None
        made = inner or ClassMMDiT(classes, depth, network=network, **arguments)
        (inner or made.mmdit).checkpointing = depth >= CHECKPOINTED
        return made

    return build


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "mmdit": of_texts_or_labels(MMDiT),
    "dit": of_texts_or_labels(partial(MMDiT, shared=True)),
    "crossdit": of_texts_or_labels(CrossDiT),
    "uvit": of_texts_or_labels(UViT),
}
