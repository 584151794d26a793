"""The network against an independent, slow rewrite; its names, zeros, positions and errors."""

import math
import re
import warnings

import pytest
import torch

import rf
from data.networks import ClassMMDiT
from mmdit import (
    Attention,
    MMDiT,
    StreamBlock,
    attend,
    modulate,
    position_table,
    timestep_embedding,
)
from training.ranks import compile_blocks

F64 = torch.float64
SMALL = dict(in_channels=3, patch_size=2, pos_embed_max_size=7, context_dim=11, pooled_dim=9)
flags = pytest.mark.parametrize(
    ("qk_norm", "shared"), [(False, False), (True, False), (False, True), (True, True)]
)


def noisy(network, seed=0):
    """Noise in every parameter and buffer: gates that start at zero would hide errors."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.state_dict().items():
            noise = torch.randn(p.shape, generator=g, dtype=F64)
            if "ln_" in name:
                noise = 1 + 0.5 * noise
            elif p.dim() > 1 and name != "pos_embed":
                noise = noise / math.sqrt(p[0].numel())
            p.copy_(noise)
    return network


def inputs(H=4, W=6, L=5, B=2, C=3, dtype=F64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=g, dtype=dtype)
    t = torch.rand(B, generator=g, dtype=dtype)
    context = torch.randn(B, L, SMALL["context_dim"], generator=g, dtype=dtype)
    return x, t, context, torch.randn(B, SMALL["pooled_dim"], generator=g, dtype=dtype)


def network(depth=2, dtype=F64, **changes):
    return noisy(MMDiT(depth, **{**SMALL, **changes})).to(dtype)


@flags
def test_forward_mode_agrees_with_backward_mode(qk_norm, shared):
    """A jvp in x and t at once, as mean flows need it: <w, J v> = <J^T w, v>."""
    net, (x, t, *text), other = network(qk_norm=qk_norm, shared=shared), inputs(), inputs(seed=2)
    call = lambda x, t: net(x, t, *text)
    out, product = torch.func.jvp(call, (x, t), other[:2])
    gradients = torch.func.vjp(call, x, t)[1](w := torch.randn_like(out))
    expected = sum((g * v).sum() for g, v in zip(gradients, other, strict=False))
    torch.testing.assert_close((w * product).sum(), expected, rtol=1e-5, atol=1e-5)


# ---- the rewrite: one example, one head, one patch at a time, from the checkpoint's names alone


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


def vector(w, name, x):
    return linear(w, f"{name}.mlp.2", silu(linear(w, f"{name}.mlp.0", x)))


def heads(w, name, x, depth):
    """x (N,D) -> for each head (q, k, v), each (N,64)."""
    rows = linear(w, f"{name}.attn.qkv", x)
    D = 64 * depth
    for h in range(depth):
        q, k, v = (rows[:, part * D + 64 * h : part * D + 64 * (h + 1)] for part in range(3))
        if f"{name}.attn.ln_q.weight" in w:
            q = q / torch.sqrt((q**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.attn.ln_q.weight"]
            k = k / torch.sqrt((k**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.attn.ln_k.weight"]
        yield q, k, v


def slow_one(w, x, t, context, pooled, patch, depth, shared):
    """One example: x (C,H,W), t (), context (L,.), pooled (.) -> (C,H,W)."""
    C, H, W = x.shape
    h, w_ = H // patch, W // patch
    L = len(context)

    # In float32 as the references have it, rounded as theirs; the exact formula has its own test.
    freqs = torch.exp(torch.arange(128, dtype=torch.float32) * -math.log(10000) / 128)
    angle = (1000 * t).float() * freqs
    time = torch.cat([torch.cos(angle), torch.sin(angle)]).to(x.dtype)
    c = vector(w, "t_embedder", time) + vector(w, "y_embedder", pooled)

    kernel, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
    side = math.isqrt(w["pos_embed"].shape[1])
    top, left = (side - h) // 2, (side - w_) // 2
    tokens = []
    for i in range(h):
        for j in range(w_):
            square = x[:, patch * i : patch * (i + 1), patch * j : patch * (j + 1)]
            place = w["pos_embed"][0, (top + i) * side + left + j]
            tokens.append(torch.einsum("dcij,cij->d", kernel, square) + bias + place)
    image = torch.stack(tokens)
    text = linear(w, "context_embedder", context)

    for i in range(depth):
        names = {"text": f"joint_blocks.{i}.context_block", "image": f"joint_blocks.{i}.x_block"}
        if shared:
            names["text"] = names["image"]
        pre_only = i == depth - 1  # what the text's half does after attention no longer matters
        six, qkv = {}, {}
        for which, stream in (("text", text), ("image", image)):
            six[which] = linear(w, f"{names[which]}.adaLN_modulation.1", silu(c)).split(64 * depth)
            hidden = layer_norm(stream) * (1 + six[which][1]) + six[which][0]
            qkv[which] = list(heads(w, names[which], hidden, depth))
        out = []
        for head in range(depth):
            q, k, v = (torch.cat([qkv["text"][head][n], qkv["image"][head][n]]) for n in range(3))
            scores = torch.exp(q @ k.T / 8)
            out.append(scores / scores.sum(-1, keepdim=True) @ v)
        out = torch.cat(out, dim=-1)

        def half(which, stream, attended, names=names, six=six):
            _, _, gate, shift, scale, gate_mlp = six[which]
            stream = stream + gate * linear(w, f"{names[which]}.attn.proj", attended)
            hidden = layer_norm(stream) * (1 + scale) + shift
            hidden = gelu(linear(w, f"{names[which]}.mlp.fc1", hidden))
            return stream + gate_mlp * linear(w, f"{names[which]}.mlp.fc2", hidden)

        image = half("image", image, out[L:])
        if not pre_only:
            text = half("text", text, out[:L])

    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c)).split(64 * depth)
    values = linear(w, "final_layer.linear", layer_norm(image) * (1 + scale) + shift)
    rows = []
    for channel in range(C):
        for row in range(H):
            for col in range(W):
                token = (row // patch) * w_ + col // patch
                rows.append(values[token, ((row % patch) * patch + col % patch) * C + channel])
    return torch.stack(rows).reshape(C, H, W)


def slow(w, x, t, context, pooled, **config):
    return torch.stack(
        [slow_one(w, *one, **config) for one in zip(x, t, context, pooled, strict=True)]
    )


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


def compare(net, args, **config):
    """Relative errors of the output, and of every gradient, x's included: {name: error}."""
    x, *rest = args
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    w = {k: v.detach().clone().requires_grad_() for k, v in net.state_dict().items()}
    want = slow(w, theirs, *rest, patch=net.patch_size, depth=len(net.joint_blocks), **config)
    got = net(mine, *rest)
    probe = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(2))
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    errors = {"output": relative(got, want), "x": relative(mine.grad, theirs.grad)}
    largest = max(p.grad.norm() for p in net.parameters())
    for name, p in net.named_parameters():
        # Against the largest where it is nothing but rounding: unused queries, a shared k's bias.
        other = 0 if w[name].grad is None else w[name].grad
        scale = p.grad.norm().clamp(min=1e-4 * largest)
        errors[name] = ((p.grad - other).norm() / scale).item()
    return errors


