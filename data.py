"""CIFAR-10 from its binary archive, latents from a folder of .npy files, and what all data share.

    python data.py encode --images FOLDER --out DIR --vae NAME    latents of FOLDER/CLASS/IMAGE.jpg

Batch n is a pure function of (seed, n, micro-batch), every example comes once an epoch, and no
pickle is ever read. Images are in [-1, 1] for the network, latents as they are stored. Whoever has
other data writes a class like `Cifar10` and a line in `checkpoint.py`. Read next: `sample.py`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that is cut short

import contextlib
import functools
import hashlib
import http.client
import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path as File
from pathlib import PurePosixPath
from typing import Annotated, ClassVar

try:
    import fcntl
except ImportError:  # Windows has none: runs are not held apart there
    fcntl = None

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

import text as text_encoders
from mmdit import ClassMMDiT, MMDiT
from options import Count, Parser, misfit, pick, ranks, reading
from parallel import check_device, join, leave, meet
from pictures import draw_sheet, to_uint8

NOISE, FLIPS, DATA, HELD_OUT = range(4)  # what is drawn: each has generators of its own
CHECKPOINTED = 30  # the depth from which on activations are computed again, to need less memory


def seeded(seed: int, n: int, micro: int, what: int, device="cpu") -> torch.Generator:
    """A generator for one thing that is drawn in step (or block) n, micro-batch `micro`.
    Its state is a hash of the four numbers. With their sum, seed 0 would draw at step 1 what seed 1
    draws at step 0."""
    numbers = [number & 0xFFFFFFFF for number in (seed, n, micro, what)]
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state & 0x7FFFFFFFFFFFFFFF)


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) of the examples in this epoch."""
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFF, epoch])
    return np.random.Generator(np.random.PCG64(sequence)).permutation(n)


