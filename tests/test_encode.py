"""Pictures become latents, whatever stops the command on its way; bad ones end in one line."""

import functools
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_one_line, in_process, read_latents
from PIL import Image

from data import encode as encoding
from data import latents
from data.pictures import to_uint8
from sd3 import text


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
    how = dict(images=tree, vae=vae, size=32, batch_size=3, device="cpu")
    return functools.partial(encoding.encode, **how)


def test_encode_and_decode(tree, vae, tmp_path, encode):
    encode(out=tmp_path / "latents")
    stored = read_latents(tmp_path / "latents")
    assert stored.x0.shape == (10, 4, 16, 16)
    assert stored.cond[0].tolist() == [0] * 5 + [1] * 5 and stored.names == ["cat", "dog"]
    assert stored.meta == asdict(latents.Meta(1.5, 0.25, vae))
    assert {f.name for f in (tmp_path / "latents").iterdir()} == {
        "latents.npy",
        "labels.npy",
        "meta.json",
    }
    model = latents.load_vae(vae, "cpu")  # row 2 is cat/4.png, in grey
    x = torch.tensor(encoding.load_image(tree / "cat/4.png", 32)[None]) / 127.5 - 1
    with torch.no_grad():
        z = model.encode(x).latent_dist.mean
        again = model.decode(z).sample
    assert torch.allclose(torch.tensor(stored.x0[2]).float(), (z - 0.25) * 1.5, atol=2e-3)
    images = latents.decode(torch.tensor(stored.x0[:]), stored.meta, "cpu")
    assert images.shape == (10, 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images[2].astype(int) - to_uint8(again)[0]).max() <= 1
    with pytest.raises(ValueError, match=r"holds latents.npy, labels.npy, meta.json;"):
        encode(out=tmp_path / "latents")


def test_an_image_is_cropped_in_the_middle(tmp_path):
    pixels = np.zeros((8, 20, 3), np.uint8)
    pixels[:, 6:14, 0] = 255  # the middle square is red
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = encoding.load_image(tmp_path / "a.png", 8)
    assert image.shape == (3, 8, 8) and (image[0] == 255).all() and (image[1:] == 0).all()


@pytest.mark.parametrize("torn", [0, 5, -10_000])
def test_a_stopped_encode_goes_on(tmp_path, monkeypatch, encode, torn):
    """Stopped in the third batch, the file torn inside a row (5) or inside the header (-10,000)."""
    encode(out=tmp_path / "whole")
    load, calls = encoding.load_image, []

    def stop_late(path, size):
        calls.append(path.name)
        if path.name == "3.JPEG":  # of the third batch
            raise KeyboardInterrupt
        return load(path, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "load_image", stop_late)
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
    monkeypatch.setattr(encoding, "load_image", lambda p, s: calls.append(p) or load(p, s))
    encode(out=tmp_path / "stopped")
    assert len(calls) == (4 if torn >= 0 else 10)
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_pictures_that_were_replaced_are_encoded_again(tree, tmp_path, monkeypatch, encode):
    """Stopped in the last of four batches; then a picture of the first has other pixels and the
    same name."""
    load, calls = encoding.load_image, []

    def watched(path, size):
        calls.append(path.name)
        if path.name == "9.JPEG" and len(calls) <= 10:
            raise KeyboardInterrupt
        return load(path, size)

    monkeypatch.setattr(encoding, "load_image", watched)
    with pytest.raises(KeyboardInterrupt):
        encode(out=tmp_path / "out")
    picture = Image.open(tree / "cat/2.png").rotate(90)
    picture.save(tree / "cat/2.png")
    calls.clear()
    calls.extend([""] * 10)
    encode(out=tmp_path / "out")
    assert {*calls[10:]} == {"0.JPEG", "2.png", "4.png", "9.JPEG"}
    encode(out=tmp_path / "whole")
    for name in ("latents.npy", "meta.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["labels.npy", "meta.json", "null.npz", "pooled.npy"])
def test_files_of_a_user_are_not_overwritten(tmp_path, encode, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"--out .* holds {name}; another --out keeps them"):
        encode(out=tmp_path)
    assert (tmp_path / name).read_text() == "mine" and not [*tmp_path.glob("*.part")]


@pytest.mark.parametrize("done", range(3))
def test_an_encode_that_was_stopped_while_it_named_its_files_goes_on(tmp_path, monkeypatch, done):
    """Stopped before, between and after the renames of two arrays: no picture is encoded again."""
    shapes, keys = {"latents": (2,), "context": (3,)}, np.arange(1, 5, dtype=np.uint64)
    meta, null = {"vae": "v"}, {"context": torch.ones(1, 3)}
    rows = [torch.full((4, n), float(n)) for n in (2, 3)]
    encoding.begin(tmp_path, meta, null, [], shapes)
    with encoding.open_parts(tmp_path, shapes, keys) as (_, write):
        write(0, rows)
    replace, unlink, calls = Path.replace, Path.unlink, []

    def stopping(what):
        def act(*args):
            calls.append(1)
            if len(calls) > done:
                raise KeyboardInterrupt
            what(*args)

        return act

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stopping(replace))
        patch.setattr(Path, "unlink", stopping(unlink))
        encoding.finish(tmp_path, shapes, keys)
    with pytest.raises(ValueError, match="of other images, --size, --vae or --text"):
        encoding.begin(tmp_path, {"vae": "w"}, null, [], shapes)
    encoding.begin(tmp_path, meta, null, [], shapes)
    with encoding.open_parts(tmp_path, shapes, keys) as (there, _):
        assert there.all()
    encoding.finish(tmp_path, shapes, keys)
    for name, expected in zip(shapes, rows, strict=True):
        assert (np.load(tmp_path / f"{name}.npy") == expected.numpy()).all()
    assert not [*tmp_path.glob("*.part")]


