"""Checkpoints are whole or not there, and one that is damaged or another's ends in one line."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, in_process

import sample
import train
from data.base import Dataset
from training.checkpoint import DATASETS, save, start_from
from training.options import Recipe, names

# Of the commands before Recipe had `network`: each a configuration, and the shapes of the weights
KEPT = json.loads((Path(__file__).parent / "kept.json").read_text())


@pytest.mark.parametrize("name", KEPT)
def test_a_new_knob_costs_no_checkpoint(name, tmp_path):
    """What an older one lacks has its default; the network is the one it was."""
    config, file = KEPT[name]["config"], tmp_path / "checkpoint.pt"
    weights = {key: torch.zeros(shape) for key, shape in KEPT[name]["shapes"].items()}
    moments = dict(state={}, param_groups=[])
    save(file, dict(config=config, step=2, network=weights, ema=weights, optimizer=moments))
    sampler = sample.load(file)
    assert sampler.config.items() >= {**config, "spec": sampler.config["spec"]}.items()
    assert sampler.config.keys() >= names(Recipe)
    assert sampler.config["network"] == config.get("network", "mmdit")
    cond = DATASETS[config["dataset"]].conditions(sampler.config["spec"], 2)
    assert sampler.draw(2, *cond, steps=4).isfinite().all()


def test_a_failing_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save(path, {"step": 1})

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"step": 2})
    assert torch.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_previous_checkpoint(
    finished, tmp_path, monkeypatch, capsys, own_process
):
    """A file-size limit below a checkpoint's stands for the disk: one line, and nothing is lost."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    before = (out / "checkpoint.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        more = "--resume", "--out", out, "--steps", 600
        done = in_process(train.main, more, tmp_path, monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.tmp"))


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def write_damaged(folder: Path, whole: Path) -> dict[str, Path]:
    files = {
        name: folder / f"{name}.pt"
        for name in ("truncated", "text", "empty", "bomb", "list", "other", "config", "old")
    }
    files["truncated"].write_bytes(whole.read_bytes()[:-2000])
    files["text"].write_text("hello")
    files["empty"].write_bytes(b"")
    files["bomb"].write_bytes(pickle.dumps(Bomb()))
    torch.save([1, 2], files["list"])
    checkpoint = torch.load(whole)
    torch.save({**checkpoint, "ema": {"weight": torch.zeros(1)}}, files["other"])
    torch.save({**checkpoint, "config": {}}, files["config"])
    old = {k: v for k, v in checkpoint["config"].items() if k not in ("objective", "beta2")}
    torch.save(
        {**checkpoint, "config": old | {"perflow": None, "betas": [0.9, 0.99]}}, files["old"]
    )
    return files


def test_bad_checkpoints_are_refused(finished, tmp_path, monkeypatch, capsys):
    says = {
        "other": "another network",
        "config": "older version",
        "list": "no config, ema, network, optimizer, step",
    }
    says["old"] = "it is of an older version: no"
    for name, file in write_damaged(tmp_path, finished[0] / "checkpoint.pt").items():
        done = in_process(sample.main, [file], tmp_path, monkeypatch, capsys)
        assert_one_line(done, file.name, says.get(name, "damaged or no checkpoint"))
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "samples.png").exists()


def test_weights_start_on_another_size():
    """A position table of another length is the network's own; another width is not the network."""
    torch.manual_seed(0)
    build = lambda size, depth=1: Dataset.network(
        dict(shape=[4, size, size], classes=2, context=None, pooled=None), Recipe(depth=depth)
    )
    small, large = build(8), build(16)
    table = large.mmdit.pos_embed.clone()
    start_from(large, small.state_dict(), "the small one")
    assert torch.equal(large.mmdit.pos_embed, table)
    assert torch.equal(large.mmdit.x_embedder.proj.weight, small.mmdit.x_embedder.proj.weight)
    with pytest.raises(ValueError, match="the small one holds the weights of another network"):
        start_from(build(8, depth=2), small.state_dict(), "the small one")
    with pytest.raises(ValueError, match="the large one holds the weights of another network"):
        sample.load_weights(small, large.state_dict(), "the large one")


def test_an_old_student_gets_one_line(finished, tmp_path, monkeypatch, capsys):
    """Its clock had a gap, which no student has now. An old teacher, which had none, loads."""
    content = torch.load(finished[0] / "checkpoint.pt")
    old = dict(windows=4, evaluations=32, parameterization="velocity", guidance="sync")
    old |= dict(teacher_cfg=1.0, edge_share=0.5, clock_gap=0.25, reuse=4, method="heun")
    config = content["config"] | old | {"objective": "perflow", "teacher": "t.pt"}
    torch.save(content | {"config": config}, tmp_path / "old.pt")
    done = in_process(sample.main, ["old.pt"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "old.pt", "of another version: it has clock_gap, edge_share")
    del content["config"]["teacher_digest"]  # checkpoints of older versions have none
    torch.save(content, tmp_path / "teacher.pt")
    assert sample.load(tmp_path / "teacher.pt").step == content["step"]
