"""What a run asks of its data (`Data`), and what all pictures and latents share (`Dataset`).

`train.py` and `sample.py` know nothing else of a data set. A new one is a class like `Cifar10` and
a line in `training.checkpoint.DATASETS`. Batch n is a pure function of (seed, n, micro-batch).
Read next: `data/toy.py`, the smallest data set."""

import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Annotated, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from data.networks import NETWORKS
from data.pictures import draw_sheet, to_uint8
from rf import Formulation, InputError, Rows, expand, needed
from training.folder import written
from training.options import Count

NOISE, FLIPS, DATA, HELD_OUT = range(4)  # what is drawn; each has separate generators


def seeded(seed: int, n: int, micro: int, what: int, device="cpu") -> torch.Generator:
    """The generator that draws `what` (NOISE, ...) in step or block n. Its state is a hash: with a
    sum, seed 0 would draw in step 1 what seed 1 draws in step 0."""
    numbers = [number & 0xFFFFFFFF for number in (seed, n, micro, what)]
    state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def batchwise(objective, make: Callable, size: int, *tensors: Tensor) -> Sequence[Tensor]:
    """The tensors make(*tensors), of all rows at once; `size` rows at a time where x0 and noise are
    coupled, as a coupling is of one batch."""
    size = size if objective.coupled else len(tensors[0])
    parts = [make(*part) for part in zip(*(x.split(size) for x in tensors), strict=True)]
    return parts[0] if len(parts) == 1 else [torch.cat(part) for part in zip(*parts, strict=True)]


