"""Give me batch number n: CIFAR-10 from its binary archive, or latents from a folder of .npy files.

    python data.py encode --images FOLDER --out DIR --vae NAME    latents of FOLDER/CLASS/IMAGE.jpg

Batch n is a pure function of (seed, n, micro-batch), every example comes once an epoch, and no
pickle is ever read. Images are in [-1, 1] for the network, latents as they are stored. Whoever has
other data writes a third child of `Dataset`. Read next: `train.py`, which calls it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import tarfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) of the examples in this epoch."""
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFF, epoch])
    return np.random.Generator(np.random.PCG64(sequence)).permutation(n)


class Dataset:
    """What the loop sees of a data set. A child sets the first four."""

    x0: np.ndarray  # (N,C,H,W)
    cond: list[np.ndarray]  # [labels (N,)], or [context (N,L,D), pooled (N,P)]
    train: np.ndarray  # the rows that are training examples
    held_out: np.ndarray  # those of the validation loss
    classes = 0  # of labels; 0 is text
    names: list[str] | None = None  # of the classes
    meta: dict | None = None  # of latents: what `decode` needs
    flip = False  # whether training may mirror x0

    def __len__(self) -> int:
        return len(self.train)

    def spec(self) -> dict:
        """What a network for these data is built from, in plain types, for the checkpoint."""
        context, pooled = (None, None) if self.classes else (list(c.shape[1:]) for c in self.cond)
        spec = dict(shape=list(self.x0.shape[1:]), classes=self.classes, names=self.names)
        return spec | dict(context=context, pooled=pooled, meta=self.meta)

    def gather(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        """(x0, *cond) on the CPU, as stored."""
        return tuple(torch.from_numpy(np.asarray(array[rows])) for array in (self.x0, *self.cond))

    def batch(
        self, seed: int, n: int, size: int, micro: int = 0, micros: int = 1
    ) -> tuple[Tensor, ...]:
        """(x0, *cond) of `size` examples, as stored: step n's micro-batch `micro` of `micros`.

        The steps walk along one permutation after the other: an epoch's last partial batch is
        filled from the next one.
        """
        start = (n * micros + micro) * size
        epoch, at = np.divmod(np.arange(start, start + size), len(self))
        epochs = np.unique(epoch).tolist()
        order = [permutation(len(self), seed, e)[at[epoch == e]] for e in epochs]
        return self.gather(self.train[np.concatenate(order)])

    def validation(self, n: int) -> tuple[Tensor, ...]:
        """The first n held-out examples, or all where there are fewer; text in float32."""
        x0, *cond = self.gather(self.held_out[:n])
        return x0, *(c.float() if c.is_floating_point() else c for c in cond)

    @staticmethod
    def to_float(x0: Tensor) -> Tensor:
        """x0 as stored -> what the network sees, in float32 on x0's own device."""
        return x0.float()


# --------------------------------------------------------------------------------------------------
# CIFAR-10

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE, MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
RECORDS, RECORD = 10_000, 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Cifar10(Dataset):
    """CIFAR-10, whole and as uint8, from a folder with the archive or its unpacked files.

    The five training files are for training, the test file is held out.
    """

    classes, names, flip = 10, NAMES, True

    def __init__(self, folder: str | File):
        folder = File(folder)
        archive = folder if folder.is_file() else folder / ARCHIVE
        places = (folder, folder / "cifar-10-batches-bin")
        unpacked = [place / name for place in places for name in FILES]
        files = {file.name: file.read_bytes() for file in unpacked if file.exists()}
        if not files and archive.exists():
            files = read_archive(archive)
        if not files:
            hint = f"train.py --download fetches {URL}"
            raise FileNotFoundError(f"no {ARCHIVE} and no {FILES[0]} in {folder}: {hint}")
        for name in FILES:
            if name not in files:
                raise FileNotFoundError(f"{name} is not among the CIFAR-10 files in {folder}")
            if len(files[name]) != RECORDS * RECORD:
                raise ValueError(
                    f"{name} in {folder} has {len(files[name])} bytes, not {RECORDS * RECORD} "
                    f"({RECORDS} records of {RECORD}): damaged, or another file"
                )
            label = max(files[name][::RECORD])
            if label > 9:
                raise ValueError(f"{name} in {folder} has a label {label}; good ones are 0 to 9")
        records = np.frombuffer(b"".join(files[name] for name in FILES), np.uint8)
        records = records.reshape(-1, RECORD)
        self.x0, self.cond = records[:, 1:].reshape(-1, 3, 32, 32), [records[:, 0].astype(np.int64)]
        self.train, self.held_out = np.split(np.arange(len(records)), [5 * RECORDS])

    @staticmethod
    def to_float(x0: Tensor) -> Tensor:
        """uint8 -> [-1, 1], both ends exactly."""
        return x0.float() / 127.5 - 1


def to_uint8(x0: Tensor) -> np.ndarray:
    """Images x0 (B,3,H,W) in [-1, 1] -> uint8 (B,H,W,3), rounded and clipped."""
    x = (x0.float() * 127.5 + 127.5).round().clamp(0, 255)
    return x.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def read_archive(path: File) -> dict[str, bytes]:
    """The contents of FILES, without unpacking to the disk. ValueError on any other archive."""
    raw, files = path.read_bytes(), {}
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 != MD5:
        raise ValueError(f"{path} has the MD5 {md5}, not {MD5}: remove it and fetch {URL} again")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            plain = member.isfile() or member.isdir()
            if not plain or name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{path}: the member {member.name!r} is a link or points outside")
            if name.name in FILES:
                files[name.name] = tar.extractfile(member).read()
    return files


def download(out: str | File) -> None:
    """Fetch the official archive into the folder, unless it is there already."""
    archive, part = File(out) / ARCHIVE, File(out) / f"{ARCHIVE}.part"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.exists():
        read_archive(archive)
        return
    try:
        with urllib.request.urlopen(URL, timeout=60) as response, part.open("wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(response, "read", total=length, desc=ARCHIVE) as stream:
                shutil.copyfileobj(stream, file)
        read_archive(part)
        part.replace(archive)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{URL} could not be fetched into {out}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Latents

FLOATS, INTEGERS = "float16 float32", "uint8 uint16 uint32 int8 int16 int32 int64"


def open_array(path: File, shape: str, dtypes: str) -> np.ndarray:
    """A memory-mapped .npy with as many axes as `shape` and one of the dtypes; ValueError, too,
    where it holds objects or is not of the length that its header says.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing (`python data.py encode` makes one)") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no array of numbers: {error}") from None
    if array.dtype.name not in dtypes.split() or not array.dtype.isnative:
        raise ValueError(
            f"{path} has the type {array.dtype.str}, not {' or '.join(dtypes.split())}"
        )
    if array.ndim != sum(map(str.isalpha, shape)):
        raise ValueError(f"{path} has the shape {array.shape}, not {shape}")
    size, whole = path.stat().st_size, array.offset + array.nbytes
    if size != whole:
        raise ValueError(f"{path} has {size} bytes, not {whole}: it is damaged")
    return array


def read_meta(path: File) -> tuple[dict, list[str] | None]:
    """({scaling, shift, vae}, class names) of a meta.json. Each of them may be left out."""
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
        scaling, shift = float(given.get("scaling", 1)), float(given.get("shift", 0))
        vae, names = given.get("vae"), given.get("classes")
        good = scaling > 0 and math.isfinite(scaling + shift) and isinstance(vae, str | None)
        good = good and isinstance(names, list | None)
        good = good and all(isinstance(name, str) for name in names or [])
    except (ValueError, TypeError):
        good = False
    if not good:
        like = '{"scaling": 1.5, "shift": 0.06, "vae": "NAME", "classes": ["cat", "dog"]}'
        raise ValueError(f"{path} is not a JSON object like {like}")
    return dict(scaling=scaling, shift=shift, vae=vae), names


class Latents(Dataset):
    """latents.npy (N,C,H,W) float16, memory-mapped; labels.npy (N,), or context.npy (N,L,D) and
    pooled.npy (N,P); meta.json {"scaling", "shift", "vae", "classes": [names]}.

    Latents are stored as the network sees them: (z - shift) scaling of the VAE's own z, which has
    about unit variance. Held out are the last min(1024, N/20) rows of a fixed permutation (of a
    folder sorted by class, the last rows would all be of the last class).
    """

    def __init__(self, folder: str | File):
        folder, self.cond = File(folder), []
        self.x0 = open_array(folder / "latents.npy", "(N,C,H,W)", "float16")
        self.meta, self.names = read_meta(folder / "meta.json")
        N = len(self.x0)
        if N < 2 or not self.x0.size:
            raise ValueError(f"{folder}/latents.npy is too small: its shape is {self.x0.shape}")
        text = any((folder / name).exists() for name in ("context.npy", "pooled.npy"))
        if text == (folder / "labels.npy").exists():
            raise ValueError(
                f"{folder} must hold labels.npy, or context.npy and pooled.npy, and not both: "
                f"{'both are' if text else 'neither is'} there"
            )
        kinds = {"labels.npy": ("(N,)", INTEGERS)}
        if text:
            kinds = {"context.npy": ("(N,L,D)", FLOATS), "pooled.npy": ("(N,P)", FLOATS)}
        for name, kind in kinds.items():
            array = open_array(folder / name, *kind)
            self.cond.append(array if text else array.astype(np.int64))
            if len(array) != N:
                raise ValueError(f"{folder}: latents.npy has {N} rows, {name} has {len(array)}")
        if not text:
            low, high = int(self.cond[0].min()), int(self.cond[0].max())
            self.classes = len(self.names) if self.names else high + 1
            if low < 0 or high >= self.classes:
                good = f"0 to {self.classes - 1} by the names" if self.names else "0 and above"
                raise ValueError(f"{folder}/labels.npy has labels {low} to {high}, not {good}")
        order = permutation(N, 0, 0)
        self.train, self.held_out = np.split(order, [N - max(1, min(1024, N // 20))])


# --------------------------------------------------------------------------------------------------
# Images to latents and back, with a VAE of the optional package diffusers


@functools.cache
def load_vae(name: str, device: str):
    """The AutoencoderKL in a folder, or on the hub as ORG/NAME or ORG/NAME/SUBFOLDER."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError(
            f"the VAE {name} needs the optional package diffusers: pip install diffusers"
        ) from None
    parts = [name] if File(name).is_dir() else name.split("/")
    where = {"subfolder": "/".join(parts[2:])} if parts[2:] else {}
    try:  # from safetensors, as the other format is pickle; the last flag silences a warning
        vae = AutoencoderKL.from_pretrained(
            "/".join(parts[:2]), **where, use_safetensors=True, low_cpu_mem_usage=False
        )
        return vae.to(device)
    except Exception as error:  # of many kinds: no network, no such name, damaged files, no device
        raise ValueError(f"the VAE {name} cannot be loaded: {str(error)[:200]}") from None


def load_image(path: File, size: int) -> np.ndarray:
    """The largest square in the middle, resized: uint8 (3,size,size)."""
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable image, replace it to go on: {error}") from None
    return np.asarray(square).transpose(2, 0, 1)


@torch.no_grad()
def encode(
    images: str | File, out: str | File, vae: str, size: int, batch_size: int, device: str
) -> None:
    """Images FOLDER/CLASS/*.jpg -> a folder for `Latents`; stopped, it goes on with the same call.

    Latents are the mean of the VAE's posterior (the paper is silent; a sample would not resume to
    the same file). They are appended to latents.npy.part, which gets its name when it is whole.
    """
    images, out, model = File(images), File(out), load_vae(vae, device)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if size % factor:
        raise ValueError(f"--size {size} is not a multiple of {factor}, the VAE's patch")
    kinds = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
    files = sorted(f for f in images.glob("[!.]*/[!.]*") if f.suffix.lower() in kinds)
    if len(files) < 2:
        raise ValueError(f"--images {images} must hold at least two images FOLDER/CLASS/IMAGE.jpg")
    classes, labels = np.unique([f.parent.name for f in files], return_inverse=True)
    listing = "\n".join(f"{f.parent.name}/{f.name}" for f in files)
    meta = {
        "scaling": model.config.scaling_factor,
        "shift": model.config.shift_factor or 0.0,
        "vae": vae,
        "images": f"{size} pixels, sha256 {hashlib.sha256(listing.encode()).hexdigest()}",
        "classes": classes.tolist(),
    }
    part, described = out / "latents.npy.part", out / "meta.json"
    if (out / "latents.npy").exists():
        raise ValueError(f"--out {out} holds latents already; another --out keeps them")
    if not part.exists():
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "labels.npy", labels)
        described.write_text(json.dumps(meta, indent=1), encoding="utf-8")
        part.touch()
    elif json.loads(described.read_text(encoding="utf-8")) != meta:
        raise ValueError(f"{part} is of other images, --size or --vae; remove it to start again")
    shape = (len(files), model.config.latent_channels, size // factor, size // factor)
    layout = {"descr": "<f2", "fortran_order": False, "shape": shape}
    with part.open("r+b") as file, ThreadPoolExecutor(8) as threads:
        np.lib.format.write_array_header_1_0(file, layout)
        start, row = file.tell(), 2 * math.prod(shape[1:])
        done = max(0, part.stat().st_size - start) // row // batch_size * batch_size
        file.truncate(file.seek(start + done * row))
        with tqdm(total=len(files), initial=done, desc=str(out), unit="image") as bar:
            for i in range(done, len(files), batch_size):
                batch = files[i : i + batch_size]
                x = np.stack(list(threads.map(load_image, batch, [size] * len(batch))))
                x = Cifar10.to_float(torch.from_numpy(x).to(device))
                z = (model.encode(x).latent_dist.mean - meta["shift"]) * meta["scaling"]
                file.write(z.half().cpu().numpy().tobytes())
                file.flush()
                bar.update(len(batch))
        os.fsync(file.fileno())
    part.replace(out / "latents.npy")


@torch.no_grad()
def decode(x0: Tensor, meta: dict, device: str) -> np.ndarray:
    """Latents x0 (B,C,H,W) -> uint8 (B,H,W,3). ValueError where their VAE is not to be had."""
    if not meta["vae"]:
        raise ValueError("the meta.json of these latents names no VAE")
    vae = load_vae(meta["vae"], device)
    if vae.config.latent_channels != x0.shape[1]:
        raise ValueError(f"the VAE {meta['vae']} takes {vae.config.latent_channels} channels")
    z = x0.to(device, torch.float32) / meta["scaling"] + meta["shift"]
    parts = z.split(max(1, 2**15 // z[0].numel()))  # the decoder's memory is large
    return np.concatenate([to_uint8(vae.decode(rows).sample) for rows in parts])


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with status 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextlib.contextmanager
    def one_line_errors(self):
        """Bad input (ValueError, OSError) ends the command in one line, not in a traceback."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(" ".join(str(error).split()))


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main() -> None:
    parser = Parser(description="Make a folder of latents.")
    commands = parser.add_subparsers(metavar="encode", required=True)
    code = commands.add_parser("encode", help="images FOLDER/CLASS/IMAGE.jpg to latents")
    code.add_argument("--images", required=True, help="a folder with a folder for each class")
    code.add_argument("--out", required=True, help="the folder of latents to write or go on with")
    code.add_argument(
        "--vae", required=True, help="a diffusers VAE: folder, or ORG/NAME[/SUBFOLDER]"
    )
    code.add_argument("--size", type=positive, default=256, help="pixels a side (default: 256)")
    code.add_argument(
        "--batch-size", type=positive, default=16, help="images at once (default: 16)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1 (default: {device})")
    args = vars(parser.parse_args())
    with parser.one_line_errors():
        encode(**args)


if __name__ == "__main__":
    main()
