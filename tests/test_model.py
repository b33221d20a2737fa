"""The model: its switches, its first loss, its gradients, its cache, its refusal to look ahead."""
import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, GPTConfig, check_causality, rotate, rope_table, sample

SHAPES = {
    "ours": {},
    "gpt2": dict(pos_emb="learned", norm="layernorm", mlp="gelu", qk_norm=False, tie_weights=True, bias=True, token_shift=False),
    "llama": dict(mlp="swiglu", qk_norm=False, n_kv_head=2, token_shift=False),
    "qwen3": dict(mlp="swiglu", n_kv_head=1, head_dim=16, token_shift=False),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def make(shape="ours", **kwargs):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=32, vocab_size=100, n_layer=2, n_head=4, n_embd=32) | SHAPES[shape] | kwargs))


def randomised(shape, **kwargs):
    """A model none of whose parameters is zero, so that nothing hides."""
    model = make(shape, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def batch(B=4, T=32, vocab_size=100):
    g = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (B, T), generator=g), torch.randint(vocab_size, (B, T), generator=g)


@every_shape
@pytest.mark.parametrize("vocab_size", [65, 4096])
def test_first_loss_is_that_of_knowing_nothing(shape, vocab_size):
    _, loss = make(shape, vocab_size=vocab_size, n_embd=128)(*batch(vocab_size=vocab_size))
    assert abs(loss.item() / math.log(vocab_size) - 1) < 0.02


@every_shape
def test_every_parameter_has_a_gradient_within_three_iterations(shape):
    model, (x, y) = make(shape), batch()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    silent = dict(model.named_parameters())
    for _ in range(3):
        model(x, y)[1].backward()
        silent = {n: p for n, p in silent.items() if not p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert not silent


@every_shape
def test_a_single_batch_is_learnt_by_heart(shape):
    model, (x, y) = make(shape, n_embd=64), batch()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0)
    for _ in range(300):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@every_shape
def test_loss_is_the_cross_entropy_of_the_targets_that_count(shape):
    model, (x, y) = randomised(shape), batch()
    y[:, ::3] = -100
    logits, loss = model(x, y)
    assert logits.shape == (4, 32, 100)
    log_probs = logits.double().log_softmax(-1)
    picked = [log_probs[b, t, y[b, t]] for b in range(4) for t in range(32) if y[b, t] != -100]
    assert torch.isclose(loss.double(), -torch.stack(picked).mean(), rtol=1e-5)
    assert torch.isclose(model(x, y, reduction="sum")[1].double(), -torch.stack(picked).sum(), rtol=1e-5)
    assert model(x)[1] is None


def test_attention_is_the_formula():
    """Against softmax(q k^T / sqrt(hs)) v written out, in float64, grouped queries and RoPE included."""
    attn = randomised("qwen3", n_head=4, n_kv_head=2).double().blocks[0].attn
    x, rope = torch.randn(2, 8, 32).double(), rope_table(GPTConfig(block_size=8, n_head=4, n_embd=32, head_dim=16)).double()
    q, k, v = attn.qkv(x).view(2, 8, 8, 16).transpose(1, 2).split([4, 2, 2], 1)
    q, k = (rotate(norm(z), rope) for norm, z in ((attn.q_norm, q), (attn.k_norm, k)))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
    expected = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 64))
    assert torch.allclose(attn(x, rope), expected, rtol=1e-9)


def test_rope_turns_by_position_and_scores_depend_on_distance_alone():
    rope = rope_table(GPTConfig(block_size=32, n_head=1, n_embd=16))
    q, k = torch.randn(16), torch.randn(16)
    at = lambda z, t: rotate(z.view(1, 1, 1, 16), rope[:, t:t + 1]).flatten()
    assert torch.isclose(at(q, 7) @ at(k, 3), at(q, 20) @ at(k, 16), atol=1e-5)
    assert not torch.isclose(at(q, 7) @ at(k, 3), at(q, 7) @ at(k, 4), atol=1e-3)
    assert torch.equal(at(q, 0), q)
    pair = at(torch.eye(16)[0], 5)  # channel 0, paired with 8, turns one radian a position
    assert torch.allclose(pair[[0, 8]], torch.tensor([math.cos(5), math.sin(5)]), atol=1e-6)


