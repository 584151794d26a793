"""The laboratory of text: drawn shapes with captions, their exact reader and their exact field.

A caption names one object, or two and their relation: "a red circle left of a blue square".
`render` draws it. `read` and `field`, which is u_t of (6), compare a picture with everything that
can be drawn, so they are exact. The two texts of SD3's section 4 are fixed vectors: c_ctxt has one
for each (word, place); c_vec counts the words, so it does not say which object has which colour.
Time: t = 0 is data, t = 1 is noise. Read next: `data/cifar10.py`."""

import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path as File
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.base import HELD_OUT, Data, has_truth, save, seeded, validation
from data.pictures import draw_captioned, to_uint8
from rf import Field, InputError, Pair, Path, expand

SIZE, HALF = 32, 6  # pixels of a picture; an object reaches 6 pixels around its centre
COLOURS = dict(
    red=(0.9, 0.1, 0.1), green=(0.1, 0.6, 0.1), blue=(0.1, 0.2, 0.9),
    yellow=(1.0, 0.85, 0.0), purple=(0.6, 0.1, 0.7), black=(0.0, 0.0, 0.0),
)  # fmt: skip
SHAPES = dict(  # whether a point, y downwards from the centre, is inside
    circle=lambda x, y: x**2 + y**2 <= 5**2,
    square=lambda x, y: np.maximum(abs(x), abs(y)) <= 4.5,
    triangle=lambda x, y: (y <= 4.5) & (abs(x) <= 0.55 * (y + 5.5)),
    cross=lambda x, y: (np.minimum(abs(x), abs(y)) <= 1.6) & (np.maximum(abs(x), abs(y)) <= 5),
)
LOW, MIDDLE, HIGH = (7, 4), (12, 8), (21, 4)  # first and number of the pixels where centres lie
LAYOUTS = {  # (rows, columns) of the first object's centre and of the second's
    "": [(MIDDLE, MIDDLE)],
    "left of": [(MIDDLE, LOW), (MIDDLE, HIGH)],
    "above": [(LOW, MIDDLE), (HIGH, MIDDLE)],
}
TURNED = {"right of": "left of", "below": "above"}  # the same layout, its objects exchanged
VOCABULARY = ("a", *COLOURS, *SHAPES, "left", "right", "above", "below", "of")
WORDS = 8  # in the longest caption
PAIRS = list(itertools.product(COLOURS, SHAPES))
UNSEEN = {  # never in training: a quarter of the pairs, one of each colour
    ("red", "triangle"), ("green", "circle"), ("blue", "cross"),
    ("yellow", "square"), ("purple", "triangle"), ("black", "circle"),
}  # fmt: skip


# ---- Captions: 24 name one object and 4 x 24^2 name two, so a caption is a row of a table
def phrase(relation: str, *pairs: tuple[str, str]) -> str:
    return f" {relation} ".join(f"a {colour} {shape}" for colour, shape in pairs)


CAPTIONS: dict[str, tuple[str, list[tuple[str, str]]]] = {  # caption: layout, objects in its order
    **{phrase("", pair): ("", [pair]) for pair in PAIRS},
    **{phrase(r, a, b): (r, [a, b]) for r in ("left of", "above") for a in PAIRS for b in PAIRS},
    **{phrase(r, b, a): (o, [a, b]) for r, o in TURNED.items() for a in PAIRS for b in PAIRS},
}
LAYOUT = torch.tensor([[*LAYOUTS].index(layout) for layout, _ in CAPTIONS.values()])  # (2328,)
NEW = torch.tensor([any(pair in UNSEEN for pair in pairs) for _, pairs in CAPTIONS.values()])
# (2328,2); a single object stands twice
OBJECTS = torch.tensor([[PAIRS.index(o) for o in (2 * b)[:2]] for _, b in CAPTIONS.values()])
NONE = len(CAPTIONS)  # the row of no caption: it has no words, so it is the null condition
SENTENCES = [[VOCABULARY.index(word) + 1 for word in c.split()] for c in (*CAPTIONS, "")]
IDS = torch.tensor([(ids + WORDS * [0])[:WORDS] for ids in SENTENCES])  # (2329,8); 0 is no word


