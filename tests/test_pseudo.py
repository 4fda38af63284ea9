"""Pseudo-labels: who labelled what, what is left out, what is refused, and how they are trained on."""

import dataclasses
import json
import math
import shutil
import sys

import kernel_utils as ku
import numpy as np
import pandas as pd
import pseudo_label
import pytest
import torch

from conftest import QUIET, WORDS, Killed, engine_of, make_texts, tiny_config, train_frame, trained


def label(monkeypatch, *arguments):
    """Run the tool; what it exits with, None for success."""
    monkeypatch.setattr(sys, "argv", ["pseudo_label.py", *map(str, arguments)])
    try:
        return pseudo_label.main()
    except SystemExit as end:
        return end.code


def folds_of(runs):
    """The training rows of the two runs with their folds."""
    cfg = ku._Run.load(runs / "one").cfg
    moved = dataclasses.replace(cfg, data_dir=str(runs.parent / "competition"))
    return ku.make_folds(ku._read_train(moved), cfg)


def long_text(number):
    return " ".join(np.random.default_rng(number).choice(WORDS, 60))


@pytest.fixture(scope="session")
def extra(runs, tmp_path_factory):
    """extra.csv: 12 new texts, a training row in capitals, one by its id alone, and a near-duplicate for each fold."""
    frame = folds_of(runs)
    longest = frame.loc[
        frame.groupby("fold")["excerpt"].transform(lambda t: t.str.len()).groupby(frame["fold"]).idxmax()
    ]
    near = [f"{text} {long_text(fold)}" for fold, text in zip(longest["fold"], longest["excerpt"], strict=True)]
    texts = [*make_texts(12, seed=5), f"{frame['excerpt'][3].upper()} !", long_text(9), *near]
    ids = [*(f"new{i}" for i in range(12)), "capitals", frame["id"][5], "near0", "near1"]
    path = tmp_path_factory.mktemp("extra") / "extra.csv"
    pd.DataFrame({"id": ids, "excerpt": texts, "source": "elsewhere"}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def made(runs, extra, tmp_path_factory):
    """The folder of pseudo-labels by both runs; copy what you change."""
    folder = tmp_path_factory.mktemp("made") / "pseudo"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert label(monkeypatch, runs / "one", runs / "two", "--texts", extra, "-o", folder) is None
    return folder


@pytest.fixture
def student(runs, made, backbone_folder, tmp_path):
    """Function: settings -> Config of a run on the rows and folds of the two runs, with their pseudo-labels."""

    def config(**settings):
        settings = dict(pseudo_dir=made) | settings
        return tiny_config(runs.parent / "competition", backbone_folder("tiny"), tmp_path / "students", **settings)

    return config


def reseal(made, folder, change):
    """A copy of a folder of pseudo-labels in which `change(frame, told, rows)` was made, with a manifest that fits."""
    frame, rows = (pd.read_csv(made / name, dtype=str, keep_default_na=False) for name in ("pseudo.csv", "rows.csv"))
    told = json.loads((made / "pseudo.json").read_text())
    changed = change(frame, told, rows)
    texts = frame if changed is None else changed
    ku._SealedFolder(folder).save(lambda place: pseudo_label.write(place, texts, rows, told))
    return folder


def refusal(cfg, frame=None):
    with pytest.raises(ku.KitError) as error:
        ku._PseudoLabels(ku.make_folds(ku.read_competition(cfg)[0], cfg) if frame is None else frame, cfg, [])
    return str(error.value)


# ---------------------------------------------------------------------------------------
# Labels


@torch.inference_mode()
def test_the_labels_of_a_fold_are_the_mean_of_the_models_that_validated_on_it(runs, made, extra):
    table, texts = pd.read_csv(made / "pseudo.csv"), pd.read_csv(extra)["excerpt"]
    for fold in (0, 1):
        predictions = []
        for name in ("one", "two"):
            run = ku._Run.load(runs / name)
            tokenizer, model = run.open()
            run.load_fold(model.eval(), fold)
            inputs = [tokenizer(text, truncation=True, max_length=32, return_tensors="pt") for text in texts]
            logits = [model(row["input_ids"], row["attention_mask"]) for row in inputs]
            predictions.append([model.predict(row).item() for row in logits])
        labels = table[f"target_fold{fold}"].to_numpy()
        known = np.isfinite(labels)
        np.testing.assert_allclose(labels[known], np.mean(predictions, axis=0)[known], atol=1e-5)
        told = json.loads((made / "pseudo.json").read_text())["sets"][str(fold)]
        assert [(model["run"], model["fold"]) for model in told["models"]] == [("one", fold), ("two", fold)]
        assert told["rows"] == known.sum() and told["mean"] == [pytest.approx(labels[known].mean(), abs=1e-6)]
        assert told["sd"] == [pytest.approx(labels[known].std(), abs=1e-6)]
        between = np.std(np.array(predictions)[:, known], axis=0).mean()
        assert told["sd_between_runs"] == pytest.approx(between, rel=1e-3)


def test_training_rows_get_no_label_and_near_duplicates_none_for_the_fold_of_their_twin(made):
    table = pd.read_csv(made / "pseudo.csv", dtype={"id": str}).set_index("id")
    labelled = table[["target_fold0", "target_fold1"]].notna()
    empty = {name: list(row) for name, row in zip(labelled.index, labelled.to_numpy().tolist(), strict=True)}
    assert empty["capitals"] == empty["005"] == [False, False]
    assert [empty["near0"], empty["near1"]] == [[False, True], [True, False]]
    told = json.loads((made / "pseudo.json").read_text())
    assert told["training_rows"] == 2 and told["rows"] == 16 and told["threshold"] == 0.3
    new = labelled.drop(["capitals", "005"])
    assert [told["sets"][f]["near_duplicates"] for f in "01"] == list((~new).sum())


def shares(texts, others):
    """Share of the word trigrams of the shorter text, of all pairs, by sets."""
    sets = [
        [{tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in group] for group in (texts, others)
    ]
    return np.array([[len(a & b) / max(1, min(len(a), len(b))) for b in sets[1]] for a in sets[0]])


@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0])
def test_near_duplicates_are_the_pairs_whose_sets_of_trigrams_overlap(threshold, monkeypatch):
    monkeypatch.setattr(pseudo_label, "BLOCK", 7)
    others = make_texts(30, seed=1)
    texts = make_texts(20, seed=2) + [f"the {t} cat" for t in others[:5]] + ["", "two words"]
    found = set(map(tuple, pseudo_label.near_duplicates(texts, [*others, "two words"], threshold).T.tolist()))
    expected = set(zip(*np.nonzero(shares(texts, [*others, "two words"]) >= threshold), strict=True))
    assert found == {(int(a), int(b)) for a, b in expected} and len(found) >= 5


