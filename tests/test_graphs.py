"""What only makes a step fast is compared, given up aloud when it fails, and never changes what a run comes to.

Without a GPU: a class stands in for CUDA graphs that computes a captured call anew, in the places that were captured.
"""

import contextlib
import dataclasses
import gc
import itertools
import weakref
from typing import ClassVar

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

    shape = None  # stands for its output, which is not known before

    def new_empty(self, _):
        return self

    def copy_(self, _):
        return self.output


class Graphs(ku._CudaGraphs):
    """Stands in for `_CudaGraphs` on a CPU. Faults are a function's name -> an error, or what a replay calls."""

    capture_faults: ClassVar = {}
    replay_faults: ClassVar = {}

    def __init__(self):
        self.clear()

    def clear(self):
        self.captured = {}

    def on_stream(self):
        return contextlib.nullcontext()

    def forbid_waiting(self):
        return contextlib.nullcontext()

    def capture(self, function, *arguments):
        places = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        fault = self.capture_faults.get(function.__name__)
        if fault:
            function(*places)  # leaves its marks in Python's objects; here in the tensors too
            raise fault
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

    def __init__(self, at, owner, name, runs_first=False, error=None):
        self.at, self.owner, self.name, self.runs_first, self.error = at, owner, name, runs_first, error
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


def begin(cfg):
    engine = engine_of(cfg)
    engine.setup_fold(0, **QUIET)
    engine.model.train()
    engine.losses = []
    return engine


def advance(engine, first, last, fault=None):
    """Make the steps from `first` up to `last` of fold 0."""
    batches = [*ku._epoch_batches(engine.data.tokens.lengths[1::2], 0, engine.cfg, 1)]
    for step in range(first, min(last, len(batches))):
        if fault and step == fault.at:
            fault.is_armed = True
        engine.losses.append(engine(step, 2 * batches[step] + 1).values[0].item())
    assert not (fault and fault.is_armed)


def after_steps(cfg, steps=9, fault=None):
    """The engine after the first steps of fold 0."""
    engine = begin(cfg)
    if fault:
        fault.install(engine)
    advance(engine, 0, steps, fault)
    return engine


def distance(engine, plain):
    """Of the weights and averages of two engines, as a fraction of the way that they have come."""
    way = (state(plain) - state(begin(plain.cfg))).norm()
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
    plain, replayed = (after_steps(dataclasses.replace(cfg, cuda_graphs=on), 18) for on in ("off", "on"))
    adversarial = [("remember",), ("perturb",), ("restore",)] if replayed.is_adversarial else []
    sizes = [("forward_backward_packed", n, min(n, replayed.max_seqlen)) for n in replayed.capture_sizes]
    assert sorted(replayed.run.captured) == sorted([*sizes, *adversarial, ("update",)])
    assert replayed.fallbacks == {} and distance(replayed, plain) < 0.01


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_trial_of_graphs_leaves_the_random_state_as_it_was(precision, tiny, graphs, monkeypatch):
    monkeypatch.setattr(ku.OptimizerStep, "has_static_shapes", property(lambda engine: engine.is_packed))
    cfg = tiny(precision=precision, epochs=6, batch_size=4, lr=1e-2, head_dropout=0.3, backbone_dropout=0.1)
    plain, replayed = (after_steps(dataclasses.replace(cfg, cuda_graphs=on)) for on in ("off", "on"))
    assert replayed.run is replayed.graphs and torch.equal(weights(replayed), weights(plain))
    assert replayed.scaler.state_dict() == plain.scaler.state_dict()


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
REFUSED = RuntimeError("CUDA error: operation not permitted when stream is capturing")
VARIANTS = {
    "fp32": dict(precision="fp32"),
    "fp16, 4 micro-batches": dict(precision="fp16", micro_batch_size=1),
    "fp16": dict(precision="fp16"),
    "fp32, 4 micro-batches": dict(precision="fp32", micro_batch_size=1),
}


