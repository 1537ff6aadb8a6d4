"""The four models in JAX, as one jitted scan over training steps with the data on the device: a peer of our scripts.

benchmark.py --peer jax starts it as `python peer_jax.py KIND STEPS`; for every line that it reads it trains STEPS steps
and prints their milliseconds per step. Models, losses, batch, optimizer and start are those of codebase/models.
"""

import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import elu, log_softmax, one_hot, relu, softplus
from jax.scipy.special import logsumexp

KIND, STEPS = sys.argv[1], int(sys.argv[2])
X_DIM, HIDDEN, Z_DIM, Y_DIM = {"ssvae": (784, 300, 64, 10), "fsvae": (3072, 500, 10, 10)}.get(
    KIND, (784, 300, 10, 0)
)
N, BATCH, MIX, RATE = 20_000, 100, 500, 1e-3


def network(key, *sizes):
    layers = []
    for a, b in itertools.pairwise(sizes):
        key, w, c = jax.random.split(key, 3)
        bound = 1 / math.sqrt(a)
        layers.append(
            (
                jax.random.uniform(w, (a, b), minval=-bound, maxval=bound),
                jax.random.uniform(c, (b,), minval=-bound, maxval=bound),
            )
        )
    return layers


def apply(layers, x, y=None, activation=elu):
    (w, b), *rest = layers
    h = x @ w[: x.shape[-1]] + b
    h = h if y is None else h + y @ w[x.shape[-1] :]
    for w, b in rest:
        h = activation(h) @ w + b
    return h


def gaussian(h):
    return h[..., : h.shape[-1] // 2], softplus(h[..., h.shape[-1] // 2 :]) + 1e-8


def log_normal(x, m, v):
    return -0.5 * ((x - m) ** 2 / v + jnp.log(2 * math.pi * v)).sum(-1)


def loss(model, key, x, y, labelled):
    labels = {"ssvae": jnp.eye(10)[:, None], "fsvae": y}.get(KIND)
    qm, qv = gaussian(apply(model["enc"], x, labels))
    z = qm + jnp.sqrt(qv) * jax.random.normal(key, qm.shape)
    out = apply(model["dec"], z, labels)
    kl = 0.5 * (qv + qm**2 - 1 - jnp.log(qv)).sum(-1)
    if KIND == "fsvae":
        return (kl - log_normal(x, out, 0.1)).mean()
    rec = (softplus(out) - x * out).sum(-1)
    if KIND == "gmvae":
        m, h = jnp.split(model["mix"], 2)
        log_p_z = logsumexp(log_normal(z[:, None], m, softplus(h) + 1e-8), 1) - math.log(MIX)
        kl = log_normal(z, qm, qv) - log_p_z
    if KIND == "ssvae":
        log_q = log_softmax(apply(model["cls"], x, activation=relu))
        nelbo = (jnp.exp(log_q) * (log_q + math.log(10) + (kl + rec).T)).sum(-1).mean()
        log_p = log_softmax(apply(model["cls"], labelled, activation=relu))
        return nelbo - 100 * log_p[jnp.arange(100), jnp.arange(100) // 10].mean()
    return (kl + rec).mean()


def binarize(key, pixels):
    return (jax.random.bits(key, pixels.shape, jnp.uint8) < pixels).astype(jnp.float32)


def step(carry, index):
    model, m, v, count, key = carry
    key, *keys = jax.random.split(key, 4)
    x = (
        pixels[index].astype(jnp.float32) / 255
        if KIND == "fsvae"
        else binarize(keys[0], pixels[index])
    )
    labelled = binarize(keys[1], pixels[:100]) if KIND == "ssvae" else None
    value, gradient = jax.value_and_grad(loss)(
        model, keys[2], x, one_hot(labels[index], 10), labelled
    )
    count = count + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)
    rate, scale = RATE / (1 - 0.9**count), 1 / (1 - 0.999**count)
    model = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v * scale) + 1e-8), model, m, v)
    return (model, m, v, count, key), value


keys, numbers = jax.random.split(jax.random.PRNGKey(0), 5), np.random.default_rng(0)
pixels = jnp.asarray(numbers.integers(0, 256, (N, X_DIM), dtype=np.uint8))
labels = jnp.asarray(numbers.integers(0, 10, N))
model = {"enc": network(keys[0], X_DIM + Y_DIM, HIDDEN, HIDDEN, 2 * Z_DIM)}
model["dec"] = network(keys[1], Z_DIM + Y_DIM, HIDDEN, HIDDEN, X_DIM)
if KIND == "ssvae":
    model["cls"] = network(keys[2], X_DIM, HIDDEN, HIDDEN, 10)
if KIND == "gmvae":
    model["mix"] = jax.random.normal(keys[3], (2 * MIX, Z_DIM)) / math.sqrt(MIX * Z_DIM)
train = jax.jit(lambda carry, index: jax.lax.scan(step, carry, index))
zeros = jax.tree.map(jnp.zeros_like, model)
carry = (model, zeros, zeros, jnp.float32(0), keys[4])
for _ in sys.stdin:
    index = jnp.asarray(numbers.permuted(np.tile(np.arange(N), (STEPS, 1)), axis=1)[:, :BATCH])
    began = time.perf_counter()
    carry, values = train(carry, index)
    values.block_until_ready()
    print(1000 * (time.perf_counter() - began) / STEPS, flush=True)
