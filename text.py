"""SD3's frozen text encoders, CLIP-L, CLIP-G and T5, by the optional package transformers; and the
released model: its folder in diffusers' layout, its transformer under the released names.

The penultimate hidden states of both CLIPs stand side by side in channels, padded with zeros to
T5's width, and T5's tokens follow them; c_vec is both projected pooled vectors. T5 may be left out:
its tokens are zeros. Guidance pushes away from the encoding of "".
Time, here and everywhere: t = 0 is data, t = 1 is noise. Read next: `sample.py`."""

import json
import math
import re
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path as File

import torch
import torch.nn.functional as F
from torch import Tensor

from options import reading

CLIPS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
T5 = ("tokenizer_3", "text_encoder_3")


def open_folder(name: str, parts: Sequence[str]) -> File:
    """The folder of a released model; ORG/NAME is fetched from the hub, safetensors only.
    ValueError where one of these parts is missing."""
    folder = File(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            from huggingface_hub import snapshot_download

            kinds = ["*.json", "*.txt", "*.model", "*/*.safetensors"]
            folder = File(snapshot_download(name, allow_patterns=kinds))
        except Exception as error:  # of many kinds: no package, no network, no such name
            raise ValueError(f"{name} is no folder nor on the hub: {str(error)[:200]}") from None
    for part in parts:
        if not (folder / part).is_dir():
            hint = "; --no-t5 does without" if part in T5 else ""
            raise ValueError(f"{folder} is no folder of a released SD3: it has no {part}{hint}")
    return folder


def read_weights(path: File) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of all those in a folder. ValueError on others."""
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    full = [file for file in files if ".fp16." not in file.name]
    state: dict[str, Tensor] = {}
    for file in full or files:
        try:
            state |= load_file(file)
        except Exception as error:  # of the package's own kind
            raise ValueError(f"{file} is no safetensors file: {str(error)[:120]}") from None
    if not state:
        raise ValueError(f"{path} has no .safetensors file")
    return state


class Encoder:
    """prompts -> context (B,L,D), pooled (B,P), by frozen CLIP-L, CLIP-G and, unless left out, T5.

    `parts` are the three encoders' shares of both, which training drops by themselves."""

    def __init__(self, tokenizers: list, encoders: list, width: int, t5_tokens: int):
        self.tokenizers, self.encoders = tokenizers, encoders
        self.width, self.t5_tokens = width, t5_tokens  # of the context; of T5's part of it

    @property
    def parts(self) -> list:
        L, G = (encoder.config for encoder in self.encoders[:2])
        tokens = [0, self.tokenizers[0].model_max_length]
        split, end = L.hidden_size, L.hidden_size + G.hidden_size
        both = L.projection_dim + G.projection_dim
        return [
            [[0, tokens, [0, split]], [1, [0, L.projection_dim]]],
            [[0, tokens, [split, end]], [1, [L.projection_dim, both]]],
            [[0, [tokens[1], tokens[1] + self.t5_tokens]]],
        ][: len(self.encoders)]

    def _tokens(self, i: int, prompts: list[str], length: int) -> Tensor:
        how = dict(max_length=length, truncation=True, return_tensors="pt")
        ids = self.tokenizers[i](prompts, padding="max_length", **how).input_ids
        for prompt in prompts:
            number = len(self.tokenizers[i](prompt).input_ids)
            if number > length:
                cut = f"{prompt[:40]!r} has {number} tokens, and is cut to {length}"
                warnings.warn(f"encoder {i + 1}: {cut}, as the reference does", stacklevel=4)
        return ids.to(self.encoders[i].device)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Sixteen at a time: the CLIPs keep what all their layers say."""
        parts = [self._encode(prompts[i : i + 16]) for i in range(0, len(prompts), 16)]
        context, pooled = map(torch.cat, zip(*parts, strict=True))
        return context, pooled

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], []
        for i in range(2):
            ids = self._tokens(i, prompts, self.tokenizers[i].model_max_length)
            out = self.encoders[i](ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2].float().cpu())
            pooled.append(out.text_embeds.float().cpu())
        clip = torch.cat(hidden, dim=-1)  # (B,77,2048)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        t5 = torch.zeros(len(prompts), self.t5_tokens, self.width)
        if len(self.encoders) > 2:
            ids = self._tokens(2, prompts, self.t5_tokens)
            t5 = self.encoders[2](ids)[0].float().cpu()
        return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def load(
    folder: str | File, t5: bool = True, device: str = "cpu",
    t5_tokens: int = 256, width: int | None = None,
) -> Encoder:  # fmt: skip
    """The encoders of an SD3 folder, in bf16 on a GPU. t5_tokens is 256 in the released pipeline,
    77 in the paper; the width of the context is by default what the folder's transformer says.
    ValueError where the package or a part is missing."""
    folder = open_folder(str(folder), CLIPS + T5 * t5)
    try:
        import transformers
    except ImportError:
        message = "text encoders need the optional package transformers: pip install transformers"
        raise ValueError(message) from None
    kinds = ["CLIPTokenizer", "CLIPTokenizer", "T5TokenizerFast"][: 2 + t5]
    models = ["CLIPTextModelWithProjection"] * 2 + ["T5EncoderModel"] * t5
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    tokenizers, encoders = [], []
    for kind, model, suffix in zip(kinds, models, ("", "_2", "_3"), strict=False):
        try:
            tokenizer = getattr(transformers, kind).from_pretrained(folder / f"tokenizer{suffix}")
            place = folder / f"text_encoder{suffix}"
            encoder = getattr(transformers, model).from_pretrained(place, use_safetensors=True)
        except Exception as error:  # of many kinds: damaged or missing files
            raise ValueError(f"{folder}, encoder{suffix}: {str(error)[:200]}") from None
        tokenizers.append(tokenizer)
        encoders.append(encoder.to(dtype).eval().requires_grad_(False))
    size = sum(p.nbytes for encoder in encoders for p in encoder.parameters())
    hint = "; --no-t5 leaves the largest one out" if t5 else ""
    reserve("the text encoders", size, torch.device(device), hint)
    encoders = [encoder.to(device) for encoder in encoders]
    described = folder / "transformer/config.json"
    if not width:
        with reading(described, "configuration of an SD3"):
            width = int(json.loads(described.read_text(encoding="utf-8"))["joint_attention_dim"])
    return Encoder(tokenizers, encoders, width, t5_tokens)


def reserve(what: str, size: int, device: torch.device, hint: str = "") -> None:
    """Say how much memory these weights take. ValueError where a GPU has less left."""
    need, free = f"{what}: {size / 2**30:.1f} GB on {device}", math.inf
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if size > free:
        raise ValueError(f"{need}, which has {free / 2**30:.1f} GB left{hint}")
    print(need)


def latent_size(spec: dict, pixels: int) -> int:
    """The latent's side for pictures of this size. ValueError where it does not fit the model."""
    factor, network = (spec["meta"] or {}).get("factor"), spec.get("released")
    if not factor or not network:
        raise ValueError(f"--size {pixels}: only a released SD3 draws in other sizes")
    multiple, most = factor * network["patch_size"], network["pos_embed_max_size"]
    if pixels % multiple or pixels > multiple * most:
        good = f"a multiple of {multiple} up to {multiple * most}"
        raise ValueError(f"--size {pixels} is not {good}")
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
    """A transformer's weights under the released checkpoint's names, which are `MMDiT`'s. In
    diffusers' names q, k, v are apart, and the modulations of the final layer and of the last
    context block hold scale before shift. ValueError on another network's."""
    prefix = "model.diffusion_model."
    if f"{prefix}pos_embed" in state:  # the file may hold text encoders and the VAE, too
        return {k.removeprefix(prefix): w for k, w in state.items() if k.startswith(prefix)}
    if "pos_embed" in state:
        return state
    if "pos_embed.pos_embed" not in state:
        raise ValueError("these are not the weights of an SD3 transformer")
    renamed = {}
    for key, value in state.items():
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        renamed[key] = value
    depth = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("joint_blocks."))
    for i, (block, parts), kind in product(range(depth), QKV.items(), ("weight", "bias")):
        qkv = [renamed.pop(f"joint_blocks.{i}.attn.{part}.{kind}") for part in parts]
        renamed[f"joint_blocks.{i}.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
    turned = "final_layer", f"joint_blocks.{depth - 1}.context_block"
    for place, kind in product(turned, ("weight", "bias")):
        key = f"{place}.adaLN_modulation.1.{kind}"
        renamed[key] = torch.cat(renamed[key].chunk(2)[::-1])
    return renamed


def read_released(path: str) -> tuple[dict, dict[str, Tensor]]:
    """(spec, weights) of a released SD3: its folder, its name on the hub, or its transformer's file
    in that folder."""
    single = path.endswith(".safetensors")
    folder = File(path).parent if single else open_folder(path, (*CLIPS, "transformer", "vae"))
    folder = folder.parent if single and folder.name == "transformer" else folder
    weights = read_weights(File(path) if single else folder / "transformer")
    with reading(path, "transformer of an SD3"):
        state = released_names(weights)
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        context, pooled = (
            state[f"{name}.weight"].shape[1] for name in ("context_embedder", "y_embedder.mlp.0")
        )
        shape = dict(in_channels=channels, patch_size=patch)
        shape["qk_norm"] = any("ln_q" in key for key in state)
        shape["pos_embed_max_size"] = math.isqrt(state["pos_embed"].shape[1])
    described = folder / "vae/config.json"
    with reading(described, "configuration of an SD3"):
        vae = json.loads(described.read_text(encoding="utf-8"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        meta = dict(scaling=vae["scaling_factor"], shift=vae["shift_factor"], vae=f"{folder}/vae")
    meta |= dict(text=str(folder), t5_tokens=256, factor=factor)
    side = min(1024 // factor, patch * shape["pos_embed_max_size"])
    spec = dict(shape=[channels, side, side], classes=0, names=None, meta=meta)
    return spec | dict(context=[77 + 256, context], pooled=[pooled], released=shape), state
