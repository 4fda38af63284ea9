"""Settings: what they accept, what they refuse, and how a notebook or an exported script hands them over."""

import ast
import contextlib
import copy
import dataclasses
import io
import json
import pickle
import re
import runpy
import sys
import tokenize
import types
from pathlib import Path

import blending
import comparison
import kernel_utils as ku
import nbformat
import numpy as np
import pandas as pd
import pretraining
import pytest

from conftest import with_this_module

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
EXPOSED = """data_dir id_column text_columns target_columns task metric recipe backbone head loss max_length n_folds
run_folds epochs batch_size lr head_lr llrd reinit_layers backbone_dropout seed fold_seed output_dir run_name resume
max_minutes max_rows""".split()
EXPOSED_TO_PRETRAIN = """data_dir text_columns backbone max_length mask_share whole_words held_out epochs batch_size
micro_batch_size lr head_lr seed output_dir run_name resume max_minutes max_rows""".split()
DEFAULTS = dict(
    max_length=256,
    n_folds=5,
    epochs=3,
    batch_size=16,
    head_lr=1e-3,
    llrd=1.0,
    weight_decay=0.01,
    warmup_ratio=0.1,
    schedule="cosine",
    max_grad_norm=1.0,
    conv_kernels=(2, 2),
    conv_channels=(256, 1),
)


def problems_of(**settings):
    with pytest.raises(ku.ConfigError) as error:
        ku.Config.from_dict(settings)
    return str(error.value)


def tagged_cell(notebook):
    cells = nbformat.read(NOTEBOOKS / notebook, 4).cells
    return next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))


def from_cells(*sources):
    """Config of a notebook session in which these cells ran; the namespace holds what they bound."""
    namespace = {"In": ["", *sources]}
    for source in sources:
        exec(source, namespace)
    return ku.Config.from_notebook(namespace)


def test_misspelt_names_and_bad_values_come_in_one_error():
    message = problems_of(heda="conv1d", head="conv1", epochs=2.5, n_folds=1)
    assert "'heda' (did you mean head?)" in message
    assert "got 'conv1' (did you mean conv1d?)" in message
    assert "epochs must be a whole number, got 2.5" in message
    assert "n_folds must be at least 2, got 1" in message


def test_the_error_of_a_misspelt_name_lists_every_setting():
    listed = set(re.findall(r"\w+", problems_of(heda="conv1d").split("the settings are:")[1]))
    assert listed == {field.name for field in dataclasses.fields(ku.Config)} | {"recipe"}


@pytest.mark.parametrize(
    "name, meant",
    [("heda", "head"), ("epoch", "epochs"), ("batchsize", "batch_size"), ("max_len", "max_length"), ("Seed", "seed")],
)
def test_a_misspelt_name_gets_the_nearest_one(name, meant):
    assert f"there is no setting {name!r} (did you mean {meant}?)" in problems_of(**{name: 1})


def test_a_name_like_no_other_gets_no_suggestion():
    assert "did you mean" not in problems_of(zzqqxx=1)


@pytest.mark.parametrize(
    "old, texts, template",
    [
        (dict(text_column="text"), ["text"], ""),
        (dict(text_column="a", pair_column="b"), ["a", "b"], ""),
        (dict(pair_column="b, c"), ["excerpt", "b, c"], ""),
        (dict(prefix="{prompt} "), ["excerpt"], "{prompt} {excerpt}"),
        (dict(prefix="[{genre}] ", text_column="text"), ["text"], "[{genre}] {text}"),
        (dict(prefix="a: ", text_columns="text"), ["text"], "a: {text}"),
        (dict(text_column="text", text_columns="excerpt", template=""), ["text"], ""),
    ],
)
def test_settings_of_version_0_9_are_taken_for_todays_in_one_line_that_spells_them(old, texts, template, capsys):
    cfg = ku.Config.from_dict(old)
    assert cfg.text_columns == texts and cfg.template == template
    (line,) = capsys.readouterr().out.splitlines()
    before, _, now = line.partition(" are now ")
    assert all(name in before for name in old if name not in ("text_columns", "template"))
    assert ku.Config.from_dict({"text_columns": texts} | ast.literal_eval(now)) == cfg


