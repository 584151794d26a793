"""The exact flow lines of four paths, each in its coordinates: paths.png.

python -m studies.figures --out assets"""

from pathlib import Path as File
from typing import Annotated

import torch
from torch import Tensor

import toy2d
from data.pictures import Canvas, hues, tile
from data.toy import scene
from rf import formulation
from studies.exact import SHOWN, exact_network
from training.options import command


def walk(formula, mixture, noise: Tensor, steps: int) -> Tensor:
    """The states of the exact network's sampler, (steps + 1, n, 2), in the path's coordinates."""
    network, zs = exact_network(formula, mixture), []
    spy = lambda z_in, t: (zs.append(z_in / formula.path.c_in(t)[:, None]), network(z_in, t))[1]
    x0 = formula.sample(spy, noise, steps=steps)
    return torch.stack([*zs, x0])


def run(
    mixture: Annotated[str, "of the flow lines"] = "ring",
    out: Annotated[File, "folder of the pictures"] = File(),
) -> None:
    truth = toy2d.load_mixture(mixture)
    out.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(3))
    colours, panels = hues(noise), []
    for key in SHOWN[:4]:
        lines = walk(formulation(key), truth, noise, 400)
        steps = walk(formulation(key), truth, noise[:12], 5)
        canvas = Canvas(scene(truth), 420).glow(0).lines(lines, colours, 90)
        canvas.lines(steps, colours[:12], 230).points(steps.flatten(0, 1), [(255,) * 3] * 72, 4)
        panels.append(canvas.done(key))
    title = "Exact flow lines; in white, five first-order steps"
    tile([panels[:2], panels[2:]], title).save(out / "paths.png")
    print(f"wrote {out}/paths.png")


if __name__ == "__main__":
    command(run, __doc__)
