"""PeRFlow (Yan et al. 2024): a trained flow made straight inside K time windows, to take few steps.

The whole method: windows, the teacher's solve, both parameterizations, the sampler, Delta W.
Time convention, here and everywhere: t = 0 is data, t = 1 noise. A window starts at its noisy edge.
Read next: `train.py`, which trains students, and `sample.py`, which samples from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

import rf
from rf import Field, expand


class PeRFlow:
    """How to train and sample a student of `teacher`, a velocity field v(z, t, *cond) on `path`.

    windows: K of equal width, or their edges 0 = t_0 < ... < t_K = 1. K = 1 is plain reflow.
    solver_steps: the teacher's evaluations in a solve, whatever the method: 8 Euler, 4 Heun or
        2 RK4 steps (rounded up to whole steps). On the toy ring their errors are as 4 : 1 : 0.6.
        Heun and RK4 ask at the window's end too: the teacher must be finite at t = 0.
    parameterization: "velocity", where the student is a velocity field, on a path finite at t = 1.
        Any formulation can come as `formulation.rectified(network)` on `rf.RectifiedFlow()`.
        "epsilon", where the student is an eps-network, on the linear paths (LDM, DDPM); then
        the teacher is `formulation.velocity(network)` on `formulation.path`.
    edge, gap: the cures of one trap. A straightened flow jumps at t = t_k, where one step a window
        asks for it, and a network continuous in t answers with the mean of both sides. `edge` is
        the share of training's t that lies exactly on t_k; `gap` is the part of each window that
        the `clock` shown to the student skips, so that the two sides are no neighbours. A gap of
        0 shows the plain t. Measured on the toy ring with 4 windows, 12000 steps of 512 (17 s),
        learning rate 5e-4; Delta W is how many times it lowers the 4-step energy distance of a
        teacher fine-tuned on the ring turned by 10 degrees:

            edge, gap       4-step gap closed    outliers    Delta W
            0, 0            -124 % (4000 steps)  17.1 %
            0.25, 0         86.3 %               4.0 %       3.3 x
            0.5, 0          96.6 %               2.9 %       4.6 x
            0.25, 0.25      99.6 %               3.2 %       5.3 x
            0.5, 0.25       99.9 %               2.6 %       6.9 x
            0.5, 0.5        99.9 %               2.3 %       3.5 x

        At 2e-3 edge = 0.5 reaches 99.4 % alone in 8000 steps; straight throughout needs the gap.
        On MM-DiT the first row is at -104 %, each of the others at 99.8 % or more (see the README).

    reuse: how many draws of t, in its window, share a solve in `examples`.

    Guidance is the caller's. Fixed: a teacher guided by `rf.guide`, a student sampled as it is.
    Sync: a plain teacher, conditions dropped in training, a student guided in sampling.
    """

    def __init__(
        self,
        teacher: Field,
        path: rf.Path,
        windows: int | Sequence[float] = 4,
        solver_steps: int = 8,
        parameterization: str = "velocity",
        method: str = "euler",
        edge: float = 0.5,
        gap: float = 0.0,
        reuse: int = 1,
    ):
        if isinstance(windows, int):
            if windows < 1:
                raise ValueError(f"windows must be at least 1, got {windows}")
            windows = [k / windows for k in range(windows + 1)]
        edges = [float(t) for t in windows]
        rising = all(s < t for s, t in zip(edges, edges[1:], strict=False))
        if len(edges) < 2 or (edges[0], edges[-1]) != (0, 1) or not rising:
            raise ValueError(f"windows need edges 0 = t_0 < t_1 < ... < t_K = 1, got {edges}")
        if method not in rf.SOLVERS:
            raise ValueError(f"unknown solver {method!r}; choose from {', '.join(rf.SOLVERS)}")
        if solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, got {solver_steps}")
        if parameterization not in ("velocity", "epsilon"):
            raise ValueError(f"parameterization {parameterization!r}: choose velocity or epsilon")
        if reuse < 1:
            raise ValueError(f"reuse must be at least 1, got {reuse}")
        if not (0 <= edge <= 1 and 0 <= gap < 1):
            raise ValueError(f"edge must be in [0, 1] and gap in [0, 1), got {edge:g} and {gap:g}")
        self.teacher, self.path, self.parameterization = teacher, path, parameterization
        self.method, self.edge, self.gap, self.reuse = method, edge, gap, reuse
        self.solver_steps = -(-solver_steps // len(rf.SOLVERS[method][0]))  # evaluations -> steps
        self.edges, self.windows = torch.tensor(edges, dtype=torch.float64), len(edges) - 1
        self._edges = rf.Table(self.edges)

        a, b, _, _ = path.coefficients(self.edges[-1])
        name, advice = type(path).__name__, "formulation.rectified(network) on rf.RectifiedFlow()"
        if parameterization == "epsilon" and (a == 0 or not b.isfinite()):
            raise ValueError(
                f"epsilon needs a linear path (LDM, DDPM), not {name}: lambda_k = a_e/a_s is"
                f" infinite where a_s = 0, and z where b_s is; use velocity, with {advice}"
            )
        if not b.isfinite():
            raise ValueError(f"{name} is infinite at t = 1; pass {advice}")

    def window(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(t_start, t_end) = (t_k, t_{k-1}), with t_{k-1} < t <= t_k; each of t's shape.

        By the paper t = 0 lies in no window; here it belongs to the first.
        """
        t = rf.at_least_float32(t)
        edges = self._edges.like(t)  # rounded as t is: the float32 nearest to 1/3 is an edge
        k = torch.searchsorted(edges, t.contiguous()).clamp(1, self.windows)
        return edges[k], edges[k - 1]

    def clock(self, t: Tensor) -> Tensor:
        """What the student is shown as t: t_{k-1} + (1 - gap) (t - t_{k-1}); without a gap, t."""
        if self.gap == 0:
            return t
        _, t_end = self.window(t)
        return t_end + (1 - self.gap) * (t - t_end)

    # ----------------------------------------------------------------------------------------------
    # Training

    def draw(self, n: int, generator: Generator | None = None) -> Tensor:
        """Training's t (n,): uniform on (0, 1], but a share `edge` on the start of its window."""
        u = torch.rand(n, generator=generator, device=generator.device if generator else None)
        return self._draw_in(*self.window(1 - u), generator)

    def _draw_in(self, t_start: Tensor, t_end: Tensor, generator: Generator | None) -> Tensor:
        """One t in each of these windows: on its start with probability `edge`, else uniform."""
        device = generator.device if generator else None
        u, chance = torch.rand(2, len(t_start), generator=generator, device=device).to(t_start)
        t = t_start - u * (t_start - t_end) * (chance >= self.edge)
        return torch.maximum(t, torch.nextafter(t_end, t_start))  # t_end is the next window's

    @torch.no_grad()
    def ends(self, x0: Tensor, eps: Tensor, t: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        """z_start = a x0 + b eps at t's t_k, and where the teacher carries it, Phi(z_start).

        Phi solves dz~ = (eps_hat - x0_hat) dt~ with z~ = z/(a+b), in equal steps of t~ = b/(a+b):
        dz = v dt itself on the RF path, and DDIM (if Euler) on variance-preserving ones. In t Heun
        would be far off on the linear paths, whose b' is large near t = 0.
        One call of the teacher a solver stage, whatever windows the batch lies in.
        """
        t_start, t_end = self.window(t)
        z_start = self.path.interpolate(x0, eps, t_start)
        how = {"steps": self.solver_steps, "method": self.method}
        if isinstance(self.path, rf.RectifiedFlow):
            z_end = rf.solve(self.teacher, z_start, *cond, t_start=t_start, t_end=t_end, **how)
            return z_start, z_end
        (a_s, b_s, _, _), (a_e, b_e, _, _) = map(self.path.coefficients, (t_start, t_end))
        how |= {"t_start": b_s / (a_s + b_s), "t_end": b_e / (a_e + b_e)}
        z = rf.solve(self._rectified_teacher, z_start / expand(a_s + b_s, x0), *cond, **how)
        return z_start, expand(a_e + b_e, x0) * z

    def _rectified_teacher(self, z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
        """The teacher on the RF path, eps_hat - x0_hat, of x0_hat = (b' z - b v)/(a b' - a' b) and
        eps_hat = (a v - a' z)/(a b' - a' b)."""
        t = self.path.time(rf.RectifiedFlow().log_snr(t))
        a, b, da, db = self.path.coefficients(expand(t, z))
        z = (a + b) * z
        v = self.teacher(z, t, *cond)
        return ((a + b) * v - (da + db) * z) / (a * db - da * b)

    def pair(self, x0: Tensor, eps: Tensor, t: Tensor, *cond: Tensor) -> tuple[Tensor, Tensor]:
        """(z_t, target) at t: a point of the straight line, and what the student learns there."""
        return self._line(*self.ends(x0, eps, t, *cond), t)

    def _line(self, z_start: Tensor, z_end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z_t = z_s + (t - t_s)/(t_e - t_s) (z_e - z_s), and its slope, or
        eps* = (z_e - lambda_k z_s)/eta_k."""
        t_start, t_end = self.window(t)
        z_t = z_start + expand((t - t_start) / (t_end - t_start), z_start) * (z_end - z_start)
        if self.parameterization == "velocity":
            return z_t, (z_end - z_start) / expand(t_end - t_start, z_start)
        lambda_k, eta_k = self._ddim(t_start, t_end, z_start)
        return z_t, (z_end - lambda_k * z_start) / eta_k

    def _ddim(self, t_start: Tensor, t_end: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """lambda_k = a_e/a_s, eta_k = b_e - (a_e/a_s) b_s: DDIM is lambda_k z + eta_k eps."""
        a_s, b_s, _, _ = self.path.coefficients(expand(t_start, z))
        a_e, b_e, _, _ = self.path.coefficients(expand(t_end, z))
        return a_e / a_s, b_e - a_e / a_s * b_s

    @torch.no_grad()
    def examples(
        self, x0: Tensor, *cond: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, ...]:
        """(z, t, target, *cond) of reuse * B rows, with eps drawn and t as the student is shown it.

        Each solve, the costly part, serves `reuse` draws of t in its window. Rows i, B + i, ...
        share one: no batch of B or fewer rows in a row meets it twice.
        """
        device = generator.device if generator else x0.device
        t = self.draw(len(x0), generator).to(x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype)
        eps = eps.to(x0.device)
        z_start, z_end, t_start, t_end, *cond = (
            c.repeat(self.reuse, *[1] * (c.dim() - 1))
            for c in (*self.ends(x0, eps, t, *cond), *self.window(t), *cond)
        )
        t = self._draw_in(t_start, t_end, generator)
        z, target = self._line(z_start, z_end, t)
        return z, self.clock(t), target, *cond

    def loss(
        self, student: Field, x0: Tensor, *cond: Tensor, generator: Generator | None = None
    ) -> Tensor:
        """E_{t, eps} |student(z_t, t) - target|^2, a scalar: the mean over batch and dimensions."""
        z, t, target, *cond = self.examples(x0, *cond, generator=generator)
        return (student(z, t, *cond) - target).square().mean()

    # ----------------------------------------------------------------------------------------------
    # Sampling

    def velocity(self, student: Field) -> Field:
        """The student as a velocity field v(z, t, *cond) on the path, given the plain t.

        epsilon: v = ((lambda_k - 1) z + eta_k eps_Theta)/(((1 - w) + w lambda_k)(t_e - t_s)), where
        w = (t_s - t)/(t_s - t_e): with eps* for eps_Theta the line's slope, from any of its points.
        """

        def shown(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            return student(z, self.clock(t), *cond)

        def velocity(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            t_start, t_end = self.window(t)
            lambda_k, eta_k = self._ddim(t_start, t_end, z)
            w = expand((t_start - t) / (t_start - t_end), z)
            step = ((lambda_k - 1) * z + eta_k * shown(z, t, *cond)) / (1 - w + w * lambda_k)
            return step / expand(t_end - t_start, z)

        return shown if self.parameterization == "velocity" else velocity

    def times(self, steps: int) -> Tensor:
        """The sampler's grid, (steps + 1,) float64 from 1 to 0: spread evenly over the windows, the
        remainder to the noisiest. Every edge is in it, so no step crosses one."""
        each, more = divmod(steps, self.windows)
        if each < 1:
            raise ValueError(
                f"{steps} steps are too few for {self.windows} windows: each needs at least one"
            )
        grid = [self.edges[-1:]]
        for k in range(self.windows, 0, -1):
            n = each + (k > self.windows - more)
            w = torch.arange(1, n + 1, dtype=torch.float64) / n
            grid.append((1 - w) * self.edges[k] + w * self.edges[k - 1])
        return torch.cat(grid)

    def sample(self, student: Field, noise: Tensor, *cond: Tensor, steps: int) -> Tensor:
        """Standard noise (B,...) -> x0 (B,...) in `steps` >= K Euler steps, t = 1 down to 0."""
        z, times = self.path.b(self.edges[-1]) * noise, self.times(steps)
        return rf.solve(self.velocity(student), z, *cond, steps=steps, times=times)

    @torch.no_grad()
    def straightness(
        self, velocity: Field, noise: Tensor, *cond: Tensor, steps: int = 32
    ) -> Tensor:
        """(K,), noisiest window first: mean |(z_e - z_s)/(t_e - t_s) - v|^2 along a field's own
        trajectories over mean |(z_e - z_s)/(t_e - t_s)|^2. 0 is straight.

        By `steps` Euler steps a window, which never ask for v on t_e: that is the next window's.
        """
        z, ratios = self.path.b(self.edges[-1]) * noise, []
        times = self.times(steps * self.windows).to(z)
        for i in range(0, steps * self.windows, steps):
            vs = []
            for t, s in zip(times[i : i + steps], times[i + 1 :], strict=False):
                vs.append(velocity(z, t.expand(len(z)), *cond))
                z = z + (s - t) * vs[-1]
            v = torch.stack(vs)  # (steps,B,...)
            chord = v.mean(dim=0)
            ratios.append((chord - v).square().mean() / chord.square().mean())
        return torch.stack(ratios)


# --------------------------------------------------------------------------------------------------
# Plug and play: Delta W = W_PeRFlow - W_teacher, for models fine-tuned from the same teacher

Weights = nn.Module | Mapping[str, Tensor]  # or its state dict


def _same_network(one: Weights, other: Weights) -> tuple[Mapping[str, Tensor], ...]:
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
    student, teacher = _same_network(student, teacher)
    return {key: w - teacher[key].to(w.device) for key, w in student.items()}


def plug(network: nn.Module, delta: Mapping[str, Tensor]) -> None:
    """W += Delta W in place, exact to rounding. ValueError where the delta is of another network.

    Plugging twice adds both and warns: the module remembers in a plain attribute, `plugged`, which
    deep copies carry and state dicts do not.
    """
    state, delta = _same_network(network, delta)
    if getattr(network, "plugged", False):
        warnings.warn("this network has a delta already: another adds to it", stacklevel=2)
    network.load_state_dict({key: w + delta[key].to(w.device) for key, w in state.items()})
    network.plugged = True
