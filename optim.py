"""Which parameter is updated by which rule, at which rate: one table, and its state by parameter name."""
import math

import torch

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


def configure_optimizers(model, learning_rate, weight_decay=0.1, beta1=0.9, beta2=0.95):
    """Return a list of optimizers that together hold every parameter of `model` once.

    Each param_group has, besides torch's keys, `name`, `param_names` and `initial_lr`: the rate that a schedule
    multiplies. AdamW (Loshchilov & Hutter) decays tensors of two or more dimensions; gains and biases are not
    decayed, for a zero there is not "simpler" than a one.
    """
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    table = [  # name, parameters, rate, decay
        ("matrices", matrices, learning_rate, weight_decay),
        ("vectors", vectors, learning_rate, 0.0),
    ]
    groups = [dict(params=named, name=name, lr=lr, initial_lr=lr, weight_decay=decay)
              for name, named, lr, decay in table if named]
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)]


def describe(optimizers):
    """The table of groups and rates, a line each, for the console."""
    return [f"{type(o).__name__:6} {g['name']:9} {len(g['params']):4d} tensors  {sum(p.numel() for p in g['params']):13,d} "
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
    """Put back what `state_by_name` returned, copied to each parameter's device.

    Raises ValueError when a parameter has no state in `state`, or one made by another optimizer.
    """
    for o in optimizers:
        for name, p in ((n, p) for g in o.param_groups for n, p in zip(g["param_names"], g["params"])):
            if name not in state:
                raise ValueError(f"the checkpoint has no optimizer state for {name}")
            o.state[p] = {k: v.to(p.device, copy=True) for k, v in state[name].items()}
