"""A tiny random SD3 in the released layout, made here from configurations: nothing is downloaded.
And captioned pictures, encoded by its encoders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.encode import encode

reason = "the optional packages transformers and diffusers are not installed"
transformers = pytest.importorskip("transformers", reason=reason)
diffusers = pytest.importorskip("diffusers", reason=reason)

PROMPTS = ["a cat on a mat", "xyz", ""]
LONG = " ".join(["a cat on a mat"] * 20)  # of more than 77 tokens


def close(x, y, rel):
    assert ((x - y).norm() / y.norm()).item() < rel


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


def t5(width, tokens=132):
    """As many tokens as its tokenizer, which has 100 more than those above."""
    how = dict(vocab_size=tokens, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(transformers.T5Config(**how))


def write_sd3(place):
    """A released SD3 in diffusers' layout, of depth 2 and with every weight random: its folder."""
    torch.manual_seed(0)
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
        text_encoder_3=t5(40),
    )  # fmt: skip
    pipeline.save_pretrained(place / "folder")
    return place / "folder"


CAPTIONS = ["a cat", "a dog on a mat", "xyz", "cat and cat", "a"]


def write_captioned(place):
    """Five pictures of noise, one in a folder below; two captions beside them, the rest in a list.
    The file beside a picture counts where there are both."""
    g = np.random.default_rng(0)
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


def encode_captioned(captioned, folder, out, **how):
    encode(images=captioned, text=str(folder), size=16, batch_size=2, out=out, **how)
