"""The folder of a run: log, progress bar, checkpoints, signals, and faults that end the run.

One process holds the folder, and its files are whole whatever happens to it. Logs hold no clock
times, so a resumed run writes the same log. Read next: `training/ranks.py`."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path as File

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from training.options import Recipe, reading
from training.ranks import is_sharded, ranks

try:
    import fcntl
except ImportError:  # Windows has none: runs are not held apart there
    fcntl = None


def half_of(path: File) -> File:
    """What a file is called until it is whole. A link is followed."""
    return path.resolve().with_suffix(f".{os.getpid()}.tmp")


@contextlib.contextmanager
def written(path: File) -> Iterator[io.BufferedWriter]:
    """A file to write. It takes its name when it is whole and on the disk: an older one stays until
    then, and where this one fails."""
    half = half_of(path)
    try:
        with half.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        half.replace(path.resolve())
    finally:
        half.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(out: File) -> Iterator[None]:
    """Hold a folder, so that no other process writes into it. The lock ends with the process; then
    folders that it made are removed if they are empty. BlockingIOError where another holds it."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    holder = os.open(out, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(holder)
        raise BlockingIOError(f"--out {out} is in use by another process") from None
    except OSError:  # a file system without locks: the run goes on without one
        pass
    try:
        for name in ("checkpoint", "delta"):  # of a process that was killed while it wrote
            for half in out.glob(f"{name}.*.tmp"):
                half.unlink()
        yield
    finally:
        with contextlib.suppress(OSError):  # one is not empty
            for folder in made:
                folder.rmdir()
        if fcntl:
            os.close(holder)


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by the datasheets


@torch.no_grad()
def training_flops(network: nn.Module, x0: Tensor, *cond: Tensor) -> int:
    """Matmul FLOPs of one example as PyTorch counts them: forward, and twice that for backward.
    The network is not a compiled one: torch.compile gives up blocks that it meets in a count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x0[:1], torch.zeros(1, device=x0.device), *(c[:1] for c in cond))
    return 3 * counter.get_total_flops()


class Run:
    """A run while it trains. The caller sets measure(preview), which returns the metrics and draws
    into the folder `preview`, if there is one. Ctrl-C and SIGTERM end the run after a step, or at
    log time where steps are short or ranks must agree; a second one ends the process at once."""

    measure: Callable[[File | None], dict[str, float]]
    flops = 0  # of one example in training; 0 shows no utilisation

    def __init__(self, out: File, config: dict, state, recipe: Recipe):
        self.out, self.config, self.state, self.recipe = out, config, state, recipe
        self.rank, self.world = ranks()
        # with --shard all ranks must call the network, and rank 0 shows the results
        self.calls = self.rank == 0 or is_sharded(state.network)
        self.device, self.metrics = next(state.network.parameters()).device, {}
        chip = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peaks = PEAK if recipe.precision == "bf16" else {}
        self.peak = next((peaks[name] for name in re.split("[ -]", chip) if name in peaks), 0)
        self.signals = note_signals()
        self.saved = state.step
        if state.step == 0:
            self.save()
        if self.rank == 0:
            cut_log(out / "log.jsonl", state.step)
            self.file = (out / "log.jsonl").open("a")
        self.bar = tqdm(
            range(state.step, recipe.steps), initial=state.step, total=recipe.steps, desc=str(out),
            unit="step", disable=self.rank > 0,
            mininterval=0.1 if sys.stderr.isatty() else 5,  # seconds; a log file stays small
        )  # fmt: skip
        self.since = time.perf_counter()  # of training alone: `train` moves it on

    def gather(self, losses: list[Tensor]) -> tuple[list[float], float]:
        """The losses as numbers, summed over ranks, and how many signals came to any rank."""
        values = torch.stack([*losses, torch.tensor(float(len(self.signals)), device=self.device)])
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.SUM)
        *values, stop = values.tolist()
        self.rate = len(values) * self.recipe.batch_size / (time.perf_counter() - self.since)
        return values, stop

    def interrupted(self) -> bool:
        """Whether to stop before the next log: on a signal, on one rank, where steps are long."""
        return self.world == 1 and bool(self.signals) and time.perf_counter() - self.since > 1

    def evaluate(self) -> dict[str, float]:
        """The metrics on rank 0; the validation loss on all ranks."""
        if self.calls:
            with self.shown() as folder:
                last = self.state.step == self.recipe.steps  # the report follows
                self.metrics = self.measure(None if last else folder)
        loss = torch.tensor(self.metrics.get("val_loss", 0.0), device=self.device)
        if self.world > 1:
            dist.broadcast(loss, 0)
        self.metrics = self.metrics | {"val_loss": loss.item()}
        return self.metrics

    @contextlib.contextmanager
    def shown(self) -> Iterator[File]:
        """The folder to draw into. Ranks above 0 get a temporary one, and print nothing."""
        if self.rank == 0:
            yield self.out
            return
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            yield File(out)

    def log(self, values: list[float], lr: float, metrics: dict[str, float]) -> None:
        if self.rank > 0:
            return
        loss = sum(values) / len(values) / self.world
        entry = {"step": self.state.step, "loss": loss, "lr": lr, **metrics}
        print(json.dumps(entry), file=self.file, flush=True)
        cells = {"loss": f"{loss:.3g}", **{k: f"{v:.2g}" for k, v in self.metrics.items()}}
        cells["samples/s"] = tqdm.format_sizeof(self.rate)
        if self.flops:
            cells["MFU"] = f"{self.rate * self.flops / self.peak / self.world:.0%}"
        self.bar.set_postfix(cells, refresh=False)

    def save(self) -> None:
        if self.calls:
            self.state.save(self.out / "checkpoint.pt", self.config)
        self.saved = self.state.step

    def fault(self, values: list[float], metrics: dict[str, float], saving: bool) -> str | None:
        """The message to exit with, where a loss or a weight that would be saved is not finite; or
        None. A run that has saved nothing but its start leaves no file."""
        step, bad = self.state.step, [i for i, x in enumerate(values) if not math.isfinite(x)]
        if bad:
            what = f"the loss of step {step - len(values) + bad[0] + 1}"
        elif not math.isfinite(metrics.get("val_loss", 0)):
            what = f"the validation loss after step {step}"
        elif saving and not self.state.finite():
            what = f"a weight or a moment after step {step}"
        else:
            return None
        remains = f"the checkpoint of step {self.saved} is kept in {self.out}"
        if self.saved == 0:
            remains = "nothing is kept"
            if self.rank == 0:
                self.file.close()
                for name in ("checkpoint.pt", "log.jsonl"):
                    (self.out / name).unlink(missing_ok=True)
        return f"{what} is not finite: stopped; {remains}; a lower --lr may help"


def note_signals() -> list[int]:
    """A list that gets each Ctrl-C and SIGTERM; a second one ends the process at once.
    (The handlers must not hold the run: it holds DDP, which must be freed before its group.)"""
    signals: list[int] = []

    def note(number: int, frame) -> None:
        signals.append(number)
        if len(signals) > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return signals


def cut_log(path: File, step: int) -> None:
    """Cut the log after its last whole line up to this step."""
    stays = lambda line: line.endswith(b"\n") and json.loads(line)["step"] <= step
    with path.open("ab+") as log, reading(path, "log of a run"):
        log.seek(0)
        log.truncate(sum(map(len, itertools.takewhile(stays, log))))
