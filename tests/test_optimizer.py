"""AdamW alone is PyTorch's; with Muon each weight has the one it should, and its own moments."""

import copy

import pytest
import torch
from helpers import same, small_recipe, stream

import rf
import train
from mmdit import MMDiT
from toy2d import MLP
from training.optimizer import Optimizer
from training.options import Recipe


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for w in network.parameters():
        w.grad = torch.randn(w.shape, generator=generator)


def test_without_muon_it_is_adamw_to_the_bit():
    network, recipe = MLP(), Recipe(lr=1e-2)
    plain = copy.deepcopy(network)
    ours, theirs = (
        Optimizer(network, recipe),
        torch.optim.AdamW(plain.parameters(), 1e-2, (0.9, 0.999), 1e-15, 0.0, fused=True),
    )
    for seed in range(5):
        gradients(network, seed), gradients(plain, seed)
        ours.step(1e-2), theirs.step()
    assert same(network.state_dict(), plain.state_dict())
    assert same(ours.state_dict()["state"], theirs.state_dict()["state"])


def test_muon_moves_hidden_matrices_by_orthogonal_ones_and_adamw_the_rest():
    network = MMDiT(2, 3, 2, 4, context_dim=5, pooled_dim=6, qk_norm=True)
    before = {name: w.clone() for name, w in network.named_parameters()}
    optimizer = Optimizer(network, Recipe(lr=1e-3, muon=10.0))
    gradients(network, 0)
    optimizer.step(1e-3)
    hidden = {name for name, w in network.named_parameters() if w in optimizer.hidden}
    assert "joint_blocks.0.x_block.attn.qkv.weight" in hidden
    assert all(name.startswith("joint_blocks.") and "adaLN" not in name for name in hidden)
    assert len(hidden) == 4 + 4 + 4 + 1 and len(Optimizer(MLP(), Recipe(muon=1.0)).hidden) == 2
    for name, w in network.named_parameters():
        moved = (w - before[name]).detach()
        if name in hidden:  # m x n by sqrt(max(1, m/n)) lr; singular values near 1
            turned = moved / (1e-2 * max(1, w.shape[0] / w.shape[1]) ** 0.5)
            values = torch.linalg.svdvals(turned)
            assert values.quantile(0.05) > 0.6 and values.max() < 1.3, name
        else:  # the first step of Adam has the length of the rate
            assert moved.abs().max() == pytest.approx(1e-3, rel=1e-2), name


@pytest.mark.parametrize("fast", [True, False])
def test_muons_products_are_float32_where_bf16_is_slow(fast, monkeypatch):
    """Against the iteration of Jordan et al. 2024 in float64."""
    monkeypatch.setattr("training.optimizer.fast_bf16", lambda: fast)
    network = MLP()
    optimizer = Optimizer(network, Recipe(muon=1.0))
    gradients(network, 0)
    for w in optimizer.hidden:
        x = w.grad.double() / w.grad.double().norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        before = w.detach().clone()
        optimizer.step(1.0)
        error = (before - w - x).abs().max()
        assert (error < 1e-5) == (not fast) and error < 0.1


@pytest.mark.parametrize("muon", [0.0, 2.0])
def test_a_run_goes_on_with_its_moments_to_the_bit(muon, tmp_path):
    """As a checkpoint keeps them; those of another optimizer are refused."""
    recipe, objective = small_recipe(steps=6, muon=muon, decay=False), rf.formulation("rf")

    def run(state, steps):
        batches = stream(recipe, state.step)
        train.train(state, objective, batches, small_recipe(steps=steps, muon=muon, decay=False))
        batches.close()
        return state

    new = lambda: (torch.manual_seed(0), train.State(MLP(), recipe))[1]
    whole, part = run(new(), 6), run(new(), 3)
    part.save(tmp_path / "x.pt")
    kept = torch.load(tmp_path / "x.pt", weights_only=True)
    again = new()
    again.load(copy.deepcopy(kept), tmp_path)
    run(again, 6)
    assert same(whole.network.state_dict(), again.network.state_dict())
    assert same(whole.optimizer.state_dict(), again.optimizer.state_dict())
    other = train.State(MLP(), small_recipe(steps=6, muon=2.0 - muon))
    with pytest.raises(ValueError, match="moments of the shapes"):
        other.load(kept, tmp_path)


def test_shares_have_no_muon(monkeypatch):
    monkeypatch.setattr("training.optimizer.is_sharded", lambda network: True)
    Optimizer(MLP(), Recipe())
    with pytest.raises(ValueError, match="--shard is not for Muon"):
        Optimizer(MLP(), Recipe(muon=1.0))
