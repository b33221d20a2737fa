# The demo: a GPT that learns to write Python from Python's own standard library, in minutes on two CPU cores.
#   python data/stdlib/prepare.py && python train.py config/train_small.py && python sample.py --out_dir=out-small
out_dir = "out-small"
dataset = "stdlib"  # 2.4 M tokens of a vocabulary of 4,096
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1  # 1 * 16 * 128 = 2,048 tokens per iteration
n_layer = 4
n_head = 4
n_embd = 128  # narrow, for the sake of more tokens: at equal arithmetic a width of 192 ended 0.07 bits per byte higher
mlp = "gelu"  # 0.006 and 0.009 bits per byte better than relu2 after half the run, with two seeds
optimizer = "muon"
muon_lr = 0.05
muon_momentum = 0.9
learning_rate = 3.3e-2
lr_tokens = 2048  # the rates of another batch_size follow
min_lr = 0.0
lr_schedule = "linear"
decay_frac = 1.0
warmup_iters = 10
max_iters = 1000  # 1,000 * 2,048 = 2.0 M tokens, 0.9 epochs
eval_interval = 500
eval_iters = 0
log_interval = 50
