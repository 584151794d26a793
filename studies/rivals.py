"""Every rival that PeRFlow's paper names, as an objective of `train.train` or a solver.

`Skip` learns a map that skips the flow, as the sum of two shorter ways: consistency and progressive
distillation. `Match` learns a generator of one step; a second network says where its samples should
have gone: DMD and a plain GAN. All f have a velocity's form: f leads to z + (t_end - t) f(z, t).
`METHODS` trains each from the same teacher, at two of its evaluations for a row of the batch.
Time: t = 0 is data, t = 1 is noise. Read next: `studies/fewstep.py`, which compares them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perflow import PeRFlow, arrived
from rf import Field, Objective, RectifiedFlow, Rows, expand, gaussian_like, solve
from sample import Sampler
from studies.runs import learned
from train import learning_rate
from training.options import Recipe
from training.ranks import compile_blocks

PATH = RectifiedFlow()


# ---- Without training: a step uses the last evaluation, too
def multistep(field: Field, z: Tensor, times: Tensor, solver: str) -> Tensor:
    """The first-order step a x0_hat + b eps_hat from t to s, corrected by the slope of one end
    since the last evaluation.
    deis (Zhang & Chen 2022, tAB1): eps_hat is linear in t, in the exact integral of the equation.
    dpm (DPM-Solver++(2M), Lu et al. 2022): x0_hat is linear in lambda/2, and taken in mid-step.
    At t = 1 and 0 lambda is infinite and has no slope: the first two steps and the last one are of
    first order."""
    last = None
    for t, s in pairwise(times.double()):
        v = field(z, t.float().expand(len(z)))
        x0_hat, eps_hat = z - t * v, z + (1 - t) * v
        z = (1 - s) * x0_hat + s * eps_hat
        clock, end = (t, eps_hat) if solver == "deis" else (-t.logit(), x0_hat)
        if last:
            slope = (end - last[1]) / (clock - last[0])
            if solver == "deis":
                weight = s - t + (1 - s) * torch.log((1 - s) / (1 - t))
            else:
                weight = (-s.logit() - clock) / 2 * (1 - s - (1 - t) * s / t)
            z = z + slope * weight.nan_to_num(posinf=0)
        last = clock, end
    return z


# ---- Maps that skip the flow: consistency and progressive distillation
class Skip(PeRFlow):
    """f(z, t) leads from t to the end of its window, z + (t_end - t) f. It learns two parts of this
    way: target = w first(z, t) + (1 - w) second(z + (m - t) first, m), w = (m - t)/(t_end - t),
    where m is a `skip` after t.
    Progressive distillation (Salimans & Ho 2022): both fields are the last student. A window joins
    two of its windows; t is always the start of the window and m its middle.
    Consistency (LCM, Luo et al. 2023): the first is a step of the teacher's solver, the second a
    jump of the averaged network from m. With K windows it is PCM (Wang et al. 2024)."""

    def __init__(self, first: Field, second: Field | None = None, skip=1 / 16, **settings):
        super().__init__(first, PATH, **settings)
        self.second, self.skip = second, skip

    def examples(self, x0: Tensor, *cond: Tensor, generator=None) -> Rows:
        t = self.draw(len(x0), generator)
        z = PATH.interpolate(x0, gaussian_like(x0, generator), t)
        m = self._middle(t)
        with torch.no_grad():
            z_m = solve(self.teacher, z, *cond, steps=1, t_start=t, t_end=m, method=self.method)
        return z, t, (z_m - z) / expand(m - t, z), *cond

    def _middle(self, t: Tensor) -> Tensor:
        return torch.maximum(t - self.skip, self.window(t)[1])

    @torch.no_grad()
    def target(self, network: Field, average: Field, rows: Rows) -> Rows:
        z, t, first, *cond = rows
        m, (_, t_end) = self._middle(t), self.window(t)
        second = self.second or self.field(average)
        w = expand((m - t) / (t_end - t), z)
        v = second(z + expand(m - t, z) * first, m, *cond)
        return z, t, w * first + (1 - w) * v, *cond

    def sample(self, student: Field, noise: Tensor, *cond, steps=None, generator=None) -> Tensor:
        """Jump to the window's end z_e, then back to the next time with new noise, by the forward
        process: z = a/a_e z_e + sqrt(b^2 - (a/a_e b_e)^2) eps, which is z_e itself at the end."""
        field, z = self.field(student), noise
        for t, t_next in pairwise(self.grid(steps).float()):
            _, t_end = self.window(t)
            z = solve(field, z, *cond, times=[t, t_end])
            a = (1 - t_next) / (1 - t_end)
            b = (t_next**2 - (a * t_end) ** 2).clamp(min=0).sqrt()
            z = a * z + b * gaussian_like(z, generator)
        return z


# ---- Matching distributions: DMD and a plain GAN
class Match(Objective):
    """One step, x = z - f(z, 1), and a critic: a second network that says where x should have gone.
    In each step the critic learns `updates` times, at the student's rate, from what f draws then;
    after that its `push` of x, times `weight`, makes the target. With pairs (z, t, target, *cond)
    of the teacher, half of the rows are a regression on them."""

    def __init__(self, critic: nn.Module, recipe: Recipe, pairs=None, weight=1.0, updates=5):
        self.critic, self.pairs, self.weight = critic, pairs, weight
        self.reuse, self.updates, self.step = 2 if pairs else 1, updates, 0
        self.rate = partial(learning_rate, recipe)
        if recipe.compile:
            compile_blocks(critic)
        self.optimizer = torch.optim.AdamW(
            critic.parameters(), betas=(0.0, 0.99), weight_decay=0, fused=True
        )

    def examples(self, x0: Tensor, *cond: Tensor, generator=None) -> Rows:
        rows = gaussian_like(x0, generator), torch.ones(len(x0)), x0, *cond
        if not self.pairs:
            return rows
        i = torch.randint(len(self.pairs[0]), (len(x0),), generator=generator)
        both = zip(rows, [c[i] for c in self.pairs], strict=True)
        return [torch.stack(pair, dim=1).flatten(0, 1) for pair in both]

    def target(self, network: Field, average: Field, rows: Rows) -> Rows:
        noise, t, x0, *cond = (c[:: self.reuse] for c in rows)
        draw = torch.no_grad()(lambda z: z - network(z, t, *cond))
        goal = x = draw(noise)
        if self.weight:
            self.optimizer.param_groups[0]["lr"] = self.rate(self.step)
            for _ in range(self.updates):
                self.optimizer.zero_grad()
                self.critic_loss(draw(torch.randn_like(noise)), x0, *cond).backward()
                self.optimizer.step()
            goal = x + self.weight * self.push(x, *cond)
        self.step += 1
        z, t, target, *all_cond = rows
        target = target.clone()
        target[:: self.reuse] = noise - goal
        return z, t, target, *all_cond

    def sample(self, student: Field, noise: Tensor, *cond, steps=1, generator=None) -> Tensor:
        return solve(student, noise, *cond, steps=steps)


def noised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, t, eps) of x at t ~ U(0.02, 0.98)."""
    t, eps = 0.02 + 0.96 * torch.rand(len(x)), torch.randn_like(x)
    return PATH.interpolate(x, eps, t), t, eps