def each_variant(names, everyday, *axes):
    """Parametrize with all combinations; those that are not `everyday`, or of a later variant, are nightly."""
    parameters = []
    for place, variant in enumerate(VARIANTS):
        for values in itertools.product(*axes):
            marks = [] if place < 2 and values in everyday else [pytest.mark.nightly]
            parameters.append(pytest.param(variant, *values, marks=marks))
    return pytest.mark.parametrize(f"variant, {names}", parameters)


def settings_of(variant, tiny, **settings):
    regularisers = dict(awp=0.1, adversarial_start=0, ema=0.9)
    return tiny(epochs=6, batch_size=4, lr=1e-2, warmup_ratio=0.3, **regularisers, **VARIANTS[variant], **settings)


@pytest.fixture(scope="module")
def plain_steps():
    """Gives the engine of a variant after plain steps, made once."""
    engines = {}

    def make(variant, cfg):
        if variant not in engines:
            engines[variant] = after_steps(dataclasses.replace(cfg, cuda_graphs="off"))
        return engines[variant]

    return make


def assert_plain(engine, plain, capsys, fallbacks, reason):
    """Weights and losses are those of plain steps, and one line says what was given up and why."""
    assert distance(engine, plain) < (1e-3 if engine.dtype == torch.float32 else 0.03)
    np.testing.assert_allclose(engine.losses, plain.losses, rtol=0.02)
    assert list(engine.fallbacks) == fallbacks
    lines = [line for line in capsys.readouterr().out.splitlines() if "are off" in line or "out of memory" in line]
    assert len(lines) == 1 and reason in lines[0], lines
    assert engine.run is ku._plain_call and not engine.optimizer.param_groups[0]["capturable"]


CALLS = ["forward_backward_packed", "update"]
CAPTURE_ERRORS = [REFUSED, MEMORY, AssertionError("Triton"), TypeError("Dynamo")]


@each_variant("name, error", [(CALLS[0], MEMORY), (CALLS[1], REFUSED)], CALLS, CAPTURE_ERRORS)
def test_a_capture_that_fails_leaves_a_run_as_without_graphs(variant, name, error, tiny, graphs, plain_steps, capsys):
    cfg = settings_of(variant, tiny, cuda_graphs="on")
    graphs.capture_faults[name] = error
    assert_plain(after_steps(cfg), plain_steps(variant, cfg), capsys, ["CUDA graphs"], type(error).__name__)


def twice(function):
    return lambda *arguments: [function(*arguments) for _ in range(2)][1]


def never(function):
    return lambda *arguments: torch.zeros(4)


@each_variant("name, wrong", [(CALLS[0], twice), (CALLS[1], never)], CALLS, [twice, never])
def test_graphs_that_compute_something_else_are_off_and_change_nothing(
    variant, name, wrong, tiny, graphs, plain_steps, capsys
):
    cfg = settings_of(variant, tiny, cuda_graphs="on")
    graphs.replay_faults[name] = wrong
    assert_plain(after_steps(cfg), plain_steps(variant, cfg), capsys, ["CUDA graphs"], "they come to other")


def test_graphs_that_tell_other_losses_are_off(tiny, graphs, plain_steps, capsys):
    cfg = settings_of("fp32", tiny, cuda_graphs="on")
    graphs.replay_faults["update"] = lambda update: lambda: 2 * update()
    assert_plain(after_steps(cfg), plain_steps("fp32", cfg), capsys, ["CUDA graphs"], "they come to other losses")


PHASES = {
    "forward": ("model", "forward"),
    "backward": ("", "forward_backward", True),
    "clip": ("", "reduce_loss"),
    "optimiser": ("optimizer", "step"),
}
EVERYDAY = [("backward", 3, MEMORY), ("forward", 5, MEMORY), ("optimiser", 5, REFUSED)]


