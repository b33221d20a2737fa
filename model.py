"""One GPT whose switches cover GPT-2, Llama, Qwen3 and this project's own default.

    GPT-2   pos_emb='learned' norm='layernorm' mlp='gelu'   qk_norm=False tie_weights=True bias=True
    Llama   pos_emb='rope'    norm='rmsnorm'   mlp='swiglu' qk_norm=False n_kv_head < n_head
    Qwen3   the same with qk_norm=True
    ours    pos_emb='rope'    norm='rmsnorm'   mlp='relu2'  qk_norm=True, token_shift=True, no bias, nothing tied

Letters in the shapes: B batch, T time (tokens), C = n_embd, nh heads, hs head size, V vocabulary.
"""
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The architecture, and nothing of how it is trained. Raises ValueError naming a field that cannot be."""
    block_size: int = 1024         # longest context, in tokens
    vocab_size: int = 50257        # as the tokenizer has it; the padding to a multiple of 64 is internal
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0             # heads of keys and values, each shared by n_head / n_kv_head queries; 0: n_head
    n_embd: int = 768
    head_dim: int = 0              # 0: n_embd / n_head
    n_ff: int = 0                  # width of the MLP; 0: 4 * n_embd, for swiglu 8/3 of it (the same parameters)
    dropout: float = 0.0
    bias: bool = False             # in the linear layers and in LayerNorm
    norm: str = "rmsnorm"          # or 'layernorm'
    norm_eps: float = 1e-5
    mlp: str = "relu2"             # or 'gelu', 'swiglu'
    pos_emb: str = "rope"          # or 'learned'
    rope_theta: float = 10000.0
    qk_norm: bool = True           # RMSNorm on each head's queries and keys: attention logits cannot blow up
    tie_weights: bool = False      # the head is the embedding's own matrix
    token_shift: bool = True       # add the token before, by a learnt share of each channel, to each token's embedding

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("head_dim", "n_ff", "n_kv_head", "norm_eps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not self.head_dim and self.n_embd % self.n_head:
            near = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            near = sorted(near, key=lambda n: abs(n - self.n_head))[:2]
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                             f"n_head={' or '.join(map(str, near))} would do")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if self.pos_emb == "rope" and self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of channels: the head size {self.head_dim} (n_embd / n_head) must be even")
        # 8/3: swiglu has three matrices where the others have two; 64: widths that matrix units like
        self.n_ff = self.n_ff or (64 * math.ceil(self.n_embd / 24) if self.mlp == "swiglu" else 4 * self.n_embd)

    def differences(self, other):
        """What two architectures differ in, in words, '' for nothing; the dropout may."""
        return "; ".join(f"{f.name}={getattr(self, f.name)!r} there, {getattr(other, f.name)!r} here" for f in fields(self)
                         if f.name != "dropout" and getattr(self, f.name) != getattr(other, f.name))


CHOICES = {"norm": ("rmsnorm", "layernorm"), "mlp": ("relu2", "gelu", "swiglu"), "pos_emb": ("rope", "learned")}


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich, with the gain in the input's dtype: under autocast a mixture would miss the fused kernel."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.n_embd, eps=config.norm_eps)


def rope_table(config):
    """The rotation angles' cosines and sines, (2, block_size, hs/2) float32 (Su et al., RoFormer, eq. 34).

    The pair of channels (i, i + hs/2) turns by theta^(-2i/hs) radians a position, as in Llama.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), config.rope_theta ** (-pairs / config.head_dim))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, rope):
    """Turn the pairs of channels of x (B, heads, T, hs) by the angles of rope (2, T, hs/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class KVCache:
    """Keys and values of the tokens that a model has seen, so that the next token costs one position's work."""

    def __init__(self, capacity):
        self.capacity = capacity  # in tokens
        self.length = 0           # tokens seen; GPT.forward moves it on when all layers have written
        self.layers = {}          # layer -> (2, B, n_kv_head, capacity, hs), made when its first keys come
        self.embedding = None     # (B, 1, C) of the last token seen, for the token shift

    def append(self, layer, k, v):
        """Store k and v (B, n_kv_head, T, hs) of new positions; return those of all positions so far."""
        B, nh, T, hs = k.shape
        if layer not in self.layers:
            self.layers[layer] = k.new_empty(2, B, nh, self.capacity, hs)
        kv, end = self.layers[layer], self.length + T
        kv[0, :, :, self.length:end], kv[1, :, :, self.length:end] = k, v
        return kv[0, :, :, :end], kv[1, :, :, :end]