class DMD(Match):
    """Yin et al. 2023: the critic is a flow of what f draws, and x moves from the critic's x0_hat
    to the teacher's. The push is divided by |x - x0_hat|, the teacher's, in the mean over a
    picture; two coordinates are too few for a mean, so points have the batch's. Without pairs and
    with five updates of the critic it is DMD2 (Yin et al. 2024) without its GAN."""

    def __init__(self, teacher: Field, *settings):
        super().__init__(*settings)
        self.teacher = teacher

    def critic_loss(self, x: Tensor, x0: Tensor, *cond: Tensor) -> Tensor:
        z, t, eps = noised(x)
        return (self.critic(z, t, *cond) - (eps - x)).square().mean()

    @torch.no_grad()
    def push(self, x: Tensor, *cond: Tensor) -> Tensor:
        z, t, _ = noised(x)
        real, fake = (z - expand(t, z) * f(z, t, *cond) for f in (self.teacher, self.critic))
        over = [*range(1, x.dim())] if x.dim() > 2 else [0, 1]
        return (real - fake) / (x - real).abs().mean(over, keepdim=True)


class PlainGAN(Match):
    """The critic separates noised samples from noised data. It starts from scratch; those of Sauer
    et al. 2023 and Xu et al. 2023 build on trained networks."""

    def score(self, x: Tensor, *cond: Tensor) -> Tensor:
        z, t, _ = noised(x)
        return self.critic(z, t, *cond).flatten(1).mean(1)

    def critic_loss(self, x: Tensor, x0: Tensor, *cond: Tensor) -> Tensor:
        real, fake = self.score(x0, *cond), self.score(x, *cond)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def push(self, x: Tensor, *cond: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return -torch.autograd.grad(F.softplus(-self.score(x, *cond)).sum(), x)[0]


# ---- The methods: each trains from (teacher, data, recipe) and gives {evaluations: a Sampler}
COUNTS = (1, 2, 4, 8)
Students = dict[int, Sampler]


def flow(model: Sampler) -> Field:
    """A trained model as a velocity field on the RF path, with the guidance of its data."""
    return model.objective.rectified(model.guided(model.cfg))


def student(objective, teacher: Sampler, data, recipe: Recipe) -> Students:
    model = learned(data, recipe, objective, teacher)
    return {n: model for n in COUNTS if n >= objective.fewest}


def straightened(K: int, times: int | None, teacher: Sampler, data, recipe: Recipe) -> Students:
    """PeRFlow with what we add to it; K = 1 is reflow (InstaFlow), by its paper of uniform t."""
    objective = PeRFlow(flow(teacher), PATH, K, 32 // K, times=times, method="heun", reuse=16 // K)
    return student(objective, teacher, data, recipe)


def published(N: int, teacher: Sampler, data, recipe: Recipe) -> Students:
    """PeRFlow, K = 4, by its code's rules: N discrete times, and a solve of 8 DDIM steps for each
    row. A row costs eight evaluations, so there is a quarter of the steps."""
    recipe = replace(recipe, steps=recipe.steps // 4)
    return student(PeRFlow(flow(teacher), PATH, times=N // 4), teacher, data, recipe)


def consistent(K: int, times: int | None, teacher: Sampler, data, recipe: Recipe) -> Students:
    """The average gives the targets. Its decay is LCM's, 0.95 a step."""
    objective = Skip(flow(teacher), windows=K, times=times, method="heun")
    return student(objective, teacher, data, replace(recipe, ema_every=1, ema_decay=0.95))


def progressive(teacher: Sampler, data, recipe: Recipe) -> Students:
    """Students of 64 (on pictures 8), ..., 2, 1 steps. Each learns two steps of the last one as one
    step, on new data and noise. The first one learns DDIM steps of the teacher; no other asks it.
    """
    first = 8 if len(data.spec()["shape"]) > 1 else 64
    rounds, last, students = [first >> i for i in range(first.bit_length())], teacher, {}
    for n in rounds:
        field = flow(last)
        objective = Skip(field, field, skip=1 / (2 * n), windows=n, times=1)
        changes = dict(steps=recipe.steps // len(rounds), seed=1000 * n + recipe.seed)
        last = students[n] = learned(data, replace(recipe, **changes), objective, last)
    return {n: students[n] for n in COUNTS}


def pair_count(steps: int, batch_size: int) -> int:
    """The number of pairs that the budget pays for, at 32 evaluations each: the budget is two
    evaluations a row, and half of the rows spend one, as the critic judges them."""
    return steps * batch_size * 3 // 64


def pairs_of(number: int, teacher: Sampler, data, recipe: Recipe) -> Rows:
    """(z, t = 1, target, *cond) of solves in 32 evaluations, without the rows that run away."""
    _, *cond = data.batch(recipe.seed, 0, number)
    noise, field = torch.randn(number, *data.spec()["shape"]), flow(teacher)
    run = lambda i: solve(field, noise[i], *(c[i] for c in cond), steps=16, method="heun")
    with torch.no_grad():
        ends = torch.cat([run(i) for i in torch.arange(number).split(2**11)])
    good = arrived(noise, ends)
    return [c[good] for c in (noise, torch.ones(number), noise - ends, *cond)]


def matched(pairs: bool, weight: float, teacher: Sampler, data, recipe: Recipe) -> Students:
    """DMD. With pairs, half of the rows cost one evaluation of the teacher each; the pairs cost the
    rest of the budget."""
    torch.manual_seed(recipe.seed)
    number = pair_count(recipe.steps, recipe.batch_size)
    rows = pairs_of(number, teacher, data, recipe) if pairs else None
    critic = copy.deepcopy(teacher.network).requires_grad_(True)
    objective = DMD(flow(teacher), critic, recipe, rows, weight)
    return {1: learned(data, recipe, objective, teacher)}


def plain_gan(teacher: Sampler, data, recipe: Recipe) -> Students:
    torch.manual_seed(recipe.seed)
    critic = data.network(data.spec(), recipe)
    objective = PlainGAN(critic, replace(recipe, lr=recipe.lr / 4), updates=2)
    return {1: learned(data, recipe, objective, teacher)}


@dataclass
class Method:
    train: Callable[..., Students]
    networks: str  # held in training, beside the student and its average
    lr: float  # the middle of its scan on points
    pairs: bool = False  # whether it stores solves of the teacher from noise to data
    text: bool = True  # whether it learns shapes, too; some variants are for points alone


METHODS = {
    "consistency": Method(partial(consistent, 1, 16), "teacher", 8e-3),
    "consistency, uniform t": Method(partial(consistent, 1, None), "teacher", 8e-3, text=False),
    "consistency, K = 4": Method(partial(consistent, 4, 4), "teacher", 2e-3),
    "progressive": Method(progressive, "last student", 8e-3),
    "DMD": Method(partial(matched, True, 4.0), "teacher, critic", 1e-3, True),
    "DMD, push 0.1 : 1": Method(partial(matched, True, 0.1), "teacher, critic", 4e-3, True, False),
    "its pairs alone": Method(partial(matched, True, 0.0), "–", 8e-3, True),
    "DMD2 without its GAN": Method(partial(matched, False, 1.0), "teacher, critic", 2.5e-4),
    "plain GAN": Method(plain_gan, "critic", 8e-3),
    "reflow": Method(partial(straightened, 1, 4), "teacher", 8e-3),
    "reflow, uniform t": Method(partial(straightened, 1, None), "teacher", 8e-3, text=False),
    "PeRFlow, K = 2": Method(partial(straightened, 2, 4), "teacher", 8e-3),
    "PeRFlow, K = 4": Method(partial(straightened, 4, 4), "teacher", 8e-3),
    "PeRFlow, N = 1000": Method(partial(published, 1000), "teacher", 8e-3, text=False),
    "PeRFlow, N = 40": Method(partial(published, 40), "teacher", 8e-3),
}
