# Teach a trained model to answer. Prepare pairs with that model's own tokenizer, then start from its checkpoint:
#
#   python data/instruct/prepare.py --input=pairs.jsonl --tokenizer=data/stdlib/tokenizer.json
#   python train.py config/finetune_instruct.py --init_from=out/best.pt
#
# The architecture comes from the checkpoint. Prompts are masked: the loss is that of the answers alone.
init_from = "out/best.pt"
out_dir = "out-instruct"
dataset = "instruct"

batch_size = 8
gradient_accumulation_steps = 4  # 8 * 4 = 32 windows: 32,768 tokens per iteration at a block_size of 1,024

max_epochs = 3.0  # more than a few passes over some thousand answers learn them by heart
optimizer = "adamw"  # Muon moves every direction of a matrix: right for building up, too much for bending
learning_rate = 3e-5  # a twentieth of pre-training's 6e-4: bend what is there, do not overwrite it
min_lr = 0.0
lr_schedule = "linear"
decay_frac = 0.9
warmup_iters = 20
weight_decay = 0.0
dropout = 0.1

eval_interval = 50
eval_iters = 0  # the whole validation split: it is small
patience = 3  # evaluations without gain, then best.pt is the model to take
