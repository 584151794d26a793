"""One run on the ranks of torchrun, each with its own rows of a step.

Every rank has the whole network, and gradients are averaged (DDP); or, with --shard, its share of
all weights, gradients, moments and averages (FSDP2), and a block's weights come together only while
it computes. Both learn the same from the same draws and leave the same checkpoint."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from mmdit import JointBlock, MMDiT
from options import ranks


def check_device(name: str | torch.device | None = None) -> torch.device:
    """The device, or by default a GPU where there is one; each rank of torchrun has its own.
    ValueError where it is not there."""
    if torch.cuda.is_available() and name in (None, "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device).item()  # meta has no values
    except Exception as error:  # of many kinds: hpu lacks a module
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        good = ", ".join(["cpu"] + [kind for kind, there in kinds.items() if there])
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"device {name!r} is not there ({reason}); choose from {good}") from None
    return device


def join(device: torch.device) -> None:
    """Make a group with the other ranks, if there are any."""
    torch.backends.cuda.matmul.allow_tf32 = True
    if ranks()[1] == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # an hour, as the others wait while rank 0 evaluates, draws and saves
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))


def meet() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def replicated(model: nn.Module) -> nn.Module:
    """The model, whole on each rank; or as it is where ranks share it, or where there is one."""
    if not dist.is_initialized() or is_sharded(model):
        return model
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def add_up(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass adds up the gradients of all ranks: a step's last one does. Of
    shared weights each one does, as a rank would have to hold whole gradients between them."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now


# ---- A share of every weight on each rank
def is_share(x: object) -> bool:
    """Whether x is a DTensor, told by an attribute: its class would take long to import."""
    return hasattr(x, "full_tensor")


def is_sharded(network: nn.Module) -> bool:
    return is_share(next(network.parameters(), None))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Networks that are built here have the shapes of their weights only; buffers are real."""
    meta = lambda module, name, w: w if w is None else nn.Parameter(w.to("meta"), w.requires_grad)
    hook = register_module_parameter_registration_hook(meta)
    try:
        yield
    finally:
        hook.remove()


def sharded(
    build: Callable[[], nn.Module], device: torch.device, bf16: bool, start: nn.Module | None = None
) -> nn.Module:
    """The network of build(), shared over all ranks, with the weights of `start` or, drawn layer by
    layer, those that build() would have drawn: no rank ever holds the whole.
    In bf16 a block's weights are rounded before they travel, which halves the traffic. The rest is
    autocast's, as without --shard: FSDP's own mixed precision would keep the residual stream, too,
    in bf16."""
    if ranks()[1] == 1:
        raise ValueError("--shard is for several ranks: torchrun --nproc_per_node N train.py ...")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # of torch 2.6 and newer

    policy = MixedPrecisionPolicy(
        torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False
    )
    with on_meta():
        network = build()
    for module in network.modules():
        if isinstance(module, JointBlock):
            fully_shard(module, mp_policy=policy)
    fully_shard(network, reshard_after_forward=True)
    network._apply(lambda w: torch.empty_like(w, device=device) if w.is_meta else w.to(device))
    if start is None:
        initialize(network)
    else:
        network.load_state_dict(start.state_dict())
    return network


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draw what the constructor draws, in its order: a layer's own start, children first, then an
    MM-DiT's."""
    for child in module.children():
        initialize(child)
    if hasattr(module, "reset_parameters"):
        fill(module, module.reset_parameters)
    if isinstance(module, MMDiT):
        for name, layer in module.named_modules():
            fill(layer, partial(module.initialize_layer, name, layer))


def fill(layer: nn.Module, start: Callable[[], None]) -> None:
    """start() on the whole weights of one layer, of which each rank then keeps its share."""
    shares = dict(layer.named_parameters(recurse=False))
    for name, w in shares.items():
        layer._parameters[name] = nn.Parameter(whole(w).cpu())
    start()
    for name, w in shares.items():
        w.copy_(share(layer._parameters[name], w))
        layer._parameters[name] = w


def share(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, split as the other is, without asking other ranks."""
    if not is_share(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def whole(shared: Tensor) -> Tensor:
    """The whole of a tensor, which all ranks ask for together."""
    return shared.full_tensor() if is_share(shared) else shared


def gathered(state: dict) -> dict:
    """A state dict with whole tensors, on the CPU of rank 0; the others lend their shares to it."""
    kept = lambda tensor: tensor.cpu() if ranks()[0] == 0 else None
    return tree_map(lambda x: kept(whole(x)) if is_share(x) else x, state)
