"""Reading and checking a competition, where it is found, and its folds."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import warnings
from collections import Counter

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest
import torch

from conftest import train_frame

TRAIN = "id,excerpt,target\na,a cat sat,1.5\nb,the dog ran,-2\nc,a red hat,0\n"
ONE_LABEL = "id,excerpt,target\na,a cat,1\nb,a hat,1\n"
TEST = "id,excerpt\nx,a cat\ny,a dog\n"
SAMPLE = "id,target\ny,0\nx,0\n"


@pytest.fixture
def data(tmp_path):
    """Function: texts of the three files and settings -> Config that reads them."""

    def config(train=TRAIN, test=None, sample=None, **settings):
        for name, text in (("train", train), ("test", test), ("sample_submission", sample)):
            if text is not None:
                content = text if isinstance(text, bytes) else text.encode()
                (tmp_path / f"{name}.csv").write_bytes(content)
        return ku.Config(data_dir=str(tmp_path), **settings)

    return config


def read(cfg):
    return ku._read_train(cfg)


def refusal(cfg):
    with pytest.raises(ku.DataError) as error:
        ku.read_competition(cfg)
    return str(error.value)


def test_the_commonlit_layout_is_read_by_default(competition):
    train, test, sample = ku.read_competition(ku.Config(data_dir=str(competition)))
    with open(competition / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert train["id"].tolist() == [row["id"] for row in rows]
    assert train["excerpt"].tolist() == [row["excerpt"] for row in rows]
    assert train["target"].tolist() == [float(row["target"]) for row in rows]
    assert (len(test), len(sample)) == (10, 10)


def test_any_column_names_are_read_by_setting(data):
    cfg = data(
        "key,body,more,score\n1,a cat,a dog,3\n2,a hat,a mat,4\n",
        id_column="key",
        text_columns="body,more",
        target_columns="score",
    )
    train, test, sample = ku.read_competition(cfg)
    assert train[["key", "body", "more", "score"]].to_numpy().tolist() == [
        ["1", "a cat", "a dog", 3.0],
        ["2", "a hat", "a mat", 4.0],
    ]
    assert test is None and sample is None


@pytest.mark.parametrize("name", ["007", "1e5", "0x1F", "1.0", "NA", "null", "12345678901234567890", " a"])
def test_an_id_is_kept_as_the_text_that_stands_in_the_file(data, name):
    cfg = data(TRAIN + f"{name},a mat,1\n", TEST + f"{name},a mat\n", SAMPLE + f"{name},0\n")
    train, test, sample = ku.read_competition(cfg)
    assert train["id"].iloc[-1] == test["id"].iloc[-1] == sample["id"].iloc[-1] == name


@pytest.mark.parametrize("text", ["NA", "nan", "None", "null", "N/A"])
def test_a_text_that_pandas_takes_for_a_gap_is_a_text(data, text):
    assert read(data(TRAIN + f"d,{text},1\n"))["excerpt"].iloc[-1] == text


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\n\n").encode(),
    ],
    ids=["BOM", "CRLF", "BOM and CRLF", "blank lines"],
)
def test_the_way_a_file_was_saved_does_not_change_what_is_read(data, encode):
    train, test, _ = ku.read_competition(data(encode(TRAIN), encode(TEST), encode(SAMPLE)))
    assert train.columns.tolist() == ["id", "excerpt", "target"]
    assert train.to_numpy().tolist() == [["a", "a cat sat", 1.5], ["b", "the dog ran", -2.0], ["c", "a red hat", 0.0]]
    assert test.to_numpy().tolist() == [["x", "a cat"], ["y", "a dog"]]


def test_quoted_commas_and_line_breaks_stay_in_the_text(data):
    assert read(data(TRAIN + 'd,"a ""cat"", or\na dog",1\n'))["excerpt"].iloc[-1] == 'a "cat", or\na dog'


@pytest.mark.parametrize(
    "train, settings, parts",
    [
        ("id,excerpt,target\n", {}, ["no rows"]),
        ("", {}, ["CSV"]),
        ("id,excerpt,target\na,caf\xe9,1\n".encode("latin-1"), {}, ["UTF-8"]),
        (TRAIN + "d,a mat, red,1\n", {}, ["line 5"]),
        ("id,excerpt,target\na,a cat, red,1\nb,a hat, blue,2\n", {}, ["more cells than the header"]),
        (TRAIN, dict(text_columns="exerpt"), ["'exerpt' (did you mean excerpt?)", "id, excerpt, target"]),
        (TRAIN, dict(target_columns="target,other"), ["'other'"]),
        (TRAIN, dict(template="{grade} {excerpt}"), ["'grade'"]),
        (TRAIN, dict(fold_kind="group", group_column="author"), ["'author'"]),
        (TRAIN + "b,a mat,1\n", {}, ["column id", "each id once", "row 4", "'b'"]),
        ("id,excerpt,target\na,,1\nb, \t,2\n", {}, ["no row has a text in excerpt"]),
        (TRAIN, {"text_columns": "target"}, ["column target", "texts, not numbers", "row 1 (id a)", "'1.5'"]),
        (TRAIN + "d,a mat,nan\n", {}, ["column target", "a finite number", "row 4 (id d)", "'nan'"]),
        (TRAIN + "d,a mat,-inf\n", {}, ["column target", "a finite number", "row 4 (id d)", "'-inf'"]),
        (TRAIN + "d,a mat,\n", {}, ["column target", "a finite number", "row 4 (id d)", "''"]),
        (TRAIN + 'd,a mat,"1,5"\n', {}, ["column target", "a finite number", "row 4 (id d)", "'1,5'"]),
        (TRAIN + "d,a mat\n", {}, ["column target", "row 4 (id d)"]),
        (TRAIN, dict(task="multilabel"), ["column target", "0 or 1", "row 1 (id a)", "'1.5'", "'-2'"]),
        (TRAIN + "d,a mat,\n", dict(task="multiclass"), ["column target", "a label", "row 4 (id d)"]),
        (TRAIN, dict(task="binary"), ["column target", "binary", "two labels", "got 3"]),
        ("id,excerpt,target\na,a cat,1\nb,a hat,1\n", dict(task="binary"), ["column target", "two labels", "got 1"]),
        (
            "id,excerpt,target\na,a cat,1\nb,a hat,1\n",
            dict(task="multiclass"),
            ["column target", "two or more", "got 1"],
        ),
    ],
)
def test_an_error_in_train_names_file_column_row_expectation_and_value(data, tmp_path, train, settings, parts):
    message = refusal(data(train, **settings))
    assert [part for part in [str(tmp_path / "train.csv"), *parts] if part not in message] == []


def test_each_of_several_targets_is_checked(data):
    message = refusal(data("id,excerpt,p,q\na,a cat,1,x\nb,a dog,y,2\n", target_columns="p,q"))
    assert "column p" in message and "row 2 (id b): 'y'" in message
    assert "column q" in message and "row 1 (id a): 'x'" in message


def test_all_problems_of_a_file_come_in_one_error(data):
    message = refusal(data(TRAIN + "a,1,inf\n", text_columns="excerpt,target"))
    assert all(part in message for part in ("each id once", "expected a finite number"))


def test_many_bad_rows_are_counted_and_the_first_three_shown(data):
    message = refusal(data("id,excerpt,target\n" + "".join(f"r{i},a cat,x{i}\n" for i in range(7))))
    assert re.findall(r"row (\d+)", message) == ["1", "2", "3"] and "and 4 more" in message


def test_a_missing_train_csv_is_named_with_what_is_there(tmp_path):
    (tmp_path / "tain.csv").write_text(TRAIN)
    message = refusal(ku.Config(data_dir=str(tmp_path)))
    assert all(part in message for part in (str(tmp_path), "no train.csv", "tain.csv"))


def test_a_data_dir_that_is_no_folder_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(ku.Config(data_dir=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "test, sample, parts",
    [
        ("id,text\nx,a cat\n", None, ["test.csv", "'excerpt'", "id, text"]),
        ("id,excerpt\nx,a cat\nx,a dog\n", None, ["test.csv", "column id", "each id once", "row 2", "'x'"]),
        (TEST, SAMPLE + "x,0\n", ["sample_submission.csv", "column id", "each id once", "row 3", "'x'"]),
        (TEST, "id,score,other\nx,0,0\ny,0,0\n", ["sample_submission.csv", "score, other", "target"]),
        (TEST + "z,a hat\n", SAMPLE, ["sample_submission.csv", "lacks 1 ids", "'z'"]),
        (TEST, SAMPLE + "z,0\n", ["test.csv", "lacks 1 ids", "'z'"]),
        (TEST, "key,target\nx,0\nz,0\n", ["sample_submission.csv", "lacks 1 ids", "'y'"]),
        (TEST, "target\n0\n1\n", ["sample_submission.csv", "no column 'id'", "there are target"]),
        ("id,excerpt\n007,a cat\n", "id,target\n7,0\n", ["'007'", "'7'"]),
    ],
)
def test_an_error_in_test_or_sample_names_the_file_and_what_differs(data, test, sample, parts):
    message = refusal(data(TRAIN, test, sample))
    assert [part for part in parts if part not in message] == []


def test_test_and_sample_may_be_in_another_order(data):
    _, test, sample = ku.read_competition(data(TRAIN, TEST, SAMPLE))
    assert test["id"].tolist() == ["x", "y"] and sample["id"].tolist() == ["y", "x"]


def test_an_empty_test_text_is_warned_of_once_with_its_file_and_count(data):
    with pytest.warns(UserWarning, match=r"test\.csv: 2 empty texts") as caught:
        _, test, _ = ku.read_competition(data(TRAIN, "id,excerpt\nx,\ny,a dog\nz,  \n"))
    assert len([w for w in caught if "empty" in str(w.message)]) == 1
    assert test["id"].tolist() == ["x", "y", "z"]


def test_test_texts_without_gaps_give_no_warning(data, recwarn):
    ku.read_competition(data(TRAIN, TEST, SAMPLE))
    assert len(recwarn) == 0


@pytest.mark.parametrize("head", ["mean", "conv1d"])
def test_an_empty_test_text_is_predicted(data, backbone_folder, head):
    folder = backbone_folder("bert")
    cfg = data(TRAIN, "id,excerpt\nx,\ny,a dog\n", head=head, backbone=str(folder), max_length=16)
    with pytest.warns(UserWarning, match="empty"):
        _, test, _ = ku.read_competition(cfg)
    tokenizer = ku._load_tokenizer(folder)
    model = ku.TextModel.build(cfg, folder, ku.LOSSES["mse"](cfg, 1), tokenizer, torch.zeros(3, 1), lambda text: None)
    predictions = ku.predict(model, ku._tokenize(test, tokenizer, cfg), cfg)
    assert predictions.shape == (2, 1) and np.isfinite(predictions).all()


def test_several_regression_targets_become_columns_of_numbers(data):
    cfg = data("id,excerpt,p,q\na,a cat,1,0.5\nb,a dog,-2,1e-1\n", target_columns="p, q")
    assert cfg.encode_targets(read(cfg), []).tolist() == [[1.0, 0.5], [-2.0, 0.1]]


def test_label_sets_become_columns_of_zeros_and_ones(data):
    cfg = data("id,excerpt,p,q\na,a cat,1,0\nb,a dog,0.0,1\n", task="multilabel", target_columns="p,q")
    assert cfg.encode_targets(read(cfg), []).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    "task, labels, classes, encoded",
    [
        ("binary", ["1", "0", "1"], ["0", "1"], [[1.0], [0.0], [1.0]]),
        ("binary", ["yes", "no", "no"], ["no", "yes"], [[1.0], [0.0], [0.0]]),
        ("binary", ["10", "9", "9"], ["9", "10"], [[1.0], [0.0], [0.0]]),
        ("multiclass", ["10", "9", "-1"], ["-1", "9", "10"], [2, 1, 0]),
        ("multiclass", ["10.0", "2.0", "1.0"], ["1.0", "2.0", "10.0"], [2, 1, 0]),
        ("multiclass", ["pear", "apple", "fig"], ["apple", "fig", "pear"], [2, 0, 1]),
        ("multiclass", ["2", "10", "none"], ["10", "2", "none"], [1, 0, 2]),
    ],
)
def test_labels_are_ordered_as_numbers_or_as_text_and_encoded_in_that_order(data, task, labels, classes, encoded):
    text = "id,excerpt,target\n" + "".join(f"r{i},a cat,{label}\n" for i, label in enumerate(labels))
    cfg = data(text, task=task)
    train = read(cfg)
    assert cfg.class_labels(train) == classes
    assert cfg.encode_targets(train, classes).tolist() == encoded


def numbered(n):
    return "id,excerpt,target\n" + "".join(f"r{i},a cat,{i}\n" for i in range(n))


def drawn(data, train, **settings):
    return read(data(train, max_rows=20, **settings))["id"].tolist()


def test_max_rows_draws_so_many_rows_and_keeps_their_order(data):
    ids = drawn(data, numbered(100))
    assert len(set(ids)) == 20 and ids == sorted(ids, key=lambda name: int(name[1:]))
    assert ids != [f"r{i}" for i in range(20)]


def test_max_rows_depends_on_fold_seed_and_neither_on_seed_nor_on_row_order(data):
    ids = drawn(data, numbered(100))
    assert drawn(data, numbered(100), seed=5) == ids
    assert set(drawn(data, numbered(100), fold_seed=1)) != set(ids)
    header, *rows = numbered(100).splitlines()
    assert set(drawn(data, "\n".join([header, *reversed(rows)]) + "\n")) == set(ids)


@pytest.mark.parametrize("max_rows", [0, 3, 50])
def test_max_rows_of_0_or_more_than_there_are_means_all(data, max_rows):
    assert len(read(data(max_rows=max_rows))) == 3


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """Function: paths under input/ -> a made Kaggle root with those files."""
    root = tmp_path / "kaggle"
    monkeypatch.setenv("KAGGLE_ROOT", str(root))

    def make(*paths):
        (root / "input").mkdir(parents=True)
        for path in paths:
            (root / "input" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "input" / path).write_text(TRAIN)
        return root / "input"

    return make


@pytest.mark.parametrize("folder", ["commonlit", "competitions/commonlit"])
def test_on_kaggle_the_attached_competition_is_found_in_both_mount_layouts(kaggle, folder):
    root = kaggle(f"{folder}/train.csv", "datasets/me/weights/vocab.txt", "other/notes.csv")
    assert ku._find_data_dir(ku.Config(), "train").path == root / folder
    assert read(ku.Config())["id"].tolist() == ["a", "b", "c"]


def test_several_attached_competitions_are_an_error_that_lists_them(kaggle):
    root = kaggle("competitions/first/train.csv", "competitions/second/train.csv", "third/train.csv")
    message = refusal(ku.Config())
    assert str(root / "competitions/first") in message and str(root / "competitions/second") in message
    assert "several" in message and "data_dir" in message and "third" not in message


def test_on_kaggle_without_a_competition_the_error_lists_what_is_attached(kaggle):
    root = kaggle("datasets/me/texts/rows.csv")
    message = refusal(ku.Config())
    assert "train.csv" in message and "data_dir" in message and str(root / "datasets/me/texts") in message


def test_on_kaggle_with_nothing_attached_the_sample_is_not_taken(kaggle):
    kaggle()
    assert "nothing" in refusal(ku.Config())


def test_a_data_dir_wins_over_the_attached_competition(kaggle, data):
    kaggle("commonlit/train.csv")
    assert read(data("id,excerpt,target\nmine,a cat,1\n"))["id"].tolist() == ["mine"]


def test_off_kaggle_an_empty_data_dir_means_the_sample(monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    train, test, sample = ku.read_competition(ku.Config())
    assert len(train) >= 160 and len(test) >= 40 and set(test["id"]) == set(sample["id"])


def fold_frame(n=100, seed=0):
    """Rows with a number, a class with shares 5:3:2, and one of 20 authors."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"{i:03d}" for i in range(n)],
            "excerpt": [f"cat {i}" for i in range(n)],
            "target": rng.uniform(-3, 1, n),
            "label": rng.choice(list("xxxxxyyyzz"), n),
            "author": [f"author {a}" for a in rng.integers(0, 20, n)],
        }
    )