def test_case_punctuation_and_forms_of_characters_make_no_other_text():
    assert len(set(ku._normalize_texts(["The cat, SAT.", "the\n cat  sat", "THE ﹡CAT sat!", "the ｃａｔ sat"]))) == 1
    assert len(set(ku._normalize_texts(["the cat sat", "the cats at", "Straße", "Strasse"]))) == 3


# ---------------------------------------------------------------------------------------
# What the tool refuses


def test_runs_with_other_folds_are_refused_and_nothing_is_written(runs, student, extra, tmp_path, monkeypatch):
    other = trained(student(pseudo_dir="", fold_seed=1, run_name="other"))
    message = label(monkeypatch, runs / "one", other, "--texts", extra, "-o", tmp_path / "pseudo")
    assert "other: folds 0, 1 must have the rows that one has there" in message
    assert not (tmp_path / "pseudo").exists()


def exchange_folds(run):
    for old, new in (("fold0", "spare"), ("fold1", "fold0"), ("spare", "fold1")):
        (run / old).rename(run / new)


def edit(name, function):
    def change(run):
        path = run / name
        path.write_bytes(function(path.read_bytes()))

    return change


def other_rows(run):
    oof = pd.read_csv(run / "oof.csv", dtype=str)
    oof.assign(fold=1 - oof["fold"].astype(int)).to_csv(run / "oof.csv", index=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange_folds, "fold0: the model of fold 1, not of fold 0"),
        (other_rows, "oof.csv: fold 0 has other rows than the model validated on"),
        (edit("fold1/model.safetensors", lambda data: data[:-1] + b"x"), "model.safetensors: its SHA-256 is not"),
        (edit("fold0/state.json", lambda data: data.replace(b"1", b"2")), "state.json: its SHA-256 is not"),
        (edit("record.json", lambda data: data.replace(b'"complete"', b'"running"')), "did not finish"),
    ],
    ids=["exchanged models", "other oof.csv", "weights", "rows", "unfinished"],
)
def test_a_run_whose_books_do_not_agree_is_refused(change, message, runs, extra, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "two", tmp_path / "two")
    change(run)
    told = label(monkeypatch, runs / "one", run, "--texts", extra, "-o", tmp_path / "pseudo")
    assert message in told and not (tmp_path / "pseudo").exists()


