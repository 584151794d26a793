"""data.py: each batch is a function of its number, and bad files end in one line."""

import functools
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from pictures import to_uint8

N = 20  # records in a file, instead of 10,000


def cifar_files() -> dict[str, bytes]:
    """Six small files, every picture different, 0 and 255 among the pixels."""
    draw = np.random.default_rng(0)
    records = draw.integers(0, 256, (6, N, data.RECORD), np.uint8)
    records[..., 0] = draw.integers(0, 10, (6, N))
    return {name: r.tobytes() for name, r in zip(data.FILES, records, strict=True)}


def write_cifar(folder: Path, **changed: bytes) -> Path:
    """An unpacked folder; changed: the contents of a file by its stem."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in cifar_files().items():
        (folder / name).write_bytes(changed.get(name[:-4], raw))
    return folder


def write_archive(folder: Path, monkeypatch, *extra: tarfile.TarInfo) -> Path:
    """An archive of the same files, whose checksum is taken for the official one."""
    path = folder / data.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in cifar_files().items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
        for member in extra:
            tar.addfile(member)
    monkeypatch.setattr(data, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def write_latents(folder: Path, rows: int = 40, meta=None, **arrays: np.ndarray | None) -> Path:
    """A good folder of latents with labels; arrays replaces some of them, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(1)
    good = {
        "latents": draw.standard_normal((rows, 4, 8, 6)).astype(np.float16),
        "labels": np.arange(rows) * 5 // rows,
    }
    for name, array in (good | arrays).items():
        if array is not None:
            np.save(folder / f"{name}.npy", array, allow_pickle=True)
    (folder / "meta.json").write_text(json.dumps({} if meta is None else meta))
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(data, "RECORDS", N)


def cifar10(folder: Path) -> data.Cifar10:
    return data.Cifar10(data.Cifar10.Options(data=str(folder)))


def read_latents(folder: Path) -> data.Latents:
    return data.Latents(data.Latents.Options(data=str(folder)))


@pytest.fixture
def cifar(tmp_path):
    return cifar10(write_cifar(tmp_path / "cifar"))


def identity(x0: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x0]


# --------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_is_a_pure_function_of_its_numbers(cifar, tmp_path):
    again = cifar10(tmp_path / "cifar")
    later = [
        again.batch(3, n, 8) for n in (12, 7, 40)
    ]  # in another order, with other epochs cached
    for n, batch in zip((12, 7, 40), later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, cifar.batch(3, n, 8), strict=True))
    assert not torch.equal(cifar.batch(3, 7, 8)[0], cifar.batch(4, 7, 8)[0])
    assert not torch.equal(cifar.batch(3, 1, 8)[0], cifar.batch(4, 0, 8)[0])