def test_old_settings_of_pre_training_are_taken_for_todays():
    assert pretraining.PretrainConfig.from_dict(dict(text_column="a", pair_column="b")).text_columns == ["a", "b"]


def test_old_settings_that_are_empty_say_nothing(capsys):
    assert ku.Config.from_dict(dict(pair_column="", prefix="")) == ku.Config()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "settings, problem",
    [
        (dict(text_column="a", text_columns="b"), "text_column and text_columns are both given"),
        (dict(pair_column="a", text_columns="b"), "pair_column and text_columns are both given"),
        (dict(prefix="a ", template="b {excerpt}"), "prefix and template are both given"),
        (dict(prefix="a ", pair_column="b"), "prefix is now a template, such as 'a {excerpt} {b}'"),
    ],
)
def test_an_old_setting_beside_the_one_that_took_its_place_is_refused(settings, problem):
    assert problem in problems_of(**settings)


@pytest.mark.parametrize(
    "name, value, choices",
    [
        ("head", "conv", ku.HEADS),
        ("head", "", ku.HEADS),
        ("loss", "msee", ku.LOSSES),
        ("metric", "rsme", ku.METRICS),
        ("schedule", "cosin", ku.SCHEDULES),
        ("task", "classification", ["regression", "binary", "multiclass", "multilabel"]),
        ("truncation", "middle", ["head", "tail", "head_tail"]),
        ("fold_kind", "kfold", ["stratified", "plain", "group", "stratified_group"]),
        ("keep", "first", ["last", "best"]),
        ("precision", "fp64", ["auto", "fp32", "bf16", "fp16"]),
    ],
)
def test_a_value_that_is_no_choice_is_answered_with_the_choices(name, value, choices):
    assert f"{name} must be one of {', '.join(choices)}; got {value!r}" in problems_of(**{name: value})


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("freeze_embeddings", "true", True),
        ("freeze_embeddings", "False", False),
        ("freeze_embeddings", np.bool_(True), True),
        ("lr", "1e-5", 1e-5),
        ("lr", "3e-05", 3e-5),
        ("lr", 1, 1.0),
        ("epochs", "2", 2),
        ("epochs", 2.0, 2),
        ("epochs", np.int64(2), 2),
        ("run_name", "007", "007"),
        ("output_dir", Path("runs") / "a", "runs/a"),
        ("run_folds", 0, "0"),
        ("run_folds", "0,2", "0,2"),
        ("run_folds", "0, 2", "0,2"),
        ("run_folds", [0, 2], "0,2"),
        ("run_folds", "all", "all"),
        ("conv_kernels", "3,4", (3, 4)),
        ("conv_kernels", [3, 4], (3, 4)),
        ("loss", "", ""),
        ("report_to", "", ""),
    ],
)
def test_the_forms_that_papermill_and_people_write_become_the_type_of_the_setting(name, given, expected):
    value = getattr(ku.Config.from_dict({name: given}), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "name, value, accepts",
    [
        ("epochs", 2.5, "a whole number"),
        ("epochs", "2.5", "a whole number"),
        ("epochs", "two", "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", None, "a whole number"),
        ("epochs", float("inf"), "a whole number"),
        ("lr", float("nan"), "a finite number"),
        ("lr", "nan", "a finite number"),
        ("lr", "inf", "a finite number"),
        ("lr", False, "a finite number"),
        ("lr", "fast", "a finite number"),
        ("freeze_embeddings", 1, "True or False"),
        ("freeze_embeddings", "yes", "True or False"),
        ("data_dir", None, "text"),
        ("run_folds", "0;2", "'all' or fold numbers such as 0,2"),
        ("run_folds", "some", "'all' or fold numbers such as 0,2"),
        ("run_folds", "", "'all' or fold numbers such as 0,2"),
        ("conv_kernels", "2,2.5", "whole numbers such as 2,3"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_accepted_and_what_came(name, value, accepts):
    message = problems_of(**{name: value})
    assert f"{name} must be {accepts}" in message and f"got {value!r}" in message


def test_a_run_name_that_papermill_made_a_number_is_refused_naming_its_raw_option():
    assert re.search(r"run_name must be .*, got 7 \(papermill's -r keeps digits as text\)", problems_of(run_name=7))


@pytest.mark.parametrize(
    "name, inside, outside",
    [
        ("max_rows", [0, 1], [-1]),
        ("n_folds", [2], [1]),
        ("max_length", [8], [7]),
        ("llrd", [0.01, 1], [0, 1.01]),
        ("warmup_ratio", [0, 1], [-0.1, 1.1]),
        ("lr", [0, 1e-3], [-1e-5]),
        ("backbone_dropout", [-1, 0, 0.99], [-1.5, -0.5, 1]),
        ("label_smoothing", [0], [-0.1, 1]),
        ("conv_kernels", ["1,1"], ["0,2"]),
    ],
)
def test_bounds_hold_to_the_last_value(name, inside, outside):
    for value in inside:
        ku.Config.from_dict({name: value})
    for value in outside:
        assert name in problems_of(**{name: value})


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(task="regression", loss="cross_entropy"), ["cross_entropy", "regression"]),
        (dict(task="multiclass", metric="rmse"), ["rmse", "multiclass"]),
        (dict(task="binary", target_columns="a,b"), ["target_columns", "a, b"]),
        (dict(target_columns="a,a"), ["target_columns", "a, a"]),
        (dict(target_columns="a,"), ["target_columns", "a, "]),
        (dict(text_columns="a,a"), ["text_columns", "a, a"]),
        (dict(conv_kernels="2,2,2"), ["conv_kernels", "conv_channels"]),
        (dict(dropout_samples=4), ["dropout_samples", "head_dropout"]),
        (dict(label_smoothing=0.1), ["label_smoothing", "cross_entropy"]),
        (dict(fold_kind="group"), ["fold_kind", "group_column"]),
        (dict(fold_kind="stratified_group"), ["fold_kind", "group_column"]),
        (dict(run_name="../x"), ["run_name", "'../x'"]),
        (dict(run_name=".."), ["run_name", "'..'"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(settings, named):
    message = problems_of(**settings)
    assert all(word in message for word in named)


def test_all_contradictions_come_in_one_error():
    message = problems_of(loss="cross_entropy", metric="auc", fold_kind="group")
    assert all(word in message for word in ("loss cross_entropy", "metric auc", "group_column"))


def test_bad_values_and_contradictions_come_in_one_error():
    message = problems_of(epochs=2.5, fold_kind="group")
    assert "epochs must be" in message and "group_column" in message


def test_a_notebook_shows_the_message_without_a_traceback():
    shown = "\n".join(ku.ConfigError(["one", "two"])._render_traceback_())
    assert shown.startswith("ConfigError") and "one" in shown and "two" in shown and "File" not in shown


@pytest.mark.parametrize(
    "config", [ku.Config, ku.InferConfig, pretraining.PretrainConfig, comparison.CompareConfig, blending.BlendConfig]
)
def test_a_built_config_cannot_be_changed(config):
    cfg = config()
    for name in ("data_dir", "output_dir", "a_new_name"):
        with pytest.raises(ku.ConfigError, match=rf"{name} = 'elsewhere': .*settings cell.*dataclasses\.replace"):
            setattr(cfg, name, "elsewhere")
    assert cfg == config() and dataclasses.replace(cfg, output_dir="elsewhere").output_dir == "elsewhere"
    assert copy.deepcopy(cfg) == pickle.loads(pickle.dumps(cfg)) == cfg


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_design(name):
    assert getattr(ku.Config(), name) == DEFAULTS[name]


def test_settings_of_pretraining_with_a_name_of_config_have_its_type_and_bounds():
    theirs = {field.name: field for field in dataclasses.fields(ku.Config)}
    for field in dataclasses.fields(pretraining.PretrainConfig):
        if field.name in theirs and field.name != "lr":  # whose 0 means by the backbone's width in Config alone
            other = theirs[field.name]
            assert field.type is other.type
            assert [field.metadata[k] for k in ("low", "high", "choices")] == [
                other.metadata[k] for k in ("low", "high", "choices")
            ]
    with pytest.raises(ku.ConfigError, match="resume_from does nothing while resume is False"):
        pretraining.PretrainConfig(resume=False, resume_from="x")
    with pytest.raises(ku.ConfigError, match="run_name must be letters"):
        pretraining.PretrainConfig(run_name="../x")


def test_settings_survive_a_record_in_json():
    cfg = ku.Config(conv_kernels=(3, 2), conv_channels=(64, 1), run_folds="0,2", lr=3e-5, freeze_embeddings=True)
    assert ku.Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize("width, lr", [(128, 1e-4), (384, 1e-4), (385, 2e-5), (768, 2e-5), (769, 1e-5), (1024, 1e-5)])
def test_a_learning_rate_of_0_means_by_the_width_of_the_backbone(width, lr):
    backbone = types.SimpleNamespace(hidden_size=width)
    assert ku.Config().resolved(backbone).lr == lr
    assert ku.Config(lr=0.5).resolved(backbone).lr == 0.5


@pytest.mark.parametrize(
    "settings, loss, metric, dropout",
    [
        (dict(task="regression"), "mse", "rmse", 0),
        (dict(task="regression", target_columns="a,b"), "mse", "mcrmse", 0),
        (dict(task="binary"), "bce", "auc", -1),
        (dict(task="multiclass"), "cross_entropy", "accuracy", -1),
        (dict(task="multilabel", target_columns="a,b"), "bce", "auc", -1),
        (dict(loss="smooth_l1", metric="pearson", backbone_dropout=0.1), "smooth_l1", "pearson", 0.1),
        (dict(task="binary", backbone_dropout=0), "bce", "auc", 0),
    ],
)
def test_what_is_left_empty_follows_the_task(settings, loss, metric, dropout):
    resolved = ku.Config(**settings).resolved(types.SimpleNamespace(hidden_size=384))
    assert (resolved.loss, resolved.metric, resolved.backbone_dropout) == (loss, metric, dropout)


def test_a_head_registered_in_a_notebook_is_a_choice(monkeypatch):
    monkeypatch.setitem(ku.HEADS, "mine", object)
    assert ku.Config(head="mine").head == "mine"


def test_a_registered_name_cannot_be_taken_by_another_part():
    with pytest.raises(ValueError, match="'mean' is taken"):
        ku.register(ku.HEADS, "mean")(ku.ClsHead)


def test_the_settings_cell_of_a_notebook_sets_values():
    cell = '# Settings\nhead: str = "conv1d"  # help\nepochs = 7'
    assert from_cells(cell) == ku.Config(head="conv1d", epochs=7)


def test_papermills_cell_overrides_the_settings_cell_and_leaves_the_rest():
    cfg = from_cells("# Settings\nepochs = 7\nseed = 3", "# Parameters\nepochs = 9\n")
    assert (cfg.epochs, cfg.seed) == (9, 3)


def test_a_name_that_papermill_adds_to_those_of_the_cell_counts():
    assert from_cells("# Settings\nepochs = 7", "# Parameters\nwarmup_ratio = 0.5").warmup_ratio == 0.5


def test_a_corrected_settings_cell_that_runs_again_wins():
    assert from_cells("# Settings\nepochs = 7", "x = 1", "# Settings\nepochs = 8").epochs == 8


def test_a_line_deleted_from_the_settings_cell_is_back_at_its_default():
    assert from_cells("# Settings\nepochs = 7\nseed = 3", "# Settings\nepochs = 7").seed == 0


def test_a_settings_cell_corrected_after_a_refusal_works():
    bad, good = "# Settings\nheda = 'conv1d'", "# Settings\nhead = 'conv1d'"
    with pytest.raises(ku.ConfigError):
        from_cells(bad)
    assert from_cells(bad, good).head == "conv1d"


def test_a_settings_cell_run_again_after_papermills_wins():
    assert from_cells("# Settings\nepochs = 7", "# Parameters\nepochs = 9", "# Settings\nepochs = 8").epochs == 8


@pytest.mark.parametrize(
    "scratch", ["epochs = 99", "head = 'cls'\nepochs: int = 99", "heda = 1", "# notes\nepochs = 9"]
)
def test_scratch_cells_before_the_settings_never_count(scratch):
    settings = "# Settings\nepochs = 7\nhead = 'conv1d'"
    assert from_cells(scratch, settings) == ku.Config(epochs=7, head="conv1d")


SETTINGS = "# Settings\nepochs: int = 7\nlr: float = 1e-4\nmetric: str = ''\nrecipe: str = ''"


@pytest.mark.parametrize(
    "cell, named",
    [
        ("epochs = 99", "epochs = 99"),
        ("epochs += 2", "epochs = 9"),
        ("epochs: int = 2; heda = 1", "epochs = 2"),
        ("seed, ema = 5, 0.99", "seed = 5, ema = 0.99"),
        ("ema = 0.99", "ema = 0.99"),
        ("recipe = 'strong'", "recipe = 'strong'"),
        ("# Parameters of the plot\nseed = 5", "seed = 5"),
        ("text_columns = ['excerpt', 'more']", "text_columns = ['excerpt', 'more']"),
        ("x = 1\nfolds = [0]\nbatch_size = n = 2 * 4", "batch_size = 8"),
    ],
)
@pytest.mark.parametrize("is_built", [False, True], ids=["before", "after"])
def test_a_setting_bound_in_another_cell_is_an_error_that_says_where_to_put_it(cell, named, is_built, session):
    with pytest.raises(ku.ConfigError) as error:
        if is_built:
            cfg = session(SETTINGS)
            session(SETTINGS, cell, build=False)
            ku.train(None, cfg)
        session(SETTINGS, cell)
    assert f"{named}: bound in another cell than the settings" in str(error.value)
    assert "put it into the settings cell (the first)" in str(error.value)


@pytest.mark.parametrize(
    "cell",
    [
        "epochs = 7; lr = 0.0001; seed = 0; head = 'mean'",
        "metric = 0.71; head = [1, 2]; epochs = 2.5; loss = 'my favourite'; windows = None; levels = {}",
        "for epochs in (1, 2): pass",
        "def f(epochs=3):\n    seed = 4",
        "losses = [lr for lr in (1, 2)]",
        "epoch = 9; Epochs = 9",
        "with open('/dev/null') as head: pass",
        "import math as lr",
        "schedule = open",
        "class A:\n    seed = 4",
        "%magic that is no Python",
    ],
)
def test_other_variables_that_are_called_like_a_setting_do_no_harm(cell, session):
    cfg = session(SETTINGS, cell)
    assert cfg == ku.Config(epochs=7, lr=1e-4)
    with pytest.raises(ku.DataError, match="call make_folds"):  # what `train` checks next
        ku.train(pd.DataFrame(), cfg)


def test_settings_are_built_anew_in_a_cell_by_replace(session):
    cfg = session(SETTINGS)
    session(SETTINGS, "epochs = 3", build=False)
    cfg.refuse_stray_settings({})
    with pytest.raises(ku.ConfigError, match="epochs = 3"):
        cfg.refuse_stray_settings(vars(sys.modules["__main__"]))
    dataclasses.replace(cfg, epochs=3).refuse_stray_settings(vars(sys.modules["__main__"]))


@pytest.fixture
def session(monkeypatch):
    """Function: sources of cells -> Config of a notebook session in which they ran; `train` sees it too."""

    def run(*sources, build=True):
        namespace = {"In": ["", *sources], "__name__": "__main__"}
        for source in sources:
            with contextlib.suppress(SyntaxError):
                exec(source, namespace)
        monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(**namespace))
        return ku.Config.from_notebook(namespace) if build else None

    return run


def test_cells_are_read_and_do_not_run_again():
    namespace = {"In": ["", "# Settings\nruns.append(1)\nepochs = len(runs)"], "runs": [1], "epochs": 1}
    assert ku.Config.from_notebook(namespace) == ku.Config(epochs=1) and namespace["runs"] == [1]


@pytest.mark.parametrize(
    "lines", ["seed, epochs = 3, 7", "if True:\n    seed, epochs = 3, 7", "seed = 3; epochs = seed + 4"]
)
def test_every_way_to_assign_in_the_settings_cell_counts(lines):
    assert from_cells(f"# Settings\n{lines}") == ku.Config(seed=3, epochs=7)


@pytest.mark.parametrize("name", ku.RECIPES)
def test_a_recipe_is_a_plain_dictionary_of_settings_and_the_same_by_every_way_to_give_it(name):
    recipe = ku.RECIPES[name]
    expected = ku.Config(**recipe)
    assert ku.Config.from_dict({"recipe": name}) == expected == from_cells(f"# Settings\nrecipe = {name!r}")
    assert {key: getattr(expected, key) for key in recipe} == recipe


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setitem(ku.RECIPES, "made", {"epochs": 5, "ema": 0.9, "head": "gem"})


def test_what_a_dictionary_or_papermill_gives_wins_over_the_recipe_even_if_it_is_the_default(recipe):
    expected = ku.Config(epochs=3, ema=0.9, head="gem")
    assert ku.Config.from_dict({"recipe": "made", "epochs": 3}) == expected
    settings = "# Settings\nepochs: int = 3\nrecipe: str = ''\nhead: str = 'mean'"
    assert from_cells(settings, "# Parameters\nrecipe = 'made'\nepochs = 3") == expected


def test_in_the_settings_cell_what_differs_from_the_default_wins_over_the_recipe(recipe):
    cfg = from_cells("# Settings\nrecipe = 'made'\nepochs = 3\nhead = 'cls'")
    assert (cfg.epochs, cfg.head, cfg.ema) == (5, "cls", 0.9)


def test_a_settings_cell_run_again_after_papermills_takes_a_given_value_back_to_the_recipe(recipe):
    cells = ["# Settings\nepochs = 3", "# Parameters\nrecipe = 'made'\nepochs = 4"]
    assert from_cells(*cells).epochs == 4
    assert from_cells(*cells, "# Settings\nepochs = 3\nrecipe = 'made'").epochs == 5


def test_a_notebook_tells_what_the_recipe_gave_and_what_was_given(recipe, capsys):
    from_cells("# Settings\nepochs = 7", "# Parameters\nrecipe = 'made'\nhead = 'mean'")
    assert capsys.readouterr().out == "recipe made: epochs 7 (given), ema 0.9, head mean (given)\n"


def test_a_recipe_is_only_a_name_for_settings_that_a_run_keeps_whatever_becomes_of_it(monkeypatch, recipe):
    kept = ku.Config.from_dict({"recipe": "made", "ema": 0.0}).to_dict()
    monkeypatch.setitem(ku.RECIPES, "made", {"epochs": 9, "ema": 0.5})
    cfg = ku.Config.from_dict(kept)
    assert (cfg.epochs, cfg.ema, cfg.head) == (5, 0.0, "gem")
    assert "recipe" not in kept and ku.Config.from_dict(kept | {"recipe": ""}) == cfg  # as version 0.7.0 wrote it


def test_a_recipe_is_no_setting_of_a_config():
    with pytest.raises(TypeError, match="unexpected keyword argument 'recipe'"):
        ku.Config(recipe="quick")
    with pytest.raises(ku.ConfigError, match="there is no setting 'recipe'"):
        ku.InferConfig.from_dict({"recipe": "quick"})


@pytest.mark.parametrize("given", ["strng", ["strong"], 3, None])
def test_a_recipe_that_there_is_not_is_refused_with_the_other_problems(given):
    message = problems_of(recipe=given, epochs=2.5)
    assert f"recipe must be one of quick, strong, max; got {given!r}" in message and "epochs must be" in message
    assert ("(did you mean strong?)" in message) == (given == "strng" or given == ["strong"])


def test_a_misspelt_recipe_gets_the_nearest_setting():
    assert "there is no setting 'recpie' (did you mean recipe?)" in problems_of(recpie="quick")


def test_a_scratch_cell_does_no_harm_to_what_a_recipe_changes(recipe):
    assert from_cells("epochs = 99", "# Settings\nepochs = 3\nrecipe = 'made'").epochs == 5


def test_a_settings_cell_may_compute_from_names_of_other_cells():
    assert from_cells("import math", "# Settings\nlr = math.sqrt(1e-8)").lr == pytest.approx(1e-4, rel=1e-12)


def test_a_blank_line_above_the_title_of_the_settings_cell_does_no_harm():
    assert from_cells("\n\n# Settings\nepochs = 7").epochs == 7


def test_without_a_settings_cell_the_error_says_how_it_begins():
    with pytest.raises(ku.ConfigError, match="# Settings"):
        ku.Config.from_notebook({"In": ["", "epochs = 7"]})


def test_mistakes_in_the_settings_cell_and_in_papermills_come_in_one_error():
    with pytest.raises(ku.ConfigError) as error:
        from_cells("# Settings\nepochs = 2.5", "# Parameters\nheda = 'conv1d'")
    assert "epochs must be" in str(error.value) and "'heda'" in str(error.value)


def exported_config(tmp_path, monkeypatch, change):
    """Config of train.ipynb, changed by `change(notebook)`, exported to a script and run up to the settings."""
    from nbconvert import PythonExporter

    notebook = nbformat.read(NOTEBOOKS / "train.ipynb", 4)
    change(notebook)
    script, _ = PythonExporter().from_notebook_node(notebook)
    last_line = "cfg = ku.Config.from_notebook(globals())\n"
    path = tmp_path / "train.py"
    script = script[: script.index(last_line)] + last_line
    path.write_text(with_this_module(script), encoding="utf-8")
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path / "no_kaggle"))
    monkeypatch.chdir(NOTEBOOKS)
    return runpy.run_path(str(path), run_name="__main__")["cfg"]


def add_after_settings(notebook, *sources):
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells[at + 1 : at + 1] = [nbformat.v4.new_code_cell(source) for source in sources]
    return notebook.cells[at]


def test_an_exported_script_reads_the_settings_from_its_file(tmp_path, monkeypatch):
    def change(notebook):
        cell = add_after_settings(notebook)
        cell.source = cell.source.replace("epochs: int = 3", "epochs: int = 7")

    assert exported_config(tmp_path, monkeypatch, change) == ku.Config(epochs=7)


def test_in_an_exported_script_papermills_cell_counts_and_settings_in_other_cells_are_an_error(tmp_path, monkeypatch):
    def change(notebook, *more):
        add_after_settings(notebook, '# Parameters\nhead = "conv1d"\n', *more)

    assert exported_config(tmp_path, monkeypatch, change) == ku.Config(head="conv1d")
    with pytest.raises(ku.ConfigError, match=r"ema = 0\.9: bound in another cell"):
        exported_config(tmp_path, monkeypatch, lambda notebook: change(notebook, "x = 1", "ema = 0.9"))


@pytest.mark.parametrize(
    "notebook, config",
    [
        ("train.ipynb", ku.Config),
        ("infer.ipynb", ku.InferConfig),
        ("pretrain.ipynb", pretraining.PretrainConfig),
        ("compare.ipynb", comparison.CompareConfig),
        ("blend.ipynb", blending.BlendConfig),
    ],
)
def test_the_tagged_cell_equals_the_config_in_name_type_default_and_help(notebook, config):
    source = tagged_cell(notebook)
    assert source.startswith("# Settings\n")
    lines = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign)]
    assert len(lines) == len(ast.parse(source).body)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    helps = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    fields = {field.name: field for field in dataclasses.fields(config)}
    if config is ku.Config:  # an argument of from_notebook that is no field
        (recipe,) = (line for line in lines if line.target.id == "recipe")
        lines.remove(recipe)
        assert recipe.value.value == "" and all(name in helps[recipe.lineno] for name in ku.RECIPES)
    for line in lines:
        field = fields[line.target.id]
        value = ast.literal_eval(line.value)
        assert (line.annotation.id, value) == (field.type.__name__, field.default)
        assert type(value) is field.type
        assert helps[line.lineno] == f"# {field.metadata['help']}"