def test_rows_are_read_where_they_lie_now_and_must_be_those_of_the_runs(runs, made, extra, tmp_path, monkeypatch):
    data = shutil.copytree(runs.parent / "competition", tmp_path / "data")
    arguments = [runs / "one", runs / "two", "--texts", extra, "--data-dir", data, "-o", tmp_path / "pseudo"]
    assert label(monkeypatch, *arguments) is None
    assert (tmp_path / "pseudo" / "pseudo.csv").read_bytes() == (made / "pseudo.csv").read_bytes()
    shutil.rmtree(tmp_path / "pseudo")
    edit("train.csv", lambda text: text.replace(b"cat", b"dog", 1))(data)
    assert "column excerpt of train.csv is not the one that one was trained on" in label(monkeypatch, *arguments)


def test_bad_texts_and_a_folder_that_is_there_are_named(runs, made, extra, tmp_path, monkeypatch):
    frame = pd.read_csv(extra)
    frame.rename(columns={"excerpt": "exerpt"}).to_csv(tmp_path / "a.csv", index=False)
    assert "did you mean exerpt" in label(
        monkeypatch, runs / "one", "--texts", tmp_path / "a.csv", "-o", tmp_path / "p"
    )
    frame.assign(excerpt=["", *frame["excerpt"][1:]], id="same").to_csv(tmp_path / "b.csv", index=False)
    message = label(monkeypatch, runs / "one", "--texts", tmp_path / "b.csv", "-o", tmp_path / "p")
    assert "expected each id once" in message
    assert "is there already" in label(monkeypatch, runs / "one", "--texts", extra, "-o", made)
    train = runs.parent / "competition" / "train.csv"
    assert "nothing is left to label" in label(monkeypatch, runs / "one", "--texts", train, "-o", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_texts_that_are_empty_are_left_out_with_their_number(runs, extra, tmp_path, capsys):
    frame = pd.read_csv(extra)
    frame.assign(excerpt=["", " ", *frame["excerpt"][2:]]).to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    table = pseudo_label.read_texts([tmp_path / "b.jsonl"], ku._Run.load(runs / "one").cfg)
    assert list(table["id"]) == list(frame["id"][2:])
    assert "2 rows without a text are left out, the first is row 1" in capsys.readouterr().out


def test_ids_are_made_where_a_file_has_none(runs, extra, tmp_path):
    pd.read_csv(extra)[["excerpt"]].to_csv(tmp_path / "plain.csv", index=False)
    table = pseudo_label.read_texts([tmp_path / "plain.csv", extra], ku._Run.load(runs / "one").cfg)
    assert list(table["id"][:2]) == ["plain-1", "plain-2"] and list(table.columns) == ["id", "excerpt"]
    assert len(table) == 32 and table["id"].is_unique


def test_extra_texts_go_through_the_preprocessing_of_the_runs_and_labelled_ones_not_again(
    runs, made, student, extra, monkeypatch
):
    monkeypatch.setitem(ku.PREPROCESS, "cut", lambda frame: frame.assign(excerpt=frame["excerpt"].str[1:]))
    cfg = dataclasses.replace(ku._Run.load(runs / "one").cfg, preprocess="cut")
    plain = pd.read_csv(extra)["excerpt"]
    assert pseudo_label.read_texts([extra], cfg)["excerpt"].tolist() == plain.str[1:].tolist()
    labelled = ku._PseudoLabels(folds_of(runs), student(preprocess="cut"), [])
    assert labelled.texts["excerpt"].tolist() == plain.tolist()


# ---------------------------------------------------------------------------------------
# Planted leaks


def swap_columns(frame, told, rows):
    frame[["target_fold0", "target_fold1"]] = frame[["target_fold1", "target_fold0"]].to_numpy()


def swap_models(frame, told, rows):
    told["sets"] = {"0": told["sets"]["1"], "1": told["sets"]["0"]}
    swap_columns(frame, told, rows)


def label_a_twin(frame, told, rows):
    frame.loc[frame["id"] == "capitals", ["target_fold0", "target_fold1"]] = "0.5"
    for fold in "01":
        told["sets"][fold]["labels"] = ku._digest(frame[[f"target_fold{fold}"]].to_numpy().tolist())


def other_folds(frame, told, rows):
    rows["fold"] = rows["fold"].map({"0": "1", "1": "0"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_columns, "they are not those of its models"),
        (swap_models, "they come from fold 1 of one, a model that was trained on rows of fold 0"),
        (label_a_twin, "1 labelled texts are training rows"),
        (other_folds, "their models validated on 20 rows, this fold has 20, and 40 are not the same"),
        (lambda frame, told, rows: told.update(task="binary"), "pseudo_dir has task binary, this run has regression"),
        (lambda frame, told, rows: told.update(format="other"), "format: expected text like"),
    ],
    ids=["columns", "models", "a twin", "folds", "task", "format"],
)
def test_a_planted_leak_is_refused_before_training_even_with_a_new_seal(change, message, student, made, tmp_path):
    cfg = student(pseudo_dir=reseal(made, tmp_path / "leak", change))
    assert message in refusal(cfg)
    with pytest.raises(ku.KitError):
        trained(cfg)
    assert not list((tmp_path / "students").glob("*"))


