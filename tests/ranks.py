"""`python ranks.py LATENTS OUT`: runs by several ranks, which test_ranks.py compares.

Ranks are forked: the imports of torchrun's would take longer than the runs."""

import contextlib
import functools
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # here, once for all ranks
import torch.distributed as dist
import torch.distributed.fsdp

sys.path.insert(0, str(Path(__file__).parent.parent))
import data.networks
import train
from data.latents import Latents
from training import ranks as parallel

torch.set_num_threads(1)
TINY = ["--depth", "1", "--batch-size", "16", "--lr", "1e-3", "--precision", "fp32", "--seed", "5"]
QUICK = dict(log_every=5, save_every=5, eval_every=1000, warmup=1, validation=10)
QUICK |= dict(ema_decay=0.9, ema_every=1)


def quick(data_set, setattr=setattr, **changes):
    """The data set gets a quick recipe and no report, and compiling needs no C++ compiler."""
    setattr(data_set, "recipe", QUICK | changes)
    setattr(data_set, "report", lambda *args: None)
    setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def stages(latents: str, out: Path) -> list[list]:
    """Each is [number of ranks, run, run, ...], a run the arguments of train.py; its folder has its
    name."""
    at = lambda name, steps, *more: ["--out", out / name, "--steps", steps, *more]
    new = ["--dataset", "latents", "--data", latents, *TINY, "--batch-size", 24]
    deep = lambda name, *more: [*new, "--depth", 2, *at(name, 20, *more)]
    six = lambda *how: [*new, "--accumulate", 3, *at(*how)]  # micro-batches on two ranks
    again = lambda *how: ["--resume", "--data", latents, *at("handed", *how)]
    distil = ["--perflow", out / "ddp6" / "checkpoint.pt", "--data", latents, "--shard"]
    distil += ["--windows", 2, "--evaluations", 4, "--batch-size", 24, *at("student", 1)]
    bf16 = "--precision", "bf16"
    other = [*new, "--lr", "RANK", "--depth", "RANK", *at("refused", 10**9)]
    return [
        [2, other, deep("ddp", "--compile"), deep("whole", "--shard"), six("ddp6", 20),
         deep("ddp16", *bf16), deep("whole16", *bf16, "--shard"), six("handed", 5, "--shard"),
         distil],
        [3, again(10, "--shard")],
        [1, again(20), deep("alone", "--accumulate", 2)],
    ]  # fmt: skip


@contextlib.contextmanager
def refused(file: Path, expected: bool):
    """What a run says that ends with an error, where ranks were started with different flags."""
    if not expected:
        yield
        return
    with file.open("w") as told, contextlib.redirect_stderr(told):
        try:
            yield
        except SystemExit as end:
            told.write(f"exit {end.code}\n")


def main() -> None:
    out = Path(sys.argv[2])
    out.mkdir()
    quick(Latents, eps=1e-8, save_every=20)
    data.networks.CHECKPOINTED = 1
    join, leave = parallel.join, parallel.leave  # one group for all runs of a stage
    parallel.join = lambda device: dist.is_initialized() or join(device)
    parallel.leave = lambda: None
    for world, *runs in stages(sys.argv[1], out):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        os.environ |= dict(WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        ranks = []
        for rank in range(world):
            pid = os.fork()  # nothing has been computed yet
            if pid:
                ranks.append(pid)
                continue
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                for run in runs:
                    sys.argv = ["train.py", *(str(1 + rank if x == "RANK" else x) for x in run)]
                    with refused(out / f"refused-{rank}.txt", "RANK" in run):
                        train.main()
                leave()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if any([os.waitpid(pid, 0)[1] for pid in ranks]):
            sys.exit(1)


if __name__ == "__main__":
    main()
