"""--shard: what FSDP2's ranks learn is what DDP's learn, and their checkpoint is any other's."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, run
from ranks import TINY, quick

import sample
from data.latents import Latents
from data.networks import ClassMMDiT, CrossDiT, UViT
from mmdit import MMDiT
from toy2d import MLP
from training import ranks as parallel


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
    two ranks, taken over by three and ended by one without --shard. A student learns, too. Ranks
    that were started with different flags do not begin."""
    script, shares = Path(__file__).parent / "ranks.py", tmp_path / "shares"
    command = [sys.executable, script, latents, shares]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in range(2):
        said, code = (shares / f"refused-{rank}.txt").read_text().splitlines()
        assert code == "exit 2" and "error: the ranks were started with different" in said
        assert "lr" in said and "depth" in said and "batch_size" not in said
    assert not (shares / "refused" / "checkpoint.pt").exists()
    for name, same in (("alone", "ddp"), ("whole", "ddp"), ("handed", "ddp6")):
        assert losses(shares / name) == pytest.approx(losses(shares / same), rel=1e-6)
        assert differ(shares / name, shares / same) < 1e-5
    assert losses(shares / "whole16") == pytest.approx(losses(shares / "ddp16"), rel=1e-4)
    assert losses(shares / "whole16")[0] != losses(shares / "whole")[0]
    assert "mmdit.pos_embed" in sample.read(shares / "ddp" / "checkpoint.pt")["network"]
    files = {file.name for file in (shares / "student").iterdir()}
    assert files >= {"checkpoint.pt", "delta.pt", "log.jsonl"}


def test_a_killed_rank_ends_the_job_which_resumes(
    latents, tmp_path, monkeypatch, kill_a_rank, own_process
):
    out, script = tmp_path / "killed", tmp_path / "train_latents.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import ranks\nranks.quick(ranks.Latents)\nranks.train.main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--dataset", "latents", "--data", str(latents), "--out", str(out), *TINY]
    command = [*launch, str(script), *flags, "--shard", "--steps", "4000"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert job.poll() is None
        time.sleep(0.05)
    kill_a_rank(job)
    step = sample.read(out / "checkpoint.pt")["step"]
    quick(Latents, monkeypatch.setattr)
    run(monkeypatch, *flags, "--steps", step + 10, "--resume")
    assert sample.read(out / "checkpoint.pt")["step"] == step + 10


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one rank that takes itself for two."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    monkeypatch.setattr(parallel, "ranks", lambda: (0, 2))
    yield
    dist.destroy_process_group()


class Zeroed(MLP):
    """A fork's: what its constructor does after the layers have drawn, no layer knows."""

    def __init__(self):
        super().__init__()
        self.bare = torch.nn.Parameter(torch.arange(6.0))
        torch.nn.init.zeros_(self.body[-1].weight)


TEXTS = dict(in_channels=3, patch_size=2, pos_embed_max_size=4, context_dim=5, pooled_dim=6)
BUILDERS = {
    "a zero start and a bare weight": Zeroed,
    "uvit": lambda: UViT(3, **TEXTS),
    "crossdit": lambda: CrossDiT(2, **TEXTS),
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
    now = parallel.gathered(shared.state_dict())
    assert all(torch.equal(w, other[key]) for key, w in now.items())
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
