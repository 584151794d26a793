"""SD3's encoders and its released layout, against diffusers' pipeline: a tiny random one, made here
from configurations, so that nothing is downloaded."""

import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch

reason = "the optional packages transformers and diffusers are not installed"
transformers = pytest.importorskip("transformers", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

from PIL import Image  # noqa: E402
from test_train import assert_one_line, in_process, run  # noqa: E402

import data  # noqa: E402
import sample  # noqa: E402
import text  # noqa: E402
import train  # noqa: E402
from data import Latents  # noqa: E402

PROMPTS = ["a cat on a mat", "xyz", ""]
LONG = " ".join(["a cat on a mat"] * 20)  # of more than 77 tokens


def clip_tokenizer(folder, **how):
    """A word is its letters, the last one marked."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.CLIPTokenizer(*files, model_max_length=77, **how)


def t5_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁a", -2.5),
        ("cat", -2.6),
    ]
    pieces += [(chr(c), -3.0) for c in range(97, 123)]
    model = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    end = [("</s>", 1)]
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    marks = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    how = dict(tokenizer_object=model, model_max_length=256, **marks)
    transformers.PreTrainedTokenizerFast(**how).save_pretrained(folder)
    return transformers.T5TokenizerFast.from_pretrained(folder)


def clip(width, projected, tokens=54):
    how = dict(hidden_size=width, projection_dim=projected, intermediate_size=16, vocab_size=tokens)
    how |= dict(num_hidden_layers=3, num_attention_heads=2, eos_token_id=53, bos_token_id=52)
    config = transformers.CLIPTextConfig(**how, pad_token_id=53)
    return transformers.CLIPTextModelWithProjection(config)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A released SD3 in diffusers' layout, of depth 2 and with every weight random."""
    place = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    t5 = dict(vocab_size=32, d_model=40, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=64, num_attention_heads=2, joint_attention_dim=40,
        caption_projection_dim=128, pooled_projection_dim=6 + 10, pos_embed_max_size=12,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, latent_channels=4,
        scaling_factor=1.5, shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=network, vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=clip_tokenizer(place / "1", pad_token="<|endoftext|>"), text_encoder=clip(8, 6),
        tokenizer_2=clip_tokenizer(place / "2", pad_token="a"), text_encoder_2=clip(12, 10),
        tokenizer_3=t5_tokenizer(place / "3"),
        text_encoder_3=transformers.T5EncoderModel(transformers.T5Config(**t5)),
    )  # fmt: skip
    pipeline.save_pretrained(place / "folder")
    return place / "folder"


@pytest.fixture(scope="session")
def pipeline(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def close(x, y, rel):
    assert ((x - y).norm() / y.norm()).item() < rel


@pytest.mark.parametrize("t5", [True, False])
def test_encodings_equal_the_pipelines(folder, pipeline, monkeypatch, t5):
    """Context and pooled, for a prompt longer than 77 tokens too, and for the empty one."""
    if not t5:
        monkeypatch.setattr(pipeline, "text_encoder_3", None)
    encoder = text.load(folder, t5)
    with pytest.warns(UserWarning, match="is cut to 77"):
        context, pooled = encoder([*PROMPTS, LONG])
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        [*PROMPTS, LONG], None, None, do_classifier_free_guidance=False
    )
    assert context.shape == expected.shape == (4, 77 + 256, 40) and pooled.shape == (4, 16)
    close(context, expected, 1e-5)
    close(pooled, expected_pooled, 1e-5)
    assert (context[:, 77:] == 0).all() == (not t5)
    short = text.load(folder, t5, t5_tokens=77)(PROMPTS[:1])[0]
    assert short.shape == (1, 77 + 77, 40)  # the paper's number


def test_parts_are_the_encoders_shares(folder):
    """Dropping a part zeroes what this encoder gave, and nothing else."""
    encoder = text.load(folder)
    context, pooled = encoder(PROMPTS[:1])
    regions = []
    for part in encoder.parts:
        marks = [torch.zeros_like(context), torch.zeros_like(pooled)]
        for i, *spans in part:
            marks[i][(slice(None), *(slice(*span) for span in spans))] = 1
        regions.append(torch.cat([m.flatten() for m in marks]))
    total = torch.stack(regions).sum(0)
    given = torch.cat([context.flatten(), pooled.flatten()]) != 0
    assert total.max() == 1 and (total[given] == 1).all()
    assert regions[0].sum() == 77 * 8 + 6 and regions[1].sum() == 77 * 12 + 10
    assert regions[2].sum() == 256 * 40
    assert text.load(folder, t5=False).parts == encoder.parts[:2]  # else a tenth would be a fifth


def test_many_prompts_are_encoded_in_batches(folder):
    prompts = [f"a cat {'x' * i}" for i in range(20)]
    encoder = text.load(folder)
    apart = [encoder([prompt]) for prompt in prompts]
    for whole, *parts in zip(encoder(prompts), *apart, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_a_transformers_file_needs_no_transformer_folder(folder, tmp_path, monkeypatch, capsys):
    alone = shutil.copytree(folder, tmp_path / "alone")
    (alone / "transformer/diffusion_pytorch_model.safetensors").rename(alone / "sd3.safetensors")
    shutil.rmtree(alone / "transformer")
    flags = ["--prompt", "a cat", "--steps", 1, "--size", 16, "--out", tmp_path / "x.npz"]
    run(monkeypatch, alone / "sd3.safetensors", *flags, main=sample.main)
    inside = folder / "transformer/diffusion_pytorch_model.safetensors"
    assert sample.load(inside).config["spec"]["meta"]["vae"] == f"{folder}/vae"


def test_released_names_give_the_same_network(folder, pipeline):
    """Loaded from diffusers' names, ours computes the reference's function; the file with the
    released prefix loads, too, and another network's is refused."""
    sampler = sample.load(folder)
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 6, generator=g), torch.randn(2, 5, 40, generator=g)
    t, pooled = torch.rand(2, generator=g), torch.randn(2, 16, generator=g)
    how = dict(encoder_hidden_states=context, pooled_projections=pooled, return_dict=False)
    with torch.no_grad():
        (expected,) = pipeline.transformer(hidden_states=x, timestep=1000 * t, **how)
    close(sampler.network(x, t, context, pooled), expected, 1e-5)
    state = text.released_names(text.read_weights(folder / "transformer"))
    assert state.keys() == sampler.network.state_dict().keys()
    prefixed = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    again = text.released_names(prefixed | {"first_stage_model.x": torch.zeros(1)})
    assert all(torch.equal(again[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="not the weights of an SD3 transformer"):
        text.released_names({"weight": torch.zeros(1)})


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("prompts", [PROMPTS[:2], [LONG]], ids=["two", "long"])
def test_guided_samples_equal_the_pipelines(folder, pipeline, monkeypatch, t5, prompts):
    """From the same latents on the same sigmas: 5 steps at guidance 5, and the decoded pictures."""
    if not t5:
        monkeypatch.setattr(pipeline, "text_encoder_3", None)
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(1))
    how = dict(num_inference_steps=5, guidance_scale=5.0, height=16, width=16)
    latent = pipeline(prompts, latents=noise.clone(), output_type="latent", **how).images
    pictures = pipeline(prompts, latents=noise.clone(), output_type="np", **how).images
    sampler = sample.load(folder)
    spec = sampler.config["spec"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cond, sampler.network.null_cond = Latents.encode(spec, prompts, t5=t5)
    x0 = sampler.sample(noise, *cond, times=pipeline.scheduler.sigmas, cfg=5.0)
    close(x0, latent, 1e-4)
    ours = Latents.images(spec, x0).astype(int)
    assert np.abs(ours - np.round(255 * pictures)).max() <= 1
    assert (ours == np.round(255 * pictures)).mean() > 0.99


def test_our_grid_is_uniform_and_shifted_once(folder, pipeline):
    """diffusers' differs: its smallest sigma is shifted twice."""
    times = sample.load(folder).objective.times(28)
    t = 1 - torch.arange(29, dtype=torch.float64) / 28
    torch.testing.assert_close(times, 3 * t / (1 + 2 * t))
    pipeline.scheduler.set_timesteps(28)
    theirs = pipeline.scheduler.sigmas.double()
    assert theirs[0] == times[0] == 1 and theirs[-1] == times[-1] == 0
    assert theirs[-2].item() == pytest.approx(0.009, abs=5e-4) and times[-2] > 0.09


# ---- through the commands


def test_the_command_draws_a_prompt(folder, tmp_path, monkeypatch):
    out = tmp_path / "x.npz"
    flags = ["--prompt", "a cat", "--steps", 2, "--cfg", 5, "--size", 16, "--out", out]
    run(monkeypatch, folder, *flags, main=sample.main)
    arrays = np.load(out)
    assert arrays["arr_0"].shape == (1, 16, 16, 3)
    single = next((folder / "transformer").glob("*.safetensors"))
    moved = folder / "sd3.safetensors"  # the transformer's file beside the encoders
    moved.write_bytes(single.read_bytes())
    run(monkeypatch, moved, *flags[:-1], tmp_path / "y.npz", main=sample.main)
    moved.unlink()
    assert (np.load(tmp_path / "y.npz")["arr_0"] == arrays["arr_0"]).all()
    run(monkeypatch, folder, *flags[:-2], "--no-t5", "--out", tmp_path / "z.png", main=sample.main)
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
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys, flags, says):
    done = in_process(sample.main, [folder, *flags], tmp_path, monkeypatch, capsys)
    assert_one_line(done, says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "part", ["tokenizer_2", "text_encoder", "transformer", "text_encoder_3", "vae"]
)
def test_a_missing_part_is_named(folder, tmp_path, monkeypatch, capsys, part):
    shutil.copytree(folder, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / part)
    args = ["sd3", "--prompt", "a cat", "--steps", "1", "--size", "16"]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, f"has no {part}")
    assert ("--no-t5 does without" in done.stderr) == (part == "text_encoder_3")


def test_files_that_are_no_safetensors_are_named(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "sd3")
    file = next((tmp_path / "sd3/transformer").glob("*.safetensors"))
    file.write_bytes(b"no weights")
    for args in (["sd3"], [file]):
        done = in_process(sample.main, [*args, "--prompt", "a"], tmp_path, monkeypatch, capsys)
        assert_one_line(done, file.name, "is no safetensors file")
    file.unlink()
    done = in_process(sample.main, ["sd3", "--prompt", "a"], tmp_path, monkeypatch, capsys)
    assert_one_line(done, "has no .safetensors file")


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    args = [folder, "--prompt", "a cat", "--size", "16"]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "need the optional package transformers: pip install transformers")


