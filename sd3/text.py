"""SD3's frozen text encoders (section 4, appendix B.3): CLIP-L, CLIP-G and T5, by transformers.

c_ctxt has the penultimate hidden states of both CLIPs, joined in channels and padded with zeros to
T5's width; T5's tokens, or zeros, follow. c_vec has the projected pooled vectors of both CLIPs.
Guidance pushes away from the encoding of "". Read next: `sd3/weights.py`, the released network."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File

import torch
import torch.nn.functional as F
from torch import Tensor

from rf import InputError
from training.options import reading
from training.ranks import check_memory

CLIPS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
T5 = ("tokenizer_3", "text_encoder_3")
say_once = functools.cache(print)  # a line of a text, however many prompts it is true of


def open_folder(name: str, parts: Sequence[str]) -> File:
    """A folder, or ORG/NAME of the hub (no pickles). ValueError where it lacks one of the parts."""
    folder = File(name)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors"]
            folder = File(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # no package, no network, no such name, ...
            raise InputError(f"{name} is no folder nor on the hub: {str(error)[:200]}") from None
    for part in parts:
        if not (folder / part).is_dir():
            hint = "; --no-t5 does without" if part in T5 else ""
            raise InputError(f"{folder} is no folder of a released SD3: it has no {part}{hint}")
    return folder


@dataclass
class Encoder:
    """prompts -> context (B,L,D), pooled (B,P), by frozen CLIP-L, CLIP-G and, perhaps, T5."""

    tokenizers: list
    encoders: list
    width: int  # D
    t5_tokens: int  # the last ones of L

    @property
    def parts(self) -> list:
        """What each encoder gives: [0 (context) or 1 (pooled), *spans of its axes]."""
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
        tokenizer = self.tokenizers[i]
        padded = dict(padding="max_length", max_length=length, return_tensors="pt")
        tokens = tokenizer(prompts, truncation=True, **padded)
        if any(len(ids) > length for ids in tokenizer(prompts, verbose=False).input_ids):
            say_once(f"longer prompts are cut to {length} tokens, as the reference does")
        return tokens.input_ids.to(self.encoders[i].device)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Sixteen prompts at a time, as the CLIPs return the states of all their layers."""
        try:
            "".join(prompts).encode()
        except UnicodeEncodeError as error:  # a lone surrogate
            raise InputError(f"a prompt is no text: {error}") from None
        parts = [self._encode(prompts[i : i + 16]) for i in range(0, len(prompts), 16)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], []
        for i in range(2):
            ids = self._tokens(i, prompts, self.tokenizers[i].model_max_length)
            out = self.encoders[i](ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2].float().cpu())
            pooled.append(out.text_embeds.float().cpu())
        clip = torch.cat(hidden, dim=-1)  # (B,77,2048)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))  # (B,77,4096)
        t5 = torch.zeros(len(prompts), self.t5_tokens, self.width)  # (B,256,4096)
        if len(self.encoders) > 2:
            ids = self._tokens(2, prompts, self.t5_tokens)
            t5 = self.encoders[2](ids)[0].float().cpu()
        return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def load(folder: str | File, t5=True, device="cpu", t5_tokens=256, width=0) -> Encoder:
    """The encoders of an SD3 folder, in bf16 on a GPU. t5_tokens is 256 in the released pipeline
    and 77 in the paper; `width` is by default the transformer's. ValueError without a part."""
    folder = open_folder(str(folder), CLIPS + T5 if t5 else CLIPS)
    try:
        import transformers
    except ImportError:
        message = "text encoders need the optional package transformers: pip install transformers"
        raise InputError(message) from None
    transformers.logging.disable_progress_bar()  # bad input ends in one line
    clip = "CLIPTokenizer", "CLIPTextModelWithProjection"
    classes = {"": clip, "_2": clip}  # by the suffix of the folders
    if t5:
        classes["_3"] = "T5TokenizerFast", "T5EncoderModel"
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    tokenizers, encoders = [], []
    for suffix, names in classes.items():
        place = folder / f"text_encoder{suffix}"
        try:
            tokenizer_class, encoder_class = (getattr(transformers, name) for name in names)
            tokenizers.append(tokenizer_class.from_pretrained(folder / f"tokenizer{suffix}"))
            encoder = encoder_class.from_pretrained(place, use_safetensors=True)
        except Exception as error:  # damaged or missing files, ...
            raise InputError(f"{folder}, encoder{suffix}: {str(error)[:200]}") from None
        encoders.append(encoder.to(dtype).eval().requires_grad_(False))
    size = sum(p.nbytes for encoder in encoders for p in encoder.parameters())
    hint = "; --no-t5 leaves the largest one out" if t5 else ""
    check_memory("the text encoders", size, torch.device(device), hint)
    encoders = [encoder.to(device) for encoder in encoders]
    file = folder / "transformer/config.json"
    if not width:
        with reading(file, "configuration of an SD3"):
            width = int(json.loads(file.read_text(encoding="utf-8"))["joint_attention_dim"])
    configs = [encoder.config for encoder in encoders]
    widths = [config.hidden_size for config in configs]
    if sum(widths[:2]) > width or widths[2:] not in ([], [width]):
        raise InputError(f"{folder}: encoders of the widths {widths} do not fit {width}")
    lengths = {tokenizer.model_max_length for tokenizer in tokenizers[:2]}
    lengths |= {config.max_position_embeddings for config in configs[:2]}
    if len(lengths) > 1:
        raise InputError(f"{folder}: its CLIPs and their tokenizers take {lengths} tokens")
    for tokenizer, config in zip(tokenizers, configs, strict=True):
        if (last := max(tokenizer.get_vocab().values())) >= config.vocab_size:
            what = f"a tokenizer has the id {last}, its encoder {config.vocab_size} of them"
            raise InputError(f"{folder}: {what}")
    return Encoder(tokenizers, encoders, width, t5_tokens)
