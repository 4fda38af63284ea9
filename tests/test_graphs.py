"""What only makes a step fast is compared, given up aloud when it fails, and never changes what a run comes to.

Without a GPU: a class stands in for CUDA graphs that computes a captured call anew, in the places that were captured.
"""

import contextlib
import dataclasses

import kernel_utils as ku
import numpy as np
import pytest
import torch
from conftest import engine_of, weights

QUIET = dict(say=lambda text: None)


class Replay:
    """A captured call: a replay computes it from the arguments in the captured places."""

    def __init__(self, function, places):
        self.function, self.places, self.output = function, places, None

    def replay(self):
        self.output = self.function(*self.places)

    def clone(self):
        return self.output


class Graphs(ku._CudaGraphs):
    """Stands in for `_CudaGraphs` on a CPU; `faults` name what fails: a function's name -> how."""

    capture_faults = {}
    replay_faults = {}

    def __init__(self):
        self.clear()

    def clear(self):
        self.captured = {}

    def on_stream(self):
        return contextlib.nullcontext()

    def forbid_waiting(self):
        return contextlib.nullcontext()

    def capture(self, function, *arguments):
        fault = self.capture_faults.get(function.__name__)
        if fault:
            raise fault
        places = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        graph = Replay(self.replay_faults.get(function.__name__, lambda f: f)(function), places)
        return graph, places, graph


@pytest.fixture
def graphs(monkeypatch):
    """The class that stands in; engines made with cuda_graphs "on" use it."""
    monkeypatch.setattr(ku, "_CudaGraphs", Graphs)
    monkeypatch.setattr(ku.OptimizerStep, "can_capture", lambda step: step.cfg.cuda_graphs == "on")
    for name in ("capture_faults", "replay_faults"):
        monkeypatch.setattr(Graphs, name, {})
    return Graphs


class Fault:
    """An error that one call of a method of the engine, its model or its optimiser raises in the step `at`."""

    def __init__(self, at, owner, name, error, runs_first=False):
        self.at, self.owner, self.name, self.error, self.runs_first = at, owner, name, error, runs_first
        self.is_armed = False

    def install(self, engine):
        owner = getattr(engine, self.owner) if self.owner else engine
        method = getattr(owner, self.name)

        def failing(*arguments, **options):
            if not self.is_armed:
                return method(*arguments, **options)
            self.is_armed = False
            if self.runs_first:
                method(*arguments, **options)
            raise self.error

        setattr(owner, self.name, failing)


def after_steps(cfg, steps=9, fault=None):
    """The engine after the first steps of fold 0."""
    engine = engine_of(cfg)
    engine.setup_fold(0, **QUIET)
    if fault:
        fault.install(engine)
    engine.model.train()
    batches = ku._epoch_batches(engine.data.tokens.lengths[1::2], 0, engine.cfg, 1)
    for step, batch in zip(range(steps), batches, strict=False):
        if fault and step == fault.at:
            fault.is_armed = True
        engine(step, 2 * batch + 1)
    assert not (fault and fault.is_armed)
    return engine


def distance(engine, plain):
    """Of the weights and averages of two engines, as a fraction of the way that they have come."""
    start = engine_of(plain.cfg)
    start.setup_fold(0, **QUIET)
    way = (state(plain) - state(start)).norm()
    assert way > 0.01
    return (state(engine) - state(plain)).norm() / way


def state(engine):
    means = engine.average.means.values() if engine.average else []
    return torch.cat([weights(engine), *(mean.flatten().cpu() for mean in means)])