@contextlib.contextmanager
def locked(out: File) -> Iterator[None]:
    """Hold a folder for this process, so that no other writes into it. The lock is gone with the
    process, and so are folders that it made and left empty. BlockingIOError where it is held."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    holder = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(holder).st_ino != out.stat().st_ino:
                raise BlockingIOError  # another one has just removed it
    except BlockingIOError:
        os.close(holder)
        raise BlockingIOError(f"--out {out} is in use by another process") from None
    except OSError:  # a file system without locks: the run goes on without one
        pass
    try:
        for name in ("checkpoint", "delta"):  # of a process that was killed while it wrote
            for left in out.glob(f"{name}.*.tmp"):
                left.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):  # as soon as one is not empty
            for folder in made:
                folder.rmdir()
        if fcntl:
            os.close(holder)


class Data:
    """What all data share. The rest of what a run asks of them is in `Dataset` and `toy2d.Toy`:
    batch, held_out, spec, report and, of a spec alone, network and write. Options are their flags.
    A spec is what a network is built from, in plain values: a `Spec` as a dict."""

    @dataclass
    class Spec:
        """The shape of an example, the number of classes, and what else the class needs."""

        shape: list[Annotated[Count, "", 1, 4096]]
        classes: Annotated[int, "", 0, 100_000] = 0

    cfg: ClassVar[float] = 1.0  # the guidance scale of callers that name none
    null_cond: Sequence[Tensor] | None = None  # of a released network; zeros are that of ours
    parts: ClassVar[list | None] = None  # what training drops together, see `drop`

    @classmethod
    def encode(cls, spec: dict, prompts: list[str], **how) -> tuple[list[Tensor], list | None]:
        """The conditions of these texts; and the null conditions, if the network's own are not the
        right ones."""
        raise ValueError(f"--prompt {prompts[0]!r}: this model takes no text")

    @classmethod
    def conditions(cls, spec: dict, n: int, label=None, data=None, generator=None) -> list[Tensor]:
        """What n samples are drawn for: one label, or all in turn; nothing where there are none."""
        classes = spec["classes"]
        if label is not None and not 0 <= label < classes:
            good = f"choose from 0 to {classes - 1}" if classes else "this model has no classes"
            raise ValueError(f"--label {label} is out of range; {good}")
        labels = torch.arange(n) % max(1, classes) if label is None else torch.full((n,), label)
        return [labels] if classes else []

    def drop(
        self, cond: list[Tensor], null_cond: Sequence[Tensor], share: float, generator
    ) -> list[Tensor]:
        """Replace rows by the null condition, for classifier-free guidance: `share` of them lose
        all. Each of n parts is dropped by itself, at the n-th root of the share. (SD3 drops its
        three encoders at 46.4%, so that a tenth of the examples has none.) A part is a list of
        (condition, *slices of its axes); by default each condition is one. Text that is stored in
        float16 comes out in float32, as its null condition is."""
        parts = self.parts or [[(i,)] for i in range(len(cond))]
        kept = [c.to(null.dtype, copy=True) for c, null in zip(cond, null_cond, strict=True)]
        for part in parts:
            chance = torch.rand(len(cond[0]), generator=generator, device=generator.device)
            for i, *where in part:
                view, null = kept[i][(slice(None), *where)], null_cond[i][tuple(where)]
                dropped = (chance < share ** (1 / len(parts))).reshape(-1, *[1] * (view.dim() - 1))
                view.copy_(torch.where(dropped, null, view))
        return kept

    def metrics(self, model) -> dict[str, float]:
        """What log and bar show besides the losses."""
        return {}

    def preview(self, model, out: File) -> None:
        """A picture while the run goes on."""

    @staticmethod
    def compare(student, teacher, measure, counts=(1, 2, 4, 8, 16, 32, 100)) -> None:
        """Print what measure(model, steps) says of both at equal numbers of evaluations."""
        fewest = student.objective.fewest
        print(f"{'evaluations':12}{'teacher':>28}{'student':>28}")
        for n in sorted({fewest, *counts}):
            cells = measure(teacher, n), measure(student, n) if n >= fewest else "-"
            print(f"{n:<12}" + "".join(f"{cell:>28}" for cell in cells))


class Dataset(Data):
    """Images or latents in arrays, and everything that a run does with them.
    x0 is (N,C,H,W); cond is nothing, labels (N,), or context (N,L,D) and pooled (N,P). The last
    `held_out` of the rows, in the order of `rows`, are never trained on (default: a twentieth)."""

    @dataclass
    class Options:
        data: Annotated[str | None, "folder of the files"] = None

    @dataclass
    class Spec(Data.Spec):
        names: list[str] | None = None
        context: list[Annotated[Count, "", 1, 2**16]] | None = None
        pooled: list[Annotated[Count, "", 1, 2**16]] | None = None
        meta: dict | None = None
        released: dict | None = None  # the shape of a released network
        examples: int = 0  # these two tell a run that goes on whether its data are the same
        digest: int = 0

        def __post_init__(self):
            if self.names and len(self.names) != self.classes:
                raise ValueError(f"{len(self.names)} names for {self.classes} classes")
            if self.meta:
                self.meta = asdict(pick(Meta, self.meta))

    # what a student changes in its teacher's recipe; a held-out example costs it eight solves
    distil: ClassVar = dict(steps=20_000, batch_size=256, lr=1e-4, validation=128)

    def __init__(self, x0, *cond, names: list[str] | None = None, held_out=None, rows=None):
        self.x0, self.cond, self.names, self.meta = x0, cond, names, None
        self.classes = (len(names) if names else int(cond[0].max()) + 1) if len(cond) == 1 else 0
        rows = np.arange(len(x0)) if rows is None else rows
        split = len(x0) - (max(1, len(x0) // 20) if held_out is None else held_out)
        self.train_rows, self.held_out_rows = rows[:split], rows[split:]

    @staticmethod
    def recipe(options: Options) -> dict:
        """What these data change in the `Recipe`."""
        return dict(formulation="rf/lognorm(0.00,1.00)", precision="bf16")

    def spec(self) -> dict:
        text = [list(c.shape[1:]) for c in self.cond] if len(self.cond) == 2 else [None, None]
        shape, N = list(self.x0.shape[1:]), len(self.x0)
        own = self.Spec(shape, self.classes, self.names, *text, self.meta, None, N, self.digest)
        return asdict(own)

    @functools.cached_property
    def digest(self) -> int:
        """Of the first, the last and some rows between: cheap, of any amount of data."""
        some, crc = np.linspace(0, len(self.x0) - 1, 64).astype(int), 0
        for rows in self.gather(some):
            crc = zlib.crc32(rows.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
        return crc

    def rows(self, seed: int, n: int, size: int, micro: int = 0, micros: int = 1) -> np.ndarray:
        """Which examples step n's micro-batch `micro` of `micros` has, (size,).
        The steps walk along one permutation after the other: an epoch's last partial batch is
        filled from the next one."""
        start, N = (n * micros + micro) * size, len(self.train_rows)
        epoch, at = np.divmod(np.arange(start, start + size), N)
        order = [permutation(N, seed, e)[at[epoch == e]] for e in np.unique(epoch).tolist()]
        return self.train_rows[np.concatenate(order)]

    def gather(self, rows: np.ndarray) -> list[Tensor]:
        """[x0, *cond] on the CPU, as stored."""
        return [torch.as_tensor(np.asarray(array[rows])) for array in (self.x0, *self.cond)]

    def batch(self, seed: int, n: int, size: int, micro=0, micros=1, device="cpu") -> list[Tensor]:
        """[x0, *cond] of these `rows` for the network. They travel to the device as stored."""
        batch = self.gather(self.rows(seed, n, size, micro, micros))
        if torch.device(device).type == "cuda":
            batch = [x.pin_memory() for x in batch]
        x0, *cond = (x.to(device, non_blocking=True) for x in batch)
        return [self.prepare(x0, seeded(seed, n, micro, FLIPS, device)), *cond]

    def held_out(self, n: int) -> list[Tensor]:
        """[x0, *cond] of the first n held-out examples, or of all where there are fewer."""
        x0, *cond = self.gather(self.held_out_rows[:n])
        return [self.prepare(x0), *(c.float() if c.is_floating_point() else c for c in cond)]

    @staticmethod
    def prepare(x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x0 as stored -> what the network sees, in float32; augmented if a generator is given."""
        return x0.float()

    # ---- Of a spec alone: the network, and what is drawn with it
    @staticmethod
    def network(spec: dict, recipe) -> nn.Module:
        """A fresh network with patches of 2 x 2; a deep one checkpoints its activations."""
        channels, height, width = spec["shape"]
        size = min(256, max(height, width) // 2)
        shape = dict(in_channels=channels, patch_size=2, pos_embed_max_size=size, qk_norm=True)
        shape |= spec.get("released") or {}
        patch, most = shape["patch_size"], shape["patch_size"] * shape["pos_embed_max_size"]
        if height % patch or width % patch or max(height, width) > most:
            good = f"multiples of {patch} up to {most}"
            raise ValueError(f"latents of {height} x {width}: their sides are not {good}")
        if channels != shape["in_channels"]:
            raise ValueError(f"latents have {channels} channels, not {shape['in_channels']}")
        if spec["context"]:
            text = dict(context_dim=spec["context"][-1], pooled_dim=spec["pooled"][-1])
            network = core = MMDiT(recipe.depth, **shape, **text)
            network.null_cond = (torch.zeros(spec["context"]), torch.zeros(spec["pooled"]))
        else:
            network = ClassMMDiT(spec["classes"], recipe.depth, **shape)
            core = network.mmdit
        core.checkpointing = recipe.depth >= CHECKPOINTED
        return network

    @classmethod
    def encode(cls, spec, prompts, device="cpu", t5=True):
        """By the encoders that meta.json names, which are freed again before the network runs."""
        meta = spec["meta"] or {}
        if not meta.get("text"):
            return super().encode(spec, prompts)
        how = t5 and meta.get("t5", True), device, meta["t5_tokens"], spec["context"][-1]
        context, pooled = text_encoders.load(meta["text"], *how)([*prompts, ""])
        null = [context[-1], pooled[-1]] if spec["released"] else None  # ours were shown zeros
        return [context[:-1], pooled[:-1]], null

    @classmethod
    def conditions(cls, spec, n, label=None, data=None, generator=None):
        """Of texts: those held out in the folder `data`, or none."""
        if not spec["context"] or label is not None:
            return super().conditions(spec, n, label)
        if not data and (spec["meta"] or {}).get("text"):
            raise ValueError("this model draws what a --prompt says: give it one")
        if not data:
            return [torch.zeros(n, *spec[key]) for key in ("context", "pooled")]
        texts = cls(cls.Options(data=data))
        if any(texts.spec()[key] != spec[key] for key in ("context", "pooled")):
            raise ValueError(f"--data {data} does not hold texts of this model's shapes")
        return [c[torch.arange(n) % len(c)] for c in texts.held_out(n)[1:]]

    @classmethod
    def images(cls, spec: dict, x0: Tensor, device="cpu") -> np.ndarray | None:
        """x0 (n,C,H,W) as pictures, uint8 (n,H,W,3); None where that is impossible here."""
        return to_uint8(x0)

    @classmethod
    def write(cls, spec, file: File, x0, *cond, columns=10, names=(), seed=0, device="cpu") -> File:
        """A sheet of samples (.png), with a named row for each of few classes, or arrays (.npz) as
        the ADM evaluator reads them: arr_0 uint8 (n,H,W,3), then the conditions. Returns the file:
        latents whose VAE is not to be had here stay latents, in an .npz."""
        images = cls.images(spec, x0, device)
        if images is None:
            images, file = x0.numpy(), file.with_suffix(".npz")
        if file.suffix == ".npz":
            np.savez(file, images, *(c.numpy() for c in cond))
            return file
        if spec["classes"] and cond:
            images = images[cond[0].argsort(stable=True)]
            kinds, counts = cond[0].unique(return_counts=True)
            if 1 < len(kinds) <= 10 and len(counts.unique()) == 1:
                columns = counts[0].item()
                names = [spec["names"][k] if spec["names"] else str(k) for k in kinds.tolist()]
        draw_sheet(images, columns, names).save(file)
        return file

    # ---- What a run shows
    def preview(self, model, out: File, steps: int = 50, cfg: float | None = None) -> None:
        """OUT/samples: eight of each of the first ten classes, of 80 held-out texts, or just 80."""
        cond = self.held_out(80)[1:]
        if self.classes:
            cond = [torch.arange(min(10, self.classes)).repeat_interleave(8)]
        steps = max(steps, model.objective.fewest)
        x0 = model.draw(len(cond[0]) if cond else 80, *cond, steps=steps, cfg=cfg)
        where = dict(columns=8, device=model.device)
        self.write(self.spec(), out / "samples.png", x0, *cond, **where)

    def report(self, model, out: File, teacher=None) -> None:
        """At the end of a run: samples, guided if the model can be; then a student beside its
        teacher, from the same noise, with a row of pictures for each number of evaluations."""
        cfg = 2.0 if model.null_cond else None
        self.preview(model, out, model.objective.fewest if teacher else 50, cfg)
        if not teacher:
            return
        x0, *cond = self.held_out(8)
        draw = lambda model, n: model.draw(len(x0), *cond, steps=n, cfg=cfg)
        best, rows = draw(teacher, 100), {"teacher": {}, "student": {}}

        def measure(own, steps: int) -> str:
            drawn = best if own is teacher and steps == 100 else draw(own, steps)
            rows["student" if own is model else "teacher"][steps] = drawn
            return f"{(drawn - best).square().mean().sqrt():.4f}"

        print("rms distance to the teacher's samples in 100 evaluations, from the same noise:")
        self.compare(model, teacher, measure)
        for name, drawn in rows.items():
            labels = [f"{n} step{'s' * (n > 1)}" for n in drawn]
            file, drawn = out / f"{name}.png", torch.cat([*drawn.values()])
            how = dict(columns=len(best), names=labels, device=model.device)
            self.write(self.spec(), file, drawn, **how)
        print(f"pictures: {out}/teacher, {out}/student, {out}/samples")


# ---- CIFAR-10
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE, MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
RECORDS, RECORD = 10_000, 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Cifar10(Dataset):
    """CIFAR-10, whole and as uint8, from a folder with the archive or its unpacked files.
    The five training files are for training, the test file is held out."""

    @dataclass
    class Options(Dataset.Options):
        download: Annotated[bool, "cifar10: fetch the archive into --data first"] = False

    def __init__(self, options: Options):
        if not options.data:
            raise ValueError("--dataset cifar10 needs --data DIR")
        if options.download:
            download(options.data)
        folder = File(options.data)
        archive = folder if folder.is_file() else folder / ARCHIVE
        places = (folder, folder / "cifar-10-batches-bin")
        unpacked = [place / name for place in places for name in FILES]
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
                raise ValueError(f"{name} in {folder} has {size}: damaged, or another file")
            label = max(files[name][::RECORD])
            if label > 9:
                raise ValueError(f"{name} in {folder} has a label {label}; good ones are 0 to 9")
        records = np.frombuffer(b"".join(files[name] for name in FILES), np.uint8)
        records = records.reshape(-1, RECORD)
        x0, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)
        super().__init__(x0, labels, names=NAMES, held_out=RECORDS)

    @staticmethod
    def recipe(options):
        return Dataset.recipe(options) | dict(depth=8, steps=200_000, lr=3e-4)

    @staticmethod
    def prepare(x0, generator=None):
        """uint8 -> [-1, 1], both ends exactly; in training half of the pictures are mirrored."""
        x0 = x0.float() / 127.5 - 1
        if generator is None:
            return x0
        chance = torch.rand(len(x0), 1, 1, 1, generator=generator, device=x0.device)
        return torch.where(chance < 0.5, x0.flip(3), x0)


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
    if ranks()[1] > 1:
        raise ValueError("--download needs a single process: fetch the archive before torchrun")
    archive = File(out) / ARCHIVE
    archive.parent.mkdir(parents=True, exist_ok=True)
    fetched = not archive.exists()
    try:
        if fetched:
            torch.hub.download_url_to_file(URL, str(archive))
        read_archive(archive)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{URL} could not be fetched into {out}: {error}") from None
    except ValueError:
        archive.unlink() if fetched else None
        raise


