"""SD3's released weights: a folder in diffusers' layout, or one file, as `mmdit.MMDiT` takes it.
Read next: `sample.py`, which draws with them."""

import json
import math
from itertools import product
from pathlib import Path as File

import torch
from torch import Tensor

from mmdit import HEAD_DIM
from rf import InputError
from sd3.text import CLIPS, open_folder
from training.options import misfit, reading


def read_weights(path: File) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    full = [file for file in files if ".fp16." not in file.name]
    state: dict[str, Tensor] = {}
    for file in full or files:
        with reading(file, "safetensors file"):
            state |= load_file(file)
    if not state:
        raise InputError(f"{path} has no .safetensors file")
    return state


def latent_size(spec: dict, pixels: int) -> int:
    """The latent's side for pictures of this size. ValueError where it does not fit the model."""
    factor, network = (spec.get("meta") or {}).get("factor"), spec.get("released")
    if not factor or not network:
        raise InputError(f"--size {pixels}: only a released SD3 draws in other sizes")
    patch = factor * network["patch_size"]  # in pixels
    limit = patch * network["pos_embed_max_size"]
    if pixels % patch or pixels > limit:
        raise InputError(f"--size {pixels} is not a multiple of {patch} up to {limit}")
    return pixels // factor


# ---- The released transformer
RENAMED = {  # diffusers' names, but for q, k, v
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "transformer_blocks.": "joint_blocks.",
    ".norm1.linear": ".x_block.adaLN_modulation.1",
    ".norm1_context.linear": ".context_block.adaLN_modulation.1",
    ".attn.norm_q": ".x_block.attn.ln_q",
    ".attn.norm_k": ".x_block.attn.ln_k",
    ".attn.norm_added_q": ".context_block.attn.ln_q",
    ".attn.norm_added_k": ".context_block.attn.ln_k",
    ".attn.to_out.0": ".x_block.attn.proj",
    ".attn.to_add_out": ".context_block.attn.proj",
    ".ff.net.0.proj": ".x_block.mlp.fc1",
    ".ff.net.2": ".x_block.mlp.fc2",
    ".ff_context.net.0.proj": ".context_block.mlp.fc1",
    ".ff_context.net.2": ".context_block.mlp.fc2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
QKV = {"x_block": ("to_q", "to_k", "to_v"), "context_block": [f"add_{x}_proj" for x in "qkv"]}


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the released names, which are `MMDiT`'s. diffusers has q, k, v apart, and
    scale before shift in the last modulations. ValueError on another network's."""
    prefix = "model.diffusion_model."
    if f"{prefix}pos_embed" in state:  # the file may hold text encoders and the VAE, too
        return {k.removeprefix(prefix): w for k, w in state.items() if k.startswith(prefix)}
    if "pos_embed" in state:
        return state
    if "pos_embed.pos_embed" not in state:
        raise InputError("these are not the weights of an SD3 transformer")
    renamed = {}
    for key, value in state.items():
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        renamed[key] = value
    depth = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("joint_blocks."))
    for i, (block, parts), tensor in product(range(depth), QKV.items(), ("weight", "bias")):
        qkv = [renamed.pop(f"joint_blocks.{i}.attn.{part}.{tensor}") for part in parts]
        renamed[f"joint_blocks.{i}.{block}.attn.qkv.{tensor}"] = torch.cat(qkv)
    scale_first = "final_layer", f"joint_blocks.{depth - 1}.context_block"
    for layer, tensor in product(scale_first, ("weight", "bias")):
        key = f"{layer}.adaLN_modulation.1.{tensor}"
        renamed[key] = torch.cat(renamed[key].chunk(2)[::-1])
    return renamed


def read_released(path: str) -> tuple[dict, dict[str, Tensor]]:
    """(spec, weights) of a released SD3: its folder, its hub name, or its transformer's file."""
    single = path.endswith(".safetensors")
    folder = File(path).parent if single else open_folder(path, (*CLIPS, "transformer", "vae"))
    folder = folder.parent if single and folder.name == "transformer" else folder
    weights = read_weights(File(path) if single else folder / "transformer")
    with reading(path, "transformer of an SD3"):
        state = released_names(weights)
        for key, w in state.items():
            if not (w.is_floating_point() and w.float().isfinite().all()):
                raise ValueError(f"{key} holds {w.dtype}, or what is not finite")
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        bias = tuple(state["x_embedder.proj.bias"].shape)
        if bias != (width,) or width < HEAD_DIM:
            raise ValueError(f"x_embedder.proj is {width} wide, and its bias has the shape {bias}")
        inputs = lambda layer: state[f"{layer}.weight"].shape[1]
        context, pooled = inputs("context_embedder"), inputs("y_embedder.mlp.0")
        table = math.isqrt(state["pos_embed"].shape[1])
        shape = dict(in_channels=channels, patch_size=patch, pos_embed_max_size=table)
        shape["qk_norm"] = any("ln_q" in key for key in state)
    file = folder / "vae/config.json"
    with reading(file, "configuration of an SD3"):
        vae = json.loads(file.read_text(encoding="utf-8"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        for key, low in (("scaling_factor", 1e-9), ("shift_factor", -1e9)):
            if fault := misfit(vae[key], float, low, 1e9):
                raise ValueError(f"{key} {fault}")
        meta = dict(scaling=vae["scaling_factor"], shift=vae["shift_factor"], vae=f"{folder}/vae")
    meta |= dict(text=str(folder), t5_tokens=256, factor=factor)
    side = min(1024 // factor, patch * table)
    spec = dict(shape=[channels, side, side], classes=0, names=None, meta=meta)
    return spec | dict(context=[77 + 256, context], pooled=[pooled], released=shape), state
