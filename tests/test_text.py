"""SD3's encoders, against diffusers' pipeline: a tiny random one, see tiny_sd3.py."""

import json
import logging
import shutil
import sys

import pytest
import torch
from helpers import assert_one_line, in_process
from tiny_sd3 import LONG, PROMPTS, clip, close, t5

import sample
from sd3 import text
from training.ranks import check_memory


@pytest.mark.parametrize("t5", [True, False])
def test_encodings_equal_the_pipelines(sd3_folder, pipeline, monkeypatch, t5):
    """Context and pooled, for a prompt longer than 77 tokens too, and for the empty one."""
    if not t5:
        monkeypatch.setattr(pipeline, "text_encoder_3", None)
    encoder = text.load(sd3_folder, t5)
    context, pooled = encoder([*PROMPTS, LONG])
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        [*PROMPTS, LONG], None, None, do_classifier_free_guidance=False
    )
    assert context.shape == expected.shape == (4, 77 + 256, 40) and pooled.shape == (4, 16)
    close(context, expected, 1e-5)
    close(pooled, expected_pooled, 1e-5)
    assert (context[:, 77:] == 0).all() == (not t5)
    short = text.load(sd3_folder, t5, t5_tokens=77)(PROMPTS[:1])[0]
    assert short.shape == (1, 77 + 77, 40)  # the paper's number


def test_parts_are_the_encoders_shares(sd3_folder):
    """Dropping a part zeroes what this encoder gave, and nothing else."""
    encoder = text.load(sd3_folder)
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
    without = text.load(sd3_folder, t5=False)
    assert without.parts == encoder.parts[:2]  # else a tenth would be a fifth


def test_many_prompts_are_encoded_in_batches(sd3_folder):
    prompts = [f"a cat {'x' * i}" for i in range(20)]
    encoder = text.load(sd3_folder)
    apart = [encoder([prompt]) for prompt in prompts]
    for whole, *parts in zip(encoder(prompts), *apart, strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "part", ["tokenizer_2", "text_encoder", "transformer", "text_encoder_3", "vae"]
)
def test_a_missing_part_is_named(sd3_folder, tmp_path, monkeypatch, capsys, part):
    shutil.copytree(sd3_folder, tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / part)
    args = ["sd3", "--prompt", "a cat", "--steps", "1", "--size", "16"]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, f"has no {part}")
    assert ("--no-t5 does without" in done.stderr) == (part == "text_encoder_3")


def test_prompts_that_are_cut_are_told_in_one_line(sd3_folder, capsys, caplog):
    text.say_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    text.load(sd3_folder)([f"{letter} {LONG}" for letter in "abcdefghijklmnopqrst"])
    logger.removeHandler(caplog.handler)
    said = [line for line in capsys.readouterr() if line]
    cut = "longer prompts are cut to 77 tokens, as the reference does"
    assert said == [f"the text encoders: 0.0 GB on cpu\n{cut}\n"] and not caplog.records


def damage(folder, what):
    """Another encoder in the folder, or a tokenizer of another length."""
    if isinstance(what, dict):
        for part in ("tokenizer", "tokenizer_2"):
            file = folder / part / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | what))
    else:
        part, encoder = what
        encoder().save_pretrained(folder / part)


@pytest.mark.parametrize(
    "what, says",
    [
        (("text_encoder_3", lambda: t5(48)), "encoders of the widths [8, 12, 48] do not fit 40"),
        (("text_encoder", lambda: clip(36, 6)), "encoders of the widths [36, 12, 40] do not fit"),
        (("text_encoder", lambda: clip(8, 8)), "its CLIPs give 18 numbers, the model takes 16"),
        (("text_encoder_2", lambda: clip(12, 10, 50)), "has the id 53, its encoder 50 of them"),
        (("text_encoder_3", lambda: t5(40, 32)), "has the id 131, its encoder 32 of them"),
        ({"model_max_length": 10**30}, "its CLIPs and their tokenizers take {"),
        ({"model_max_length": -5}, "its CLIPs and their tokenizers take {"),
        ({"model_max_length": 50}, "its CLIPs and their tokenizers take {"),
        (None, "a prompt is no text: 'utf-8' codec can't encode character"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_encoders_fit_each_other_and_their_tokenizers(
    sd3_folder, tmp_path, monkeypatch, capsys, what, says
):
    copy = shutil.copytree(sd3_folder, tmp_path / "sd3")
    if what:
        damage(copy, what)
    capsys.readouterr()
    prompt = "a cat" if what else "\ud800"
    args = ["sd3", "--prompt", prompt, "--steps", 1, "--size", 16]
    assert_one_line(in_process(sample.main, args, tmp_path, monkeypatch, capsys), says)
    assert [file.name for file in tmp_path.iterdir()] == ["sd3"]


def test_a_missing_package_is_named(sd3_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    args = [sd3_folder, "--prompt", "a cat", "--size", "16"]
    done = in_process(sample.main, args, tmp_path, monkeypatch, capsys)
    assert_one_line(done, "need the optional package transformers: pip install transformers")


def test_too_little_gpu_memory_says_how_much_is_needed(sd3_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r": 2\.0 GB on cuda, which has 1\.0 GB left; leave"):
        check_memory("the text encoders", 2**31, gpu, "; leave T5 out")
    check_memory("the text encoders", 2**29, gpu)
