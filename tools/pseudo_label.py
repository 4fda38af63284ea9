"""Label extra texts with finished runs, for each fold by models that did not train on its rows.

    python tools/pseudo_label.py runs/one runs/two --texts extra.csv -o pseudo
    papermill notebooks/train.ipynb train.out.ipynb -p pseudo_dir pseudo -p run_name student

The model that validates on fold f is later trained with the labels of fold f: the mean over the runs of their models
that validated on fold f. A csv of texts has the text columns of train.csv; ids are made where it has none. A text that
is a training row, by id or text, gets no label; one that nearly is a row of fold f gets none for fold f: the two share
at least --threshold of the word trigrams of the shorter one. What comes out is checked by train.ipynb before it trains.
"""

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

THRESHOLD = 0.3  # of all pairs of a train and a test text of CLEAR 7 share 0.42 or more, the others 0.26 at most
BLOCK = 1000  # texts compared at a time


def near_duplicates(texts, others, threshold):
    """Pairs (row of `texts`, row of `others`) of normalised texts, as two arrays, that share at least `threshold` of
    the word trigrams of the one that has fewer. Broder 1997, "On the resemblance and containment of documents".
    """
    words = dict(lowercase=False, token_pattern=r"\S+", ngram_range=(3, 3))
    shingles = HashingVectorizer(
        n_features=2**22, alternate_sign=False, binary=True, norm=None, dtype=np.int32, **words
    )
    ours, theirs = shingles.transform(texts), shingles.transform(others)
    sizes, their_sizes, transposed = ours.getnnz(1), theirs.getnnz(1), theirs.T.tocsr()
    pairs = [np.empty((2, 0), int)]
    for start in range(0, len(texts), BLOCK):
        shared = (ours[start : start + BLOCK] @ transposed).tocoo()
        rows = shared.row + start
        near = shared.data >= threshold * np.minimum(sizes[rows], their_sizes[shared.col])
        pairs.append(np.stack([rows[near], shared.col[near]]))
    return np.concatenate(pairs, axis=1)


# ---------------------------------------------------------------------------------------
# What the runs have seen


def alike_problems(runs):
    """How runs differ from the first in what they read or predict, as texts."""
    problems, first = [], runs[0]
    for run in runs[1:]:
        for what, ours, theirs in (
            ("task", run.cfg.task, first.cfg.task),
            ("outputs", run.record["outputs"], first.record["outputs"]),
            ("classes", run.record["classes"], first.record["classes"]),
            ("id_column", run.cfg.id_column, first.cfg.id_column),
            ("text columns", ku._input_columns(run.cfg), ku._input_columns(first.cfg)),
        ):
            if ours != theirs:
                problems.append(f"{run.name}: {what} must be as in {first.name}, {theirs!r}; got {ours!r}")
    return problems


def read_rows(run, data_dir):
    """train.csv as the run read it; DataError where its ids or texts are not those that the run has recorded."""
    cfg = dataclasses.replace(run.cfg, data_dir=data_dir or run.cfg.data_dir)
    folder = ku._find_data_dir(cfg.data_dir, "train.csv")
    frame = ku._read_train(cfg, folder)
    for name in dict.fromkeys([cfg.id_column, *ku._input_columns(cfg)]):
        what = f"column {name} of train.csv"
        if ku._digest(list(frame[name])) != run.record["fingerprint"].get(what):
            raise ku.DataError(f"{folder}: {what} is not the one that {run.name} was trained on; set --data-dir")
    return frame


def validated(folder, run, ids):
    """{fold: ids of the rows that the model of this fold validated on, so that it did not train on them}.

    From the sealed folder of every fold, which has the weights too; oof.csv must say the same. `ids` are those of the
    rows that the run read.
    """
    oof = ku._read_table(folder / "oof.csv", ["id", "fold"])
    folds, problems = {}, []
    for fold, path in run.weights.items():
        if damage := ku._folder_problems(path.parent):
            problems += [f"{path.parent}: {problem}" for problem in damage]
            continue
        state = ku._read_state(path.parent)
        folds[fold] = frozenset(ids[state["rows"]])
        if state["fold"] != fold:
            problems.append(f"{path.parent}: the model of fold {state['fold']}, not of fold {fold}")
        elif folds[fold] != set(oof["id"][oof["fold"] == str(fold)]):
            problems.append(f"{folder / 'oof.csv'}: fold {fold} has other rows than the model validated on")
    if problems:
        raise ku.DataError(problems)
    return folds


