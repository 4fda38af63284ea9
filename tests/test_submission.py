"""A submission has the columns and the cells that the sample has, or else those that the metric asks for."""

import kernel_utils as ku
import numpy as np
import pandas as pd
import pytest

NAMES = dict(binary="target", multiclass="target", multilabel="toxic,insult", regression="cohesion,syntax")
THREE = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])  # probabilities of two rows
TWO = np.array([[0.3], [0.8]])  # probabilities of the second label


def form_of(task, classes, cells, chosen="", **settings):
    """The form where the sample has these {column: cells}, or for None where there is no sample."""
    cfg = ku.Config(task=task, target_columns=settings.pop("target_columns", NAMES[task]), **settings)
    sample = None
    if cells is not None:
        cells = {name: [values] * 2 if isinstance(values, str) else values for name, values in cells.items()}
        sample = pd.DataFrame({"id": ["x", "y"]} | cells)
    return ku._SubmissionForm(cfg, classes, sample, chosen)


def written(form, predictions, labels=None):
    values = form.fill(predictions, predictions if labels is None else labels)
    return pd.DataFrame(values, columns=form.columns).astype(str).to_dict("list")


@pytest.mark.parametrize(
    ("classes", "cells", "settings", "expected"),
    [
        # a placeholder of 0 leaves it to the metric
        ("0 1", "0", dict(metric="f1_macro"), ["0", "1"]),
        ("0 1", "0", dict(metric="accuracy"), ["0", "1"]),
        ("0 1", "0", dict(metric="auc"), ["0.3", "0.8"]),
        ("0 1", "0", dict(metric="logloss"), ["0.3", "0.8"]),
        ("0 1", "0.0", dict(metric="f1_macro"), ["0.0", "1.0"]),
        ("0 1", "0", dict(metric="auc", submission_form="labels"), ["0", "1"]),
        ("0 1", None, dict(metric="f1_macro"), ["0", "1"]),
        ("0 1", None, dict(metric="auc"), ["0.3", "0.8"]),
        # the sample decides
        ("0 1", ["0", "1"], {}, ["0", "1"]),
        ("0 1", "0.5", dict(metric="f1_macro"), ["0.3", "0.8"]),
        ("0 1", "0.333", {}, ["0.3", "0.8"]),
        ("0 1", "0.5", dict(submission_form="labels"), ["0", "1"]),
        # in its own spelling
        ("0.0 1.0", "0", dict(metric="f1_macro"), ["0", "1"]),
        ("0.0 1.0", ["0", "1"], {}, ["0", "1"]),
        ("0 1", "False", {}, ["False", "True"]),
        ("0 1", ["true", "false"], {}, ["false", "true"]),
        ("False True", ["0", "1"], {}, ["0", "1"]),
        ("False True", "True", {}, ["False", "True"]),
        ("False True", "false", {}, ["false", "true"]),
        ("False True", "0.5", {}, ["0.3", "0.8"]),
        ("no yes", "No", {}, ["No", "Yes"]),
        ("no yes", "True", {}, ["False", "True"]),
        ("no yes", ["0", "1"], {}, ["0", "1"]),
        ("yes no", "yes", dict(positive_label="no"), ["yes", "no"]),
        ("1 2", ["2", "1"], {}, ["1", "2"]),
        ("1 2", "0.5", {}, ["0.3", "0.8"]),
    ],
)
def test_a_binary_column_holds_labels_or_probabilities(classes, cells, settings, expected):
    sample = None if cells is None else {"anything": cells}
    form = form_of("binary", classes.split(), sample, **settings)
    assert list(written(form, TWO).values()) == [expected]


@pytest.mark.parametrize(
    ("classes", "columns", "expected"),
    [
        ("a b tie", "winner_model_a winner_model_b winner_tie", "0.2 0.5 0.3"),
        ("a b tie", "winner_tie winner_model_b winner_model_a", "0.3 0.5 0.2"),
        ("C CL D", "Status_C Status_CL Status_D", "0.2 0.5 0.3"),
        ("EAP HPL MWS", "mws eap hpl", "0.3 0.2 0.5"),
        ("1 2 11", "score_11 score_1 score_2", "0.3 0.2 0.5"),
        ("1.0 2.0 3.0", "class3 class2 class1", "0.3 0.5 0.2"),
        ("low mid high", "low_prob mid_prob high_prob", "0.2 0.5 0.3"),
        ("not_cat cat dog", "cat not_cat dog", "0.5 0.2 0.3"),
    ],
)
def test_class_columns_are_known_under_prefixes_in_other_case_and_order(classes, columns, expected):
    form = form_of("multiclass", classes.split(), dict.fromkeys(columns.split(), "0.33"))
    assert [cells[0] for cells in written(form, THREE).values()] == expected.split()


@pytest.mark.parametrize("cells", ["0", ["1", "0"]])
def test_class_columns_take_probabilities_unless_labels_are_chosen(cells):
    columns = dict.fromkeys(["A", "B", "C"], cells)
    assert written(form_of("multiclass", ["A", "B", "C"], columns, metric="accuracy"), THREE)["B"] == ["0.5", "0.1"]
    chosen = form_of("multiclass", ["A", "B", "C"], columns, "labels")
    assert written(chosen, THREE) == {"A": ["0", "1"], "B": ["1", "0"], "C": ["0", "0"]}
    words = form_of("multiclass", ["A", "B", "C"], dict.fromkeys(["A", "B", "C"], "False"))
    assert written(words, THREE)["A"] == ["False", "True"]