@pytest.mark.parametrize(
    "notebook, names",
    [
        ("train.ipynb", EXPOSED),
        ("pretrain.ipynb", EXPOSED_TO_PRETRAIN),
        ("infer.ipynb", [field.name for field in dataclasses.fields(ku.InferConfig)]),
        ("compare.ipynb", [field.name for field in dataclasses.fields(comparison.CompareConfig)]),
        ("blend.ipynb", [field.name for field in dataclasses.fields(blending.BlendConfig)]),
    ],
)
def test_the_tagged_cell_lists_each_setting_once(notebook, names):
    listed = [node.target.id for node in ast.parse(tagged_cell(notebook)).body]
    assert sorted(listed) == sorted(names)


@pytest.mark.parametrize("name, table", [("task", ku.TASKS), ("schedule", ku.SCHEDULES)])
def test_the_help_of_a_setting_names_every_entry_of_its_table(name, table):
    help = next(field.metadata["help"] for field in dataclasses.fields(ku.Config) if field.name == name)
    assert set(table) <= set(re.findall(r"\w+", help))


def test_the_twelve_heads_of_the_design_are_there():
    names = "cls mean max meanmax conv1d lstm bilstm gru concat weighted attention gem".split()
    assert set(names) <= set(ku.HEADS)


@pytest.mark.parametrize(
    "config", [ku.Config, ku.InferConfig, pretraining.PretrainConfig, comparison.CompareConfig, blending.BlendConfig]
)
def test_every_setting_has_a_help_of_one_line(config):
    for field in dataclasses.fields(config):
        assert field.metadata["help"] and "\n" not in field.metadata["help"]


def test_a_scratch_cell_with_a_longer_title_is_not_the_settings_cell():
    cells = ["", "# Settings\nepochs = 7", "# Settings of the plot\nseed = 3", "# Parameters of the plot\nlr = 1.0"]
    with pytest.raises(ku.ConfigError, match=r"seed = 3, lr = 1\.0: bound in another cell"):
        ku.Config.from_notebook({"In": cells, "epochs": 7, "seed": 3, "lr": 1.0})


def test_names_that_the_settings_cell_only_mentions_are_not_settings():
    cells = ["", "# Settings\nlr: float\nconv_kernels = [k for k in (3, 2)]\nseed, epochs = 4, 2"]
    bound = {"conv_kernels": [3, 2], "seed": 4, "epochs": 2}
    cfg = ku.Config.from_notebook({"In": cells, "lr": 0.5, "k": 1} | bound)
    assert (cfg.lr, cfg.conv_kernels, cfg.seed, cfg.epochs) == (0.0, (3, 2), 4, 2)


def test_large_whole_numbers_stay_exact():
    assert ku.Config(max_rows=2**60 + 1).max_rows == 2**60 + 1
