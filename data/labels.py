"""Labels for an MM-DiT. SD3's network takes texts and has none, so this file is our choice.
Read next: `data/toy.py`."""

import torch
from torch import Tensor, nn

from mmdit import HEAD_DIM, MMDiT


class ClassMMDiT(nn.Module):
    """Each class has learned context tokens and a learned pooled vector, which start as N(0,1),
    about the scale of a text encoder's output. Label `classes` is the null label. A point (C,) is
    a latent (C,1,1) with patch size 1. `shape` is MMDiT's, by name."""

    def __init__(self, classes: int, depth: int, tokens: int = 4, **shape):
        super().__init__()
        dim = HEAD_DIM * depth
        self.mmdit = MMDiT(depth, **shape, context_dim=dim, pooled_dim=dim)
        self.context = nn.Embedding(classes + 1, tokens * dim)
        self.pooled = nn.Embedding(classes + 1, dim)
        self.classes = classes
        self.null_cond = (torch.tensor(classes),) if classes else ()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B,C,H,W) or (B,C), t (B,), labels (B,) in 0..classes; no labels are null labels."""
        if labels is None:
            labels = torch.full_like(t, self.classes, dtype=torch.long)
        context = self.context(labels).unflatten(1, (-1, self.mmdit.width))  # (B,tokens,D)
        latent = x[:, :, None, None] if x.dim() == 2 else x  # (B,C,H,W)
        return self.mmdit(latent, t, context, self.pooled(labels)).reshape(x.shape)
