"""The matrix product of the dense layers, with a backward pass that transposes as little as it can."""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "dense_product"
_Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def dense_product(x: jax.Array, kernel: jax.Array, dimensions: _Dimensions, precision: Any = None) -> jax.Array:
    """`jax.lax.dot_general` of activations [..., *K] and a kernel [*K, *M], as Flax's dense layers call it.

    The kernel's gradient xᵀg has a choice: of x and the cotangent g, the one that comes first is transposed in
    memory. JAX always takes g, even where x is four times narrower; this takes the narrower. On a CPU that is a
    tenth to a quarter of a training step (docs/performance.md). Reverse mode only.
    """
    product = _product(x, kernel, len(dimensions[0][1]), precision)
    return checkpoint_name(product, PRODUCT)  # a policy does not see the dot_general inside a custom_vjp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, num_contracted: int, precision: Any) -> jax.Array:
    last = tuple(range(x.ndim - num_contracted, x.ndim))
    dimensions = ((last, tuple(range(num_contracted))), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, precision)


def _forward(x: jax.Array, kernel: jax.Array, num_contracted: int, precision: Any) -> tuple[jax.Array, Any]:
    return _product(x, kernel, num_contracted, precision), (x, kernel)


def _backward(
    num_contracted: int, precision: Any, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    num_features = kernel.ndim - num_contracted
    features_of_g = tuple(range(g.ndim - num_features, g.ndim))
    features_of_kernel = tuple(range(num_contracted, kernel.ndim))
    x_grad = jax.lax.dot_general(g, kernel, ((features_of_g, features_of_kernel), ((), ())), precision)

    rows = tuple(range(x.ndim - num_contracted))
    contract_rows = ((rows, rows), ((), ()))
    if x.size <= g.size:
        return x_grad, jax.lax.dot_general(x, g, contract_rows, precision)
    # The barrier: XLA would fold the transposition into a product for which its fast library has no kernel.
    kernel_grad = jax.lax.optimization_barrier(jax.lax.dot_general(g, x, contract_rows, precision))  # [*M, *K]
    order = (*range(num_features, kernel.ndim), *range(num_features))
    return x_grad, kernel_grad.transpose(order)


_product.defvjp(_forward, _backward)
