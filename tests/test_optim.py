"""The optimizers: Muon against torch's own and against the SVD, groups, gating, state by name."""
import copy
import math
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import optim
from model import GPT, GPTConfig
from optim import Muon, configure_optimizers, describe, load_state_by_name, orthogonalize, set_lr, state_by_name


def make(**kwargs):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32) | kwargs))


def with_gradients(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    return model


def muon_of(params, rows=None, lr=0.1, decay=0.0):
    return Muon(dict(params=list(params.items()), name="blocks", lr=lr, initial_lr=lr, weight_decay=decay), rows or {})


@pytest.mark.parametrize("shape", [(3, 40, 100), (2, 100, 40), (1, 64, 128)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = orthogonalize(g)
    values = torch.linalg.svdvals(x)
    assert 0.6 < values.min() and values.max() < 1.25
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    diagonal = u.mT @ x @ vh.mT  # in g's own singular vectors: positive, and nothing beside the diagonal
    assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    assert diagonal.diagonal(dim1=-2, dim2=-1).min() > 0.6


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_torchs_muon(decay):
    """torch's rounds to bfloat16, so the two agree to its 2^-8; a wrong coefficient or scale is far off that."""
    shapes = {"a": (32, 64), "b": (64, 32), "c": (32, 64), "d": (48, 48)}
    ours = {n: torch.nn.Parameter(torch.randn(s)) for n, s in shapes.items()}
    theirs = {n: torch.nn.Parameter(p.detach().clone()) for n, p in ours.items()}
    start = {n: p.detach().clone() for n, p in ours.items()}
    a, b = muon_of(ours, decay=decay), torch.optim.Muon(theirs.values(), lr=0.1, weight_decay=decay, momentum=0.95, nesterov=True)
    for step in range(5):
        for n in shapes:
            ours[n].grad = torch.randn(shapes[n], generator=torch.Generator().manual_seed(step))
            theirs[n].grad = ours[n].grad.clone()
        a.step()
        b.step()
    for n in shapes:
        assert (ours[n] - theirs[n]).norm() < 0.02 * (theirs[n] - start[n]).norm()


def test_stacked_matrices_are_orthogonalised_one_by_one():
    whole = torch.nn.Parameter(torch.zeros(96, 32))
    parts = {str(i): torch.nn.Parameter(torch.zeros(n, 32)) for i, n in enumerate((64, 16, 16))}
    whole.grad = torch.randn(96, 32)
    for p, g in zip(parts.values(), whole.grad.split([64, 16, 16])):
        p.grad = g.clone()
    muon_of({"qkv": whole}, {"qkv": [64, 16, 16]}).step()
    muon_of(parts).step()
    assert torch.allclose(whole, torch.cat(list(parts.values())), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_has_one_group_and_the_table_shows_it(optimizer):
    model = make(mlp="swiglu", norm="layernorm", bias=True)
    optimizers = configure_optimizers(model, optimizer, 1e-3, muon_lr=0.02, weight_decay=0.1)
    groups = {n: (type(o).__name__, g["name"], g["lr"], g["weight_decay"]) for o in optimizers for g in o.param_groups for n in g["param_names"]}
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups["wte.weight"] == ("AdamW", "matrices", 1e-3, 0.1) and groups["norm.weight"] == ("AdamW", "vectors", 1e-3, 0.0)
    blocks = groups["blocks.0.attn.qkv.weight"]
    assert blocks == (("Muon", "blocks", 0.02, 0.0) if optimizer == "muon" else ("AdamW", "matrices", 1e-3, 0.1))
    assert len(describe(optimizers)) == (3 if optimizer == "muon" else 2) and "Muon" in describe(optimizers)[0] or optimizer == "adamw"
    set_lr(optimizers, 0.5)
    assert {g["lr"] for o in optimizers for g in o.param_groups} == ({0.01, 5e-4} if optimizer == "muon" else {5e-4})


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, value):
    model = with_gradients(make())
    optimizers = configure_optimizers(model, optimizer, 1e-3)
    step = lambda: [o.step() for o in optimizers]
    step()
    before = copy.deepcopy((model.state_dict(), state_by_name(optimizers)))
    next(model.blocks.parameters()).grad[0] = value
    model.wte.weight.grad[3] = value
    for o in optimizers:
        o.found_inf = torch.ones(())
    step()
    for a, b in zip(before, (model.state_dict(), state_by_name(optimizers))):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with_gradients(model)
    for o in optimizers:
        o.found_inf = torch.zeros(())
    step()
    assert not torch.equal(before[0]["wte.weight"], model.wte.weight)


def update(model, optimizers, scaler, device_type):
    """train.py's own update, cut out of its loop: unscale, clip, look for what is not finite, step or not, scaler.update."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    lines = re.search(r"^ +for opt in optimizers:\n +scaler\.unscale_.*?^ +scaler\.update\(\)\n", source, re.M | re.S).group()
    exec(textwrap.dedent(lines), {"torch": torch, "math": math, "optim": optim, "raw_model": model, "optimizers": optimizers, "scaler": scaler,
                                  "grad_clip": 1.0, "streak": torch.zeros(1), "machine": SimpleNamespace(type=device_type)})


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])  # the host leaves the steps out; or each step sees to it by itself
def test_under_a_loss_scaler_the_update_is_the_same_and_an_infinite_gradient_only_halves_the_scale(optimizer, device_type):
    plain, model = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    none = torch.amp.GradScaler("cpu", enabled=False)
    both = [(m, configure_optimizers(m, optimizer, 1e-3), s) for m, s in ((plain, none), (model, scaler))]
    x = torch.arange(32).view(2, 16)

    def backward(model, scaler):
        scaler.scale(model(x, (x + 1) % 64)[1]).backward()

    for _ in range(3):
        for m, optimizers, s in both:
            backward(m, s)
            update(m, optimizers, s, device_type)
    for a, b in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2.0**16

    optimizers = both[1][1]
    before = copy.deepcopy((model.state_dict(), state_by_name(optimizers)))
    for name in "blocks.0.attn.qkv.weight", "wte.weight":  # Muon's with muon, and AdamW's: either one stops both
        backward(model, scaler)
        scale = scaler.get_scale()
        model.get_parameter(name).grad[1, 1] = math.inf
        update(model, optimizers, scaler, device_type)
        assert scaler.get_scale() == scale / 2
        torch.testing.assert_close(before, (model.state_dict(), state_by_name(optimizers)), rtol=0, atol=0)
    backward(model, scaler)
    update(model, optimizers, scaler, device_type)
    assert not torch.equal(before[0]["wte.weight"], model.wte.weight) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_by_name_continues_exactly(optimizer):
    models = [make(), make()]
    ones, twos = (configure_optimizers(m, optimizer, 1e-3) for m in models)
    for seed in (0, 1):
        with_gradients(models[0], seed)
        [o.step() for o in ones]
    models[1].load_state_dict(models[0].state_dict())
    load_state_by_name(twos, state_by_name(ones))
    for model, optimizers in zip(models, (ones, twos)):
        with_gradients(model, 2)
        [o.step() for o in optimizers]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models)))


def test_state_of_another_optimizer_is_refused_by_name():
    model = with_gradients(make())
    adamw, muon = (configure_optimizers(model, name, 1e-3) for name in ("adamw", "muon"))
    [o.step() for o in adamw]
    with pytest.raises(ValueError, match="--optimizer"):
        load_state_by_name(muon, state_by_name(adamw))
    with pytest.raises(ValueError, match="blocks.0"):
        load_state_by_name(muon, {"wte.weight": {}})
    load_state_by_name(muon, {})  # saved before the first update, which was skipped
    assert not any(o.state for o in muon)
