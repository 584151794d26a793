"""Latents with labels or texts as the data of a run: a folder of .npy files from `data/encode.py`.

SD3 trains in the latents of a VAE with 16 channels (section 5.2). No pickle is read. A VAE of the
optional package diffusers turns latents back into pictures. Read next: `data/encode.py`."""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.base import Dataset, network_shape, permutation
from data.pictures import to_uint8
from rf import InputError
from sd3 import text as text_encoders
from training.options import Count, misfit, pick, reading

FLOATS, INTEGERS = "float16 float32", "uint8 uint16 uint32 int8 int16 int32 int64"
LABELS = {"labels.npy": ("(N,)", INTEGERS)}
TEXTS = {"context.npy": ("(N,L,D)", FLOATS), "pooled.npy": ("(N,P)", FLOATS)}


def open_array(path: File, shape: str, dtypes: str) -> np.ndarray:
    """A memory-mapped .npy. ValueError on other axes or types, on objects and a wrong length."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing (`python -m data.encode` makes one)")
    with reading(path, "array of numbers"):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.name not in dtypes.split() or not array.dtype.isnative:
        raise InputError(f"{path} has the type {array.dtype.str}, not one of {dtypes}")
    if array.ndim != sum(map(str.isalpha, shape)):
        raise InputError(f"{path} has the shape {array.shape}, not {shape}")
    size, expected = path.stat().st_size, array.offset + array.nbytes
    if size != expected:
        raise InputError(f"{path} has {size} bytes, not {expected}: it is damaged")
    return array


@dataclass
class Meta:
    """What `decode` and `Latents.encode` need of a meta.json, which may leave out any of it."""

    scaling: Annotated[float, "", 1e-9, 1e9] = 1.0
    shift: float = 0.0
    vae: str | None = None
    text: str | None = None  # the folder of the encoders
    t5: bool = True
    t5_tokens: Annotated[Count, "", 1, 10_000] = 256
    factor: Annotated[Count | None, "", 1, 1024] = None  # pixels a side for one of the latent


def read_meta(path: File) -> tuple[dict, list[str] | None, list | None]:
    """A meta.json: a `Meta` as a dict, the names of the classes, and `Data.parts`."""
    like = '{"scaling": 1.5, "shift": 0.06, "vae": "NAME", "classes": ["cat", "dog"]}'
    slices = lambda spans: [slice(int(start), int(stop)) for start, stop in spans]
    with reading(path, f"JSON object like {like}"):
        meta = dict(json.loads(path.read_text(encoding="utf-8")))
        names, parts = meta.get("classes"), meta.get("parts")
        if fault := misfit(names, list[str] | None):
            raise InputError(f"classes {fault}")
        parts = parts and [[(int(i), *slices(spans)) for i, *spans in part] for part in parts]
        return asdict(pick(Meta, meta)), names, parts


class Latents(Dataset):
    """latents.npy (N,C,H,W) float16, memory-mapped; labels.npy (N,), or context.npy (N,L,D),
    pooled.npy (N,P) and null.npz, the encoding of ""; meta.json {"scaling", "shift", "vae", ...}.
    Latents are stored as the network takes them: (z - shift) scaling has about unit variance. Of a
    fixed permutation min(1024, N/20) rows are held out, as a folder is sorted by class."""

    of_network: ClassVar = {"context", "pooled"}

    @dataclass
    class Spec(Dataset.Spec):
        context: list[Annotated[Count, "", 1, 2**16]] | None = None
        pooled: list[Annotated[Count, "", 1, 2**16]] | None = None
        meta: dict | None = None
        released: dict | None = None  # the shape of a released network
        parts: list | None = None  # `Data.parts`, each slice as [start, stop]

        def __post_init__(self):
            super().__post_init__()
            self.meta = self.meta and asdict(pick(Meta, self.meta))

    def __init__(self, options: Dataset.Options):
        if not options.data:
            raise InputError("--dataset latents needs --data DIR")
        folder, cond = File(options.data), []
        x0 = open_array(folder / "latents.npy", "(N,C,H,W)", "float16")
        meta, names, parts = read_meta(folder / "meta.json")
        N = len(x0)
        if N < 2 or not x0.size:
            raise InputError(f"{folder}/latents.npy is too small: its shape is {x0.shape}")
        text = any((folder / name).exists() for name in TEXTS)
        if text == (folder / "labels.npy").exists():
            what = "labels.npy, or context.npy and pooled.npy, and not both"
            raise InputError(f"{folder} must hold {what}: {'both' if text else 'neither'} there")
        for name, (shape, dtypes) in (TEXTS if text else LABELS).items():
            array = open_array(folder / name, shape, dtypes)
            cond.append(array if text else array.astype(np.int64))
            if len(array) != N:
                raise InputError(f"{folder}: latents.npy has {N} rows, {name} has {len(array)}")
        if not text:
            low, high = int(cond[0].min()), int(cond[0].max())
            if low < 0 or high >= (len(names) if names else 100_000):
                good = f"0 to {len(names) - 1} by the names" if names else "0 to 99,999"
                raise InputError(f"{folder}/labels.npy has labels {low} to {high}, not {good}")
        self.null, null_file = None, folder / "null.npz"
        if text and null_file.exists():
            with reading(null_file, "encoding of no text"), np.load(null_file) as arrays:
                null = [torch.as_tensor(arrays[name]).float() for name in ("context", "pooled")]
                if [x.shape for x in null] != [c.shape[1:] for c in cond]:
                    raise InputError("its shapes are not those of the texts")
            self.null = null
        held_out = max(1, min(1024, N // 20))
        super().__init__(x0, *cond, names=names, held_out=held_out, rows=permutation(N, 0, 0))
        self.meta, self.parts = meta, parts if text else None
        try:
            _ = [cond[i][(0, *slices)] for part in self.parts or () for i, *slices in part]
        except IndexError as error:
            fault = f"its parts are not of these texts: {error}"
            raise InputError(f"{folder}/meta.json: {fault}") from None

    def spec(self) -> dict:
        shapes = [list(c.shape[1:]) for c in self.cond] if len(self.cond) == 2 else [None, None]
        plain = lambda i, *slices: [i, *([s.start, s.stop] for s in slices)]
        parts = self.parts and [[plain(*entry) for entry in part] for part in self.parts]
        spec = dict(context=shapes[0], pooled=shapes[1], meta=self.meta, parts=parts)
        return super().spec() | spec

    @classmethod
    def arguments(cls, spec):
        if not spec["context"]:
            return super().arguments(spec)
        shape = network_shape(spec["shape"], **(spec["released"] or {}))
        return shape | dict(context_dim=spec["context"][-1], pooled_dim=spec["pooled"][-1])

    @classmethod
    def network(cls, spec, recipe):
        """Ours learns with zeros for no text; a released one with the encoding of no text, which
        `encode` and `empty` know."""
        network = super().network(spec, recipe)
        if spec["context"]:
            zeros = torch.zeros(spec["context"]), torch.zeros(spec["pooled"])
            network.null_cond = () if spec["released"] else zeros
        return network

    def empty(self, spec):
        if spec["released"]:
            return self.null or [torch.zeros(spec[key]) for key in ("context", "pooled")]

    @classmethod
    def agreed(cls, spec, known, origin, agree):
        """The shape of a released network joins it; this network takes any size and length."""
        spec = spec | {"released": known.get("released")}
        free = {"shape", "context"} if spec["released"] and agree != "all" else set()
        super().agreed(spec | {key: known[key] for key in free}, known, origin, agree)
        return spec

    @classmethod
    def encode(cls, spec, prompts, device="cpu", t5=True):
        """The encoders are those that meta.json names; they are freed before the network runs."""
        meta = spec["meta"] or {}
        if not meta.get("text"):
            return super().encode(spec, prompts)
        t5, width = t5 and meta.get("t5", True), spec["context"][-1]
        encoder = text_encoders.load(meta["text"], t5, device, meta["t5_tokens"], width)
        context, pooled = encoder([*prompts, ""])
        if pooled.shape[1:] != tuple(spec["pooled"]):
            fault = f"its CLIPs give {pooled.shape[1]} numbers, the model takes {spec['pooled'][0]}"
            raise InputError(f"{meta['text']}: {fault}")
        null = [context[-1], pooled[-1]] if spec["released"] else None  # ours learn with zeros
        return [context[:-1], pooled[:-1]], null

    @classmethod
    def conditions(cls, spec, n, label=None, data=None, generator=None):
        """Labels; or the texts held out in the folder `data`, or zeros without a folder."""
        if not spec["context"] or label is not None:
            return super().conditions(spec, n, label)
        if not data and (spec["meta"] or {}).get("text"):
            raise InputError("this model draws what a --prompt says: give it one")
        if not data:
            return [torch.zeros(n, *spec[key]) for key in ("context", "pooled")]
        texts = cls(cls.Options(data=data))
        if any(texts.spec()[key] != spec[key] for key in ("context", "pooled")):
            raise InputError(f"--data {data} does not hold texts of this model's shapes")
        return [c[torch.arange(n) % len(c)] for c in texts.held_out(n)[1:]]

    @classmethod
    def images(cls, spec, x0, device="cpu"):
        try:
            return decode(x0, spec["meta"] or asdict(Meta()), str(device))
        except InputError as error:
            print(f"not decoded: {error}")
            return None


# ---- Latents to pictures, with a VAE of the optional package diffusers
@functools.cache
def load_vae(name: str, device: str):
    """The AutoencoderKL in a folder, or on the hub as ORG/NAME or ORG/NAME/SUBFOLDER."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        message = f"the VAE {name} needs the optional package diffusers: pip install diffusers"
        raise InputError(message) from None
    words = [name] if File(name).is_dir() else name.split("/")
    place, subfolder = "/".join(words[:2]), "/".join(words[2:]) or None
    try:
        quiet = dict(use_safetensors=True, low_cpu_mem_usage=False)  # no pickle; no warning
        return AutoencoderKL.from_pretrained(place, subfolder=subfolder, **quiet).to(device)
    except Exception as error:  # no network, no such name, damaged files, no device, ...
        raise InputError(f"the VAE {name} cannot be loaded: {str(error)[:200]}") from None


@torch.no_grad()
def decode(x0: Tensor, meta: dict, device: str) -> np.ndarray:
    """Latents x0 (B,C,H,W) -> uint8 (B,H,W,3). ValueError where their VAE cannot be had."""
    if not meta["vae"]:
        raise InputError("the meta.json of these latents names no VAE")
    vae = load_vae(meta["vae"], device)
    if vae.config.latent_channels != x0.shape[1]:
        raise InputError(f"the VAE {meta['vae']} takes {vae.config.latent_channels} channels")
    z = x0.to(device, torch.float32) / meta["scaling"] + meta["shift"]
    parts = z.split(max(1, 2**15 // z[0].numel()))  # the decoder's memory is large
    return np.concatenate([to_uint8(vae.decode(rows).sample) for rows in parts])
