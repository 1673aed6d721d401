"""What is timed: this package's engine, and the same network as other runtimes run it.

PyTorch, SpikingJelly and the ONNX graphs below compute `networks.FloatTwin`: the integer network's own weight codes and
BN slopes with float membranes. They are built the way their own users tune them. The T steps are folded into the
batch, T outermost, so that a convolution runs once on all steps and taking a step apart moves nothing; the stem runs
once an image; BN is folded into the convolution. A LIF layer is T unrolled steps of multiply, add, compare and select.

int8 graphs hold weights as int8 with a scale per output channel, and

    spikes     uint8, scale 1: exact
    pixels     int8, on the grid of the network's own input codes
    shortcuts  int8, on the range calibrated in `FloatTwin.ranges`; the ANN's activations uint8
    sums       ONNX Runtime has an int8 convolution only where its output is 8 bits too, on the calibrated range;
               OpenVINO takes BN and all that follows in bf16 or float32 straight from the 32-bit sums
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from mdsnn.export import artifact
from mdsnn.kernels.engine import Engine, Trace
from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.kernels.formats import IMAGE_FRAC_BITS

if TYPE_CHECKING:
    from networks import FloatTwin

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[Any]
Form = Literal["float32", "openvino-int8", "ort-int8"]
"""How an ONNX graph says its convolutions; see above for the difference between the last two."""

OPSET = 17
IR_VERSION = 8
OPENVINO = "org.openvinotoolkit"
"""Domain of OpenVINO's own operators."""


@dataclass(frozen=True)
class Workload:
    """A network, and its twins: what float libraries run in its place, and the ANN of the same shape.

    network  the bytes of its artifact      pixels  uint8 [N, C, H, W], what is timed
    """

    name: str
    bits: int
    density: float | None
    network: bytes
    twin: FloatTwin
    ann: FloatTwin
    pixels: Pixels


@dataclass(frozen=True)
class Runner:
    """A contender made ready. `trace` is there if it computes the network's integers."""

    logits: Callable[[Pixels], Logits]
    trace: Callable[[Pixels], Trace] | None = None


@dataclass(frozen=True)
class Contender:
    """One row of the benchmark.

    title        what it is, in words
    computes     "integers": the network's own; "float32", "int8", "bf16": its twin; "ann": the ANN twin
    prepare      (workload, batches) to what its process receives: plain values, so that none imports torch for nothing
    make         (that, threads) to a Runner, in the contender's own process
    environment  variables of that process      flag  of /proc/cpuinfo, without which it is left out
    """

    title: str
    computes: str
    prepare: Callable[[Workload, Sequence[int]], Any]
    make: Callable[[Any, int], Runner]
    environment: Mapping[str, str] = field(default_factory=dict)
    flag: str = ""


# -------------------------------------------------------------------------------------------------- ONNX graphs


