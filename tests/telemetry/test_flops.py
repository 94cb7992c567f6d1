"""FLOP counts against closed forms, and peaks by the device names that JAX reports."""

import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from cap_pretrain.telemetry.flops import count_flops, measure_matmul_flops, peak_flops, system_peak


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_matmul_of_any_size_is_counted_without_allocating():
    assert count_flops(jnp.matmul, shape(10**6, 10**6), shape(10**6, 10**6)) == 2 * 10**18


def test_batched_einsum():
    def fn(q, k):
        return jnp.einsum("btnh,bsnh->bnts", q, k)

    assert count_flops(fn, shape(2, 5, 3, 8), shape(2, 7, 3, 8)) == 2 * 2 * 3 * 5 * 7 * 8


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution(groups):
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    x, w = shape(2, 16, 16, 8), shape(3, 3, 8 // groups, 12)
    assert count_flops(conv, x, w) == 2 * (2 * 8 * 8 * 12) * (3 * 3 * 8 // groups)


def test_gradient_of_patch_embedding_is_twice_its_forward():
    def loss(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (4, 4), "VALID", dimension_numbers=dims).sum()

    x, w = shape(2, 16, 16, 3), shape(4, 4, 3, 10)
    forward = 2 * (2 * 4 * 4 * 10) * (4 * 4 * 3)
    assert count_flops(loss, x, w) == forward
    assert count_flops(jax.value_and_grad(loss, argnums=(0, 1)), x, w) == 3 * forward


def two_layers(params, x):
    return (jax.nn.gelu(x @ params[0]) @ params[1]).sum()


def test_training_is_three_times_forward_without_the_unused_gradient():
    params, x = (shape(16, 64), shape(64, 16)), shape(8, 16)
    product = 2 * 8 * 16 * 64
    assert count_flops(two_layers, params, x) == 2 * product
    assert count_flops(jax.value_and_grad(two_layers, argnums=(0, 1)), params, x) == 6 * product
    # With gradients of the parameters only, the first layer computes none for x.
    assert count_flops(jax.value_and_grad(two_layers), params, x) == 5 * product


def test_rematerialization_counts_as_extra_work():
    params, x = (shape(16, 64), shape(64, 16)), shape(8, 16)
    plain = count_flops(jax.value_and_grad(two_layers), params, x)
    again = count_flops(jax.value_and_grad(jax.checkpoint(two_layers)), params, x)
    assert count_flops(jax.checkpoint(two_layers), params, x) == 2 * 2 * 8 * 16 * 64
    assert again > plain


def test_scanned_layers_count_once_each_inside_jit():
    @jax.jit
    def mlp(stack, x):
        return jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, stack)[0].sum()

    stack, x = shape(12, 32, 32), shape(4, 32)
    assert count_flops(mlp, stack, x) == 12 * 2 * 4 * 32 * 32
    assert count_flops(jax.value_and_grad(mlp, argnums=(0, 1)), stack, x) == 36 * 2 * 4 * 32 * 32


def test_control_flow():
    def square(x):
        return x @ x

    def cond(x):
        return jax.lax.cond(x[0, 0] > 0, square, lambda x: x @ x @ x, x)

    def loop(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, square, x)

    x, one = shape(8, 8), 2 * 8**3
    assert count_flops(cond, x) == 2 * one
    assert count_flops(loop, x) == one
    assert count_flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), x) == 5 * one


def test_custom_derivatives_are_counted():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    x, w = shape(4, 8), shape(8, 16)
    assert count_flops(product, x, w) == 2 * 4 * 8 * 16
    grad = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))
    assert count_flops(grad, x, w) == 3 * 2 * 4 * 8 * 16


def test_shard_map_counts_every_shard():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    rows, none = PartitionSpec("data"), PartitionSpec()
    fn = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, none), out_specs=rows, axis_names={"data"}
    )
    assert count_flops(jax.jit(fn), shape(16, 8), shape(8, 4)) == 2 * 16 * 8 * 4


def test_nnx_module_built_abstractly():
    layer = nnx.eval_shape(lambda: nnx.Linear(32, 48, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(layer)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    assert count_flops(fn, state, shape(5, 32)) == 2 * 5 * 32 * 48


ATTENTION = 2 * 2 * (2 * 3 * 5 * 8 * 16)  # scores and weighted sum of B 2, N 3, T 5, S 8, H 16


def test_dot_product_attention():
    q, k = shape(2, 5, 3, 16), shape(2, 8, 3, 16)
    assert count_flops(jax.nn.dot_product_attention, q, k, k) == ATTENTION


def test_fused_attention_counts_as_its_matrix_products(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *_: None)

    def loss(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").sum()

    q, k = shape(2, 5, 3, 16, dtype=jnp.bfloat16), shape(2, 8, 3, 16, dtype=jnp.bfloat16)
    assert count_flops(loss, q, k, k) == ATTENTION
    assert count_flops(jax.grad(loss, argnums=(0, 1, 2)), q, k, k) == 3 * ATTENTION


def test_pallas_kernel_is_refused_rather_than_miscounted():
    from jax.experimental import pallas

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    fn = pallas.pallas_call(kernel, out_shape=shape(8, 8))
    with pytest.raises(NotImplementedError, match="Pallas"):
        count_flops(fn, shape(8, 8))


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459),
        ("TPU v5p", 459), ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA GB200", 2500), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)  # fmt: skip
def test_peak_by_device_name(kind, tera):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Radeon"])
def test_unknown_peak_is_none(kind):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) is None


def test_system_peak_adds_up_devices():
    devices = [types.SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")] * 8
    peak = system_peak(devices)
    assert peak.flops == 8 * 197e12 and peak.label == "MFU" and "8 x TPU v5 lite" in peak.source
    unknown = types.SimpleNamespace(device_kind="NVIDIA Titan Z", platform="gpu")
    assert system_peak([unknown]).flops is None and "Titan Z" in system_peak([unknown]).source


def test_cpu_peak_is_measured_and_labelled():
    peak = system_peak(jax.devices("cpu"))
    assert peak.label == "MFU(cpu)" and "measured" in peak.source
    assert 1e8 < peak.flops < 1e15
    assert 1e8 < measure_matmul_flops(jax.devices("cpu")[0], size=256) < 1e15
