"""Each batch is a function of its number, and conditions are dropped as guidance needs it."""

import itertools
import os

import numpy as np
import pytest
import torch
from helpers import N, cifar10, identity, read_latents, write_latents

from data.base import Data, Dataset, seeded


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


def test_a_spec_survives_a_checkpoint(tmp_path, cifar):
    for dataset in (cifar, read_latents(write_latents(tmp_path / "latents"))):
        torch.save(dataset.spec(), tmp_path / "spec.pt")
        assert torch.load(tmp_path / "spec.pt", weights_only=True) == dataset.spec()


def test_the_digest_of_large_data(tmp_path):
    """A row that changes is seen, whichever it is. The file's time does not count, so that a copy
    is the same data."""
    path, seen = tmp_path / "x.npy", set()
    shape = (200, 16, 128, 128)  # 100 MB, which the file system does not store
    x0 = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    digest = lambda: Dataset(np.lib.format.open_memmap(path, "r")).digest
    seen.add(digest())
    for row in (1, 100, 199):
        x0[row] = 1
        x0.flush()
        seen.add(digest())
    assert len(seen) == 4
    os.utime(path, (0, 0))
    assert digest() in seen


def test_seeds_do_not_collide():
    numbers = itertools.product(range(10), range(10), range(5), range(4))
    assert len({seeded(*n).initial_seed() for n in numbers}) == 2000


# ---- what training drops, for guidance


@pytest.mark.parametrize("conditions", [1, 2, 3])
def test_a_tenth_of_the_examples_loses_all_conditions(conditions):
    """Each of n is dropped by itself at 0.1^(1/n): 0.1 of labels, 0.464 of SD3's three encoders."""
    n, nulls = 50_000, [torch.tensor(8)] * conditions
    labels = [torch.zeros(n).long()] * conditions
    dropped = torch.stack(Data().drop(labels, nulls, 0.1, torch.Generator())) == 8
    rate = 0.1 ** (1 / conditions)
    for share, expected in (
        (dropped.double().mean(1), rate),
        (dropped.all(0).double().mean(), 0.1),
    ):
        assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / n) ** 0.5
    text, null = torch.ones(100, 3, 2, dtype=torch.float16), torch.zeros(3, 2)
    (kept,) = Data().drop([text], [null], 0.5, torch.Generator())
    assert kept.dtype == torch.float32 and kept.unique().tolist() == [0, 1]


def test_parts_of_conditions_are_dropped_by_themselves():
    """As SD3's three encoders: two share tokens in channels, the third has tokens of its own."""
    cond = [torch.ones(20_000, 4, 5), torch.ones(20_000, 5)]
    parts = [
        [(0, slice(0, 2), slice(0, 3)), (1, slice(0, 3))],
        [(0, slice(0, 2), slice(3, 5)), (1, slice(3, 5))],
        [(0, slice(2, 4))],
    ]
    data, generator = Data(), torch.Generator().manual_seed(0)
    data.parts = parts
    context, pooled = data.drop(cond, [torch.zeros(4, 5), torch.zeros(5)], 0.1, generator)
    gone = torch.stack([(context[:, :2, :3] == 0).flatten(1).all(1), (pooled[:, 3:] == 0).all(1),
                        (context[:, 2:] == 0).flatten(1).all(1)])  # fmt: skip
    assert torch.equal(gone[0], (pooled[:, :3] == 0).all(1))
    assert torch.equal(gone[1], (context[:, :2, 3:] == 0).flatten(1).all(1))
    for share, expected in ((gone.double().mean(1), 0.464), (gone.all(0).double().mean(), 0.1)):
        assert (share - expected).abs().max() < 0.02
    assert cond[0].min() == 1  # the data are not changed
