"""MM-DiT, the network of *Scaling Rectified Flow Transformers* (SD3), section 4, and its rival DiT.

Image and text tokens have their own weights and meet in one attention; t and c_vec act by adaLN.
Names, shapes and function are the released SD3 checkpoint's, so real weights load as they are.
Time, here and everywhere: t = 0 is data, t = 1 is noise. The network multiplies t by 1000 itself.
Read next: `perflow.py`, the second paper, or `train.py`, which trains this network."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_DIM = 64  # a network of depth d has d blocks, d heads of 64 values, and width 64 d
TIME_CHANNELS = 256  # of the embedding of t: 128 frequencies, cosines and sines


# ---- Fixed embeddings, of time and of place
def timestep_embedding(t: Tensor) -> Tensor:
    """t (B,) in [0, 1] -> (B,256): cos, then sin, of (1000 t) 10000^(-i/128), i = 0..127.
    1000 t is not rounded to a whole number. The result is float32, under autocast too."""
    t = (1000 * t.to(torch.promote_types(t.dtype, torch.float32))).float()
    i = torch.arange(TIME_CHANNELS // 2, dtype=torch.float32, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) * i / (TIME_CHANNELS // 2))  # (B,128)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_table(size: int, width: int) -> Tensor:
    """(1, size^2, width): [sin(col), cos(col), sin(row), cos(row)], width/4 channels each.
    A position is index * base/size; the released medium has base 64 and size 192. The paper names
    no other size: we keep base 64, but do not stretch a smaller grid, whose spacing is 1 as in DiT.
    """
    i = torch.arange(width // 4, dtype=torch.float64)
    position = torch.arange(size, dtype=torch.float64) * (min(size, 64) / size)
    angle = position[:, None] * 10000 ** (-i / (width // 4))  # (size, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=-1)  # (size, width/2)
    col = line[None, :].expand(size, size, -1)
    row = line[:, None].expand(size, size, -1)
    return torch.cat([col, row], dim=-1).reshape(1, size * size, width).float()


# ---- The block: two streams, one attention
def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: LN(x) (1 + scale) + shift, x (B,N,D), shift and scale (B,1,D); LN without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class RMSNorm(nn.RMSNorm):
    """QK-norm over the 64 values of a head. It computes in the precision of its weight and returns
    that of x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(64)) v in one fused call; q, k, v (B,heads,N,64), no mask.
    For bf16 on a CPU it takes three plain calls, because the fused kernel is slower there."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return (HEAD_DIM**-0.5 * q @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """One stream's weights of the joint attention: q, k, v before it, the projection after it."""

    def __init__(self, width: int, qk_norm: bool, pre_only: bool):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        if not pre_only:
            self.proj = nn.Linear(width, width)
        self.ln_q = RMSNorm(HEAD_DIM, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = RMSNorm(HEAD_DIM, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,N,D) -> q, k, v, each (B,N,heads,64)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)  # of (B,N,3,heads,64)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """One stream's weights of a joint block.
    The last context block is pre-only: it gives keys and values to the attention and stops there,
    because nobody reads the context after it."""

    def __init__(self, width: int, qk_norm: bool, pre_only: bool = False):
        super().__init__()
        self.chunks = 2 if pre_only else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))
        self.attn = Attention(width, qk_norm, pre_only)
        if not pre_only:
            fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (B,D) -> shift, scale, gate of the attention, then of the MLP, each (B,1,D). A pre-only
        block has the first two."""
        return self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1)

    def residual(self, x: Tensor, attended: Tensor, gate, shift_mlp, scale_mlp, gate_mlp) -> Tensor:
        """x (B,N,D) after the attention's step and then the MLP's. A step is x + gate f(x)."""
        x = x + gate * self.attn.proj(attended)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """SD3, figure 2b: the streams, context first, meet in one attention and part again.
    A DiT shares the weights, so it has one stream: context and image tokens in one sequence."""

    def __init__(self, width: int, qk_norm: bool, last: bool, shared: bool):
        super().__init__()
        if not shared:
            self.context_block = StreamBlock(width, qk_norm, pre_only=last)
        self.x_block = StreamBlock(width, qk_norm)

    def forward(self, c: Tensor, *streams: Tensor) -> tuple[Tensor, ...]:
        """c (B,D); streams (B,L,D) and (B,N,D), or one (B,L+N,D) -> those of them that go on.
        The last context block computes queries that nobody uses, as the references do. So each of
        its parameters has a gradient, zero for these, which DistributedDataParallel expects."""
        blocks = list(self.children())  # one for each stream
        mods = [block.modulation(c) for block in blocks]
        inputs = [modulate(x, *mod[:2]) for x, mod in zip(streams, mods, strict=True)]
        qkv = [block.attn(x) for block, x in zip(blocks, inputs, strict=True)]
        q, k, v = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*qkv, strict=True))
        y = attend(q, k, v).transpose(1, 2)  # (B,L+N,heads,64)
        y = [part.flatten(2) for part in y.split([x.shape[1] for x in streams], dim=1)]
        parts = zip(blocks, streams, y, mods, strict=True)
        return tuple(block.residual(x, y, *mod[2:]) for block, x, y, mod in parts if len(mod) == 6)