def test_ranks_encode_into_one_file(tmp_path, monkeypatch, encode):
    """Two ranks, of which one is stopped; then three go on: the bytes of one process."""
    encode(out=tmp_path / "whole")
    load, calls, out = encoding.load_image, [], tmp_path / "shared"

    def rank(rank, world, stop=""):
        def watched(path, size):
            calls.append(path.name)
            if path.name == stop:
                raise KeyboardInterrupt
            return load(path, size)

        monkeypatch.setattr(encoding, "load_image", watched)
        monkeypatch.setattr(encoding, "ranks", lambda: (rank, world))
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
sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]!r}
import test_encode
from data import encode as encoding
encoding.load_vae = lambda *args: test_encode.Halved()
load, stay = encoding.load_image, lambda path: path.name == "9.JPEG" and time.sleep(600)
encoding.load_image = lambda path, size: stay(path) or load(path, size)
encoding.main()
"""


def test_a_killed_rank_ends_the_encoding_which_goes_on(tree, tmp_path, monkeypatch, kill_a_rank):
    """Two ranks of torchrun, of which one is killed in its second batch; then one process."""
    (tmp_path / "encode.py").write_text(ENCODE)
    out, how = tmp_path / "out", dict(images=tree, vae="halved", size=32, batch_size=3)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, tmp_path / "encode.py", *flags, "--out", out, "--device=cpu"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = out / "rows.part"
    while not rows.exists() or np.count_nonzero(np.fromfile(rows, np.uint64)) < 9:
        assert job.poll() is None
        time.sleep(0.05)
    kill_a_rank(job)
    assert not (out / "latents.npy").exists()
    load, calls = encoding.load_image, []
    monkeypatch.setattr(encoding, "load_vae", lambda *args: Halved())
    monkeypatch.setattr(encoding, "load_image", lambda p, s: (calls.append(p.name), load(p, s))[1])
    encoding.encode(out=out, device="cpu", **how)
    assert calls == ["9.JPEG"]
    encoding.encode(out=tmp_path / "whole", device="cpu", **how)
    for name in ("latents.npy", "labels.npy", "meta.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_next_pictures_are_read_while_the_vae_works(tmp_path, monkeypatch, encode):
    told, load, encoded = [], encoding.load_image, encoding.latents_of
    started = threading.Event()

    def watched(path, size):
        told.append(path.name)
        if path.stem == "6":  # of the second batch
            started.set()
        return load(path, size)

    def working(*args, **how):
        assert started.wait(10)  # else the second batch waits for the first
        return encoded(*args, **how)

    monkeypatch.setattr(encoding, "load_image", watched)
    monkeypatch.setattr(encoding, "latents_of", working)
    encode(out=tmp_path / "out")
    assert len(told) == 10


def test_latents_in_bf16_are_those_of_float32(vae):
    model, draw = latents.load_vae(vae, "cpu"), np.random.default_rng(0)
    images, meta = draw.integers(0, 256, (4, 3, 32, 32), np.uint8), {"shift": 0.25, "scaling": 1.5}
    with torch.no_grad():
        run = functools.partial(encoding.latents_of, model, images, meta, torch.device("cpu"))
        exact, half = (run(bf16=bf16) for bf16 in (False, True))
    assert half.dtype == exact.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).square().mean().sqrt() < 0.02 * exact.std()


def test_bad_input_of_encode(tree, vae, tmp_path, encode):
    out = tmp_path / "latents"
    with pytest.raises(ValueError, match="--size 33 is not a multiple of 2"):
        encode(out=out, size=33)
    with pytest.raises(ValueError, match="must hold at least two images"):
        encoding.encode(images=tree / "dog", out=out, vae=vae, device="cpu")
    with pytest.raises(ValueError, match=r"the VAE .*tree cannot be loaded"):
        encode(out=out, vae=str(tree))
    with pytest.raises(ValueError, match="cannot be loaded"):
        encode(out=out, device="nodevice")
    assert not out.exists()
    (tree / "dog/5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 pictures cannot be read.*dog/5\.png"):
        encode(out=out)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"scaling_factor": "word"}, "scaling 'word' is not a number from 1e-09"),
        ({"scaling_factor": 0}, "scaling 0 is not a number"),
        ({"scaling_factor": float("nan")}, "scaling nan is not a number"),
        ({"shift_factor": "word"}, "shift 'word' is not a number"),
    ],
)
def test_a_vae_of_no_good_scale_is_refused(tree, tmp_path, monkeypatch, changed, says):
    model = Halved()
    model.config = SimpleNamespace(**vars(model.config) | changed)
    monkeypatch.setattr(encoding, "load_vae", lambda *args: model)
    with pytest.raises(ValueError, match=f"halved is damaged or no VAE: {says}"):
        encoding.encode(images=tree, out=tmp_path / "out", vae="halved", size=32, device="cpu")
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_no_fault_of_a_picture(tmp_path, monkeypatch, encode):
    def full(path, size):
        raise MemoryError

    monkeypatch.setattr(encoding, "load_image", full)
    with pytest.raises(MemoryError):
        encode(out=tmp_path / "out")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="needs the optional package diffusers: pip install"):
        encoding.encode(images=tmp_path, out=tmp_path / "out", vae="a/missing", device="cpu")
    assert not (tmp_path / "out").exists()


# ---- Captioned pictures


def test_captions_are_encoded_by_both_conventions(tiny_sd3, sd3_folder, texts):
    encoder = text.load(sd3_folder)
    for array, expected in zip(("context", "pooled"), encoder(tiny_sd3.CAPTIONS), strict=True):
        stored = np.load(texts / f"{array}.npy")
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, expected, rtol=1e-2, atol=1e-3)
    assert np.load(texts / "latents.npy").shape == (5, 4, 8, 8)
    learned = read_latents(texts)
    assert learned.meta["text"] == str(sd3_folder) and learned.meta["t5_tokens"] == 256
    spans = [[(i, *map(tuple, spans)) for i, *spans in part] for part in encoder.parts]
    slices = [[(i, *((s.start, s.stop) for s in at)) for i, *at in part] for part in learned.parts]
    assert slices == spans


def test_a_stopped_encode_of_captions_goes_on(
    tiny_sd3, sd3_folder, captioned, texts, tmp_path, monkeypatch
):
    def stop(path, size):
        if path.name == "4.png":
            raise KeyboardInterrupt
        return load(path, size)

    captioned = shutil.copytree(captioned, tmp_path / "captioned")
    (captioned / "0.txt").write_text("xyz")  # until it is stopped
    load, out = encoding.load_image, tmp_path / "out"
    monkeypatch.setattr(encoding, "load_image", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny_sd3.encode_captioned(captioned, sd3_folder, out)
    assert not (out / "latents.npy").exists()
    with (out / "context.npy.part").open("ab") as file:
        file.write(b"torn")
    with pytest.raises(ValueError, match="is of other images, --size, --vae or --text"):
        tiny_sd3.encode_captioned(captioned, sd3_folder, out, no_t5=True)
    monkeypatch.setattr(encoding, "load_image", load)
    (captioned / "0.txt").write_text(tiny_sd3.CAPTIONS[0])
    tiny_sd3.encode_captioned(captioned, sd3_folder, out)
    for name in ("latents", "context", "pooled"):
        assert (out / f"{name}.npy").read_bytes() == (texts / f"{name}.npy").read_bytes()


def test_bad_captions_are_one_line(sd3_folder, captioned, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(captioned, tmp_path / "copy")
    (copy / "more" / "4.txt").unlink()
    (copy / "metadata.jsonl").write_text("[]")
    args = ["--images", copy, "--text", sd3_folder, "--out", "x", "--size", "16"]
    done = in_process(encoding.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "metadata.jsonl is damaged or no lines of file_name and text")
    (copy / "metadata.jsonl").unlink()
    done = in_process(encoding.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "1.jpg has no caption: no .txt beside it, no line in metadata.jsonl")
    args = ["--images", copy, "--out", "x"]
    done = in_process(encoding.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "needs --vae, or --text")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("null", "the text None is not a str"),
        ("3", "the text 3 is not a str"),
        ('["a"]', "the text ['a'] is not a str"),
        (r'"\ud800"', "surrogates not allowed"),
    ],
)
def test_a_caption_is_text(tmp_path, text, says):
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a"}) for i in range(2)]
    for i in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows).replace('"a"', text, 1))
    with pytest.raises(ValueError, match=r"metadata.jsonl is damaged or no lines") as found:
        encoding.find_images(tmp_path, True)
    assert says in str(found.value)


def test_a_caption_is_as_it_was_written(tmp_path):
    """But for a byte order mark; whatever Unicode calls the end of a line is text, and there may be
    empty lines. Hidden folders hold no pictures."""
    captions = ["a\u2028b\x85c\x0cd", "e", "f"]
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(captions)]
    rows = [json.dumps(row, ensure_ascii=False) for row in rows[:2]]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(rows) + "\n", "utf-8")
    (tmp_path / "2.txt").write_text("\ufefff\n", "utf-8")
    for name in ("0.png", "1.png", "2.png", ".hidden/3.png", "k/.hidden/4.png", ".5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    files, texts = encoding.find_images(tmp_path, True)
    assert texts == captions and [file.name for file in files] == ["0.png", "1.png", "2.png"]


# ---- The command line


def test_bad_input_of_the_command_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    encode = f"--images {tmp_path} --out {tmp_path}/out --vae a/b"
    limits = [f"{encode} {flag}" for flag in ("--batch-size 0", "--batch-size 4097", "--size 8193")]
    for line in ("download", encode, *limits, "encode", ""):
        monkeypatch.setattr(sys, "argv", ["encode.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            encoding.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and "error: " in error
        assert (line in limits) == ("is not a whole number from 1 to" in error)


def test_the_command_runs_as_a_module():
    command, how = [sys.executable, "-m", "data.encode"], dict(capture_output=True, text=True)
    done = subprocess.run([*command, "--help"], cwd=ROOT, **how)
    assert done.returncode == 0 and "encode" in done.stdout
