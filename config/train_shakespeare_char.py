# The classic: Shakespeare letter by letter, about two minutes on two CPU cores.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char.py
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1  # 1 * 12 * 64 = 768 tokens per iteration
n_layer = 4
n_head = 4
n_embd = 128  # 0.82 M parameters with head and embedding
optimizer = "muon"
muon_lr = 0.045
muon_momentum = 0.9
learning_rate = 3e-2  # of embedding, head and vectors; with --optimizer=adamw for all, 3e-3
lr_tokens = 768  # the rates of another batch_size follow
min_lr = 0.0
lr_schedule = "linear"
decay_frac = 1.0
warmup_iters = 10
max_iters = 2000  # 2,000 * 768 = 1.5 M tokens, 1.5 epochs
eval_interval = 500
eval_iters = 0  # the whole validation split
log_interval = 50