def validation(objective, x0: Tensor, *cond: Tensor, batch_size=256) -> Iterator[Rows]:
    """Rows (z_in, t, target, *cond) of held-out examples, with the same noise always, at each
    t = (i + 1/2)/8 in turn: some paths' ends are singular."""
    generator = seeded(0, 1, 0, HELD_OUT)
    (eps,) = batchwise(objective, lambda x: [objective.noise(x, generator)], batch_size, x0)
    parts = torch.arange(len(x0)).split(max(1, 2**20 // x0[0].numel()))  # to bound the memory
    for t, rows in itertools.product((torch.arange(8) + 0.5) / 8, parts):
        t, rows_cond = t.to(x0.device).expand(len(rows)), [c[rows] for c in cond]
        z, target = objective.pair(x0[rows], eps[rows], t, *rows_cond)
        yield z, t, target, *rows_cond


def has_truth(objective) -> bool:
    """Whether E[target | z] follows from the data: of formulations with noise independent of x0.
    Nobody knows the best student of a teacher."""
    return isinstance(objective, Formulation) and not objective.coupled


def save(file: File, what: Image | Sequence) -> File:
    """Write a picture (.png) or arrays (.npz), whole or not at all."""
    with written(file) as whole:
        if isinstance(what, Image):
            what.save(whole, "PNG")
        else:
            np.savez(whole, *map(np.asarray, what))
    return file


def checksum(tensors: Iterable[Tensor]) -> int:
    crc = 0
    for values in tensors:
        crc = zlib.crc32(values.cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order (n,) of the examples in this epoch."""
    sequence = np.random.SeedSequence([seed & 0xFFFFFFFF, epoch])
    return np.random.Generator(np.random.PCG64(sequence)).permutation(n)


def network_shape(shape: Sequence[int], **changes) -> dict:
    """The arguments of an MM-DiT for this shape (C,H,W). ValueError where they do not fit."""
    channels, height, width = shape
    size = min(256, max(height, width) // 2)
    arguments = dict(in_channels=channels, patch_size=2, pos_embed_max_size=size, qk_norm=True)
    arguments |= changes
    patch = arguments["patch_size"]
    limit = patch * arguments["pos_embed_max_size"]
    if height % patch or width % patch or max(height, width) > limit:
        good = f"multiples of {patch} up to {limit}"
        raise InputError(f"latents of {height} x {width}: their sides are not {good}")
    if channels != arguments["in_channels"]:
        raise InputError(f"latents have {channels} channels, not {arguments['in_channels']}")
    return arguments


class Data:
    """The face of a data set: what a run asks of its data. A subclass brings what is `needed` here,
    and its `Options` if it has flags. x0 is (n,*shape), as the network takes it; each of *cond is
    (n,...): labels (n,), or what else the network takes after t. A spec is a `Spec` as a dict:
    plain values, all that is known of the data when a checkpoint is read.
    Methods of the class have no data; the others do."""

    @dataclass
    class Options:
        """There is nothing to choose."""

    @dataclass
    class Spec:
        shape: list[Annotated[Count, "", 1, 4096]]
        classes: Annotated[int, "", 0, 100_000] = 0

    recipe: ClassVar[dict] = {}  # what a fork changes in the `Recipe`, like a row of PRESETS,
    distil: ClassVar[dict] = {}  # and in the recipe of its students
    cfg: ClassVar[float] = 1.0  # the guidance scale of callers that name none
    parts: ClassVar[list | None] = None  # what training drops together, see `drop`
    of_network: ClassVar[set] = set()  # keys of the spec, beside shape and classes, that it fixes

    # What a data set brings; `Dataset` has most of it for pictures in arrays
    spec = needed("spec(self) -> dict(shape=[C, H, W], classes=K), or more")
    examples = needed("examples(self, n, generator) -> [x0, *cond]")
    arguments = classmethod(needed("arguments(cls, spec) -> dict of the network's arguments"))
    write = classmethod(needed("write(cls, spec, file, x0, *cond, seed, device) -> the file"))

    # Of a data set that draws its examples; `Dataset` stores them. n numbers batches, or, where
    # the recipe's block is not 1, blocks of them: size is batch_size x block / micros
    def batch(self, seed: int, n: int, size: int, micro=0, micros=1, device="cpu") -> list[Tensor]:
        return [x.to(device) for x in self.examples(size, seeded(seed, n, micro, DATA))]

    def held_out(self, n: int) -> list[Tensor]:
        return self.examples(n, seeded(0, 0, 0, HELD_OUT))

    def empty(self, spec: dict) -> Sequence[Tensor] | None:
        """The null conditions, where the data know them, and not the network."""

    @classmethod
    def network(cls, spec: dict, recipe) -> nn.Module:
        """The network of this name. InputError where it is not for these data."""
        build, arguments = NETWORKS[recipe.network], cls.arguments(spec) | {"depth": recipe.depth}
        try:
            inspect.signature(build).bind(**arguments)
        except TypeError as error:
            why = f"is not for {cls.__name__}: {error}"
            raise InputError(f"--network {recipe.network} {why}") from None
        return build(**arguments)

    @classmethod
    def agreed(cls, spec: dict, known: dict, origin: str, agree: str) -> dict:
        """The spec of these data, where it agrees with that of the origin in "all" (of a run that
        goes on); "shape", classes and what is `of_network` (of a teacher); or the "network" of
        other classes and sizes (of --init). InputError names what differs."""
        shapes = {"shape", "classes"} if agree == "shape" else set()
        keys = spec.keys() if agree == "all" else cls.of_network | shapes
        differ = [key for key in spec if key in keys and spec[key] != known.get(key)]
        if agree == "network" and spec["shape"][0] != known["shape"][0]:
            differ.append("shape")
        if differ:
            raise InputError(f"these data are not those of {origin}: {', '.join(differ)} differ")
        return spec

    @classmethod
    def encode(cls, spec: dict, prompts: list[str], device="cpu", t5=True) -> tuple:
        """(the conditions of these texts, null conditions or None to keep the network's)."""
        raise InputError(f"--prompt {prompts[0]!r}: this model takes no text")

    @classmethod
    def conditions(cls, spec: dict, n: int, label=None, data=None, generator=None) -> list[Tensor]:
        """The conditions of n samples: one label, all labels in turn, or none without classes.
        --condition gives a float label; data is a folder of conditions."""
        if data:
            raise InputError(f"--data {data}: this model takes no conditions from a folder")
        classes = spec["classes"]
        if isinstance(label, float):
            raise InputError(f"--condition {label:g}: this model is not conditioned on a number")
        if label is not None and not 0 <= label < classes:
            good = f"choose from 0 to {classes - 1}" if classes else "this model has no classes"
            raise InputError(f"--label {label} is out of range; {good}")
        labels = torch.arange(n) % max(1, classes) if label is None else torch.full((n,), label)
        return [labels] if classes else []

    def drop(self, cond: list[Tensor], null_cond, share: float, generator) -> list[Tensor]:
        """Replace rows by the null condition: this share of them loses all. Each of n parts, a
        condition or [(condition, *slices of its axes), ...], is dropped by itself, at the n-th root
        of the share: SD3 drops each of its three encoders at 46.4%. A float stays one."""
        parts = self.parts or [[(i,)] for i in range(len(cond))]
        pairs = zip(cond, null_cond, strict=True)
        result = [c.to(torch.promote_types(c.dtype, n.dtype), copy=True) for c, n in pairs]
        for part in parts:
            u = torch.rand(len(cond[0]), generator=generator, device=generator.device)
            dropped = u < share ** (1 / len(parts))
            for i, *slices in part:
                rows, null = result[i][(slice(None), *slices)], null_cond[i][tuple(slices)]
                rows.copy_(torch.where(expand(dropped, rows), null, rows))
        return result

    def metrics(self, model) -> dict[str, float]:
        """What the log and the bar show besides the losses."""
        return {}

    def preview(self, model, out: File) -> None:
        """Draw a picture while the run goes on."""

    def report(self, model, out: File, teacher=None) -> None:
        """Draw what `sample.py` draws."""
        cond = self.conditions(self.spec(), 100)
        x0 = model.draw(100, *cond, steps=max(50, model.objective.fewest))
        print(f"wrote {self.write(self.spec(), out / 'samples.png', x0, *cond)}")

    @staticmethod
    def compare(student, teacher, measure, counts=(1, 2, 4, 8, 16, 32, 100)) -> None:
        """Print measure(model, steps) of both at equal numbers of evaluations."""
        fewest = student.objective.fewest
        print(f"{'evaluations':12}{'teacher':>28}{'student':>28}")
        for n in sorted({fewest, *counts}):
            cells = measure(teacher, n), measure(student, n) if n >= fewest else "-"
            print(f"{n:<12}" + "".join(f"{cell:>28}" for cell in cells))


class Dataset(Data):
    """Images or latents in arrays: x0 (N,C,H,W) and no cond, labels (N,), or context (N,L,D) and
    pooled (N,P). Training never sees the last `held_out` of `rows` (default: a twentieth of N)."""

    @dataclass
    class Options:
        data: Annotated[str | None, "folder of the files"] = None

    @dataclass
    class Spec(Data.Spec):
        names: list[str] | None = None
        examples: int = 0  # by these two a resumed run finds out whether its data are the same
        digest: int = 0

        def __post_init__(self):
            if self.names and len(self.names) != self.classes:
                raise ValueError(f"{len(self.names)} names for {self.classes} classes")

    def __init__(self, x0, *cond, names: list[str] | None = None, held_out=None, rows=None):
        self.x0, self.cond, self.names = x0, cond, names
        labelled = len(cond) == 1 and not torch.is_floating_point(torch.as_tensor(cond[0][:1]))
        self.classes = (len(names) if names else int(cond[0].max()) + 1) if labelled else 0
        rows = np.arange(len(x0)) if rows is None else rows
        split = len(x0) - (max(1, len(x0) // 20) if held_out is None else held_out)
        self.train_rows, self.held_out_rows = rows[:split], rows[split:]

    def spec(self) -> dict:
        shape = list(self.x0.shape[1:])
        return asdict(self.Spec(shape, self.classes, self.names, len(self.x0), self.digest))

    @functools.cached_property
    def digest(self) -> int:
        """A checksum of each array: of all of it up to 64 MiB, of 16 KiB in each of 4096 parts of a
        larger one. A copy of a file has the same."""
        crc = 0
        for array in (self.x0, *self.cond):
            raw = np.asarray(array).ravel("K").view(np.uint8)
            for start in range(0, len(raw), max(2**14, len(raw) // 2**12 | 1)):
                crc = zlib.crc32(raw[start : start + 2**14], crc)
        return crc

    def rows(self, seed: int, n: int, size: int, micro: int = 0, micros: int = 1) -> np.ndarray:
        """The examples (size,) of a micro-batch: steps walk along one permutation after another."""
        start, N = (n * micros + micro) * size, len(self.train_rows)
        epoch, place = np.divmod(np.arange(start, start + size), N)
        order = [permutation(N, seed, e)[place[epoch == e]] for e in np.unique(epoch).tolist()]
        return self.train_rows[np.concatenate(order)]

    def gather(self, rows: np.ndarray) -> list[Tensor]:
        """[x0, *cond] on the CPU, as stored."""
        return [torch.as_tensor(np.asarray(array[rows])) for array in (self.x0, *self.cond)]

    def batch(self, seed: int, n: int, size: int, micro=0, micros=1, device="cpu") -> list[Tensor]:
        batch = self.gather(self.rows(seed, n, size, micro, micros))
        if torch.device(device).type == "cuda":
            batch = [x.pin_memory() for x in batch]
        x0, *cond = (x.to(device, non_blocking=True) for x in batch)
        return [self.prepare(x0, seeded(seed, n, micro, FLIPS, device)), *cond]

    def held_out(self, n: int) -> list[Tensor]:
        """[x0, *cond] of the first n held-out examples; of all, where there are fewer."""
        x0, *cond = self.gather(self.held_out_rows[:n])
        return [self.prepare(x0), *(c.float() if c.is_floating_point() else c for c in cond)]

    @staticmethod
    def prepare(x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x0 as stored -> as the network takes it. With a generator it is augmented."""
        return x0.float()

    # ---- From a spec, without data: the network, and pictures of its samples
    @classmethod
    def arguments(cls, spec):
        return network_shape(spec["shape"]) | dict(classes=spec["classes"], tokens=4)

    @classmethod
    def images(cls, spec: dict, x0: Tensor, device="cpu") -> np.ndarray | None:
        """x0 (n,C,H,W) as pictures, uint8 (n,H,W,3); None if this machine cannot make them."""
        return to_uint8(x0)

    @classmethod
    def write(cls, spec, file: File, x0, *cond, columns=10, names=(), seed=0, device="cpu") -> File:
        """Write a sheet (.png), of few classes in named rows; or arrays (.npz) as the ADM evaluator
        reads them: arr_0 uint8 (n,H,W,3), or latents without their VAE, then the conditions."""
        images = cls.images(spec, x0, device)
        if images is None:
            name = file.name.removesuffix(".npz")  # x.png.npz for x.png: an x.npz may be another's
            images, file = x0.numpy(), file.with_name(f"{name}.npz")
        if file.suffix == ".npz":
            return save(file, [images, *cond])
        if spec["classes"] and cond:
            images = images[cond[0].argsort(stable=True)]
            labels, counts = cond[0].unique(return_counts=True)
            if 1 < len(labels) <= 10 and len(counts.unique()) == 1:
                columns = counts[0].item()
                names = [spec["names"][k] if spec["names"] else str(k) for k in labels.tolist()]
        return save(file, draw_sheet(images, columns, names))

    # ---- What a run shows
    def preview(self, model, out: File, steps: int = 50, cfg: float | None = None) -> None:
        """Eight samples of each of the first ten classes, or 80 (of held-out texts)."""
        cond = self.held_out(80)[1:]
        if self.classes:
            cond = [torch.arange(min(10, self.classes)).repeat_interleave(8)]
        steps = max(steps, model.objective.fewest)
        x0 = model.draw(len(cond[0]) if cond else 80, *cond, steps=steps, cfg=cfg)
        self.write(self.spec(), out / "samples.png", x0, *cond, columns=8, device=model.device)

    def report(self, model, out: File, teacher=None) -> None:
        """Draw samples, guided where the model allows it. Compare a student with its teacher."""
        cfg = 2.0 if model.null_cond else None
        self.preview(model, out, model.objective.fewest if teacher else 50, cfg)
        if not teacher:
            return
        x0, *cond = self.held_out(8)
        samples_of = lambda sampler, n: sampler.draw(len(x0), *cond, steps=n, cfg=cfg)
        best, rows = samples_of(teacher, 100), {"teacher": {}, "student": {}}

        def measure(sampler, steps: int) -> str:
            drawn_before = sampler is teacher and steps == 100
            samples = best if drawn_before else samples_of(sampler, steps)
            rows["student" if sampler is model else "teacher"][steps] = samples
            return f"{(samples - best).square().mean().sqrt():.4f}"

        print("rms distance to the teacher's samples in 100 evaluations, from the same noise:")
        self.compare(model, teacher, measure)
        for name, samples in rows.items():
            labels = [f"{n} steps" if n > 1 else "1 step" for n in samples]
            layout = dict(columns=len(best), names=labels, device=model.device)
            self.write(self.spec(), out / f"{name}.png", torch.cat([*samples.values()]), **layout)
        print(f"pictures: {out}/teacher, {out}/student, {out}/samples")