class _Graph:
    """An ONNX graph in the making. Values go by name; `constant` and `op` return the name of what they add."""

    def __init__(self, twin: FloatTwin, batch: int, form: Form) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self.types, self.helper, self.arrays = TensorProto, helper, numpy_helper
        self.twin, self.batch = twin, batch
        self.int8, self.sums = form != "float32", form == "ort-int8"
        self.timesteps = int(twin.config["timesteps"])
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: npt.ArrayLike, dtype: Any = np.float32) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(self.arrays.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{kind}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def quantized(self, x: str, largest: float, dtype: Any = np.int8) -> tuple[str, float]:
        """`x` through 8 bits, and the scale; as it is in a float graph."""
        if not self.int8:
            return x, 1.0
        step = largest / float(np.iinfo(dtype).max)
        if not self.sums:  # OpenVINO's own operator: it moves the stride of a shortcut before Q/DQ, in floats
            ends = [self.constant(step * end) for end in (np.iinfo(dtype).min, np.iinfo(dtype).max)]
            return self.op("FakeQuantize", x, *ends, *ends, domain=OPENVINO, levels=256), step
        scale, zero = self.constant(step), self.constant(0, dtype)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, scale, zero), scale, zero), step

    def conv(self, x: str, step: float, name: str, bn: str, stride: int) -> str:
        """The convolution `name` and its BN; `step` is the scale of its 8-bit input."""
        state = self.twin.state
        weight, gain = state[f"{name}.weight"], state[f"{bn}.weight"]
        bias = state[f"{bn}.bias"]
        if self.twin.neuron == "relu":
            deviation = np.sqrt(state[f"{bn}.running_var"] + np.float32(1e-5))
            gain = gain / deviation
            bias = bias - gain * state[f"{bn}.running_mean"]
        if self.int8:  # the weights are codes: the scale is BN's alone, and zero would divide
            sign = np.where(gain < 0, -1.0, 1.0)[:, None, None, None]
            scale = np.maximum(np.abs(gain), 1e-9)
            zero = self.constant(np.zeros(len(scale)), np.int8)
            codes = self.constant(sign * weight, np.int8)
            kernel = self.op("DequantizeLinear", codes, self.constant(scale), zero, axis=0)
        else:
            kernel = self.constant(weight * gain[:, None, None, None])
        if not self.sums:
            offset = self.constant(bias)
        else:  # ONNX Runtime wants the bias in the units of the sums
            sums = self.constant(np.rint(bias / (step * scale)), np.int32)
            zero = self.constant(np.zeros(len(scale)), np.int32)
            offset = self.op("DequantizeLinear", sums, self.constant(step * scale), zero, axis=0)
        size = weight.shape[-1]
        y = self.op("Conv", x, kernel, offset, strides=[stride] * 2, pads=[size // 2] * 4, kernel_shape=[size] * 2)
        return self.quantized(y, self.twin.ranges[bn])[0] if self.sums else str(y)

    def fire(self, x: str, name: str) -> tuple[str, float]:
        """Spikes of T unrolled steps, or ReLU; with the scale of the 8 bits it is in."""
        if self.twin.neuron == "relu":
            return self.quantized(self.op("Relu", x), self.twin.ranges[name], np.uint8)
        config = self.twin.config
        tau, v_th, zero = self.constant(config["tau"]), self.constant(config["v_th"]), self.constant(0.0)
        spikes, u = [], ""
        steps = self.op("Split", x, axis=0, outputs=self.timesteps) if self.timesteps > 1 else [x]
        for current in steps:
            h = self.op("Add", self.op("Mul", u, tau), current) if u else current
            fired = self.op("Greater", h, v_th)
            u = self.op("Where", fired, zero, h)
            spikes.append(self.op("Cast", fired, to=self.types.UINT8 if self.int8 else self.types.FLOAT))
        s = self.op("Concat", *spikes, axis=0)
        if not self.int8:
            return s, 1.0
        return self.op("DequantizeLinear", s, self.constant(1.0), self.constant(0, np.uint8)), 1.0

    def logits(self) -> str:
        config = self.twin.config
        mean, deviation = (np.asarray(config[key], np.float64).reshape(-1, 1, 1) for key in ("mean", "std"))
        step = 2.0**-IMAGE_FRAC_BITS
        x = self.op("Mul", self.op("Cast", "pixels", to=self.types.FLOAT), self.constant(1 / (255 * deviation * step)))
        x = self.op("Floor", self.op("Add", x, self.constant(0.5 - mean / (deviation * step))))
        x = self.op("Mul", x, self.constant(step))
        x = self.conv(*self.quantized(x, 127 * step), "stem", "stem_bn", 1)
        if self.timesteps > 1:
            x = self.op("Concat", *[x] * self.timesteps, axis=0)
        channels = config["widths"][0]
        for group, (depth, width) in enumerate(zip(config["blocks"], config["widths"], strict=True)):
            for i in range(depth):
                name, stride = f"groups.{group}.{i}", 2 if group and not i else 1
                r = self.conv(*self.fire(x, f"{name}.lif1"), f"{name}.conv1", f"{name}.bn1", stride)
                r = self.conv(*self.fire(r, f"{name}.lif2"), f"{name}.conv2", f"{name}.bn2", 1)
                if stride != 1 or channels != width:
                    codes = self.quantized(x, self.twin.ranges[f"{name}.shortcut.0"])
                    x = self.conv(*codes, f"{name}.shortcut.1", f"{name}.shortcut.2", stride)
                x, channels = self.op("Add", r, x), width
        s = self.op("ReduceMean", self.fire(x, "lif")[0], axes=[2, 3], keepdims=0)
        s = self.op("Reshape", s, self.constant([self.timesteps, self.batch, channels], np.int64))
        s = self.op("ReduceMean", s, axes=[0], keepdims=0)
        weight, bias = (self.constant(self.twin.state[f"readout.{part}"]) for part in ("weight", "bias"))
        return str(self.op("Gemm", s, weight, bias, transB=1))


def float_graph(twin: FloatTwin, batch: int, form: Form) -> bytes:
    """An ONNX model of `twin` for `batch` images: pixels uint8 [batch, C, H, W] to logits float32 [batch, classes]."""
    graph = _Graph(twin, batch, form)
    config, make = twin.config, graph.helper
    shape = [batch, config["in_channels"], *config["size"]]
    pixels = make.make_tensor_value_info("pixels", graph.types.UINT8, shape)
    logits = make.make_tensor_value_info(graph.logits(), graph.types.FLOAT, [batch, config["classes"]])
    body = make.make_graph(graph.nodes, "network", [pixels], [logits], graph.constants)
    domains = [make.make_opsetid("", OPSET)] + [make.make_opsetid(OPENVINO, 1)] * (form == "openvino-int8")
    model = make.make_model(body, opset_imports=domains, ir_version=IR_VERSION)
    found: bytes = model.SerializeToString()
    return found


# ------------------------------------------------------------------------------------------------------ runners


@contextlib.contextmanager
def _needs(package: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as fault:
        raise MissingError(f"{package} is not installed: pip install 'mdsnn[{extra}]'") from fault


def _network(workload: Workload, _: Sequence[int]) -> bytes:
    return workload.network


def _twin(workload: Workload, _: Sequence[int]) -> FloatTwin:
    return workload.twin


def _graphs(form: Form, ann: bool = False) -> Callable[[Workload, Sequence[int]], dict[int, bytes]]:
    def prepare(workload: Workload, batches: Sequence[int]) -> dict[int, bytes]:
        with _needs("onnx", "train"):
            return {batch: float_graph(workload.ann if ann else workload.twin, batch, form) for batch in batches}

    return prepare


def _kernels(name: str) -> Callable[[bytes, int], Runner]:
    def make(network: bytes, threads: int) -> Runner:
        engine = Engine(artifact.from_bytes(network), name, threads)

        def trace(pixels: Pixels) -> Trace:
            found = engine.run(pixels, trace=True).trace
            if found is None:
                raise ConfigError(f"engine {name!r} returned no trace")
            return found

        return Runner(lambda pixels: engine.run(pixels).logits, trace)

    return make


def _our_graph(carrier: Literal["int", "float"]) -> Callable[[bytes, int], Runner]:
    def make(artifact_bytes: bytes, threads: int) -> Runner:
        with _needs("onnx", "train"):
            from mdsnn.export import onnx
        network = artifact.from_bytes(artifact_bytes)
        timed = onnx.OnnxExecutor(onnx.to_onnx(network, form="unrolled", carrier=carrier), threads=threads)

        def trace(pixels: Pixels) -> Trace:
            model = onnx.to_onnx(network, form="unrolled", carrier=carrier, trace=True)
            return onnx.OnnxExecutor(model, threads=threads).run(pixels)

        return Runner(timed.logits, trace)

    return make


def _by_batch(compile: Callable[[int], Callable[[Pixels], Logits]]) -> Runner:
    """A runner of graphs of fixed shape: one at a time, so that its memory is that of the batch it runs."""
    ready: dict[int, Callable[[Pixels], Logits]] = {}

    def logits(pixels: Pixels) -> Logits:
        if len(pixels) not in ready:
            ready.clear()
            ready[len(pixels)] = compile(len(pixels))
        return ready[len(pixels)](pixels)

    return Runner(logits)


def _ort(graphs: dict[int, bytes], threads: int) -> Runner:
    with _needs("onnxruntime", "train"):
        import onnxruntime

    def compile(batch: int) -> Callable[[Pixels], Logits]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # it warns of constants that it has folded away itself
        session = onnxruntime.InferenceSession(graphs[batch], options, providers=["CPUExecutionProvider"])

        def run(pixels: Pixels) -> Logits:
            out: Logits = session.run(None, {"pixels": pixels})[0]
            return out

        return run

    return _by_batch(compile)


def _openvino(precision: str | None = None) -> Callable[[dict[int, bytes], int], Runner]:
    """One thread: a synchronous request. More: a stream and a request each, over parts of the batch where it divides.

    precision  of what is not int8; None: OpenVINO's choice, bf16 where the processor has it. Its choice does not heed
               ONEDNN_MAX_CPU_ISA, and fails at a cap without bf16: "f32" there.
    """

    def make(graphs: dict[int, bytes], threads: int) -> Runner:
        with _needs("openvino", "bench"):
            import openvino

        core = openvino.Core()

        def compile(batch: int) -> Callable[[Pixels], Logits]:
            streams = threads if batch % threads == 0 and batch // threads in graphs else 1
            size = batch // streams
            options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
            if precision:
                options["INFERENCE_PRECISION_HINT"] = precision
            model = core.compile_model(core.read_model(io.BytesIO(graphs[size])), "CPU", options)
            requests = [model.create_infer_request() for _ in range(streams)]

            def run(pixels: Pixels) -> Logits:
                for request, part in zip(requests, np.split(pixels, streams), strict=True):
                    request.set_input_tensor(openvino.Tensor(part))
                    if streams == 1:
                        request.infer()
                    else:
                        request.start_async()
                for request in requests:
                    request.wait()
                return np.concatenate([request.get_output_tensor(0).data for request in requests])

            return run

        return _by_batch(compile)

    return make


def _torch(compiled: bool = False, spikingjelly: bool = False) -> Callable[[FloatTwin, int], Runner]:
    def make(twin: FloatTwin, threads: int) -> Runner:
        with _needs("torch or spikingjelly", "train"):
            import torch
            from networks import Folded, spikingjelly_twin

            model = spikingjelly_twin(twin) if spikingjelly else Folded(twin)
        torch.set_num_threads(threads)
        if compiled:
            if shutil.which("g++") is None and "CXX" not in os.environ:
                raise MissingError("torch.compile needs a C++ compiler, and there is no g++")
            model = torch.compile(model, dynamic=False, fullgraph=True)

        def logits(pixels: Pixels) -> Logits:
            with torch.inference_mode():
                out: Logits = model(torch.from_numpy(pixels)).numpy()
            return out

        return Runner(logits)

    return make


def _level(level: str) -> Contender:
    return Contender(f"mdsnn, C, {level}", "integers", _network, _kernels("native"), {"MDSNN_ISA": level})


def _int8(cap: str = "", title: str = "", flag: str = "", precision: str | None = None) -> Contender:
    name = f"OpenVINO int8{title and f', capped at {title}'}"
    environment = {"ONEDNN_MAX_CPU_ISA": cap} if cap else {}
    return Contender(name, "int8", _graphs("openvino-int8"), _openvino(precision), environment, flag)


CONTENDERS: Mapping[str, Contender] = {
    "native": Contender("mdsnn, C", "integers", _network, _kernels("native")),
    "amx": _level("amx"),
    "avx512": _level("avx512"),
    "avx2": _level("avx2"),
    "base": _level("base"),
    "numba": Contender("mdsnn, Numba", "integers", _network, _kernels("numba")),
    "reference": Contender("mdsnn, NumPy reference", "integers", _network, _kernels("reference")),
    "openvino-int8": _int8(),
    "openvino-int8-avx512": _int8("AVX512_CORE_VNNI", "AVX512-VNNI", "avx512_vnni"),
    "openvino-int8-avx2-vnni": _int8("AVX2_VNNI", "AVX2-VNNI", "avx_vnni", "f32"),
    "openvino-int8-avx2": _int8("AVX2", "AVX2", "avx2", "f32"),
    "openvino-bf16": Contender("OpenVINO bf16", "bf16", _graphs("float32"), _openvino("bf16"), {}, "avx512_bf16"),
    "openvino-fp32": Contender("OpenVINO float32", "float32", _graphs("float32"), _openvino("f32")),
    "ort-int8": Contender("ONNX Runtime int8", "int8", _graphs("ort-int8"), _ort),
    "ort-fp32": Contender("ONNX Runtime float32", "float32", _graphs("float32"), _ort),
    "pytorch": Contender("PyTorch eager float32", "float32", _twin, _torch()),
    "pytorch-compile": Contender("PyTorch compiled float32", "float32", _twin, _torch(compiled=True)),
    "spikingjelly": Contender("SpikingJelly float32, multi-step", "float32", _twin, _torch(spikingjelly=True)),
    "ann-openvino-int8": Contender("ANN at T = 1, OpenVINO int8", "ann", _graphs("openvino-int8", True), _openvino()),
    "ann-ort-int8": Contender("ANN at T = 1, ONNX Runtime int8", "ann", _graphs("ort-int8", True), _ort),
    "ort-our-int": Contender("ONNX Runtime, our integer graph, ConvInteger", "integers", _network, _our_graph("int")),
    "ort-our-float": Contender("ONNX Runtime, our integer graph, float32", "integers", _network, _our_graph("float")),
}
LEVELS = ("amx", "avx512", "avx2", "base")
