"""Label extra texts with finished runs, for each fold by models that did not train on its rows.

    python tools/pseudo_label.py runs/one runs/two --texts extra.csv -o pseudo
    papermill notebooks/train.ipynb train.out.ipynb -p pseudo_dir pseudo -p run_name student

The model that validates on fold f is later trained with the labels of fold f: the mean over the
runs of their models that validated on fold f. A table of texts has the text columns of train.csv;
ids are made where it has none. A text that is a training row, by id or text, gets no label; one
that nearly is a row of fold f gets none for fold f: the two share at least --threshold of the word
trigrams of the shorter one.
"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

# Of all pairs of a train and a test text of CLEAR 7 share 0.42 or more, the others 0.26 at most
THRESHOLD = 0.3
BLOCK = 1000  # texts compared at a time


def near_duplicates(texts, others, threshold):
    """Pairs (row of `texts`, row of `others`) of normalised texts, as two arrays, that share at
    least `threshold` of the word trigrams of the one that has fewer. Broder 1997, "On the
    resemblance and containment of documents".
    """
    trigrams = HashingVectorizer(
        lowercase=False,
        token_pattern=r"\S+",
        ngram_range=(3, 3),
        n_features=2**22,
        alternate_sign=False,
        binary=True,
        norm=None,
        dtype=np.int32,
    )
    ours, theirs = trigrams.transform(texts), trigrams.transform(others)
    our_sizes, their_sizes = ours.getnnz(1), theirs.getnnz(1)
    transposed = theirs.T.tocsr()
    pairs = [np.empty((2, 0), int)]
    for start in range(0, len(texts), BLOCK):
        shared = (ours[start : start + BLOCK] @ transposed).tocoo()
        rows = shared.row + start
        smaller = np.minimum(our_sizes[rows], their_sizes[shared.col])
        is_near = shared.data >= threshold * smaller
        pairs.append(np.stack([rows[is_near], shared.col[is_near]]))
    return np.concatenate(pairs, axis=1)


# ---------------------------------------------------------------------------------------
# What the runs have seen


def what_is_read(run):
    """What must be the same in all runs."""
    return {
        "task": run.cfg.task,
        "outputs": run.record["outputs"],
        "classes": run.record["classes"],
        "id_column": run.cfg.id_column,
        "text columns": run.cfg.input_columns,
        "preprocess": run.cfg.preprocess,
    }


def check_alike(runs):
    problems, first = [], what_is_read(runs[0])
    for run in runs[1:]:
        for what, value in what_is_read(run).items():
            if value != first[what]:
                expected = f"{what} must be as in {runs[0].name}, {first[what]!r}"
                problems.append(f"{run.name}: {expected}; got {value!r}")
    if problems:
        raise ku.ConfigError(problems)


def read_rows(run, data_dir):
    """train.csv as the run read it; DataError where its ids or texts are others."""
    cfg = dataclasses.replace(run.cfg, data_dir=data_dir or run.cfg.data_dir)
    frame = ku._read_train(cfg)
    for name in [cfg.id_column, *cfg.input_columns]:
        what = f"column {name} of train.csv"
        if ku._digest(list(frame[name])) != run.record["fingerprint"].get(what):
            problem = f"{what} is not the one that {run.name} was trained on"
            raise ku.DataError(f"{cfg.data_dir or 'the data'}: {problem}; set --data-dir")
    return frame


def validated_rows(folder, run, ids):
    """{fold: ids of the rows that its model validated on, so that it did not train on them}.

    From the sealed folder of every fold, which has the weights too; oof.csv must say the same.
    `ids` are those of the rows that the run read.
    """
    oof = ku.RunFolder(folder).read_oof(run.record)
    folds, problems = {}, []
    for fold, weights in run.weights.items():
        sealed = weights.parent
        damage = ku._SealedFolder(sealed).problems()
        if damage:
            problems += [f"{sealed}: {problem}" for problem in damage]
            continue
        state = ku._read_state(sealed, {"rows": np.ndarray, "fold": int})
        with ku._wrap_read_errors(sealed):
            folds[fold] = frozenset(ids[state["rows"]])
        if state["fold"] != fold:
            problems.append(f"{sealed}: the model of fold {state['fold']}, not of fold {fold}")
        elif folds[fold] != set(oof["id"][oof["fold"] == fold]):
            other = f"fold {fold} has other rows than the model validated on"
            problems.append(f"{folder / 'oof.csv'}: {other}")
    if problems:
        raise ku.DataError(problems)
    return folds


def read_runs(folders, data_dir):
    """(runs, training rows with their fold or -1, {fold: ids}), once all runs are complete and
    agree; else one KitError."""
    runs = [ku._Run.load(folder) for folder in folders]
    partial = [run.name for run in runs if run.record["status"] != "complete"]
    if partial:
        raise ku.ConfigError(f"expected complete runs: {ku._comma_join(partial)} was stopped")
    check_alike(runs)
    id_column = runs[0].cfg.id_column
    frames = [read_rows(run, data_dir) for run in runs]
    first = None  # folds of the first run
    for folder, run, frame in zip(folders, runs, frames, strict=True):
        folds = validated_rows(folder, run, frame[id_column].to_numpy())
        first = first or folds
        other = [fold for fold in first | folds if folds.get(fold) != first.get(fold)]
        if other:
            expected = f"must have the rows that {runs[0].name} has there"
            raise ku.DataError(f"{run.name}: folds {ku._comma_join(other)} {expected}")
    frame = frames[0].assign(fold=-1)
    for fold, names in first.items():
        frame.loc[frame[id_column].isin(names), "fold"] = fold
    return runs, frame, first


# ---------------------------------------------------------------------------------------
# Labels


def read_texts(paths, cfg):
    """The texts of all files, one table; ids are made where a file has none."""
    id_column, inputs = cfg.id_column, cfg.input_columns
    columns = list(dict.fromkeys([id_column, *inputs]))
    tables = []
    for path in paths:
        table = ku._Table.read_rows(path, cfg)
        table.take_ids(table.find_ids(ku._id_names(id_column)))
        table.drop_empty(cfg)
        tables.append(table.frame[columns])
    table = ku._Table(ku._comma_join(paths), pd.concat(tables, ignore_index=True), id_column)
    table.refuse_rows(id_column, table.frame[id_column].duplicated(), "each id once")
    if table.problems:
        raise ku.DataError(table.problems)
    return table.frame


def predict_folds(runs, texts):
    """What every model predicts, (R, F, M, K): of R runs, F folds each, for M texts."""
    bundle = ku.Bundle(Path(), runs)
    ku.check_golden(bundle)
    predictions = []
    for _, by_fold in bundle.predict_folds(texts):
        predictions.append(np.stack([by_fold[fold] for fold in sorted(by_fold)]))
    return np.stack(predictions)


def label_fold(runs, fold, predictions, is_seen, is_twin):
    """(cells of pseudo.csv, what pseudo.json says) of predictions (R, M, K) for a fold."""
    is_used, labels = ~(is_seen | is_twin), predictions.mean(0)
    if not is_used.any():
        problem = "every text is a training row, or nearly one"
        raise ku.DataError(f"fold {fold}: {problem}; nothing is left to label")
    cells = []
    for row, used in zip(labels, is_used, strict=True):
        cells.append([f"{value:.9g}" if used else "" for value in row])
    spread = float(predictions[:, is_used].std(0).mean()) if len(runs) > 1 else None
    models = []  # which weights labelled
    for run in runs:
        weights = ku._file_sha256(run.weights[fold])
        models.append({"run": run.name, "fold": fold, "weights": weights})
    return cells, {
        "models": models,
        "labels": ku._digest(cells),
        "rows": int(is_used.sum()),
        "near_duplicates": int(is_twin.sum()),
        "mean": labels[is_used].mean(0).tolist(),
        "sd": labels[is_used].std(0).tolist(),
        "sd_between_runs": spread,
    }


def label(folders, paths, data_dir, threshold):
    """(pseudo.csv, rows.csv, content of pseudo.json), as `ku._PseudoLabels` wants them."""
    runs, frame, folds = read_runs(folders, data_dir)
    cfg, outputs = runs[0].cfg, runs[0].record["outputs"]
    for run in runs:
        if run.cfg.keep == "best":
            leak = "kept the best evaluations, chosen on the rows of their folds: a small leak"
            print(f"{run.name} {leak}")
    texts = read_texts(paths, cfg)
    is_seen = ku._seen_rows(texts, frame, cfg)
    pairs = near_duplicates(ku._row_texts(texts, cfg), ku._row_texts(frame, cfg), threshold)
    fold_of_pair = frame["fold"].to_numpy()[pairs[1]]
    predictions = predict_folds(runs, texts)
    sets, tables = {}, [texts]
    for place, fold in enumerate(sorted(folds)):
        twins = pairs[0][fold_of_pair == fold]
        is_twin = np.isin(np.arange(len(texts)), twins) & ~is_seen
        cells, sets[str(fold)] = label_fold(runs, fold, predictions[:, place], is_seen, is_twin)
        tables.append(pd.DataFrame(cells, columns=ku._column_names(f"target_fold{fold}", outputs)))
    rows = frame[frame["fold"] >= 0]
    digests = ku._row_digests(rows, cfg)
    rows = pd.DataFrame({"id": rows[cfg.id_column], "fold": rows["fold"], "digest": digests})
    members = []
    for run, folder in zip(runs, folders, strict=True):
        members.append({"name": run.name, "record": ku._file_sha256(folder / "record.json")})
    manifest = {
        "format": ku._PSEUDO_FORMAT,
        "task": cfg.task,
        "outputs": outputs,
        "classes": runs[0].record["classes"],
        "columns": list(texts.columns),
        "texts": [{"file": path.name, "sha256": ku._file_sha256(path)} for path in paths],
        "rows": len(texts),
        "training_rows": int(is_seen.sum()),
        "threshold": threshold,
        "runs": members,
        "folds": ku._digest(rows.astype(str).to_numpy().tolist()),
        "sets": sets,
        "versions": ku._versions(),
    }
    return pd.concat(tables, axis=1), rows, manifest


def describe(manifest):
    """What was labelled, as text."""
    seen = f"{manifest['training_rows']} are training rows and get no label"
    lines = [f"{manifest['rows']} texts, of which {seen}"]
    for fold, labels in manifest["sets"].items():
        mean = ", ".join(f"{value:.4f}" for value in labels["mean"])
        sd = ", ".join(f"{value:.4f}" for value in labels["sd"])
        line = f"fold {fold}: {labels['rows']} labels, mean {mean}, sd {sd}"
        if labels["sd_between_runs"] is not None:
            line += f", sd between runs {labels['sd_between_runs']:.4f}"
        lines.append(f"{line}; {labels['near_duplicates']} near-duplicates of its rows left out")
    return "\n".join(lines)


def parse():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, folder = parser.add_argument, dict(metavar="DIR", help="folder to make")
    texts = dict(metavar="CSV", help="texts to label; may be given again")
    share = f"share of word trigrams that makes a near-duplicate (default: {THRESHOLD})"
    moved = "folder with train.csv, if it has moved"
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a complete run")
    add("--texts", action="append", required=True, type=Path, **texts)
    add("-o", "--output", required=True, type=Path, **folder)
    add("--data-dir", default="", metavar="DIR", help=moved)
    add("--threshold", default=THRESHOLD, type=float, metavar="SHARE", help=share)
    args = parser.parse_args()
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold must be above 0 and at most 1, got {args.threshold:g}")
    return args


def write(folder, table, rows, manifest):
    table.to_csv(folder / "pseudo.csv", index=False)
    rows.to_csv(folder / "rows.csv", index=False)
    ku._write_json(folder / "pseudo.json", manifest)


def main():
    args = parse()
    try:
        if os.path.lexists(args.output):
            remedy = "delete it, or choose another folder with -o"
            raise ku.ConfigError(f"{args.output} is there already: {remedy}")
        table, rows, manifest = label(args.runs, args.texts, args.data_dir, args.threshold)
        files = dict(table=table, rows=rows, manifest=manifest)
        ku._SealedFolder(args.output).save(functools.partial(write, **files))
    except (ku.KitError, OSError) as error:
        sys.exit(str(error))
    print(describe(manifest))
    print(f"made {args.output}; to train with it: -p pseudo_dir {args.output}")


if __name__ == "__main__":
    main()
