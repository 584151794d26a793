"""PeRFlow (Yan et al. 2024): a trained flow made straight inside K time windows, to take few steps.

First the method as published, in the paper's order: windows and times, the teacher's solve, the
line and its two targets, the sampler. Then what we add to it, and Delta W.
Time, here and everywhere: t = 0 is data, t = 1 is noise. A window starts at its noisy edge.
Read next: `train.py`, which trains students, and `sample.py`, which samples from them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

import rf
from rf import Field, Formulation, Generator, InputError, Pair, Rows, Times, expand

PARAMETERIZATIONS = "velocity", "epsilon", "diff_eps"


class PeRFlow(rf.Objective):
    """How to train and sample a student of `teacher`, a velocity field v(z, t, *cond) on `path`.

    windows: K of equal width, or their edges 0 = t_0 < ... < t_K = 1. K = 1 is plain reflow.
    evaluations: of the teacher in one solve, over one window, whatever the method: 8 Euler, 4 Heun
        or 2 RK4 steps, rounded up to whole steps. The default is the paper's.
    parameterization: "velocity", where the student is a velocity field, on a path finite at t = 1:
        any formulation can come as `formulation.rectified(network)` on `rf.RectifiedFlow()`. Or
        "epsilon": an eps-network, `formulation.velocity(network)` as the teacher, a linear path.
        "diff_eps" is the same with another eps*, that of the authors' code for SD1.5.
    times: the number of discrete times in a window; None or 0 draws t from all of it.
    method, reuse: ours where they are not "euler" and 1.
    formulation: of the student's network, where it predicts something else than a velocity on rf.
    Guidance is the caller's. Fixed: a teacher guided by `rf.guide`, a student sampled as it is.
    Sync: a plain teacher, conditions dropped in training, a student guided in sampling.
    ValueError on windows that do not rise from 0 to 1 and on settings out of range."""

    distils = True

    def __init__(
        self, teacher: Field | None, path: rf.Path, windows: int | Sequence[float] = 4,
        evaluations: int = 8, parameterization: str = "velocity", times: int | None = 4,
        method: str = "euler", reuse: int = 1, formulation: Formulation | None = None,
    ):  # fmt: skip
        counts = {"evaluations": evaluations, "reuse": reuse, "times": times or 1}
        counts |= {"windows": windows} if isinstance(windows, int) else {}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if method not in rf.SOLVERS:
            raise ValueError(f"unknown solver {method!r}; choose from {', '.join(rf.SOLVERS)}")
        if parameterization not in PARAMETERIZATIONS:
            choices = ", ".join(PARAMETERIZATIONS)
            raise ValueError(
                f"unknown parameterization {parameterization!r}; choose from {choices}"
            )
        if isinstance(windows, int):
            windows = [k / windows for k in range(windows + 1)]
        edges = [float(t) for t in windows]
        rising = all(t < t_next for t, t_next in zip(edges, edges[1:], strict=False))
        if len(edges) < 2 or (edges[0], edges[-1]) != (0, 1) or not rising:
            raise ValueError(f"windows need edges 0 = t_0 < t_1 < ... < t_K = 1, got {edges}")
        self.teacher, self.path, self.parameterization = teacher, path, parameterization
        self.method, self.reuse, self.times = method, reuse, times or None
        self.formulation = formulation
        self.steps_of_solve = -(-evaluations // len(rf.SOLVERS[method][0]))
        self.edges, self.windows = torch.tensor(edges, dtype=torch.float64), len(edges) - 1
        self.discrete_times = self.grid(self.windows * (times or 1))[:-1]  # (N,), from 1 down
        self.fewest = self.windows  # steps in which `sample` works
        self._flow = Formulation("", path, "velocity")  # whose `rectified` is on the RF path
        a, b, _, _ = path.coefficients(self.edges[-1])
        advice = "use velocity, with formulation.rectified(network) on RectifiedFlow()"
        if parameterization != "velocity" and (a == 0 or not b.isfinite()):
            raise InputError(
                f"{parameterization}: lambda_k = a_e/a_s is infinite on this path; {advice}"
            )
        if not b.isfinite():
            raise InputError(f"{type(path).__name__} is infinite at t = 1; {advice}")

    # ---- Windows and times
    def window(self, t: Tensor) -> Pair:
        """(t_start, t_end) = (t_k, t_{k-1}), with t_{k-1} < t <= t_k; each of t's shape.
        By the paper t = 0 lies in no window; here it belongs to the first."""
        t = rf.at_least_float32(t)
        # rounded as t is: the float32 nearest to 1/3 is an edge
        edges = rf.constants(self.edges, t.device, t.dtype)
        k = torch.searchsorted(edges, t.contiguous()).clamp(1, self.windows)
        return edges[k], edges[k - 1]

    def draw(self, n: int, generator: Generator = None) -> Tensor:
        """Training's t (n,): 1 - floor(uN)/N, u ~ U[0, 1), as PeRFlow's code draws it, with N = K
        times `times`; without `times` 1 - u, as the paper says. Every edge t_k is one of the N: the
        sampler asks there, where the straight flow's velocity jumps. The network must tell it from
        the next time above, 1/N away: it can with four times a window, hardly with N = 1000."""
        u = rf.draws(n, generator)
        if not self.times:
            return 1 - u
        times = rf.constants(self.discrete_times, u.device, u.dtype)
        return times[(u * len(times)).long().clamp(max=len(times) - 1)]

    # ---- The teacher's solve, and the straight line that replaces it
    @torch.no_grad()
    def solve_window(self, x0: Tensor, eps: Tensor, t: Tensor, *cond: Tensor) -> Pair:
        """(z_start, z_end): a x0 + b eps at t_k, and Phi(z_start), where the teacher carries it.
        Phi solves dz~ = (eps_hat - x0_hat) dt~, the teacher as a flow on the RF path, in equal
        steps of t~ = b/(a+b), with z~ = z/(a+b). On the RF path this is dz = v dt itself, and with
        Euler steps it is DDIM on variance-preserving ones. All windows are solved in one batch."""
        (a_s, b_s, _, _), (a_e, b_e, _, _) = map(self.path.coefficients, self.window(t))
        z_start = expand(a_s, x0) * x0 + expand(b_s, x0) * eps
        ends = {"t_start": b_s / (a_s + b_s), "t_end": b_e / (a_e + b_e)}
        flow, z = self._flow.rectified(self.teacher), z_start / expand(a_s + b_s, x0)
        z = rf.solve(flow, z, *cond, **ends, steps=self.steps_of_solve, method=self.method)
        return z_start, expand(a_e + b_e, x0) * z

    def _line(self, z_start: Tensor, z_end: Tensor, t: Tensor) -> Pair:
        """z_t = z_s + (t - t_s)/(t_e - t_s) (z_e - z_s), and the target: the slope of this line, or
        eps* = (z_e - lambda_k z_s)/eta_k."""
        t_start, t_end = self.window(t)
        z_t = z_start + expand((t - t_start) / (t_end - t_start), z_start) * (z_end - z_start)
        if self.parameterization == "velocity":
            return z_t, (z_end - z_start) / expand(t_end - t_start, z_start)
        lambda_k, eta_k = self._ddim(t_start, t_end, z_start)
        return z_t, (z_end - lambda_k * z_start) / eta_k

    def _ddim(self, t_start: Tensor, t_end: Tensor, z: Tensor) -> Pair:
        """lambda_k = a_e/a_s, eta_k = b_e - (a_e/a_s) b_s: DDIM is lambda_k z + eta_k eps. diff_eps
        has the noising from e to s turned round: z_s = g z_e + sqrt(1 - g^2) eps, g = a_s/a_e."""
        a_s, b_s, _, _ = self.path.coefficients(expand(t_start, z))
        a_e, b_e, _, _ = self.path.coefficients(expand(t_end, z))
        lambda_k = a_e / a_s
        if self.parameterization == "diff_eps":
            return lambda_k, -(lambda_k**2 - 1).sqrt()
        return lambda_k, b_e - lambda_k * b_s

    def pair(self, x0: Tensor, eps: Tensor, t: Tensor, *cond: Tensor) -> Pair:
        """(z_t, target) at t: a point of the straight line, and what the student learns there."""
        return self._line(*self.solve_window(x0, eps, t, *cond), t)

    @torch.no_grad()
    def examples(self, x0: Tensor, *cond: Tensor, generator: Generator = None) -> Rows:
        """(z_t, t, target, *cond): draw t and eps, solve the window of t, take a point of its line.
        The loss is E |student(z_t, t) - target|^2. (`_reused` makes reuse * B rows of B.)"""
        t = self.draw(len(x0), generator).to(x0.device)
        z_start, z_end = self.solve_window(x0, self.noise(x0, generator), t, *cond)
        z_start, z_end, t, *cond = self._reused(z_start, z_end, t, *cond, generator=generator)
        z_t, target = self._line(z_start, z_end, t)
        return z_t, t, target, *cond

    # ---- Sampling
    def field(self, student: Field) -> Field:
        """What is fitted to the targets, f(z, t, *cond). Below the lowest time that training draws
        in a window the student is asked at that time: nearer to the edge it would answer with a
        mean of two windows. Between two trained times it answers in between."""
        flow = self.formulation.rectified(student) if self.formulation else student

        def field(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            if self.times:
                t_start, t_end = self.window(t)
                t = torch.maximum(t, torch.lerp(t_end, t_start, 1 / self.times))
            return flow(z, t, *cond)

        return field

    def velocity(self, student: Field) -> Field:
        """The student as a velocity field v(z, t, *cond) on the path, given the plain t.
        epsilon: v = ((lambda_k - 1) z + eta_k eps_Theta)/(((1 - w) + w lambda_k)(t_e - t_s)), with
        w = (t_s - t)/(t_s - t_e). With eps* for eps_Theta it is the line's slope everywhere."""
        field = self.field(student)

        def velocity(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            t_start, t_end = self.window(t)
            lambda_k, eta_k = self._ddim(t_start, t_end, z)
            w = expand((t_start - t) / (t_start - t_end), z)
            step = ((lambda_k - 1) * z + eta_k * field(z, t, *cond)) / (1 - w + w * lambda_k)
            return step / expand(t_end - t_start, z)

        return field if self.parameterization == "velocity" else velocity

    def rectified(self, student: Field) -> Field:
        """The student as a velocity field on the RF path. An epsilon student has another path."""
        return self._flow.rectified(self.velocity(student))

    def grid(self, steps: int) -> Tensor:
        """The sampler's times, (steps + 1,) float64 from 1 to 0: spread evenly over the windows,
        the remainder to the noisiest. Every edge is in it, so no step crosses one."""
        K, (each, more) = self.windows, divmod(steps, self.windows)
        if each < 1:
            raise InputError(f"{steps} steps are too few for {K} windows: each needs at least one")
        grid = [self.edges[-1:]]
        for k in range(K, 0, -1):
            n = each + (k > K - more)
            w = torch.arange(1, n + 1, dtype=torch.float64) / n
            grid.append((1 - w) * self.edges[k] + w * self.edges[k - 1])
        return torch.cat(grid)

    def sample(
        self, student: Field, noise: Tensor, *cond: Tensor,
        steps: int | None = None, times: Times = None, method: str = "euler",
        generator: Generator = None,
    ) -> Tensor:  # fmt: skip
        """Standard noise (B,...) -> x0 (B,...) in `steps` >= K Euler steps, or at `times` that fall
        from 1 to 0 and hold all edges. ValueError on other methods and on too few steps."""
        if method != "euler":
            raise InputError(f"a PeRFlow student takes euler steps, not {method!r}")
        times = self.grid(steps) if times is None else torch.as_tensor(times, dtype=torch.float64)
        missing = [t.item() for t in self.edges if (times - t).abs().min() > 1e-6]
        if (times.diff() >= 0).any():
            raise ValueError(f"times must fall from 1 to 0, got {times.tolist()}")
        if missing:
            raise ValueError(f"a step would cross the window's edge at t = {missing[0]:g}")
        z = self.path.b(self.edges[-1]) * noise
        return rf.solve(self.velocity(student), z, *cond, steps=steps, times=times)

    # ---- What we add: solves that serve several draws of t, and a guard
    def _reused(self, z_start: Tensor, z_end: Tensor, t: Tensor, *cond, generator) -> Rows:
        """Ours: a solve, the costly part, serves `reuse` draws of t in its window. Rows i, B + i,
        ... share one, so B rows one after the other never meet it twice. And from far noise a solve
        can run away; one such row would ruin the training: the first good row replaces it."""
        good = arrived(z_start, z_end)
        i = torch.where(good, torch.arange(len(t), device=t.device), good.int().argmax())
        z_start, z_end, t, *cond = (x[i.repeat(self.reuse)] for x in (z_start, z_end, t, *cond))
        if self.reuse > 1:
            (t_start, t_end), u = self.window(t), rf.draws(len(t), generator).to(t)
            u = (self.times * u).floor() / self.times if self.times else u
            t = torch.lerp(t_start, t_end, u)
            t = torch.maximum(t, torch.nextafter(t_end, t_start))  # t_end is the next window's
        return z_start, z_end, t, *cond

    # ---- For the commands: flags, and the PeRFlow of a network that they have loaded
    @dataclass
    class Options:
        """The choices of the commands; ours where they differ from the paper's."""

        windows: Annotated[int, "PeRFlow's K, its fewest steps; 1 is reflow", 1, 1000] = 4
        times: Annotated[int, "discrete times of a window; 0 is all of it", 0, 10_000] = 4
        evaluations: Annotated[int | None, "of one solve (default: 32 / windows)", 1, 10_000] = None
        parameterization: Annotated[
            Literal[PARAMETERIZATIONS], "the target; the last two: of eps/linear and eps/ddpm"
        ] = "velocity"
        guidance: Annotated[
            Literal["sync", "fixed"], "guide the student in sampling, or the teacher now"
        ] = "sync"
        teacher_cfg: Annotated[float, "guidance scale of the teacher, for fixed"] = 1.0
        method: Annotated[Literal["euler", "heun", "rk4"], "of a solve; the paper: euler"] = "heun"
        reuse: Annotated[int, "draws of t that share a solve; the paper has 1", 1, 1000] = 4

        def __post_init__(self):
            self.evaluations = self.evaluations or -(-32 // self.windows)
            if (self.teacher_cfg != 1) != (self.guidance == "fixed"):
                given = f"--guidance {self.guidance} --teacher-cfg {self.teacher_cfg:g}"
                raise InputError(f"{given} do not go together: fixed needs a scale, sync has none")

    @classmethod
    def of(cls, formula: Formulation, options: Options, guided: Callable | None) -> "PeRFlow":
        """The PeRFlow of a network of this formulation. guided(cfg) is the teacher's network with
        guidance; sampling needs no teacher."""
        settings = vars(options) | {"path": formula.path, "teacher": None}
        del settings["guidance"]
        scale = settings.pop("teacher_cfg")
        network = guided(scale) if guided else None
        if options.parameterization == "velocity":
            settings |= {"path": rf.RectifiedFlow(), "formulation": formula}
            if network:
                settings["teacher"] = formula.rectified(network)
        elif formula.prediction != "eps":
            raise InputError(f"{formula.name} predicts no eps: --parameterization velocity fits it")
        elif network:
            settings["teacher"] = formula.velocity(network)
        objective = cls(**settings)
        objective.teacher_cfg, objective.noise = scale, formula.noise  # starts are the teacher's
        return objective


def arrived(z_start: Tensor, z_end: Tensor) -> Tensor:
    """Which rows (B,) have no coordinate of z_end beyond 1,000 times the largest |z_start|."""
    return (z_end.abs() < 1000 * z_start.abs().max()).flatten(1).all(1)


# ---- Plug and play: Delta W = W_PeRFlow - W_teacher, for models fine-tuned from the same teacher
Weights = nn.Module | Mapping[str, Tensor]  # or its state dict


def same_network(one: Weights, other: Weights) -> tuple[Mapping[str, Tensor], ...]:
    """Both as state dicts. ValueError where their keys or shapes differ."""
    states = [w.state_dict() if isinstance(w, nn.Module) else w for w in (one, other)]
    first, second = ({key: tuple(w.shape) for key, w in state.items()} for state in states)
    if first != second:
        key = next(key for key in {**first, **second} if first.get(key) != second.get(key))
        shapes = f"{first.get(key, 'absent')} here, {second.get(key, 'absent')} there"
        raise ValueError(f"these are the weights of another network: {key} is {shapes}")
    return (*states,)


def delta(student: Weights, teacher: Weights) -> dict[str, Tensor]:
    """Delta W = W_student - W_teacher. ValueError where they are not the same network."""
    student, teacher = same_network(student, teacher)
    return {key: w - teacher[key].to(w.device) for key, w in student.items()}


def norm(weights: Mapping[str, Tensor]) -> float:
    """|W|, of all weights together."""
    return torch.stack([w.double().norm() for w in weights.values()]).norm().item()


def plug(network: nn.Module, delta: Mapping[str, Tensor]) -> None:
    """W += Delta W in place, exact to rounding. ValueError where the delta is of another network.
    Plugging twice adds both, and warns. The module remembers in a plain attribute, `plugged`, which
    deep copies carry and state dicts do not."""
    state, delta = same_network(network, delta)
    if getattr(network, "plugged", False):
        warnings.warn("this network has a delta already: another adds to it", stacklevel=2)
    network.load_state_dict({key: w + delta[key].to(w.device) for key, w in state.items()})
    network.plugged = True
