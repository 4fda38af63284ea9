"""What the module does to the process that it is imported into, and what it reads of it."""

import csv
import os
import resource
import subprocess
import sys
import warnings

import kernel_utils as ku
import pytest
import torch

from conftest import ROOT

IMPORTS = """
import csv, os, re, warnings
import pandas, safetensors.torch, scipy.stats, sklearn.linear_model, sklearn.model_selection, torch, tqdm.auto
import transformers.integrations.sdpa_attention, transformers.masking_utils

def state():
    ours = [kept for kept in warnings.filters if kept[1] and re.search("IProgress|capturable", kept[1].pattern)]
    return dict(os.environ) == environment, ours, torch.backends.cudnn.allow_tf32, csv.field_size_limit()

environment = dict(os.environ)
before = state()
import kernel_utils
assert state() == before == (True, [], True, 131072), state()
"""


def test_importing_the_module_changes_no_variable_no_warning_filter_and_no_setting_of_torch():
    names = ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    environment = clean | {"PYTHONPATH": str(ROOT / "kernel_utils")}
    subprocess.run([sys.executable, "-c", IMPORTS], env=environment, check=True, timeout=300)


def test_training_and_prediction_set_what_they_need_of_the_process(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with warnings.catch_warnings(record=True) as shown:
        ku._prepare_process()
        warnings.warn("a step with capturable=True", stacklevel=1)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and not torch.backends.cudnn.allow_tf32 and not shown


def test_a_variable_that_is_set_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    ku._prepare_process()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_what_onednn_would_keep_for_each_shape_is_not_kept(capfd):
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        for _ in range(2):
            torch.nn.functional.gelu(torch.ones(16, 16))
    lines = [line for line in capfd.readouterr().out.splitlines() if "eltwise" in line and "create" in line]
    if not lines:
        pytest.skip("this PyTorch computes gelu without oneDNN")
    assert len(lines) == 2 and not any("cache_hit" in line for line in lines)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_cpu_that_multiplies_matrices_with_onednn_keeps_its_cache(has_bf16, monkeypatch):
    monkeypatch.setattr(ku, "_is_bf16_cpu", lambda: has_bf16)
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    ku._prepare_process()
    assert os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == (None if has_bf16 else "0")


@pytest.mark.parametrize("text", ["id,excerpt\n1,a cat\n", 'id,excerpt\n1,"a cat\n'])
def test_checking_a_table_leaves_the_limit_of_csv_as_it_was(text, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    limit = csv.field_size_limit()
    try:
        ku._Table.read(tmp_path / "train.csv", ["id"])
    except ku.DataError:
        assert text.count('"') == 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t  5 kB\n"])
def test_peak_memory_is_getrusages_where_the_kernel_does_not_tell_it(status, monkeypatch):
    def read_text(path):
        if status is None:
            raise FileNotFoundError(path)
        return status

    monkeypatch.setattr(ku.Path, "read_text", read_text)
    unit = 1 if sys.platform == "darwin" else 1024
    assert ku._peak_memory() == unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_peak_memory_is_the_high_water_mark_where_there_is_one(monkeypatch):
    monkeypatch.setattr(ku.Path, "read_text", lambda path: "VmPeak:\t 900 kB\nVmHWM:\t  700 kB\nVmRSS:\t 500 kB\n")
    assert ku._peak_memory() == 700 * 1024