def test_a_cell_changed_by_hand_breaks_the_seal(student, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "changed")
    edit("pseudo.csv", lambda data: data.replace(b"0.", b"1.", 1))(folder)
    assert "pseudo.csv: its SHA-256 is not that of manifest.json" in refusal(student(pseudo_dir=folder))
    assert "no pseudo.json; expected a folder of tools/pseudo_label.py" in refusal(student(pseudo_dir=tmp_path))


@pytest.mark.parametrize("name", ["pseudo.json", "pseudo.csv", "rows.csv", "manifest.json", "more"])
def test_a_link_to_the_very_bytes_of_the_labels_is_refused_by_name(name, student, made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(made / name)
    said = refusal(student(pseudo_dir=folder))
    assert name in said and ("symbolic link" in said or "not a plain file" in said)


def test_other_folds_of_the_run_are_refused(student):
    assert "must have the same rows in the same folds" in refusal(student(fold_seed=1))
    assert "their models validated on 20 rows, this fold has 10" in refusal(student(max_rows=20))
    cfg = student(n_folds=4)
    assert "run_folds asks for others" in refusal(cfg) and "their models" in refusal(student(n_folds=4, run_folds="0"))


def test_ids_that_were_given_anew_to_the_same_texts_are_seen(student):
    cfg = student()
    frame = ku.make_folds(ku.read_competition(cfg)[0], cfg)
    moved = frame.assign(excerpt=np.roll(frame["excerpt"], 1))
    assert "are not the same, such as id '" in refusal(cfg, moved)


# ---------------------------------------------------------------------------------------
# Training


class Spy:
    """What the engine was given in each step, by fold: rows, and their targets."""

    def __init__(self, monkeypatch):
        self.seen, step, begin = [], ku.OptimizerStep.__call__, ku.OptimizerStep.setup_fold

        def starting(engine, fold, say=print):
            begin(engine, fold, say)
            self.engine, self.fold = engine, fold

        def stepping(engine, number, rows):
            self.seen.append((self.fold, number, rows, engine.targets[rows].numpy().copy()))
            return step(engine, number, rows)

        monkeypatch.setattr(ku.OptimizerStep, "setup_fold", starting)
        monkeypatch.setattr(ku.OptimizerStep, "__call__", stepping)

    def rows(self, fold):
        return np.concatenate([rows for f, _, rows, _ in self.seen if f == fold])

    def targets(self, fold):
        return {row: t for f, _, rows, ts in self.seen if f == fold for row, t in zip(rows, ts, strict=True)}


def test_each_fold_trains_on_its_own_labels_and_validates_training_rows_alone(student, made, monkeypatch):
    spy, cfg = Spy(monkeypatch), student(epochs=2)
    run = trained(cfg)
    frame, table = ku.make_folds(ku.read_competition(cfg)[0], cfg), pd.read_csv(made / "pseudo.csv")
    record = ku.RunFolder(run).read_record()
    for fold in (0, 1):
        labels = table[f"target_fold{fold}"].to_numpy()
        extra = 40 + np.flatnonzero(np.isfinite(labels))
        expected = [*np.flatnonzero(frame["fold"] != fold), *extra]
        assert sorted(spy.rows(fold)) == sorted(expected * 2)
        both = np.concatenate([frame["target"], labels])
        got = spy.targets(fold)
        own = frame["target"][frame["fold"] != fold]  # the labels are scaled with its numbers
        expected_targets = (both[expected] - own.mean()) / own.std(ddof=0)
        np.testing.assert_allclose([got[row][0] for row in expected], expected_targets, rtol=1e-5, atol=1e-6)
        assert record["folds"][fold]["pseudo_rows"] == len(extra) and record["folds"][fold]["pseudo_steps"] == 0
        assert record["folds"][fold]["steps"] == 2 * math.ceil(len(expected) / 8)
    assert record["pseudo_labels"]["rows"] == 16 and record["oof"]["rows"] == 40
    assert [one["name"] for one in record["pseudo_labels"]["runs"]] == ["one", "two"]
    oof = pd.read_csv(run / "oof.csv", dtype={"id": str})
    assert list(oof["id"]) == list(frame["id"]) and oof.notna().all(axis=None)


def test_a_first_stage_has_the_pseudo_labels_alone_and_a_schedule_of_its_own(student, monkeypatch):
    plain = Spy(monkeypatch)
    trained(student(pseudo_dir="", epochs=2))
    monkeypatch.undo()
    spy, cfg = Spy(monkeypatch), student(epochs=2, pseudo_epochs=3, evals_per_epoch=2, warmup_ratio=0.2)
    run = trained(cfg)
    log, record = pd.read_json(run / "log.jsonl", lines=True), ku.RunFolder(run).read_record()
    for fold in (0, 1):
        count = record["folds"][fold]["pseudo_rows"]
        first = 3 * math.ceil(count / 8)
        assert record["folds"][fold]["pseudo_steps"] == first
        rows = [rows for f, _, rows, _ in spy.seen if f == fold]
        assert all((part >= 40).all() for part in rows[:first]) and len(np.concatenate(rows[:first])) == 3 * count
        for ours, theirs in zip(rows[first:], [r for f, _, r, _ in plain.seen if f == fold], strict=True):
            assert np.array_equal(ours, theirs)
        steps = log[(log["fold"] == fold) & log["loss"].notna()]
        rates = np.array([rate["head"] for rate in steps["lr"]])
        for part in (rates[:first], rates[first:]):
            warm = round(0.2 * len(part))
            up = [1e-3 * (i + 1) / warm for i in range(warm)]
            down = [1e-3 * (1 + math.cos(math.pi * i / (len(part) - warm))) / 2 for i in range(len(part) - warm)]
            np.testing.assert_allclose(part, up + down)
        epochs = [(i + 1) / (first / 3) for i in range(first)] + [3 + (i + 1) / 3 for i in range(len(part))]
        np.testing.assert_allclose(steps["epoch"], epochs)
        evaluated = log[(log["fold"] == fold) & log["rmse"].notna()]["step"]
        assert list(evaluated) == [first + step for step in (2, 3, 4, 6)]


def test_regularisers_that_begin_later_count_the_epochs_of_the_training_rows(student):
    engine = begun(student(epochs=2, pseudo_epochs=3, awp=0.1, adversarial_start=1, swa_start=1))
    first = len(engine.learning_rate_table) - 2 * 3
    assert engine.first_adversarial_step == first + 3
    assert list(np.flatnonzero(engine.average_table)) == [first + 3, first + 4, first + 5]


def begun(cfg, fold=0):
    """An engine at the start of a fold with what `train` gives it."""
    frame = ku.make_folds(ku.read_competition(cfg)[0], cfg)
    classes = cfg.class_labels(frame)
    pseudo = ku._PseudoLabels(frame, cfg, classes)
    whole = pd.concat([frame, pseudo.texts.assign(fold=-1, target=0.0)], ignore_index=True)
    engine = engine_of(cfg, whole)
    errors = engine.data.errors if engine.data.errors is None else engine.data.errors[: len(frame)]
    data = engine.data._replace(targets=engine.data.targets[: len(frame)], errors=errors, pseudo=pseudo.labels)
    engine = ku.OptimizerStep(data, engine.cfg)
    engine.setup_fold(fold, **QUIET)
    return engine


@pytest.mark.parametrize("micro", [0, 3])
def test_the_weight_scales_the_losses_of_pseudo_labelled_rows_alone(micro, student):
    engine = begun(student(pseudo_weight=0.25, micro_batch_size=micro, backbone_dropout=0.0))
    rows = np.array([*engine.data.training_rows(0)[:5], *engine.data.training_rows(0)[-3:]])
    assert list(engine.data.folds[rows] < 0) == [False] * 5 + [True] * 3
    model = engine.model.train()
    raw = model(**engine.data.tokens.batch(rows, engine.device))[:, 0]
    targets = engine.targets[rows, 0].numpy()
    losses = np.square(raw.detach().numpy() - targets)
    weight = np.where(np.arange(8) < 5, 1.0, 0.25)
    expected = torch.autograd.grad(
        ((raw - torch.from_numpy(targets)) ** 2 * torch.from_numpy(weight)).mean(), model.output.weight
    )[0]
    engine.accumulate(engine.micro_batches(rows))
    assert engine.mean_loss.item() == pytest.approx((weight * losses).mean(), rel=1e-4)
    torch.testing.assert_close(model.output.weight.grad, expected.float(), rtol=1e-3, atol=1e-6)


def test_standard_errors_weigh_the_training_rows_and_leave_the_weight_of_pseudo_labels(student):
    engine = begun(student(pseudo_weight=0.25, error_column="standard_error", error_weights=True))
    engine.data.errors[:3] = [0.1, 0.2, 1.0]
    engine.setup_fold(0, **QUIET)
    rows = engine.data.training_rows(0)
    own = rows[engine.data.folds[rows] >= 0]
    error = engine.data.errors
    expected = 1 / (error**2 + (error[own] ** 2).mean())
    np.testing.assert_allclose(engine.sample_weights[: len(error)], expected / expected[own].mean(), rtol=1e-5)
    assert (engine.sample_weights[len(error) :] == 0.25).all() and (engine.target_std[len(error) :] == 0).all()


def test_soft_labels_and_class_numbers_become_probabilities_of_one_kind():
    soft = np.array([[0.2, 0.5, 0.3]])
    data = ku._TrainingData(
        None, np.array([2, 0]), np.array([0, 1, -1]), None, None, 3, None, pseudo={0: soft, 1: soft * np.nan}
    )
    targets = data.training_targets(0)
    np.testing.assert_array_equal(targets, [[0, 0, 1], [1, 0, 0], [0.2, 0.5, 0.3]])
    assert list(data.training_rows(0)) == [1, 2] and list(data.training_rows(1)) == [0]
    raw = torch.tensor([[1.0, -1.0, 0.5]] * 3)
    plain = ku.LOSSES["focal"](ku.Config(task="multiclass", loss="focal", focal_gamma=0.0), 3)
    loss = ku.CrossEntropyLoss(ku.Config(), 3)
    torch.testing.assert_close(
        plain(raw, torch.from_numpy(targets).float()), loss(raw, torch.from_numpy(targets).float())
    )
    logp = raw.numpy()[0] - np.log(np.exp(raw.numpy()[0]).sum())
    got = loss(raw, torch.from_numpy(targets).float())
    np.testing.assert_allclose(got, [-logp[2], -logp[0], -(soft[0] * logp).sum()], rtol=1e-5)
    hard = loss.init_bias(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(loss.init_bias(torch.eye(3)[[2, 0, 2]]), hard)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_classifier_is_labelled_and_trained_with_probabilities(task, backbone_folder, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    names = ["low", "high"] if task == "binary" else ["low", "mid", "high"]
    frame = train_frame(36).assign(target=[names[i % len(names)] for i in range(36)])
    frame.to_csv(folder / "train.csv", index=False)
    pd.DataFrame({"excerpt": make_texts(6, seed=8)}).to_csv(tmp_path / "extra.csv", index=False)
    cfg = tiny_config(folder, backbone_folder("tiny"), tmp_path / "runs", task=task, run_name="teacher")
    run = ku.train(ku.make_folds(ku.read_competition(cfg)[0], cfg), cfg)
    assert label(monkeypatch, run, "--texts", tmp_path / "extra.csv", "-o", tmp_path / "pseudo") is None
    table = pd.read_csv(tmp_path / "pseudo" / "pseudo.csv")
    spy, cfg = Spy(monkeypatch), ku.dataclasses.replace(cfg, pseudo_dir=str(tmp_path / "pseudo"), run_name="student")
    run = ku.train(ku.make_folds(ku.read_competition(cfg)[0], cfg), cfg)
    assert ku.RunFolder(run).is_complete()
    columns = [f"target_fold1_{name}" for name in sorted(names)] if task == "multiclass" else ["target_fold1"]
    labels, got = table[columns].dropna().to_numpy(), spy.targets(1)
    np.testing.assert_allclose(np.stack([got[row] for row in sorted(got) if row >= 36]), labels, rtol=1e-5)
    assert ((labels > 0) & (labels < 1)).all()
    assert task == "binary" or np.allclose(labels.sum(1), 1, atol=1e-5)
    assert set(np.stack([got[row] for row in got if row < 36]).ravel()) == {0.0, 1.0}


@pytest.mark.parametrize("settings", [dict(), dict(pseudo_epochs=2)], ids=["mixed", "two stages"])
def test_a_killed_run_goes_on_to_the_same_bytes(settings, student, monkeypatch):
    settings = settings | dict(epochs=2, backbone_dropout=0.1, checkpoint_minutes=1e-9)
    whole = trained(student(run_name="whole", **settings))
    step, count = ku.OptimizerStep.__call__, iter(range(100))

    def killed(*arguments):
        if next(count) == 3:  # in the first stage, where there are two
            raise Killed
        return step(*arguments)

    monkeypatch.setattr(ku.OptimizerStep, "__call__", killed)
    with pytest.raises(Killed):
        trained(student(run_name="cut", **settings))
    monkeypatch.setattr(ku.OptimizerStep, "__call__", step)
    run = trained(student(run_name="cut", **settings))
    for name in ("oof.csv", "log.jsonl", "fold0/model.safetensors", "fold1/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_goes_on_only_with_the_same_labels_wherever_they_lie(student, made, runs, extra, tmp_path, monkeypatch):
    run = trained(student(run_name="r"))
    moved = shutil.copytree(made, tmp_path / "moved")
    assert trained(student(run_name="r", pseudo_dir=moved)) == run
    assert label(monkeypatch, runs / "one", "--texts", extra, "-o", tmp_path / "other") is None
    with pytest.raises(ku.ConfigError, match="the pseudo-labels: not as when the run began"):
        trained(student(run_name="r", pseudo_dir=tmp_path / "other"))
    with pytest.raises(ku.ConfigError, match=r"pseudo_weight was 1\.0, now 0\.5"):
        trained(student(run_name="r", pseudo_weight=0.5))


def test_other_processes_are_told_of_the_pseudo_labels(student, tmp_path):
    data = begun(student()).data
    data.save(tmp_path)
    data.tokenizer.save_pretrained(tmp_path)
    got = ku._TrainingData.load(tmp_path, ku._load_tokenizer(tmp_path))
    for fold in (0, 1):
        assert np.array_equal(got.training_rows(fold), data.training_rows(fold))
        np.testing.assert_array_equal(got.training_targets(fold), data.training_targets(fold))


def test_folds_side_by_side_train_with_their_own_labels(student, forked_module):
    turn, side = (trained(student(run_name=f"p{n}", fold_processes=n, pseudo_epochs=1)) for n in (1, 2))
    for name in ("oof.csv", "log.jsonl", "fold0/model.safetensors", "fold1/model.safetensors"):
        assert (turn / name).read_bytes() == (side / name).read_bytes(), name


def test_budgets_and_stale_memory_follow_the_labels_of_the_fold(student, monkeypatch):
    monkeypatch.setattr(ku.OptimizerStep, "has_static_shapes", property(lambda engine: engine.is_packed))
    engine = begun(student(micro_batch_size=4))
    place, lengths = engine.targets.data_ptr(), engine.data.tokens.lengths
    expected = [
        lengths[rows[start : start + 4]].sum()
        for fold in (0, 1)
        for rows in engine.data.batches(fold, engine.cfg, engine.length_bucket)
        for start in range(0, len(rows), 4)
    ]
    assert engine.micro_batch_tokens() == expected
    engine.setup_fold(1, **QUIET)
    assert engine.targets.data_ptr() == place
    labels, scale = engine.data.training_targets(1), engine.target_scale
    expected_targets = (labels - scale["mean"]) / scale["spread"]
    np.testing.assert_allclose(engine.targets.numpy(), expected_targets, rtol=1e-5, atol=1e-6)


def test_students_can_label_in_turn(student, extra, tmp_path, monkeypatch):
    run = trained(student(run_name="student"))
    assert label(monkeypatch, run, "--texts", extra, "-o", tmp_path / "second") is None
    assert trained(student(run_name="grandchild", pseudo_dir=tmp_path / "second"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pseudo_dir="", pseudo_epochs=1), "do nothing while pseudo_dir is empty"),
        (dict(pseudo_dir="", pseudo_weight=0.5), "do nothing while pseudo_dir is empty"),
        (dict(pseudo_weight=0), "pseudo_weight must be at least 0.001"),
        (dict(pseudo_weight=0.5, pseudo_epochs=1), "pseudo_weight is for mixed rows"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings, message, student):
    with pytest.raises(ku.ConfigError, match=message):
        student(**settings)
