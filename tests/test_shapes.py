"""The laboratory of text: what is drawn, what is read, and a model of it through the commands."""

import itertools
import json
import math
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_one_line, in_process
from PIL import Image

import sample
import train
from data import shapes
from data.shapes import CAPTIONS, NEW, PAIRS, UNSEEN, VOCABULARY, Shapes
from rf import EDM, Cosine, RectifiedFlow, expand, formulation, guide, solve
from training.options import Recipe

ONE, TWO = "a red circle", "a yellow cross right of a blue square"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures():
    """400 captions, half of them of unseen pairs, and their pictures."""
    g = seeded()
    rows = torch.cat([shapes.draw_rows(200, g), shapes.draw_rows(200, g, new=True)])
    return rows, shapes.paint(rows, g)


# ---- captions


def test_there_are_2328_captions_of_16_words():
    assert len(CAPTIONS) == 24 + 4 * 24**2 and len(VOCABULARY) == len(set(VOCABULARY)) == 16
    assert {word for caption in CAPTIONS for word in caption.split()} == set(VOCABULARY)
    assert max(len(caption.split()) for caption in CAPTIONS) == shapes.WORDS == 8


@pytest.mark.parametrize(
    "caption, canonical",
    [
        ("a red circle", "a red circle"),
        ("a red circle left of a blue square", "a red circle left of a blue square"),
        ("a red circle right of a blue square", "a blue square left of a red circle"),
        ("a black cross above a red cross", "a black cross above a red cross"),
        ("a black cross  below a red cross", "a red cross above a black cross"),
    ],
)
def test_captions_are_rendered_and_read_back(caption, canonical):
    for seed in range(5):
        x0 = shapes.render(caption, seeded(seed))
        assert x0.shape == (3, 32, 32) and x0.min() >= -1 and x0.max() == 1
        assert shapes.read(x0) == shapes.read(x0[None]) == [canonical]
    assert torch.equal(shapes.render(caption, seeded(3)), shapes.render(caption, seeded(3)))
    assert not torch.equal(shapes.render(caption, seeded(3)), shapes.render(caption, seeded(4)))


@pytest.mark.parametrize(
    "caption, says",
    [
        ("a pink circle", "unknown word 'pink'; the vocabulary is a, red, green"),
        ("a circle red", "'a circle red' is not like 'a red circle' or"),
        ("a red circle of a blue square", "is not like"),
        ("", "is not like"),
    ],
)
def test_bad_captions_say_what_is_good(caption, says):
    with pytest.raises(ValueError, match=says):
        shapes.render(caption)


def test_conditions_tell_captions_apart_and_the_bag_is_coarse():
    rows = torch.arange(len(CAPTIONS))
    context, pooled = shapes.conditions_of(rows)
    assert context.shape == (2328, 8, 24) and pooled.shape == (2328, 16)
    assert (shapes.rows_of(context) == rows).all()
    assert len(context.flatten(1).unique(dim=0)) == 2328  # c_ctxt tells them all
    bag = lambda caption: pooled[shapes.row_of(caption)]
    assert bag("a red circle above a blue square").equal(bag("a blue circle above a red square"))
    assert not bag("a red circle above a blue square").equal(
        bag("a red circle below a blue square")
    )
    assert (context[shapes.row_of("a red circle"), 3:] == 0).all()  # no word, no place


def test_unseen_pairs_never_occur_in_training():
    assert len(UNSEEN) == 6 and {colour for colour, _ in UNSEEN} == set(shapes.COLOURS)
    rows = torch.cat([Shapes.examples(200, seeded(i))[1] for i in range(20)])
    named = [CAPTIONS[[*CAPTIONS][row]][1] for row in shapes.rows_of(rows).tolist()]
    assert not {pair for objects in named for pair in objects} & UNSEEN
    assert {pair for objects in named for pair in objects} == set(PAIRS) - UNSEEN
    alone = sum(len(objects) == 1 for objects in named) / len(named)
    assert abs(alone - 0.2) < 5 * (0.16 / len(named)) ** 0.5
    new = [CAPTIONS[[*CAPTIONS][row]][1] for row in shapes.draw_rows(500, seeded(), new=True)]
    assert all(set(objects) & UNSEEN for objects in new)


