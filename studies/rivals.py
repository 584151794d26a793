"""Every rival that PeRFlow's paper names, as an objective of `train.train` or a solver.

Two ideas carry the file. A map that skips the flow is learned by two parts of its way (`Skip`:
consistency and progressive distillation); a generator of one step is told by a second network where
its samples should have gone (`Match`: DMD and an adversarial critic). All have a velocity's form:
z + (t_end - t) f(z, t) is where f leads. `METHODS` trains each from the same teacher on the same
budget: a row of the batch costs two of the teacher's evaluations. `studies.fewstep` compares them.
Time: t = 0 is data, t = 1 is noise."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import Recipe
from perflow import PeRFlow, arrived
from rf import Field, RectifiedFlow, Rows, expand, gaussian_like, solve, squared_error
from sample import Sampler
from studies.delta import learned

PATH = RectifiedFlow()


# ---- Without training: each step bends by what the last evaluation tells
def multistep(field: Field, z: Tensor, times: Tensor, kind: str) -> Tensor:
    """The first-order step a x0_hat + b eps_hat from t to s, and what the last evaluation adds.
    deis (Zhang & Chen 2022, tAB1): eps_hat is linear in t, in the exact integral of the equation.
    dpm (DPM-Solver++(2M), Lu et al. 2022): x0_hat is linear in lambda/2 and taken in the middle of
    the step. Where lambda is infinite, at t = 1 and 0, it has no slope: the first two steps and the
    last are of first order."""
    last = None
    for t, s in pairwise(times.double()):
        v = field(z, t.float().expand(len(z)))
        x0_hat, eps_hat = z - t * v, z + (1 - t) * v
        z = (1 - s) * x0_hat + s * eps_hat
        clock, bent = (t, eps_hat) if kind == "deis" else (-t.logit(), x0_hat)
        if last:
            slope = (bent - last[1]) / (clock - last[0])
            if kind == "deis":
                way = s - t + (1 - s) * torch.log((1 - s) / (1 - t))
            else:
                way = (-s.logit() - clock) / 2 * (1 - s - (1 - t) * s / t)
            z = z + slope * way.nan_to_num(posinf=0)
        last = clock, bent
    return z


# ---- Maps that skip the flow: consistency and progressive distillation
class Skip(PeRFlow):
    """f(z, t) leads from t to the end of its window, z + (t_end - t) f, and is learned by two parts
    of that way: target = w first(z, t) + (1 - w) second(z + (m - t) first, m), with
    w = (m - t)/(t_end - t), where m is a `skip` on.
    Progressive distillation (Salimans & Ho 2022): both fields are the last student's, each window
    joins two of its own, t is always on a window's start, and m its middle.
    Consistency (LCM, Luo et al. 2023): the first is a step of the teacher's solver, the second the
    average's own jump from m; in K windows it is PCM (Wang et al. 2024)."""

    def __init__(self, first: Field, second: Field | None = None, skip: float = 1 / 16, **how):
        super().__init__(first, PATH, **how)
        self.second, self.skip = second, skip

    def examples(self, x0: Tensor, *cond: Tensor, generator=None) -> Rows:
        t = self.draw(len(x0), generator)
        z = PATH.interpolate(x0, gaussian_like(x0, generator), t)
        m = self._middle(t)
        with torch.no_grad():
            how = dict(steps=1, t_start=t, t_end=m, method=self.method)
            z_m = solve(self.teacher, z, *cond, **how)
        return z, t, (z_m - z) / expand(m - t, z), *cond

    def _middle(self, t: Tensor) -> Tensor:
        _, t_end = self.window(t)
        return torch.maximum(t - self.skip, t_end)

    @torch.no_grad()
    def target(self, average: Field, rows: Rows) -> Rows:
        z, t, first, *cond = rows
        m, (_, t_end) = self._middle(t), self.window(t)
        second = self.second or self.field(average)
        w = expand((m - t) / (t_end - t), z)
        v = second(z + expand(m - t, z) * first, m, *cond)
        return z, t, w * first + (1 - w) * v, *cond

    def sample(self, student: Field, noise: Tensor, *cond, steps=None, generator=None) -> Tensor:
        """To the window's end z_e, and back to the next time with fresh noise: by the forward
        process, z = a/a_e z_e + sqrt(b^2 - (a/a_e b_e)^2) eps, which is z_e itself at the end."""
        field, z = self.field(student), noise
        for t, t_next in pairwise(self.times(steps).float()):
            _, t_end = self.window(t)
            z = solve(field, z, *cond, times=[t, t_end])
            a = (1 - t_next) / (1 - t_end)
            b = (t_next**2 - (a * t_end) ** 2).clamp(min=0).sqrt()
            z = a * z + b * gaussian_like(z, generator)
        return z