SETTINGS = [
    dict(),
    dict(micro_batch_size=2, llrd=0.8),
    dict(loss="rmse", max_grad_norm=0.1),
    dict(awp=0.1, adversarial_start=2, ema=0.9),
    dict(fgm=0.1, adversarial_start=0, swa_start=2),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_in_graphs_give_the_weights_of_plain_steps(settings, tiny, graphs):
    cfg = tiny(epochs=6, batch_size=4, lr=2e-2, warmup_ratio=0.3, **settings)
    plain, replayed = (after_steps(dataclasses.replace(cfg, cuda_graphs=on), steps=18) for on in ("off", "on"))
    adversarial = [("remember",), ("perturb",), ("restore",)] if replayed.is_adversarial else []
    sizes = [("forward_backward_packed", n, min(n, replayed.max_seqlen)) for n in replayed.capture_sizes]
    assert sorted(replayed.run.captured) == sorted([*sizes, *adversarial, ("update",)])
    assert replayed.fallbacks == {} and distance(replayed, plain) < 0.01


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
REFUSED = RuntimeError("CUDA error: operation not permitted when stream is capturing")
VARIANTS = {
    "fp32": dict(precision="fp32"),
    "fp16 accumulated": dict(precision="fp16", micro_batch_size=1, awp=0.1, adversarial_start=0, ema=0.9),
    "fp16": dict(precision="fp16", awp=0.1, adversarial_start=0, ema=0.9),
    "fp32 accumulated": dict(precision="fp32", micro_batch_size=1),
}
variants = pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.nightly] * (place > 1)) for place, name in enumerate(VARIANTS)],
)


def settings_of(variant, tiny):
    return tiny(epochs=6, batch_size=4, lr=1e-2, warmup_ratio=0.3, cuda_graphs="on", **VARIANTS[variant])


@pytest.fixture(scope="module")
def plain_steps():
    """Gives the engine of a variant after plain steps, made once."""
    engines = {}

    def make(variant, cfg):
        if variant not in engines:
            engines[variant] = after_steps(dataclasses.replace(cfg, cuda_graphs="off"))
        return engines[variant]

    return make


def assert_plain(engine, plain, capsys, given_up, reason):
    """The weights are those of plain steps, and one line says why something was given up."""
    assert distance(engine, plain) < (1e-3 if engine.dtype == torch.float32 else 0.03)
    assert list(engine.fallbacks) == given_up
    lines = [line for line in capsys.readouterr().out.splitlines() if "are off" in line or "out of memory" in line]
    assert len(lines) == 1 and reason in lines[0], lines
    assert not engine.run == engine.graphs and not engine.optimizer.param_groups[0]["capturable"]


@variants
@pytest.mark.parametrize("error", [REFUSED, MEMORY, AssertionError("Triton"), TypeError("Dynamo")], ids=repr)
@pytest.mark.parametrize("name", ["forward_backward_packed", "update"])
def test_a_capture_that_fails_leaves_a_run_as_without_graphs(
    name, error, variant, tiny, graphs, plain_steps, capsys
):
    cfg = settings_of(variant, tiny)
    graphs.capture_faults[name] = error
    engine = after_steps(cfg)
    assert_plain(engine, plain_steps(variant, cfg), capsys, ["CUDA graphs"], type(error).__name__)


def twice(function):
    return lambda *arguments: [function(*arguments) for _ in range(2)][1]


def never(function):
    return lambda *arguments: torch.zeros(4)


@variants
@pytest.mark.parametrize("name", ["forward_backward_packed", "update"])
@pytest.mark.parametrize("wrong", [twice, never])
def test_graphs_that_compute_something_else_are_off_and_change_nothing(
    wrong, name, variant, tiny, graphs, plain_steps, capsys
):
    cfg = settings_of(variant, tiny)
    graphs.replay_faults[name] = wrong
    engine = after_steps(cfg)
    assert_plain(engine, plain_steps(variant, cfg), capsys, ["CUDA graphs"], "they come to other")


PHASES = {
    "forward": ("model", "forward"),
    "backward": ("", "forward_backward", True),
    "clip": ("", "reduce_loss"),
    "optimiser": ("optimizer", "step"),
}


@variants
@pytest.mark.parametrize("error", [MEMORY, REFUSED], ids=repr)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("at", [3, 5])
def test_an_error_while_graphs_are_tried_or_replayed_gives_up_graphs_alone(
    at, phase, error, variant, tiny, graphs, plain_steps, capsys
):
    cfg = settings_of(variant, tiny)
    owner, name, *runs_first = PHASES[phase]
    engine = after_steps(cfg, fault=Fault(at, owner, name, error, *runs_first))
    assert_plain(engine, plain_steps(variant, cfg), capsys, ["CUDA graphs"], type(error).__name__)
    assert engine.is_packed and engine.micro_batch_size == cfg.micro_batch_size or cfg.batch_size
