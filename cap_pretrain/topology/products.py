"""FLOPs of the operations of a GPU's program: matrix products, convolutions and attention.

They are in calls of cuBLAS and cuDNN and, for kernels that XLA generates, within fusions. A
multiply-add counts as two, as in `telemetry.flops`, but what is computed twice counts twice.
"""

import math
import re

from cap_pretrain.topology.hlo import Array, Module, Operation

CUBLAS, CONVOLUTION, FUSED = "cuBLAS product", "cuDNN convolution", "product in a fusion"
PRODUCTS = (CUBLAS, CONVOLUTION, FUSED)
ATTENTION = ("cuDNN attention", "cuDNN attention, backward")
KERNELS = (*PRODUCTS, *ATTENTION)

_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CONTRACTED = re.compile(r'lhs_contracting_(?:dims=\{|dimensions":\s*\[)([\d," ]*)[}\]]')
_SCORES = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([\d," ]*)\]')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_DILATED = re.compile(r"lhs_dilate=([\dx]+)")


def target(op: Operation) -> str:
    """Return the name of the library function that a custom call runs; "" for others."""
    found = _TARGET.search(op.line) if op.opcode == "custom-call" else None
    return found[1] if found else ""


def kernel_name(op: Operation, flops: float) -> str:
    """Return what runs an operation of so many FLOPs: one of KERNELS, or the kind of a fusion."""
    called = target(op)
    if called.startswith("__cudnn$fmha"):
        return ATTENTION["Backward" in called]
    if called.startswith("__cublas"):
        return CUBLAS
    if called.startswith("__cudnn$conv"):
        return CONVOLUTION
    if flops:
        return FUSED
    # Fusions are named after what they do, as in %input_reduce_fusion.7.
    return called or (re.sub(r"[.\d]+$", "", op.name) if op.opcode == "fusion" else op.opcode)


def flops_of(module: Module, computation: str, op: Operation) -> float:
    """Return the FLOPs of the products in an operation, including those of its fusions."""
    called = target(op)
    if called.startswith("__cudnn$fmha"):
        return _attention(op, backward="Backward" in called)
    if called.startswith("__cudnn$conv"):
        return _library_convolution(module, computation, op, called)
    if called.startswith("__cublas") or op.opcode == "dot":
        return 2 * math.prod(op.results[0].shape) * _contracted(module, computation, op)
    if op.opcode == "convolution":
        kernel = _operand(module, computation, op, 1)
        dilated = _DILATED.search(op.line)  # inserts zeros, which are free
        free = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
        return _convolution(op, op.results[0], kernel) / free
    inner = op.runs("calls")
    return sum(flops_of(module, name, o) for name in inner for o in module.computations[name])


def _operand(module: Module, computation: str, op: Operation, number: int) -> Array | None:
    source = module.operation(computation, op.operands[number])
    return source.results[0] if source else None


def _contracted(module: Module, computation: str, op: Operation) -> int:
    """Return the number of products in each element of a matrix product."""
    left, found = _operand(module, computation, op, 0), _CONTRACTED.search(op.line)
    if not (left and found):
        return 0
    return math.prod(left.shape[d] for d in _numbers(found[1]))


def _attention(op: Operation, backward: bool) -> float:
    """Return the FLOPs of a fused kernel, of two products forward and five backward.

    The backward pass computes the scores again, and has two products for each forward one.
    """
    found = _SCORES.search(op.line)
    if not found:
        return 0.0
    return (5 if backward else 2) * 2 * math.prod(_numbers(found[1])) * op.results[0].shape[-1]


def _library_convolution(module: Module, computation: str, op: Operation, called: str) -> float:
    """Return the FLOPs of a convolution or of one of its gradients, which take as many."""
    if "BackwardFilter" in called:  # of input and output gradient
        return _convolution(op, _operand(module, computation, op, 1), op.results[0])
    output = _operand(module, computation, op, 0) if "BackwardInput" in called else op.results[0]
    return _convolution(op, output, _operand(module, computation, op, 1))


def _convolution(op: Operation, output: Array | None, kernel: Array | None) -> float:
    labels = _LABELS.search(op.line)
    if not (output and kernel and labels):
        return 0.0
    return (
        2 * math.prod(output.shape) * math.prod(kernel.shape) / kernel.shape[labels[1].index("o")]
    )


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