def test_the_token_shift_adds_a_share_of_the_embedding_before():
    """As in a model without it whose table of embeddings holds the sums."""
    model, (x, _) = randomised("ours"), batch(B=1)
    plain = make("ours", vocab_size=32, token_shift=False).eval()
    weights = {k: v for k, v in model.state_dict().items() if k not in ("shift", "lm_head.weight")}
    e = model.wte.weight[x[0]]
    weights["wte.weight"] = torch.cat([e[:1], e[1:] + model.shift * e[:-1]]).repeat(2, 1)
    plain.load_state_dict(weights, strict=False)
    plain.lm_head = model.lm_head
    assert torch.allclose(plain(torch.arange(32)[None])[0], model(x)[0][..., :32], atol=1e-5)


@every_shape
def test_gradient_checkpointing_changes_memory_and_nothing_else(shape):
    """Equal gradients, dropout included, from a fifth of what the backward pass keeps."""
    def gradients(on):
        model, held = randomised(shape, n_layer=8, dropout=0.1).train(), []
        model.gradient_checkpointing = on
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            loss = model(*batch())[1]
        loss.backward()
        return [p.grad for p in model.parameters()], sum(held)
    (plain, kept), (again, less) = gradients(False), gradients(True)
    assert all(map(torch.equal, plain, again)) and less < kept / 5


@every_shape
def test_a_chunked_loss_has_the_same_gradients_and_never_holds_all_logits(shape):
    (x, y), results, largest = batch(), [], []
    y[:, ::3] = -100
    for chunk in (0, 24):  # 128 positions: the last piece is shorter
        model = randomised(shape).train()
        model.loss_chunk, held = chunk, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
            logits, loss = model(x, y)
        assert (logits is None) == bool(chunk)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
        largest.append(max(math.prod(s) for s in held if s[-1:] == (100,)) if not chunk else sum(s[-1:] == (100,) for s in held))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results))
    assert largest == [128 * 100, 0]  # what the backward pass keeps of the logits


@every_shape
def test_padding_of_the_vocabulary_is_invisible(shape):
    model, (x, y) = make(shape, vocab_size=100), batch()
    assert model.lm_head.weight.shape[0] == 128
    model(x, y)[1].backward()
    assert not model.lm_head.weight.grad[100:].any()
    assert max(model.generate(x, 20, temperature=5.0, seed=0).flatten().tolist()) < 100


@every_shape
def test_the_causality_check_passes_and_catches_a_leak(shape, monkeypatch):
    config = make(shape).config
    state = torch.random.get_rng_state()
    check_causality(config)
    assert torch.equal(state, torch.random.get_rng_state())
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", lambda *a, **k: real(*a, **k | {"is_causal": False}))
    with pytest.raises(ValueError, match="leaks the future"):
        check_causality(config)


def test_the_causality_check_catches_a_mixing_mlp(monkeypatch):
    plain = model_module.MLP.forward
    monkeypatch.setattr(model_module.MLP, "forward", lambda self, x: plain(self, x) + 1e-2 * x.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="leaks the future"):
        check_causality(GPTConfig(n_layer=2, n_head=2, n_embd=32))


@every_shape
def test_cached_generation_equals_the_uncached_one(shape):
    model, (x, _) = randomised(shape), batch()
    idx = x[:, :5]
    for _ in range(27):  # up to block_size
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(x[:, :5], 27, temperature=0), idx)


@every_shape
def test_generation_goes_on_past_block_size_with_the_younger_half(shape):
    model, (x, _) = randomised(shape), batch()
    idx = window = x[:, :20]
    for _ in range(60):
        if window.size(1) > 32:
            window = window[:, -16:]
        token = model(window)[0][:, -1:].argmax(-1)
        idx, window = torch.cat([idx, token], 1), torch.cat([window, token], 1)
    assert torch.equal(model.generate(x[:, :20], 60, temperature=0), idx)
    long = torch.cat([x, x], 1)  # a prompt longer than block_size: its end is what the model sees
    assert torch.equal(model.generate(long, 1, temperature=0)[:, -1], model.generate(x, 1, temperature=0)[:, -1])