def test_too_little_gpu_memory_says_how_much_is_needed(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r": 2\.0 GB on cuda, which has 1\.0 GB left; leave"):
        text.reserve("the text encoders", 2**31, gpu, "; leave T5 out")
    text.reserve("the text encoders", 2**29, gpu)


# ---- captioned pictures: encoded, learned, fine-tuned and distilled

CAPTIONS = ["a cat", "a dog on a mat", "xyz", "cat and cat", "a"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Five pictures of noise, one in a folder below; two captions beside them, the rest in a list.
    The file beside a picture counts where there are both."""
    place, g = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    (place / "more").mkdir()
    files = ["0.png", "1.jpg", "2.png", "3.png", "more/4.png"]
    for file in files:
        Image.fromarray(g.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(place / file)
    (place / "0.txt").write_text(f"{CAPTIONS[0]}\n")
    (place / "more" / "4.txt").write_text(CAPTIONS[4])
    lines = [*zip(files[1:4], CAPTIONS[1:4], strict=True), (files[4], "not this one")]
    lines = [json.dumps({"file_name": file, "text": caption}) for file, caption in lines]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


@pytest.fixture(scope="module")
def texts(folder, captioned, tmp_path_factory):
    out = tmp_path_factory.mktemp("texts") / "latents"
    encode(captioned, folder, out)
    return out


def encode(captioned, folder, out, **how):
    data.encode(images=captioned, text=str(folder), size=16, batch_size=2, out=out, **how)


def test_captions_are_encoded_by_both_conventions(folder, texts):
    encoder = text.load(folder)
    for array, expected in zip(("context", "pooled"), encoder(CAPTIONS), strict=True):
        stored = np.load(texts / f"{array}.npy")
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, expected, rtol=1e-2, atol=1e-3)
    assert np.load(texts / "latents.npy").shape == (5, 4, 8, 8)
    learned = Latents(Latents.Options(data=str(texts)))
    assert learned.meta["text"] == str(folder) and learned.meta["t5_tokens"] == 256
    spans = [[(i, *map(tuple, spans)) for i, *spans in part] for part in encoder.parts]
    slices = [[(i, *((s.start, s.stop) for s in at)) for i, *at in part] for part in learned.parts]
    assert slices == spans


def test_a_stopped_encode_of_captions_goes_on(folder, captioned, texts, tmp_path, monkeypatch):
    def stop(path, size):
        if path.name == "4.png":
            raise KeyboardInterrupt
        return load(path, size)

    load = data.load_image
    monkeypatch.setattr(data, "load_image", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(captioned, folder, tmp_path)
    assert not (tmp_path / "latents.npy").exists()
    with (tmp_path / "context.npy.part").open("ab") as file:
        file.write(b"torn")
    with pytest.raises(ValueError, match="is of other images, --size, --vae or --text"):
        encode(captioned, folder, tmp_path, no_t5=True)
    monkeypatch.setattr(data, "load_image", load)
    encode(captioned, folder, tmp_path)
    for name in ("latents", "context", "pooled"):
        assert (tmp_path / f"{name}.npy").read_bytes() == (texts / f"{name}.npy").read_bytes()


def test_bad_captions_are_one_line(folder, captioned, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(captioned, tmp_path / "copy")
    (copy / "more" / "4.txt").unlink()
    (copy / "metadata.jsonl").write_text("[]")
    args = ["encode", "--images", copy, "--text", folder, "--out", "x", "--size", "16"]
    done = in_process(data.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "metadata.jsonl is damaged or no lines of file_name and text")
    (copy / "metadata.jsonl").unlink()
    done = in_process(data.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "1.jpg has no caption: no .txt beside it, no line in metadata.jsonl")
    args = ["encode", "--images", copy, "--out", "x"]
    done = in_process(data.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "needs --vae, or --text")
    assert not (tmp_path / "x").exists()


def learn(monkeypatch, out, *flags, lr=1e-12, report=False):
    """Two steps, without an average of the weights; pictures are drawn where a test is of them."""
    if not report:
        monkeypatch.setattr(Latents, "report", lambda *args: None)
    own, changes = Latents.recipe, dict(ema_every=1, ema_decay=0.0)
    monkeypatch.setattr(Latents, "recipe", staticmethod(lambda options: own(options) | changes))
    monkeypatch.setattr(Latents, "distil", Latents.distil | changes)
    how = ["--steps", 2, "--batch-size", 4, "--lr", lr, "--precision", "fp32", "--out", out]
    run(monkeypatch, *how, *flags)
    return sample.load(out / "checkpoint.pt")


def test_a_model_trained_on_captions_draws_prompts(
    folder, texts, tmp_path, monkeypatch, own_process
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
    folder, texts, tmp_path, monkeypatch, own_process
):
    """And a fine-tuned model is resumed, fine-tuned again, and draws pictures of any size."""
    released = sample.load(folder)
    flags = ["--init", folder, "--dataset", "latents", "--data", texts]
    tuned = learn(monkeypatch, tmp_path / "one", *flags)
    assert same(tuned.network, released.network) and tuned.config["shift"] == 3
    assert not same(learn(monkeypatch, tmp_path / "other", *flags, lr=1e-3).network, tuned.network)
    again = learn(monkeypatch, tmp_path / "again", "--init", tmp_path / "other" / "checkpoint.pt")
    assert same(again.network, sample.load(tmp_path / "other" / "checkpoint.pt").network)
    run(monkeypatch, "--resume", "--steps", 3, "--out", tmp_path / "one")
    checkpoint = tmp_path / "one" / "checkpoint.pt"
    assert sample.load(checkpoint).step == 3
    flags = ["--prompt", "a cat", "--size", 24, "--steps", 2, "--out", tmp_path / "x.npz"]
    run(monkeypatch, checkpoint, *flags, main=sample.main)
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (1, 24, 24, 3)


def test_training_from_the_released_model_knows_what_guidance_pushes_away_from(
    folder, texts, tmp_path, monkeypatch, own_process
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
    learn(monkeypatch, tmp_path / "pf", "--perflow", folder, *flags)
    empty = text.load(folder)([""])
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
    shape, says, folder, texts, tmp_path, monkeypatch, capsys
):
    other = shutil.copytree(texts, tmp_path / "texts")
    np.save(other / "latents.npy", np.zeros(shape, np.float16))
    args = ["--init", folder, "--dataset", "latents", "--data", other, "--out", "run"]
    assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), says)
    assert not (tmp_path / "run").exists()


def test_a_student_of_the_released_model_plugs_into_a_fine_tuned_one(
    folder, texts, tmp_path, monkeypatch, own_process
):
    flags = ["--dataset", "latents", "--data", texts]
    tuned = learn(monkeypatch, tmp_path / "tuned", "--init", folder, *flags, lr=1e-3)
    student = learn(monkeypatch, tmp_path / "pf", "--perflow", folder, *flags, lr=1e-3)
    before = {key: w.clone() for key, w in tuned.network.state_dict().items()}
    plugged = sample.plugged(tuned, tmp_path / "pf" / "delta.pt")
    assert plugged.objective.windows == student.objective.windows == 4
    released, own = sample.load(folder).network.state_dict(), student.network.state_dict()
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
def test_bad_starts_are_one_line(folder, texts, tmp_path, monkeypatch, capsys, flags, says):
    args = ["--init", folder, "--data", texts, *flags]
    assert_one_line(in_process(train.main, args, tmp_path, monkeypatch, capsys), says)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_other_encoders_are_one_line(folder, latents, tmp_path, monkeypatch, capsys):
    args = ["--init", folder, "--data", latents]
    done = in_process(train.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "pooled differ")
