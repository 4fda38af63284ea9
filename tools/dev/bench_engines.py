"""Rows a second of prediction on a CPU: a sorted loop in PyTorch, the kit's, OpenVINO's.

    python tools/dev/bench_engines.py path/to/clear -o results/engines_cpu.json

For each seed a MiniLM is trained for one epoch on 400 rows, in two folds. The first fold then
predicts other rows of train.csv in every way in turn, so that all ways share what disturbs the
machine. Each way says how far it is from the loop, in standard deviations of the target, and what
RMSE both folds reach on the rows that they had not seen. `prepare` is what a fold costs before its
first prediction: conversion and compilation.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import openvino_engine

import kernel_utils as ku

LOOP = "sorted PyTorch loop"


@torch.inference_mode()
def predict_in_loop(model, tokens, cfg, rows=None):
    """The reference: padded batches in float32, longest texts first."""
    rows = np.arange(len(tokens)) if rows is None else rows
    predictions = np.empty((len(rows), 1))
    for batch in ku._plan_prediction_batches(tokens.lengths[rows], 4096):
        logits = model(**tokens.batch(rows[batch], torch.device("cpu")))
        predictions[batch] = model.predict(logits).numpy()
    return predictions


class Bench:
    """One run, and its predictions in every way."""

    def __init__(self, args, folder, seed):
        cfg = ku.Config(
            data_dir=str(args.folder), output_dir=str(folder), run_name=f"seed{seed}", seed=seed,
            n_folds=2, epochs=1, max_rows=args.train_rows, precision="fp32",
        )  # fmt: skip
        frame = ku.make_folds(ku.read_competition(cfg)[0], cfg)
        self.run = ku._Run.load(ku.train(frame, cfg))
        self.cfg = self.run.cfg
        everything = ku.read_competition(dataclasses.replace(cfg, max_rows=0))[0]
        unseen = everything[~everything["id"].isin(frame["id"])].iloc[: args.rows]
        tokenizer, self.model = self.run.open()
        self.model.eval()
        self.frame, self.seconds = frame, {}
        self.tokens = ku._tokenize(unseen.reset_index(drop=True), tokenizer, self.cfg)
        self.own_tokens = ku._tokenize(frame, tokenizer, self.cfg)
        began = time.perf_counter()
        int8 = openvino_engine.write_int8(self.run, folder)
        self.seconds["quantise a fold"] = (time.perf_counter() - began) / len(int8)
        self.bundle = openvino_engine.OpenvinoBundle(folder, [self.run])
        self.bundle._int8 = {(self.run.name, fold): files for fold, files in int8.items()}

    def load_fold(self, fold):
        """{way: (function like `ku.predict`, backbone or None for the model's own)}."""
        self.run.load_fold(self.model, fold)
        ways = {LOOP: (predict_in_loop, None), "kit, PyTorch": (ku.predict, None)}
        for precision in self.bundle.precisions_for(self.run, fold):
            name, began = f"OpenVINO {precision}", time.perf_counter()
            backbone = self.bundle.backbone_of(self.run, fold, self.tokens, precision)
            self.seconds[f"prepare {name}"] = time.perf_counter() - began
            ways[name] = (ku.predict, backbone)
        return ways

    def predict(self, way, tokens, rows=None):
        function, backbone = way
        place = contextlib.nullcontext()
        if backbone is not None:
            place = openvino_engine._replace_backbone(self.model, backbone)
        with place:
            return function(self.model, tokens, self.cfg, rows)

    def measure(self, repeats):
        """{way: its numbers}."""
        ways = self.load_fold(0)
        predictions, speeds = {}, {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                predictions[name] = self.predict(way, self.tokens)
                if repeat:  # the first pass warms up
                    speeds[name].append(len(self.tokens) / (time.perf_counter() - began))
        target_sd = self.run.record["oof"]["target_sd"][0]
        rmses = self.rmse_of_unseen_rows()
        numbers = {}
        for name in ways:
            gap = np.sqrt(np.square(predictions[name] - predictions[LOOP]).mean()) / target_sd
            numbers[name] = {
                "rows_per_second": statistics.median(speeds[name]),
                "times_the_loop": statistics.median(np.divide(speeds[name], speeds[LOOP]).tolist()),
                "gap_sd": float(gap),
                "rmse": rmses[name],
                "rmse_change": rmses[name] - rmses[LOOP],
            }
        return numbers

    def rmse_of_unseen_rows(self):
        oof = {}
        for fold in self.run.weights:
            rows = np.flatnonzero(self.frame["fold"] == fold)
            for name, way in self.load_fold(fold).items():
                values = oof.setdefault(name, np.empty((len(self.frame), 1)))
                values[rows] = self.predict(way, self.own_tokens, rows)
        target = self.frame[self.cfg.target_columns].to_numpy()
        return {name: ku.METRICS["rmse"](target, values) for name, values in oof.items()}


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("folder", type=Path, help="has train.csv in the CommonLit layout")
    parser.add_argument("--rows", type=int, default=200, help="that are timed (default: 200)")
    parser.add_argument("--train-rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, metavar="JSON")
    args = parser.parse_args()
    results = {"versions": ku._versions(), "threads": torch.get_num_threads(), "seeds": {}}
    results |= {"rows": args.rows, "train_rows": args.train_rows, "repeats": args.repeats}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            bench = Bench(args, Path(folder), seed)
            numbers = bench.measure(args.repeats)
            results["seeds"][seed] = {"ways": numbers, "seconds": bench.seconds}
            for name, values in numbers.items():
                print(f"seed {seed}: {name}: ", {k: round(v, 4) for k, v in values.items()})
            print({name: round(value, 1) for name, value in bench.seconds.items()})
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
