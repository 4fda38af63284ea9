"""Speed of prediction against plain transformers loops, alternating: same model, same tokens, same predictions.

    python tools/bench_infer.py runs/NAME --data path/to/competition -o results/infer_speed.csv

The plain loop tokenizes and predicts `--batch-size` rows at a time in the order of test.csv, padded to a fixed length.
Three loads: the texts padded to 256, the same to 512, and texts of mixed lengths (log-normal around 150 tokens, from 20
to 500, cut from the same texts) padded to 512. One fold of the run; tokenizing counts, loading does not. Ratios are the
plain loop's seconds by ours, the median over the rounds with the smallest and largest.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernel_utils"))
import kernel_utils as ku


def mixed_lengths(texts, rows, tokenizer):
    """`rows` pieces of the texts with token counts drawn from a log-normal distribution."""
    words = " ".join(texts).split()
    some = words[:5000]
    tokens_a_word = len(tokenizer(" ".join(some), verbose=False)["input_ids"]) / len(some)
    rng = np.random.default_rng(0)
    counts = (rng.lognormal(np.log(150), 0.7, rows).clip(20, 500) / tokens_a_word).astype(int)
    starts = rng.integers(0, len(words) - 500, rows)
    return [" ".join(words[start : start + count]) for start, count in zip(starts, counts, strict=True)]


@torch.inference_mode()
def plain_loop(texts, tokenizer, model, length, batch_size):
    """Predictions (N, K) as a first notebook makes them."""
    device, parts = next(model.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(device)
        states = model.backbone(**batch).last_hidden_state
        parts.append(model.output(model.head((states,), batch["attention_mask"])))
    return torch.cat(parts).cpu().numpy()


def ours(texts, tokenizer, model, cfg):
    tokens = ku._tokenize(texts, tokenizer, cfg)
    return ku.predict(model, tokens, cfg)


def seconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def measure(name, texts, length, tokenizer, model, cfg, asked):
    """A row of the table: seconds of both sides over the rounds. They take turns in who goes first."""
    cfg = dataclasses.replace(cfg, max_length=length)
    sides = [(plain_loop, (tokenizer, model, length, asked.batch_size)), (ours, (tokenizer, model, cfg))]
    few = texts[:64]  # warms both up
    np.testing.assert_allclose(*(function(few, *arguments) for function, arguments in sides), atol=1e-4)
    times = np.empty((asked.rounds, 2))
    for round_ in range(asked.rounds):
        for side in (0, 1) if round_ % 2 == 0 else (1, 0):
            function, arguments = sides[side]
            times[round_, side] = seconds(function, texts, *arguments)
        plain, own = times[round_]
        print(f"{name}: plain {plain:.1f} s, ours {own:.1f} s, ratio {plain / own:.2f}", flush=True)
    plain, own = times.T
    return {
        "texts": name,
        "padded to": length,
        "rows": len(texts),
        "tokens a row": round(ku._tokenize(texts, tokenizer, cfg).lengths.mean(), 1),
        "plain rows/s": round(len(texts) / np.median(plain), 1),
        "rows/s": round(len(texts) / np.median(own), 1),
        "ratio": round(np.median(plain / own), 2),
        "smallest": round((plain / own).min(), 2),
        "largest": round((plain / own).max(), 2),
        "rounds": asked.rounds,
        "device": f"{ku._device_name()}, {torch.get_num_threads()} threads, float32",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--data", required=True, help="folder with test.csv")
    parser.add_argument("-o", "--output", type=Path, help="write the table to this CSV file")
    parser.add_argument("--rows", type=int, default=0, help="use the first so many rows; 0 means all")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch of the plain loop")
    asked = parser.parse_args()
    run = ku._load_run(asked.run)
    cfg = run.cfg
    if (cfg.head, cfg.task, cfg.truncation, cfg.prefix, cfg.pair_column) != ("mean", "regression", "head", "", ""):
        sys.exit("the plain loop is for regression on single texts without prefix, cut at the end, and the head mean")
    tokenizer, model = ku._open_run(run)
    ku._load_fold(model, run, next(iter(run.weights)))
    model.eval()
    test, _ = ku._read_test(run.cfg, Path(asked.data))
    texts = list(test[run.cfg.text_column][: asked.rows or None])
    mixed = mixed_lengths(texts, len(texts), tokenizer)
    cfg = dataclasses.replace(run.cfg, precision="fp32")
    loads = (("test.csv", texts, 256), ("test.csv", texts, 512), ("mixed lengths", mixed, 512))
    table = pd.DataFrame([measure(*load, tokenizer, model, cfg, asked) for load in loads])
    print(table.to_string(index=False))
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(asked.output, index=False)


if __name__ == "__main__":
    main()
