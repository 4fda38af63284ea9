"""Whole flows on data in the layouts of known competitions, with the settings that docs/competitions.md gives: train,
bundle, and infer on a hidden test of other rows. The data are made."""

import re
import shlex
import subprocess
import sys

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest

from conftest import ROOT, make_texts, papermill, printed

PAGE = (ROOT / "docs" / "competitions.md").read_text(encoding="utf-8")
COMMANDS = dict(re.findall(r"^\| (\w[^|]*?) \| [^|]* \| `(-p [^`]*)` \|", PAGE, flags=re.MULTILINE))
WORST, BEST = 1, 6  # grades of an essay


def share(texts, word="cat"):
    """What can be learnt of a text: how much of it is one word."""
    return np.array([text.split().count(word) / len(text.split()) for text in texts])


def rank_classes(values, labels):
    """A label for each value, of like frequency, the lowest first."""
    return np.array(labels)[pd.qcut(values, len(labels), labels=False, duplicates="drop")]


def essays(n, seed):
    texts = make_texts(n, seed)
    grades = np.clip(1 + np.round(share(texts) * 30), WORST, BEST).astype(int)
    grades[:BEST] = range(WORST, BEST + 1)
    return pd.DataFrame({"essay_id": [f"e{seed}{i}" for i in range(n)], "full_text": texts, "score": grades})


SCORES = "cohesion syntax vocabulary phraseology grammar conventions".split()


def six_scores(n, seed):
    texts = make_texts(n, seed)
    frame = pd.DataFrame({"text_id": [f"t{seed}{i}" for i in range(n)], "full_text": texts})
    for number, name in enumerate(SCORES):
        frame[name] = np.round(2 * (2 + number / 4 + 5 * share(texts))) / 2
    return frame


def preferences(n, seed):
    prompts, first, second = (make_texts(n, seed + k) for k in (10, 20, 30))
    frame = pd.DataFrame({"id": range(seed * 1000, seed * 1000 + n), "model_a": "m1", "model_b": "m2"})
    frame = frame.assign(prompt=prompts, response_a=first, response_b=second)
    winner = rank_classes(share(first) - share(second), [0, 1, 2])
    for number, name in enumerate(["winner_model_a", "winner_model_b", "winner_tie"]):
        frame[name] = (winner == number).astype(int)
    return frame


def tweets(n, seed):
    texts = make_texts(n, seed)
    target = (share(texts) > np.median(share(texts))).astype(int)
    return pd.DataFrame({"id": range(seed * 1000, seed * 1000 + n), "keyword": "", "text": texts, "target": target})


def misconceptions(n, seed):
    texts, questions = make_texts(n, seed), make_texts(n, seed + 10)
    labels = rank_classes(
        share(texts) + 1e-6 * np.arange(n), ["False_Correct:NA", "True_Correct:NA", "True_Neither:NA"]
    )
    frame = pd.DataFrame({"row_id": range(seed * 1000, seed * 1000 + n), "QuestionText": questions})
    return frame.assign(MC_Answer=[str(i % 7) for i in range(n)], StudentExplanation=texts, label=labels)


def comments(n, seed):
    texts = make_texts(n, seed)
    frame = pd.DataFrame({"id": [f"c{seed}{i}" for i in range(n)], "comment_text": texts})
    for word, name in (("cat", "toxic"), ("dog", "insult"), ("red", "threat")):
        frame[name] = (share(texts, word) > 0).astype(int)
    return frame


