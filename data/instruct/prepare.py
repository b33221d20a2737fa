"""Instructions and answers to finetune on: only the answers are learnt, the prompts are masked.

    python data/instruct/prepare.py --input=pairs.jsonl
    python train.py config/finetune_instruct.py --init_from=out/best.pt

A line of the .jsonl is {"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}
with the roles system, user and assistant. Beside train.bin stands train.mask.bin, 0 where a token is not learnt.
"""
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, user_errors
from data.reader import documents, input_files
from data.tokenizer import Tokenizer
from data.writer import DatasetWriter, Progress, split_by_hash

input = ""  # .jsonl files and folders of them, separated by commas
out = ""  # folder to write to; empty means beside this file
tokenizer = "gpt2"  # that of the model to be finetuned: a name of tiktoken's, byte, or a tokenizer file
max_length = 0  # cut conversations to so many tokens; 0: never
pad = False  # fill up shorter ones to max_length; the padding is masked
val_fraction = 0.1  # share of the conversations that goes to val
test_fraction = 0.0  # and to test
limit = 0  # stop after so many conversations; 0: all

# What a conversation looks like to the model. To sample: --start=$'### user\nWhy?\n\n### assistant\n'
HEAD, TAIL = "### {role}\n", "\n\n"


def messages_of(record, where):
    """[(role, content), ...] of one line; ValueError where it is not a conversation with an answer."""
    if isinstance(record, dict) and "messages" in record:
        messages = record["messages"]
    elif isinstance(record, dict) and {"prompt", "response"} <= record.keys():
        messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
    else:
        raise ValueError(f'{where}: expected "prompt" and "response", or "messages"')
    for message in messages if isinstance(messages, list) else [None]:
        if not (isinstance(message, dict) and isinstance(message.get("content"), str)
                and message.get("role") in ("system", "user", "assistant")):
            raise ValueError(f"{where}: a message needs a role (system, user, assistant) and a text, not {str(message)[:80]!r}")
    return [(message["role"], message["content"]) for message in messages]


def encode(messages, tokenizer, max_length=0, pad=False):
    """(ids, mask, bytes of the answers). An answer is learnt with its end-of-text, nothing else is."""
    ids, mask, prompt = [], [], ""
    for role, content in messages:  # what stands behind the last answer teaches nothing, and is left out
        prompt += HEAD.format(role=role)
        if role != "assistant":
            prompt += content + TAIL
            continue
        given, learnt = tokenizer.encode(prompt), [*tokenizer.encode(content), tokenizer.eot]  # as a sampler will encode it
        ids, mask, prompt = ids + given + learnt, mask + [0] * len(given) + [1] * len(learnt), ""
    ids, mask = ids[:max_length or None], mask[:max_length or None]
    n_bytes = len(tokenizer.decode_bytes(i for i, m in zip(ids, mask) if m and i != tokenizer.eot))
    padding = max(0, max_length - len(ids)) if pad else 0
    return ids + [tokenizer.eot] * padding, mask + [0] * padding, n_bytes


if __name__ == "__main__":
    configure(globals())
    with user_errors():
        paths, encoder, skipped = input_files(input, (".jsonl",)), Tokenizer.load(tokenizer), 0
        if encoder.eot is None:
            raise ValueError(f"--tokenizer={tokenizer} has no end-of-text token, so no answer could end")
        if pad and not max_length:
            raise ValueError("--pad fills conversations up to --max_length=N: set that too")
        progress = Progress(sum(path.stat().st_size for path in paths))
        with DatasetWriter(out or Path(__file__).parent, encoder, masked=True) as writer, progress:
            for where, record in islice(documents(paths, progress, key=None), limit or None):
                messages = messages_of(record, where)
                ids, mask, n_bytes = encode(messages, encoder, max_length, pad)
                if any(mask):
                    writer.add(split_by_hash(repr(messages), val_fraction, test_fraction), ids, n_bytes, mask)
                skipped += not any(mask)
                progress.show(f"{writer.documents.total():,} conversations")
        print(f"(bytes are those of the answers; {skipped:,} conversations without one within max_length left out)")
