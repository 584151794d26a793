"""CIFAR-10 as the data of a run, from its binary archive: no pickle is read.

    python train.py --dataset cifar10 --data DIR --download --compile

Read next: `data/latents.py`."""

import hashlib
import http.client
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path as File
from typing import Annotated

import numpy as np
import torch

from data.base import Dataset
from data.pictures import to_float
from rf import InputError
from training.ranks import ranks

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE, MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
RECORDS, RECORD = 10_000, 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Cifar10(Dataset):
    """A folder with the archive or its unpacked files. The test file is held out."""

    @dataclass
    class Options(Dataset.Options):
        download: Annotated[bool, "cifar10: fetch the archive into --data first"] = False

    def __init__(self, options: Options):
        if not options.data:
            raise InputError("--dataset cifar10 needs --data DIR")
        if options.download:
            download(options.data)
        folder = File(options.data)
        archive = folder if folder.is_file() else folder / ARCHIVE
        folders = (folder, folder / "cifar-10-batches-bin")
        unpacked = [place / name for place in folders for name in FILES]
        files = {file.name: file.read_bytes() for file in unpacked if file.exists()}
        if not files and archive.exists():
            files = read_archive(archive)
        if not files:
            raise FileNotFoundError(f"no {ARCHIVE} and no {FILES[0]} in {folder}: try --download")
        for name in FILES:
            if name not in files:
                raise FileNotFoundError(f"{name} is not among the CIFAR-10 files in {folder}")
            if len(files[name]) != RECORDS * RECORD:
                size = f"{len(files[name])} bytes, not {RECORDS * RECORD}"
                raise InputError(f"{name} in {folder} has {size}: damaged, or another file")
            label = max(files[name][::RECORD])
            if label > 9:
                raise InputError(f"{name} in {folder} has a label {label}; good ones are 0 to 9")
        raw = b"".join(files[name] for name in FILES)
        labels, pixels = np.split(np.frombuffer(raw, np.uint8).reshape(-1, RECORD), [1], axis=1)
        x0, labels = pixels.reshape(-1, 3, 32, 32), labels[:, 0].astype(np.int64)
        super().__init__(x0, labels, names=NAMES, held_out=RECORDS)

    @staticmethod
    def prepare(x0, generator=None):
        """uint8 -> [-1, 1], both ends exactly. Training mirrors half of the pictures."""
        x0 = to_float(x0)
        if generator is None:
            return x0
        u = torch.rand(len(x0), 1, 1, 1, generator=generator, device=x0.device)
        return torch.where(u < 0.5, x0.flip(3), x0)


def read_archive(path: File) -> dict[str, bytes]:
    """The contents of FILES; nothing is unpacked to the disk. ValueError on any other archive."""
    raw, files = path.read_bytes(), {}
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 != MD5:
        raise InputError(f"{path} has the MD5 {md5}, not {MD5}: remove it and fetch {URL} again")
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as tar:
        for member in tar:
            if (name := File(member.name).name) in FILES:
                files[name] = tar.extractfile(member).read()
    return files


def download(out: str | File) -> None:
    if ranks()[1] > 1:
        raise InputError("--download needs a single process: fetch the archive before torchrun")
    archive = File(out) / ARCHIVE
    archive.parent.mkdir(parents=True, exist_ok=True)
    new = not archive.exists()
    try:
        if new:
            torch.hub.download_url_to_file(URL, str(archive))
        read_archive(archive)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{URL} could not be fetched into {out}: {error}") from None
    except InputError:
        if new:
            archive.unlink()
        raise