def test_a_seed_makes_draws_repeatable_and_leaves_the_global_generator_alone():
    model, (x, _) = randomised("ours"), batch()
    state = torch.random.get_rng_state()
    a, b, c = (model.generate(x[:, :4], 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.random.get_rng_state())


def test_generation_leaves_the_training_mode_as_it_was():
    model = make("ours", dropout=0.5).train()
    x, _ = batch()
    assert torch.equal(model.generate(x, 5, temperature=0), model.generate(x, 5, temperature=0))  # no dropout in there
    assert model.training
    stream = model.stream(x, 5)
    next(stream)
    stream.close()
    assert model.training


def test_a_row_ends_with_its_stop_token_and_all_end_together():
    model, (x, _) = randomised("ours"), batch()
    free = model.generate(x[:, :4], 24, temperature=0)
    stop = [free[0, 6].item(), free[1, 8].item()]
    got = model.generate(x[:, :4], 24, temperature=0, stop=stop)
    for row, reference in zip(got[:, 4:].tolist(), free[:, 4:].tolist()):
        first = next((i for i, t in enumerate(reference) if t in stop), len(reference) - 1)
        assert row[:first + 1] == reference[:first + 1][:len(row)]
        assert set(row[first:]) <= {reference[first]}
    one = model.generate(x[:1, :4], 24, temperature=0, stop=stop[0])
    assert one[0, -1] == stop[0] and one.size(1) <= 7


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().repeat(4000, 1)
    draws = lambda **k: set(sample(logits, 1.0, **dict(top_k=None, top_p=None, generator=torch.Generator().manual_seed(0)) | k).tolist())
    assert draws() == draws(top_k=0) == draws(top_p=1.0) == draws(top_k=99) == {0, 1, 2, 3, 4}
    assert draws(top_k=2) == {0, 1}
    assert draws(top_p=0.4) == {0} and draws(top_p=0.6) == {0, 1} and draws(top_p=0.8) == {0, 1, 2}
    cold = sample(logits, 0.5, None, None, torch.Generator().manual_seed(0))
    expected = (logits[0].exp() ** 2 / (logits[0].exp() ** 2).sum())[0]
    assert abs((cold == 0).float().mean() - expected) < 0.03


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_k=-1), dict(top_p=1.5), dict(top_p=-0.1), dict(max_new_tokens=-1)])
def test_sampling_arguments_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make().generate(torch.zeros(1, 1, dtype=torch.long), **dict(max_new_tokens=1) | bad)
    with pytest.raises(ValueError, match="prompt"):
        make().generate(torch.zeros(1, 0, dtype=torch.long), 1)


@pytest.mark.parametrize("bad, words", [
    (dict(n_embd=100, n_head=12), "n_embd=100.*n_head=12.*n_head=10"), (dict(n_kv_head=5), "n_kv_head=5"), (dict(norm="x"), "norm='x'"),
    (dict(mlp="x"), "mlp='x'"), (dict(pos_emb="x"), "pos_emb='x'"), (dict(dropout=1.0), "dropout"), (dict(n_layer=0), "n_layer=0"),
    (dict(n_embd=36), "even"), (dict(vocab_size=-1), "vocab_size"), (dict(rope_theta=0), "rope_theta"), (dict(n_ff=-1), "n_ff")])
def test_an_architecture_that_cannot_be_is_refused_by_name(bad, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**bad)


def test_gpt2_has_gpt2s_number_of_parameters_and_operations():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(**SHAPES["gpt2"]))
    padding = (50304 - 50257) * 768
    assert gpt2.num_params() - padding == 124_439_808  # the figure of its paper's released weights
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 50304 * 768
    assert gpt2.flops_per_token() == 6 * matrices + 12 * 12 * 1024 * 768


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="33 tokens do not fit block_size=32"):
        make()(torch.zeros(1, 33, dtype=torch.long))
