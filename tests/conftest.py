import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identical runs are promised for a CPU only
# the tests' tensors are small: more threads only wait for one another, here and in what is started
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()  # the modules are no garbage: they need not be looked through again and again


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """The run of `finished`, if a test asks for it, goes on beside the tests before that."""
    if not any("finished" in test.fixturenames for test in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp("run") / "whole"
    script = Path(__file__).parent.parent / "train.py"
    flags = f"--dataset toy2d --conditional --steps 450 --batch-size 32 --seed 3 --out {out}"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, script, *flags.split()], **pipes)
    yield out, process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def finished(begun):
    """One whole conditional run on the toy, as a user starts it: its folder, its output."""
    out, process = begun
    told = process.communicate(timeout=300)
    assert process.returncode == 0, told[1]
    return out, subprocess.CompletedProcess(process.args, 0, *told)


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """200 labelled latents (4,4,4) of three classes, as `data.Latents` reads them."""
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    labels = np.arange(200) % 3
    values = rng.standard_normal((200, 4, 4, 4)) * 0.3 + labels[:, None, None, None] - 1
    np.save(folder / "latents.npy", values.astype(np.float16))
    np.save(folder / "labels.npy", labels)
    (folder / "meta.json").write_text("{}")
    return folder


@pytest.fixture
def kill_a_rank():
    """Kill -9 for one of a torchrun job's ranks, after which the job must end and fail."""

    def kill(job: subprocess.Popen) -> None:
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        assert job.wait(timeout=60) != 0

    return kill


@pytest.fixture
def own_process():
    """For tests that run train.main() in this process: its signal handlers and threads go back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    torch.set_num_threads(1)
