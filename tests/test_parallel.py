"""--shard: what FSDP2's ranks learn is what DDP's learn, and their checkpoint is any other's."""

import json
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from test_train import IMAGE_CHANGES, ROOT, TINY

import parallel
import sample
from mmdit import ClassMMDiT, MMDiT
from toy2d import MLP

SCRIPT = f"""
import functools, json, os, sys, traceback
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed.fsdp, data, mmdit, train
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="eager")  # no C++ compiler
recipe, data.Dataset.report = data.Latents.recipe, lambda *a: None
data.Latents.recipe = staticmethod(lambda o: recipe(o) | dict({IMAGE_CHANGES}, eps=1e-8))
start = mmdit.MMDiT.__init__
def checkpointed(self, *args, **how):
    start(self, *args, **how)
    self.checkpointing = True
mmdit.MMDiT.__init__ = checkpointed
join, leave = train.join, train.leave  # one group for all runs of a stage
train.join = lambda device: train.dist.is_initialized() or join(device)
train.leave = lambda: None
for world, port, *runs in json.loads(sys.argv[1]):
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
                sys.argv = ["train.py", *run]
                train.main()
            leave()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if any([os.waitpid(pid, 0)[1] for pid in ranks]):
        sys.exit(1)
"""


def runs_of(tmp_path, *stages):
    """Each stage is a number of ranks and the runs of the command that they make. Ranks are forked:
    the imports of torchrun's would take longer than the runs."""
    script, told = tmp_path / "runs.py", []
    script.write_text(SCRIPT)
    for ranks, *runs in stages:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            told.append([ranks, free.getsockname()[1], *([*map(str, run)] for run in runs)])
    command = [sys.executable, script, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def differ(a, b):
    """The largest difference of the weights and of their averages."""
    a, b = (sample.read(out / "checkpoint.pt") for out in (a, b))
    keys = [(part, key) for part in ("network", "ema") for key in a[part]]
    assert a["network"].keys() == b["network"].keys() and a["step"] == b["step"]
    return max((a[part][key] - b[part][key]).abs().max().item() for part, key in keys)


def test_shares_learn_what_replicas_learn(latents, tmp_path):
    """And one rank that accumulates: 20 steps with clipping and activation checkpointing, to the
    rounding of the gradient's norm, which in bf16 flips that of some weights. One run is begun by
    two ranks, taken over by three and ended by one without --shard. A student learns, too."""
    flags = ["--dataset", "latents", "--data", latents, *TINY, "--depth", 2, "--batch-size", 24]
    out = {
        name: tmp_path / name for name in ("alone", "ddp", "whole", "handed", "ddp16", "whole16")
    }
    at = lambda name, steps, *more: ["--out", out[name], "--steps", steps, *more]
    run = lambda *how: [*flags, "--accumulate", 3, *at(*how)]
    again = lambda *how: ["--resume", "--data", latents, *at("handed", *how)]
    distil = ["--perflow", out["ddp"] / "checkpoint.pt", "--data", latents, "--shard"]
    distil += ["--windows", 2, "--evaluations", 4, "--out", tmp_path / "student", "--steps", 1]
    bf16 = "--precision", "bf16"
    runs_of(
        tmp_path,
        (2, run("ddp", 20, "--compile"), run("whole", 20, "--shard"), run("handed", 5, "--shard"),
         run("ddp16", 20, *bf16), run("whole16", 20, *bf16, "--shard"), [*distil, *flags[-2:]]),
        (3, again(10, "--accumulate", 2, "--shard")),
        (1, again(20, "--accumulate", 6), [*flags, "--accumulate", 6, *at("alone", 20)]),
    )  # fmt: skip
    for name in ("alone", "whole", "handed"):
        assert losses(out[name]) == pytest.approx(losses(out["ddp"]), rel=1e-6)
        assert differ(out[name], out["ddp"]) < 1e-5
    assert losses(out["whole16"]) == pytest.approx(losses(out["ddp16"]), rel=1e-4)
    assert losses(out["whole16"])[0] != losses(out["whole"])[0]
    assert "mmdit.pos_embed" in sample.read(out["ddp"] / "checkpoint.pt")["network"]
    files = {file.name for file in (tmp_path / "student").iterdir()}
    assert files >= {"checkpoint.pt", "delta.pt", "log.jsonl"}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one rank that takes itself for two."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    monkeypatch.setattr(parallel, "ranks", lambda: (0, 2))
    yield
    dist.destroy_process_group()


BUILDERS = {
    "MLP": lambda: MLP(8),
    "classes": lambda: ClassMMDiT(3, 2, in_channels=4, patch_size=2, pos_embed_max_size=4),
    "norms": lambda: MMDiT(2, 3, 2, 4, context_dim=5, pooled_dim=6, qk_norm=True),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_shares_start_as_the_constructor_does(name, alone):
    """To the bit, with real buffers and null conditions; the average starts as its network."""
    torch.manual_seed(3)
    plain, after = BUILDERS[name](), torch.rand(1)
    torch.manual_seed(3)
    shared = parallel.sharded(BUILDERS[name], torch.device("cpu"), bf16=False)
    assert torch.rand(1) == after and parallel.is_sharded(shared)
    state = parallel.gathered(shared.state_dict())
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(w, state[key]) for key, w in plain.state_dict().items())
    average = parallel.sharded(BUILDERS[name], torch.device("cpu"), False, shared)
    again = parallel.gathered(average.state_dict())
    assert all(torch.equal(w, again[key]) for key, w in state.items())
    other = {key: w + 1 for key, w in state.items()}
    sample.load_weights(shared, other, "elsewhere")
    assert all(
        torch.equal(w, other[key]) for key, w in parallel.gathered(shared.state_dict()).items()
    )
    other.popitem()
    with pytest.raises(ValueError, match="elsewhere holds the weights of another network"):
        sample.load_weights(shared, other, "elsewhere")
    with pytest.raises(ValueError, match="elsewhere holds the weights of another network"):
        sample.load_weights(shared, {key: w[..., None] for key, w in state.items()}, "elsewhere")


def test_an_average_is_never_stale(alone):
    """It is called, changed, and called again, as evaluations during a run do."""
    torch.manual_seed(0)
    plain = BUILDERS["classes"]()
    average = parallel.sharded(BUILDERS["classes"], torch.device("cpu"), False)
    sample.load_weights(average, plain.state_dict(), "")
    z, t, label = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 1])
    weights = [*plain.parameters(), *average.parameters()]
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(average(z, t, label), plain(z, t, label))
            for w in weights:
                w.add_(0.1)