# ---- Latents
FLOATS, INTEGERS = "float16 float32", "uint8 uint16 uint32 int8 int16 int32 int64"


def open_array(path: File, shape: str, dtypes: str) -> np.ndarray:
    """A memory-mapped .npy with as many axes as `shape` and one of the dtypes; ValueError, too,
    where it holds objects or is not of the length that its header says."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing (`python data.py encode` makes one)")
    with reading(path, "array of numbers"):
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.name not in dtypes.split() or not array.dtype.isnative:
        raise ValueError(f"{path} has the type {array.dtype.str}, not one of {dtypes}")
    if array.ndim != sum(map(str.isalpha, shape)):
        raise ValueError(f"{path} has the shape {array.shape}, not {shape}")
    size, whole = path.stat().st_size, array.offset + array.nbytes
    if size != whole:
        raise ValueError(f"{path} has {size} bytes, not {whole}: it is damaged")
    return array


@dataclass
class Meta:
    """What `decode` and `Latents.encode` need of a meta.json. Each may be left out."""

    scaling: Annotated[float, "", 1e-9, 1e9] = 1.0
    shift: float = 0.0
    vae: str | None = None
    text: str | None = None  # the folder of the encoders
    t5: bool = True
    t5_tokens: Annotated[Count, "", 1, 10_000] = 256
    factor: Annotated[Count | None, "", 1, 1024] = None  # pixels a side of a latent's pixel


def read_meta(path: File) -> tuple[dict, list[str] | None, list | None]:
    """A meta.json: a `Meta` as a dict, the names of the classes, and the parts of its text that
    training drops by themselves."""
    like = '{"scaling": 1.5, "shift": 0.06, "vae": "NAME", "classes": ["cat", "dog"]}'
    with reading(path, f"JSON object like {like}"):
        meta = dict(json.loads(path.read_text(encoding="utf-8")))
        names, parts = meta.get("classes"), meta.get("parts")
        if fault := misfit(names, list[str] | None):
            raise ValueError(f"classes {fault}")
        parts = parts and [
            [(int(i), *(slice(*map(int, span)) for span in spans)) for i, *spans in part]
            for part in parts
        ]
        return asdict(pick(Meta, meta)), names, parts


class Latents(Dataset):
    """latents.npy (N,C,H,W) float16, memory-mapped; labels.npy (N,), or context.npy (N,L,D),
    pooled.npy (N,P) and null.npz, the encoding of ""; meta.json {"scaling", "shift", "vae", ...}.
    Latents are stored as the network sees them: (z - shift) scaling of the VAE's own z, which has
    about unit variance. Held out are the last min(1024, N/20) rows of a fixed permutation (of a
    folder sorted by class, the last rows would all be of the last class)."""

    distil: ClassVar = Dataset.distil | dict(lr=5e-5)

    def __init__(self, options: Dataset.Options):
        if not options.data:
            raise ValueError("--dataset latents needs --data DIR")
        folder, cond = File(options.data), []
        x0 = open_array(folder / "latents.npy", "(N,C,H,W)", "float16")
        meta, names, parts = read_meta(folder / "meta.json")
        N = len(x0)
        if N < 2 or not x0.size:
            raise ValueError(f"{folder}/latents.npy is too small: its shape is {x0.shape}")
        text = any((folder / name).exists() for name in ("context.npy", "pooled.npy"))
        if text == (folder / "labels.npy").exists():
            what = "labels.npy, or context.npy and pooled.npy, and not both"
            raise ValueError(f"{folder} must hold {what}: {'both' if text else 'neither'} there")
        kinds = {"labels.npy": ("(N,)", INTEGERS)}
        if text:
            kinds = {"context.npy": ("(N,L,D)", FLOATS), "pooled.npy": ("(N,P)", FLOATS)}
        for name, kind in kinds.items():
            array = open_array(folder / name, *kind)
            cond.append(array if text else array.astype(np.int64))
            if len(array) != N:
                raise ValueError(f"{folder}: latents.npy has {N} rows, {name} has {len(array)}")
        if not text:
            low, high = int(cond[0].min()), int(cond[0].max())
            if low < 0 or high >= (len(names) if names else 100_000):
                good = f"0 to {len(names) - 1} by the names" if names else "0 to 99,999"
                raise ValueError(f"{folder}/labels.npy has labels {low} to {high}, not {good}")
        if text and (folder / "null.npz").exists():
            with (
                reading(folder / "null.npz", "encoding of no text"),
                np.load(folder / "null.npz") as f,
            ):
                null = [torch.as_tensor(f[name]).float() for name in ("context", "pooled")]
                if [x.shape for x in null] != [c.shape[1:] for c in cond]:
                    raise ValueError("its shapes are not those of the texts")
            self.null_cond = null
        held_out = max(1, min(1024, N // 20))
        super().__init__(x0, *cond, names=names, held_out=held_out, rows=permutation(N, 0, 0))
        self.meta, self.parts = meta, parts if text else None
        try:
            _ = [cond[i][(0, *where)] for part in self.parts or () for i, *where in part]
        except IndexError as error:
            raise ValueError(
                f"{folder}/meta.json: its parts are not of these texts: {error}"
            ) from None

    @staticmethod
    def recipe(options):
        return Dataset.recipe(options) | dict(depth=12, steps=500_000, lr=1e-4)

    @classmethod
    def images(cls, spec, x0, device="cpu"):
        try:
            return decode(x0, spec["meta"] or asdict(Meta()), str(device))
        except ValueError as error:
            print(f"not decoded: {error}")
            return None


# ---- Images to latents and back, with a VAE of the optional package diffusers
@functools.cache
def load_vae(name: str, device: str):
    """The AutoencoderKL in a folder, or on the hub as ORG/NAME or ORG/NAME/SUBFOLDER."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        message = f"the VAE {name} needs the optional package diffusers: pip install diffusers"
        raise ValueError(message) from None
    parts = [name] if File(name).is_dir() else name.split("/")
    where = {"subfolder": "/".join(parts[2:])} if parts[2:] else {}
    how = dict(use_safetensors=True, low_cpu_mem_usage=False)  # no pickle; no warning
    try:
        return AutoencoderKL.from_pretrained("/".join(parts[:2]), **where, **how).to(device)
    except Exception as error:  # of many kinds: no network, no such name, damaged files, no device
        raise ValueError(f"the VAE {name} cannot be loaded: {str(error)[:200]}") from None


FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


def load_image(path: File, size: int) -> np.ndarray:
    """The largest square in the middle, upright and resized: uint8 (3,size,size)."""
    with Image.open(path, formats=[*FORMATS.values()]) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


def fault(path: File, size: int) -> str:
    """Why a picture cannot be read; nothing where it can."""
    try:
        load_image(path, size)
    except Exception as error:  # Pillow's readers raise many kinds
        return f"{path} ({str(error)[:100]})"
    return ""


def listed(images: File, captioned: bool) -> tuple[list[File], list[str]]:
    """The pictures FOLDER/CLASS/IMAGE.jpg with their classes; or FOLDER/[.../]IMAGE.jpg with their
    captions, from IMAGE.txt or the lines {"file_name", "text"} of FOLDER/metadata.jsonl."""
    where = "[!.]*/[!.]*"
    found = {*images.glob(where), *(images.rglob("[!.]*") if captioned else ())}
    files = sorted(file for file in found if file.suffix.lower() in FORMATS and file.is_file())
    if len(files) < 2:
        raise ValueError(f"--images {images} must hold at least two images FOLDER/CLASS/IMAGE.jpg")
    if not captioned:
        return files, [file.parent.name for file in files]
    known, table = {}, images / "metadata.jsonl"
    with reading(table, "lines of file_name and text"):
        lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
        known = {row["file_name"]: str(row["text"]) for row in map(json.loads, lines)}
    for name, file in [(str(file.relative_to(images)), file) for file in files]:
        told = file.with_suffix(".txt")
        if told.exists():
            with reading(told, "text"):
                known[name] = told.read_text(encoding="utf-8").strip()
        if name not in known:
            raise ValueError(f"{name} has no caption: no .txt beside it, no line in {table.name}")
    return files, [known[str(file.relative_to(images))] for file in files]