KINDS = [
    dict(fold_kind="stratified"),
    dict(fold_kind="plain"),
    dict(fold_kind="group", group_column="author"),
    dict(fold_kind="stratified_group", group_column="author"),
    dict(fold_kind="stratified", task="multiclass", target_columns="label"),
]
KIND_NAMES = ["stratified", "plain", "group", "stratified_group", "classes"]


def folds_by_id(frame, **settings):
    made = ku.make_folds(frame, ku.Config(**settings))
    return dict(zip(made["id"], made["fold"].tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_every_row_is_in_one_of_n_folds(kind):
    folds = folds_by_id(fold_frame(), n_folds=4, **kind)
    assert len(folds) == 100 and set(folds.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_making_folds_keeps_the_rows_as_they_are(kind):
    frame = fold_frame()
    made = ku.make_folds(frame, ku.Config(**kind))
    pd.testing.assert_frame_equal(made.drop(columns="fold"), fold_frame())
    pd.testing.assert_frame_equal(frame, fold_frame())


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_folds_depend_neither_on_seed_nor_on_row_order(kind):
    folds = folds_by_id(fold_frame(), **kind)
    assert folds_by_id(fold_frame(), seed=7, **kind) == folds
    assert folds_by_id(fold_frame().sample(frac=1, random_state=3), **kind) == folds
    assert folds_by_id(fold_frame().iloc[::-1].reset_index(drop=True), **kind) == folds


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_folds_depend_on_fold_seed(kind):
    assert folds_by_id(fold_frame(), fold_seed=1, **kind) != folds_by_id(fold_frame(), **kind)


@pytest.mark.parametrize("n, top", [(100, 7), (60, 6), (200, 8)])
def test_row_order_does_not_matter_where_targets_lie_on_the_edges_of_bins(n, top):
    frame = fold_frame(n).assign(target=lambda f: (f.index % (top + 1)) * 1.0)
    folds = folds_by_id(frame)
    assert all(folds_by_id(frame.sample(frac=1, random_state=state)) == folds for state in range(8))


def test_folds_depend_on_the_ids():
    frame = fold_frame()
    renamed = frame.assign(id="new " + frame["id"])
    assert list(folds_by_id(renamed).values()) != list(folds_by_id(frame).values())


def test_plain_folds_are_of_equal_size_and_not_blocks_of_rows():
    folds = list(folds_by_id(fold_frame(102), fold_kind="plain").values())
    assert sorted(Counter(folds).values()) == [20, 20, 20, 21, 21]
    assert folds != sorted(folds)


@pytest.mark.parametrize("kind", ["group", "stratified_group"])
def test_a_group_stays_in_one_fold(kind):
    made = ku.make_folds(fold_frame(200), ku.Config(fold_kind=kind, group_column="author"))
    assert len(made[["author", "fold"]].drop_duplicates()) == made["author"].nunique() == 20


def test_stratified_group_folds_share_the_classes_more_evenly_than_group_folds():
    frame = fold_frame(400).assign(author=lambda f: f["label"] + (f.index % 10).astype(str))
    uneven = {}
    for kind in ("group", "stratified_group"):
        cfg = ku.Config(fold_kind=kind, group_column="author", task="multiclass", target_columns="label")
        shares = pd.crosstab(ku.make_folds(frame, cfg)["fold"], frame["label"], normalize="index")
        uneven[kind] = shares.std().sum()
    assert uneven["stratified_group"] < 0.5 * uneven["group"]


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_stratified_folds_share_each_class_to_one_row(task):
    frame = fold_frame(103).assign(target=lambda f: f["label"].replace("z", "y") if task == "binary" else f["label"])
    made = ku.make_folds(frame, ku.Config(task=task))
    counts = pd.crosstab(made["fold"], made["target"])
    assert (counts.max() - counts.min()).max() <= 1


def test_stratified_folds_share_each_frequent_label_set_to_one_row():
    rng = np.random.default_rng(0)
    frame = fold_frame(120).assign(p=rng.integers(0, 2, 120) * 1.0, q=rng.integers(0, 2, 120) * 1.0)
    made = ku.make_folds(frame, ku.Config(task="multilabel", target_columns="p,q"))
    counts = pd.crosstab(made["fold"], made["p"].astype(str) + made["q"].astype(str))
    assert counts.shape == (5, 4) and (counts.max() - counts.min()).max() <= 1


def equal_width_bins(values, n_bins):
    position = (values - values.min()) / (values.max() - values.min()) * n_bins
    return np.minimum(np.floor(position), n_bins - 1).astype(int)


@pytest.mark.parametrize("n, n_bins", [(63, 6), (64, 7), (100, 7), (128, 8)])
def test_stratified_folds_share_each_of_the_articles_bins_to_one_row(n, n_bins):
    assert n_bins == math.floor(1 + math.log2(n))
    values = np.random.default_rng(n).uniform(-3, 1, n)
    bins = equal_width_bins(values, n_bins)
    assert Counter(bins).most_common()[-1][1] >= 3
    frame = fold_frame(n).assign(target=values)
    assert ku._strata(frame, ku.Config(n_folds=3)).tolist() == bins.tolist()
    counts = pd.crosstab(ku.make_folds(frame, ku.Config(n_folds=3))["fold"], bins)
    assert (counts.max() - counts.min()).max() <= 1


def test_several_targets_are_binned_by_the_mean_of_their_standard_scores():
    rng = np.random.default_rng(1)
    frame = fold_frame().assign(p=rng.uniform(0, 1, 100), q=rng.uniform(0, 1000, 100))
    scores = sum((frame[c].to_numpy() - np.mean(frame[c])) / np.std(frame[c]) for c in "pq")
    found = ku._strata(frame, ku.Config(target_columns="p,q", n_folds=2))
    expected = equal_width_bins(scores, 7)
    frequent = np.isin(expected, [b for b, count in Counter(expected).items() if count > 5])
    assert frequent.sum() > 80 and len(set(found)) >= 5
    assert found[frequent].tolist() == expected[frequent].tolist()


@pytest.mark.parametrize(
    "per_bin, merged",
    [
        ([6, 1, 4, 3, 2], [6, 5, 5]),
        ([1, 1, 6, 7, 1], [8, 8]),
        ([8, 0, 0, 0, 8], [8, 8]),
        ([13, 1, 0, 1, 1], [13, 3]),
        ([14, 0, 0, 1, 1], [16]),
    ],
)
def test_rare_bins_are_merged_with_a_neighbour_until_each_has_a_row_for_every_fold(per_bin, merged):
    middle = np.concatenate([b + 0.5 + np.linspace(-0.3, 0.3, count) for b, count in enumerate(per_bin) if count])
    ends = np.concatenate([[0.0], middle[1:-1], [5.0]])
    strata = ku._strata(fold_frame(16).assign(target=ends), ku.Config(n_folds=3))
    assert [count for _, count in sorted(Counter(strata.tolist()).items())] == merged
    assert (np.diff(strata) >= 0).all()


@pytest.mark.parametrize("n", [5, 20, 333])
def test_skewed_targets_make_no_stratum_smaller_than_the_number_of_folds(n):
    frame = fold_frame(n).assign(target=np.random.default_rng(n).exponential(1, n) ** 2)
    assert min(Counter(ku._strata(frame, ku.Config()).tolist()).values()) >= 5
    assert set(folds_by_id(frame).values()) == {0, 1, 2, 3, 4}


def test_targets_that_are_all_equal_still_make_folds():
    assert sorted(Counter(folds_by_id(fold_frame(10).assign(target=0.1)).values()).values()) == [2, 2, 2, 2, 2]


def test_rare_label_sets_are_stratified_together():
    frame = fold_frame(40).assign(p=[1.0] * 20 + [0.0] * 20, q=[1.0, 1.0] + [0.0] * 34 + [1.0] * 4)
    strata = ku._strata(frame, ku.Config(task="multilabel", target_columns="p,q"))
    assert sorted(Counter(strata.tolist()).values()) == [6, 16, 18]


@pytest.mark.parametrize("column", [["0", "1", "0", "3"], [0, 1, 0, 3], [0.0, 1.0, 0.0, 3.0]])
def test_a_given_fold_column_wins(column):
    frame = fold_frame(4).assign(fold=column)
    made = ku.make_folds(frame, ku.Config(n_folds=5, fold_kind="plain"))
    assert made["fold"].tolist() == [0, 1, 0, 3]


@pytest.mark.parametrize("bad", ["-1", "0.5", "", "x", "inf"])
def test_a_given_fold_that_is_no_fold_number_is_an_error_with_its_row(data, bad):
    cfg = data(f"id,excerpt,target,fold\na,a cat,1,0\nb,a dog,2,1\nc,a hat,2,{bad}\n")
    with pytest.raises(ku.DataError) as error:
        ku.make_folds(read(cfg), cfg)
    parts = ("train.csv", "column fold", "a fold number", "row 3 (id c)", repr(bad))
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_given_fold_column_with_one_fold_is_an_error():
    with pytest.raises(ku.DataError, match="column fold: expected two or more folds, got one"):
        ku.make_folds(fold_frame(4).assign(fold="0"), ku.Config())


def labelled(labels, folds):
    return fold_frame(len(labels)).assign(target=list(labels), fold=folds)


@pytest.mark.parametrize(
    "labels, settings, named",
    [
        ("xyxyzz", {}, "target 'z' (2 rows in fold 1)"),
        ("xyxyxz", {}, "target 'z' (1 rows in fold 1)"),
        ("xyzxyy", {}, "target 'z' (1 rows in fold 0)"),
        ("xyxyzz", dict(run_folds="1"), "target 'z' (2 rows in fold 1)"),
    ],
)
def test_a_label_in_one_fold_only_is_warned_of_once_with_what_follows(labels, settings, named):
    with pytest.warns(UserWarning, match="in one fold only") as told:
        ku.make_folds(labelled(labels, [0, 0, 0, 1, 1, 1]), ku.Config(task="multiclass", **settings))
    assert len(told) == 1 and named in str(told[0].message)
    assert "never sees" in str(told[0].message) and "the others train on it" in str(told[0].message)


def test_a_label_in_a_fold_that_does_not_run_is_trained_on_and_not_warned_of(recwarn):
    ku.make_folds(labelled("xyxxyz", [0, 0, 0, 1, 1, 1]), ku.Config(task="multiclass", run_folds="0"))
    assert not recwarn.list


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_a_fold_whose_model_would_train_on_one_label_is_an_error_with_column_and_label(task):
    frame = labelled("xxxxyy", [0, 1, 0, 1, 1, 1])
    with pytest.raises(ku.DataError, match=r"target 'y' \(2 rows in fold 1\); outside of fold 1 all rows are alike"):
        ku.make_folds(frame, ku.Config(task=task))
    assert len(ku.make_folds(frame, ku.Config(task=task, run_folds="0"))) == 6


def test_a_label_of_a_label_set_in_one_fold_only_is_warned_of_while_another_column_can_be_learnt():
    frame = fold_frame(4).assign(p=[0.0, 1.0, 1.0, 0.0], q=[1.0, 0.0, 1.0, 0.0], fold=[0, 0, 1, 1])
    cfg = ku.Config(task="multilabel", target_columns="p,q")
    ku.make_folds(frame, cfg)
    with pytest.warns(UserWarning, match=r"q 1\.0 \(1 rows in fold 0\)"):
        ku.make_folds(frame.assign(q=[1.0, 0.0, 0.0, 0.0]), cfg)
    with pytest.raises(ku.DataError, match="outside of fold 0 all rows are alike"):
        ku.make_folds(frame.assign(p=[1.0, 0.0, 0.0, 0.0], q=[1.0, 0.0, 0.0, 0.0]), cfg)


@pytest.mark.parametrize("kind", ["stratified", "plain", "group", "stratified_group"])
def test_labels_with_fewer_rows_than_folds_make_folds_of_every_kind(kind, recwarn):
    frame = fold_frame(20).assign(target=list("abcdefghij") * 2, author=[f"author {i}" for i in range(20)])
    made = ku.make_folds(frame, ku.Config(task="multiclass", fold_kind=kind, group_column="author"))
    assert sorted(Counter(made["fold"]).values()) == [4, 4, 4, 4, 4]
    frame.loc[7, "target"] = "single"
    with pytest.warns(UserWarning, match=r"'single' \(1 rows in fold"):
        ku.make_folds(frame, ku.Config(task="multiclass", fold_kind=kind, group_column="author"))


def test_a_regression_target_in_one_fold_only_is_no_error():
    frame = fold_frame(4).assign(target=[1.0, 2.0, 3.0, 4.0], fold=[0, 0, 1, 1])
    assert ku.make_folds(frame, ku.Config())["fold"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "n, settings, parts",
    [
        (4, {}, ["5 stratified folds", "samples", "4"]),
        (4, dict(fold_kind="plain"), ["5 plain folds", "samples", "4"]),
        (200, dict(fold_kind="group", group_column="author", n_folds=21), ["21 group folds", "groups", "20"]),
    ],
)
def test_too_few_rows_or_groups_for_the_folds_are_an_error(n, settings, parts):
    with pytest.raises(ku.DataError) as error:
        ku.make_folds(fold_frame(n), ku.Config(**settings))
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("asked, expected", [("all", [0, 1, 2]), ("2,0", [0, 2]), ("1,1", [1])])
def test_run_folds_asks_for_all_or_for_numbers(asked, expected):
    frame = ku.make_folds(fold_frame(), ku.Config(n_folds=3))
    assert ku.Config(n_folds=3, run_folds=asked).folds_to_run(frame) == expected


def test_a_fold_that_does_not_exist_is_refused_before_training_with_those_that_do():
    with pytest.raises(ku.ConfigError) as error:
        ku.make_folds(fold_frame(), ku.Config(n_folds=3, run_folds="0,3"))
    assert all(part in str(error.value) for part in ("run_folds", "0, 1, 2", "'0,3'"))


def test_a_frame_with_a_repeated_index_makes_the_folds_of_its_ids():
    frame = fold_frame(40)
    stacked = pd.concat([frame[:20], frame[20:].reset_index(drop=True)])
    assert dict(zip(stacked["id"], ku.make_folds(stacked, ku.Config())["fold"], strict=True)) == folds_by_id(frame)


def test_a_fold_column_of_bad_numbers_is_an_error_with_its_row():
    frame = pd.DataFrame({"id": list("abcd"), "excerpt": list("abcd"), "target": [1.0, 2, 3, 4], "fold": [0, 1, -1, 0]})
    with pytest.raises(ku.DataError, match=r"column fold: expected a fold number .* got row 3 \(id c\): '-1'"):
        ku.make_folds(frame, ku.Config())


def test_one_row_drawn_by_max_rows_leaves_one_label_which_is_an_error(data):
    rows = "".join(f"{i},text {i % 7} more,{int(i == 0)}\n" for i in range(200))
    with pytest.warns(UserWarning, match="max_rows 1 leaves no row of 1 labels: '1'"):
        message = refusal(data("id,excerpt,target\n" + rows, task="binary", max_rows=1))
    assert "column target: expected two labels for task binary, got 1 in 1 rows (max_rows)" in message


def classes_csv(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    rows = "".join(f"r{i},cat {i},{label},g{i % 8}\n" for i, label in enumerate(labels))
    return "id,excerpt,target,author\n" + rows


@pytest.mark.parametrize(
    "max_rows, expected",
    [(50, dict(a=30, b=15, c=4, d=1)), (20, dict(a=12, b=6, c=1, d=1)), (4, dict(a=1, b=1, c=1, d=1))],
)
def test_max_rows_draws_classes_in_proportion_and_each_at_least_once(data, max_rows, expected):
    cfg = data(classes_csv(dict(a=60, b=30, c=8, d=2)), task="multiclass", max_rows=max_rows)
    drawn = read(cfg)
    assert len(drawn) == max_rows and all(abs(n - expected[c]) <= 1 for c, n in Counter(drawn["target"]).items())
    assert set(drawn["target"]) == set("abcd")
    order = ku._id_order(read(dataclasses.replace(cfg, max_rows=0))["id"], 0)
    first = [f"r{i}" for i in np.argsort(order) if i < 60][: Counter(drawn["target"])["a"]]
    assert set(first) == set(drawn["id"][drawn["target"] == "a"])  # the order of a class is that of its ids


def test_too_few_drawn_rows_or_groups_for_the_folds_are_an_error_that_names_max_rows(data):
    text, groups = classes_csv(dict(a=60, b=36)), dict(fold_kind="group", group_column="author")
    for settings in (dict(max_rows=4), dict(max_rows=40, **groups)):
        cfg = data(text, task="binary", **settings)
        with pytest.raises(ku.DataError, match=f"max_rows is {cfg.max_rows}"):
            ku.make_folds(read(cfg), cfg)


def test_max_rows_draws_whole_groups_for_group_folds(data):
    text = classes_csv(dict(a=60, b=36))
    for seed in range(3):
        drawn = read(data(text, fold_kind="group", group_column="author", max_rows=40, fold_seed=seed, task="binary"))
        assert Counter(drawn["author"]).most_common() == [(name, 12) for name in dict.fromkeys(drawn["author"])]
        assert len(drawn) == 36
    assert "max_rows 11 holds no group, the smallest has 12 rows" in refusal(
        data(text, fold_kind="group", group_column="author", max_rows=11, task="binary")
    )


@pytest.mark.parametrize("settings", [dict(max_rows=3), dict(max_rows=12, fold_kind="group", group_column="author")])
def test_a_class_that_max_rows_leaves_out_is_named_with_the_setting(data, settings):
    cfg = data(classes_csv(dict(a=60, b=30, c=5, d=1)), task="multiclass", **settings)
    with pytest.warns(UserWarning, match=rf"column target: max_rows {cfg.max_rows} leaves no row of \d labels: .*'d'"):
        read(cfg)


@pytest.mark.parametrize(("column", "row"), [("id", ",a cat,1,g"), ("group", "c,a cat,1,")])
def test_an_empty_id_or_group_is_an_error(data, column, row):
    train = f"id,excerpt,target,group\na,a dog,2,g\n{row}\n"
    message = refusal(data(train, fold_kind="group", group_column="group"))
    assert f"column {column}: expected a value, got row 2" in message


def test_a_file_separated_by_semicolons_is_asked_about(data):
    assert "is it separated by commas?" in refusal(data("id;excerpt;target\na;b;1\n"))


def test_a_number_among_texts_is_a_text(data):
    assert read(data(TRAIN + "d,1984,1\n"))["excerpt"].iloc[-1] == "1984"


# Equal texts


def spoken(function, *arguments):
    """What a call returns, and what it printed and warned."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        value = function(*arguments)
    return value, said.getvalue() + "".join(str(warning.message) for warning in told)


def reposted(texts, times=3, **columns):
    frame = fold_frame(len(texts) * times)
    return frame.assign(excerpt=[text for text in texts for _ in range(times)], **columns)


def split_texts(made, columns=("excerpt",)):
    """How many texts, by their words, stand in several folds."""
    words = made[list(columns)].map(
        lambda text: tuple("".join(c if c.isalnum() else " " for c in text.lower()).split())
    )
    return (made.groupby([words[name] for name in columns])["fold"].nunique() > 1).sum()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_equal_texts_stay_in_one_fold_of_every_kind(kind):
    frame = reposted([f"cat number {i}" for i in range(40)], author=[f"author {i // 6}" for i in range(120)])
    made, said = spoken(ku.make_folds, frame, ku.Config(**kind))
    assert split_texts(made) == 0 and set(made["fold"]) == {0, 1, 2, 3, 4}
    assert "120 rows have the text of another: 40 texts" in said and "each stays in one fold" in said
    if "author" in kind.values():
        assert (made.groupby("author")["fold"].nunique() == 1).all()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_without_equal_texts_their_setting_changes_no_fold(kind, capsys):
    assert folds_by_id(fold_frame(), **kind) == folds_by_id(fold_frame(), group_duplicates=False, **kind)
    assert capsys.readouterr().out == ""


def test_copies_follow_the_first_of_them_which_is_dealt_out_as_if_it_were_alone():
    frame = reposted([f"cat number {i}" for i in range(30)], fold_seed=0).drop(columns="fold_seed")
    made = ku.make_folds(frame, ku.Config())
    order = {name: rank for name, rank in zip(frame["id"], ku._id_order(frame["id"], 0), strict=True)}
    first = frame.loc[frame.groupby("excerpt")["id"].apply(lambda ids: ids.map(order).idxmin())]
    assert folds_by_id(first) == made.set_index("id")["fold"][first["id"]].to_dict()


def test_texts_that_differ_in_case_spaces_and_punctuation_are_equal_and_texts_without_words_are_not():
    texts = ["A cat, sat.", "a  cat sat", "A CAT sat!!", "😀", "😀 ", "😢", "!!!", "???", "naïve", "nai\u0308ve"]
    texts += [f"cat {i}" for i in range(20)]
    frame = fold_frame(30).assign(excerpt=texts)
    _, said = spoken(ku.make_folds, frame, ku.Config())
    assert "7 rows have the text of another: 3 texts, 3 of them with different targets" in said
    assert len(set(ku._row_texts(frame, ku.Config()))) == 26


def test_all_texts_of_a_row_count_together():
    frame = fold_frame(40).assign(prompt="the same", answer=["x", "x!", *(f"y {i}" for i in range(38))])
    frame.loc[2, ["prompt", "answer"]] = ["the", "same x"]
    _, said = spoken(ku.make_folds, frame, ku.Config(text_columns="prompt,answer"))
    assert "2 rows have the text of another: 1 texts" in said


def test_groups_that_share_a_text_come_into_one_fold_however_long_the_chain(capsys):
    frame = fold_frame(60).assign(author=[f"author {i // 3:02d}" for i in range(60)])
    for left, right in ((0, 30), (32, 50), (51, 12)):  # authors 0, 10, 16/17, 4
        frame.loc[right, "excerpt"] = frame.loc[left, "excerpt"].upper() + "!"
    for kind in ("group", "stratified_group"):
        made = ku.make_folds(frame, ku.Config(fold_kind=kind, group_column="author"))
        assert (made.groupby("author")["fold"].nunique() == 1).all() and split_texts(made) == 0
        folds = made.groupby("author")["fold"].first()
        assert folds["author 00"] == folds["author 10"] == folds["author 16"]
        assert folds["author 17"] == folds["author 04"]
        assert "20 groups count as 17" in capsys.readouterr().out


def test_group_duplicates_off_deals_out_every_row_and_says_so():
    frame = reposted([f"cat {i}" for i in range(20)])
    made, said = spoken(ku.make_folds, frame, ku.Config(group_duplicates=False))
    unique = ku.make_folds(frame.assign(excerpt=fold_frame(60)["excerpt"]), ku.Config())
    assert made["fold"].tolist() == unique["fold"].tolist() and split_texts(made) > 0
    assert f"{split_texts(made)} stand in several folds (group_duplicates is off)" in said


@pytest.mark.parametrize("column, warned", [([0, 1] * 3, True), ([0, 0, 0, 1, 1, 1], False)])
def test_a_fold_column_that_splits_equal_texts_is_warned_of(column, warned, recwarn):
    ku.make_folds(reposted(["a cat", "a dog"]).assign(fold=column), ku.Config())
    assert ["2 stand in several folds: the column 'fold'" in str(w.message) for w in recwarn] == [True] * warned


def test_texts_that_are_all_equal_are_an_error_that_names_the_setting():
    for kind in KINDS[:4]:
        with pytest.raises(ku.DataError, match="equal texts stay together, see group_duplicates"):
            ku.make_folds(fold_frame().assign(excerpt="a cat"), ku.Config(**kind))


def test_test_texts_that_are_training_texts_are_counted(data, capsys):
    ku.read_competition(data(test="id,excerpt\nx,A Cat... sat\ny,a hat\nz,a red hat\n"))
    assert "3 training rows, 3 test rows, of which 2 have the text of a training row" in capsys.readouterr().out
    ku.read_competition(data(test=TEST))
    assert "3 training rows, 2 test rows\n" in capsys.readouterr().out


# Preprocessing


@pytest.fixture
def preprocess(monkeypatch, data):
    """Function: function(frame) -> frame, and what `data` takes -> Config whose tables go through it."""

    def config(function, *files, **settings):
        monkeypatch.setitem(ku.PREPROCESS, "clean", function)
        return data(*files, preprocess="clean", **settings)

    return config


def test_preprocess_changes_train_and_test_and_not_the_sample(preprocess):
    def clean(frame):
        frame["excerpt"] = frame["excerpt"].str.upper()
        return frame

    train, test, sample = ku.read_competition(preprocess(clean, TRAIN, TEST, SAMPLE))
    assert train["excerpt"].tolist() == ["A CAT SAT", "THE DOG RAN", "A RED HAT"]
    assert test["excerpt"].tolist() == ["A CAT", "A DOG"] and sample["id"].tolist() == ["y", "x"]
    assert train["target"].tolist() == [1.5, -2, 0]


def test_preprocess_may_make_the_columns_that_the_settings_name(preprocess):
    def clean(frame):
        made = frame.assign(text=frame["title"] + ": " + frame["body"], author=frame["body"].str.len())
        return made.assign(label=made["score"].astype(float).gt(1)) if "score" in made else made

    train = "id,title,body,score\na,Cat,it sat,1.5\nb,Dog,it ran,0\n"
    columns = dict(text_columns="text", target_columns="label", task="binary", group_column="author")
    cfg = preprocess(clean, train, "id,title,body\nx,Hat,it is red\n", fold_kind="group", **columns)
    train, test, _ = ku.read_competition(cfg)
    assert train["text"].tolist() == ["Cat: it sat", "Dog: it ran"] and test["text"].tolist() == ["Hat: it is red"]
    assert train["author"].tolist() == ["6", "6"] and train["label"].tolist() == ["True", "False"]


@pytest.mark.parametrize(
    "function, parts",
    [
        (
            lambda frame: frame[frame["id"] != "b"],
            ["same ids", "3 rows, id 2 ['b']; got 2 rows, id 2 ['c']"],
        ),
        (lambda frame: pd.concat([frame, frame]), ["3 rows, id 4 []; got 6 rows, id 4 ['a']"]),
        (lambda frame: frame.iloc[::-1], ["3 rows, id 1 ['a']; got 3 rows, id 1 ['c']"]),
        (lambda frame: frame.assign(id=frame["id"].str.upper()), ["id 1 ['a']", "id 1 ['A']"]),
        (lambda frame: frame.rename(columns={"id": "key"}), ["the column 'id' is gone", "key, excerpt, target"]),
        (lambda frame: None, ["expected a DataFrame, got NoneType"]),
        (lambda frame: frame["excerpt"].str.lower(), ["expected a DataFrame, got Series"]),
        (lambda frame: frame.assign(excerpt=[1, 2, 3]), ["column excerpt: expected texts, got row 1 (id a): '1'"]),
        (lambda frame: frame.assign(excerpt=["x", None, "y"]), ["expected texts, got row 2 (id b): "]),
        (lambda frame: frame.assign(excerpt=[["x"], "z", "y"]), ["expected texts, got row 1 (id a)"]),
        (lambda frame: frame.drop(columns="excerpt"), ["no column 'excerpt'"]),
    ],
)
def test_preprocess_must_keep_rows_ids_order_and_texts(preprocess, function, parts):
    message = refusal(preprocess(function))
    assert [part for part in [*parts, "train.csv"] if part not in message] == []
    assert "preprocess clean" in message or "no column" in message


def test_an_error_inside_preprocess_comes_as_it_is_with_the_file(preprocess):
    cfg = preprocess(lambda frame: frame.assign(excerpt=frame["excerpt"] + frame["target"]), TRAIN, TEST)
    with pytest.raises(KeyError, match="target") as error:
        ku.read_competition(cfg)
    assert "test.csv, preprocess clean: every table goes through it" in error.value.__notes__[0]


def test_a_preprocess_that_is_not_registered_is_refused(data):
    with pytest.raises(ku.ConfigError, match=r"preprocess must be one of those registered.* got .clean."):
        data(preprocess="clean")


# Texts that are not those of the file


def changed(frame, rows, text="another text"):
    frame = frame.copy()
    frame.loc[rows, "excerpt"] = text
    return frame


def test_texts_that_a_cell_changed_are_refused_before_training_with_the_remedy(tiny):
    cfg = tiny()
    folds = ku.make_folds(ku.read_competition(cfg)[0], cfg)
    texts = folds["excerpt"].tolist()
    with pytest.raises(ku.DataError) as error:
        ku.train(changed(folds, [3, 5], texts[3] + " more"), cfg)
    parts = [
        "train.csv, column excerpt: 2 texts were changed; id '003' has",
        "more' here",
        "ku.PREPROCESS",
        "preprocess",
    ]
    assert [part for part in parts if part not in str(error.value)] == []


def test_test_texts_that_a_cell_changed_are_refused_too(runs, competition):
    cfg = ku.Config.from_dict(json.loads((runs / "two" / "record.json").read_text())["settings"])
    _, test, sample = ku.read_competition(cfg)
    with pytest.raises(ku.DataError, match=r"test.csv, column excerpt: 1 texts were changed; id '004'"):
        ku.predict_test(runs / "two", changed(test, [4]), sample)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda frame: frame.iloc[::-1][:30], ""),
        (lambda frame: pd.concat([frame, frame[:5]]), ""),
        (lambda frame: pd.concat([frame, frame[:3].assign(id=["n1", "n2", "n3"])]), "3 of 43 rows are not in"),
        (lambda frame: changed(frame, frame.index).assign(id=range(1000, 1040)), "40 of 40 rows are not in"),
    ],
)
def test_rows_that_a_cell_drops_repeats_or_adds_are_trained_on_and_new_ones_counted(change, said, tiny, capsys):
    cfg = tiny()
    folds = ku.make_folds(ku.read_competition(cfg)[0], cfg)
    capsys.readouterr()
    ku._refuse_changed_texts(change(folds), "train", cfg)
    shown = capsys.readouterr().out
    assert said in shown if said else shown == ""


def test_without_a_file_the_texts_are_taken_as_they_are(tmp_path, capsys):
    ku._refuse_changed_texts(train_frame(), "train", ku.Config(data_dir=str(tmp_path)))
    assert "no train table to compare the texts with" in capsys.readouterr().out