def searches(n, seed):
    queries, products = make_texts(n, seed + 10), make_texts(n, seed)
    frame = pd.DataFrame({"id": range(seed * 1000, seed * 1000 + n), "query_id": [f"q{i // 8}" for i in range(n)]})
    frame = frame.assign(query=[queries[i // 8] for i in range(n)], product=products)
    return frame.assign(relevance=np.round(10 * share(products), 3))


def long_texts(n, seed):
    words = [" ".join(make_texts(12, seed * 100 + i)) for i in range(n)]
    return pd.DataFrame({"id": [f"l{seed}{i}" for i in range(n)], "full_text": words, "score": share(words)})


# name in the page -> (makes n rows, columns that only train.csv has, the columns of the sample and what they hold)
FLOWS = {
    "essays, graded 1 to 6": (essays, ["score"], {"score": 3}),
    "six scores of an essay": (six_scores, SCORES, dict.fromkeys(SCORES, 3.0)),
    "which of two responses is preferred": (
        preferences,
        ["model_a", "model_b", "winner_model_a", "winner_model_b", "winner_tie"],
        {"winner_model_a": 0.333, "winner_model_b": 0.333, "winner_tie": 0.333},
    ),
    "tweets, yes or no": (tweets, ["target"], {"target": 0}),
    "three guesses for each row": (
        misconceptions,
        ["label"],
        {"label": "False_Correct:NA True_Correct:NA True_Neither:NA"},
    ),
    "several labels a comment": (
        comments,
        ["toxic", "insult", "threat"],
        dict.fromkeys(["toxic", "insult", "threat"], 0.5),
    ),
    "products ranked for each query": (searches, ["relevance"], {"relevance": 0.0}),
    "long documents": (long_texts, ["score"], {"score": 0.0}),
}


def write(folder, rows, targets, sample, train=None):
    """A competition's folder: the hidden one has the same train.csv and other test rows."""
    folder.mkdir()
    test = rows.drop(columns=targets)
    rows_of_train = rows if train is None else train
    rows_of_train.to_csv(folder / "train.csv", index=False)
    test.to_csv(folder / "test.csv", index=False)
    test[test.columns[:1]].assign(**sample).to_csv(folder / "sample_submission.csv", index=False)


@pytest.fixture(params=FLOWS)
def flow(request, tmp_path):
    """(name, folder of the competition, folder with its hidden test, settings as on the page)."""
    make, targets, sample = FLOWS[request.param]
    train = make(48, 1)
    write(tmp_path / "public", make(6, 2), targets, sample, train)
    write(tmp_path / "hidden", make(11, 3), targets, sample, train)
    words = shlex.split(COMMANDS[request.param])
    settings = dict(zip(words[1::3], words[2::3], strict=True))
    assert len(settings) <= 5
    return request.param, tmp_path / "public", tmp_path / "hidden", settings


def check(name, table, hidden):
    """The submission has the form of the sample, for the rows of the hidden test."""
    sample = pd.read_csv(hidden / "sample_submission.csv", dtype=str)
    assert list(table.columns) == list(sample.columns)
    assert list(table.iloc[:, 0].astype(str)) == list(sample.iloc[:, 0])
    values = table.iloc[:, 1:]
    if name == "essays, graded 1 to 6":
        assert set(values["score"].astype(str)) <= {str(grade) for grade in range(WORST, BEST + 1)}
    elif name == "which of two responses is preferred":
        np.testing.assert_allclose(values.astype(float).sum(axis=1), 1, atol=1e-4)
    elif name == "tweets, yes or no":
        assert set(values["target"].astype(str)) <= {"0", "1"}
    elif name == "three guesses for each row":
        guesses = values["label"].str.split(" ")
        assert all(sorted(g) == sorted(sample["label"].iloc[0].split(" ")) for g in guesses)
    else:
        assert np.isfinite(values.astype(float)).all(axis=None)
    if name == "several labels a comment":
        assert values.astype(float).to_numpy().min() > 0 and values.astype(float).to_numpy().max() < 1


def test_a_layout_trains_and_predicts_a_hidden_test_with_the_settings_of_the_page(flow, tmp_path, backbone_folder):
    name, public, hidden, settings = flow
    own = dict(backbone=str(backbone_folder("tiny")), n_folds=2, epochs=1, output_dir=str(tmp_path / "runs"))
    own |= dict(max_length=64)
    cfg = ku.Config.from_dict({"data_dir": str(public)} | own | settings)
    train, test, sample = ku.read_competition(cfg)
    run = ku.train(ku.make_folds(train, cfg), cfg, test)
    ku.predict_test(run, test, sample)
    bundle = ku.load_bundle(str(run))
    ku.check_golden(bundle)
    test, sample = ku.read_test_set(bundle, str(hidden))
    ku.write_submission(bundle, test, ku.predict_bundle(bundle, test), sample, tmp_path / "submission.csv")
    check(name, pd.read_csv(tmp_path / "submission.csv", dtype=str), hidden)


@pytest.mark.nightly
def test_a_layout_goes_through_the_notebooks_and_a_bundle(flow, tmp_path, backbone_folder):
    name, public, hidden, settings = flow
    own = dict(backbone=backbone_folder("tiny"), n_folds=2, epochs=1, output_dir=tmp_path / "runs", run_name="flow")
    own |= dict(max_length=64)
    parameters = ({"data_dir": public} | own | settings).items()
    done, executed = papermill("train.ipynb", tmp_path / "train.ipynb", *parameters)
    assert done.returncode == 0, done.stderr
    assert "wrote" in printed(executed)
    command = [
        sys.executable,
        str(ROOT / "tools" / "bundle.py"),
        str(tmp_path / "runs" / "flow"),
        "-o",
        str(tmp_path / "bundle"),
    ]
    done = subprocess.run(
        [*command, "--id", "me/flow-bundle", "--title", "Flow bundle"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    parameters = [("bundle_dir", tmp_path / "bundle"), ("data_dir", hidden), ("output_dir", tmp_path)]
    done, _ = papermill("infer.ipynb", tmp_path / "infer.ipynb", *parameters)
    assert done.returncode == 0, done.stderr
    check(name, pd.read_csv(tmp_path / "submission.csv", dtype=str), hidden)


def test_every_layout_of_the_page_is_run():
    assert list(COMMANDS) == list(FLOWS)
