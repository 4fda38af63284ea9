"""Prediction on a CPU with OpenVINO, for infer.ipynb with engine = "openvino".

OpenVINO runs the backbone, which is nearly all of the work, on padded rows; the head stays
PyTorch's, in float32. Each fold is predicted in the first of int8, bf16 and fp32 that agrees with
PyTorch and is faster, or else by PyTorch; one printed line a trial says which and why.

    bundle = openvino_engine.OpenvinoBundle.of(ku.load_bundle(folder))
    predictions = ku.predict_bundle(bundle, test)

tools/bundle.py calls `write_int8` at home, where the training texts and the package nncf are. What
needs no texts is made where it is used: bf16 is fp32 with a hint to OpenVINO.
"""

import contextlib
import dataclasses
import importlib.util
import os
import time
import types
import warnings

import numpy as np
import pandas as pd
import torch
from torch import nn

import kernel_utils as ku

PRECISIONS = ("int8", "bf16", "fp32")  # the fastest first

# Root mean square distance from float32 that is allowed, in standard deviations of the target (for
# probabilities, in units of 1). It turns an RMSE r into sqrt(r^2 + 0.04^2) where errors are
# independent: 0.5 % more where r is 0.4.
TOLERANCE = 0.04
PROBE_ROWS = 32  # texts of each fold that PyTorch predicts too
MAX_SECONDS = 0.95  # of PyTorch's for these texts: two timings of the same differ by less
MIN_ROWS = 1000  # fewer texts are predicted sooner than a model is converted, compiled and tried
CALIBRATION_ROWS = 300  # training texts that show int8 the range of every activation


# ---------------------------------------------------------------------------------------
# Models of OpenVINO


class _TracedBackbone(nn.Module):
    """A backbone from token tensors, in the order of `names`, to its L + 1 hidden states."""

    def __init__(self, backbone, names):
        super().__init__()
        self.backbone = backbone
        self.names = names

    def forward(self, *tensors):
        inputs = dict(zip(self.names, tensors, strict=True))
        out = self.backbone(**inputs, output_hidden_states=True)
        return (*out.hidden_states[:-1], out.last_hidden_state)


def convert_backbone(run, fold, tokens):
    """The backbone of a fold as an `ov.Model` that takes batches of any size (B, T).

    It is built with Hugging Face's own attention: ours has Python code that depends on lengths.
    `openvino.convert_model` does the same and more: it would report its use over the network.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    eager = dataclasses.replace(run.cfg, attention="eager")
    _, model = run._replace(cfg=eager).open()
    run.load_fold(model, fold)
    inputs = tokens.windows.batch(np.arange(min(2, len(tokens))), torch.device("cpu"))
    if not model.uses_token_types:
        inputs.pop("token_type_ids", None)
    backbone = _TracedBackbone(model.eval().backbone, list(inputs))
    example = tuple(inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: branches, and that it is deprecated
        traced = torch.jit.trace(backbone, example, check_trace=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(traced, example_input=example)
        converted = frontend.convert(frontend.load(decoder))
    for port, name in zip(converted.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    return converted


def _compile_backbone(model, precision):
    """An `ov.Model` as a `_CompiledBackbone`."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # all threads work on one batch, as PyTorch's do
    }
    return _CompiledBackbone(openvino.Core().compile_model(model, "CPU", options))


class _CompiledBackbone(nn.Module):
    """Takes the place of `TextModel.backbone` in evaluation."""

    def __init__(self, compiled):
        super().__init__()
        self.request = compiled.create_infer_request()

    def forward(self, output_hidden_states=True, **inputs):
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs = self.request.infer(arrays, share_inputs=True, share_outputs=True)
        states = [torch.from_numpy(array) for array in outputs.to_tuple()]
        return types.SimpleNamespace(hidden_states=states, last_hidden_state=states[-1])


@contextlib.contextmanager
def _replace_backbone(model, backbone):
    """Within the context the model has another backbone, which takes padded rows alone."""
    own = model.backbone, model.packing_errors
    model.backbone, model.packing_errors = backbone, {None: "OpenVINO takes padded rows"}
    try:
        yield
    finally:
        model.backbone, model.packing_errors = own


# ---------------------------------------------------------------------------------------
# int8, made at home