@pytest.mark.parametrize("n", [2, 7, 400])
def test_half_of_the_conditions_name_an_unseen_pair(n):
    context, _ = Shapes.conditions({}, n, generator=seeded())
    assert NEW[shapes.rows_of(context)].sum() == n // 2


def test_the_last_row_is_the_null_condition():
    network = Shapes.network({}, Recipe(depth=1))
    for null, cond in zip(
        network.null_cond, shapes.conditions_of(torch.tensor([shapes.NONE])), strict=True
    ):
        assert torch.equal(null.expand_as(cond[0]), cond[0])
    assert shapes.rows_of(network.null_cond[0][None]).tolist() == [shapes.NONE]


def shares():
    """The probability (2328,) of each caption in training: a fifth has one of the 18 seen pairs."""
    one, two = 0.2 / 18, 0.8 / (4 * 18**2)
    p = [one if len(objects) == 1 else two for _, objects in CAPTIONS.values()]
    return torch.tensor(p, dtype=torch.float64) * ~NEW


def test_captions_are_drawn_with_their_shares():
    n = 500_000
    counts, p = shapes.draw_rows(n, seeded()).bincount(minlength=len(CAPTIONS)), shares()
    assert p.sum() == pytest.approx(1)
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


# ---- pictures


def test_masks_have_the_areas_of_their_shapes():
    areas = {"circle": np.pi * 25, "square": 81, "triangle": 0.55 * 100}
    areas["cross"] = 2 * 10 * 3.2 - 3.2**2
    for mask, name in zip(shapes.masks(), shapes.SHAPES, strict=True):
        assert mask.sum().item() == pytest.approx(areas[name], rel=0.02)
        smooth = ((mask > 0) & (mask < 1)).any()
        assert smooth or name == "square"  # whose edges lie between pixels
        assert mask[0].sum() == mask[:, 0].sum() == 0 or name == "triangle"


def test_objects_of_a_picture_do_not_overlap(pictures):
    """So a picture of two is white plus the two differences, at all places."""
    for layout, ((r1, c1), (r2, c2)) in list(shapes.LAYOUTS.items())[1:]:
        last = lambda span: span[0] + span[1] - 1
        gap = c2[0] - last(c1) if layout == "left of" else r2[0] - last(r1)
        widest = max(mask.amax(0).nonzero().numel() for mask in shapes.masks())
        assert gap >= widest or gap >= max(
            mask.amax(1).nonzero().numel() for mask in shapes.masks()
        )
    _, x0 = pictures
    assert x0.min() == -1 and x0.max() == 1


# ---- the reader


@pytest.mark.parametrize("noise", [0, 0.1, 0.3])
def test_real_pictures_are_read_400_times_of_400(pictures, noise):
    rows, x0 = pictures
    noisy = x0 + noise * torch.randn(x0.shape, generator=seeded(1))
    verdict = shapes.verdicts(rows, noisy)
    assert [verdict[aspect] for aspect in shapes.ASPECTS] == [1.0] * 4
    distance = shapes.nearest(noisy)[1]
    spread = noise / (2 * 3 * 32 * 32) ** 0.5  # of the rms of so many normal values
    assert (distance - noise).abs().max() < 5 * spread + 1e-3  # the distance to the true picture


