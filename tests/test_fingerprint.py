import jax.numpy as jnp
import numpy as np

from tarflow_jax.fingerprint import fingerprint


def test_fingerprint_tells_models_apart():
    def variables(array):
        return {"params": {"kernel": array}}

    known = fingerprint(variables(jnp.arange(4.0)))
    assert known == fingerprint(variables(np.arange(4.0, dtype=np.float32)))
    assert known != fingerprint(variables(jnp.arange(1.0, 5.0)))
