"""From a checkpoint, or a released SD3, to samples: load, guide, solve, write.

    python sample.py runs/toy2d/checkpoint.pt --num 5000 --steps 20 --out samples.png
    python sample.py runs/shapes/checkpoint.pt --prompt "a red circle left of a blue square"
    python sample.py SD3_FOLDER --prompt "a red cube on a blue sphere" --steps 28 --cfg 5

Sampling integrates from t = 1 (noise) down to t = 0 (data). A notebook needs three lines:

    import torch, sample
    sampler = sample.load("runs/toy2d/checkpoint.pt")
    x0 = sampler.sample(torch.randn(1000, 2), steps=50)

Read next: `training/checkpoint.py`, what a checkpoint holds: nothing else is needed."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that is cut short

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as File
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.base import DATA, NOISE, seeded
from data.latents import Latents
from mmdit import HEAD_DIM
from perflow import plug
from rf import SOLVERS, Field, InputError, guide
from sd3 import weights
from training.checkpoint import DATASETS, OBJECTIVES, load_weights, objective_of, read
from training.folder import half_of
from training.options import Count, Recipe, command, names, pick, reading
from training.ranks import autocast, check_device, check_memory


@dataclass
class Sampler:
    """A trained network (its averaged weights), and how to sample from it.
    The configuration may be empty for a network of one's own."""

    network: nn.Module
    objective: Any  # a Formulation, or a student's
    config: dict = field(default_factory=dict)
    step: int = 0
    cfg: float | None = None  # the guidance scale of calls that name none

    def __post_init__(self):
        data_set = DATASETS.get(self.config.get("dataset"))
        if self.cfg is None:
            self.cfg = data_set.cfg if data_set and self.null_cond else 1.0

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def null_cond(self) -> tuple[Tensor, ...]:
        """What guidance pushes away from; nothing where training dropped no conditions."""
        dropped = self.config.get("dropout", 1)
        return tuple(getattr(self.network, "null_cond", ())) if dropped else ()

    def encode(self, prompts: Sequence[str], t5: bool = True) -> list[Tensor]:
        """The conditions of these prompts, (B,...) each, on the network's device. From now on
        guidance pushes a released SD3 away from the encoding of no text. t5 = False leaves SD3's
        largest encoder out. ValueError where the model takes no text."""
        if not self.config.get("dataset"):
            raise InputError("a network of one's own takes its conditions as they are")
        data_set, device = DATASETS[self.config["dataset"]], self.device
        self.network.cpu()  # the encoders and the network take turns on a GPU
        cond, null_cond = data_set.encode(self.config["spec"], list(prompts), device=device, t5=t5)
        self.network.to(device)
        if null_cond:
            self.network.null_cond = tuple(null_cond)
        return [c.to(device) for c in cond]

    def guided(self, cfg: float = 1.0) -> Field:
        """The network as it is called: in its precision, with guidance of this scale."""
        if not math.isfinite(cfg) or (cfg != 1 and not self.null_cond):
            reason = "no conditions, fixed guidance, or, of SD3, no prompt yet"
            why = f"{reason}: it is guided away from no text, which `encode` of a prompt sets"
            raise InputError(f"cfg {cfg:g} is not for this model: {why}")
        guided = guide(self.network, [c.to(self.device) for c in self.null_cond], cfg)

        def network(z: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
            with autocast(self.config.get("precision", "fp32"), z.device):
                return guided(z, t, *cond).to(z.dtype)

        return network

    def velocity(self, z: Tensor, t: Tensor, *cond: Tensor, cfg: float | None = None) -> Tensor:
        """The network as a velocity field v(z, t, *cond) on the RF path, whatever it predicts. It
        is guided as in `sample`."""
        field = self.objective.rectified(self.guided(self.cfg if cfg is None else cfg))
        return field(z, t, *cond)

    @torch.no_grad()
    def sample(self, noise: Tensor, *cond: Tensor, cfg: float | None = None, **options) -> Tensor:
        """Standard noise (B,...) -> x0 (B,...), from t = 1 down to 0, by the objective's `sample`.
        options: `steps`, or `times` that fall from 1 to 0; `method` (euler, heun, rk4, ab2; of a
        student euler); `generator` for objectives that draw in sampling. cfg is the scale of
        guidance; 1 is off. ValueError on what does not fit the model."""
        network = self.guided(self.cfg if cfg is None else cfg)
        return self.objective.sample(network, noise, *cond, **options)

    def draw(
        self, n: int, *cond: Tensor, seed: int = 0, progress: bool = False, **options
    ) -> Tensor:
        """n samples in float32 on the CPU, one for each row of cond, in batches."""
        shape, out = self.config["spec"]["shape"], []
        generator, fresh = torch.Generator().manual_seed(seed), seeded(seed, 0, 0, NOISE)
        rows = torch.arange(n).split(max(1, 2**19 // math.prod(shape)))
        for part in tqdm(rows, unit="batch", disable=not progress):
            noise = torch.randn(len(part), *shape, generator=generator)
            inputs = (x.to(self.device) for x in (noise, *(c[part] for c in cond)))
            out.append(self.sample(*inputs, generator=fresh, **options).float().cpu())
        return torch.cat(out)


def load(path: str | File, device: str | torch.device = "cpu", network=None) -> Sampler:
    """A Sampler from a checkpoint, with EMA weights; `network` is for weights of one's own network.
    Or from a released SD3: its folder, its name on the hub, or the transformer's .safetensors file.
    ValueError where the file is missing, damaged or no checkpoint."""
    hub = "/" in str(path) and not str(path).endswith(".pt") and not File(path).exists()
    if hub or File(path).is_dir() or File(path).suffix == ".safetensors":
        return load_released(str(path), check_device(device))
    checkpoint = read(path)
    config = checkpoint["config"]
    if network is None and not config["dataset"]:
        raise InputError(f"checkpoint {path} is of a network of one's own: load(path, network=...)")
    if network is None:
        network = DATASETS[config["dataset"]].network(config["spec"], pick(Recipe, config))
    load_weights(network, checkpoint["ema"], f"checkpoint {path}")
    network = network.to(check_device(device)).eval().requires_grad_(False)
    return Sampler(network, objective_of(config), config, checkpoint["step"])


def load_released(path: str, device: torch.device) -> Sampler:
    """SD3 as released: a rectified flow with shift 3, in bf16 on a GPU.
    Its times are ours, the uniform ones shifted once. diffusers' grid is another: it shifts its
    smallest sigma twice and ends with a step from 0.009 to 0."""
    spec, state = weights.read_released(path)
    precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    state = {key: w.to(dtype) for key, w in state.items()}
    check_memory("the network", sum(w.nbytes for w in state.values()), device)
    depth = len(state["x_embedder.proj.bias"]) // HEAD_DIM
    recipe = Recipe("rf/lognorm(0.00,1.00)", shift=3.0, depth=depth, precision=precision)
    config = asdict(recipe) | dict(dataset="latents", objective=None, teacher=None, spec=spec)
    with torch.device("meta"):
        network = Latents.network(spec, recipe)
    load_weights(network, state, path, assign=True)
    network = network.to(device).eval().requires_grad_(False)
    return Sampler(network, objective_of(config), config)


def plugged(sampler: Sampler, file: str | File) -> Sampler:
    """The sampler's network plus the Delta W of a student, and the student's way to sample.
    ValueError where the delta is of another network or formulation, or no delta at all."""
    delta, config = read(file, "delta"), sampler.config
    student = delta["config"]
    if config["objective"]:
        raise InputError(f"this model is a student already: {file} would be added twice")
    theirs, ours = student["formulation"], config["formulation"]
    if theirs != ours:
        raise InputError(f"{file} is of a {theirs}, not of a {ours}")
    with reading(file, "delta of this model"):
        plug(sampler.network, delta["delta"])
    of_student = {"objective", "teacher", "dropout"}
    of_student |= names(OBJECTIVES[student["objective"]].Options)
    config = config | {key: student[key] for key in of_student}
    return replace(sampler, config=config, objective=objective_of(config), cfg=None)


# ---- The command
def run(
    checkpoint: Annotated[str, "a checkpoint.pt that train.py wrote"],
    num: Annotated[Count | None, "samples (default: 2000 points or 100 images)", 1, 10**7] = None,
    steps: Annotated[Count, "of the solver, from t = 1 to 0", 1, 100_000] = 50,
    solver: Annotated[Literal[tuple(SOLVERS)], "of dz = v dt; in few steps ab2 is best"] = "euler",
    cfg: Annotated[float | None, "guidance scale (default: 3 for shapes, else 1, off)"] = None,
    prompt: Annotated[list[str] | None, "what to draw, of models with text; repeatable"] = None,
    prompts: Annotated[File | None, "a file of prompts, one a line"] = None,
    label: Annotated[int | None, "class of a conditional model (default: all classes)"] = None,
    condition: Annotated[float | None, "the number that a model is conditioned on"] = None,
    plug: Annotated[str | None, "add this delta.pt of a PeRFlow student to the weights"] = None,
    seed: Annotated[int, "of the starting noise", -(2**31), 2**31 - 1] = 0,
    data: Annotated[str | None, "a folder of latents whose held-out texts are drawn"] = None,
    out: Annotated[File, "a .png picture or an .npz of arrays"] = File("samples.png"),
    device: Annotated[str | None, "cpu, cuda, cuda:1, mps (default: cuda if there)"] = None,
    size: Annotated[Count | None, "pixels a side, of a released SD3 (default: 1024)"] = None,
    no_t5: Annotated[bool, "leave SD3's largest text encoder out"] = False,
) -> None:
    if out.suffix not in (".png", ".npz"):
        raise InputError(f"--out {out} must end in .png or .npz")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder")
    if out.parent.is_dir():  # an error now, and not after sampling
        half_of(out).touch()
        half_of(out).unlink()
    where, texts = check_device(device), list(prompt or [])
    if prompts:
        with reading(prompts, "text"):
            texts += filter(str.strip, prompts.read_text(encoding="utf-8-sig").split("\n"))
        if not texts:
            raise InputError(f"--prompts {prompts} is empty")
    if label is not None and condition is not None:
        both = f"--label {label} and --condition {condition:g}"
        raise InputError(f"{both}: a model takes one of them")
    label = label if condition is None else condition
    if texts and (label is not None or data or (num or len(texts)) < len(texts)):
        what = "a --prompt goes with neither --label nor --data nor --condition"
        raise InputError(f"{what}, and --num is at least the number of prompts, {len(texts)}")
    if no_t5 and not texts:
        raise InputError("--no-t5 is for a model that draws what a --prompt says")
    sampler = load(checkpoint, where)
    sampler = plugged(sampler, plug) if plug else sampler
    data_set, spec = DATASETS[sampler.config["dataset"]], sampler.config["spec"]
    if size:
        spec["shape"][1:] = [weights.latent_size(spec, size)] * 2
    n = num or len(texts) or (100 if len(spec["shape"]) == 3 else 2000)
    try:
        if texts:
            cond = [c[torch.arange(n) % len(c)].cpu() for c in sampler.encode(texts, not no_t5)]
        else:
            cond = data_set.conditions(spec, n, label, data, seeded(seed, 0, 0, DATA))
            if data and (null_cond := data_set(data_set.Options(data)).empty(spec)):
                sampler.network.null_cond = null_cond
        out.parent.mkdir(parents=True, exist_ok=True)
        x0 = sampler.draw(n, *cond, seed=seed, progress=True, steps=steps, method=solver, cfg=cfg)
        print(f"wrote {data_set.write(spec, out, x0, *cond, seed=seed, device=where)}")
    except torch.OutOfMemoryError as error:
        raise InputError(f"{where}: a smaller --size needs less memory: {error}") from None


def main() -> None:
    command(run, __doc__)


if __name__ == "__main__":
    main()
