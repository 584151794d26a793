"""Folders of latents are read with doubt, and their VAE makes pictures of them."""

import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers import identity, read_latents, write_latents

from data import latents as source
from training.options import pick


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
        "meta": asdict(source.Meta(**meta)),
        "released": None,
        "parts": None,
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


def test_what_is_dropped_together_is_in_the_spec(tmp_path):
    """So a run goes on with its own parts only. A checkpoint of an older version has none."""
    text, specs = {"labels": None, "context": CONTEXT, "pooled": POOLED}, []
    for end in (1, 2):
        parts = [[[0, [0, 3], [0, end]], [1, [0, end]]], [[0, [0, 3], [end, 5]]]]
        specs.append(read_latents(write_latents(tmp_path, meta={"parts": parts}, **text)).spec())
        assert specs[-1]["parts"] == parts
    assert [key for key in specs[0] if specs[0][key] != specs[1][key]] == ["parts"]
    del specs[0]["parts"]
    assert pick(source.Latents.Spec, specs[0]).parts is None


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


# ---- The VAE


def test_latents_of_another_vae_are_not_decoded(vae):
    x0 = torch.zeros(1, 16, 4, 4)
    with pytest.raises(ValueError, match="takes 4 channels"):
        source.decode(x0, {"scaling": 1.0, "shift": 0.0, "vae": vae}, "cpu")
    with pytest.raises(ValueError, match="names no VAE"):
        source.decode(x0, {"scaling": 1.0, "shift": 0.0, "vae": None}, "cpu")


@pytest.mark.parametrize("name", ["mine.png", "other.npz"])
def test_latents_without_a_vae_overwrite_no_other_file(tmp_path, name):
    (tmp_path / "mine.npz").write_text("unrelated")
    x0, spec = torch.randn(2, 4, 4, 4), {"meta": None}
    for _ in range(2):  # again, it is the same file
        file = source.Latents.write(spec, tmp_path / name, x0)
    assert {each.name for each in tmp_path.iterdir()} == {"mine.npz", file.name}
    assert (tmp_path / "mine.npz").read_text() == "unrelated"
    assert file.name == name.replace(".png", ".png.npz")
    assert (np.load(file)["arr_0"] == x0.numpy()).all()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="needs the optional package diffusers: pip install"):
        source.decode(
            torch.zeros(1, 4, 4, 4), {"scaling": 1.0, "shift": 0.0, "vae": "a/missing"}, "cpu"
        )