# ---- Matching distributions: DMD and an adversarial critic
class Match:
    """One step, x = z - f(z, 1), and a second network that says where x should have gone: the
    critic learns twice in each step from what f draws now, and its `push` of x makes the target.
    With pairs (z, t, target, *cond) of the teacher, half of the rows are a regression on them; the
    push has this weight beside it."""

    fewest, critic_steps = 1, 2

    def __init__(self, critic: nn.Module, lr: float, pairs: Rows | None = None, weight: float = 1):
        self.critic, self.pairs, self.reuse = critic, pairs, 2 if pairs else 1
        self.weight = weight
        self.optimizer = torch.optim.AdamW(critic.parameters(), lr, (0.0, 0.99), weight_decay=0)

    def field(self, network: Field) -> Field:
        self.network = network  # its present weights draw what the critic judges
        return network

    def examples(self, x0: Tensor, *cond: Tensor, generator=None) -> Rows:
        rows = gaussian_like(x0, generator), torch.ones(len(x0)), x0, *cond
        if not self.pairs:
            return rows
        i = torch.randint(len(self.pairs[0]), (len(x0),), generator=generator)
        both = zip(rows, [c[i] for c in self.pairs], strict=True)
        return [torch.stack(pair, dim=1).flatten(0, 1) for pair in both]

    def target(self, average: Field, rows: Rows) -> Rows:
        noise, t, x0, *cond = (c[:: self.reuse] for c in rows)
        x = (noise - self.network(noise, t, *cond)).detach()
        goal = x + self.weight * self.taught(x, x0, *cond) if self.weight else x
        z, t, target, *cond_of_all = rows
        target = target.clone()
        target[:: self.reuse] = noise - goal
        return z, t, target, *cond_of_all

    def taught(self, x: Tensor, x0: Tensor, *cond: Tensor) -> Tensor:
        """The push of x, after the critic has learned from it."""
        for _ in range(self.critic_steps):
            self.optimizer.zero_grad()
            self.loss(x, x0, *cond).backward()
            self.optimizer.step()
        return self.push(x, *cond)

    def sample(self, student: Field, noise: Tensor, *cond, steps=1, generator=None) -> Tensor:
        return solve(student, noise, *cond, steps=steps)


def noised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, t, eps) of x at t ~ U(0.02, 0.98)."""
    t, eps = 0.02 + 0.96 * torch.rand(len(x)), torch.randn_like(x)
    return PATH.interpolate(x, eps, t), t, eps


class DMD(Match):
    """Yin et al. 2023: the critic is a flow of what f draws, and x moves from its x0_hat to the
    teacher's. Theirs is divided by the mean over each picture; two coordinates are too few for
    that, so ours is divided by the batch's. Without pairs it is SwiftBrush (Nguyen & Tran 2023)."""

    def __init__(self, teacher: Field, *how, **more):
        super().__init__(*how, **more)
        self.teacher = teacher

    def loss(self, x: Tensor, x0: Tensor, *cond: Tensor) -> Tensor:
        z, t, eps = noised(x)
        return squared_error(self.critic, z, t, eps - x, *cond)

    @torch.no_grad()
    def push(self, x: Tensor, *cond: Tensor) -> Tensor:
        z, t, _ = noised(x)
        real, fake = (z - expand(t, z) * f(z, t, *cond) for f in (self.teacher, self.critic))
        return (real - fake) / (x - real).abs().mean()


