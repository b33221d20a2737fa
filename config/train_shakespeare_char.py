# The classic: Shakespeare letter by letter, a fifth of a minute's reading, minutes on a laptop.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char.py
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1  # 1 * 12 * 64 = 768 tokens per iteration
n_layer = 4
n_head = 4
n_embd = 128  # 0.82 M parameters with head and embedding
learning_rate = 3e-3
min_lr = 0.0
lr_schedule = "linear"
decay_frac = 1.0
warmup_iters = 50
max_iters = 1300  # 1,300 * 768 = 1.0 M tokens, one epoch
eval_interval = 325
eval_iters = 0  # the whole validation split
log_interval = 50
