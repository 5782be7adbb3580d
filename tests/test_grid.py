"""Every method under every transformation for every kind of model: the eager value, or one line that says why not."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grid import BATCH, METHODS, MODELS, TABLE, make_pipe, page, refused
from tarflow_jax.errors import UserError
from tarflow_jax.runtime import make_mesh

TRANSFORMATIONS = ("mesh", "disable_jit", "jit, grad, argument", "vmap, jvp")


def cells():
    """Fast: every pair of a transformation with a method and with a model. Slow: all three, but for disable_jit."""
    for (i, model), (j, method), (k, name) in itertools.product(*map(enumerate, (MODELS, METHODS, TRANSFORMATIONS))):
        is_fast = (j + 3 * k) % len(MODELS) == i
        if is_fast or name != "disable_jit":
            marks = [] if is_fast else [pytest.mark.slow]
            yield pytest.param(i, method, name, marks=marks, id=f"{' and '.join(model.kinds)}-{method}-{name}")


STEP = np.float32(1e-2)  # of central differences


@functools.cache
def pipes_of(i):
    """Two pipelines of a model, and arrays [2, B, …]."""
    x = 0.5 * jax.random.normal(jax.random.key(7), (2, BATCH, *MODELS[i].config.data_shape))
    return make_pipe(MODELS[i]), make_pipe(MODELS[i], seed=1), x


def floats(result):
    """The arrays of floats of a result."""
    return [leaf for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def total(result):
    """A sum that depends on every number."""
    return sum(
        (np.sin(1 + np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape) * leaf).sum() for leaf in floats(result)
    )


def moved(pipe_and_x, step):
    """Adds a step along `direction_of`."""
    return jax.tree.map(lambda leaf, along: np.asarray(leaf) + step * along, pipe_and_x, direction_of(pipe_and_x))


def stack(*pipes_and_xs):
    """Stacks pairs of a pipeline and its x."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *pipes_and_xs)


def direction_of(pipe_and_x):
    """A direction in the parameters and in x; the constants and the prior variance are not parameters."""

    def along(path, leaf):
        is_fixed = any(getattr(key, "key", None) in ("constants", "prior") for key in path)
        return np.float32(0.0 if is_fixed else 0.1) * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(along, pipe_and_x)


@pytest.mark.parametrize(("i", "method", "transformation"), list(cells()))
def test_a_cell_is_the_eager_value_or_one_line(i, method, transformation):
    model, (pipe, other, (x, y)) = MODELS[i], pipes_of(i)
    tolerance = 0.05 if model.config.dtype == "bfloat16" else 1e-3
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)

    def call(pipe_and_x):
        pipe, x = pipe_and_x
        return floats(METHODS[method](pipe, model, x))

    if reason := refused(model, method):
        for refuses in (call, jax.jit(call)):
            with pytest.raises(UserError, match="^" + re.escape(reason)):
                refuses((pipe, x))
    elif transformation == "mesh":
        on_mesh = make_pipe(model, mesh=make_mesh(devices=jax.devices()[:4]))
        jax.tree.map(close, call((on_mesh, x)), call((pipe, x)))
    elif transformation == "disable_jit":
        with jax.disable_jit():
            result = call((pipe, x))
        jax.tree.map(close, result, call((pipe, x)))
    elif transformation == "jit, grad, argument":
        first_call = jax.tree.map(lambda leaf: leaf, pipe)  # another pipeline, not called before
        jax.eval_shape(lambda x: call((first_call, x)), x)
        compiled = jax.jit(jax.value_and_grad(lambda both: total(call(both))))
        value, gradients = compiled((pipe, x))
        close(value, total(call((pipe, x))))
        if model.config.dtype != "float32":  # rounding hides differences
            return
        along = jax.tree.map(lambda a, b: np.vdot(a, b), gradients, direction_of((pipe, x)))
        ahead, behind = (compiled(moved((pipe, x), step))[0] for step in (STEP, -STEP))
        np.testing.assert_allclose(sum(jax.tree.leaves(along)), (ahead - behind) / (2 * STEP), rtol=0.02, atol=0.02)
    else:
        both = (pipe, x), (other, y)
        compiled = jax.jit(jax.vmap(lambda both: jax.jvp(call, (both,), (direction_of(both),))))
        values, tangents = compiled(stack(*both))
        for n, one in enumerate(both):
            jax.tree.map(close, [leaf[n] for leaf in values], call(one))
        if model.config.dtype != "float32":
            return
        ahead, behind = (compiled(stack(*(moved(one, step) for one in both)))[0] for step in (STEP, -STEP))
        slopes = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), ahead, behind)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0.02, atol=0.02), tangents, slopes)


def test_the_page_is_of_this_grid():
    assert TABLE.read_text() == page()
