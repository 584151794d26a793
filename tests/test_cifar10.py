"""CIFAR-10 is what is in its files, and bad files end in one line."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import N, assert_one_line, cifar10, cifar_files, in_process, write_cifar

import train
from data import cifar10 as source
from data.pictures import to_uint8

pytestmark = pytest.mark.usefixtures("few_records")


def write_archive(folder: Path, monkeypatch) -> Path:
    """An archive of the same files, whose checksum is taken for the official one."""
    path = folder / source.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in cifar_files().items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    monkeypatch.setattr(source, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_cifar_is_what_is_in_the_files(cifar):
    x0, labels = cifar.batch(0, 0, 4)
    assert x0.shape == (4, 3, 32, 32) and x0.dtype == torch.float32
    assert labels.shape == (4,) and labels.dtype == torch.int64
    assert len(cifar.train_rows) == 5 * N and cifar.x0.dtype == np.uint8
    x0, labels = cifar.held_out(1000)  # the test file, in its order, not mirrored
    raw = np.frombuffer(cifar_files()["test_batch.bin"], np.uint8).reshape(N, source.RECORD)
    assert (labels.numpy() == raw[:, 0]).all()
    pixel = raw[7, 1 + 2 * 1024 + 31 * 32 + 5]
    assert x0[7, 2, 31, 5].item() == pytest.approx(pixel / 127.5 - 1, abs=1e-6)
    spec = cifar.spec()
    assert (spec["shape"], spec["classes"], len(spec["names"])) == ([3, 32, 32], 10, 10)


def test_pictures_are_normalised_exactly_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    x0 = source.Cifar10.prepare(values)
    assert x0.dtype == torch.float32 and x0[0] == -1 and x0[255] == 1
    assert torch.allclose(x0 + x0.flip(0), torch.zeros(256), atol=1e-6)
    picture = values.reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    images = to_uint8(source.Cifar10.prepare(picture))
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    assert (images == picture.permute(0, 2, 3, 1).numpy()).all()


def test_archive_and_folders_hold_the_same(cifar, tmp_path, monkeypatch):
    write_cifar(tmp_path / "other/cifar-10-batches-bin")
    archive = write_archive(tmp_path, monkeypatch)
    for place in (tmp_path / "other", tmp_path, archive):
        found = cifar10(place)
        assert (found.x0 == cifar.x0).all() and (found.cond[0] == cifar.cond[0]).all()
    there = {file.name for file in tmp_path.iterdir()}
    assert there == {"cifar", "other", source.ARCHIVE}  # none unpacked


def test_bad_cifar_files_are_named(tmp_path):
    good, size = cifar_files()["data_batch_3.bin"], N * source.RECORD
    bad = good[: 5 * source.RECORD] + bytes([10]) + good[5 * source.RECORD + 1 :]
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


def test_download_leaves_a_whole_archive_or_none(tmp_path, monkeypatch):
    (tmp_path / "origin").mkdir()
    archive = write_archive(tmp_path / "origin", monkeypatch)
    monkeypatch.setattr(source, "URL", archive.as_uri())
    source.download(tmp_path / "new")
    assert (tmp_path / "new" / source.ARCHIVE).read_bytes() == archive.read_bytes()
    monkeypatch.setattr(source, "URL", "file:///nowhere")
    source.download(tmp_path / "new")  # there already
    with pytest.raises(OSError, match="file:///nowhere could not be fetched into"):
        source.download(tmp_path / "none")
    monkeypatch.setattr(source, "URL", archive.as_uri())
    monkeypatch.setattr(source, "MD5", "0" * 32)
    with pytest.raises(ValueError, match="MD5"):
        source.download(tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_download_comes_before_the_data_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source, "download", lambda folder: print("fetched into", folder))
    args = ["--dataset", "cifar10", "--data", "here", "--download"]
    done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "no cifar-10-binary.tar.gz")
    assert done.stdout == "fetched into here\n"
