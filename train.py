"""One training loop for all data and all objectives.

    python train.py --dataset toy2d                           a minute on a CPU: noise to a ring
    python train.py --dataset cifar10 --data DIR --download   pictures, fetched into DIR
    python train.py --perflow runs/toy2d/checkpoint.pt        a few-step student of any checkpoint
    python train.py --resume --out runs/toy2d                 go on where a run stopped
    torchrun --nproc_per_node 8 train.py --dataset latents --data DIR

A run leaves OUT/checkpoint.pt, OUT/log.jsonl and its pictures. Everything drawn in a step comes
from generators seeded by (seed, step, micro-batch), and the micro-batches of a step are counted
over ranks and accumulation alike. So the step is the only state of randomness: a resumed run equals
the uninterrupted one bit for bit on a CPU, and two ranks equal one that accumulates twice.
Time: t = 0 is data, t = 1 is noise. Read next: `studies/README.md`, what was measured with it."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that is cut short

import contextlib
import copy
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path as File

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import perflow
import sample
from checkpoint import DATASETS, load_weights, save, start_from
from configure import compared, configure, make_parser
from data import HELD_OUT, NOISE, seeded
from mmdit import JointBlock
from options import Recipe, pick, ranks, reading
from parallel import add_up, gathered, is_sharded, is_share, join, leave, replicated, sharded, share
from rf import Field, squared_error
from sample import Sampler, autocast


# ---- The examples (z, t, target, *cond): a pure function of (seed, step, micro-batch)
def batches(
    data, objective, recipe: Recipe, null_cond: Sequence[Tensor] = (),
    start: int = 0, rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
) -> Iterator[tuple]:  # fmt: skip
    """The micro-batches of this rank in step start, start + 1, ...: each (z, t, target, *cond).
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
            rows = objective.examples(x0, *cond, generator=generator)
            streams.append(zip(*(x.split(len(x) // block) for x in rows), strict=True))
        return list(zip(*streams, strict=True))

    with ThreadPoolExecutor(1) as thread:
        first, skip = divmod(start, block)
        coming = thread.submit(draw, first)
        for n in itertools.count(first + 1):
            steps, coming = coming.result(), thread.submit(draw, n)
            yield from steps[skip:]
            skip = 0


# ---- The loop
def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then constant or, with decay, a cosine from step 0 to 0 at the end."""
    decay = 0.5 * (1 + math.cos(math.pi * step / recipe.steps)) if recipe.decay else 1
    warmup = min(recipe.warmup, recipe.steps // 10)
    return recipe.lr * min(1, (step + 1) / max(1, warmup)) * decay


class State:
    """What training changes: the network, the average of its weights (EMA), optimizer and step.
    `model` is what is called: the network, maybe compiled or replicated."""

    def __init__(self, network: nn.Module, recipe: Recipe, average: nn.Module | None = None):
        self.network, self.model, self.recipe, self.step = network, network, recipe, 0
        self.losses: list[Tensor] = []  # since the last log, on the device
        self.average = (average or copy.deepcopy(network)).requires_grad_(False).eval()
        how = dict(betas=(0.9, recipe.beta2), eps=recipe.eps, weight_decay=recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, **how, fused=True)

    def load(self, checkpoint: dict, origin: File) -> None:
        """The moments are the checkpoint's, the settings of the optimizer are the recipe's."""
        load_weights(self.network, checkpoint["network"], origin)
        load_weights(self.average, checkpoint["ema"], origin)
        self.step, moments = checkpoint["step"], checkpoint["optimizer"]["state"]
        for i, w in enumerate(self.network.parameters()) if self.step else ():
            shapes = [moments[i][key].shape for key in ("step", "exp_avg", "exp_avg_sq")]
            if shapes != [(), w.shape, w.shape]:
                raise ValueError(f"moments of the shapes {shapes} for weights of {w.shape}")
            for key in ("exp_avg", "exp_avg_sq"):
                moments[i][key] = share(moments[i][key], w)
        device = next(self.network.parameters()).device
        self.losses = [*torch.tensor(checkpoint.get("losses", []), device=device).float()]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def finite(self) -> bool:
        """Whether weights, their average and moments are finite, and their squares are. A run that
        could not go on is never saved."""
        moments = [x for moments in self.optimizer.state.values() for x in moments.values()]
        tensors = [*self.network.parameters(), *self.average.parameters(), *moments]
        own = [x.to_local() if is_share(x) else x for x in tensors]
        finite = torch.stack(torch._foreach_norm(own)).isfinite().all().float()
        if dist.is_initialized():  # a rank may hold a share that no other does
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def save(self, path: File, config: dict | None = None) -> None:
        """A checkpoint; without a configuration, it is of a network and a tensor of one's own.
        Where the weights are shared, all ranks call it, and rank 0 writes."""
        own = dict(dataset=None, objective=None, teacher=None, spec={})
        parts = {"network": self.network, "ema": self.average, "optimizer": self.optimizer}
        state = {name: gathered(part.state_dict()) for name, part in parts.items()}
        config, losses = config or asdict(self.recipe) | own, [x.item() for x in self.losses]
        if ranks()[0] == 0:
            save(path, {"config": config, "step": self.step, "losses": losses, **state})


def train(state: State, objective, batches: Iterator, recipe: Recipe, run: "Run | None" = None):
    """Train the state until recipe.steps: the objective's loss, AdamW, the average of the weights.
    batches gives the micro-batches of each step. A run logs, evaluates, saves and stops: then what
    is returned says why it stopped early: a message, or a signal's exit code."""
    field = objective.field(state.model)
    weights, average = list(state.network.parameters()), list(state.average.parameters())
    for step in run.bar if run else range(state.step, recipe.steps):
        loss, micro_batches = 0, next(batches)
        state.optimizer.zero_grad()
        for i, rows in enumerate(micro_batches):
            add_up(state.model, now=i + 1 == len(micro_batches))
            with autocast(recipe.precision, rows[0].device):
                part = squared_error(field, *objective.target(state.average, rows))
                part = part / len(micro_batches)
            part.backward()
            loss = loss + part.detach()
        if recipe.clip:
            nn.utils.clip_grad_norm_(weights, recipe.clip)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        state.optimizer.step()
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
            run.log(values, metrics)
            state.losses.clear()
        if saving:
            run.save()
        if stop:
            return 128 + (run.signals or [signal.SIGTERM])[0]
        run.since = time.perf_counter()  # samples/s are of training, not of evaluating and saving


@torch.no_grad()
def validation_loss(field: Field, objective, x0: Tensor, *cond: Tensor) -> float:
    """The loss at t = (i + 1/2)/8, as some paths' ends are singular; fixed data and noise."""
    eps = torch.randn(x0.shape, generator=seeded(0, 1, 0, HELD_OUT)).to(x0.device)
    parts = torch.arange(len(x0)).split(max(1, 2**20 // x0[0].numel()))  # to bound the memory
    losses = []
    for t, rows in itertools.product((torch.arange(8) + 0.5) / 8, parts):
        t, rows_cond = t.to(x0.device).expand(len(rows)), [c[rows] for c in cond]
        z, target = objective.pair(x0[rows], eps[rows], t, *rows_cond)
        losses.append((field(z, t, *rows_cond).float() - target).square().flatten(1).mean(1))
    return torch.cat(losses).mean().item()


# ---- What the command adds to the loop
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by the datasheets


@torch.no_grad()
def training_flops(network: nn.Module, x0: Tensor, *cond: Tensor) -> int:
    """Matmul FLOPs of one example, forward and backward (twice the forward), as PyTorch counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x0[:1], torch.zeros(1, device=x0.device), *(c[:1] for c in cond))
    return 3 * counter.get_total_flops()


def compile_blocks(network: nn.Module) -> None:
    """torch.compile, in place, each block of an MM-DiT: all but the last share one compiled code, so
    that a deep network starts in seconds, where the whole of it takes minutes. Or all of another."""
    blocks = [module for module in network.modules() if isinstance(module, JointBlock)]
    for module in blocks or [network]:
        module.compile()


class Run:
    """A run's folder, log and progress bar, its evaluation and saving, its ranks and signals.
    From its making on, Ctrl-C and SIGTERM end it after a step, or at log time where steps are short
    or ranks must agree; a second signal ends the process at once.
    """

    def __init__(self, out: File, config: dict, state: State, data, objective, recipe: Recipe):
        self.out, self.config, self.state, self.recipe = out, config, state, recipe
        self.data, self.objective = data, objective
        self.rank, self.world = ranks()
        # where weights are shared, all ranks call the network for what rank 0 shows
        self.calls = self.rank == 0 or is_sharded(state.network)
        self.sampler = Sampler(state.average, objective, config, recipe.steps)
        self.device, self.metrics = self.sampler.device, {}
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        self.peak = next((r for name, r in PEAK.items() if name in re.split("[ -]", chip)), 0)
        self.flops = 0  # a student's steps are its teacher's work too: not counted
        if self.rank == 0:
            cut_log(out / "log.jsonl", state.step)
            self.file = (out / "log.jsonl").open("a")
        if self.calls:
            self.held_out = [x.to(self.device) for x in data.held_out(recipe.validation)]
            if self.peak and recipe.precision == "bf16" and not config["teacher"]:
                self.flops = training_flops(state.network, *self.held_out)
        signals = self.signals = []  # the handlers must not hold the run, and so DDP, see `main`

        def note(n: int, frame) -> None:
            signals.append(n)
            if len(signals) > 1:
                for half in out.glob(f"*.{os.getpid()}.tmp"):
                    half.unlink(missing_ok=True)
                signal.signal(n, signal.SIG_DFL)
                signal.raise_signal(n)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, note)
        self.saved = state.step
        if state.step == 0:
            self.save()
        self.bar = tqdm(
            range(state.step, recipe.steps), initial=state.step, total=recipe.steps, desc=str(out),
            unit="step", disable=self.rank > 0,
            mininterval=0.1 if sys.stderr.isatty() else 5,  # seconds: a log file is to stay small
        )  # fmt: skip
        self.since = time.perf_counter()

    def gather(self, losses: list[Tensor]) -> tuple[list[float], float]:
        """The losses as numbers, summed over ranks, and how many signals came to any rank."""
        values = torch.stack([*losses, torch.tensor(float(len(self.signals)), device=self.device)])
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.SUM)
        *values, stop = values.tolist()
        self.rate = len(values) * self.recipe.batch_size / (time.perf_counter() - self.since)
        return values, stop

    def interrupted(self) -> bool:
        """Whether a signal need not wait for the next log: alone, and where steps are long."""
        return self.world == 1 and bool(self.signals) and time.perf_counter() - self.since > 1

    def evaluate(self) -> dict[str, float]:
        """Of the average of the weights, on held-out data. All ranks know the loss."""
        loss = torch.zeros((), device=self.device)
        if self.calls:
            field = self.objective.field(self.sampler.guided())
            loss += validation_loss(field, self.objective, *self.held_out)
        if self.world > 1:
            dist.broadcast(loss, 0)
        self.metrics = {"val_loss": loss.item()}
        if self.calls and loss.isfinite():
            self.metrics |= self.data.metrics(self.sampler)
            if self.state.step != self.recipe.steps:
                with self.shown() as out:
                    self.data.preview(self.sampler, out)
        return self.metrics

    @contextlib.contextmanager
    def shown(self) -> Iterator[File]:
        """Where to draw: the run's folder or, for a rank that only helps, one that nobody sees."""
        if self.rank == 0:
            yield self.out
            return
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            yield File(out)

    def log(self, values: list[float], metrics: dict[str, float]) -> None:
        if self.rank > 0:
            return
        loss = sum(values) / len(values) / self.world
        lr = learning_rate(self.recipe, self.state.step - 1)
        entry = {"step": self.state.step, "loss": loss, "lr": lr, **metrics}
        print(json.dumps(entry), file=self.file, flush=True)
        shown = {"loss": f"{loss:.3g}", **{k: f"{v:.2g}" for k, v in self.metrics.items()}}
        shown["samples/s"] = tqdm.format_sizeof(self.rate)
        if self.flops:
            shown["MFU"] = f"{self.rate * self.flops / self.peak / self.world:.0%}"
        self.bar.set_postfix(shown, refresh=False)

    def save(self) -> None:
        if self.calls:
            self.state.save(self.out / "checkpoint.pt", self.config)
        self.saved = self.state.step

    def fault(self, values: list[float], metrics: dict[str, float], saving: bool) -> str | None:
        """What the process exits with where a loss, or a weight that is to be saved, is not finite.
        A run that has saved nothing but its start leaves nothing."""
        step, bad = self.state.step, [i for i, x in enumerate(values) if not math.isfinite(x)]
        if bad:
            what = f"the loss of step {step - len(values) + bad[0] + 1}"
        elif not math.isfinite(metrics.get("val_loss", 0)):
            what = f"the validation loss after step {step}"
        elif saving and not self.state.finite():
            what = f"a weight or a moment after step {step}"
        else:
            return None
        kept = f"the checkpoint of step {self.saved} is kept in {self.out}"
        if self.saved == 0:
            kept = "nothing is kept"
            if self.rank == 0:
                self.file.close()
                for name in ("checkpoint.pt", "log.jsonl"):
                    (self.out / name).unlink(missing_ok=True)
        return f"{what} is not finite: stopped; {kept}; a lower --lr may help"


def cut_log(path: File, step: int) -> None:
    """Keep the log's whole lines up to this step."""
    whole = lambda line: line.endswith(b"\n") and json.loads(line)["step"] <= step
    with path.open("ab+") as log, reading(path, "log of a run"):
        log.seek(0)
        log.truncate(sum(map(len, itertools.takewhile(whole, log))))


# ---- The command: configuration, data, objective, network, loop, report
def main() -> None:
    parser = make_parser(__doc__.split("\n\n")[0])
    given = parser.given()
    with parser.one_line_errors(), contextlib.ExitStack() as held:
        outcome = launch(given, held)
    # After `launch`, whose DDP must be gone: the last owner of the group waits for its threads, and
    # DDP's destructor, unlike the group's own, would do so holding the lock that they wait for.
    leave()
    if outcome:
        sys.exit(outcome)


def launch(given: dict, held: contextlib.ExitStack) -> str | int | None:
    """A whole run. Returns None, or what the process exits with: a message or a signal's code."""
    _, world = ranks()
    config, out, checkpoint, start = configure(given, held)
    recipe = pick(Recipe, config)
    device = sample.check_device(given.get("device"))
    kind = DATASETS[config["dataset"]]
    data = kind(pick(kind.Options, config))
    whose = str(out) if checkpoint else config["teacher"] or given.get("init")
    kept = "all" if checkpoint else "shape" if config["teacher"] else "kind"
    config["spec"] = compared(data.spec(), config["spec"], whose, kept)
    teacher = start if config["teacher"] else None
    empty = data.null_cond if start and config["spec"].get("released") else None
    if empty:  # the encoding of no text
        start.network.null_cond = empty
    if teacher:
        teacher.config["spec"] = config["spec"]  # a released one draws other sizes, too
        if config.get("teacher_cfg", 1.0) != 1:
            teacher.cfg = config["teacher_cfg"]
    objective = sample.objective_of(config, teacher and teacher.guided)
    parts = world * recipe.accumulate * objective.reuse
    if recipe.batch_size % parts:
        of = f"{parts}, which is ranks x --accumulate x {objective.reuse} (rows of one datum)"
        raise ValueError(f"--batch-size {recipe.batch_size} is no multiple of {of}")
    join(device)
    torch.manual_seed(recipe.seed)
    build = lambda: kind.network(config["spec"], recipe)
    shard = partial(sharded, build, device, recipe.precision == "bf16")
    network = shard() if given.get("shard") else build().to(device)
    if start:
        start_from(network, start.network.state_dict(), whose)
    if empty:
        network.null_cond = empty
    del start  # a teacher stays
    state = State(network, recipe, shard(network) if given.get("shard") else None)
    if checkpoint:
        with reading(out / "checkpoint.pt", "checkpoint"):
            state.load(checkpoint, out)
        del checkpoint  # of 16 bytes a parameter
    if recipe.compile:
        compile_blocks(network)
    state.model = replicated(network)
    run = Run(out, config, state, data, objective, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads or threads)
    null_cond = [c.to(device) for c in getattr(network, "null_cond", ())]
    stream = batches(data, objective, recipe, null_cond, state.step, run.rank, world, device)
    outcome = train(state, objective, stream, recipe, run)
    stream.close()
    run.bar.close()
    torch.set_num_threads(threads)
    if isinstance(outcome, int) and run.rank == 0:
        again = f"python train.py --dataset {config['dataset']} --resume --out {out}"
        print(f"stopped; saved step {state.step}. Go on with: {again}")
    if run.calls and not outcome:
        with run.shown() as folder:
            finish(run, folder, teacher)
    return outcome


def finish(run: Run, out: File, teacher: Sampler | None) -> None:
    """After the last step: a student's Delta W, the report of the data, and what to type next."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # all is saved: the report may be cut short
    print("trained; now sampling, measuring and drawing", flush=True)  # minutes for an MM-DiT
    few = ""
    if teacher:
        weights = teacher.network.state_dict()
        few, average = f" --steps {run.objective.fewest}", gathered(run.state.average.state_dict())
        if run.rank == 0:
            delta = perflow.delta(average, weights)
            save(out / "delta.pt", {"delta": delta, "config": run.config})
            ratio = perflow.norm(delta) / perflow.norm(weights)
            print(f"{out}/delta.pt: |Delta W|/|W| = {ratio:.3f}")
    run.data.report(run.sampler, out, teacher)
    print(f"next: python sample.py {out}/checkpoint.pt{few} --out samples.png")


if __name__ == "__main__":
    main()