@each_variant("phase, at, error", EVERYDAY, PHASES, [3, 5], [MEMORY, REFUSED])
def test_an_error_in_the_trial_of_graphs_or_in_a_replay_gives_up_graphs_alone(
    variant, phase, at, error, tiny, graphs, plain_steps, capsys
):
    cfg = settings_of(variant, tiny, cuda_graphs="on")
    engine = after_steps(cfg, fault=Fault(at, *PHASES[phase], error=error))
    assert_plain(engine, plain_steps(variant, cfg), capsys, ["CUDA graphs"], type(error).__name__)
    assert engine.is_packed and engine.micro_batch_size == (cfg.micro_batch_size or cfg.batch_size)


def test_an_error_of_the_static_shapes_before_the_trial_gives_up_graphs_alone(tiny, graphs, plain_steps, capsys):
    cfg = settings_of("fp32", tiny, cuda_graphs="on")
    engine = after_steps(cfg, fault=Fault(1, *PHASES["forward"], error=REFUSED))
    assert_plain(engine, plain_steps("fp32", cfg), capsys, ["CUDA graphs"], "not permitted")
    assert engine.is_packed


def test_graphs_that_find_no_step_to_be_compared_by_are_given_up_aloud(tiny, graphs, monkeypatch, plain_steps, capsys):
    monkeypatch.setattr(ku, "_MAX_TRIALS", 2)
    monkeypatch.setattr(ku.OptimizerStep, "rows_that_fit", lambda engine, rows, size: rows[:0])
    cfg = settings_of("fp32", tiny, cuda_graphs="on")
    assert_plain(after_steps(cfg), plain_steps("fp32", cfg), capsys, ["CUDA graphs"], "no step was found")


def test_graphs_may_be_tried_anew_as_often_as_adversarial_steps_begin_and_end(tiny, graphs, monkeypatch):
    monkeypatch.setattr(ku, "_MAX_TRIALS", 1)
    engine = after_steps(tiny(epochs=6, batch_size=4, awp=0.1, adversarial_start=2, cuda_graphs="on"), 12)
    assert engine.is_adversarial and engine.run is engine.graphs and not engine.fallbacks


def test_a_step_and_its_optimiser_do_not_keep_each_other_in_memory(tiny):
    engine = begin(tiny())
    engine(0, np.arange(4))
    optimizer = weakref.ref(engine.optimizer)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert optimizer() is None
    finally:
        gc.enable()


@each_variant("phase, at", [("forward", 1), ("optimiser", 0), ("clip", 1)], PHASES, [0, 1])
def test_an_error_of_a_plain_step_gives_up_packed_rows(variant, phase, at, tiny, plain_steps, capsys):
    cfg = settings_of(variant, tiny, cuda_graphs="off")
    engine = after_steps(cfg, fault=Fault(at, *PHASES[phase], error=REFUSED))
    assert_plain(engine, plain_steps(variant, cfg), capsys, ["packed rows"], "not permitted")
    assert not engine.is_packed and "not permitted" in engine.model.packing_errors[engine.dtype]


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_lack_of_memory_in_a_plain_step_halves_the_micro_batch(phase, at, tiny, plain_steps, capsys):
    cfg = settings_of("fp32", tiny, cuda_graphs="off")
    engine = after_steps(cfg, fault=Fault(at, *PHASES[phase], error=MEMORY))
    assert_plain(engine, plain_steps("fp32", cfg), capsys, [], "out of memory with 4 rows")
    assert engine.is_packed and engine.micro_batch_size == 2