@contextlib.contextmanager
def growing(out: File, shapes: dict[str, tuple], n: int):
    """(which rows are there, write(i, arrays)): float16 arrays (n, *shape) as NAME.npy.part, which
    several processes fill together. rows.part has a byte for each row that is whole in all."""
    with contextlib.ExitStack() as stack:

        def part(name: str):
            (out / f"{name}.part").touch()
            return stack.enter_context((out / f"{name}.part").open("r+b"))

        files, there = [], n
        for name, shape in shapes.items():
            file, row = part(f"{name}.npy"), 2 * math.prod(shape)
            layout = {"descr": "<f2", "fortran_order": False, "shape": (n, *shape)}
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, layout)
            file.flush()
            files.append((file, file.tell(), row))
            there = min(there, max(0, size - file.tell()) // row)
        record = part("rows")

        def write(i: int, arrays: Sequence[Tensor]) -> None:
            for array, (file, start, row) in zip(arrays, files, strict=True):
                file.seek(start + i * row)
                file.write(array.half().cpu().numpy().tobytes())
                file.flush()
            record.seek(i)
            record.write(b"\1" * len(arrays[0]))
            record.flush()

        done, known = np.zeros(n, bool), np.frombuffer(record.read()[:there], np.uint8)
        done[: len(known)] = known == 1
        yield done, write
        for file, *_ in files:
            os.fsync(file.fileno())


def finish(out: File, names: Iterable[str], n: int) -> None:
    """Give the arrays their names. ValueError where a row is missing."""
    there = (out / "rows.part").read_bytes().count(1)
    if there < n:
        raise ValueError(f"{out} has {there} of {n} rows: a rank ended early; run it again")
    for name in reversed([*names]):  # the first one last: with it all are whole
        (out / f"{name}.npy.part").replace(out / f"{name}.npy")
    (out / "rows.part").unlink()


def begin(out: File, meta: dict, known: dict[str, Tensor] | np.ndarray) -> None:
    """Write what a folder has from its start: meta.json, and the encoding of no text or the labels.
    ValueError where it is whole already, or was started with other pictures."""
    described = out / "meta.json"
    if (out / "latents.npy").exists():
        raise ValueError(f"--out {out} holds latents already; another --out keeps them")
    if not (out / "latents.npy.part").exists():
        if isinstance(known, dict):
            np.savez(out / "null.npz", **{key: x[0].half().numpy() for key, x in known.items()})
        else:
            np.save(out / "labels.npy", known)
        described.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    with reading(described, "meta.json"):
        if json.loads(described.read_text(encoding="utf-8")) != meta:
            raise ValueError("it is of other images, --size, --vae or --text; take another --out")


def latents_of(model, images: np.ndarray, meta: dict, device: torch.device, bf16: bool) -> Tensor:
    """uint8 (B,3,H,W) -> the mean of the VAE's posterior, scaled as the network sees it."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x = Cifar10.prepare(torch.from_numpy(images).to(device))
        z = model.encode(x).latent_dist.mean.float()
    return (z - meta["shift"]) * meta["scaling"]


def read_ahead(
    files: list[File], starts: list[int], batch_size: int, size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(i, uint8 (B,3,size,size)) for the batches that start at these i, the next of which is read
    meanwhile. ValueError names all pictures from i on that cannot be read."""
    with ThreadPoolExecutor(8) as threads:
        read = lambda i: [threads.submit(load_image, f, size) for f in files[i : i + batch_size]]
        following = [*starts, len(files)]
        coming = read(following[0])
        for i, after in zip(starts, following[1:], strict=True):
            pictures, coming = coming, read(after)
            try:
                x = np.stack([picture.result() for picture in pictures])
            except Exception:
                bad = [*filter(None, threads.map(lambda file: fault(file, size), files[i:]))]
                what = f"{len(bad)} pictures cannot be read; replace them to go on"
                raise ValueError(f"{what}: {', '.join(bad[:10])}") from None
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
    size: Annotated[Count, "pixels a side"] = 256,
    batch_size: Annotated[Count, "images at once"] = 16,
    device: Annotated[str | None, "cpu, cuda, cuda:1 (default: cuda if there)"] = None,
) -> None:
    """Images -> a folder for `Latents`; stopped, it goes on with the same call. The ranks
    of torchrun take turns, and the next pictures are read while the VAE works, in bf16 on a GPU.
    Latents are the mean of the VAE's posterior (the paper is silent; a sample would not resume to
    the same file)."""
    if not (vae or text):
        raise ValueError("encode needs --vae, or --text of a folder that has one")
    (rank, world), vae, out = ranks(), vae or f"{text}/vae", File(out)
    device = device or str(check_device())
    model = load_vae(vae, device)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if size % factor:
        raise ValueError(f"--size {size} is not a multiple of {factor}, the VAE's patch")
    files, told = listed(File(images), bool(text))
    listing = [f"{file.parent.name}/{file.name}" for file in files] + told * bool(text)
    digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()
    meta = dict(scaling=model.config.scaling_factor, shift=model.config.shift_factor or 0.0)
    meta |= dict(vae=vae, images=f"{size} pixels, sha256 {digest}")
    shapes = {"latents": (model.config.latent_channels, size // factor, size // factor)}
    classes, labels = np.unique(told, return_inverse=True)
    if text:
        encoder = text_encoders.load(text, not no_t5, device)
        empty = dict(zip(("context", "pooled"), encoder([""]), strict=True))
        shapes |= {name: tuple(x.shape[1:]) for name, x in empty.items()}
        meta |= dict(text=text, t5=not no_t5, t5_tokens=encoder.t5_tokens, parts=encoder.parts)
        meta["factor"] = factor
    else:
        meta["classes"] = classes.tolist()
    with contextlib.ExitStack() as stack:
        join(torch.device("cpu"))
        if rank == 0:
            stack.enter_context(locked(out))
            begin(out, meta, empty if text else labels)
        meet()
        work = stack.enter_context(contextlib.ExitStack())  # ends before the lock does
        done, write = work.enter_context(growing(out, shapes, len(files)))
        starts = [*range(0, len(files), batch_size)][rank::world]
        todo = [i for i in starts if not done[i : i + batch_size].all()]
        pictures = read_ahead(files, todo, batch_size, size)
        work.enter_context(contextlib.closing(pictures))
        where, known = torch.device(device), len(starts) - len(todo)
        for i, x in tqdm(pictures, str(out), len(starts), initial=known, unit="batch"):
            z = latents_of(model, x, meta, where, bf16=where.type == "cuda")
            texts = encoder(told[i : i + batch_size]) if text else ()
            write(i, [z, *texts])
        work.close()
        meet()
        if rank == 0:
            finish(out, shapes, len(files))


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


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("task", choices=["encode"], help="make a folder of latents")
    parser.add_options(encode, "options")
    given = parser.given()
    del given["task"]
    with parser.one_line_errors():
        encode(**given)
    leave()


if __name__ == "__main__":
    main()