def test_the_reader_finds_the_nearest_picture():
    """Against every object drawn alone at every place, on inputs that are no pictures."""
    x0 = torch.rand(2, 3, 32, 32, generator=seeded()).double() * 2 - 1
    d = x0 - 1
    alone = {}  # what an object explains: |d|^2 - |d - object|^2, by drawing it
    spans = {
        span: range(span[0], sum(span))
        for zones in shapes.LAYOUTS.values()
        for z in zones
        for span in z
    }
    for zones in shapes.LAYOUTS.values():
        for rows, columns in zones:
            values = []
            for k, (i, j) in itertools.product(
                range(24), itertools.product(spans[rows], spans[columns])
            ):
                drawn = shapes.placed_masks()[k % 4, i, j] * shapes.paints()[k // 4][:, None, None]
                values.append((d**2 - (d - drawn) ** 2).flatten(1).sum(1))
            values = torch.stack(values).reshape(24, -1, len(x0)).amax(1)
            alone[rows, columns] = values.max(0)
    totals = torch.stack([sum(alone[z].values for z in zones) for zones in shapes.LAYOUTS.values()])
    best = totals.max(0)
    captions, distance, _ = shapes.nearest(x0)
    expected = ((d**2).flatten(1).sum(1) - best.values) / d[0].numel()
    torch.testing.assert_close(distance**2, expected)
    for i, k in enumerate(best.indices.tolist()):
        zones = [*shapes.LAYOUTS.values()][k]
        objects = [PAIRS[alone[z].indices[i]] for z in zones]
        assert captions[i] == shapes.phrase([*shapes.LAYOUTS][k], *objects)


def placed(caption, first, second):
    """Pictures of two objects at these places of their zones, drawn one by one."""
    layout, objects = CAPTIONS[caption]
    x0 = []
    for numbers in zip(first, second, strict=True):
        picture = torch.ones(3, 32, 32)
        for (rows, columns), (colour, shape), n in zip(
            shapes.LAYOUTS[layout], objects, numbers, strict=True
        ):
            row, column = rows[0] + n // columns[1], columns[0] + n % columns[1]
            mask = shapes.placed_masks()[[*shapes.SHAPES].index(shape), row, column]
            colour = torch.tensor(shapes.COLOURS[colour])[:, None, None]
            picture = mask * (2 * colour - 1) + (1 - mask) * picture
        x0.append(picture)
    return torch.stack(x0)


@pytest.mark.parametrize("caption", [TWO, "a black cross below a yellow circle"])
def test_diversity_by_hand(caption):
    every = [*itertools.product(range(32), repeat=2)]
    free = placed(caption, *zip(*every[::3], strict=True))
    expected = torch.tensor(every[::3])
    if caption == TWO:
        assert torch.equal(shapes.nearest(free)[2], expected)
    same = lambda **found: pytest.approx(found, abs=1e-9)
    found = lambda *at: {
        key: x
        for key, x in shapes.diversity(caption, placed(caption, *at)).items()
        if key != "floor"
    }
    once = found(*zip(*every, strict=True))
    assert abs(once.pop("mutual")) > 0.1  # a plain grid is less than chance
    assert once == same(tv=0, chi2=0, same=0)
    tied = found(range(32), range(32))
    assert tied == same(tv=0, chi2=0, mutual=0, same=0)  # no two are alike: shuffling changes none
    tied = found(4 * [*range(32)], 4 * [*range(32)])
    assert tied["mutual"] > 1 and tied["same"] == pytest.approx(32 * 4 * 3 * 1024 / (128 * 127))
    collapsed = found([5] * 10, [7] * 10)
    assert collapsed == same(tv=31 / 32, chi2=10, mutual=0, same=32**2)
    other = shapes.render("a red circle")
    assert shapes.diversity(caption, torch.stack([*free, other])) == shapes.diversity(caption, free)
    assert all(map(math.isnan, shapes.diversity(caption, torch.stack([other] * 2)).values()))


def test_true_pictures_have_the_floors_in_the_mean():
    """Of 40 draws of 64 pictures, within four standard errors."""
    rows = torch.full((64,), shapes.row_of(TWO))
    draws = [shapes.diversity(TWO, shapes.paint(rows, seeded(i))) for i in range(40)]
    for key, mean in dict(tv=draws[0]["floor"], chi2=1, mutual=0, same=1).items():
        values = torch.tensor([d[key] for d in draws])
        assert abs(values.mean() - mean) < 4 * values.std() / 40**0.5, key
        assert values.std() > 0


def test_verdicts_by_hand():
    want = lambda *captions: torch.tensor([shapes.row_of(c) for c in captions])
    x0 = shapes.render("a red circle left of a blue square", seeded())[None]
    for caption, right in (
        ("a blue square right of a red circle", (1, 1, 1, 1)),
        ("a blue circle left of a red square", (0, 1, 1, 1)),
        ("a red circle above a blue square", (0, 1, 1, 0)),
        ("a blue square left of a red circle", (0, 1, 1, 0)),
        ("a red circle left of a blue cross", (0, 1, 0, 1)),
        ("a red circle left of a green square", (0, 0, 1, 1)),
        ("a red circle", (0, 0, 0, 0)),
    ):
        assert tuple(shapes.verdicts(want(caption), x0).values())[:4] == right, caption


# ---- the exact field


@cache
def all_pictures(caption):
    """Every picture (m,3,32,32) of a caption, in float64, drawn pixel by pixel."""
    layout, objects = CAPTIONS[caption]
    spots = [itertools.product(*(range(s, s + n) for s, n in z)) for z in shapes.LAYOUTS[layout]]
    pictures = []
    for places in itertools.product(*spots):
        x0 = torch.ones(3, 32, 32, dtype=torch.float64)
        for (colour, shape), (i, j) in zip(objects, places, strict=True):
            mask = shapes.masks()[[*shapes.SHAPES].index(shape)].double()
            paint = shapes.paints()[[*shapes.COLOURS].index(colour)].double()
            x0[:, i - 6 : i + 7, j - 6 : j + 7] += paint[:, None, None] * mask
        pictures.append(x0)
    return torch.stack(pictures)


def brute_force(z, t, path, caption):
    """log p_t(z), E[x0 | z] and E[eps | z] for one z (3,32,32), over all pictures."""
    x0, t = all_pictures(caption), torch.tensor(t, dtype=torch.float64)
    a, b = path.a(t), path.b(t)
    log_p = -0.5 * ((z - a * x0) ** 2 / b**2 + torch.log(2 * math.pi * b**2)).sum((1, 2, 3))
    weights = log_p.softmax(0)[:, None, None, None]
    log_density = log_p.logsumexp(0) - math.log(len(x0))
    return log_density, (weights * x0).sum(0), (weights * (z - a * x0) / b).sum(0)


def conditions(*captions):
    return shapes.conditions_of(torch.tensor([shapes.row_of(caption) for caption in captions]))


def noised(caption, t, path, n=1, seed=0):
    """z_t (n,3,32,32) of pictures of a caption, in float64."""
    g = seeded(seed)
    x0 = shapes.paint(torch.full((n,), shapes.row_of(caption)), g).double()
    return path.interpolate(x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), t)