def test_a_first_update_that_stops_half_way_is_undone(tiny, plain_steps, capsys):
    """It is the one that asks for the memory of the moments."""

    class Halfway(Fault):
        def install(self, engine):
            def fail(*_):
                if self.is_armed:
                    self.is_armed = False
                    engine.model.output.weight.data.add_(1)
                    engine.optimizer.state[engine.model.output.weight]["step"] = torch.ones(())
                    raise self.error

            engine.optimizer.register_step_pre_hook(fail)

    cfg = settings_of("fp32", tiny, cuda_graphs="off")
    engine = after_steps(cfg, fault=Halfway(0, "", "", error=MEMORY))
    assert_plain(engine, plain_steps("fp32", cfg), capsys, [], "out of memory with 4 rows")
    with pytest.raises(torch.OutOfMemoryError):  # later nothing could undo it
        after_steps(cfg, fault=Halfway(1, "", "", error=MEMORY))


def test_an_error_that_is_not_of_the_fast_path_is_raised_without_other_words(tiny, capsys):
    cfg = settings_of("fp32", tiny, cuda_graphs="off")

    class Mistake(Fault):
        def install(self, engine):
            engine.model.head.forward = lambda *_: 1 / 0

    with pytest.raises(ZeroDivisionError):
        after_steps(cfg, fault=Mistake(9, "", ""))
    assert "are off" not in capsys.readouterr().out


def test_compiled_layers_that_fail_are_given_up_before_packed_rows(tiny, plain_steps, capsys, monkeypatch):
    def compile(module, **options):
        module._compiled_call_impl = lambda *_, **__: exec("raise TypeError('meta function')")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    cfg = settings_of("fp32", tiny, cuda_graphs="off")
    engine = after_steps(dataclasses.replace(cfg, compile=True))
    assert_plain(engine, plain_steps("fp32", cfg), capsys, ["compiled layers"], "TypeError: meta function")
    assert engine.is_packed


@each_variant("error", [(MEMORY,), (REFUSED,)], [MEMORY, REFUSED])
def test_an_evaluation_that_fails_gives_up_graphs_for_lack_of_memory_and_else_packed_rows(
    variant, error, tiny, graphs, plain_steps, capsys
):
    cfg = settings_of(variant, tiny, cuda_graphs="on")
    engine = after_steps(cfg, steps=6)
    assert engine.run is engine.graphs
    expected = ku.predict(engine.model, engine.data.tokens, engine.cfg)
    fault = Fault(0, "model", "forward", error=error)
    fault.install(engine)
    fault.is_armed = True
    np.testing.assert_allclose(engine.predict(np.arange(24)), expected, atol=1e-5 if "32" in variant else 0.02)
    advance(engine, 6, 9)
    reason = "evaluation needs their memory" if error is MEMORY else "not permitted"
    fallback = "CUDA graphs" if error is MEMORY else "packed rows"
    assert_plain(engine, plain_steps(variant, cfg), capsys, [fallback], reason)


def test_what_was_given_up_stays_so_in_later_folds_checkpoints_and_the_record(tiny, graphs, monkeypatch, capsys):
    graphs.capture_faults["update"] = REFUSED
    cfg = tiny(epochs=3, cuda_graphs="on")
    train, _, _ = ku.read_competition(cfg)
    folder = ku.train(ku.make_folds(train, cfg), cfg)
    assert capsys.readouterr().out.count("CUDA graphs are off") == 1
    folds = ku.RunFolder(folder).read_record()["folds"]
    assert len(folds) == 2 and all("not permitted" in fold["fallbacks"]["CUDA graphs"] for fold in folds)
    other = begin(cfg)
    assert other.is_captured
    other.load_state_dict(after_steps(cfg).state_dict())
    assert not other.is_captured and other.fallbacks == {"CUDA graphs": folds[0]["fallbacks"]["CUDA graphs"]}


# ---------------------------------------------------------------------------------------
# On a GPU


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def on_gpu(tiny, steps=36, **settings):
    return after_steps(tiny(**dict(epochs=20, cuda_graphs="on") | settings), steps)


def assert_graphs(engine):
    assert engine.run is engine.graphs and engine.graphs.captured and not engine.fallbacks


@gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_in_cuda_graphs_give_the_weights_of_steps_without(settings, precision, tiny):
    if precision == "bf16" and ku._precision_error("bf16"):
        pytest.skip(ku._precision_error("bf16"))
    settings = settings | dict(precision=precision, warmup_ratio=0.3, lr=1e-3)
    graphed, plain = (on_gpu(tiny, 40, cuda_graphs=graphs, **settings) for graphs in ("on", "off"))
    assert_graphs(graphed)
    assert not plain.is_captured and distance(graphed, plain) < (0.05 if precision == "fp32" else 0.1)


@gpu
def test_a_steady_step_never_waits_for_the_gpu(tiny):
    engine = on_gpu(tiny, head_dropout=0.1, backbone_dropout=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(36, 40):
            engine(step, np.arange(1, 11, 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_graphs(engine)


@gpu
def test_replays_draw_new_dropout_masks(tiny):
    engine = on_gpu(tiny, head_dropout=0.5, lr=1e-9, head_lr=1e-9)
    losses = {engine(36, np.arange(1, 11, 2)).values[0].item() for _ in range(4)}
    assert_graphs(engine)
    assert len(losses) == 4


@gpu
def test_a_head_that_waits_switches_graphs_off_aloud_and_trains_all_the_same(tiny, capsys):
    graphed, plain = (on_gpu(tiny, 6, head="lstm", cuda_graphs=graphs) for graphs in ("on", "off"))
    assert "CUDA graphs are off: RuntimeError: the model, its head or its loss waits" in capsys.readouterr().out
    assert not graphed.is_captured and distance(graphed, plain) < 0.05


@gpu
def test_a_capture_that_cuda_ends_leaves_a_generator_that_draws_and_memory_that_is_freed(tiny):
    cfg = tiny(epochs=20, cuda_graphs="on", head_dropout=0.1, backbone_dropout=0.1)
    engine = begin(cfg)
    forward = engine.model.head.forward

    def waits_in_captures(*arguments):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return forward(*arguments)

    engine.model.head.forward = waits_in_captures
    for step in range(8):
        engine(step, np.arange(1, 11, 2))
    assert list(engine.fallbacks) == ["CUDA graphs"] and weights(engine).isfinite().all()
    assert "previous error" not in engine.fallbacks["CUDA graphs"]  # the cause, not what it led to
    assert torch.rand(4, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.empty(2**28, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved


@gpu
def test_graphs_are_made_once_for_all_folds(tiny):
    engine = on_gpu(tiny, precision="fp32")
    captured = dict(engine.run.captured)
    engine.setup_fold(1, **QUIET)
    for step in range(4):
        engine(step, np.arange(0, 10, 2))
    assert captured and all(engine.run.captured[name] is graph for name, graph in captured.items())


@gpu
def test_attention_dropout_trains_packed_rows_with_the_memory_efficient_kernel(tiny):
    engine = on_gpu(tiny, backbone_dropout=0.1)
    assert_graphs(engine)
    assert engine.is_packed and weights(engine).isfinite().all()


@gpu
def test_memory_that_runs_out_over_packed_rows_halves_the_micro_batches(tiny, monkeypatch, capsys):
    forward_backward = ku.OptimizerStep.forward_backward

    def limited(engine, inputs, rows):
        if len(rows) > 4:
            raise MEMORY
        return forward_backward(engine, inputs, rows)

    monkeypatch.setattr(ku.OptimizerStep, "forward_backward", limited)
    engine = on_gpu(tiny, precision="fp32")
    assert_graphs(engine)
    assert engine.micro_batch_size == 4 and "out of memory with 8 rows" in capsys.readouterr().out


@gpu
@pytest.mark.slow
def test_a_compiled_step_in_cuda_graphs_gives_the_weights_of_plain_steps(tiny):
    settings = dict(precision="fp32", lr=1e-3)
    both, plain = on_gpu(tiny, compile=True, **settings), on_gpu(tiny, cuda_graphs="off", **settings)
    assert_graphs(both)
    assert both.is_compiled and distance(both, plain) < 0.05
