"""How long train_bpe takes against Hugging Face's trainer, and encode_batch against a bare tiktoken, on the Python files
of this machine's interpreter.

    python tests/bench_tokenizer.py [--mb=60] [--vocab_size=10000] [--processes=2] [--rounds=2]

Not a test: it takes a minute. Both read the same texts from memory, in turns, each with as many processes or threads.
"""
import argparse
import os
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def distinct_texts(n_bytes):
    """The .py files below site-packages and the standard library, none twice."""
    seen, size = {}, 0
    for folder in sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_bytes().decode()
            except (UnicodeDecodeError, OSError):
                continue
            if text not in seen:
                seen[text] = None
                size += len(text.encode())
            if size >= n_bytes:
                return list(seen), size
    return list(seen), size


def main():
    parser = argparse.ArgumentParser()
    for name, default in ("mb", 60), ("vocab_size", 10_000), ("processes", 2), ("rounds", 2):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.processes)  # read when tokenizers starts its threads
    import tiktoken
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from data import bpe, tokenizer

    texts, n_bytes = distinct_texts(args.mb * 10**6)
    ends = [bpe.END_OF_TEXT, bpe.DOCUMENT_END]
    unique = set()
    for piece in bpe.pieces(bpe._texts(texts), bpe.TRAIN_CHUNK, ends):
        unique.update(bpe._count(bpe.any_of(ends), bpe.GPT2_PATTERN, piece))
    print(f"{len(texts):,} distinct files, {n_bytes:,} bytes, {len(unique):,} unique pre-tokens, "
          f"{args.vocab_size:,} tokens, {args.processes} processes")

    ratios = []
    for n in range(args.rounds):
        start = time.perf_counter()
        vocab, merges = bpe.train_bpe(texts, args.vocab_size, processes=args.processes)
        ours = time.perf_counter() - start

        hf = Tokenizer(models.BPE())
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        start = time.perf_counter()
        hf.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=args.vocab_size, special_tokens=[bpe.END_OF_TEXT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        theirs = time.perf_counter() - start
        ratios.append(ours / theirs)
        print(f"round {n + 1}: train_bpe {ours:.2f} s, tokenizers {theirs:.2f} s, ratio {ours / theirs:.2f}")

    shared = {tokenizer._spell(token) for token in vocab.values()} & hf.get_vocab().keys()
    print(f"best ratio {min(ratios):.2f}, worst {max(ratios):.2f}; {len(shared):,} of {len(vocab):,} tokens are the same")

    ours = tokenizer.Tokenizer.from_bpe(vocab, merges)
    bare = tiktoken.Encoding("bare", pat_str=bpe.GPT2_PATTERN, special_tokens={},
                             mergeable_ranks={token: i for i, token in vocab.items() if i != ours.eot})
    texts = texts[:1000]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for n in range(args.rounds):
        rates = []
        for threads in 1, 2:
            for encode in ours.encode_batch, bare.encode_ordinary_batch:
                start = time.perf_counter()
                encode(texts, num_threads=threads)
                rates.append(megabytes / (time.perf_counter() - start))
        print(f"round {n + 1}: encode_batch {rates[0]:.1f} MB/s on 1 thread, {rates[2]:.1f} on 2; bare tiktoken {rates[1]:.1f} "
              f"and {rates[3]:.1f}; best over best {max(rates[::2]) / max(rates[1::2]):.2f}")


if __name__ == "__main__":
    main()