@flags
@pytest.mark.parametrize(("H", "W", "L"), [(4, 4, 3), (6, 10, 5), (14, 2, 1)])
def test_equals_the_slow_rewrite(qk_norm, shared, H, W, L):
    """Output and activations against loops over examples, heads, tokens and pixels, to 1e-10."""
    net = network(qk_norm=qk_norm, shared=shared)
    errors = compare(net, inputs(H, W, L), shared=shared)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_the_slow_rewrite_in_float32(qk_norm):
    net = network(dtype=torch.float32, qk_norm=qk_norm)
    errors = compare(net, inputs(6, 4, 7, dtype=torch.float32), shared=False)
    assert errors.pop("output") < 1e-5
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize(("depth", "patch"), [(1, 1), (1, 2), (3, 1)])
def test_other_depths_and_patches(depth, patch):
    """Depth 1 is nothing but a last block."""
    net = network(depth, patch_size=patch)
    errors = compare(net, inputs(2, 4, 2), shared=False)
    assert max(errors.values()) < 1e-10, errors


# ---- names


def released_keys(depth, qk_norm=False):
    """The released checkpoint's names, written out by hand."""
    both = lambda *names: {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    keys = {"pos_embed"} | both("x_embedder.proj", "context_embedder")
    keys |= both("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2")
    keys |= both("final_layer.linear", "final_layer.adaLN_modulation.1")
    for i in range(depth):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{stream}"
            keys |= both(f"{block}.adaLN_modulation.1", f"{block}.attn.qkv")
            if qk_norm:
                keys |= {f"{block}.attn.ln_q.weight", f"{block}.attn.ln_k.weight"}
            if not (stream == "context_block" and i == depth - 1):
                keys |= both(f"{block}.attn.proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2")
    return keys


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_names_are_the_released_ones(depth, qk_norm):
    """The keys of the state dict against the released checkpoint's, written out."""
    assert set(MMDiT(depth, **SMALL, qk_norm=qk_norm).state_dict()) == released_keys(depth, qk_norm)


def test_a_released_file_loads_both_ways():
    """Strictly, from names with the file's prefix, and back; then both compute the same."""
    prefix = "model.diffusion_model."
    ours = network()
    file = {prefix + key: value for key, value in ours.state_dict().items()}
    assert {key.removeprefix(prefix) for key in file} == released_keys(2)
    loaded = MMDiT(2, **SMALL).to(F64)
    loaded.load_state_dict({k.removeprefix(prefix): v for k, v in file.items()}, strict=True)
    assert torch.equal(loaded(*inputs()), ours(*inputs()))
    noisy(ours, seed=5)
    ours.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(ours(*inputs()), loaded(*inputs()))


def test_medium_has_the_released_size():
    with torch.device("meta"):
        medium = MMDiT(24)
    state = medium.state_dict()
    assert len(state) == 491 and set(state) == released_keys(24)
    assert sum(p.numel() for p in medium.parameters()) == 2_028_328_000
    shapes = {
        "pos_embed": (1, 192**2, 1536),
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "t_embedder.mlp.0.weight": (1536, 256),
        "y_embedder.mlp.0.weight": (1536, 2048),
        "context_embedder.weight": (1536, 4096),
        "joint_blocks.0.context_block.adaLN_modulation.1.weight": (6 * 1536, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (2 * 1536, 1536),
        "joint_blocks.23.context_block.attn.qkv.weight": (3 * 1536, 1536),
        "joint_blocks.7.x_block.mlp.fc1.weight": (4 * 1536, 1536),
        "final_layer.linear.weight": (64, 1536),
        "final_layer.adaLN_modulation.1.weight": (2 * 1536, 1536),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_the_shared_network_has_one_set_of_weights():
    """The DiT: the MM-DiT's names without a context block, and nothing is stored twice."""
    dit = MMDiT(2, **SMALL, shared=True)
    assert set(dit.state_dict()) == {k for k in released_keys(2) if "context_block" not in k}
    mm = MMDiT(2, **SMALL)
    blocks = sum(p.numel() for p in mm.joint_blocks.parameters())
    last = sum(p.numel() for p in mm.joint_blocks[1].context_block.parameters())
    full = sum(p.numel() for p in mm.joint_blocks[1].x_block.parameters())
    assert sum(p.numel() for p in dit.joint_blocks.parameters()) == (blocks - last + full) // 2


def test_sharing_equals_copying_the_weights():
    """The DiT is the MM-DiT whose context weights are copies of the image's."""
    dit, mm = network(shared=True), network()
    state = dit.state_dict()
    for key, value in mm.state_dict().items():
        source = state[key.replace("context_block", "x_block")]
        state[key] = source[: len(value)]  # the last context block keeps only shift and scale
    mm.load_state_dict(state)
    torch.testing.assert_close(mm(*inputs()), dit(*inputs()), rtol=1e-10, atol=1e-10)


# ---- initialisation


@pytest.mark.parametrize("shared", [False, True])
def test_zero_at_initialisation(shared):
    """adaLN-zero: a new network answers 0, its gates and its output are zeros."""
    torch.manual_seed(0)
    net = MMDiT(2, **SMALL, qk_norm=True, shared=shared)
    x = inputs(dtype=torch.float32)
    assert net(*x).abs().max() == 0
    for name, p in net.named_parameters():
        if re.search(r"adaLN_modulation\.1|final_layer\.linear|bias$", name):
            assert p.abs().max() == 0, name
        elif "ln_" in name:
            assert (p == 1).all(), name
        elif re.match("[ty]_embedder", name):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            bound = math.sqrt(6 / (p[0].numel() + len(p)))  # xavier, uniform
            assert 0.9 * bound < p.abs().max() <= bound, name
    # adaLN-zero: with any final layer, every block is the identity
    torch.nn.init.normal_(net.final_layer.linear.weight)
    tokens = torch.nn.functional.layer_norm(net.patchify(x[0]), (128,), eps=1e-6)
    expected = net.unpatchify(net.final_layer.linear(tokens), 4, 6)
    torch.testing.assert_close(net(*x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rf", "eps/cos", "edm(-1.20,1.20)"])
def test_the_first_loss_is_the_target_s_second_moment(name):
    """E|eps - x0|^2 = 1 + E|x0|^2 for rf, 1 for eps; for F, E(p^2 |x0|^2 + q^2) over the same t."""
    formulation = rf.formulation(name)
    net = ClassMMDiT(3, depth=1, in_channels=3, patch_size=2, pos_embed_max_size=4)
    g = torch.Generator().manual_seed(0)
    x0 = 0.7 * torch.randn(400, 3, 8, 8, generator=g) + 0.2
    labels = torch.randint(0, 4, (400,), generator=g)
    with torch.no_grad():
        loss = formulation.loss(net, x0, labels, generator=torch.Generator().manual_seed(1)).item()
    t = formulation.draw(400, torch.Generator().manual_seed(1))  # the loss draws t first
    p, q = rf.PREDICTIONS[formulation.prediction](formulation.path, t)
    expected = ((p**2) * x0.square().mean((1, 2, 3)) + q**2).mean().item()
    assert loss == pytest.approx(expected, rel=0.02)  # 76,800 values: 6 standard errors or so
    if name == "rf":
        assert expected == pytest.approx(1 + 0.7**2 + 0.2**2, rel=0.02)


# ---- what must have an effect, and what must not


def test_qk_norm_is_passed_on():
    """It adds weights that matter, and it makes the size of q and k irrelevant."""
    plain, normed = network(qk_norm=False), network(qk_norm=True)
    extra = set(normed.state_dict()) - set(plain.state_dict())
    assert len(extra) == 2 * 2 * 2 and all(normed.state_dict()[k].shape == (64,) for k in extra)
    before = normed(*inputs())
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert relative(normed(*inputs()), plain(*inputs())) > 1e-3
    same, other = network(qk_norm=True), network(qk_norm=False)
    base = other(*inputs())
    with torch.no_grad():
        for net in (same, other):
            for name, p in net.named_parameters():
                if "qkv" in name:
                    p[:128] *= 3  # the queries
    assert relative(same(*inputs()), before) < 1e-4  # eps is all that can tell
    assert relative(other(*inputs()), base) > 1e-2


def test_time_is_in_thousandths_and_not_rounded():
    t = torch.tensor([0.0, 0.1234567, 0.5003, 1.0], dtype=F64)
    i = torch.arange(128, dtype=F64)
    angle = 1000 * t[:, None] / 10000 ** (i / 128)
    got = timestep_embedding(t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), torch.cat([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-4
    )
    assert timestep_embedding(t.bfloat16()).dtype == torch.float32
    heard = []
    net = network(dtype=torch.float32)
    net.t_embedder.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    x, _, context, pooled = inputs(B=4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        net(x, t, context, pooled)
    assert torch.equal(heard[0], got)


@pytest.mark.parametrize("stream", ["x_block", "context_block"])
def test_both_streams_have_residuals(stream):
    """With a stream's gates shut its tokens pass the first block unchanged; open, they do not."""
    net = network()
    block = net.joint_blocks[0]
    which = 0 if stream == "context_block" else 1
    g = torch.Generator().manual_seed(3)
    c, *streams = (torch.randn(*s, 128, generator=g, dtype=F64) for s in [(2,), (2, 5), (2, 6)])
    out = block(c, *streams)
    assert len(out) == 2 and all(relative(a, b) > 0.1 for a, b in zip(out, streams, strict=True))
    with torch.no_grad():
        for p in getattr(block, stream).adaLN_modulation[1].parameters():
            p[2 * 128 : 3 * 128] = p[5 * 128 :] = 0  # both gates
    shut = block(c, *streams)
    assert torch.equal(shut[which], streams[which])
    assert torch.equal(shut[1 - which], out[1 - which])  # keys and values are not gated


@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_context_is_pre_only(depth):
    """It goes into the last block's attention and does not come out."""
    net, g = network(depth), torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(*size, 64 * depth, generator=g, dtype=F64)
    c, context, x, other = draw(2), draw(2, 5), draw(2, 6), draw(2, 5)
    for block in net.joint_blocks:
        last = block is net.joint_blocks[-1]
        new_context, new_x = block(c, context, x)
        assert block.context_block.pre_only == last and not block.x_block.pre_only
        assert (new_context is None) == last and new_x.shape == x.shape
        assert last or new_context.shape == context.shape
        assert relative(block(c, other, x)[1], new_x) > 1e-2


class Dual(StreamBlock):
    """As SD3.5's MM-DiT-X has it: nine modulations, the last three for a second attention, of the
    image to itself."""

    def __init__(self, width, qk_norm):
        super().__init__(width, qk_norm)
        self.adaLN_modulation[1] = torch.nn.Linear(width, 9 * width)
        self.attn2 = Attention(width, qk_norm, pre_only=False)

    def post_attention(self, x, attended, *modulations):
        *six, shift, scale, gate = modulations
        q, k, v = (part.transpose(1, 2) for part in self.attn2(modulate(x, shift, scale)))
        second = gate * self.attn2.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return super().post_attention(x, attended, *six) + second


def test_a_block_with_nine_modulations_keeps_its_image():
    """A fork's stream says itself how many it has. With its last gate shut, it is SD3's."""
    plain, fork = network(qk_norm=True), network(qk_norm=True)
    for block in fork.joint_blocks:
        block.x_block = noisy(Dual(128, qk_norm=True)).to(F64)
    fork.load_state_dict(
        {k: w for k, w in plain.state_dict().items() if "x_block.adaLN" not in k}, strict=False
    )
    with torch.no_grad():
        for ours, theirs in zip(plain.joint_blocks, fork.joint_blocks, strict=True):
            six, nine = (block.x_block.adaLN_modulation[1] for block in (ours, theirs))
            nine.weight[: 6 * 128], nine.bias[: 6 * 128] = six.weight, six.bias
    assert relative(fork(*inputs()), plain(*inputs())) > 1e-2
    with torch.no_grad():
        for block in fork.joint_blocks:
            for p in block.x_block.adaLN_modulation[1].parameters():
                p[8 * 128 :] = 0
    torch.testing.assert_close(fork(*inputs()), plain(*inputs()), rtol=1e-10, atol=1e-10)


def test_every_parameter_has_a_gradient_but_the_unused_queries():
    """They get a zero, and so DistributedDataParallel finds no parameter unused."""
    net = network(qk_norm=True)
    net(*inputs()).square().sum().backward()
    last = "joint_blocks.1.context_block.attn."
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        if name == last + "ln_q.weight":
            assert p.grad.abs().max() == 0
        elif name.startswith(last + "qkv"):
            q, k, v = p.grad.chunk(3)
            assert q.abs().max() == 0 and min(k.abs().max(), v.abs().max()) > 0
        else:
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("shared", [False, True])
def test_context_tokens_are_a_set_and_image_tokens_are_not(shared):
    net = network(shared=shared)
    x, t, context, pooled = inputs()
    out = net(x, t, context, pooled)
    torch.testing.assert_close(net(x, t, context.flip(1), pooled), out, rtol=1e-10, atol=1e-10)
    assert relative(net(x.flip(-1), t, context, pooled).flip(-1), out) > 1e-2
    for changed in (
        (x, 1 - t, context, pooled),
        (x, t, context + 1, pooled),
        (x, t, context[:, 1:], pooled),
        (x, t, context, pooled + 1),
    ):
        assert relative(net(*changed), out) > 1e-3


def test_examples_do_not_see_one_another():
    net = network()
    args = inputs(B=3)
    each = torch.cat([net(*(a[i : i + 1] for a in args)) for i in range(3)])
    torch.testing.assert_close(net(*args), each, rtol=1e-10, atol=1e-10)


# ---- positions


@pytest.mark.parametrize(("size", "base"), [(192, 64), (100, 64), (64, 64), (16, 16), (1, 1)])
def test_positions_by_the_formula(size, base):
    """Single entries; base 64 at size 192 is the released one, a small grid has unit spacing."""
    width = 64
    table = position_table(size, width)
    assert table.shape == (1, size * size, width) and table.dtype == torch.float32
    grid = table.reshape(size, size, width)
    for row, col in {(0, 0), (size - 1, 0), (size // 3, size // 2), (size - 1, size - 1)}:
        for i in range(16):
            frequency = 10000 ** (-i / 16)
            u, v = col * base / size * frequency, row * base / size * frequency
            wanted = [math.sin(u), math.cos(u), math.sin(v), math.cos(v)]
            assert grid[row, col, i::16].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("h", "w", "top", "left"), [(7, 7, 0, 0), (3, 3, 2, 2), (1, 4, 3, 1), (6, 2, 0, 2)]
)
def test_positions_are_cropped_at_the_centre(h, w, top, left):
    """Token by token, for wide, high and small pictures."""
    net = network()
    got = net.positions(h, w).reshape(h, w, 128)
    grid = net.pos_embed.reshape(7, 7, 128)
    for i in range(h):
        for j in range(w):
            assert torch.equal(got[i, j], grid[top + i, left + j])


# ---- precision, memory, compilation


@flags
def test_bfloat16_autocast_is_close_and_silent(qk_norm, shared):
    net = network(dtype=torch.float32, qk_norm=qk_norm, shared=shared)
    args = inputs(dtype=torch.float32)
    exact = net(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            out = net(*args)
        out.float().sum().backward()
        assert out.isfinite().all() and relative(out.float(), exact) < 0.02
        assert all(
            p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters()
        )
        x, t, *cond = args  # and with half-precision weights, where t need not be half
        half = net.bfloat16()(x.bfloat16(), t, *(c.bfloat16() for c in cond))
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), exact) < 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_residuals_add_up_in_float32_under_autocast(shared):
    net = network(dtype=torch.float32, shared=shared)
    seen = []

    def watch(_, args, out):
        outputs = out if isinstance(out, tuple) else (out,)
        seen.extend(stream for stream in (*args[1:], *outputs) if stream is not None)

    for block in net.joint_blocks:
        block.register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16):
        net(*inputs(dtype=torch.float32))
    assert len(seen) == (2 * 2 if shared else 4 * 2 - 1)  # the last context ends in its block
    assert all(stream.dtype == torch.float32 for stream in seen)


@flags
def test_checkpointing_recomputes_and_changes_nothing(qk_norm, shared):
    net = network(qk_norm=qk_norm, shared=shared)
    calls = []
    net.joint_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    grads = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(*inputs()).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    net.eval()
    net(*inputs()).square().sum().backward()
    assert len(calls) == 4  # not outside training


@pytest.mark.parametrize("shared", [False, True])
def test_compiles_without_a_graph_break(shared):
    net = network(dtype=torch.float32, qk_norm=True, shared=shared)
    args = inputs(dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), net(*args))


@pytest.mark.parametrize("shared", [False, True])
def test_the_blocks_compile_one_by_one(shared, monkeypatch):
    """Of an MM-DiT and of a DiT, alone or inside another module; any other network as a whole."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    net = network(3, shared=shared)
    for outer in (net, torch.nn.Sequential(net)):
        compiled.clear()
        compile_blocks(outer)
        assert compiled == list(net.joint_blocks)
    compiled.clear()
    compile_blocks(net.final_layer)
    assert compiled == [net.final_layer]


# ---- labels and points


def test_labels_and_their_null_class():
    net = noisy(ClassMMDiT(3, depth=1, in_channels=2, patch_size=2, pos_embed_max_size=4, tokens=5))
    net = net.to(F64)
    x, t = inputs(C=2, B=4)[:2]
    x, t = x[:1].expand(4, -1, -1, -1), t[:1].expand(4)
    out = net(x, t, torch.arange(4))
    assert out.shape == x.shape
    assert all(relative(out[i], out[j]) > 1e-2 for i in range(4) for j in range(i))
    (null,) = net.null_cond
    assert null.item() == 3
    torch.testing.assert_close(net(x, t, null.expand(4)), out[3:].expand(4, -1, -1, -1))
    assert torch.equal(net(x, t), net(x, t, null.expand(4)))  # no labels: null
    # the same by hand: an MM-DiT on rows of two tables
    tables = net.state_dict()
    assert len(tables["context.weight"]) == len(tables["pooled.weight"]) == 4
    context, pooled = tables["context.weight"][1].reshape(1, 5, 64), tables["pooled.weight"][1:2]
    torch.testing.assert_close(net.mmdit(x[:1], t[:1], context, pooled), out[1:2])
    inner = {k.removeprefix("mmdit.") for k in tables if k.startswith("mmdit.")}
    assert inner == released_keys(1)
    with pytest.raises(IndexError):
        net(x, t, torch.full((4,), 4))


@pytest.mark.parametrize("classes", [0, 3])
def test_points(classes):
    """toy2d: a point is a 2x1x1 latent, and both spellings are the same network."""
    net = noisy(ClassMMDiT(classes, depth=2, in_channels=2, patch_size=1, pos_embed_max_size=1))
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(5, 2, generator=g), torch.rand(5, generator=g)
    cond = (torch.tensor([0, 1, 2, 3, 0]),) if classes else ()
    out = net(z, t, *cond)
    assert out.shape == (5, 2)
    torch.testing.assert_close(net(z[:, :, None, None], t, *cond)[:, :, 0, 0], out)
    assert len(net.null_cond) == len(cond)


def test_null_conditions_fit_guidance():
    """rf.guide broadcasts them, for labels and for text: v_uncond + 2 (v_cond - v_uncond)."""
    text = network(dtype=torch.float32)
    x, t, context, pooled = inputs(dtype=torch.float32)
    zero = text(x, t, torch.zeros_like(context), torch.zeros_like(pooled))
    want = zero + 2 * (text(x, t, context, pooled) - zero)
    got = rf.guide(text, text.null_cond, 2.0)(x, t, context, pooled)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not [k for k in text.state_dict() if "null" in k]
    labelled = noisy(ClassMMDiT(3, depth=1, in_channels=3, patch_size=2, pos_embed_max_size=4))
    labels = torch.tensor([0, 2])
    want = labelled(x, t) + 2 * (labelled(x, t, labels) - labelled(x, t))
    got = rf.guide(labelled, labelled.null_cond, 2.0)(x, t, labels)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- errors


def test_errors_say_what_is_wrong_in_one_line():
    net = network()
    for size, message in (
        (dict(C=4), "takes 3 channels, got 4"),
        (dict(H=5), "5x6 is not divisible by the patch size 2"),
        (dict(W=3), "4x3 is not divisible by the patch size 2"),
        (dict(W=16), "2x8 tokens, but pos_embed_max_size is 7"),
        (dict(H=16), "8x3 tokens, but pos_embed_max_size is 7"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            net(*inputs(**size))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        MMDiT(0)
