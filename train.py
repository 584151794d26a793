"""One training loop for all data and all objectives.

    python train.py --dataset toy2d                           a minute on a CPU: noise to a ring
    python train.py --dataset cifar10 --data DIR --download   pictures, fetched into DIR
    python train.py --perflow runs/toy2d/checkpoint.pt        a few-step student of any checkpoint
    python train.py --resume --out runs/toy2d                 go on where a run stopped
    torchrun --nproc_per_node 8 train.py --dataset latents --data DIR

Everything drawn in a step comes from generators seeded by (seed, block of steps, micro-batch); the
micro-batches are counted over ranks and accumulation alike. So the step is the only state of
randomness: a resumed run equals the uninterrupted one bit for bit on a CPU, and two ranks equal one
that accumulates twice. Time: t = 0 is data, t = 1 is noise. Read next: `training/options.py`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that is cut short

import contextlib
import copy
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path as File

import torch
import torch.distributed as dist
from torch import Tensor, nn

import perflow
import sample
from data.base import NOISE, batchwise, seeded, validation
from rf import Field, InputError
from sample import Sampler
from training import ranks as parallel
from training.checkpoint import DATASETS, load_weights, objective_of, save, start_from
from training.configure import configure, make_parser, resume_command
from training.folder import Run, training_flops
from training.optimizer import Optimizer
from training.options import Recipe, pick, reading, say


# ---- The batches: (z_in, t, target, *cond), a pure function of (seed, block of steps, micro-batch)
def batches(
    data, objective, recipe: Recipe, null_cond: Sequence[Tensor] = (),
    start: int = 0, rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
) -> Iterator[tuple]:  # fmt: skip
    """The micro-batches of this rank in step start, start + 1, ...: each (z_in, t, target, *cond).
    A thread draws whole blocks of steps, the next one in advance. null_cond is on the device."""
    micros, block = world * recipe.accumulate, recipe.block
    size = recipe.batch_size * block // (micros * objective.reuse)

    @torch.no_grad()
    def draw(n: int) -> list[tuple]:
        if recipe.threads:
            torch.set_num_threads(recipe.threads)  # this is a thread of its own
        streams = []
        for micro in range(rank * recipe.accumulate, (rank + 1) * recipe.accumulate):
            x0, *cond = data.batch(recipe.seed, n, size, micro, micros, device)
            generator = seeded(recipe.seed, n, micro, NOISE, device)
            if null_cond:
                cond = data.drop(cond, null_cond, recipe.dropout, generator)
            make = partial(objective.examples, generator=generator)
            rows = batchwise(objective, make, size // block, x0, *cond)
            streams.append(zip(*(x.split(len(x) // block) for x in rows), strict=True))
        return list(zip(*streams, strict=True))

    # nested autocasts leave the cache of casts alone: PyTorch may hang where one thread clears it
    # and another one compiles
    with ThreadPoolExecutor(1, initializer=torch.autocast_increment_nesting) as thread:
        first, skip = divmod(start, block)
        coming = thread.submit(draw, first)
        for n in itertools.count(first + 1):
            steps, coming = coming.result(), thread.submit(draw, n)
            yield from steps[skip:]
            skip = 0


# ---- The state and the loop
def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, times 1 or, with decay, a cosine that is 1 in step 0 and 0 after the last."""
    decay = 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) if recipe.decay else 1
    warmup = min(recipe.warmup, recipe.steps // 10)
    return recipe.lr * min(1, (step + 1) / max(1, warmup)) * decay


class State:
    """What training changes: the network, the average of its weights (EMA), optimizer and step.
    `model` is what is called: the network, or what replicates it over the ranks."""

    def __init__(self, network: nn.Module, recipe: Recipe, average: nn.Module | None = None):
        self.network, self.model, self.recipe, self.step = network, network, recipe, 0
        self.losses: list[Tensor] = []  # since the last log, on the device
        self.average = (average or copy.deepcopy(network)).requires_grad_(False).eval()
        self.optimizer = Optimizer(network, recipe)

    def load(self, checkpoint: dict, origin: File) -> None:
        load_weights(self.network, checkpoint["network"], origin)
        load_weights(self.average, checkpoint["ema"], origin)
        self.step, moments = checkpoint["step"], checkpoint["optimizer"]["state"]
        for i, w in enumerate(self.network.parameters()) if self.step else ():
            shapes = {key: tuple(moment.shape) for key, moment in moments[i].items()}
            if shapes != self.optimizer.shapes(w):
                raise ValueError(f"moments of the shapes {shapes} for weights of {w.shape}")
            for key in shapes.keys() - {"step"}:
                moments[i][key] = parallel.share(moments[i][key], w)
        device = next(self.network.parameters()).device
        self.losses = [*torch.tensor(checkpoint.get("losses", []), device=device).float()]
        self.optimizer.load_state_dict(moments)

    def finite(self) -> bool:
        """Whether weights, their average and moments are finite, and their squares are. A run that
        could not go on is never saved."""
        moments = [x for moments in self.optimizer.state.values() for x in moments.values()]
        tensors = [*self.network.parameters(), *self.average.parameters(), *moments]
        local = [x.to_local() if parallel.is_share(x) else x for x in tensors]
        finite = torch.stack(torch._foreach_norm(local)).isfinite().all().float()
        if dist.is_initialized():  # a rank may hold a share that no other does
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def save(self, path: File, config: dict | None = None) -> None:
        """A checkpoint; without a configuration, it is of a network and a tensor of one's own.
        Where the weights are shared, all ranks call it, and rank 0 writes."""
        no_command = dict(dataset=None, objective=None, teacher=None, spec={})
        parts = {"network": self.network, "ema": self.average, "optimizer": self.optimizer}
        state = {name: parallel.gathered(part.state_dict()) for name, part in parts.items()}
        config, losses = config or asdict(self.recipe) | no_command, [x.item() for x in self.losses]
        if parallel.ranks()[0] == 0:
            save(path, {"config": config, "step": self.step, "losses": losses, **state})


def train(state: State, objective, batches: Iterator, recipe: Recipe, run: "Run | None" = None):
    """Train the state until recipe.steps: loss, gradient, optimizer, the average of the weights.
    batches gives the micro-batches of each step. A run logs, evaluates, saves and stops: then what
    is returned says why it stopped early: a message, or a signal's exit code."""
    weights, average = list(state.network.parameters()), list(state.average.parameters())
    for step in run.bar if run else range(state.step, recipe.steps):
        loss, micro_batches = 0, next(batches)
        state.optimizer.zero_grad()
        for i, rows in enumerate(micro_batches):
            parallel.add_up(state.model, now=i + 1 == len(micro_batches))
            with parallel.autocast(recipe.precision, rows[0].device):
                part = objective.rows_loss(state.model, state.average, rows) / len(micro_batches)
            part.backward()
            loss = loss + part.detach()
        if recipe.clip:
            nn.utils.clip_grad_norm_(weights, recipe.clip)
        state.optimizer.step(learning_rate(recipe, step))
        state.step = step + 1
        n, between = divmod(state.step, recipe.ema_every)
        if not between:  # the first updates forget the initialisation faster
            decay = min(recipe.ema_decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - decay)
        if not run:
            continue
        state.losses.append(loss)
        due = lambda every: state.step % every == 0 or state.step == recipe.steps
        if not (due(recipe.log_every) or run.interrupted()):
            continue
        values, stop = run.gather(state.losses)  # the loop's only wait for the device
        saving = due(recipe.save_every) or stop
        metrics = run.evaluate() if due(recipe.eval_every) else {}
        if fault := run.fault(values, metrics, saving):
            return fault
        if due(recipe.log_every):  # a stop between logs leaves the log to the run that goes on
            run.log(values, learning_rate(recipe, step), metrics)
            state.losses.clear()
        if saving:
            run.save()
        if stop:
            return 128 + (run.signals or [signal.SIGTERM])[0]
        run.since = time.perf_counter()  # samples/s are of training, not of evaluating and saving


@torch.no_grad()
def validation_loss(field: Field, objective, x0: Tensor, *cond: Tensor, batch_size=256) -> float:
    """The loss on the rows of `validation`: fixed t, data and noise."""
    losses = [
        (field(z, t, *cond).float() - target).square().flatten(1).mean(1)
        for z, t, target, *cond in validation(objective, x0, *cond, batch_size=batch_size)
    ]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def evaluate(sampler: Sampler, data, held_out: Sequence[Tensor], preview: File | None) -> dict:
    """The metrics of the averaged weights; the folder `preview`, if any, gets a picture."""
    field = sampler.objective.field(sampler.guided())
    size = sampler.config["batch_size"]
    metrics = {"val_loss": validation_loss(field, sampler.objective, *held_out, batch_size=size)}
    if math.isfinite(metrics["val_loss"]):
        metrics |= data.metrics(sampler)
        if preview:
            data.preview(sampler, preview)
    return metrics


# ---- The command: configuration, data, objective, network, state, loop, report
def main() -> None:
    parser = make_parser(__doc__)
    given = parser.given()
    with parser.one_line_errors(), contextlib.ExitStack() as held:
        outcome = launch(given, held)
    # Destroy the group only after `launch` has freed DDP; otherwise the two deadlock.
    parallel.leave()
    if outcome:
        sys.exit(outcome)


def launch(given: dict, held: contextlib.ExitStack) -> str | int | None:
    """A whole run. Returns None, or what the process exits with: a message or a signal's code."""
    # configuration
    config, out, checkpoint, start = configure(given, held, sample.load)
    recipe, device = pick(Recipe, config), parallel.check_device(given.get("device"))
    origin = str(out) if checkpoint else config["teacher"] or given.get("init")
    # data
    data_set = DATASETS[config["dataset"]]
    data = data_set(pick(data_set.Options, config))
    agree = "all" if checkpoint else "shape" if config["teacher"] else "network"
    spec = data.spec()
    config["spec"] = data.agreed(spec, config["spec"] or spec, origin, agree)
    empty = data.empty(config["spec"])
    # objective
    teacher = start if config["teacher"] else None
    if teacher:
        teacher.config["spec"] = config["spec"]  # a released one draws other sizes, too
        teacher.network.null_cond = empty or teacher.network.null_cond
    objective = objective_of(config, teacher and teacher.guided)
    if objective.teacher_cfg != 1:
        teacher.cfg = objective.teacher_cfg
    parts = parallel.ranks()[1] * recipe.accumulate * objective.reuse
    if recipe.batch_size % parts:
        of = f"{parts}, which is ranks x --accumulate x {objective.reuse} (rows of one datum)"
        raise InputError(f"--batch-size {recipe.batch_size} is no multiple of {of}")
    # network
    parallel.join(device)
    whole = config | {key: given.get(key) for key in ("shard", "no_report", "resume")}
    whole["step"] = checkpoint and checkpoint["step"]
    parallel.agree({key: whole[key] for key in whole.keys() - {"data", "download", "teacher"}})
    torch.manual_seed(recipe.seed)
    build = lambda: data_set.network(config["spec"], recipe)
    shard = partial(parallel.sharded, build, device, recipe.precision == "bf16")
    network = shard() if given.get("shard") else build().to(device)
    if start:
        start_from(network, start.network.state_dict(), origin)
    if empty:
        network.null_cond = empty
    if (taken := getattr(network, "times_taken", 1)) != objective.times_given:
        gives = f"{config['objective'] or recipe.formulation} gives {objective.times_given}"
        raise InputError(f"--network {recipe.network} takes {taken} times, and {gives}")
    del start  # a teacher stays
    # state
    state = State(network, recipe, shard(network) if given.get("shard") else None)
    if checkpoint:
        with reading(out / "checkpoint.pt", "checkpoint"):
            state.load(checkpoint, out)
        del checkpoint  # of 16 bytes a parameter
    if recipe.compile:
        parallel.compile_blocks(network)
    state.model = parallel.replicated(network)
    # loop
    sampler = Sampler(state.average, objective, config, recipe.steps)
    run = Run(out, config, state, recipe)
    if run.calls:
        held_out = [x.to(device) for x in data.held_out(recipe.validation)]
        run.measure = lambda preview: evaluate(sampler, data, held_out, preview)
        if run.peak and not teacher:  # a student's steps are its teacher's work, too: not counted
            run.flops = training_flops(objective.field(state.average), *held_out)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or threads)
    null_cond = [c.to(device) for c in getattr(network, "null_cond", ())]
    stream = batches(data, objective, recipe, null_cond, state.step, *parallel.ranks(), device)
    run.since = time.perf_counter()
    outcome = train(state, objective, stream, recipe, run)
    stream.close()
    run.bar.close()
    torch.set_num_threads(threads)
    # report
    if isinstance(outcome, int) and run.rank == 0:
        print(f"stopped; saved step {state.step}. Go on with: {resume_command(given, config, out)}")
    if run.calls and not outcome:
        with run.shown() as folder:
            report(sampler, None if given.get("no_report") else data, teacher, folder)
    return outcome


def report(sampler: Sampler, data, teacher: Sampler | None, out: File) -> None:
    """After the last step: a student's Delta W, the report of the data, if it is wanted, and what
    to type next."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # all is saved: the report may be cut short
    steps = ""
    if teacher:
        weights = teacher.network.state_dict()
        average = parallel.gathered(sampler.network.state_dict())
        steps = f" --steps {sampler.objective.fewest}"
        if parallel.ranks()[0] == 0:
            delta = perflow.delta(average, weights)
            save(out / "delta.pt", {"delta": delta, "config": sampler.config})
            ratio = perflow.norm(delta) / perflow.norm(weights)
            print(f"{out}/delta.pt: |Delta W|/|W| = {ratio:.3f}")
    if data:
        say("trained; now sampling, measuring and drawing")  # minutes for an MM-DiT
        data.report(sampler, out, teacher)
    print(f"next: python sample.py {out}/checkpoint.pt{steps} --out samples.png")


if __name__ == "__main__":
    main()