class Adversarial(Match):
    """Sauer et al. 2023, Xu et al. 2023: the critic tells noised samples from noised data."""

    def score(self, x: Tensor, *cond: Tensor) -> Tensor:
        z, t, _ = noised(x)
        return self.critic(z, t, *cond).flatten(1).mean(1)

    def loss(self, x: Tensor, x0: Tensor, *cond: Tensor) -> Tensor:
        real, fake = self.score(x0, *cond), self.score(x, *cond)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def push(self, x: Tensor, *cond: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return -torch.autograd.grad(F.softplus(-self.score(x, *cond)).sum(), x)[0]


# ---- The methods: each trains from (teacher, data, recipe) and gives {evaluations: a Sampler}
COUNTS = (1, 2, 4, 8)
AT_EDGES = dict(edge_share=0.5, clock_gap=0.25)  # as the commands have it; for maps, too
Students = dict[int, Sampler]


def flow(model: Sampler) -> Field:
    """What a trained model means, as a velocity field on the RF path, with its own guidance."""
    return model.objective.rectified(model.guided(model.cfg))


def student(objective, teacher: Sampler, data, recipe: Recipe) -> Students:
    model = learned(teacher, data, objective, recipe)
    return {n: model for n in COUNTS if n >= objective.fewest}


def straightened(K: int, teacher: Sampler, data, recipe: Recipe) -> Students:
    """PeRFlow with what we add to it; K = 1 is reflow (InstaFlow)."""
    how = dict(method="heun", **AT_EDGES, reuse=16 // K)
    return student(PeRFlow(flow(teacher), PATH, K, 32 // K, **how), teacher, data, recipe)


def published(teacher: Sampler, data, recipe: Recipe) -> Students:
    """PeRFlow, K = 4, as in its paper: t is uniform, and a solve has 8 DDIM steps."""
    return student(PeRFlow(flow(teacher), PATH, reuse=4), teacher, data, recipe)


def consistent(K: int, teacher: Sampler, data, recipe: Recipe) -> Students:
    """The average that gives the targets is taken after every step: it lags by 1/(1 - decay)."""
    objective = Skip(flow(teacher), windows=K, method="heun", **AT_EDGES)
    return student(objective, teacher, data, replace(recipe, ema_every=1))


def progressive(teacher: Sampler, data, recipe: Recipe, first: int = 64) -> Students:
    """Students of 64, 32, ..., 1 steps; each learns two steps of the last one as one, on data and
    noise of its own. The first learns 128 DDIM steps: only it asks the teacher."""
    rounds = [first >> i for i in range(first.bit_length())]
    recipe, last, found = replace(recipe, steps=recipe.steps // len(rounds)), teacher, {}
    for n in rounds:
        own = flow(last)
        objective = Skip(own, own, skip=1 / (2 * n), windows=n, edge_share=1.0)
        fresh = replace(recipe, seed=1000 * n + recipe.seed)
        last = found[n] = learned(last, data, objective, fresh)
    return {n: found[n] for n in COUNTS}


def pair_count(steps: int, batch_size: int) -> int:
    """How many pairs the budget pays for: half of the rows are judged, at one evaluation each; what
    is left of two a row makes pairs, at 32 each."""
    return steps * batch_size * 3 // 64


def pairs_of(number: int, teacher: Sampler, data, recipe: Recipe) -> Rows:
    """(z, t = 1, target, *cond) of solves from noise to data, 32 evaluations each. The few that run
    away are left out."""
    _, *cond = data.batch(recipe.seed, 0, number)
    noise, field = torch.randn(number, *data.spec()["shape"]), flow(teacher)
    how = dict(steps=16, method="heun")
    with torch.no_grad():
        parts = torch.arange(number).split(2**11)
        ends = torch.cat([solve(field, noise[i], *(c[i] for c in cond), **how) for i in parts])
    good = arrived(noise, ends)
    return [c[good] for c in (noise, torch.ones(number), noise - ends, *cond)]


def matched(pairs: bool, weight: float, teacher: Sampler, data, recipe: Recipe) -> Students:
    """DMD. Where half of the rows are judged, each by one evaluation of the teacher, the rest of
    the budget is in the pairs."""
    torch.manual_seed(recipe.seed)
    number = pair_count(recipe.steps, recipe.batch_size)
    rows = pairs_of(number, teacher, data, recipe) if pairs else None
    critic = copy.deepcopy(teacher.network).requires_grad_(True)
    objective = DMD(flow(teacher), critic, recipe.lr, rows, weight)
    return {1: learned(teacher, data, objective, recipe)}


def adversarial(teacher: Sampler, data, recipe: Recipe) -> Students:
    torch.manual_seed(recipe.seed)
    critic = data.network(data.spec(), recipe)
    return {1: learned(teacher, data, Adversarial(critic, recipe.lr / 4), recipe)}


@dataclass
class Method:
    train: Callable[..., Students]
    holds: str  # networks in training, beside the student and its average
    lr: float = 8e-3  # the middle of its scan
    pairs: bool = False  # whether it keeps solves of the teacher from noise to data


METHODS = {
    "consistency": Method(partial(consistent, 1), "teacher"),
    "consistency, K = 2": Method(partial(consistent, 2), "teacher"),
    "consistency, K = 4": Method(partial(consistent, 4), "teacher", 2e-3),
    "progressive": Method(progressive, "last student", 1.6e-2),
    "DMD": Method(partial(matched, True, 0.1), "teacher, critic", pairs=True),
    "its pairs alone": Method(partial(matched, True, 0.0), "–", pairs=True),
    "DMD without pairs": Method(partial(matched, False, 1.0), "teacher, critic", 6e-5),
    "adversarial": Method(adversarial, "critic"),
    "reflow": Method(partial(straightened, 1), "teacher", 1.6e-2),
    "PeRFlow as published": Method(published, "teacher"),
    "PeRFlow, K = 2": Method(partial(straightened, 2), "teacher"),
    "PeRFlow, K = 4": Method(partial(straightened, 4), "teacher"),
}