class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.qkv = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=config.bias)
        self.proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope=None, cache=None):
        B, T, C = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, nh + 2 * n_kv_head, T, hs)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast ends here: norms and rotation come out in float32
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=self.n_kv_head < self.n_head,
                                           dropout_p=self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        gates = 2 if config.mlp == "swiglu" else 1
        self.up = nn.Linear(config.n_embd, gates * config.n_ff, bias=config.bias)  # swiglu: the gates, then the values
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.up(x)  # (B, T, n_ff), twice that for swiglu
        if self.kind == "relu2":  # So et al., Primer
            x = F.relu(x)
            x = x * x  # not .square(): autocast would compute, and keep, that one in float32 on CUDA
        elif self.kind == "gelu":
            x = F.gelu(x, approximate="tanh")
        else:  # Shazeer, GLU Variants Improve Transformer
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.down(x)  # (B, T, C)


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, cache=None):
        x = x + self.drop(self.attn(self.attn_norm(x), rope, cache))
        x = x + self.drop(self.mlp(self.mlp_norm(x)))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = 64 * math.ceil(config.vocab_size / 64)  # 50257 -> 50304: a head whose width the matrix units like
        self.wte = nn.Embedding(rows, config.n_embd)
        self.gradient_checkpointing = False  # keep only the blocks' inputs for the backward pass, and compute the rest anew
        self.loss_chunk = 0                  # positions whose logits are in memory at once, and computed anew; 0: all
        if config.token_shift:
            self.shift = nn.Parameter(torch.empty(config.n_embd))
        if config.pos_emb == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.register_buffer("rope", rope_table(config), persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw the parameters anew from torch's global generator.

        An untied head and the projections into the residual stream start at zero: every block starts as the
        identity, and the first loss is exactly ln(vocab_size). The other matrices are normal with (3 fan_in)^-0.5,
        GPT-2's 0.02 carried from its width of 768 to any other, and embeddings with 1. A tied head cannot be zero:
        there everything starts as in GPT-2, at 0.02, the projections smaller by the root of their number.
        """
        tied = self.config.tie_weights
        if self.config.token_shift:
            nn.init.zeros_(self.shift)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.02 if tied else (3 * module.in_features) ** -0.5
                if name.endswith(("proj", "down")):
                    std *= (2 * self.config.n_layer) ** -0.5 if tied else 0.0
                if name != "lm_head":
                    nn.init.normal_(module.weight, std=std)
                elif not tied:
                    nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if tied else 1.0)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()

    def stacked_rows(self):
        """{name: rows of each} of the parameters that hold several matrices on top of each other."""
        c, stacked = self.config, {}
        for i in range(c.n_layer):
            stacked[f"blocks.{i}.attn.qkv.weight"] = [c.n_head * c.head_dim] + 2 * [c.n_kv_head * c.head_dim]
            if c.mlp == "swiglu":
                stacked[f"blocks.{i}.mlp.up.weight"] = [c.n_ff, c.n_ff]
        return stacked

    def num_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of a training step, a token: 6 for each parameter that is used in a matrix
        product (the head too, tied or not), and attention's 12 * n_layer * block_size * (nh * hs)
        (Chowdhery et al., PaLM, appendix B). Embedding look-ups and causality's savings are not counted."""
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() > 1) + self.lm_head.weight.numel()
        return 6 * matrices + 12 * c.n_layer * c.block_size * c.n_head * c.head_dim

    def forward(self, idx, targets=None, reduction="mean", cache=None):
        """Return (logits, loss) for idx (B, T) int64.

        logits: (B, T, vocab_size), with a `cache` only the last position's, (B, 1, vocab_size).
        loss: cross-entropy in nats over targets (B, T) int64 that are not -100, their mean or (reduction='sum')
        their sum; None without targets. With `loss_chunk` and targets there are no logits, but None.
        Raises ValueError past block_size.
        """
        B, T = idx.shape
        past = cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit block_size={self.config.block_size}")
        assert T == 1 or past == 0, "a cache takes the whole prompt first, then one token at a time"
        x = self.wte(idx)  # (B, T, C)
        if self.config.token_shift:
            before = F.pad(x, (0, 0, 1, -1)) if past == 0 else cache.embedding  # (B, T, C), zero before the first token
            if cache is not None:
                cache.embedding = x[:, -1:]
            x = x + self.shift * before
        rope = None
        if self.config.pos_emb == "learned":
            x = x + self.wpe.weight[past:past + T]
        else:
            rope = self.rope[:, past:past + T]
        x = self.drop(x)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        x = self.norm(x)
        if targets is None:
            return self.logits(x), None
        score = lambda logits, targets: F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")
        if not self.loss_chunk:
            logits = self.logits(x)
            nats = score(logits, targets)
        else:
            pieces = zip(*(z.flatten(0, 1).split(self.loss_chunk) for z in (x, targets)))
            score_piece = lambda x, targets: score(self.logits(x), targets)
            logits, nats = None, sum(checkpoint(score_piece, *piece, use_reentrant=False) for piece in pieces)
        return logits, nats if reduction == "sum" else nats / (targets != -100).sum()

    def logits(self, x):
        """(..., C) -> (..., vocab_size), the padding cropped."""
        return self.lm_head(x)[..., :self.config.vocab_size]

    def generate(self, idx, max_new_tokens, **sampling):
        """Return idx (B, T) int64 with up to max_new_tokens sampled tokens behind it, (B, T + n) int64.

        `sampling` and what it raises: see `stream`. A row that met a stop token repeats it to its end.
        """
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **sampling))], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, seed=None):
        """Yield the next tokens of idx (B, T) int64 as they are sampled, (B,) int64 each.

        temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the smallest set with that
        much probability (Holtzman et al., nucleus sampling); None or 0 turns either off. stop: a token id or
        several; it ends when every row has met one. seed: makes the draws repeatable. When block_size tokens
        are in view, the older half is forgotten. Raises ValueError for arguments that make no sense.
        """
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        stop = torch.tensor([stop] if isinstance(stop, int) else list(stop or ()), device=idx.device, dtype=torch.long)
        block_size, was_training = self.config.block_size, self.training
        done, token = torch.zeros(len(idx), dtype=torch.bool, device=idx.device), None
        seen = new = idx[:, -block_size:]
        cache = KVCache(min(block_size, seen.size(1) + max_new_tokens))
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if cache.length == block_size:
                    new, cache = seen[:, -max(1, block_size // 2):], KVCache(block_size)
                logits, _ = self(new, cache=cache)  # (B, 1, V)
                choice = sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
                token = choice if token is None else torch.where(done, token, choice)
                yield token
                if len(stop):
                    done |= torch.isin(token, stop)
                    if done.all():
                        break
                new = token[:, None]
                seen = torch.cat([seen, new], dim=1)[:, -block_size:]
        finally:
            self.train(was_training)


def check_sampling(idx, max_new_tokens, temperature, top_k, top_p):
    if idx.dim() != 2 or not idx.numel():
        raise ValueError(f"the prompt must be (B, T) with at least one token, not {tuple(idx.shape)}")
    for name, value in (("max_new_tokens", max_new_tokens), ("temperature", temperature), ("top_k", top_k or 0)):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    if top_p and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in [0, 1] (0 keeps all tokens)")


def sample(logits, temperature, top_k, top_p, generator):
    """Draw one token id a row, (B,) int64, from logits (B, V) float32."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p:
        ordered, ids = probs.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it already have top_p between them
        probs = probs.scatter(-1, ids, ordered.masked_fill(outside, 0.0))
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def check_causality(config):
    """Raise ValueError if the logits of a position depend on later tokens.

    Runs in milliseconds, on a small clone of the architecture with every parameter random: where the real
    one starts at zero, a leak would be invisible until it has made the training loss look wonderful.
    """
    grouped = config.n_kv_head < config.n_head
    tiny = replace(config, block_size=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1 if grouped else 2,
                   n_embd=32, head_dim=16, n_ff=64, dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = GPT(tiny)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        idx = torch.randint(64, (2, 16), generator=generator)
        other = torch.cat([idx[:, :8], (idx[:, 8:] + 1) % 64], dim=1)  # the same past, another future
        before, after = model(idx)[0][:, :8], model(other)[0][:, :8]
    if not before.isfinite().all():
        raise ValueError("model.py computes logits that are not finite from random parameters")
    if (before - after).abs().max() > 1e-5 * before.abs().max():  # more than rounding
        raise ValueError("model.py leaks the future: changing tokens 8 to 15 changed the logits of positions 0 to 7; "
                         "look for a missing causal mask or an operation along the time axis")
