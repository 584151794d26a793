"""One run on the ranks of torchrun, each with other rows of a step; and the device of a rank.

Every rank has the whole network, and gradients are averaged (DDP). With --shard it has a share of
weights, gradients, moments and averages (FSDP2). Both learn the same and leave the same checkpoint.
Read next: `data/base.py`, what a run learns, or `train.py`, which calls all of this."""

import math
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from mmdit import MMDiT
from rf import InputError


def ranks() -> tuple[int, int]:
    """(rank, number of ranks), which torchrun sets. ValueError on what makes no sense."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if not (rank or world):
        rank, world = "0", "1"
    if not (str(rank).isdecimal() and str(world).isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK {rank} of WORLD_SIZE {world}: torchrun sets both")
    return int(rank), int(world)


def check_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name; by default a GPU, another one for each rank. Else ValueError."""
    if torch.cuda.is_available() and name in (None, "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device).item()  # meta has no values
    except Exception as error:  # of many types: hpu lacks a module
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        good = ", ".join(["cpu", *(name for name in present if present[name])])
        reason = str(error).partition("\n")[0][:80]
        raise InputError(f"device {name!r} is not there ({reason}); choose from {good}") from None
    return device


def check_memory(owner: str, size: int, device: torch.device, hint: str = "") -> None:
    """Print how many bytes these weights take. ValueError where a GPU has less left."""
    need = f"{owner}: {size / 2**30:.1f} GB on {device}"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if size > free:
        raise InputError(f"{need}, which has {free / 2**30:.1f} GB left{hint}")
    print(need)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """For the network alone: coefficients of t, targets and the loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def join(device: torch.device) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    if ranks()[1] == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(hours=1)  # the others wait while rank 0 evaluates, draws and saves
    dist.init_process_group(backend, timeout=timeout)


def agree(values: dict) -> None:
    """InputError where another rank was started with other values: each would learn something else,
    or wait for a step that never comes."""
    if not dist.is_initialized():
        return
    given = [values] * ranks()[1]
    dist.all_gather_object(given, values)
    if differ := [key for key in values if any(rank[key] != values[key] for rank in given)]:
        raise InputError(f"the ranks were started with different {', '.join(differ)}")


def meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def replicated(model: nn.Module) -> nn.Module:
    """The model, whole on each rank (DDP). It stays as it is if it is sharded, or on one rank."""
    if not dist.is_initialized() or is_sharded(model):
        return model
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def add_up(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass adds up the gradients of all ranks. With --shard all do."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of the MM-DiT, or DiT, that it is or holds. Another network has none."""
    return [b for part in network.modules() if isinstance(part, MMDiT) for b in part.joint_blocks]


def compile_blocks(network: nn.Module) -> None:
    """In place, by blocks, which share one compiled code: a deep network starts in seconds."""
    for module in blocks_of(network) or [network]:
        module.compile()


# ---- A share of every weight on each rank
def is_share(x: object) -> bool:
    """Whether x is a DTensor, by an attribute: its class takes long to import."""
    return hasattr(x, "full_tensor")


def is_sharded(network: nn.Module) -> bool:
    return is_share(next(network.parameters(), None))


def sharded(build: Callable, device: torch.device, bf16: bool, start=None) -> nn.Module:
    """The network of build(), shared over all ranks, with the weights of `start` or its own. Drawn
    layer by layer no rank ever holds the whole; where that would not be all, each builds it whole
    first. In bf16 a block's weights are rounded before they travel. The rest is autocast's: FSDP's
    would keep the residual stream, too, in bf16."""
    if ranks()[1] == 1:
        raise InputError("--shard is for several ranks: torchrun --nproc_per_node N train.py ...")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # of torch 2.6 and newer

    dtype = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # it is built with weights that have a shape and no values; buffers are real
    meta = lambda module, name, w: w if w is None else nn.Parameter(w.to("meta"), w.requires_grad)
    with torch.random.fork_rng([]), register_module_parameter_registration_hook(meta):
        network = build()
    by_layers = all(map(drawn_by_layers, network.modules()))
    if start is None and not by_layers:
        network = build()
    for block in blocks_of(network):
        fully_shard(block, mp_policy=policy)
    fully_shard(network, reshard_after_forward=True)
    network._apply(lambda w: torch.empty_like(w, device=device) if w.is_meta else w.to(device))
    if start is not None:
        network.load_state_dict(start.state_dict())
    elif by_layers:
        initialize(network)
    return network


def drawn_by_layers(module: nn.Module) -> bool:
    """Whether `initialize` draws all that the constructor does: another class may set a weight to
    zero, or have weights of its own. A subclass does not inherit the answer."""
    ours = type(module).__module__.partition(".")[0] in ("torch", "mmdit", "toy2d")
    return ours or "drawn_by_layers" in vars(type(module))


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Draw what the constructor draws, in its order: children first, an MM-DiT's start last."""
    for child in module.children():
        initialize(child)
    if hasattr(module, "reset_parameters"):
        fill(module, module.reset_parameters)
    if isinstance(module, MMDiT):
        for name, layer in module.named_modules():
            fill(layer, partial(module.initialize_layer, name, layer))


def fill(layer: nn.Module, start: Callable[[], None]) -> None:
    """Call start() with the whole weights of one layer; then each rank keeps its share of them."""
    shares = dict(layer.named_parameters(recurse=False))
    for name, w in shares.items():
        layer._parameters[name] = nn.Parameter(whole(w).cpu())
    start()
    for name, w in shares.items():
        w.copy_(share(layer._parameters[name], w))
        layer._parameters[name] = w


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, split like the other one, without asking other ranks."""
    if not is_share(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. All ranks call it together."""
    return tensor.full_tensor() if is_share(tensor) else tensor


def gathered(state: dict) -> dict:
    """A state dict with whole tensors, on the CPU of rank 0. All ranks call it together."""
    on_rank_0 = lambda tensor: tensor.cpu() if ranks()[0] == 0 else None
    return tree_map(lambda x: on_rank_0(whole(x)) if is_share(x) else x, state)
