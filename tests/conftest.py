import gc
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser  # noqa: F401, a fixture

pytest.register_assert_rewrite("helpers", "tiny_sd3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identical runs are promised for a CPU only
# the tests' tensors are small: more threads only wait for one another, here and in what is started
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()  # the modules are no garbage: they need not be looked through again and again


def pytest_collection_modifyitems(items):
    """The tests of a whole run come last: it goes on beside the others."""
    items.sort(key=lambda test: "finished" in test.fixturenames)


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
    """200 labelled latents (4,4,4) of three classes, as `Latents` reads them."""
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    labels = np.arange(200) % 3
    values = rng.standard_normal((200, 4, 4, 4)) * 0.3 + labels[:, None, None, None] - 1
    np.save(folder / "latents.npy", values.astype(np.float16))
    np.save(folder / "labels.npy", labels)
    (folder / "meta.json").write_text("{}")
    return folder


@pytest.fixture
def few_records(monkeypatch):
    """CIFAR-10 with 20 records in a file."""
    import helpers

    monkeypatch.setattr("data.cifar10.RECORDS", helpers.N)


@pytest.fixture
def cifar(tmp_path, few_records):
    import helpers

    return helpers.cifar10(helpers.write_cifar(tmp_path / "cifar"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> str:
    """A tiny random AutoencoderKL in a folder: 3 x 32 x 32 to 4 x 16 x 16."""
    reason = "the optional package diffusers is not installed: pip install diffusers"
    diffusers = pytest.importorskip("diffusers", reason=reason)
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=1.5, shift_factor=0.25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sd3():
    """The module that makes a released SD3; skipped where its packages are not installed."""
    import tiny_sd3

    return tiny_sd3


@pytest.fixture(scope="session")
def sd3_folder(tiny_sd3, tmp_path_factory):
    return tiny_sd3.write_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def pipeline(tiny_sd3, sd3_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = tiny_sd3.diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def captioned(tiny_sd3, tmp_path_factory):
    return tiny_sd3.write_captioned(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="session")
def texts(tiny_sd3, sd3_folder, captioned, tmp_path_factory):
    """The captioned pictures as latents with texts."""
    out = tmp_path_factory.mktemp("texts") / "latents"
    tiny_sd3.encode_captioned(captioned, sd3_folder, out)
    return out


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