@pytest.mark.parametrize("path", [RectifiedFlow(), Cosine(), EDM()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("given", [ONE, TWO, "a purple triangle below a black circle"])
def test_the_posterior_equals_brute_force_over_all_pictures(given, path):
    """The softmax over all pictures of a caption, drawn one by one, also where z is of another."""
    for t, shown in ((0.3, given), (0.8, ONE), (0.95, given)):
        z = noised(shown, t, path)
        expected = brute_force(z[0], t, path, given)
        found = shapes.posterior(z, t, path, *conditions(given))
        torch.testing.assert_close(found[0][0], expected[0], rtol=1e-12, atol=1e-12)
        for end, truth in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(end[0], truth, rtol=1e-12, atol=1e-12)
        velocity = path.derivative(*expected[1:], torch.tensor(t, dtype=torch.float64))
        v = shapes.field(path, [given])(z, t)[0]
        torch.testing.assert_close(v, velocity, rtol=1e-12, atol=1e-12 * velocity.abs().max())


@pytest.mark.parametrize("shown", [ONE, TWO])
def test_without_a_caption_it_is_the_mean_over_captions(shown):
    """E[x0 | z] = sum_c p(c) p_t(z | c) E[x0 | z, c]/p_t(z): all captions c that training draws."""
    path, t, rows = RectifiedFlow(), 0.96, shares().nonzero()[:, 0]
    z = noised(shown, t, path, seed=1)
    repeated = z.expand(len(rows), -1, -1, -1)
    log_p, *ends = shapes.posterior(repeated, t, path, *shapes.conditions_of(rows))
    joint = shares()[rows].log() + log_p
    weights = joint.softmax(0)[:, None, None, None]
    assert weights.max() < 0.3  # many captions are possible
    log_density, *found = shapes.posterior(z, t, path)
    torch.testing.assert_close(log_density[0], joint.logsumexp(0), rtol=1e-12, atol=1e-12)
    for end, given in zip(found, ends, strict=True):
        torch.testing.assert_close(end[0], (weights * given).sum(0), rtol=1e-12, atol=1e-12)


def test_the_score_is_the_gradient_of_the_log_density():
    """grad log p_t(z) = (a E[x0 | z] - z)/b^2 = -E[eps | z]/b, with and without captions."""
    path, t = RectifiedFlow(), torch.tensor([0.2, 0.6, 0.9, 0.9], dtype=torch.float64)
    cond = [torch.cat([c, 0 * c[:1]]) for c in conditions(ONE, TWO, ONE)]
    z = torch.cat([noised(TWO, t[i].item(), path, seed=i) for i in range(4)]).requires_grad_()
    log_p, x0, eps = shapes.posterior(z, t, path, *cond)
    (score,) = torch.autograd.grad(log_p.sum(), z)
    a, b = expand(path.a(t), z), expand(path.b(t), z)
    torch.testing.assert_close(score, (a * x0 - z) / b**2, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score, -eps / b, rtol=1e-9, atol=1e-9)


def test_samples_of_the_exact_field_are_true_pictures(pictures):
    """In 25 Euler steps: of their captions, also of unseen pairs; without any, of seen ones."""
    rows = pictures[0][190:210]
    noise = torch.randn(len(rows), 3, 32, 32, generator=seeded(), dtype=torch.float64)
    v = shapes.field(RectifiedFlow())
    x0 = solve(v, noise, *shapes.conditions_of(rows), steps=25)
    assert shapes.verdicts(rows, x0)["all right"] == 1
    free = solve(v, noise, steps=25)
    for x in (x0, free):  # the nearest picture, to rounding
        given = shapes.conditions_of(rows) if x is x0 else []
        torch.testing.assert_close(shapes.posterior(x, 0.0, RectifiedFlow(), *given)[1], x)
    captions, distance, _ = shapes.nearest(free)
    assert distance.max() < 1e-3 and len(set(captions)) > 15
    assert not NEW[[shapes.row_of(caption) for caption in captions]].any()


def test_the_exact_field_has_the_calls_of_a_network():
    path, t = RectifiedFlow(), torch.tensor([0.7, 0.8, 0.9])
    z = torch.cat([noised(TWO, x.item(), path) for x in t]).float()
    v, cond = shapes.field(path), conditions(ONE, TWO, ONE)
    with_captions, without = v(z, t, *cond), v(z, t)
    assert with_captions.dtype == torch.float32 and with_captions.shape == z.shape
    assert torch.equal(with_captions, shapes.field(path, [ONE, TWO, ONE])(z, t))
    one = shapes.field(path, [ONE])(z, t)  # for all rows
    torch.testing.assert_close(one[0], with_captions[0])
    torch.testing.assert_close(one[1], v(z[1:2], t[1:2], *conditions(ONE))[0])
    mixed = v(z, t, *(c * torch.tensor([1, 0, 1]).reshape(-1, *[1] * (c.dim() - 1)) for c in cond))
    torch.testing.assert_close(mixed[[0, 2]], with_captions[[0, 2]])
    torch.testing.assert_close(mixed[1], without[1])
    assert (without - with_captions).abs().amax((1, 2, 3)).min() > 0.01
    null = torch.zeros(8, 24), torch.zeros(16)
    guided = guide(v, null, 3.0)(z, t, *cond)
    torch.testing.assert_close(guided, without + 3 * (with_captions - without))


def test_at_t_0_the_picture_is_known_and_nothing_of_the_noise(pictures):
    rows, x0 = pictures
    for cond in (shapes.conditions_of(rows[:9]), []):  # seen pairs
        log_p, found, eps = shapes.posterior(x0[:9], 0.0, RectifiedFlow(), *cond)
        torch.testing.assert_close(found, x0[:9].double(), rtol=0, atol=1e-6)
        assert (eps.abs() < 1e-6).all() and log_p.isfinite().all()


@pytest.mark.parametrize("name", ["rf", "eps/cos", "edm(-1.20,1.20)"])
def test_errors_are_zero_of_the_best_network_and_its_loss_is_the_floor(name):
    f, data = formulation(name), Shapes(None)

    def best(z_in, t, *cond):
        ends = shapes.posterior(z_in.double() / expand(f.path.c_in(t), z_in), t, f.path, *cond)[1:]
        return f.pair(*ends, t.double())[1].float()

    model = lambda network: SimpleNamespace(guided=lambda: network, objective=f, device="cpu")
    errors = {
        scale: data.errors(model(lambda *args, scale=scale: scale * best(*args)), 12)
        for scale in (1, 0, 1.1)
    }
    loss, floor, error, power = errors[1].T
    torch.testing.assert_close(loss, floor)
    assert errors[1].shape == (8, 4) and error.max() < 1e-8
    assert floor[-1] > 1e3 * floor[0].clamp(min=1e-9) or name != "rf"  # much noise hides more
    torch.testing.assert_close(errors[0][:, 1:3], torch.stack([floor, power], dim=1))
    torch.testing.assert_close(errors[1.1][:, 2], 0.01 * power, rtol=1e-3, atol=1e-7)
    held_out = data.held_out(12)
    if name == "rf":  # of the answer 0, E|eps - x0|^2
        expected = 1 + held_out[0].square().mean().item()
        assert errors[0][:, 0].mean().item() == pytest.approx(expected, rel=0.05)
    assert loss.mean().item() == pytest.approx(train.validation_loss(best, f, *held_out), rel=1e-5)


# ---- a model of it


def test_both_conditions_are_dropped_together():
    cond = Shapes.examples(4000, seeded())[1:]
    null = [torch.zeros(8, 24), torch.zeros(16)]
    context, pooled = Shapes(Shapes.Options()).drop(cond, null, 0.1, seeded(1))
    gone = (context == 0).flatten(1).all(1)
    assert torch.equal(gone, (pooled == 0).all(1))
    assert abs(gone.double().mean() - 0.1) < 5 * (0.09 / 4000) ** 0.5
    assert torch.equal(context[~gone], cond[0][~gone])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Forty steps of a model of depth 1, by the command."""
    out = tmp_path_factory.mktemp("shapes") / "run"
    quick = dict(
        depth=1, steps=40, batch_size=8, warmup=2, log_every=10, eval_every=40, validation=8
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "recipe", quick | {"precision": "fp32"})
        patch.setattr(Shapes, "right", staticmethod(few(Shapes.right)))
        patch.setattr(sys, "argv", ["train.py", "--dataset", "shapes", "--out", str(out)])
        train.main()
    return out


def few(right):
    return lambda model, n, new=False, **how: right(model, 4, new, **how)


def test_a_run_ends_with_its_table_and_its_sheet(model, capsys, monkeypatch, own_process):
    """The report of a run, and its pictures."""
    assert Image.open(model / "samples.png").size[0] > 800
    log = (model / "log.jsonl").read_text()
    assert "right" in log and 0 < json.loads(log.splitlines()[-1])["excess"] < 10
    monkeypatch.setattr(Shapes, "right", staticmethod(few(Shapes.right)))
    sampler = sample.load(model / "checkpoint.pt")
    Shapes(None).report(sampler, model)
    printed = capsys.readouterr().out
    texts = ("all right", "relation", "guidance 3, seen", "guidance 1, unseen", "exact floor 0.0")
    for text in (*texts, "relative excess: whole"):
        assert text in printed
    assert sampler.cfg == 3.0


def test_prompts_are_drawn_at_the_model_s_own_guidance(model, tmp_path, monkeypatch):
    prompts = ["a red circle", "a blue square below a black cross"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    for flags in (
        ["--prompt", prompts[0], "--prompt", prompts[1], "--out", one],
        ["--prompts", tmp_path / "prompts.txt", "--out", other, "--cfg", 3],
        ["--prompt", *prompts, "--out", tmp_path / "x.png"],
    ):
        args = ["sample.py", model / "checkpoint.pt", "--steps", 2, *flags]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in args])
        sample.main()
    arrays = np.load(one)
    assert (
        arrays["arr_0"].shape == (2, 32, 32, 3)
        and (arrays["arr_0"] == np.load(other)["arr_0"]).all()
    )
    rows = shapes.rows_of(torch.tensor(arrays["arr_1"]))
    assert [[*CAPTIONS][row] for row in rows] == prompts
    assert Image.open(tmp_path / "x.png").size[0] > 200


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--prompt", "a pink circle"], "unknown word 'pink'; the vocabulary is a, red"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--label", "1"], "--label 1: this model takes a --prompt"),
        (["--data", "x"], "--data x: this model takes a --prompt"),
        (["--prompt", "a red circle", "--no-t5"], "--no-t5 is for a model with SD3's text"),
    ],
    ids=" ".join,
)
def test_bad_prompts_are_one_line(model, tmp_path, monkeypatch, capsys, flags, says):
    args = [model / "checkpoint.pt", *flags]
    assert_one_line(in_process(sample.main, args, tmp_path, monkeypatch, capsys), says)


def test_a_prompt_for_a_model_without_text_is_one_line(finished, tmp_path, monkeypatch, capsys):
    args = [finished[0] / "checkpoint.pt", "--prompt", "a red circle"]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "--prompt 'a red circle': this model takes no text")


@pytest.mark.parametrize(
    "flags", [[], ["--guidance", "fixed", "--teacher-cfg", "3"]], ids=["sync", "fixed"]
)
def test_students_of_shapes(model, tmp_path, monkeypatch, capsys, own_process, flags):
    """Sync and fixed guidance train, sample and say which guidance they were trained for."""
    monkeypatch.setattr(Shapes, "right", staticmethod(few(Shapes.right)))
    args = ["--perflow", model / "checkpoint.pt", "--steps", 4, "--batch-size", 8, *flags]
    monkeypatch.setattr(
        sys, "argv", ["train.py", *map(str, args), "--out", str(tmp_path / "student")]
    )
    train.main()
    printed = capsys.readouterr().out
    assert "evaluations" in printed and "4 steps, 400 captions" in printed
    student = sample.load(tmp_path / "student" / "checkpoint.pt")
    assert student.cfg == (1.0 if flags else 3.0)
    assert ("guidance 3, seen" in printed) == (not flags)
    assert "excess" not in printed + (tmp_path / "student" / "log.jsonl").read_text()
