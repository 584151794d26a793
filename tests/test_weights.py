"""SD3 as released, against diffusers' pipeline: drawn from, fine-tuned and distilled by the
commands. It is a tiny random one, see tiny_sd3.py."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers import assert_one_line, in_process, run
from tiny_sd3 import LONG, PROMPTS, close

import sample
import train
from data.latents import Latents
from sd3 import text, weights


def test_a_transformers_file_needs_no_transformer_folder(sd3_folder, tmp_path, monkeypatch, capsys):
    alone = shutil.copytree(sd3_folder, tmp_path / "alone")
    (alone / "transformer/diffusion_pytorch_model.safetensors").rename(alone / "sd3.safetensors")
    shutil.rmtree(alone / "transformer")
    flags = ["--prompt", "a cat", "--steps", 1, "--size", 16, "--out", tmp_path / "x.npz"]
    run(monkeypatch, alone / "sd3.safetensors", *flags, main=sample.main)
    inside = sd3_folder / "transformer/diffusion_pytorch_model.safetensors"
    assert sample.load(inside).config["spec"]["meta"]["vae"] == f"{sd3_folder}/vae"


def test_released_names_give_the_same_network(sd3_folder, pipeline):
    """Loaded from diffusers' names, ours computes the reference's function; the file with the
    released prefix loads, too, and another network's is refused."""
    sampler = sample.load(sd3_folder)
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 6, generator=g), torch.randn(2, 5, 40, generator=g)
    t, pooled = torch.rand(2, generator=g), torch.randn(2, 16, generator=g)
    how = dict(encoder_hidden_states=context, pooled_projections=pooled, return_dict=False)
    with torch.no_grad():
        (expected,) = pipeline.transformer(hidden_states=x, timestep=1000 * t, **how)
    close(sampler.network(x, t, context, pooled), expected, 1e-5)
    state = weights.released_names(weights.read_weights(sd3_folder / "transformer"))
    assert state.keys() == sampler.network.state_dict().keys()
    prefixed = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    again = weights.released_names(prefixed | {"first_stage_model.x": torch.zeros(1)})
    assert all(torch.equal(again[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="not the weights of an SD3 transformer"):
        weights.released_names({"weight": torch.zeros(1)})


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("prompts", [PROMPTS[:2], [LONG]], ids=["two", "long"])
def test_guided_samples_equal_the_pipelines(sd3_folder, pipeline, monkeypatch, t5, prompts):
    """From the same latents on the same sigmas: 5 steps at guidance 5, and the decoded pictures."""
    if not t5:
        monkeypatch.setattr(pipeline, "text_encoder_3", None)
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    how = dict(num_inference_steps=5, guidance_scale=5.0, height=16, width=16)
    latent = pipeline(prompts, latents=noise.clone(), output_type="latent", **how).images
    pictures = pipeline(prompts, latents=noise.clone(), output_type="np", **how).images
    sampler = sample.load(sd3_folder)
    spec = sampler.config["spec"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cond = sampler.encode(prompts, t5=t5)
    x0 = sampler.sample(noise, *cond, times=pipeline.scheduler.sigmas, cfg=5.0)
    close(x0, latent, 1e-4)
    ours = Latents.images(spec, x0).astype(int)
    assert np.abs(ours - np.round(255 * pictures)).max() <= 1
    assert (ours == np.round(255 * pictures)).mean() > 0.99


def test_guidance_of_a_released_model_needs_an_encoded_prompt(sd3_folder):
    """In a notebook, too, it pushes away from the encoding of no text, never from zeros."""
    sampler = sample.load(sd3_folder)
    spec = sampler.config["spec"]
    empty = Latents.encode(spec, ["a cube", ""])[0]
    assert [list(c.shape[1:]) for c in empty] == [spec["context"], spec["pooled"]]  # 77 + 256
    noise, cond = torch.randn(1, 4, 8, 8), [c[:1] for c in empty]
    assert sampler.sample(noise, *cond, steps=2).isfinite().all()
    with pytest.raises(ValueError, match="guided away from no text, which `encode` of a prompt"):
        sampler.sample(noise, *cond, steps=2, cfg=5.0)
    assert all(torch.equal(*pair) for pair in zip(sampler.encode(["a cube"]), cond, strict=True))
    for null, c in zip(sampler.null_cond, empty, strict=True):
        assert torch.equal(null, c[1]) and null.any()
    guided = sampler.sample(noise, *cond, steps=2, cfg=5.0)
    sampler.network.null_cond = tuple(torch.zeros_like(c[0]) for c in cond)
    assert (sampler.sample(noise, *cond, steps=2, cfg=5.0) - guided).abs().max() > 1e-3


def test_our_grid_is_uniform_and_shifted_once(sd3_folder, pipeline):
    """diffusers' differs: its smallest sigma is shifted twice."""
    times = sample.load(sd3_folder).objective.grid(28)
    t = 1 - torch.arange(29, dtype=torch.float64) / 28
    torch.testing.assert_close(times, 3 * t / (1 + 2 * t))
    pipeline.scheduler.set_timesteps(28)
    theirs = pipeline.scheduler.sigmas.double()
    assert theirs[0] == times[0] == 1 and theirs[-1] == times[-1] == 0
    assert theirs[-2].item() == pytest.approx(0.009, abs=5e-4) and times[-2] > 0.09


# ---- through the commands


def test_the_command_draws_a_prompt(sd3_folder, tmp_path, monkeypatch):
    out = tmp_path / "x.npz"
    flags = ["--prompt", "a cat", "--steps", 2, "--cfg", 5, "--size", 16, "--out", out]
    run(monkeypatch, sd3_folder, *flags, main=sample.main)
    arrays = np.load(out)
    assert arrays["arr_0"].shape == (1, 16, 16, 3)
    single = next((sd3_folder / "transformer").glob("*.safetensors"))
    moved = sd3_folder / "sd3.safetensors"  # the transformer's file beside the encoders
    moved.write_bytes(single.read_bytes())
    run(monkeypatch, moved, *flags[:-1], tmp_path / "y.npz", main=sample.main)
    moved.unlink()
    assert (np.load(tmp_path / "y.npz")["arr_0"] == arrays["arr_0"]).all()
    flags[-2:] = ["--no-t5", "--out", tmp_path / "z.png"]
    run(monkeypatch, sd3_folder, *flags, main=sample.main)
    assert (tmp_path / "z.png").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "give it one"),
        (["--prompt", "a cat", "--size", "17"], "--size 17 is not a multiple of 4 up to 48"),
        (["--prompt", "a cat", "--size", "64"], "--size 64 is not a multiple of 4 up to 48"),
        (["--label", "1"], "--label 1 is out of range; this model has no classes"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(sd3_folder, tmp_path, monkeypatch, capsys, flags, says):
    done = in_process(sample.main, [sd3_folder, *flags], tmp_path, monkeypatch, capsys)
    assert_one_line(done, says)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_safetensors_are_named(sd3_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(sd3_folder, tmp_path / "sd3")
    file = next((tmp_path / "sd3/transformer").glob("*.safetensors"))
    file.write_bytes(b"no weights")
    for args in (["sd3"], [file]):
        done = in_process(sample.main, [*args, "--prompt", "a"], tmp_path, monkeypatch, capsys)
        assert_one_line(done, file.name, "no safetensors file")
    file.unlink()
    done = in_process(sample.main, ["sd3", "--prompt", "a"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "has no .safetensors file")


BIAS = "pos_embed.proj.bias"


@pytest.mark.parametrize(
    "key, change, says",
    [
        (BIAS, None, "no transformer of an SD3: 'x_embedder.proj.bias'"),
        (BIAS, lambda w: w[0], "proj is 128 wide, and its bias has the shape ()"),
        (BIAS, lambda w: w[:64], "proj is 128 wide, and its bias has the shape (64,)"),
        (BIAS, lambda w: w.clone().index_fill(0, torch.tensor([5]), torch.nan), "not finite"),
        (BIAS, lambda w: w.to(torch.int8), "x_embedder.proj.bias holds torch.int8"),
        ("transformer_blocks.1.ff.net.2.weight", lambda w: w > 0, "fc2.weight holds torch.bool"),
    ],
)
def test_damaged_weights_are_named(sd3_folder, tmp_path, monkeypatch, capsys, key, change, says):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(sd3_folder, tmp_path / "sd3")
    file = next((copy / "transformer").glob("*.safetensors"))
    state = load_file(file)
    weight = state.pop(key)
    save_file(state | ({key: change(weight)} if change else {}), file)
    done = in_process(sample.main, ["sd3", "--prompt", "a"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, says)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"shift_factor": None}, "shift_factor None is not a number from"),
        ({"scaling_factor": "word"}, "scaling_factor 'word' is not a number from"),
        ({"scaling_factor": 0}, "scaling_factor 0 is not a number from"),
        ({"scaling_factor": float("nan")}, "scaling_factor nan is not a number from"),
    ],
)
def test_a_vae_of_no_good_scale_is_refused_before_sampling(
    sd3_folder, tmp_path, monkeypatch, capsys, changed, says
):
    copy = shutil.copytree(sd3_folder, tmp_path / "sd3")
    file = copy / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    done = in_process(sample.main, ["sd3", "--prompt", "a"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "vae/config.json", says)


# ---- captioned pictures: learned, fine-tuned and distilled


def learn(monkeypatch, out, *flags, lr=1e-12, report=False):
    """Two steps, without an average of the weights; pictures are drawn where a test is of them."""
    if not report:
        monkeypatch.setattr(Latents, "report", lambda *args: None)
    changes = dict(ema_every=1, ema_decay=0.0)
    for own in ("recipe", "distil"):
        monkeypatch.setattr(Latents, own, changes)
    how = ["--steps", 2, "--batch-size", 4, "--lr", lr, "--precision", "fp32", "--out", out]
    run(monkeypatch, *how, *flags)
    return sample.load(out / "checkpoint.pt")


def test_a_model_trained_on_captions_draws_prompts(
    sd3_folder, texts, tmp_path, monkeypatch, own_process
):
    """What it pushes away from is what its training showed: zeros."""
    flags = ["--dataset", "latents", "--data", texts, "--depth", 1]
    sampler = learn(monkeypatch, tmp_path / "run", *flags, report=True)
    assert (tmp_path / "run" / "samples.png").exists()
    assert not any(null.any() for null in sampler.null_cond)
    cond, null_cond = Latents.encode(sampler.config["spec"], ["a cat"])
    assert null_cond is None
    np.testing.assert_allclose(cond[0][0], np.load(texts / "context.npy")[0], rtol=1e-2, atol=1e-3)
    out = tmp_path / "x.npz"
    flags = ["--prompt", "a cat", "a dog", "--steps", 2, "--cfg", 2, "--out", out]
    run(monkeypatch, tmp_path / "run" / "checkpoint.pt", *flags, main=sample.main)
    assert np.load(out)["arr_0"].shape == (2, 16, 16, 3)


def same(network, other):
    own, other = network.state_dict(), other.state_dict()
    assert own.keys() == other.keys()
    return all(torch.allclose(own[key], other[key], atol=1e-8) for key in own)


def test_fine_tuning_starts_from_the_released_weights(
    sd3_folder, texts, tmp_path, monkeypatch, own_process
):
    """And a fine-tuned model is resumed, fine-tuned again, and draws pictures of any size."""
    released = sample.load(sd3_folder)
    flags = ["--init", sd3_folder, "--dataset", "latents", "--data", texts]
    tuned = learn(monkeypatch, tmp_path / "one", *flags)
    assert same(tuned.network, released.network) and tuned.config["shift"] == 3
    assert not same(learn(monkeypatch, tmp_path / "other", *flags, lr=1e-3).network, tuned.network)
    again = learn(monkeypatch, tmp_path / "again", "--init", tmp_path / "other" / "checkpoint.pt")
    assert same(again.network, sample.load(tmp_path / "other" / "checkpoint.pt").network)
    seen, train_ = [], train.train
    spy = lambda state, *rest: (seen.append(state.network.null_cond), train_(state, *rest))[1]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", spy)
        run(patch, "--resume", "--steps", 3, "--out", tmp_path / "one")
    for null, empty in zip(*seen, text.load(sd3_folder)([""]), strict=True):
        torch.testing.assert_close(null, empty[0], rtol=1e-2, atol=1e-3)  # not zeros
    checkpoint = tmp_path / "one" / "checkpoint.pt"
    tuned = sample.load(checkpoint)
    assert tuned.step == 3
    with pytest.raises(ValueError, match="guided away from no text"):
        tuned.guided(2.0)
    flags = ["--prompt", "a cat", "--size", 24, "--steps", 2, "--cfg", 2]
    flags += ["--out", tmp_path / "x.npz"]
    run(monkeypatch, checkpoint, *flags, main=sample.main)
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 24, 24, 3)


def test_training_from_the_released_model_knows_what_guidance_pushes_away_from(
    sd3_folder, texts, tmp_path, monkeypatch, own_process
):
    """The encoding of "", for the network that drops to it and for a teacher of fixed guidance."""
    seen, train_ = [], train.train
    spy = lambda state, objective, *rest: (
        seen.append(state.network),
        train_(state, objective, *rest),
    )[1]
    monkeypatch.setattr(train, "train", spy)
    guide = sample.guide
    watch = lambda field, null, cfg: (
        seen.append([*null]) if cfg == 3 else None,
        guide(field, null, cfg),
    )[1]
    monkeypatch.setattr(sample, "guide", watch)
    flags = ["--dataset", "latents", "--data", texts, "--guidance", "fixed", "--teacher-cfg", 3]
    learn(monkeypatch, tmp_path / "pf", "--perflow", sd3_folder, *flags)
    empty = text.load(sd3_folder)([""])
    nulls = [x if isinstance(x, list) else x.null_cond for x in seen]
    assert len(nulls) >= 2
    for null in nulls:
        for one, other in zip(null, empty, strict=True):
            torch.testing.assert_close(one, other[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "shape, says",
    [
        ((5, 3, 8, 8), "3 channels, not 4"),
        ((5, 4, 9, 8), "multiples of 2 up to 24"),
        ((5, 4, 26, 8), "multiples of 2 up to 24"),
    ],
)
def test_latents_that_do_not_fit_the_released_model(
    shape, says, sd3_folder, texts, tmp_path, monkeypatch, capsys
):
    other = shutil.copytree(texts, tmp_path / "texts")
    np.save(other / "latents.npy", np.zeros(shape, np.float16))
    args = ["--init", sd3_folder, "--dataset", "latents", "--data", other, "--out", "run"]
    assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), says)
    assert not (tmp_path / "run").exists()


def test_a_student_of_the_released_model_plugs_into_a_fine_tuned_one(
    sd3_folder, texts, tmp_path, monkeypatch, own_process
):
    flags = ["--dataset", "latents", "--data", texts]
    tuned = learn(monkeypatch, tmp_path / "tuned", "--init", sd3_folder, *flags, lr=1e-3)
    student = learn(monkeypatch, tmp_path / "pf", "--perflow", sd3_folder, *flags, lr=1e-3)
    before = {key: w.clone() for key, w in tuned.network.state_dict().items()}
    plugged = sample.plugged(tuned, tmp_path / "pf" / "delta.pt")
    assert plugged.objective.windows == student.objective.windows == 4
    released, own = sample.load(sd3_folder).network.state_dict(), student.network.state_dict()
    for key, w in plugged.network.state_dict().items():
        torch.testing.assert_close(w, before[key] + own[key] - released[key])
    assert any((own[key] != released[key]).any() for key in own)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--depth", "3"], "--depth 3 differs from"),
        (["--dataset", "cifar10"], "--dataset cifar10 differs from"),
        (["--resume"], "is for a new run"),
        (["--perflow", "x.pt"], "is for a new run"),
        (["--formulation", "edm(0.00,1.00)"], "differs from"),
    ],
    ids=" ".join,
)
def test_bad_starts_are_one_line(sd3_folder, texts, tmp_path, monkeypatch, capsys, flags, says):
    args = ["--init", sd3_folder, "--data", texts, *flags]
    assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), says)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_other_encoders_are_one_line(sd3_folder, latents, tmp_path, monkeypatch, capsys):
    args = ["--init", sd3_folder, "--data", latents]
    done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "pooled differ")
