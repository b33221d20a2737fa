"""Train a GPT on one CPU core, one GPU or a hundred.

    python train.py config/train_small.py            the demo: minutes on a laptop, after data/stdlib/prepare.py
    python train.py --batch_size=4 --compile=False   every setting below is a flag
    torchrun --nproc_per_node=8 train.py             the defaults: GPT-2's shape on OpenWebText

Exit status: 0 the run is done, or max_hours is over; 2 an error that one line explains; 128 + n stopped by signal n
(143 SIGTERM, 130 Ctrl-C), with a checkpoint once training has begun; 1 a bug.
"""
# the run
out_dir = "out"             # checkpoints, metrics.jsonl and config.json go here
init_from = "scratch"       # 'resume', 'auto' (resume if there is something to resume, else scratch), or a checkpoint file
seed = 1337                 # the only source of randomness
dry_run = False             # build everything, run one micro-batch, print what a run would take, write nothing
# data
dataset = "openwebtext"     # a folder in data/, or the path of any folder with a train.bin
change_data = False         # let a resume go on with other data than it began with
batch_size = 12             # sequences per micro-batch
block_size = 1024           # tokens per sequence
gradient_accumulation_steps = 40  # micro-batches per iteration, over all ranks: 40 * 12 * 1024 = 491,520 tokens
# the model: 12 layers of 768 are GPT-2's 124M (85M in blocks, 39M embedding), and 39M more where the head is not tied
n_layer = 12
n_head = 12
n_kv_head = 0               # heads of keys and values, shared by groups of queries; 0: as many as n_head
n_embd = 768
dropout = 0.0
bias = False                # in linear layers and LayerNorm
norm = "rmsnorm"            # or 'layernorm'
mlp = "relu2"               # or 'gelu', 'swiglu'
pos_emb = "rope"            # or 'learned'
rope_theta = 10000.0        # the slowest RoPE wave turns once in 2 pi rope_theta tokens
qk_norm = True              # normalise queries and keys
tie_weights = False         # share the embedding's matrix with the head
token_shift = True          # add the token before, by a learnt share of each channel, to each token's embedding
# the optimizer: rates and schedule are what others' records at 124M came to, and were not measured here
optimizer = "muon"          # Muon for the blocks' matrices, AdamW for the rest; or 'adamw' for all
learning_rate = 1.8e-3      # AdamW's peak
muon_lr = 0.025             # Muon's
muon_momentum = 0.95        # with few tokens an iteration 0.9 is better
lr_tokens = 0               # tokens per iteration that both rates are for; with others they change by the root; 0: for any
weight_decay = 0.1          # AdamW's, on tensors of two or more dimensions; Muon's matrices are not decayed
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # largest norm of the whole gradient; 0: no clipping
skip_nonfinite = 0          # iterations in a row that may be left out, as their gradient is not finite; one more ends the run
# the schedule
lr_schedule = "linear"      # or 'cosine', 'wsd' (warm up, stay, decay as 1 - sqrt), 'constant'; all warm up
warmup_iters = 250          # iterations from 1/warmup_iters of the peak up to the peak
lr_decay_iters = 0          # where the decay ends; 0: at the planned end of the run
min_lr = 0.0                # where learning_rate ends; the other groups' rates come down in proportion
decay_frac = 0.7            # share of the run in which 'linear' and 'wsd' come down
# when to stop: whichever comes first, 0 turns one off
max_iters = 20000           # updates in all; always on: 20,000 * 491,520 = 9.8 B tokens, one pass over OpenWebText
max_epochs = 0.0            # passes over train.bin
max_hours = 0.0             # this process's wall clock
target_loss = 0.0           # validation loss
patience = 0                # evaluations without a better validation loss
# evaluation, checkpoints and the log
eval_interval = 1000        # iterations between evaluations; there is one at the planned end, too
eval_iters = 200            # batches of each evaluation, always the same; 0: the whole split, every target once
eval_only = False           # evaluate what init_from names, on every split there is, and end
checkpoint_interval = 0     # iterations between checkpoints; 0: one at each evaluation
keep_checkpoints = 2        # how many of the newest stay, besides best.pt
log_interval = 1            # iterations between log lines
sample_interval = 0         # iterations between samples of text in the log; 0: none
wandb_log = False           # log to Weights & Biases too
wandb_project = "bareGPT"
wandb_run_name = ""         # '': out_dir's name
tensorboard_log = False     # log for TensorBoard too, in out_dir
# the machine
device = "auto"             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto takes the best there is
dtype = "auto"              # 'float32', 'bfloat16', 'float16' (with a loss scaler); auto takes the fastest safe one
compile = "auto"            # torch.compile; auto: on CUDA only
fsdp = False                # shard parameters, gradients and optimizer state over the ranks
gradient_checkpointing = False  # keep only the blocks' inputs for the backward pass: less memory, a third more work
loss_chunk = 0              # positions whose logits are in memory at once, and computed again for the backward pass; 0: all
backend = "auto"            # torch.distributed's: 'nccl' on CUDA, else 'gloo'
timeout_s = 600             # seconds without an answer from another rank that end the run; more than a checkpoint takes
deterministic = False       # repeatable kernels on CUDA, where torch has them; a CPU's are in any case