def read_runs(folders, data_dir):
    """(runs, training rows with their fold, {fold: ids}), once all runs are complete and agree; else one KitError. The
    rows of folds that were not trained have fold -1."""
    runs = [ku._load_run(folder) for folder in folders]
    if partial := [run.name for run in runs if run.record["status"] != "complete"]:
        raise ku.ConfigError(f"expected complete runs: {ku._comma_join(partial)} was stopped")
    if problems := alike_problems(runs):
        raise ku.ConfigError(problems)
    frames = [read_rows(run, data_dir) for run in runs]
    ids = runs[0].cfg.id_column
    found = [validated(*of) for of in zip(folders, runs, [frame[ids].to_numpy() for frame in frames], strict=True)]
    for run, folds in zip(runs, found, strict=True):
        if other := [fold for fold in {**found[0], **folds} if folds.get(fold) != found[0].get(fold)]:
            what = f"fold{'s' * (len(other) > 1)} {ku._comma_join(other)}"
            raise ku.DataError(f"{run.name}: {what} must have the rows that {runs[0].name} has there")
    fold_of = {name: fold for fold, names in found[0].items() for name in names}
    return runs, frames[0].assign(fold=[fold_of.get(name, -1) for name in frames[0][ids]]), found[0]


# ---------------------------------------------------------------------------------------
# Labels


def read_texts(paths, cfg):
    """The texts of all files, one table of id and input columns; ids are made where a file has none."""
    tables, problems = [], []
    for path in paths:
        table = ku._read_table(path, ku._input_columns(cfg))
        if cfg.id_column not in table:
            table[cfg.id_column] = [f"{path.stem}-{number}" for number in range(1, len(table) + 1)]
        for column in ku._text_columns(cfg):
            empty = table[column].str.strip().eq("").to_numpy()
            problems += ku._bad_rows(path, table, cfg.id_column, column, empty, "a text")
        tables.append(table[list(dict.fromkeys([cfg.id_column, *ku._input_columns(cfg)]))])
    table = pd.concat(tables, ignore_index=True)
    repeated = table[cfg.id_column].duplicated().to_numpy()
    problems += ku._bad_rows(ku._comma_join(paths), table, cfg.id_column, cfg.id_column, repeated, "each id once")
    if problems:
        raise ku.DataError(problems)
    return table


def predict_folds(runs, texts):
    """What every model predicts, (R, F, M, K): of R runs, F folds each, for M texts; runs in any order."""
    bundle, tokens = ku.Bundle(Path(), runs, {}), {}
    ku.check_golden(bundle)

    def predict_run(run, tokenizer, model):
        if (key := ku._tokenization_key(run)) not in tokens:
            tokens[key] = ku._tokenize_frame(texts, tokenizer, run.cfg)
        predictions = []
        for fold in ku._progress(sorted(run.weights), f"label by {run.name}"):
            ku._load_fold(model, run, fold)
            predictions.append(ku.predict(model, tokens[key], run.cfg))
        return np.stack(predictions)

    return np.stack(ku._each_run(bundle, predict_run))