class FinalLayer(nn.Module):
    """adaLN (shift, scale), then a linear map to the values of one patch."""

    def __init__(self, width: int, values: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, values)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B,N,D), c (B,D) -> (B,N,values)."""
        return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)))


# ---- The network
def vector_embedder(size: int, width: int) -> nn.Module:
    """(B,size) -> (B,width): Linear, SiLU, Linear."""
    mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
    return nn.Sequential(OrderedDict(mlp=mlp))


class MMDiT(nn.Module):
    """SD3 section 4: a velocity (or another prediction) from a latent, a time and a text.
    The paper's c_ctxt is `context`, its c_vec is `pooled`, and its y is `c`, the vector that drives
    every modulation. Depth alone sets the size; SD3 medium is MMDiT(24). `shared` is the paper's
    DiT, one set of weights for both modalities: the same keys less the context blocks. The null
    condition is zeros. ValueError on a depth below 1 and on latents of another shape."""

    def __init__(
        self, depth: int, in_channels: int = 16, patch_size: int = 2, pos_embed_max_size: int = 192,
        context_dim: int = 4096, pooled_dim: int = 2048,
        qk_norm: bool = False, shared: bool = False,
    ):  # fmt: skip
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.width, self.shared = HEAD_DIM * depth, shared
        self.in_channels, self.patch_size = in_channels, patch_size
        self.pos_embed_max_size = pos_embed_max_size
        self.checkpointing = False  # True: training computes each block twice, to save memory
        self.null_cond = (torch.zeros(1, context_dim), torch.zeros(pooled_dim))  # to be broadcast

        proj = nn.Conv2d(in_channels, self.width, patch_size, stride=patch_size)
        self.x_embedder = nn.Sequential(OrderedDict(proj=proj))
        self.t_embedder = vector_embedder(TIME_CHANNELS, self.width)
        self.y_embedder = vector_embedder(pooled_dim, self.width)
        self.context_embedder = nn.Linear(context_dim, self.width)
        self.register_buffer("pos_embed", position_table(pos_embed_max_size, self.width))
        blocks = (JointBlock(self.width, qk_norm, i == depth - 1, shared) for i in range(depth))
        self.joint_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(self.width, patch_size**2 * in_channels)
        self._initialize()

    def _initialize(self) -> None:
        for name, layer in self.named_modules():
            self.initialize_layer(name, layer)

    def initialize_layer(self, name: str, layer: nn.Module) -> None:
        """The start of one of its layers. adaLN-zero: every modulation and the output are zero, so
        each block is the identity. The rest is DiT's, as SD3 is silent. Each weight is set once:
        nothing undoes the zeros."""
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            return
        nn.init.zeros_(layer.bias)
        if "adaLN" in name or name == "final_layer.linear":
            nn.init.zeros_(layer.weight)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(layer.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(layer.weight.data.flatten(1))  # a patch is one vector

    def positions(self, h: int, w: int) -> Tensor:
        """(1, h w, D): the centre of the table, for any size and aspect ratio, row by row."""
        size = self.pos_embed_max_size
        if max(h, w) > size:
            raise ValueError(f"{h}x{w} tokens, but pos_embed_max_size is {size}")
        top, left = (size - h) // 2, (size - w) // 2
        table = self.pos_embed.unflatten(1, (size, size))  # (1,row,column,D)
        return table[:, top : top + h, left : left + w].flatten(1, 2)

    def patchify(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> tokens with positions (B,N,D), row by row."""
        channels, H, W = x.shape[1:]
        p = self.patch_size
        if channels != self.in_channels:
            raise ValueError(f"the network takes {self.in_channels} channels, got {channels}")
        if H % p or W % p:
            raise ValueError(f"a latent of {H}x{W} is not divisible by the patch size {p}")
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2)  # (B,D,h,w) -> (B,h w,D)
        return tokens + self.positions(H // p, W // p)

    def unpatchify(self, x: Tensor, H: int, W: int) -> Tensor:
        """(B,N,p p C) -> (B,C,H,W); the values of a token are (p_row, p_col, channel)."""
        B, p = len(x), self.patch_size
        x = x.reshape(B, H // p, W // p, p, p, self.in_channels)  # (B,h,w,p,p,C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)  # (B,C,h,p,w,p)

    def mixed(self, c: Tensor, *streams: Tensor) -> tuple[Tensor, ...]:
        """The streams after all blocks."""
        for block in self.joint_blocks:
            if self.checkpointing and self.training:
                how = {"use_reentrant": False, "preserve_rng_state": False}
                streams = checkpoint(block, c, *streams, **how)
            else:
                streams = block(c, *streams)
        return streams

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """x (B,C,H,W), t (B,) in [0, 1], context (B,L,.), pooled (B,.) -> (B,C,H,W)."""
        H, W = x.shape[2:]
        time = timestep_embedding(t).to(self.context_embedder.weight.dtype)
        c = self.t_embedder(time) + self.y_embedder(pooled)  # (B,D)
        x = self.patchify(x)
        N = x.shape[1]
        # Both streams in the positions' dtype: float32 under autocast, where residuals add up.
        streams = (self.context_embedder(context).to(x.dtype), x)  # (B,L,D), (B,N,D)
        if self.shared:
            streams = (torch.cat(streams, dim=1),)  # (B,L+N,D)
        streams = self.mixed(c, *streams)
        x = self.final_layer(streams[-1][:, -N:], c)  # the image tokens: (B,N,p p C)
        return self.unpatchify(x, H, W)


class ClassMMDiT(nn.Module):
    """Labels for an MM-DiT: a class is a few learned context tokens and a learned pooled vector.
    Label `classes` is the null one; with classes = 0 there is no other. A point (C,) is a C x 1 x 1
    latent with one position and patch size 1. SD3 has no labels, so their start is our choice:
    N(0,1), about the scale of a text encoder's output. `shape` is MMDiT's, by name."""

    def __init__(self, classes: int, depth: int, tokens: int = 4, **shape):
        super().__init__()
        dim = HEAD_DIM * depth
        self.mmdit = MMDiT(depth, **shape, context_dim=dim, pooled_dim=dim)
        self.context = nn.Embedding(classes + 1, tokens * dim)
        self.pooled = nn.Embedding(classes + 1, dim)
        self.classes = classes
        self.null_cond = (torch.tensor(classes),) if classes else ()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B,C,H,W) or (B,C), t (B,), labels (B,) in 0..classes, or none for null -> like x."""
        if labels is None:
            labels = torch.full_like(t, self.classes, dtype=torch.long)
        context = self.context(labels).unflatten(1, (-1, self.mmdit.width))  # (B,tokens,D)
        latent = x[:, :, None, None] if x.dim() == 2 else x  # (B,C,H,W)
        return self.mmdit(latent, t, context, self.pooled(labels)).reshape(x.shape)