def row_of(caption: str) -> int:
    """The row of a caption in the tables. ValueError on an unknown word or another sentence."""
    words = caption.split()
    for word in words:
        if word not in VOCABULARY:
            raise InputError(f"unknown word {word!r}; the vocabulary is {', '.join(VOCABULARY)}")
    if " ".join(words) not in CAPTIONS:
        like = "'a red circle' or 'a red circle left of a blue square'"
        raise InputError(f"the caption {caption!r} is not like {like}")
    return [*CAPTIONS].index(" ".join(words))


def conditions_of(rows: Tensor) -> list[Tensor]:
    """c_ctxt (n,8,24): 4 times a one-hot word beside its one-hot place, zeros for no word; without
    the 4 the network learns half as fast. c_vec (n,16): the count of each word."""
    words = F.one_hot(IDS[rows], len(VOCABULARY) + 1)[..., 1:].float()
    places = torch.eye(WORDS).expand(len(rows), -1, -1) * words.sum(-1, keepdim=True)
    return [4 * torch.cat([words, places], dim=-1), words.sum(1)]


def rows_of(context: Tensor) -> Tensor:
    """The rows (n,) of these c_ctxt (n,8,24); of zeros it is NONE."""
    words = context[..., : len(VOCABULARY)]
    ids = torch.where(words.amax(-1) > 0, words.argmax(-1) + 1, 0)
    return (ids[:, None] == IDS).all(-1).float().argmax(-1)


def draw_rows(n: int, generator: torch.Generator, new: bool = False) -> Tensor:
    """Rows of n captions, a fifth of one object, of seen pairs; if `new` each has an unseen one."""
    single = torch.rand(n, generator=generator) < 0.2
    allowed = NEW if new else ~NEW
    pools = [(allowed & layout).nonzero()[:, 0] for layout in (LAYOUT > 0, LAYOUT == 0)]
    u = torch.rand(n, generator=generator)
    two, one = (pool[(u * len(pool)).long()] for pool in pools)
    return torch.where(single, one, two)


# ---- Pictures
@cache
def masks() -> Tensor:
    """(4,13,13): the share of each pixel that a shape covers, counted at 8 x 8 points."""
    side = 2 * HALF + 1
    points = (np.arange(8 * side) + 0.5) / 8 - side / 2
    covered = np.stack([inside(*np.meshgrid(points, points)) for inside in SHAPES.values()])
    return torch.tensor(covered.reshape(4, side, 8, side, 8).mean((2, 4))).float()


@cache
def placed_masks() -> Tensor:
    """(4,32,32,32,32): the mask of each shape with its centre at (row, column); 0 near the rim."""
    placed = torch.zeros(len(SHAPES), *[SIZE] * 4)
    for row, column in itertools.product(range(HALF, SIZE - HALF), repeat=2):
        square = slice(row - HALF, row + HALF + 1), slice(column - HALF, column + HALF + 1)
        placed[(slice(None), row, column, *square)] = masks()
    return placed


@cache
def zones() -> list[list[Tensor]]:
    """Of each layout and each of its objects: the masks (4,P,1024) at the P places of its zone, in
    float64, as what is explained of a picture is the difference of large sums."""
    placed = placed_masks().double()
    cut = lambda r, c: placed[:, r[0] : sum(r), c[0] : sum(c)].reshape(4, -1, SIZE**2)
    return [[cut(*zone) for zone in layout] for layout in LAYOUTS.values()]


def paints() -> Tensor:
    """(6,3): the colours minus white, in the units of x0 in [-1, 1]."""
    return 2 * torch.tensor([*COLOURS.values()]) - 2


