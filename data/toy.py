"""The mixtures of `toy2d.py` as the data of a run: what training draws, measures and shows.

    python train.py --dataset toy2d [--mixture grid] [--conditional] [--network mmdit]

Read next: `data/shapes.py`."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Annotated

import torch
from torch import Tensor

import toy2d
from data import pictures
from data.base import DATA, Data, has_truth, save, seeded
from rf import RectifiedFlow, solve
from toy2d import GaussianMixture, load_mixture, reference, relative_excess, yardsticks


def number(value: float, form: str) -> str:
    """Format a number; print 'diverged' for nan and inf."""
    return f"{value:{form}}" if math.isfinite(value) else "diverged"


def metrics_table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':26}{'energy distance':>17}{'total variation':>17}{'beyond 4 sigma':>16}"]
    for name, m in rows.items():
        energy, variation = number(m["energy"], ".2e"), number(m["total_variation"], ".4f")
        lines.append(f"{name:26}{energy:>17}{variation:>17}{number(m['outliers'], '.2%'):>16}")
    return "\n".join(lines)


def scene(mixture: GaussianMixture) -> pictures.Scene:
    """p_t of the RF path as the background of pictures, with room for all modes."""
    reach = mixture.means.norm(dim=1) + 3.5 * mixture.variances.max(dim=1).values.sqrt()
    density = lambda z, t: mixture.log_density(z, t, RectifiedFlow()).exp()
    return density, 1.06 * max(2.6, reach.max().item())


class Toy(Data):
    """A mixture. It is on the CPU, so models of a GPU are measured only at the end of a run."""

    @dataclass
    class Options:
        mixture: Annotated[str | dict, f"{', '.join(toy2d.MIXTURES)}, or FILE.json"] = "ring"
        conditional: Annotated[bool, "give the network the mode's label"] = False

        def __post_init__(self):
            if isinstance(self.mixture, str):  # the checkpoint holds the mixture, not its name
                self.mixture = load_mixture(self.mixture).spec()
            else:
                GaussianMixture(**self.mixture)  # an error where it is none

    @dataclass
    class Spec(Options, Data.Spec):
        def __post_init__(self):
            modes = len(GaussianMixture(**self.mixture).weights) if self.conditional else 0
            if (self.shape, self.classes) != ([2], modes):
                raise ValueError(f"shape {self.shape} and {self.classes} classes do not fit")

    def __init__(self, options: Options):
        self.options, self.mixture = options, GaussianMixture(**options.mixture)
        self.conditional = options.conditional

    def spec(self) -> dict:
        classes = len(self.mixture.weights) if self.conditional else 0
        return asdict(self.Spec([2], classes, **asdict(self.options)))

    def examples(self, n: int, generator: torch.Generator) -> list[Tensor]:
        x0, labels = self.mixture.sample(n, generator)
        return [x0, *[labels] * self.conditional]

    @classmethod
    def arguments(cls, spec):
        return dict(in_channels=2, classes=spec["classes"])

    @classmethod
    def conditions(cls, spec, n, label=None, data=None, generator=None):
        """One label, or labels that are as frequent as their modes."""
        if label is not None or data or not spec["classes"]:
            return super().conditions(spec, n, label, data)
        return [GaussianMixture(**spec["mixture"]).sample(n, generator)[1]]

    @classmethod
    def write(cls, spec, file: File, x0: Tensor, *labels: Tensor, seed=0, device="cpu") -> File:
        """Write a .png or .npz. Print the metrics, with the exact field's from the same noise."""
        mixture, n = GaussianMixture(**spec["mixture"]), len(x0)
        if file.suffix == ".npz":
            save(file, [x0, *labels])
        if labels and len(labels[0].unique()) == 1:
            mixture, labels = mixture.component(labels[0][0].item()), ()
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))[:10_000]
        data, _ = mixture.sample(max(2, n), seeded(seed, 1, 0, DATA))
        if file.suffix == ".png":
            colours, truth = pictures.hues(noise[:2000]), data[: min(n, 2000)]
            save(file, pictures.draw_samples(scene(mixture), x0[:2000], truth, colours))
        if n > 1:
            cond = [c[: len(noise)] for c in labels]
            exact = solve(mixture.field(RectifiedFlow()), noise, *cond, steps=50, method="heun")
            measure = lambda x: toy2d.sample_metrics(x[:10_000], data[:10_000], mixture)
            rows = {"samples": measure(x0), "exact field, same noise": measure(exact)}
            print(metrics_table(rows))
        return file

    # ---- What a run shows
    def metrics(self, model) -> dict[str, float]:
        """The relative excess, where there is a truth to measure it by."""
        if model.device.type != "cpu" or not has_truth(model.objective):
            return {}
        return {"excess": self._excess(model, n=8192)}

    def _excess(self, model, n: int = 65536) -> float:
        judged = model.guided(), model.objective, self.mixture, self.conditional
        return relative_excess(*judged, n=n)

    @torch.no_grad()
    def report(self, model, out: File, teacher=None) -> None:
        model.network.cpu()
        if teacher:
            teacher.network.cpu()
            self._compare(model, out, teacher)
            return
        if has_truth(model.objective):
            excess = number(self._excess(model), ".2e")
            print(f"relative excess of the network's error {excess}")
        run = lambda noise, *cond: model.sample(noise, *cond, steps=50, method="heun")
        y = yardsticks(run, self.mixture, self.conditional)
        exact = {key: y[f"exact_{key}"] for key in ("energy", "total_variation", "outliers")}
        learned = y | {"energy": y["energy"] + exact["energy"]}
        print("10,000 samples in 50 Heun steps, the exact field's from the same noise; 3 seeds:")
        print(metrics_table({"learned": learned, "exact": exact}))
        difference, error = number(y["energy"], ".2e"), number(y["energy_error"], ".0e")
        print(f"difference of the energy distances {difference} (+- {error})")
        self._draw_flow(model, out)

    def _draw_flow(self, model, out: File) -> None:
        null_cond, path, background = model.network.null_cond, RectifiedFlow(), scene(self.mixture)
        field = lambda z, t: model.velocity(z, t, *(c.expand(len(z)) for c in null_cond))
        exact, generator, errors = self.mixture.field(path), torch.Generator().manual_seed(0), {}
        noise = torch.randn(900, 2, generator=generator)
        zs = toy2d.trajectory(field, noise, torch.linspace(1, 0, 49))
        pictures.draw_flow(background, zs).save(out / "flow.png")
        pictures.save_gif(out / "flow.gif", background, zs[:, :700])
        x0, _ = self.mixture.sample(20_000, generator)
        eps = torch.randn(20_000, 2, generator=generator)
        for t in (0.9, 0.5, 0.1):
            z = path.interpolate(x0, eps, t)
            u, v = exact(z, t), field(z, torch.full((len(z),), t))
            errors[t] = ((v - u).square().mean() / u.square().mean()).item()
        pictures.draw_field(background, field, exact, errors).save(out / "field.png")
        subject = " of all modes, without labels" if self.conditional else ""
        print(f"pictures{subject}: {out}/flow.png, {out}/field.png, {out}/flow.gif")

    def _compare(self, student, out: File, teacher) -> None:
        """The yardsticks at equal evaluations; curvature and walks, on the student's path."""
        energy, walks, flow = {}, {}, student.objective

        def measure(model, steps: int) -> str:
            run = lambda noise, *cond: model.sample(noise, *cond, steps=steps)
            y = yardsticks(run, self.mixture, self.conditional)
            energy["student" if model is student else "teacher", steps] = y["energy"]
            error, outliers = f"{y['energy_error']:.0e}", number(y["outliers"], ".2%")
            return f"{number(y['energy'], '.2e')} +- {error}{outliers:>9}"

        print("energy distance above the exact field's, and the share further than 4 sigma:")
        self.compare(student, teacher, measure)
        if ("student", 4) in energy:
            gap = energy["teacher", 4] - energy["teacher", 100]
            gain = energy["teacher", 4] - energy["student", 4]
            share = number(gain / gap if gap else math.nan, ".1%")
            print(f"4-step gap (the teacher's 4 steps less its 100) closed: {share}")
        _, cond, noise, _ = reference(self.mixture, 0, 10_000, self.conditional)
        cond_of_walks, edges = [c[:24] for c in cond], flow.grid(flow.fewest).float()
        a, b, _, _ = (c[:, None, None] for c in flow.path.coefficients(edges))
        steps = f"{flow.fewest} steps" if flow.fewest > 1 else "1 step"
        for name, v in (("teacher", flow.teacher), ("student", flow.velocity(student.guided()))):
            ratios = toy2d.curvature(v, b[0] * noise[:2000], edges, *(c[:2000] for c in cond))
            windows = " ".join(number(ratio, ".1e") for ratio in [ratios.mean(), *ratios])
            print(f"curvature of the {name}: mean, then by window: {windows}")
            zs = toy2d.trajectory(v, b[0] * noise[:24], edges, *cond_of_walks, method="euler")
            walks[f"the {name} in {steps}"] = zs / (a + b)  # on the RF path
        exact = self.mixture.field(RectifiedFlow())
        paths = toy2d.trajectory(exact, noise[:24], torch.linspace(1, 0, 101), *cond_of_walks)
        pictures.draw_walks(scene(self.mixture), paths, walks).save(out / "windows.png")
        print(f"pictures: {out}/windows.png")
