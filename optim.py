"""Which parameter is updated by which rule, at which rate: one table, and its state by parameter name."""
import math

import torch
import torch.distributed as dist

SCHEDULES = {  # share of the way from the peak to the floor, by the share of the decay that lies behind
    "constant": lambda done: 0.0,
    "cosine": lambda done: 0.5 - 0.5 * math.cos(math.pi * done),
    "linear": lambda done: done,
    "wsd": math.sqrt,  # warm up, stay, decay: the 1 - sqrt of Haegele et al., Scaling Laws Beyond Fixed Training Durations
}


def lr_factor(iteration, schedule, warmup_iters, decay_end, decay_frac, floor):
    """The rate of `iteration` (from 0) as a multiple of the peak.
    It rises linearly over warmup_iters and comes down to `floor` at decay_end: 'cosine' from the end of the
    warm-up on, 'linear' and 'wsd' over the last decay_frac of the run.
    """
    if iteration < warmup_iters:
        return (iteration + 1) / warmup_iters
    start = warmup_iters if schedule == "cosine" else max(warmup_iters, round((1 - decay_frac) * decay_end))
    done = min(1.0, max(0.0, (iteration - start) / max(1, decay_end - start)))
    return 1 - (1 - floor) * SCHEDULES[schedule](done)


def configure_optimizers(model, optimizer, learning_rate, muon_lr=0.02, muon_momentum=0.95, weight_decay=0.1,
                         beta1=0.9, beta2=0.95):
    """Return a list of optimizers that together hold every parameter of `model` once.

    optimizer='adamw' (Loshchilov & Hutter) has it all, and decays tensors of two or more dimensions; gains and
    biases are not decayed, for a zero there is not "simpler" than a one. 'muon' takes the blocks' matrices away.
    A param_group has, besides torch's keys, `name`, `param_names` and `initial_lr`, which a schedule multiplies.
    """
    named = dict(model.named_parameters())
    hidden = {n: p for n, p in named.items() if optimizer == "muon" and n.startswith("blocks.") and p.dim() == 2}
    rest = {n: p for n, p in named.items() if n not in hidden}
    table = [  # name, parameters, rate, decay
        ("blocks", hidden, muon_lr, 0.0),
        ("matrices", {n: p for n, p in rest.items() if p.dim() >= 2}, learning_rate, weight_decay),
        ("vectors", {n: p for n, p in rest.items() if p.dim() < 2}, learning_rate, 0.0),
    ]
    groups = [dict(params=list(params.items()), name=name, lr=lr, initial_lr=lr, weight_decay=decay)
              for name, params, lr, decay in table if params]
    optimizers = [torch.optim.AdamW([g for g in groups if g["name"] != "blocks"], betas=(beta1, beta2), fused=True)]
    if hidden:
        optimizers.insert(0, Muon(groups[0], model.stacked_rows(), muon_momentum))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is replaced by the nearest semi-orthogonal matrix (Jordan et al., Muon).

    All directions of a matrix then move by the same amount, also those in which the gradient is small. `rows` names
    parameters that hold several matrices on top of each other, {name: [rows of each]}. Pieces of equal shape are one
    batch, of which each rank does a share. A step uses up the gradients. State: `momentum_buffer`, of p's shape.
    """
    def __init__(self, group, rows, momentum=0.95):
        super().__init__([group], dict(lr=0.02, weight_decay=0.0))
        self.rows, self.momentum = rows, momentum

    @torch.no_grad()
    def step(self):
        group, pieces = self.param_groups[0], {}  # pieces: {shape: [(this rank's rows, the piece's offset, update)]}
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        ok = 1.0 - getattr(self, "found_inf", torch.zeros((), device=group["params"][0].device))  # 0: change nothing
        for name, p in zip(group["param_names"], group["params"]):
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            (weight, first), (gradient, _), (buffer, _) = map(shard, (p, p.grad, self.state[p]["momentum_buffer"]))
            gradient.masked_fill_(ok == 0, 0.0)
            buffer.lerp_(gradient, (1 - self.momentum) * ok)
            gradient.lerp_(buffer, self.momentum)  # Nesterov's, in the gradient's own room
            weight.mul_(1 - group["lr"] * group["weight_decay"] * ok)
            offset = -first  # where a piece begins, counted from this rank's first row
            for update in whole(p.grad).split(self.rows.get(name, [len(p)])):
                found = pieces.setdefault(update.shape, [])
                found.append((weight, offset, update if len(found) % ranks == rank else None))  # dealt to the ranks in turn
                offset += len(update)
        for (rows, cols), found in pieces.items():
            mine = [update for _, _, update in found if update is not None]
            mine += [ok.new_zeros(rows, cols)] * (math.ceil(len(found) / ranks) - len(mine))  # as many on every rank
            updates = orthogonalize(torch.stack(mine)).mul_(ok * (-group["lr"] * max(1, rows / cols) ** 0.5))
            for part in updates.contiguous().split(1 if ranks > 1 else len(updates)):
                if ranks > 1:  # a matrix of each at a time: with all of them at once, FSDP would hold whole models again
                    one, part = part[0], part.new_empty(ranks, rows, cols)
                    dist.all_gather(list(part), one)
                batch, found = found[:len(part)], found[len(part):]
                weights = [weight[max(0, at):max(0, at + rows)] for weight, at, _ in batch]
                part = [u[max(0, -at):][:len(w)] for u, w, (_, at, _) in zip(part.to(weights[0].dtype), weights, batch)]
                torch._foreach_add_(weights, part)


def whole(tensor):
    """All of a tensor that FSDP has sharded (a DTensor), gathered from the ranks, each of which must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(tensor):
    """This rank's rows of a tensor and the number of the first: all of them, or what FSDP deals as torch.chunk would."""
    if not hasattr(tensor, "to_local"):
        return tensor, 0
    return tensor.to_local(), tensor.device_mesh.get_local_rank() * math.ceil(len(tensor) / tensor.device_mesh.size())


