"""What the module does to the process that it is imported into, and what it reads of it."""

import csv
import ctypes
import itertools
import os
import platform
import resource
import subprocess
import sys
import types
import warnings

import kernel_utils as ku
import pytest
import torch

from conftest import ROOT, Forked

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


def resident_bytes():
    return int(ku.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_freed_memory_that_glibc_keeps_is_returned():
    def measure():
        ctypes.CDLL(None).mallopt(-3, 2**25)  # where glibc gets by itself when large blocks are freed
        blocks = [torch.ones(2**19) for _ in range(100)]
        rss = [resident_bytes()]
        del blocks[::2]
        rss.append(resident_bytes())
        ku._return_freed_memory()
        rss.append(resident_bytes())
        kept, returned = ((before - after) / (50 * 2**21) for before, after in itertools.pairwise(rss))
        sys.exit(not (abs(kept) < 0.1 and returned > 0.9) and f"{kept:.0%}, then {returned:.0%} came back")

    process = Forked(measure, stderr=subprocess.PIPE, text=True)
    assert process.communicate()[1] == "" and process.returncode == 0


def test_a_fold_returns_freed_memory_every_ten_steps(tiny, monkeypatch):
    steps, calls = [], []
    step = ku.OptimizerStep.__call__
    monkeypatch.setattr(ku.OptimizerStep, "__call__", lambda *rest: steps.append(1) or step(*rest))
    monkeypatch.setattr(ku, "_return_freed_memory", lambda: calls.append(len(steps)))
    cfg = tiny(epochs=8, run_folds="0")
    ku.train(ku.make_folds(ku.read_competition(cfg)[0], cfg), cfg)
    assert len(steps) == 24 and calls == [10, 20]


@pytest.mark.parametrize("problem", [AttributeError, OSError, TypeError])  # musl and macOS; no libc; Windows
def test_without_glibc_no_memory_is_returned_and_nothing_fails(problem, monkeypatch):
    def load(name):
        if problem is AttributeError:
            return types.SimpleNamespace()
        raise problem

    monkeypatch.setattr(ctypes, "CDLL", load)
    ku._return_freed_memory()


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