@pytest.mark.parametrize("size", [7, 32, 100, 250])
def test_every_example_once_an_epoch(cifar, size):
    """100 examples: also where a batch spans two epochs (7, 32) or is longer than one (250)."""
    steps = 700 // size + 1
    rows = [cifar.rows(5, n, size) for n in range(steps)]
    seen = [x for some in rows for x in identity(cifar.gather(some)[0])]
    epochs = [seen[i : i + 100] for i in range(0, len(seen) - 99, 100)]
    assert all(len(set(epoch)) == 100 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in its own order


def test_micro_batches_are_the_parts_of_one_batch(cifar):
    for n in range(9):
        parts = [cifar.batch(1, n, 8, micro, 2) for micro in (0, 1)]
        halves = [cifar.rows(1, n, 8, micro, 2) for micro in (0, 1)]
        assert (cifar.rows(1, n, 16) == np.concatenate(halves)).all()
        for half, (x0, labels) in zip(halves, parts, strict=True):
            pictures, known = cifar.gather(half)
            assert torch.equal(labels, known)
            plain = cifar.prepare(pictures)  # a batch has some of them mirrored
            same = (x0 == plain).flatten(1).all(1)
            assert torch.equal(x0[~same], plain[~same].flip(3))


def test_labels_stay_with_their_pictures(cifar):
    pictures, labels = cifar.gather(np.arange(6 * N))
    plain = cifar.prepare(pictures)
    known = dict(zip(identity(plain), labels.tolist(), strict=True))
    known |= dict(zip(identity(plain.flip(3)), labels.tolist(), strict=True))
    x0, labels = cifar.batch(0, 3, 50)
    assert [known[x] for x in identity(x0)] == labels.tolist()
    assert 5 < sum(x in identity(plain) for x in identity(x0)) < 45  # half of them are mirrored


# --------------------------------------------------------------------------------------------------
# CIFAR-10


def test_cifar_is_what_is_in_the_files(cifar):
    x0, labels = cifar.batch(0, 0, 4)
    assert x0.shape == (4, 3, 32, 32) and x0.dtype == torch.float32
    assert labels.shape == (4,) and labels.dtype == torch.int64
    assert len(cifar.train_rows) == 5 * N and cifar.x0.dtype == np.uint8
    x0, labels = cifar.held_out(1000)  # the test file, in its order, not mirrored
    raw = np.frombuffer(cifar_files()["test_batch.bin"], np.uint8).reshape(N, data.RECORD)
    assert (labels.numpy() == raw[:, 0]).all()
    pixel = raw[7, 1 + 2 * 1024 + 31 * 32 + 5]
    assert x0[7, 2, 31, 5].item() == pytest.approx(pixel / 127.5 - 1, abs=1e-6)
    spec = cifar.spec()
    assert (spec["shape"], spec["classes"], len(spec["names"])) == ([3, 32, 32], 10, 10)


def test_pictures_are_normalised_exactly_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    x0 = data.Cifar10.prepare(values)
    assert x0.dtype == torch.float32 and x0[0] == -1 and x0[255] == 1
    assert torch.allclose(x0 + x0.flip(0), torch.zeros(256), atol=1e-6)
    picture = values.reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    images = to_uint8(data.Cifar10.prepare(picture))
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert (images == picture.permute(0, 2, 3, 1).numpy()).all()


def test_archive_and_folders_hold_the_same(cifar, tmp_path, monkeypatch):
    write_cifar(tmp_path / "other/cifar-10-batches-bin")
    archive = write_archive(tmp_path, monkeypatch)
    for place in (tmp_path / "other", tmp_path, archive):
        found = cifar10(place)
        assert (found.x0 == cifar.x0).all() and (found.cond[0] == cifar.cond[0]).all()
    assert {f.name for f in tmp_path.iterdir()} == {"cifar", "other", data.ARCHIVE}  # none unpacked


def test_bad_cifar_files_are_named(tmp_path):
    good, size = cifar_files()["data_batch_3.bin"], N * data.RECORD
    bad = good[: 5 * data.RECORD] + bytes([10]) + good[5 * data.RECORD + 1 :]
    for raw, message in (
        (good[:-1], f"data_batch_3.bin in .* has {size - 1} bytes, not {size}:"),
        (good + b"\0", f"data_batch_3.bin in .* has {size + 1} bytes, not {size}:"),
        (b"", f"data_batch_3.bin in .* has 0 bytes, not {size}:"),
        (bad, "data_batch_3.bin in .* has a label 10; good ones are 0 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            cifar10(write_cifar(tmp_path, data_batch_3=raw))
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin is not among"):
        cifar10(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no cifar-10-binary.tar.gz and no .*: try --download"
    ):
        cifar10(tmp_path / "nowhere")


def test_an_archive_with_the_wrong_checksum_is_refused(tmp_path, monkeypatch):
    path = write_archive(tmp_path, monkeypatch)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"has the MD5 \w{32}, not \w{32}"):
        cifar10(tmp_path)


@pytest.mark.parametrize("name", ["/etc/data_batch_1.bin", "a/../../data_batch_1.bin", "link"])
def test_a_member_that_points_outside_is_refused(tmp_path, monkeypatch, name):
    member = tarfile.TarInfo(name)
    if name == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_archive(tmp_path, monkeypatch, member)
    with pytest.raises(ValueError, match=f"member '{name}' is a link or points outside"):
        cifar10(tmp_path)


def test_download_leaves_a_whole_archive_or_none(tmp_path, monkeypatch):
    (tmp_path / "origin").mkdir()
    archive = write_archive(tmp_path / "origin", monkeypatch)
    monkeypatch.setattr(data, "URL", archive.as_uri())
    data.download(tmp_path / "new")
    assert (tmp_path / "new" / data.ARCHIVE).read_bytes() == archive.read_bytes()
    monkeypatch.setattr(data, "URL", "file:///nowhere")
    data.download(tmp_path / "new")  # there already
    with pytest.raises(OSError, match="file:///nowhere could not be fetched into"):
        data.download(tmp_path / "none")
    monkeypatch.setattr(data, "URL", archive.as_uri())
    monkeypatch.setattr(data, "MD5", "0" * 32)
    with pytest.raises(ValueError, match="MD5"):
        data.download(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


# --------------------------------------------------------------------------------------------------
# Latents


def test_latents_with_labels(tmp_path):
    meta = {"scaling": 1.5, "shift": 0.25, "vae": "someone/vae", "classes": [*"abcdefg"]}
    latents = read_latents(write_latents(tmp_path, meta=meta))
    x0, labels = latents.batch(0, 0, 6)
    assert x0.shape == (6, 4, 8, 6) and x0.dtype == torch.float32 and labels.dtype == torch.int64
    stored, again = latents.gather(latents.rows(0, 0, 6))
    assert stored.dtype == torch.float16 and torch.equal(x0, stored.float())  # none mirrored
    assert torch.equal(labels, again)
    assert latents.spec() == {
        "shape": [4, 8, 6],
        "classes": 7,
        "names": meta.pop("classes"),
        "context": None,
        "pooled": None,
        "meta": asdict(data.Meta(**meta)),
        "released": None,
        "examples": 40,
        "digest": latents.spec()["digest"],
    }
    assert isinstance(latents.x0, np.memmap)
    assert read_latents(write_latents(tmp_path)).spec()["classes"] == 5  # by the labels themselves


def test_held_out_rows_are_never_trained_on(tmp_path):
    latents = read_latents(write_latents(tmp_path, rows=200))
    held_out = identity(latents.held_out(1000)[0])
    epoch = identity(latents.batch(0, 0, len(latents.train_rows))[0])
    assert (len(held_out), len(epoch), len({*held_out, *epoch})) == (10, 190, 200)
    assert len(latents.held_out(1000)[1].unique()) > 1  # though the labels are sorted
    assert identity(latents.held_out(4)[0]) == held_out[:4]


def test_latents_with_text(tmp_path):
    text = {
        "labels": None,
        "context": np.arange(40 * 3 * 5, dtype=np.float16).reshape(40, 3, 5),
        "pooled": np.arange(40 * 2, dtype=np.float32).reshape(40, 2),
    }
    latents = read_latents(write_latents(tmp_path, **text))
    spec = latents.spec()
    assert (spec["classes"], spec["context"], spec["pooled"]) == (0, [3, 5], [2])
    _, context, pooled = latents.batch(0, 1, 7)
    assert context.shape == (7, 3, 5) and pooled.shape == (7, 2)
    assert (context.dtype, pooled.dtype) == (torch.float16, torch.float32)  # travel as stored
    assert latents.held_out(1)[1].dtype == torch.float32
    assert torch.equal(context[:, 0, 0] / 15, pooled[:, 0] / 2)  # rows belong together


def test_a_spec_survives_a_checkpoint(tmp_path, cifar):
    for dataset in (cifar, read_latents(write_latents(tmp_path / "latents"))):
        torch.save(dataset.spec(), tmp_path / "spec.pt")
        assert torch.load(tmp_path / "spec.pt", weights_only=True) == dataset.spec()


X0, LABELS = np.zeros((40, 4, 8, 6), np.float16), np.arange(40)
CONTEXT, POOLED = np.zeros((40, 3, 5), np.float16), np.zeros((40, 2), np.float32)


@pytest.mark.parametrize(
    "message, arrays",
    [
        (r"latents.npy is missing", dict(latents=None)),
        (r"latents.npy has the shape \(40, 4, 8\), not \(N,C", dict(latents=X0[..., 0].copy())),
        (r"latents.npy is too small", dict(latents=X0[:1])),
        (r"latents.npy has the type <f4, not one of float16", dict(latents=X0.astype("<f4"))),
        (r"latents.npy has the type >f2, not one of float16", dict(latents=X0.astype(">f2"))),
        (r"latents.npy is damaged or no array of .*object", dict(latents=X0.astype(object))),
        (r"labels.npy is damaged or no array of .*object", dict(labels=[{}] * 40)),
        (r"labels.npy has the type <f8, not one of uint8", dict(labels=LABELS / 1)),
        (r"labels.npy has the shape \(40, 1\), not \(N,\)", dict(labels=LABELS[:, None])),
        (r"latents.npy has 40 rows, labels.npy has 39", dict(labels=LABELS[:39])),
        (r"labels.npy has labels -1 to 38, not 0 to 99,999", dict(labels=LABELS - 1)),
        (
            r"labels.npy has labels 0 to 39, not 0 to 2 by",
            dict(meta={"classes": [*"abc"]}, labels=LABELS),
        ),
        (r"must hold labels.npy, or .*neither there", dict(labels=None)),
        (r"must hold labels.npy, or .*both there", dict(context=CONTEXT)),
        (r"context.npy is missing", dict(labels=None, pooled=POOLED)),
        (r"pooled.npy is missing", dict(labels=None, context=CONTEXT)),
        (
            r"pooled.npy has the type <i8",
            dict(labels=None, context=CONTEXT, pooled=LABELS[:, None]),
        ),
        (r"pooled.npy has the shape", dict(labels=None, context=CONTEXT, pooled=CONTEXT)),
        (r"has 40 rows, pooled.npy has 39", dict(labels=None, context=CONTEXT, pooled=POOLED[1:])),
    ],
)
def test_bad_arrays_are_named(tmp_path, message, arrays):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_latents(write_latents(tmp_path, **arrays))


@pytest.mark.parametrize("cut", [-1, -2000, 60, 3, 0])
def test_a_truncated_or_padded_npy_is_refused(tmp_path, cut):
    path = write_latents(tmp_path) / "latents.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"latents.npy (is damaged|has \d+ bytes, not)"):
        read_latents(tmp_path)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(ValueError, match=f"has {len(whole) + 2} bytes, not {len(whole)}"):
        read_latents(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", "3", "\xff", '{"scaling": "a"}', '{"scaling": 0}', '{"scaling": NaN}'),
        *('{"shift": null}', '{"vae": 3}', '{"classes": "cat"}', '{"classes": [1]}'),
    ],
)
def test_a_bad_meta_is_named(tmp_path, text):
    (write_latents(tmp_path) / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"meta.json is damaged or no JSON object like"):
        read_latents(tmp_path)


def test_a_missing_meta_is_named(tmp_path):
    (write_latents(tmp_path) / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"meta\.json: No such file"):
        read_latents(tmp_path)


# --------------------------------------------------------------------------------------------------
# The VAE


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """A tiny random AutoencoderKL in a folder: 3 x 32 x 32 to 4 x 16 x 16."""
    reason = "the optional package diffusers is not installed: pip install diffusers"
    diffusers = pytest.importorskip("diffusers", reason=reason)
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Ten pictures of several sizes and modes in two classes, and files that are none."""
    draw = np.random.default_rng(2)
    for i in range(10):
        path = tmp_path / "tree" / ("cat", "dog")[i % 2] / f"{i}.{('png', 'JPEG')[i % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40 + i, 60 - i, 3), np.uint8)
        Image.fromarray(pixels[..., 0] if i == 4 else pixels).save(path)
    for name in ("dog/notes.txt", "dog/.hidden.png", "stray.png"):
        (tmp_path / "tree" / name).write_text("no picture")
    return tmp_path / "tree"


@pytest.fixture
def encode(tree, vae):
    return functools.partial(data.encode, images=tree, vae=vae, size=32, batch_size=3, device="cpu")


def test_encode_and_decode(tree, vae, tmp_path, encode):
    encode(out=tmp_path / "latents")
    latents = read_latents(tmp_path / "latents")
    assert latents.x0.shape == (10, 4, 16, 16)
    assert latents.cond[0].tolist() == [0] * 5 + [1] * 5 and latents.names == ["cat", "dog"]
    assert latents.meta == asdict(data.Meta(1.5, 0.25, vae))
    assert {f.name for f in (tmp_path / "latents").iterdir()} == {
        "latents.npy",
        "labels.npy",
        "meta.json",
    }
    model = data.load_vae(vae, "cpu")  # row 2 is cat/4.png, in grey
    x = torch.tensor(data.load_image(tree / "cat/4.png", 32)[None]) / 127.5 - 1
    with torch.no_grad():
        z = model.encode(x).latent_dist.mean
        again = model.decode(z).sample
    assert torch.allclose(torch.tensor(latents.x0[2]).float(), (z - 0.25) * 1.5, atol=2e-3)
    images = data.decode(torch.tensor(latents.x0[:]), latents.meta, "cpu")
    assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images[2].astype(int) - to_uint8(again)[0]).max() <= 1
    with pytest.raises(ValueError, match="holds latents already"):
        encode(out=tmp_path / "latents")


def test_an_image_is_cropped_in_the_middle(tmp_path):
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 6:14, 0] = 255  # the middle square is red
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = data.load_image(tmp_path / "a.png", 8)
    assert image.shape == (3, 8, 8) and (image[0] == 255).all() and (image[1:] == 0).all()


@pytest.mark.parametrize("torn", [0, 5, -10_000])
def test_a_stopped_encode_goes_on(tmp_path, monkeypatch, encode, torn):
    """Stopped in the third batch, the file torn inside a row (5) or inside the header (-10,000)."""
    encode(out=tmp_path / "whole")
    load, calls = data.load_image, []

    def stop_late(path, size):
        calls.append(path.name)
        if path.name == "3.JPEG":  # of the third batch
            raise KeyboardInterrupt
        return load(path, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "load_image", stop_late)
        encode(out=tmp_path / "stopped")
    part = tmp_path / "stopped/latents.npy.part"
    raw = part.read_bytes()
    assert 6 * 2048 < len(raw) < 7 * 2048 and not (tmp_path / "stopped/latents.npy").exists()
    with pytest.raises(FileNotFoundError, match=r"latents.npy is missing"):
        read_latents(tmp_path / "stopped")
    part.write_bytes(raw + b"\1" * torn if torn >= 0 else raw[:torn][:50])
    with pytest.raises(ValueError, match="of other images, --size, --vae or --text"):
        encode(out=tmp_path / "stopped", size=16)
    calls.clear()
    monkeypatch.setattr(data, "load_image", lambda p, s: calls.append(p) or load(p, s))
    encode(out=tmp_path / "stopped")
    assert len(calls) == (4 if torn >= 0 else 10)
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_ranks_encode_into_one_file(tmp_path, monkeypatch, encode):
    """Two ranks, of which one is stopped; then three go on: the bytes of one process."""
    encode(out=tmp_path / "whole")
    load, calls, out = data.load_image, [], tmp_path / "shared"

    def rank(rank, world, stop=""):
        def watched(path, size):
            calls.append(path.name)
            if path.name == stop:
                raise KeyboardInterrupt
            return load(path, size)

        monkeypatch.setattr(data, "load_image", watched)
        monkeypatch.setattr(data, "ranks", lambda: (rank, world))
        encode(out=out)

    with pytest.raises(ValueError, match=r"shared has 6 of 10 rows: a rank ended early"):
        rank(0, 2)  # batches 0 and 2
    with pytest.raises(KeyboardInterrupt):
        rank(1, 2, stop="9.JPEG")  # batches 1 and 3, of which the second fails
    calls.clear()
    rank(1, 3), rank(2, 3)
    assert calls == []  # batches 1 and 2 are there
    rank(0, 3)  # batches 0 and 3
    assert calls == ["9.JPEG"]
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [*out.glob("*.part")]


class Halved(torch.nn.Module):
    """A VAE as far as `encode` asks: pictures of half the size. It needs no package."""

    config = SimpleNamespace(
        block_out_channels=[8, 8], latent_channels=3, scaling_factor=1.5, shift_factor=0.25
    )

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=F.avg_pool2d(x, 2)))


ENCODE = f"""
import sys, time
sys.path[:0] = {[str(Path(data.__file__).parent), str(Path(__file__).parent)]!r}
import test_data, data
data.load_vae = lambda *args: test_data.Halved()
load, stay = data.load_image, lambda path: path.name == "9.JPEG" and time.sleep(600)
data.load_image = lambda path, size: stay(path) or load(path, size)
data.main()
"""


def test_a_killed_rank_ends_the_encoding_which_goes_on(tree, tmp_path, monkeypatch, kill_a_rank):
    """Two ranks of torchrun, of which one is killed in its second batch; then one process."""
    (tmp_path / "encode.py").write_text(ENCODE)
    out, how = tmp_path / "out", dict(images=tree, vae="halved", size=32, batch_size=3)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, tmp_path / "encode.py", "encode", *flags, "--out", out, "--device=cpu"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = out / "rows.part"
    while not rows.exists() or rows.read_bytes().count(1) < 9:
        assert job.poll() is None
        time.sleep(0.05)
    kill_a_rank(job)
    assert not (out / "latents.npy").exists()
    load, calls = data.load_image, []
    monkeypatch.setattr(data, "load_vae", lambda *args: Halved())
    monkeypatch.setattr(data, "load_image", lambda p, s: (calls.append(p.name), load(p, s))[1])
    data.encode(out=out, device="cpu", **how)
    assert calls == ["9.JPEG"]
    data.encode(out=tmp_path / "whole", device="cpu", **how)
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_next_pictures_are_read_while_the_vae_works(tmp_path, monkeypatch, encode):
    told, load, encoded = [], data.load_image, data.latents_of
    started = threading.Event()

    def watched(path, size):
        told.append(path.name)
        if path.stem == "6":  # of the second batch
            started.set()
        return load(path, size)

    def working(*args, **how):
        assert started.wait(10)  # else the second batch waits for the first
        return encoded(*args, **how)

    monkeypatch.setattr(data, "load_image", watched)
    monkeypatch.setattr(data, "latents_of", working)
    encode(out=tmp_path / "out")
    assert len(told) == 10


def test_latents_in_bf16_are_those_of_float32(vae):
    model, draw = data.load_vae(vae, "cpu"), np.random.default_rng(0)
    images, meta = draw.integers(0, 256, (4, 3, 32, 32), np.uint8), {"shift": 0.25, "scaling": 1.5}
    with torch.no_grad():
        run = functools.partial(data.latents_of, model, images, meta, torch.device("cpu"))
        exact, half = (run(bf16=bf16) for bf16 in (False, True))
    assert half.dtype == exact.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_bad_input_of_encode_and_decode(tree, vae, tmp_path, encode):
    out = tmp_path / "latents"
    with pytest.raises(ValueError, match="--size 33 is not a multiple of 2"):
        encode(out=out, size=33)
    with pytest.raises(ValueError, match="must hold at least two images"):
        data.encode(images=tree / "dog", out=out, vae=vae, device="cpu")
    with pytest.raises(ValueError, match=r"the VAE .*tree cannot be loaded"):
        encode(out=out, vae=str(tree))
    with pytest.raises(ValueError, match="cannot be loaded"):
        encode(out=out, device="nodevice")
    assert not out.exists()
    (tree / "dog/5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 pictures cannot be read.*dog/5\.png"):
        encode(out=out)
    x0 = torch.zeros(1, 16, 4, 4)
    with pytest.raises(ValueError, match="takes 4 channels"):
        data.decode(x0, {"scaling": 1.0, "shift": 0.0, "vae": vae}, "cpu")
    with pytest.raises(ValueError, match="names no VAE"):
        data.decode(x0, {"scaling": 1.0, "shift": 0.0, "vae": None}, "cpu")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="needs the optional package diffusers: pip install"):
        data.decode(
            torch.zeros(1, 4, 4, 4), {"scaling": 1.0, "shift": 0.0, "vae": "a/missing"}, "cpu"
        )
    with pytest.raises(ValueError, match="needs the optional package diffusers: pip install"):
        data.encode(images=tmp_path, out=tmp_path / "out", vae="a/missing", device="cpu")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# The command line


def test_bad_input_of_the_command_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    encode = f"encode --images {tmp_path} --out {tmp_path}/out --vae a/b"
    for line in ("download", encode, f"{encode} --batch-size 0", "encode", ""):
        monkeypatch.setattr(sys, "argv", ["data.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            data.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and "error: " in error


def test_the_command_runs_as_a_script():
    script = Path(data.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "encode" in done.stdout