def paint(rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (n,3,32,32) of these captions, each object at a random place of its layout."""
    zones = torch.tensor([(2 * zones)[:2] for zones in LAYOUTS.values()])  # (3, object, axis, 2)
    first, number = zones[LAYOUT[rows]].unbind(-1)  # (n, object, axis)
    at = first + (torch.rand(first.shape, generator=generator) * number).long()
    colour, shape = OBJECTS[rows].div(4, rounding_mode="floor"), OBJECTS[rows] % 4  # (n, object)
    mask = placed_masks()[shape, at[..., 0], at[..., 1]][:, :, None]  # (n, object, 1, 32, 32)
    drawn = mask * paints()[colour][..., None, None]
    return 1 + drawn[:, 0] + drawn[:, 1] * (LAYOUT[rows] > 0)[:, None, None, None]


def render(caption: str, generator: torch.Generator | None = None) -> Tensor:
    """A picture (3,32,32) in [-1, 1] of this caption."""
    return paint(torch.tensor([row_of(caption)]), generator)[0]


# ---- The reader
def explained(d: Tensor, mask: Tensor, a: Tensor | float = 1) -> Tensor:
    """|d|^2 - |d - a o|^2 (n,24,P): what is explained of d (n,3,1024) by each pair, o = pair minus
    white, at each place of mask (4,P,1024)."""
    overlap = torch.einsum("nkx,spx,ck->ncsp", d, mask, paints().to(d)).flatten(1, 2)  # <d, o>
    power = paints().to(d).square().sum(1)[:, None] * mask[:, 0].square().sum(1)  # |o|^2 (6,4)
    return 2 * a * overlap - a**2 * power.reshape(-1, 1)


def nearest(x0: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """The captions of the true pictures nearest to x0 (n,3,32,32), their rms distances (n,), and
    the places (n,2) of their objects, numbers in their zones; one alone stands twice. An object
    explains |x0 - white|^2 - |x0 - object|^2; two do not overlap: they explain the sum."""
    if len(x0) > 500:  # to bound the memory
        captions, *tensors = zip(*map(nearest, x0.split(500)), strict=True)
        return [*itertools.chain(*captions)], *map(torch.cat, tensors)
    d = x0.cpu().double().flatten(2) - 1
    totals, found = [], []
    for layout in zones():
        best = [explained(d, mask).flatten(1).max(1) for mask in layout]
        totals.append(sum(b.values for b in best))
        at = torch.stack([b.indices for b in 2 * best][:2], dim=1)
        found.append((at // layout[0].shape[1], at % layout[0].shape[1]))
    total, layout = torch.stack(totals).max(0)
    pairs, places = (torch.stack(x)[layout, torch.arange(len(d))] for x in zip(*found, strict=True))
    captions = []
    for k, objects in zip(layout.tolist(), pairs.tolist(), strict=True):
        captions.append(phrase([*LAYOUTS][k], *[PAIRS[o] for o in objects][: len(zones()[k])]))
    distance = ((d.square().flatten(1).sum(1) - total).clamp(min=0) / d[0].numel()).sqrt()
    return captions, distance, places


def read(x0: Tensor) -> list[str]:
    """The canonical captions ("left of", "above") of pictures (n,3,32,32) or (3,32,32)."""
    return nearest(x0.reshape(-1, 3, SIZE, SIZE))[0]


ASPECTS = ("all right", "colours", "shapes", "relation")


def verdicts(rows: Tensor, x0: Tensor) -> dict[str, float]:
    """The shares of pictures that show all of their caption, its colours, its shapes, its relation;
    and the mean rms distance to the nearest true picture, whose pixels are in [-1, 1]."""
    table, known = [], [*CAPTIONS.values()]
    captions, distances, _ = nearest(x0)
    words = lambda objects, k: sorted(pair[k] for pair in objects)  # colours or shapes
    for row, caption in zip(rows.tolist(), captions, strict=True):
        (layout, objects), (seen_layout, seen) = known[row], CAPTIONS[caption]
        colours, shapes = (words(objects, k) == words(seen, k) for k in (0, 1))
        relation = layout == seen_layout and (objects == seen or objects != seen[::-1])
        table.append([known[row] == CAPTIONS[caption], colours, shapes, relation])
    shares = dict(zip(ASPECTS, torch.tensor(table).double().mean(0).tolist(), strict=True))
    return shares | {"distance": distances.mean().item()}


def diversity(caption: str, x0: Tensor) -> dict[str, float]:
    """How the places of two objects are spread, in those of x0 (n,3,32,32) that show all of this
    caption. True ones are uniform over P places each, and independent. The means over both objects
    of `tv`, the total variation, and `chi2`, chi^2 over its P - 1 degrees; `mutual`, their mutual
    information in nats, less that of shuffled pairs; `same`, P^2 times the share of pairs of
    pictures that are the same. In the mean true pictures have tv = `floor`, chi2 = 1, mutual = 0
    and same = 1. nan where fewer than two show the caption."""
    known = CAPTIONS[caption]
    captions, _, places = nearest(x0)
    at = places[[CAPTIONS[c] == known for c in captions]]
    n, P = len(at), zones()[[*LAYOUTS].index(known[0])][0].shape[1]
    if n < 2:
        return dict.fromkeys(("tv", "floor", "chi2", "mutual", "same"), math.nan)
    count = lambda x, size: torch.bincount(x, minlength=size).double()
    entropy = lambda counts: -torch.special.xlogy(counts / n, counts / n).sum().item()
    one = torch.stack([count(x, P) for x in at.T])  # (object, place)
    joint = lambda order: count(P * at[:, 0] + at[order, 1], P**2)
    paired, generator = joint(torch.arange(n)), torch.Generator().manual_seed(0)
    shuffled = [entropy(joint(torch.randperm(n, generator=generator))) for _ in range(32)]
    m = n // P  # the mean deviation of a binomial count, by de Moivre
    deviation = 2 * (m + 1) * math.comb(n, m + 1) * (P - 1) ** (n - m) / P ** (n + 1)
    return dict(
        tv=0.5 * (one / n - 1 / P).abs().sum(1).mean().item(),
        floor=0.5 * P * deviation / n,
        chi2=(n * P * (one / n - 1 / P).square().sum(1) / (P - 1)).mean().item(),
        mutual=sum(shuffled) / len(shuffled) - entropy(paired),
        same=(paired * (paired - 1)).sum().item() * P**2 / (n * (n - 1)),
    )


# ---- The exact field: a mixture of points takes softmaxes where the reader takes maxima
EXACT = dict(dtype=torch.float64, device="cpu")


@cache
def priors() -> Pair:
    """log P of each layout (2329,3), and of each pair as first and as second object (2329,2,24). A
    caption is sure of both. Without one, in the last row, they are the shares of `draw_rows`."""
    seen = torch.tensor([pair not in UNSEEN for pair in PAIRS]).double()
    layouts = torch.cat([F.one_hot(LAYOUT), torch.tensor([[0.2, 0.4, 0.4]], **EXACT)])
    pairs = torch.cat([F.one_hot(OBJECTS), (seen / seen.sum()).expand(1, 2, -1)])
    return layouts.log(), pairs.log()


def posterior(z: Tensor, t: Tensor | float, path: Path, *cond: Tensor) -> tuple[Tensor, ...]:
    """(3) log p_t(z) (n,), and the means of x0 and of eps given z_t = z (n,3,32,32), in float64.
    cond is a network's; none is the null condition: no caption. p_t is the mean of N(a x0, b^2 I)
    over all pictures x0. Two objects do not overlap: each multiplies the density of white by a
    factor, so each is summed over by itself. Where b = 0 nothing is known of eps: its mean is 0."""
    a, b, _, _ = path.coefficients(torch.as_tensor(t, **EXACT).reshape(-1, 1, 1))
    var = (b**2).clamp(min=1e-200)  # no 0/0 at t = 0
    d, colours = z.to(**EXACT).flatten(2) - a, paints().double()  # (n,3,1024), (6,3)
    rows = rows_of(cond[0].cpu()) if cond else torch.tensor([NONE])
    layouts, pairs = (prior[rows] for prior in priors())
    sums = []
    for total, zone_masks in zip(layouts.unbind(1), zones(), strict=True):
        mean = 0
        for pair, mask in zip(pairs.unbind(1), zone_masks, strict=False):  # one alone stands twice
            places = mask.shape[1]
            logits = explained(d, mask, a) / (2 * var) + pair[..., None] - math.log(places)
            chance = logits.flatten(1).softmax(1).reshape(-1, 6, 4, places)
            mean = mean + torch.einsum("ncsp,ck,spx->nkx", chance, colours, mask)
            total = total + logits.logsumexp((1, 2))
        sums.append((total, mean))
    total, mean = (torch.stack(x, dim=1) for x in zip(*sums, strict=True))  # (n,3), (n,3,3,1024)
    mean = torch.einsum("nl,nlkx->nkx", total.softmax(1), mean)  # E[x0 | z] less white
    eps = b * (d - a * mean) / var
    white = -0.5 * (d**2 / var + torch.log(2 * math.pi * var)).sum((1, 2))
    return white + total.logsumexp(1), (1 + mean).reshape(z.shape), eps.reshape(z.shape)


def field(path: Path, captions: Sequence[str] | None = None) -> Field:
    """(6), exact: u_t(z) = E[a' x0 + b' eps | z_t = z] as v(z, t, *cond). captions are one a row or
    one for all rows; without them v takes a network's conditions, or none. A picture is a point,
    so v has no limit at t = 0. A solver's last step should be Euler's: it ends at E[x0 | z]."""
    fixed = conditions_of(torch.tensor([row_of(c) for c in captions])) if captions else ()

    def velocity(z: Tensor, t: Tensor | float, *cond: Tensor) -> Tensor:
        _, *ends = posterior(z, t, path, *(fixed or cond))
        return path.derivative(*ends, torch.as_tensor(t, **EXACT)).to(z)

    return velocity


# ---- The shapes as the data of a run
class Shapes(Data):
    """Captioned pictures, new ones in each step."""

    cfg: ClassVar = 3.0
    parts: ClassVar = [[(0,), (1,)]]  # both conditions are dropped together

    def __init__(self, options: Data.Options):
        """There is nothing to choose."""

    def spec(self) -> dict:
        return dict(shape=[3, SIZE, SIZE], classes=0)

    @staticmethod
    def examples(n: int, generator: torch.Generator) -> list[Tensor]:
        rows = draw_rows(n, generator)
        return [paint(rows, generator), *conditions_of(rows)]

    @classmethod
    def arguments(cls, spec):
        """Patches of 8 x 8: 16 image tokens beside 8 words."""
        shape = dict(in_channels=3, patch_size=8, pos_embed_max_size=SIZE // 8, qk_norm=True)
        return shape | dict(context_dim=len(VOCABULARY) + WORDS, pooled_dim=len(VOCABULARY))

    @classmethod
    def encode(cls, spec, prompts, device="cpu", t5=True):
        if not t5:
            raise InputError("--no-t5 is for a model with SD3's text encoders")
        return conditions_of(torch.tensor([row_of(prompt) for prompt in prompts])), None

    @classmethod
    def conditions(cls, spec, n, label=None, data=None, generator=None):
        """The conditions of drawn captions; half of them name an unseen pair."""
        if label is not None or data:
            given = f"--data {data}" if label is None else f"--label {label}"
            raise InputError(f"{given}: this model takes a --prompt")
        halves = draw_rows(n - n // 2, generator), draw_rows(n // 2, generator, new=True)
        return conditions_of(torch.cat(halves))

    @classmethod
    def write(cls, spec: dict, file: File, x0: Tensor, *cond: Tensor, seed=0, device="cpu") -> File:
        """Write pictures over their captions and what the reader sees (.png), or arrays (.npz)."""
        images = to_uint8(x0)
        if file.suffix == ".npz":
            return save(file, [images, *cond])
        lines, known = [], [*CAPTIONS]
        for row, seen in zip(rows_of(cond[0]).tolist(), read(x0), strict=True):
            right = CAPTIONS[known[row]] == CAPTIONS[seen]
            new = " (unseen pair)" if NEW[row] else ""
            lines.append(f"{known[row]}{new}\n{'right' if right else f'read as: {seen}'}")
        return save(file, draw_captioned(images, lines))

    # ---- What a run shows
    @staticmethod
    def right(model, n: int, new=False, *, steps: int, cfg=None) -> dict[str, float]:
        """The `verdicts` on samples of n held-out captions, of seen pairs or with new ones."""
        rows = draw_rows(n, seeded(0, int(new), 1, HELD_OUT), new)
        return verdicts(rows, model.draw(n, *conditions_of(rows), steps=steps, cfg=cfg))

    @torch.no_grad()
    def errors(self, model, n: int) -> Tensor:
        """|o - target|^2, its floor |E[target | z] - target|^2 that nothing can learn away, and the
        two parts of the relative excess, |o - E[target | z]|^2 and |E[target | z]|^2: their means
        over n held-out pictures at each t of the `validation`, (8,4)."""
        network, objective, errors = model.guided(), model.objective, []
        held_out = [x.to(model.device) for x in self.held_out(n)]
        for z_in, t, target, *cond in validation(objective, *held_out):
            z = z_in / objective.path.c_in(expand(t, z_in))
            _, *ends = posterior(z, t, objective.path, *cond)
            _, best = objective.pair(*(end.to(z) for end in ends), t)
            output = network(z_in, t, *cond)
            parts = output - target, best - target, output - best, best
            errors.append(torch.stack([x.square().flatten(1).mean(1) for x in parts], dim=1))
        return torch.cat(errors).reshape(8, n, 4).mean(1)

    def metrics(self, model) -> dict[str, float]:
        steps = max(10, model.objective.fewest)
        shown = {"right": self.right(model, 64, steps=steps)["all right"]}
        if has_truth(model.objective):
            _, _, error, power = self.errors(model, 32).mean(0).tolist()
            shown["excess"] = error / power
        return shown

    def report(self, model, out: File, teacher=None) -> None:
        steps = model.objective.fewest if teacher else 25
        guidance = (model.cfg, 1.0) if model.null_cond else (1.0,)

        def measure(model, steps: int) -> str:
            seen, new = (self.right(model, 200, new, steps=steps) for new in (False, True))
            distance = (seen["distance"] + new["distance"]) / 2
            return f"{seen['all right']:.1%} {new['all right']:8.1%} {distance:8.3f}"

        if teacher:
            print("all right, of 200 captions of seen and 200 of unseen pairs; distance to the")
            print("nearest true picture (the mean rms, of pixels in [-1, 1]):")
            self.compare(model, teacher, measure, (1, 2, 4, 8, 50))
        heads = "".join(f"{head:>12}" for head in (*ASPECTS, "distance"))
        print(f"{f'{steps} steps, 400 captions':24}{heads}")
        for cfg, new in itertools.product(guidance, (False, True)):
            shares = self.right(model, 400, new, steps=steps, cfg=cfg)
            name = f"guidance {cfg:g}, {'unseen' if new else 'seen'}"
            cells = "".join(f"{shares[aspect]:12.1%}" for aspect in ASPECTS)
            print(f"{name:24}{cells}{shares['distance']:12.3f}")
        if has_truth(model.objective):
            loss, floor, error, power = self.errors(model, model.config["validation"]).T
            floor = f"exact floor {floor.mean():.4f}, which no network can learn away"
            print(f"validation loss {loss.mean():.4f}; its {floor}")
            ratios = " ".join(f"{x:.1e}" for x in [error.mean() / power.mean(), *(error / power)])
            print(f"relative excess: whole, then at t = 1/16, 3/16, ... 15/16: {ratios}")
        cond = self.conditions(self.spec(), 32, generator=seeded(0, 2, 1, HELD_OUT))
        x0 = model.draw(32, *cond, steps=steps)
        print(f"pictures: {self.write(self.spec(), out / 'samples.png', x0, *cond)}")
