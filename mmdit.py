"""MM-DiT, the network of *Scaling Rectified Flow Transformers* (SD3), section 4, and its rival DiT.

`MMDiT.forward` is figure 2a, `JointBlock.forward` figure 2b: text and image tokens have their own
weights and meet in one attention. Real weights load as they are: names and function are SD3's.
Time, here and everywhere: t = 0 is data, t = 1 is noise. The network multiplies t by 1000 itself.
Read next: `perflow.py`, the second paper, or `train.py`, which trains this network."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
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
    no other size: we keep base 64. A grid smaller than that is not stretched: its spacing is 1."""
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
    """QK-norm, figure 2b's "opt. RMS-Norm". It computes in its weight's dtype and returns x's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(64)) v in one fused call; q, k, v (B,heads,N,64), no mask.
    It takes three plain calls for bf16 on a CPU, because the fused kernel is slower there, and for
    forward-mode derivatives (jvp), which that kernel has not."""
    forward_mode = any(unpack_dual(x).tangent is not None for x in (q, k, v))
    if forward_mode or (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
        return (HEAD_DIM**-0.5 * q @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """One stream's weights of figure 2b's attention: q, k, v before it, the projection after it."""

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
    """One column of figure 2b: the weights of one stream, before and after the attention.
    The last context block is pre-only: it gives the attention keys and values and stops there, as
    nobody reads the context after it. It also computes queries, which nobody uses, as in sd3-ref:
    so each parameter has a gradient, as DistributedDataParallel expects."""

    def __init__(self, width: int, qk_norm: bool, pre_only: bool = False):
        super().__init__()
        self.pre_only = pre_only
        modulations = 2 if pre_only else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, modulations * width))
        self.attn = Attention(width, qk_norm, pre_only)
        if not pre_only:
            fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))

    def pre_attention(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """x (B,N,D), c (B,D) -> (q, k, v), and the modulations, each (B,1,D), for post_attention.
        Shift, 1 + scale and gate are the figure's beta, alpha, gamma, then epsilon, delta, zeta."""
        shift, scale, *modulations = self.adaLN_modulation(c)[:, None].split(c.shape[-1], dim=-1)
        return self.attn(modulate(x, shift, scale)), modulations

    def post_attention(self, x: Tensor, attended: Tensor, *modulations: Tensor) -> Tensor:
        """x (B,N,D), attended (B,N,heads,64) -> x after two steps x + gate f(x): attention, MLP."""
        gate, shift_mlp, scale_mlp, gate_mlp = modulations
        x = x + gate * self.attn.proj(attended.flatten(2))  # heads side by side: (B,N,D)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """SD3, figure 2b: context and image have their own weights and meet in one attention."""

    def __init__(self, width: int, qk_norm: bool, pre_only: bool):
        super().__init__()
        self.context_block = StreamBlock(width, qk_norm, pre_only)
        self.x_block = StreamBlock(width, qk_norm)

    def forward(self, c: Tensor, context: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """c (B,D), context (B,L,D), x (B,N,D) -> context, or None if it is pre-only, and x."""
        context_qkv, context_mods = self.context_block.pre_attention(context, c)
        x_qkv, x_mods = self.x_block.pre_attention(x, c)

        pairs = zip(context_qkv, x_qkv, strict=True)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)  # (B,heads,L+N,64)
        attended = attend(q, k, v).transpose(1, 2)  # (B,L+N,heads,64)
        context_attended, x_attended = attended.split([context.shape[1], x.shape[1]], dim=1)

        x = self.x_block.post_attention(x, x_attended, *x_mods)
        if self.context_block.pre_only:
            return None, x
        context = self.context_block.post_attention(context, context_attended, *context_mods)
        return context, x


class DiTBlock(nn.Module):
    """The DiT of section 5.2: one set of weights, so one stream of context and image tokens."""

    def __init__(self, width: int, qk_norm: bool):
        super().__init__()
        self.x_block = StreamBlock(width, qk_norm)

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        """c (B,D), x (B,L+N,D) -> x."""
        qkv, modulations = self.x_block.pre_attention(x, c)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # (B,heads,L+N,64)
        return self.x_block.post_attention(x, attend(q, k, v).transpose(1, 2), *modulations)


class FinalLayer(nn.Module):
    """Figure 2a, after the blocks: adaLN, then a linear map to the values of one patch."""

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
    """SD3, figure 2a: a velocity (or another prediction) from a latent, a time and a text.
    The paper's c_ctxt is `context`, its c_vec is `pooled`, and its y is `c`, the vector that drives
    every modulation. Depth alone sets the size; SD3 medium is MMDiT(24). `shared` is the paper's
    DiT: the same keys without the context blocks. The null condition is zeros."""

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
        if shared:
            blocks = [DiTBlock(self.width, qk_norm) for _ in range(depth)]
        else:
            blocks = [JointBlock(self.width, qk_norm, i == depth - 1) for i in range(depth)]
        self.joint_blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(self.width, patch_size**2 * in_channels)
        for name, layer in self.named_modules():
            self.initialize_layer(name, layer)

    def initialize_layer(self, name: str, layer: nn.Module) -> None:
        """Set the first weights of a layer, once. adaLN-zero: every modulation and the output are
        zero, so each block is the identity. SD3 is silent about the rest, which is as in DiT."""
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

    def computed(self, block: nn.Module, *inputs: Tensor):
        """block(*inputs). With `checkpointing` the backward pass computes it again."""
        if self.checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    def mixed(self, c: Tensor, context: Tensor, x: Tensor) -> Tensor:
        """c (B,D), context (B,L,D), x (B,N,D) -> x after all blocks, a DiT's in one sequence."""
        if self.shared:
            tokens = torch.cat([context, x], dim=1)  # (B,L+N,D)
            for block in self.joint_blocks:
                tokens = self.computed(block, c, tokens)
            return tokens[:, context.shape[1] :]
        for block in self.joint_blocks:
            context, x = self.computed(block, c, context, x)
        return x

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """x (B,C,H,W), t (B,) in [0, 1], context (B,L,.), pooled (B,.) -> (B,C,H,W)."""
        H, W = x.shape[2:]
        time = timestep_embedding(t).to(self.context_embedder.weight.dtype)
        c = self.t_embedder(time) + self.y_embedder(pooled)  # (B,D)
        x = self.patchify(x)  # (B,N,D)
        # Both streams have the positions' dtype: float32 under autocast, where residuals add up.
        context = self.context_embedder(context).to(x.dtype)  # (B,L,D)
        x = self.mixed(c, context, x)  # (B,N,D)
        x = self.final_layer(x, c)  # (B,N,p p C)
        return self.unpatchify(x, H, W)