def orthogonalize(g):
    """Matrices (n, rows, cols) with the singular vectors of g (n, rows, cols) and singular values near 1.

    Five steps of a quintic Newton-Schulz iteration (coefficients: Jordan et al.), in bfloat16 on a GPU: values above
    about 1 % of the matrix's norm land between 0.6 and 1.25, smaller ones on the way there.
    """
    x = g.bfloat16() if g.is_cuda else g
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


def describe(optimizers):
    """The table of groups and rates, a line each, for the console."""
    return [f"{type(o).__name__:6} {g['name']:8} {len(g['params']):4d} tensors  {sum(p.numel() for p in g['params']):13,d} "
            f"parameters  lr {g['initial_lr']:.2e}  decay {g['weight_decay']:g}" for o in optimizers for g in o.param_groups]


def set_lr(optimizers, factor):
    """Set every group's rate to `factor` times its peak."""
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"] = group["initial_lr"] * factor


def state_by_name(optimizers):
    """{parameter name: its optimizer's state}: tensors on their devices, no matter which optimizer holds them."""
    return {name: dict(o.state[p]) for o in optimizers for g in o.param_groups
            for name, p in zip(g["param_names"], g["params"]) if p in o.state}


def load_state_by_name(optimizers, state):
    """Put back a copy of what `state_by_name` returned, which is {} before the first update. Raises ValueError for a
    parameter that has no state in it, or one made by another optimizer."""
    for o in optimizers if state else ():
        for name, p in ((n, p) for g in o.param_groups for n, p in zip(g["param_names"], g["params"])):
            if name not in state or ("momentum_buffer" in state[name]) != isinstance(o, Muon):
                raise ValueError(f"the checkpoint has no {type(o).__name__} state for {name}; keep the run's own --optimizer")
            o.state[p] = {k: torch.empty_like(p if v.dim() else v, device=p.device) for k, v in state[name].items()}
            for key, value in state[name].items():
                rows, first = shard(o.state[p][key])
                rows.copy_(value[first:first + len(rows)] if value.dim() else value)
