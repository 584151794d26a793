"""From pictures to a folder of latents, which `--dataset latents` reads.

    python -m data.encode --images FOLDER --out DIR --vae NAME          FOLDER/CLASS/IMAGE.jpg
    python -m data.encode --images FOLDER --out DIR --text SD3_FOLDER   and their captions

If it was stopped, the same call goes on. Read next: `sd3/text.py`, the encoders of captions."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that is cut short

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from data.latents import LABELS, TEXTS, Meta, load_vae
from data.pictures import to_float
from rf import InputError
from sd3 import text as text_encoders
from training.folder import locked
from training.options import Count, command, misfit, pick, reading
from training.ranks import check_device, join, leave, meet, ranks

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


def load_image(path: File, size: int) -> np.ndarray:
    """The largest square in the middle, upright and resized: uint8 (3,size,size)."""
    with Image.open(path, formats=[*FORMATS.values()]) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


def unreadable(path: File, size: int) -> str | None:
    try:
        load_image(path, size)
    except Exception as error:  # Pillow's readers raise errors of many types
        return f"{path} ({str(error)[:100]})"


def find_images(images: File, captioned: bool) -> tuple[list[File], list[str]]:
    """FOLDER/CLASS/IMAGE.jpg with the classes; or FOLDER/[.../]IMAGE.jpg with the captions, from
    IMAGE.txt or the lines {"file_name", "text"} of FOLDER/metadata.jsonl."""
    found = {*images.glob("*/*"), *(images.rglob("*") if captioned else ())}
    hidden = lambda file: any(part[0] == "." for part in file.relative_to(images).parts)
    good = lambda file: file.suffix.lower() in FORMATS and file.is_file() and not hidden(file)
    files = sorted(filter(good, found))
    if len(files) < 2:
        raise InputError(f"--images {images} must hold at least two images FOLDER/CLASS/IMAGE.jpg")
    if not captioned:
        return files, [file.parent.name for file in files]
    table = images / "metadata.jsonl"
    with reading(table, "lines of file_name and text"):
        lines = table.read_text(encoding="utf-8-sig").split("\n") if table.exists() else []
        rows = [json.loads(line) for line in filter(str.strip, lines)]
        captions = {row["file_name"]: row["text"] for row in rows}
        if fault := misfit([*captions.values()], list[str]):
            raise InputError(f"the text {fault}")
        "".join(captions.values()).encode()  # an error where a lone surrogate is no text
    names = [str(file.relative_to(images)) for file in files]
    for name, file in zip(names, files, strict=True):
        caption_file = file.with_suffix(".txt")
        if caption_file.exists():
            with reading(caption_file, "text"):
                captions[name] = caption_file.read_text(encoding="utf-8-sig").strip()
        if name not in captions:
            raise InputError(f"{name} has no caption: no .txt beside it, no line in {table.name}")
    return files, [captions[name] for name in names]


@contextlib.contextmanager
def open_parts(out: File, shapes: dict[str, tuple], keys: np.ndarray):
    """(done (n,), write(i, arrays)) for float16 arrays (n, *shape), which several processes write
    together as NAME.npy.part. rows.part has the key of each row that all arrays hold whole: a row
    of another key, as its picture or caption was replaced, is not done."""
    n = len(keys)
    with contextlib.ExitStack() as stack:

        def part(name: str):
            (out / f"{name}.part").touch()
            return stack.enter_context((out / f"{name}.part").open("r+b"))

        files, present = [], n
        for name, shape in shapes.items():
            file, row = part(f"{name}.npy"), 2 * math.prod(shape)
            layout = {"descr": "<f2", "fortran_order": False, "shape": (n, *shape)}
            size = os.fstat(file.fileno()).st_size
            np.lib.format.write_array_header_1_0(file, layout)
            file.flush()
            files.append((file, file.tell(), row))
            present = min(present, max(0, size - file.tell()) // row)
        record = part("rows")

        def write(i: int, arrays: Sequence[Tensor]) -> None:
            for array, (file, start, row) in zip(arrays, files, strict=True):
                file.seek(start + i * row)
                file.write(array.half().cpu().numpy().tobytes())
                file.flush()
            record.seek(i * keys.itemsize)
            record.write(keys[i : i + len(arrays[0])].tobytes())
            record.flush()

        written = record.read()[: present * keys.itemsize].ljust(keys.nbytes, b"\0")
        yield np.frombuffer(written, keys.dtype) == keys, write
        for file, *_ in files:
            os.fsync(file.fileno())


def finish(out: File, shapes: dict[str, tuple], keys: np.ndarray) -> None:
    """Give the arrays their final names. ValueError where a row is missing."""
    with open_parts(out, shapes, keys) as (done, _):
        if not done.all():
            present = f"{done.sum()} of {len(done)} rows"
            raise InputError(f"{out} has {present}: a rank ended early; run it again")
    for name in reversed([*shapes]):  # the first one last: where it is, all are whole
        (out / f"{name}.npy.part").replace(out / f"{name}.npy")
    (out / "rows.part").unlink()


def begin(out: File, meta: dict, null: dict, labels: np.ndarray, names: Iterable[str]) -> None:
    """Write meta.json, and null.npz or the labels. Where `finish` was stopped, its arrays get their
    first names back. ValueError on a whole folder, or another's."""
    meta_file, record = out / "meta.json", out / "rows.part"  # the first file, and the last to go
    if not record.exists():
        ours = ("latents.npy", *LABELS, *TEXTS, "null.npz", meta_file.name)
        if taken := [name for name in ours if (out / name).exists()]:
            raise InputError(f"--out {out} holds {', '.join(taken)}; another --out keeps them")
        record.touch()
    if not ((out / "latents.npy.part").exists() or (out / "latents.npy").exists()):
        if null:
            np.savez(out / "null.npz", **{key: x[0].half().numpy() for key, x in null.items()})
        else:
            np.save(out / "labels.npy", labels)
        meta_file.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    with reading(meta_file, "meta.json"):
        if json.loads(meta_file.read_text(encoding="utf-8")) != meta:
            raise InputError("it is of other images, --size, --vae or --text; take another --out")
    for name in names:
        if (out / f"{name}.npy").exists():
            (out / f"{name}.npy").replace(out / f"{name}.npy.part")