def write_int8(run, folder):
    """Write the backbone of every fold in int8; {fold: [file of the graph, file of its weights]}.

    Static post-training quantisation, arXiv:2002.08679 (NNCF), calibrated on texts that the run was
    trained on. Weights have 7 bits: without VNNI a CPU adds pairs of products in 16 bits, which
    overflow with 8. KitError where the texts are gone or nncf is missing.
    """
    if not (importlib.util.find_spec("nncf") and importlib.util.find_spec("openvino")):
        raise ku.KitError("int8 needs the packages openvino and nncf: pip install openvino nncf")
    os.environ.setdefault("NNCF_CI", "1")  # it would report its use over the network
    import nncf
    import openvino

    try:
        frame, _, _ = ku.read_competition(run.cfg)
    except ku.KitError as error:
        problem = "int8 is calibrated on the training texts, and they cannot be read again"
        raise ku.KitError(f"{run.name}: {problem}: {error}") from error
    sample = frame.sample(min(CALIBRATION_ROWS, len(frame)), random_state=0)
    tokens = ku._tokenize(sample.reset_index(drop=True), run.open()[0], run.cfg).windows
    rows = np.linspace(0, len(tokens) - 1, len(sample)).astype(int)  # as many windows as texts
    files = {}
    for fold in run.weights:
        converted = convert_backbone(run, fold, tokens)
        names = [port.any_name for port in converted.inputs]

        def arrays_of(row, names=names):
            batch = tokens.batch([row], torch.device("cpu"))
            return {name: batch[name].numpy() for name in names}

        fix = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
        quantized = nncf.quantize(
            converted,
            nncf.Dataset(rows, arrays_of),
            subset_size=len(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=fix,
        )
        quantized.set_friendly_name(run.name)
        for number, node in enumerate(quantized.get_ordered_ops()):  # names count on in a process
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
        graph = folder / f"{run.name}.fold{fold}.int8.xml"
        openvino.save_model(quantized, graph)
        files[fold] = [graph, graph.with_suffix(".bin")]
    return files


def _read_int8_files(folder):
    """{(run, fold): (graph, weights)} of a bundle; of a folder without a manifest, nothing."""
    if not (folder / ku._MANIFEST).is_file():
        return {}
    manifest = ku._read_bundle_manifest(folder)
    files = {}
    try:
        for name, entry in manifest["runs"].items():
            for fold, (graph, weights) in entry.get("int8", {}).items():
                manifest["files"][graph], manifest["files"][weights]  # those that are verified
                files[name, int(fold)] = folder / graph, folder / weights
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"int8 is malformed ({type(error).__name__}: {error})"
        raise ku.BundleError(f"{folder / ku._MANIFEST}: {problem}") from None
    return files


# ---------------------------------------------------------------------------------------
# Prediction


class _Trial:
    """What a fold must predict: golden rows as in training, and some texts as PyTorch does here."""

    def __init__(self, run, fold, model, tokenizer, tokens, cfg, is_timed):
        self.run, self.model, self.cfg = run, model, cfg
        golden = [row for row in run.golden["rows"] if row["fold"] == fold]
        cells = pd.DataFrame([row["cells"] for row in golden])
        self.golden_tokens = ku._tokenize(cells, tokenizer, cfg)
        self.golden = np.array([row["prediction"] for row in golden])
        by_length = np.argsort(tokens.lengths, kind="stable")
        places = np.linspace(0, len(tokens) - 1, min(PROBE_ROWS, len(tokens)))
        self.tokens, self.rows = tokens, by_length[places.astype(int)]
        self.probe, self.seconds = self.predict_probe(is_timed)

    def predict_probe(self, is_timed):
        """(predictions, seconds); where it is timed, of the second pass: the first warms up."""
        for _ in range(2 if is_timed else 1):
            began = time.perf_counter()
            predictions = ku.predict(self.model, self.tokens, self.cfg, self.rows)
        return predictions, time.perf_counter() - began

    def verdict(self, backbone, is_timed):
        """(whether another backbone agrees, whether it is faster, a line that says so)."""
        with _replace_backbone(self.model, backbone):
            golden = ku.predict(self.model, self.golden_tokens, self.cfg)
            probe, seconds = self.predict_probe(is_timed)
        gaps = self.distance(golden, self.golden), self.distance(probe, self.probe)
        agrees = max(gaps) <= TOLERANCE and not np.isnan(gaps).any()
        numbers = f"golden rows {gaps[0]:.2g}, {len(self.rows)} texts {gaps[1]:.2g} off"
        line = f"{'agrees' if agrees else 'refused'}: {numbers}, {TOLERANCE:g} allowed"
        if not is_timed:
            return agrees, True, line
        is_faster = seconds <= MAX_SECONDS * self.seconds
        slow = "" if is_faster else ": not faster, not used"
        return agrees, is_faster, f"{line}; {seconds:.2f} s, PyTorch {self.seconds:.2f}{slow}"

    def distance(self, predictions, expected):
        return float(np.sqrt(np.square(self.run.golden_gaps(predictions, expected)).mean()))


@dataclasses.dataclass
class OpenvinoBundle(ku.Bundle):
    """A bundle whose folds OpenVINO predicts wherever it agrees with PyTorch."""

    precisions: tuple = PRECISIONS  # that may be tried
    _int8: dict = dataclasses.field(default_factory=dict, repr=False)  # (run, fold) -> files
    # (architecture, precision) -> whether it is faster than PyTorch, by the first fold
    _is_faster: dict = dataclasses.field(default_factory=dict, init=False, repr=False)
    _used: set = dataclasses.field(default_factory=set, init=False, repr=False)

    @classmethod
    def of(cls, bundle, precision="auto"):
        """The bundle with this engine; `precision` is that of infer.ipynb, auto tries all.

        ConfigError where the package openvino is missing.
        """
        if ku._pick_device().type == "cpu" and not importlib.util.find_spec("openvino"):
            raise ku.ConfigError(
                "engine openvino needs the package openvino: pip install openvino; for a Kaggle "
                "notebook without internet, pack it with tools/bundle.py --wheels and run the "
                "lines which that prints, above this cell"
            )
        precisions = tuple(name for name in PRECISIONS if precision in ("auto", name))
        return cls(
            bundle.folder, bundle.runs, bundle.blend, precisions, _read_int8_files(bundle.folder)
        )

    def precision_names(self):
        return sorted(self._used)

    def skip_error(self, n_rows):
        """Why OpenVINO is not even tried, or None."""
        if ku._pick_device().type != "cpu":
            return f"OpenVINO is for CPUs, and here is {ku._device_name()}"
        if n_rows < MIN_ROWS:
            return f"OpenVINO pays from {MIN_ROWS} texts on, here are {n_rows}"
        return None

    def _predict_run(self, run, tokens, cfg):
        skip_error = self.skip_error(len(tokens))
        if skip_error:
            print(f"{run.name}: predicted by PyTorch: {skip_error}")
            self._used.add(ku._precision_name(cfg.precision))
            return super()._predict_run(run, tokens, cfg)
        return {fold: self.predict_fold(run, fold, tokens, cfg) for fold in run.weights}

    def predict_fold(self, run, fold, tokens, cfg):
        """Predictions (N, K) of a fold, of the first precision that agrees with PyTorch."""
        tokenizer, model = self.model_of(run)
        run.load_fold(model, fold)
        exact = dataclasses.replace(cfg, precision="fp32")
        precisions = self.precisions_for(run, fold)
        speeds = {name: self._is_faster.get((run.architecture_key, name)) for name in precisions}
        if precisions:
            is_timed = None in speeds.values()
            trial = _Trial(run, fold, model, tokenizer, tokens, exact, is_timed)
        title = f"{run.name}, fold {fold}"
        for precision in precisions:
            name, key = f"OpenVINO {precision}", (run.architecture_key, precision)
            try:
                backbone = self.backbone_of(run, fold, tokens, precision)
                agrees, is_faster, line = trial.verdict(backbone, speeds[precision] is None)
                self._is_faster[key] = is_faster
                print(f"{title}: {name} {line}")
                if agrees and is_faster:
                    with _replace_backbone(model, backbone):
                        predictions = ku.predict(model, tokens, exact)
                    self._used.add(name)
                    return predictions
            except Exception as error:  # whatever OpenVINO raises: PyTorch can do without it
                self._is_faster[key] = False
                print(f"{title}: {name} fails, not tried again: {ku._error_text(error)}")
        print(f"{title}: predicted by PyTorch")
        self._used.add(ku._precision_name(cfg.precision))
        return ku.predict(model, tokens, cfg)

    def precisions_for(self, run, fold):
        """Those that are worth a trial: int8 is packed, bf16 native, none failed or was slow."""
        import openvino

        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        possible = {"int8": (run.name, fold) in self._int8, "bf16": "BF16" in capabilities}
        names = [name for name in self.precisions if possible.get(name, True)]
        return [n for n in names if self._is_faster.get((run.architecture_key, n), True)]

    def backbone_of(self, run, fold, tokens, precision):
        import openvino

        if precision == "int8":
            graph = openvino.Core().read_model(*self._int8[run.name, fold])
            return _compile_backbone(graph, precision)
        return _compile_backbone(convert_backbone(run, fold, tokens), precision)
