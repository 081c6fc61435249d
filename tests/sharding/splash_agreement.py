"""Run by test_meshes.py: compares the interpreted splash kernel with plain attention."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable.configs import MeshShape
from jaxrl_stable.model.splash import splash_attention
from jaxrl_stable.sharding import make_mesh
from jaxrl_stable.sharding.layout import ONE_DEVICE, layout


def plain(q, k, v, segment_ids):
    columns = jnp.arange(q.shape[1])
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask &= columns[:, None] >= columns[None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0)


def compare(name, batch, columns, heads, groups, width, mesh_shape=None):
    rng = np.random.default_rng(0)
    draw = lambda h: jnp.asarray(rng.normal(size=(batch, columns, h, width)), jnp.float32)  # noqa: E731
    q, k, v, weight = draw(heads) * width**-0.5, draw(groups), draw(groups), draw(heads)
    lengths = rng.integers(1, columns, (batch, 2))
    ids = jnp.asarray((np.arange(columns)[None, None] >= lengths[..., None]).sum(1))  # 0, 1, 2

    def value(attend):
        def loss(q, k, v):
            y = attend(q, k, v)
            return (jnp.where((ids > 0)[..., None, None], y, 0) * weight).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    expected = value(lambda *x: plain(*x, ids))(q, k, v)
    if mesh_shape is None:
        kernel = lambda *x: splash_attention(*x, ids, ONE_DEVICE, interpret=True)  # noqa: E731
        actual = value(kernel)(q, k, v)
    else:
        with jax.set_mesh(make_mesh(mesh_shape)):
            where = layout(batch, columns, sampling=False)
            kernel = lambda *x: splash_attention(*x, ids, where, interpret=True)  # noqa: E731
            actual = jax.device_get(value(kernel)(q, k, v))
    real = np.asarray(ids) > 0
    np.testing.assert_allclose(expected[0][1][real], actual[0][1][real], atol=1e-5, err_msg=name)
    for a, b in zip(expected[1], actual[1]):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)
    print(f"{name} agrees")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    compare("padded columns and narrow heads", 1, 200, 2, 1, 48)
    compare("columns and heads over devices", 1, 512, 4, 2, 128, MeshShape(1, context=2, tensor=2))
    compare("three chunks apart, few key heads", 1, 1024, 2, 1, 128, MeshShape(1, context=4))
