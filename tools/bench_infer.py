"""Speed of prediction against plain transformers loops, alternating: same model, same tokens, same predictions.

    python tools/bench_infer.py runs/NAME --data path/to/competition -o results/infer_speed.csv

The plain loop tokenizes and predicts `--batch-size` rows at a time in the order of test.csv, padded to a fixed length.
Three loads: the texts padded to 256, the same to 512, and texts of mixed lengths (log-normal around 150 tokens, from 20
to 500, cut from the same texts) padded to 512. One fold of the run; tokenizing counts, loading does not. Ratios are the
plain loop's seconds by ours, the median over the rounds with the smallest and largest.

With `--precisions` another comparison: infer.ipynb's prediction by all folds, in float32, in bf16 and int8 where this
machine has them, and, with rows enough for its probe, with the setting auto, against a float32 loop over the folds that
tokenizes once, sorts the texts by length and pads to the longest of a batch, with as many tokens a batch. `gap` is the
root mean square distance from the loop's predictions, in standard deviations of the target. Seconds are those of the
CPU, so that a machine may be shared; with OMP_NUM_THREADS=1 none of them are spent waiting.
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
    tokens = ku.tokenize(texts, tokenizer, cfg)
    return ku.predict(model, tokens, cfg)


@torch.inference_mode()
def sorted_loop(texts, tokenizer, model, run):
    """Mean over the folds, (N, K), as a careful notebook makes it."""
    encoded = tokenizer(texts, truncation=True, max_length=run.cfg.max_length)["input_ids"]
    order = np.argsort([-len(ids) for ids in encoded], kind="stable")
    total = np.zeros((len(texts), 1))
    for fold in run.weights:
        ku.load_fold(model, run, fold)
        start = 0
        while start < len(order):
            rows = order[start : start + (run.cfg.batch_tokens or 4096) // len(encoded[order[start]])]
            batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            states = model.backbone(**batch).last_hidden_state
            total[rows] += model.output(model.head((states,), batch["attention_mask"])).numpy()
            start += len(rows)
    return total / len(run.weights)


def ours_in(frame, bundle):
    return ku.predict_bundle(bundle._replace(opened={}), frame)


def compare_precisions(folder, frame, tokenizer, model, asked):
    """Rows of the second table: seconds of the sorted loop and of every precision, in turn."""
    run, names = ku.load_run(folder), ["fp32", *(p for p, why in ku.cpu_precisions().items() if not why)]
    names += ["auto"] if len(frame) * len(run.weights) >= ku.PROBE_PAYS else []
    texts = list(frame[run.cfg.text_column])
    sides = {"loop": (sorted_loop, texts, tokenizer, model, run)}
    sides |= {name: (ours_in, frame, ku.load_bundle(folder, name)) for name in names}
    sorted_loop(texts[:64], tokenizer, model, run)
    times, predictions = {name: [] for name in sides}, {}
    for round_ in range(asked.rounds):
        for name in list(sides) if round_ % 2 == 0 else list(sides)[::-1]:
            function, *arguments = sides[name]
            began = time.process_time()  # of all threads; others on the machine do not count
            predictions[name] = function(*arguments)
            times[name].append(time.process_time() - began)
        print(f"round {round_}: {', '.join(f'{name} {took[-1]:.1f} s' for name, took in times.items())}", flush=True)
    rows = []
    for name in names:
        ratios = np.array(times["loop"]) / times[name]
        row = {"texts": "test.csv", "precision": name, "rows": len(texts), "folds": len(run.weights)}
        row |= {"sorted loop rows/s": round(len(texts) / np.median(times["loop"]), 1)}
        row |= {"rows/s": round(len(texts) / np.median(times[name]), 1), "ratio": round(np.median(ratios), 2)}
        row |= {"smallest": round(ratios.min(), 2), "largest": round(ratios.max(), 2), "rounds": asked.rounds}
        gap = ku.rms_gap(run, predictions[name], predictions["loop"])
        rows.append(
            row | {"gap": f"{gap:.1g}", "device": f"{ku.device_name()}, {torch.get_num_threads()} threads, CPU seconds"}
        )
    return rows


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
        "tokens a row": round(ku.tokenize(texts, tokenizer, cfg).lengths.mean(), 1),
        "plain rows/s": round(len(texts) / np.median(plain), 1),
        "rows/s": round(len(texts) / np.median(own), 1),
        "ratio": round(np.median(plain / own), 2),
        "smallest": round((plain / own).min(), 2),
        "largest": round((plain / own).max(), 2),
        "rounds": asked.rounds,
        "device": f"{ku.device_name()}, {torch.get_num_threads()} threads, float32",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--data", required=True, help="folder with test.csv")
    parser.add_argument("-o", "--output", type=Path, help="write the table to this CSV file")
    parser.add_argument("--rows", type=int, default=0, help="use the first so many rows; 0 means all")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs")
    parser.add_argument("--precisions", action="store_true", help="compare precisions with a sorted float32 loop")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch of the plain loop")
    asked = parser.parse_args()
    run = ku.load_run(asked.run)
    cfg = run.cfg
    if (cfg.head, cfg.task, cfg.truncation, cfg.prefix, cfg.pair_column) != ("mean", "regression", "head", "", ""):
        sys.exit("the plain loop is for regression on single texts without prefix, cut at the end, and the head mean")
    tokenizer, model = ku.open_run(run)
    ku.load_fold(model, run, next(iter(run.weights)))
    model.eval()
    test, _ = ku.read_test(run.cfg, Path(asked.data))
    texts = list(test[run.cfg.text_column][: asked.rows or None])
    if asked.precisions:
        rows = compare_precisions(asked.run, test[: asked.rows or None], tokenizer, model, asked)
    else:
        mixed = mixed_lengths(texts, len(texts), tokenizer)
        cfg = dataclasses.replace(run.cfg, precision="fp32")
        loads = (("test.csv", texts, 256), ("test.csv", texts, 512), ("mixed lengths", mixed, 512))
        rows = [measure(*load, tokenizer, model, cfg, asked) for load in loads]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(asked.output, index=False)


if __name__ == "__main__":
    main()