def latents_of(model, images: np.ndarray, meta: dict, device: torch.device, bf16: bool) -> Tensor:
    """uint8 (B,3,H,W) -> the mean of the VAE's posterior, scaled as the network takes it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x = to_float(torch.from_numpy(images).to(device))
        z = model.encode(x).latent_dist.mean.float()
    return (z - meta["shift"]) * meta["scaling"]


def read_ahead(files: list[File], starts: list[int], batch_size: int, size: int) -> Iterator:
    """(i, uint8 (B,3,size,size)) for the batches that start at these i. Threads read the next batch
    while the caller works. ValueError names all pictures from i on that cannot be read."""
    with ThreadPoolExecutor(8) as threads:
        submit = lambda i: [threads.submit(load_image, f, size) for f in files[i : i + batch_size]]
        all_starts = [*starts, len(files)]  # the batch after the last one is empty
        coming = submit(all_starts[0])
        for i, next_start in zip(starts, all_starts[1:], strict=True):
            pictures, coming = coming, submit(next_start)
            try:
                x = np.stack([picture.result() for picture in pictures])
            except MemoryError:
                raise
            except Exception:
                bad = [*filter(None, threads.map(lambda file: unreadable(file, size), files[i:]))]
                what = f"{len(bad)} pictures cannot be read; replace them to go on"
                raise InputError(f"{what}: {', '.join(bad[:10])}") from None
            yield i, x


@torch.no_grad()
def encode(
    *,
    images: Annotated[str, "a folder with a folder of pictures for each class"],
    out: Annotated[str, "the folder of latents to write or go on with"],
    vae: Annotated[
        str | None, "a diffusers VAE: folder, ORG/NAME[/SUBFOLDER] (or TEXT/vae)"
    ] = None,
    text: Annotated[str | None, "encode captions, too, by the encoders of this SD3 folder"] = None,
    no_t5: Annotated[bool, "leave the largest of them out"] = False,
    size: Annotated[Count, "pixels a side", 1, 2**13] = 256,
    batch_size: Annotated[Count, "images at once", 1, 2**12] = 16,
    device: Annotated[str | None, "cpu, cuda, cuda:1 (default: cuda if there)"] = None,
) -> None:
    """A latent is the mean of the VAE's posterior, in bf16 on a GPU. (The paper is silent. With
    samples, a call that goes on would write others.)"""
    if not (vae or text):
        raise InputError("encode needs --vae, or --text of a folder that has one")
    rank, world = ranks()
    vae, out, device = vae or f"{text}/vae", File(out), device or str(check_device())
    model = load_vae(vae, device)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if size % factor:
        raise InputError(f"--size {size} is not a multiple of {factor}, the VAE's patch")
    files, texts = find_images(File(images), bool(text))  # classes or captions
    digest = lambda value: hashlib.sha256(json.dumps(value).encode())
    listing = digest([str(file.relative_to(images)) for file in files]).hexdigest()
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(File.stat, files)]
    keys = [digest(row).digest()[:8] for row in zip(stats, texts, strict=True)]
    keys = np.frombuffer(b"".join(keys), np.uint64)
    meta = dict(scaling=model.config.scaling_factor, shift=model.config.shift_factor or 0.0)
    with reading(vae, "VAE"):
        pick(Meta, meta)
    meta |= dict(vae=vae, images=f"{size} pixels, sha256 {listing}")
    shapes = {"latents": (model.config.latent_channels, size // factor, size // factor)}
    classes, labels = np.unique(texts, return_inverse=True)
    null: dict[str, Tensor] = {}  # the encoding of no text
    if text:
        encoder = text_encoders.load(text, not no_t5, device)
        null = dict(zip(("context", "pooled"), encoder([""]), strict=True))
        shapes |= {name: tuple(x.shape[1:]) for name, x in null.items()}
        meta |= dict(text=text, t5=not no_t5, t5_tokens=encoder.t5_tokens, parts=encoder.parts)
        meta["factor"] = factor
    else:
        meta["classes"] = classes.tolist()
    join(torch.device("cpu"))
    with locked(out) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            begin(out, meta, null, labels, shapes)
        meet()
        with open_parts(out, shapes, keys) as (done, write):
            starts = [*range(0, len(files), batch_size)][rank::world]
            todo = [i for i in starts if not done[i : i + batch_size].all()]
            place, before = torch.device(device), len(starts) - len(todo)
            with contextlib.closing(read_ahead(files, todo, batch_size, size)) as pictures:
                for i, x in tqdm(pictures, str(out), len(starts), initial=before, unit="batch"):
                    z = latents_of(model, x, meta, place, bf16=place.type == "cuda")
                    encoded = encoder(texts[i : i + batch_size]) if text else ()
                    write(i, [z, *encoded])
        meet()
        if rank == 0:
            finish(out, shapes, keys)


def main() -> None:
    command(encode, __doc__)
    leave()


if __name__ == "__main__":
    main()
