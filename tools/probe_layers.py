"""What each layer of a frozen backbone knows of the target: a ridge regression on its states.

    python tools/probe_layers.py -o results/probe --set data_dir=path/to/clear
    python tools/probe_layers.py -o probe --set backbone=microsoft/deberta-v3-base

Linear probes: Alain & Bengio 2016, arXiv:1610.01644. One forward pass over train.csv with the
weights as they were loaded; the settings of data, folds, texts, backbone and precision count, those
of training do not. Of every layer (0 is the embeddings) two features are probed: `cls`, the token
that the head `cls` reads, and `mean`, the mean of the tokens. Each fold is predicted from the
others: features in standard deviations of the training rows, alpha chosen by leave-one-out among
them. `constant` is the mean of the training rows. The features stay in memory, 8 (L + 1) H bytes a
row: `--set max_rows=20000` draws fewer rows of a large set.

The score is the RMSE over all rows in regression. For classes and labels the ridge predicts 0/1
indicators, and the score is their R2, which is no accuracy. R2 is 1 - squared error / squared error
of `constant`, summed over all outputs.

A layer knows less than the best one if its fold scores are worse on average, with p < 0.05 in the
corrected resampled t-test over the paired folds (Nadeau & Bengio 2003). Where all layers above one
do, they are candidates for reinit_layers; where the last layer does not, it is as good as any. The
best layer is chosen on the rows it is scored on, and training changes the states: a probe is a hint
what to try, not evidence.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeCV

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import comparison
from sweep import assignment

import kernel_utils as ku

FEATURES = {"cls": "classification token", "mean": "mean of the tokens"}
ALPHAS = 10.0 ** np.arange(-1, 6.5, 0.5)


# ---------------------------------------------------------------------------------------
# Features


def load(cfg):
    """(model in evaluation mode with the backbone's own weights, tokens, rows with their fold)."""
    folder = ku._find_backbone(cfg.backbone)
    ku._check_no_foreign_code(folder / "config.json", ku._HARMLESS_KEYS)
    frame = ku.make_folds(ku._read_train(cfg), cfg)
    tokenizer = ku._load_tokenizer(folder)
    new = ku._TextReader(tokenizer, cfg).add_tokens(frame)
    tokens = ku._tokenize(frame, tokenizer, cfg)
    tokens.check_vocabulary(tokenizer)
    loader = ku._BackboneLoader(folder, cfg)
    tokens.check_embeddings(tokenizer.convert_tokens_to_ids(new), loader.config, folder)
    ku._seed_everything(cfg.seed)  # embeddings of new tokens
    backbone = loader.load(len(tokenizer))
    ku._check_max_length(backbone, cfg)
    loss = ku.MseLoss(cfg, 1)  # its output is not read
    model = ku.TextModel(cfg, backbone, loss, ku._is_cls_last(tokenizer))
    return model.to(ku._pick_device()).eval(), tokens, frame


@torch.inference_mode()
def pool_layers(model, tokens, cfg):
    """The FEATURES of every layer, float32 (L + 1, 2, N, H); the means over a text's windows."""
    texts, tokens = tokens, tokens.windows
    device = next(model.parameters()).device
    dtype = ku._pick_dtype(cfg.precision, device)
    make_batch = tokens.pack_rows
    if not model.can_pack(tokens, dtype):
        ku._ModelTrial(model, tokens, cfg, dtype).check_padding()
        make_batch = tokens.batch
    info = model.encoder_info
    shape = (info.num_hidden_states, len(FEATURES), len(tokens), info.hidden_size)
    pooled = np.empty(shape, np.float32)
    plan = ku._plan_prediction_batches(tokens.lengths, cfg.batch_tokens or 4096)
    for rows in ku._progress(plan, "read the texts"):
        with ku._autocast(device, dtype):
            states, mask = model.encode(**make_batch(rows, device))
        for layer, state in enumerate(states):
            pooled[layer, 0, rows] = ku.cls_token(state, mask, info).cpu()
            pooled[layer, 1, rows] = ku.masked_mean(state, mask).cpu()
    if texts.n_windows is None:
        return pooled
    sums = np.add.reduceat(pooled, texts.first_windows[:-1], axis=2)
    return sums / texts.n_windows.astype(np.float32)[:, None]


def make_targets(frame, cfg):
    """Targets (N, K) of a regression, else 0/1 indicators; of two classes that of the second."""
    classes = cfg.class_labels(frame)
    targets = cfg.encode_targets(frame, classes)
    if targets.ndim == 1:
        targets = np.eye(len(classes))[targets]
    targets = targets.reshape(len(targets), -1)  # soft ones are (N, 1, C)
    if not np.ptp(targets, axis=0).any():
        same = f"{ku._comma_join(cfg.target_columns)} is the same in every row"
        raise ku.DataError(f"train.csv: {same}; there is nothing to probe")
    return targets


# ---------------------------------------------------------------------------------------
# Probes


def standardise(x, training):
    """All rows in standard deviations of the training rows (a mask) from their mean. What is
    constant among these but for rounding becomes 0: scaled up, rounding would tell the length of a
    text by its batch."""
    mean, sd = x[training].mean(0), x[training].std(0)
    is_constant = sd <= 1e-5 * np.median(abs(x[training]))
    return np.where(is_constant, 0, x - mean) / np.where(is_constant, 1, sd)


def predict_folds(x, targets, folds):
    """Of features (N, H): out-of-fold predictions (N, K), and the alpha of every fold."""
    x, predictions, alphas = x.astype(np.float64), np.empty_like(targets), []
    for fold in np.unique(folds):
        training = folds != fold
        z = standardise(x, training)
        ridge = RidgeCV(ALPHAS).fit(z[training], targets[training])
        predictions[~training] = ridge.predict(z[~training]).reshape(-1, targets.shape[1])
        alphas.append(float(ridge.alpha_))
    return predictions, alphas


def predict_constant(targets, folds):
    """The mean of the rows of the other folds, for every row."""
    return np.stack([targets[folds != fold].mean(0) for fold in folds])


def r2(targets, predictions, constant):
    return float(1 - ((targets - predictions) ** 2).sum() / ((targets - constant) ** 2).sum())


def score_row(targets, predictions, folds, metric):
    """Score over all rows, its spread and values over folds, and R2."""
    constant = predict_constant(targets, folds)

    def score(rows):
        if metric == "rmse":
            return ku.rmse(targets[rows], predictions[rows])
        return r2(targets[rows], predictions[rows], constant[rows])

    of_folds = {f"score fold {fold}": score(folds == fold) for fold in np.unique(folds)}
    row = {
        "metric": metric,
        "score": score(slice(None)),
        "sd over folds": np.std([*of_folds.values()], ddof=1),
        "r2": r2(targets, predictions, constant),
    }
    return row | of_folds


def probe_layers(pooled, targets, folds, metric):
    """Table of a row for each layer and feature, after one for `constant`, which has no layer."""
    constant = score_row(targets, predict_constant(targets, folds), folds, metric)
    rows = [{"layer": None, "feature": "constant"} | constant]
    for layer, features in enumerate(ku._progress(pooled, "probe the layers")):
        for feature, x in zip(FEATURES, features, strict=True):
            predictions, alphas = predict_folds(x, targets, folds)
            row = {"layer": layer, "feature": feature}
            row |= score_row(targets, predictions, folds, metric)
            for fold, alpha in zip(np.unique(folds), alphas, strict=True):
                row[f"alpha fold {fold}"] = alpha
            rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


# ---------------------------------------------------------------------------------------
# What it says


def layers_of(table, feature):
    """(rows of a feature by layer, 1 if higher is worse and -1 if it is better, the best layer)."""
    rows = table[table["feature"] == feature].sort_values("layer").reset_index(drop=True)
    sign = 1 if rows["metric"][0] == "rmse" else -1
    return rows, sign, int((sign * rows["score"]).argmin())


def hint(table, feature):
    """The best layer of a feature, and which of the layers above it know less, by the rule at the
    top."""
    rows, sign, best = layers_of(table, feature)
    last, scores = len(rows) - 1, rows["score"]
    of_folds = sign * rows.filter(like="score fold").to_numpy()  # (L + 1, F)
    share = 1 / (of_folds.shape[1] - 1)  # rows of a fold by those that it is predicted from
    top = last
    while top > best:
        behind = of_folds[top] - of_folds[best]
        if behind.mean() <= 0 or comparison.corrected_t(behind, share) >= 0.05:
            break
        top -= 1
    text = f"{feature}: best at layer {best} ({rows['metric'][0]} {scores[best]:.4f})"
    if best < last:
        text += f", the last one, {last}, is {abs(scores[last] - scores[best]):.4f} behind"
    if top == last:
        return f"{text}; the last layer is as good as any"
    layers = f"layers above {top} know less than layer {best}"
    return f"{text}; {layers}: candidates for reinit_layers {last - top}"


def plot_layers(table, path, title):
    """The score of every layer with the spread over folds; a ring marks the best of a feature."""
    figure = ku._new_figure(8, 5)
    axis = figure.subplots()
    (constant,) = table["score"][table["feature"] == "constant"]
    dashed = dict(color=comparison.GREY, linestyle="--", linewidth=1)
    axis.axhline(constant, label="mean of the training rows", **dashed)
    for feature, color, marker, aside in (
        ("cls", comparison.RED, "s", -0.04),
        ("mean", comparison.BLUE, "o", 0.04),
    ):
        rows, sign, best = layers_of(table, feature)
        places, scores = np.arange(len(rows)) + aside, rows["score"]
        style = dict(color=color, marker=marker, markersize=5, capsize=3, label=FEATURES[feature])
        axis.errorbar(places, scores, rows["sd over folds"], **style)
        ring = dict(color=color, marker="o", markersize=14, fillstyle="none")
        axis.plot(places[best], scores[best], **ring)
    layers = range(len(rows))
    axis.set_xticks(layers, ["0\nembeddings", *map(str, layers[1:])])
    score = "RMSE (lower is better)" if sign == 1 else "R² of the indicators (higher is better)"
    axis.set(xlabel="layer", ylabel=f"out-of-fold {score}")
    note = dict(title="bars: sd over folds; ring: best layer", title_fontsize="small")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small", **note)
    figure.suptitle(title, fontsize="medium")
    ku._save_figure(figure, path)


def probe(cfg, folder):
    """Write probe.csv and probe.png of a configuration to a folder. Returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokens, frame = load(cfg)
    targets, folds = make_targets(frame, cfg), frame["fold"].to_numpy()
    metric = "rmse" if cfg.task == "regression" else "r2"
    table = probe_layers(pool_layers(model, tokens, cfg), targets, folds, metric)
    name, n_folds = ku._short_name(cfg.backbone), len(set(folds))
    table = table.assign(rows=len(frame), folds=n_folds, backbone=name, device=ku._device_name())
    write = dict(index=False, float_format="%.6g")
    ku._write_atomic(folder / "probe.csv", lambda path: table.to_csv(path, **write))
    title = f"What each layer of {name} knows of {ku._comma_join(map(repr, cfg.target_columns))}"
    title += f"\nridge on frozen states, {len(frame):,} rows, {n_folds} folds"
    plot_layers(table, folder / "probe.png", title)
    return table


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, setting = parser.add_argument, dict(metavar="NAME=VALUE", help="a setting of train.ipynb")
    files = "folder of probe.csv and probe.png"
    add("-o", "--output", required=True, type=Path, metavar="DIR", help=files)
    add("--set", type=assignment, action="append", default=[], **setting)
    args = parser.parse_args()
    try:
        table = probe(ku.Config.from_dict(dict(args.set)), args.output)
    except (ku.KitError, OSError) as error:
        sys.exit(str(error))
    for feature in FEATURES:
        print(hint(table, feature))
    source = "a linear probe of frozen states (Alain & Bengio 2016, arXiv:1610.01644)"
    print(f"{source} is a hint, not evidence: compare runs")


if __name__ == "__main__":
    main()
