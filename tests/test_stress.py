"""The quick form of tools/dev/stress.py finds nothing in the kit, and finds a kit that is broken on purpose."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def python(folder, *arguments):
    """A process of its own: what runs in pytest must not fork. What it keeps is below `folder`."""
    command, environment = [sys.executable, *map(str, arguments)], os.environ | {"TMPDIR": str(folder)}
    tools = ROOT / "tools" / "dev"
    return subprocess.run(command, cwd=tools, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Function: a group -> its row of the table, and what the tool printed. It runs once."""
    folder = tmp_path_factory.mktemp("stress")
    path = folder / "stress.csv"
    done = python(folder, "stress.py", "--quick", "-o", path)
    assert path.is_file(), done.stdout + done.stderr
    table = pd.read_csv(path).set_index("group")
    return lambda group: (table.loc[group], done.stdout)


def check(row, printed, *words):
    assert row["cases"] > 0
    assert (row[list(words)] == row["cases"]).all(), printed
    assert (row[["silently different", "crashed"]] == 0).all(), printed


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(quick):
    row, printed = quick("kills")
    check(row, printed, "resumed", "equal")
    assert row["cases"] >= 12
    assert row["began anew"] < row["cases"]


def test_a_kill_at_any_call_that_changes_a_file_costs_the_step_under_way_at_most(quick):
    check(*quick("boundaries"), "resumed", "equal")


def test_a_kill_inside_a_write_costs_the_step_under_way_at_most(quick):
    check(*quick("bytes"), "resumed", "equal")


def test_a_disk_that_fails_is_explained_and_what_was_saved_stays_good(quick):
    check(*quick("errors"), "resumed", "equal", "detected")


def test_a_write_that_fails_is_explained_and_what_was_saved_stays_good(quick):
    check(*quick("limits"), "resumed", "equal", "detected")


def test_a_second_fault_soon_after_a_kill_does_no_more_harm(quick):
    check(*quick("restarts"), "resumed", "equal")


def test_damage_is_said_aloud_and_what_was_saved_before_is_used(quick):
    check(*quick("damage"), "resumed", "equal", "detected")


def test_a_flipped_bit_is_noticed_wherever_it_is(quick):
    check(*quick("flips"), "detected")


def test_sigterm_and_ctrl_c_stop_a_run_that_then_goes_on_without_loss(quick):
    check(*quick("signals"), "resumed", "equal", "detected")


@pytest.mark.parametrize(
    ("broken", "group", "case", "verdict"),
    [
        ("_SealedFolder.problems = lambda folder: []", "damage", 11, "silently different"),
        ("_RandomStates.load_state_dict = lambda self, state: None", "restarts", 1, "silently different"),
        ("_Checkpoints.load = lambda self, parts: False", "restarts", 1, "not resumed"),
    ],
)
def test_a_kit_that_is_broken_is_reported(broken, group, case, verdict, tmp_path):
    arguments = ["--quick", "--only", group, "--case", case]
    program = f"import stress; stress.ku.{broken}; stress.main()"
    done = python(tmp_path, "-c", program, *arguments)
    assert done.returncode == 1
    assert f"{group}-{case}: {verdict}" in done.stdout, done.stdout + done.stderr


def test_the_comparison_with_the_trainer_names_the_package_it_needs(tmp_path):
    program = "import stress; stress.importlib.util.find_spec = lambda name: None; stress.main()"
    done = python(tmp_path, "-c", program, "--trainer")
    assert done.returncode == 1
    assert "--trainer needs the package accelerate: pip install accelerate==" in done.stderr
