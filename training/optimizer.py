"""What moves the weights: AdamW, or Muon for the hidden matrices and AdamW for the rest, as one.

Read next: `train.py`, which calls it."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdit import HEAD_DIM
from rf import InputError
from training.options import Recipe, fast_bf16
from training.ranks import blocks_of, is_sharded


def is_hidden(name: str, layer: nn.Module) -> bool:
    """Whether it leads from one hidden state to another: inputs and outputs are narrower than a
    head, and modulations (adaLN) are outputs, too."""
    wide = isinstance(layer, nn.Linear) and min(layer.weight.shape) >= HEAD_DIM
    return wide and "adaLN" not in name


class Float32(TorchFunctionMode):
    """What PyTorch's Muon does in bf16 it does in float32: for CPUs that only emulate bf16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (Tensor.clone if func is Tensor.bfloat16 else func)(*args, **kwargs or {})


class Optimizer:
    """AdamW; or, where recipe.muon is not 0, Muon (Jordan et al. 2024, PyTorch's) at muon times its
    rate for the hidden matrices of the blocks, or of a network without blocks. Muon's steps are
    orthogonal matrices; each costs fifteen products. The state is kept by the weight's number in
    network.parameters(), as AdamW's alone would be. InputError where ranks share the weights."""

    def __init__(self, network: nn.Module, recipe: Recipe):
        parts = blocks_of(network) or [network]
        layers = [layer for part in parts for layer in part.named_modules()] if recipe.muon else []
        self.hidden = {layer.weight for name, layer in layers if is_hidden(name, layer)}
        if self.hidden and is_sharded(network):
            raise InputError("--shard is not for Muon, which needs the whole of a matrix")
        self.products = nullcontext if fast_bf16() else Float32
        self.numbers = {w: i for i, w in enumerate(network.parameters())}
        rest = [w for w in self.numbers if w not in self.hidden]
        adam = dict(betas=(0.9, recipe.beta2), eps=recipe.eps, weight_decay=recipe.weight_decay)
        self.each = {torch.optim.AdamW(rest, recipe.lr, **adam, fused=True): 1.0}
        if self.hidden:
            muon = [w for w in self.numbers if w in self.hidden]
            self.each[torch.optim.Muon(muon, recipe.lr, recipe.weight_decay)] = recipe.muon

    def zero_grad(self) -> None:
        for optimizer in self.each:
            optimizer.zero_grad()

    def step(self, lr: float) -> None:
        for optimizer, factor in self.each.items():
            optimizer.param_groups[0]["lr"] = lr * factor
            with self.products():
                optimizer.step()

    @property
    def state(self) -> dict[Tensor, dict]:
        """The moments of each weight."""
        return {w: moments for optimizer in self.each for w, moments in optimizer.state.items()}

    def shapes(self, w: Tensor) -> dict[str, tuple]:
        """What the state of a weight holds."""
        shape = tuple(w.shape)
        if w in self.hidden:
            return {"momentum_buffer": shape}
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}

    def state_dict(self) -> dict:
        return {"state": {self.numbers[w]: moments for w, moments in self.state.items()}}

    def load_state_dict(self, state: Mapping[int, dict]) -> None:
        """The moments are loaded; the settings stay the recipe's."""
        for optimizer in self.each:
            groups = optimizer.state_dict()["param_groups"]
            weights = enumerate(optimizer.param_groups[0]["params"])
            own = {j: state[self.numbers[w]] for j, w in weights if self.numbers[w] in state}
            optimizer.load_state_dict({"state": own, "param_groups": groups})