def label(folders, paths, data_dir, threshold):
    """(pseudo.csv, rows.csv, content of pseudo.json): tables and a dictionary, as `ku._read_pseudo` wants them."""
    runs, frame, folds = read_runs(folders, data_dir)
    cfg, outputs = runs[0].cfg, runs[0].record["outputs"]
    for run in runs:
        if run.cfg.keep == "best":
            print(f"{run.name} kept the best evaluations, chosen on the rows of their folds: a small leak")
    texts = read_texts(paths, cfg)
    seen = ku._seen_rows(texts, frame, cfg)
    near = near_duplicates(ku._row_texts(texts, cfg), ku._row_texts(frame, cfg), threshold)
    predictions = predict_folds(runs, texts)
    sets, table = {}, texts
    for place, fold in enumerate(sorted(folds)):
        twins = np.isin(np.arange(len(texts)), near[0][frame["fold"].to_numpy()[near[1]] == fold]) & ~seen
        used, labels = ~(seen | twins), predictions[:, place].mean(0)
        if not used.any():
            raise ku.DataError(f"fold {fold}: every text is a training row, or nearly one; nothing is left to label")
        cells = [[f"{value:.9g}" if good else "" for value in row] for row, good in zip(labels, used, strict=True)]
        table = pd.concat([table, pd.DataFrame(cells, columns=ku._label_columns(fold, outputs))], axis=1)
        manifests = [ku._load_manifest(run.weights[fold].with_name(ku._MANIFEST))["files"] for run in runs]
        sets[str(fold)] = {
            "models": [
                {"run": run.name, "fold": fold, "weights": files["model.safetensors"]["sha256"]}
                for run, files in zip(runs, manifests, strict=True)
            ],
            "labels": ku._digest(cells),
            "rows": int(used.sum()),
            "near_duplicates": int(twins.sum()),
            "mean": labels[used].mean(0).tolist(),
            "sd": labels[used].std(0).tolist(),
            "sd_between_runs": float(predictions[:, place, used].std(0).mean()) if len(runs) > 1 else None,
        }
    rows = frame[frame["fold"] >= 0]
    rows = pd.DataFrame({"id": rows[cfg.id_column], "fold": rows["fold"], "digest": ku._row_digests(rows, cfg).values()})
    told = {
        "format": ku._PSEUDO_FORMAT,
        "task": cfg.task,
        "outputs": outputs,
        "classes": runs[0].record["classes"],
        "columns": list(texts.columns),
        "texts": [{"file": path.name, "sha256": ku._file_sha256(path)} for path in paths],
        "rows": len(texts),
        "training_rows": int(seen.sum()),
        "threshold": threshold,
        "runs": [
            {"name": run.name, "record": ku._file_sha256(folder / "record.json")}
            for folder, run in zip(folders, runs, strict=True)
        ],
        "folds": ku._digest(rows.astype(str).to_numpy().tolist()),
        "sets": sets,
        "versions": ku._versions(),
    }
    return table, rows, told


def describe(told):
    """What was labelled, as text."""
    several = len(told["runs"]) > 1
    lines = [f"{told['rows']} texts, of which {told['training_rows']} are training rows and get no label"]
    for fold, one in told["sets"].items():
        mean, sd = (", ".join(f"{value:.4f}" for value in one[what]) for what in ("mean", "sd"))
        line = f"fold {fold}: {one['rows']} labels, mean {mean}, sd {sd}"
        line += f", sd between runs {one['sd_between_runs']:.4f}" if several else ""
        lines.append(f"{line}; {one['near_duplicates']} near-duplicates of its rows left out")
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a complete run")
    parser.add_argument("--texts", action="append", required=True, type=Path, metavar="CSV", help="texts to label")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument("--data-dir", default="", metavar="DIR", help="folder with train.csv, if it has moved")
    told = f"share of word trigrams that makes a near-duplicate (default: {THRESHOLD})"
    parser.add_argument("--threshold", default=THRESHOLD, type=float, metavar="SHARE", help=told)
    asked = parser.parse_args()
    if not 0 < asked.threshold <= 1:
        parser.error(f"--threshold must be above 0 and at most 1, got {asked.threshold:g}")
    return asked


def write(folder, table, rows, told):
    table.to_csv(folder / "pseudo.csv", index=False)
    rows.to_csv(folder / "rows.csv", index=False)
    ku._write_json(folder / "pseudo.json", told)


def main():
    asked = parse()
    try:
        if asked.output.exists():
            raise ku.ConfigError(f"{asked.output} is there already: delete it, or choose another folder with -o")
        made = label(asked.runs, asked.texts, asked.data_dir, asked.threshold)
        ku._save_folder(asked.output, functools.partial(write, table=made[0], rows=made[1], told=made[2]))
    except (ku.KitError, OSError) as error:
        sys.exit(str(error))
    print(describe(made[2]))
    print(f"made {asked.output}; to train with it: -p pseudo_dir {asked.output}")


if __name__ == "__main__":
    main()