if __name__ == "__main__":  # here, before the seconds that torch takes to import: a typo is answered at once
    import logging, os, signal, time
    from configurator import configure
    settings = configure(globals())
    started = time.monotonic()  # behind it: a number that stands before it would be a setting
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save until training begins
    logging.getLogger("bareGPT").disabled = os.environ.get("RANK", "0") != "0"  # one rank's warnings are enough

import math, mmap, time
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import optim
from configurator import user_errors
from data.splits import find_folder, fingerprint, load_meta, mix, open_split, permute, tokenizer_state
from data.tokenizer import Tokenizer
from machine import LateFlags, Log, Machine, StopSignals, duration, explained, lock, memory
from model import GPT, GPTConfig, check_causality


class Split:
    """One split of a data set: token ids on disk, dealt out as rows of block_size + 1 tokens.

    Row k is window k mod n of epoch k // n. The n windows of an epoch do not overlap; they stand behind a
    phase and in an order that (seed, epoch) alone decide, so that a cursor is all the state there is.
    """
    def __init__(self, path, tokens, mask, vocab_size, block_size, seed):
        self.path, self.tokens, self.mask, self.vocab_size = path, tokens, mask, vocab_size
        self.block_size, self.seed, self.touched = block_size, seed, 0
        self.n_targets = len(tokens) - 1
        self.n_windows = max(1, self.n_targets // block_size - 1)
        self.rows = [np.lib.stride_tricks.sliding_window_view(a, block_size + 1) for a in (tokens, mask) if a is not None]
        self.starts = lru_cache(maxsize=4)(self._starts)

    def _starts(self, epoch, chunk):
        """First tokens of windows 4096 * chunk onwards of an epoch, in the order in which they come."""
        phase = mix(self.seed, epoch, 0) % (self.n_targets - self.n_windows * self.block_size + 1)
        k = np.arange(4096 * chunk, min(4096 * (chunk + 1), self.n_windows))
        return permute(k, self.n_windows, mix(self.seed, epoch, 1)) * self.block_size + phase

    def get_batch(self, cursor, batch_size):
        """Return (x, y), (batch_size, block_size) int64 on the CPU: rows `cursor` onwards, y one token ahead of x."""
        starts = []
        while batch_size > 0:
            epoch, k = divmod(cursor, self.n_windows)
            chunk, k = divmod(k, 4096)
            starts.append(self.starts(epoch, chunk)[k:k + batch_size])
            cursor, batch_size = cursor + len(starts[-1]), batch_size - len(starts[-1])
        return self.gather(starts[0] if len(starts) == 1 else np.concatenate(starts))

    def gather(self, starts):
        """The rows that start at `starts` as (x, y); targets that the mask leaves out are -100."""
        rows = self.rows[0][starts]  # one gather, (B, T + 1)
        self.touched += len(rows)
        if self.touched > 1000:  # or resident memory would grow to the files' size
            for mapped in (a for a in (self.tokens, self.mask) if isinstance(a, np.memmap)):
                mapped._mmap.madvise(mmap.MADV_DONTNEED)
            self.touched = 0
        if rows.max() >= self.vocab_size or rows.min() < 0:
            wrong = (rows >= self.vocab_size) | (rows < 0)
            raise ValueError(f"{self.path}: token id {rows[wrong][0]} in the {self.block_size + 1} tokens from "
                             f"{starts[wrong.any(1)][0]} on is not below vocab_size={self.vocab_size}; prepare it again")
        rows = torch.from_numpy(rows.astype(np.int64))
        x, y = rows[:, :-1], rows[:, 1:]
        if self.mask is not None:
            y = y.masked_fill(torch.from_numpy(self.rows[1][starts][:, 1:] == 0), -100)
        return x, y

    def batches(self, batch_size, count=0):
        """Yield (x, y): the first `count` batches of get_batch, or for 0 the whole split in order, every target
        once, and -100 where a full batch has no more of them."""
        T, B = self.block_size, batch_size
        if count:
            return (yield from (self.get_batch(i * B, B) for i in range(count)))
        whole = np.arange(self.n_targets // T) * T
        for first in range(0, len(whole), B):
            x, y = self.gather(np.resize(whole[first:first + B], B))
            yield x, y.masked_fill(torch.arange(B)[:, None] >= len(whole) - first, -100)
        tail = self.n_targets % T
        if tail:  # the file's last window ends with the tail's tokens: move them to the front
            x, y = (z.roll(tail, 1) for z in self.gather(np.full(B, self.n_targets - T)))
            yield x, y.index_fill(0, torch.arange(1, B), -100).index_fill(1, torch.arange(tail, T), -100)


@torch.no_grad()
def evaluate(model, batches, machine, asked=lambda: 0):
    """Mean cross-entropy in nats over the targets of all `batches` of (x, y) that count; the ranks share the work. None
    where `asked` returned anything but 0 on any rank: it is called every few batches, and may then end the evaluation."""
    model.eval()
    losses, count = [], 0
    with machine.autocast():
        for i, (x, y) in enumerate(batches):
            if i % (4 * machine.world_size) == 0 and machine.sum(asked())[0]:  # four forward passes are about an iteration
                return None
            if i % machine.world_size == machine.rank:
                losses.append(model(machine.to_device(x), machine.to_device(y), reduction="sum")[1])
                count += int((y != -100).sum())
        if machine.rank > i % machine.world_size:  # FSDP's ranks can only go forward together
            model(machine.to_device(x), machine.to_device(y), reduction="sum")
    model.train()
    nats, count = machine.sum(sum(loss.item() for loss in losses), count)
    if not count:
        raise ValueError("a split's mask leaves out every target of the evaluation; prepare the data again")
    return nats / count


def check_settings(s):
    """Raise one ValueError that lists every setting whose value cannot be."""
    ranges = {"at least 1": (1, "batch_size gradient_accumulation_steps max_iters eval_interval log_interval timeout_s"),
              "at least 2, for the newest may turn out damaged": (2, "keep_checkpoints"),
              "0 or more": (0, "learning_rate min_lr muon_lr muon_momentum lr_tokens weight_decay beta1 beta2 grad_clip "
                               "skip_nonfinite warmup_iters lr_decay_iters decay_frac max_epochs max_hours target_loss "
                               "patience eval_iters checkpoint_interval sample_interval loss_chunk")}
    wrong = [f"{k}={s[k]} must be {words}" for words, (least, keys) in ranges.items() for k in keys.split() if s[k] < least]
    wrong += [f"{k}={s[k]} must be below 1" for k in ("beta1", "beta2", "muon_momentum") if s[k] >= 1]
    wrong += [f"decay_frac={s['decay_frac']} must be at most 1"] if s["decay_frac"] > 1 else []
    wrong += [f"{k}={s[k]!r} is not one of {', '.join(choices)}" for k, choices in
              (("optimizer", ("muon", "adamw")), ("lr_schedule", optim.SCHEDULES)) if s[k] not in choices]
    if s["min_lr"] > s["learning_rate"] or not s["learning_rate"]:
        wrong.append(f"learning_rate={s['learning_rate']} must be above 0, and not below min_lr={s['min_lr']}")
    if wrong:
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    with user_errors(), explained(globals()):
        # What to start from. A resume begins with its run's settings, and the command line is applied on top of them.
        path, state, resuming = checkpoint.origin(init_from, out_dir)
        if state:
            of_this_process = ("out_dir", "init_from", "dry_run", "eval_only", "change_data")
            its_own = {k: v for k, v in state["config"].items() if k not in of_this_process}
            settings = configure(globals(), start_from=its_own if resuming else state["model_args"])
            if resuming:
                settings["init_from"] = state["config"]["init_from"]  # so that config.json repeats the run
        check_settings(settings)
        machine = Machine(device, dtype, compile, backend, timeout_s, deterministic, fsdp)
        main = machine.rank == 0
        say = partial(print, flush=True) if main else lambda *_: None

        # The data.
        folder = find_folder(dataset)
        meta = load_meta(folder)
        splits = {name: open_split(folder, name, meta, block_size) for name in ("train", "val", "test")}
        splits = {name: Split(*found, meta["vocab_size"], block_size, seed) for name, found in splits.items() if found}
        train_data, val_data = splits["train"], splits.get("val")
        data_id = fingerprint({name: split.tokens for name, split in splits.items()})
        tokenizer = tokenizer_state(folder, meta)  # travels in the checkpoint
        reader = Tokenizer.from_dict(tokenizer) if sample_interval else None
        if (patience or target_loss) and not val_data:
            raise ValueError(f"patience and target_loss go by the validation loss, and {folder} has no val.bin")

        # The model and its optimizer.
        asked_for = {k: v for k, v in settings.items() if k in GPTConfig.__dataclass_fields__}
        config = GPTConfig(**(state["model_args"] if state else {}) | asked_for | {"vocab_size": meta["vocab_size"]})
        if state:
            if differ := GPTConfig(**state["model_args"]).differences(config):
                raise ValueError(f"{path} has another architecture: {differ}; drop the flag, or start from scratch")
            if state["tokenizer"] != tokenizer:
                raise ValueError(f"{path} has another tokenizer than {folder}; prepare the data with the checkpoint's")
            if resuming and state["dataset_fingerprint"] != data_id and not change_data:
                raise ValueError(f"{path} was trained on other data than {folder}; --change_data goes on all the same")
        check_causality(config)
        torch.manual_seed(seed)
        raw_model = GPT(config)
        raw_model.gradient_checkpointing, raw_model.loss_chunk = gradient_checkpointing, loss_chunk
        if state:
            raw_model.load_state_dict(state["model"])
        machine.place(raw_model)
        rows_per_iter = gradient_accumulation_steps * batch_size  # over all ranks
        tokens_per_iter = rows_per_iter * block_size
        lr_scale = (tokens_per_iter / (lr_tokens or tokens_per_iter)) ** 0.5
        optimizers = optim.configure_optimizers(raw_model, optimizer, lr_scale * learning_rate, lr_scale * muon_lr,
                                                muon_momentum, weight_decay, beta1, beta2)
        scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)

        # Where the run stands, and where it goes.
        iter_num = cursor = tokens = evals_without_gain = due_eval = due_save = stopped = 0
        elapsed_s, best_val_loss = 0.0, math.inf
        if resuming:
            optim.load_state_by_name(optimizers, state["optimizer"])
            if state["scaler"]:  # else it ran in another dtype until now
                scaler.load_state_dict(state["scaler"])
            iter_num, cursor, tokens, elapsed_s = (state[k] for k in ("iter_num", "cursor", "tokens", "elapsed_s"))
            best_val_loss, evals_without_gain = state["best_val_loss"], state["evals_without_gain"]
            due_eval = due_save = val_data and state.get("eval_due")  # a signal came before its end
        state = None  # a copy of the model and its optimizer less
        if gradient_accumulation_steps % machine.world_size:
            near = {max(1, gradient_accumulation_steps // machine.world_size + i) * machine.world_size for i in (0, 1)}
            raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} micro-batches cannot be dealt evenly "
                             f"to {machine.world_size} ranks; {' or '.join(map(str, sorted(near)))} can")
        end, wide = max_iters, len(f"{max_iters:,}")
        if max_epochs:
            end = min(end, iter_num + max(0, math.ceil((max_epochs * train_data.n_windows - cursor) / rows_per_iter)))
        if main and not (dry_run or eval_only):
            claim = lock(out_dir)  # held until the process ends
            if not resuming:
                checkpoint.set_aside(out_dir)

        # What is about to happen.
        flops_per_token = raw_model.flops_per_token()
        say(f"model      {raw_model.num_params():,} parameters, {flops_per_token / 1e6:,.1f} M operations a token")
        say("\n".join(f"           {line}" for line in optim.describe(optimizers)))
        say("\n".join(f"{name:10} {len(split.tokens):,} tokens, {split.path}" for name, split in splits.items()))
        say(f"iteration  {tokens_per_iter:,} tokens = {gradient_accumulation_steps} micro-batches"
            f" * {batch_size} rows * {block_size}")
        say(f"run        {end:,} iterations = {end * tokens_per_iter:,} tokens ="
            f" {end * rows_per_iter / train_data.n_windows:,.2f} epochs"
            + (f"\nresume     {path} at iteration {iter_num:,}" if resuming else ""))
        say("\n".join(machine.describe()))

        compiled = raw_model.train()

        def evaluate_split(name, **options):
            """Loss, perplexity and, for a whole split of known bytes, bits per byte; as a dict, and printed."""
            split = splits[name]
            count = eval_iters if eval_iters * batch_size < split.n_windows else 0  # 0: the whole split is no more work
            if (loss := evaluate(compiled, split.batches(batch_size, count), machine, **options)) is None:
                return None
            ppl, n_bytes = math.exp(min(loss, 99)), meta.get("bytes", {}).get(name)
            bpb = loss * split.n_targets / math.log(2) / n_bytes if n_bytes and not count and split.mask is None else None
            say(f"eval {iter_num:{wide},}/{end:,}  {name} loss {loss:.4f}  perplexity {ppl:,.2f}"
                + (f"  {bpb:.4f} bits per byte" if bpb else ""))
            return {f"{name}_loss": loss, f"{name}_ppl": ppl, f"{name}_bpb": bpb}

        if eval_only:
            for name in splits:
                evaluate_split(name)
            machine.close()

        log = Log(settings, machine.environment(), silent=dry_run or not main)
        clock = elapsed_s - time.perf_counter()  # clock + perf_counter(): the seconds spent training, all sessions together
        compiled = machine.try_compile(raw_model, *map(machine.to_device, train_data.get_batch(cursor, batch_size)))
        model = machine.parallel(compiled)

        def micro_step(micro):
            """Forward and backward of one micro-batch; returns its loss in nats, summed, and how many targets count."""
            x, y = train_data.get_batch(cursor + micro * batch_size, batch_size)
            count = y.numel() if train_data.mask is None else int((y != -100).sum())
            if dropout:
                torch.manual_seed(mix(seed, iter_num, micro))
            if machine.world_size > 1:  # the ranks' gradients meet behind the last micro-batch
                model.set_requires_gradient_sync(micro + machine.world_size >= gradient_accumulation_steps)
            with machine.autocast():
                _, nats = model(machine.to_device(x), machine.to_device(y), reduction="sum")
            # Each is divided by the nominal count; the ranks' mean, which they take, is to be their sum.
            scaler.scale(nats * (machine.world_size / tokens_per_iter)).backward()
            return nats.detach(), count

        if dry_run:
            optim.set_lr(optimizers, 0.0)
            for _ in range(2):  # the first time warms up
                began = time.perf_counter()
                micro_step(gradient_accumulation_steps - machine.world_size + machine.rank)
                machine.synchronize()
                between = time.perf_counter()
                for opt in optimizers:
                    opt.step()
                machine.synchronize()
            seconds = (between - began) * gradient_accumulation_steps / machine.world_size + time.perf_counter() - between
            say(f"dry run    {seconds:.3g} s an iteration, {tokens_per_iter / seconds:,.0f} tokens/s, "
                f"{duration(seconds * (end - iter_num))} in all; {machine.peak_gib():.2f} GiB at the peak")
            parts = memory(raw_model, batch_size, optimizer, machine.dtype.itemsize, machine.shards,
                           gradient_accumulation_steps)
            say("memory     " + ", ".join(f"{k} {v / 2**30:,.2f}" for k, v in parts.items()) + " GiB a rank (estimated)")
            machine.close()

        def snapshot():
            """This moment as a checkpoint."""
            return {"model": raw_model.state_dict(), "model_args": asdict(config),
                    "optimizer": optim.state_by_name(optimizers), "scaler": scaler.state_dict(),
                    "iter_num": iter_num, "cursor": cursor, "tokens": tokens, "elapsed_s": clock + paused,
                    "best_val_loss": best_val_loss, "evals_without_gain": evals_without_gain, "eval_due": bool(due_eval),
                    "config": settings, "tokenizer": tokenizer, "dataset_fingerprint": data_id}

        writer = checkpoint.Writer(path if resuming else None, main)
        stop, flags = StopSignals(started, max_hours, writer), LateFlags(machine)
        streak = torch.zeros(1, device=machine.device)  # iterations in a row with a gradient that is not finite
        skippable = max(skip_nonfinite, 32 * scaler.is_enabled())  # float16's loss scale halves at each, so some are normal
        first_iter, floor, last = iter_num, min_lr / learning_rate, (iter_num, elapsed_s)  # last: when the log last spoke
        reason = f"{end:,} iterations are done already; a higher --max_{'iters' if end == max_iters else 'epochs'} goes on" if iter_num >= end else ""
        while True:
            # Outside the training clock: evaluation, a sample, checkpoints.
            paused, better = time.perf_counter(), False
            if main and iter_num == first_iter + 1:
                writer.prepare(snapshot(), room=not fsdp)
            val = evaluate_split("val", asked=stop.look) if due_eval and not stopped else None
            if val:
                due_eval, better = False, val["val_loss"] < best_val_loss
                best_val_loss = min(val["val_loss"], best_val_loss)
                evals_without_gain = 0 if better else evals_without_gain + 1
                log.write(iter=iter_num, tokens=tokens, elapsed_s=clock + paused, **val)
                if val["val_loss"] <= target_loss:
                    reason = f"target_loss={target_loss:g} is reached"
                elif patience and evals_without_gain >= patience:
                    reason = f"patience={patience} is over: the best validation loss is {best_val_loss:.4f}"
            elif due_eval:  # a signal came first, or amid it: it stays due, and the resume begins with it
                *_, stopped = flags.push(iter_num, streak, stop.look(), wait=True)[-1]
            if sample_interval and iter_num % sample_interval == 0 and iter_num > first_iter and not stopped:
                with machine.autocast():  # a new document; under FSDP all ranks have to write it
                    sample = raw_model.generate(torch.full((1, 1), reader.eot or 0, device=machine.device),
                                                max_new_tokens=200, top_k=200, seed=mix(seed, iter_num))
                say(reader.decode(sample[0, 1:].tolist()))
            if due_save or better or stopped or (val and reason):  # the last: this evaluation ended the run
                writer.start(out_dir, snapshot(), keep_checkpoints, better)
            clock -= time.perf_counter() - paused
            if reason or stopped:
                break

            # One update: the micro-batches of an iteration are dealt to the ranks in turn.
            factor = optim.lr_factor(iter_num, lr_schedule, warmup_iters, lr_decay_iters or end, decay_frac, floor)
            optim.set_lr(optimizers, factor)
            parts = [micro_step(micro) for micro in range(machine.rank, gradient_accumulation_steps, machine.world_size)]
            count = sum(n for _, n in parts)
            if train_data.mask is not None:  # from the mean over nominal to the mean over actual targets
                gradients = [p.grad for p in raw_model.parameters()]
                torch._foreach_mul_(gradients, tokens_per_iter / max(1, machine.sum(count)[0]))
            for opt in optimizers:
                scaler.unscale_(opt)
            grad_norm = optim.whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf))
            bad = (~torch.isfinite(grad_norm)).float()
            streak = (streak + 1) * bad
            for opt in optimizers:
                opt.found_inf = bad  # on CUDA a step looks at it on the device, and then leaves the weights alone
                if machine.type == "cuda" or not bad:
                    opt.step()  # not scaler.step, which would let one optimizer go on without the other
                opt.zero_grad()
            scaler.update()
            iter_num, cursor, tokens = iter_num + 1, cursor + rows_per_iter, tokens + tokens_per_iter

            # What the ranks agree on: is the gradient finite, does a signal or the clock say stop?
            due_eval = val_data and (iter_num % eval_interval == 0 or iter_num >= end)
            due_save = iter_num % (checkpoint_interval or eval_interval) == 0 or iter_num >= end
            for at, in_a_row, stopped in flags.push(iter_num, streak, stop.look(), wait=due_eval or due_save):
                if in_a_row > skippable:
                    writer.wait()
                    raise ValueError(f"the gradient is not finite at iteration {at:,}, and the weights were left alone; "
                                     f"{writer.last or 'no checkpoint yet'} is the last good checkpoint: "
                                     "lower --learning_rate, then --init_from=resume")
                if in_a_row:
                    say(f"iter {at:{wide},}/{end:,}  skipped, for the gradient is not finite ({in_a_row:.0f} in a row)")
            writer.wait(block=False)  # raises what went wrong in the thread
            if iter_num >= end:
                reason = (f"max_iters={max_iters:,}" if end == max_iters else f"max_epochs={max_epochs:g}") + " is reached"

            if iter_num % log_interval == 0 or due_eval or reason or stopped:
                nats, count = machine.sum(sum(float(part) for part, _ in parts), count)
                train_loss = nats / max(1, count)
                now = clock + time.perf_counter()
                tok_per_s = (iter_num - last[0]) * tokens_per_iter / (now - last[1])
                mfu = tok_per_s * flops_per_token / machine.peak_flops() if machine.peak_flops() else None
                eta = (now - elapsed_s) / (iter_num - first_iter) * (end - iter_num)
                lr, last = lr_scale * learning_rate * factor, (iter_num, now)
                say(f"iter {iter_num:{wide},}/{end:,}  loss {train_loss:.4f}  lr {lr:.2e}  norm {grad_norm:5.2f}"
                    f"  {tok_per_s:9,.0f} tok/s" + (f"  mfu {mfu:.1%}" if mfu else "") + f"  eta {duration(eta)}")
                log.write(iter=iter_num, tokens=tokens, elapsed_s=now, train_loss=train_loss, lr=lr,
                          grad_norm=float(grad_norm), tok_per_s=tok_per_s, mfu=mfu)

        trained = duration(clock + time.perf_counter())
        while machine.sum(writer.busy())[0]:  # a write may take longer than the others would wait for a rank
            time.sleep(0.01)
        writer.wait()
        if stopped:  # by max_hours, or a signal's number
            reason = f"stopped by {signal.Signals(int(stopped)).name}" if stopped > 1 else f"max_hours={max_hours:g} is over"
        say(f"{reason}; {tokens:,} tokens, {trained} of training, checkpoint {writer.last}")
        machine.close(128 + int(stopped) if stopped > 1 else 0)