def test_both_classes_of_a_binary_task_may_have_a_column():
    form = form_of("binary", ["no", "yes"], {"is_yes": "0.5", "is_no": "0.5"})
    assert written(form, TWO) == {"is_yes": ["0.3", "0.8"], "is_no": ["0.7", "0.19999999999999996"]}


@pytest.mark.parametrize(
    ("cells", "settings", "expected"),
    [
        ("A", {}, ["B", "A"]),
        ("a", {}, ["b", "a"]),
        (None, {}, ["B", "A"]),
        ("A B C", {}, ["B C A", "A C B"]),
        ("C,A", {}, ["B,C", "A,C"]),
        ("A|A|A", dict(metric="map3"), ["B|C|A", "A|C|B"]),
        (None, dict(metric="map3"), ["B C A", "A C B"]),
        ("0", {}, ["B", "A"]),
    ],
)
def test_a_column_of_classes_holds_as_many_labels_as_the_sample_or_the_metric_has(cells, settings, expected):
    form = form_of("multiclass", ["A", "B", "C"], None if cells is None else {"target": cells}, **settings)
    assert written(form, THREE) == {"target": expected}


def test_without_a_sample_a_metric_of_probabilities_gets_a_column_for_each_class():
    form = form_of("multiclass", ["A", "B", "C"], None, metric="logloss")
    assert written(form, THREE) == {"A": ["0.2", "0.6"], "B": ["0.5", "0.1"], "C": ["0.3", "0.3"]}


def test_a_sample_whose_cells_are_no_labels_is_told_with_both():
    (note,) = form_of("multiclass", ["A", "B", "C"], {"target": "0"}).notes
    assert "the sample holds 0, none of the labels A, B, C" in note


def test_what_is_doubtful_is_told_in_one_line_with_the_setting_and_only_that():
    (note,) = form_of("binary", ["0", "1"], {"target": "0"}).notes
    assert note == "the sample holds 0: probabilities are written, as metric auc asks; or set submission_form"
    assert form_of("binary", ["0", "1"], {"target": "0.5"}).notes == []
    assert form_of("multiclass", ["A", "B"], {"target": "A"}).notes == []
    (note,) = form_of("binary", ["no", "yes"], {"target": ["0", "1"]}, "labels").notes
    assert note == "labels as the sample has them: 0 for no, 1 for yes"


CHANCES = np.array([[0.7, 0.6], [0.1, 0.3]])
BITS = np.array([[1.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("cells", "settings", "expected"),
    [
        ({"insult": "0.5", "toxic": "0.5"}, {}, [["0.6", "0.3"], ["0.7", "0.1"]]),
        ({"insult": "0", "toxic": "0"}, dict(metric="f1_macro"), [["1", "0"], ["1", "0"]]),
        ({"insult": "False", "toxic": "False"}, {}, [["True", "False"], ["True", "False"]]),
        ({"is_insult": "0", "is_toxic": "0"}, dict(metric="auc"), [["0.6", "0.3"], ["0.7", "0.1"]]),
        ({"labels": ["toxic insult", "insult"]}, dict(metric="f1_macro"), [["toxic insult", "insult"]]),
    ],
)
def test_a_multilabel_task_writes_labels_probabilities_or_names(cells, settings, expected):
    assert list(written(form_of("multilabel", [], cells, **settings), CHANCES, BITS).values()) == expected


@pytest.mark.parametrize(
    ("sample", "expected"),
    [("2", ["1.5", "3"]), ("2.5", ["1.5", "3"]), ("3.0", ["1.5", "3.0"]), ("0", ["1.5", "3"])],
)
def test_grades_are_written_as_the_sample_writes_numbers(sample, expected):
    form = form_of("regression", [], {"grade": sample}, target_columns="grade", metric="qwk")
    assert written(form, np.array([[1.5], [3.0]])) == {"grade": expected}


@pytest.mark.parametrize(
    ("task", "classes", "cells", "words"),
    [
        ("multiclass", ["A", "B"], {"A": "0", "B": "0", "Usage": "Public"}, ["columns A, B, Usage", "delete Usage"]),
        ("multiclass", ["A", "B"], {"A": "0", "C": "0"}, ["columns A, C", "the settings predict A, B"]),
        ("regression", [], {"cohesion": "0"}, ["columns cohesion", "predict cohesion, syntax"]),
        ("multilabel", [], {"labels": "0"}, ["columns labels", "predict toxic, insult"]),
        ("binary", ["0", "1"], {"target": "0", "Usage": "Public"}, ["columns target, Usage"]),
        ("regression", [], {}, ["columns nothing"]),
    ],
)
def test_columns_that_the_settings_do_not_predict_are_refused(task, classes, cells, words):
    with pytest.raises(ku.DataError) as caught:
        form_of(task, classes, cells)
    assert all(word in str(caught.value) for word in words)


def test_a_column_of_one_label_takes_no_probabilities():
    with pytest.raises(ku.DataError, match="submission_form probabilities needs a column for each label"):
        form_of("multiclass", ["A", "B"], {"target": "A"}, "probabilities")
