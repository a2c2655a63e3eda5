"""Layers that return their own derivative; Adam, EMA and parameter trees. NumPy only.

Every layer is a pure function
    y, back = layer(params, x)          dx, grads = back(dy)
where dy is dL/dy and grads has the keys of params. Nothing is kept outside the closure, so one
set of parameters can be evaluated many times within one update. Layers change in place only what
they have made themselves, which saves temporaries: never params, x or dy. Call every `back` before
an optimiser step: the closures hold the parameter arrays themselves, and `adam` changes these.

Shapes: B batch, I inputs, O outputs, E ensemble members. A parameter with a leading axis E makes
an ensemble: x (B,I) or (E,B,I) -> y (E,B,O). Layers compute in the dtype of their arguments:
float32, float64, or complex128. The latter is for the complex step of `derivative_error`; for it
their code is analytic: no abs, no conjugate, and comparisons look at the real part alone.

    python nets.py      prints the error of every layer's derivative, in about a second
"""

import os
import sys

# Small products are far slower on several BLAS threads than on one. BLAS reads these variables
# when numpy is first imported, so a program imports this module before numpy.
_threads = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
if "numpy" in sys.modules and not any(name in os.environ for name in _threads):
    print("import nets, hiql or hiro before numpy: small products are slower now", file=sys.stderr)
for _name in _threads:
    os.environ.setdefault(_name, "1")

import ctypes
import math

import numpy as np


def _keep_freed_memory():
    """Tell glibc to reuse the memory of large temporaries instead of returning it to the kernel.

    Page faults on fresh temporaries otherwise cost as much time as the arithmetic. Without glibc
    (macOS, Windows) this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-3, 1 << 30)        # M_MMAP_THRESHOLD
    mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD
    mallopt(-2, 1 << 26)        # M_TOP_PAD


_keep_freed_memory()

# ------------------------------------------------------------------------------------- layers


def stop_gradient(x):
    """x as a constant. What stops a gradient is that the `back` of the layer that made x is not
    called, as in `z, _ = phi(...)`. This only informs the complex step of `derivative_error`, where
    the imaginary part carries the derivative: `.real` drops it."""
    return x.real


def mean(x, y=None):
    """Mean of x, or of x y, over the last axis: (..., 1); `(x * y).mean` takes thrice as long."""
    total = np.einsum("...i->...", x) if y is None else np.einsum("...i,...i->...", x, y)
    return total[..., None] / x.shape[-1]


def linear(p, x):
    """y = x W + b.   W (I,O) or (E,I,O), b (O,) or (E,O)."""
    w, b = p["W"], p["b"]

    def back(dy):
        dx = dy @ w.swapaxes(-1, -2)
        if dx.ndim > x.ndim:            # x was shared by the members of the ensemble
            dx = dx.sum(0)
        return dx, {"W": x.swapaxes(-1, -2) @ dy, "b": dy.sum(-2)}

    y = x @ w
    y += b[..., None, :]
    return y, back


def relu(p, x):
    """y = max(x, 0); the derivative at 0 is 0. HIRO's; HIQL has `gelu` and `layer_norm`."""
    on = x.real > 0
    return x * on, lambda dy: (dy * on, {})


def tanh(p, x):
    """y = tanh(x). HIRO's: its policies end with it."""
    y = np.tanh(x)
    return y, lambda dy: (dy * (1 - y * y), {})


def gelu(p, x):
    """y = x/2 (1 + tanh u),  u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form, flax's default."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    u = c * a * (x * x)                 # x**3 takes eight times as long in float32
    u += c
    u *= x
    t = np.tanh(u, out=u)
    y = 0.5 * x
    y *= 1 + t

    def back(dy):                       # t' = (1 - t^2) u' = (1 + t) (1 - t) u'
        du = c + 3 * a * c * (x * x)
        return dy * (0.5 * (1 + t) * (1 + x * (1 - t) * du)), {}

    return y, back


def layer_norm(p, x):
    """y = (x - mean) / sqrt(var + 1e-6) * scale + shift over the last axis; 1e-6 as in flax."""
    scale, shift = p["scale"][..., None, :], p["shift"][..., None, :]
    xhat = x - mean(x)
    rstd = 1 / np.sqrt(mean(xhat, xhat) + 1e-6)
    xhat *= rstd

    def back(dy):
        d = dy * scale                                          # = dL/dxhat
        dx = d - mean(d)
        dx -= xhat * mean(d, xhat)
        dx *= rstd
        return dx, {"scale": np.einsum("...bi,...bi->...i", dy, xhat), "shift": dy.sum(-2)}

    y = xhat * scale
    y += shift
    return y, back


def length_normalize(p, x):
    """y = sqrt(d) x / |x|, d the size of the last axis; no epsilon, as in both HIQL code bases."""
    d = x.shape[-1]
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    y = math.sqrt(d) * x / length

    def back(dy):                       # y does not change with the length of x
        along = (dy * y).sum(-1, keepdims=True) / d
        return (dy - y * along) * (math.sqrt(d) / length), {}

    return y, back


def mlp(p, x, activation=gelu):
    """Dense -> activation -> LayerNorm (if p has one), ..., Dense.   (B,I) -> (B,O) or (E,B,O)."""
    backs, depth = [], sum(name.startswith("dense") for name in p)
    for i in range(depth):
        x, back = linear(p[f"dense{i}"], x)
        backs.append((f"dense{i}", back))
        if i < depth - 1:
            x, back = activation({}, x)
            backs.append((None, back))
            if f"norm{i}" in p:
                x, back = layer_norm(p[f"norm{i}"], x)
                backs.append((f"norm{i}", back))

    def back(dy):
        grads = {}
        for name, back_i in reversed(backs):
            dy, g = back_i(dy)
            if name:
                grads[name] = g
        return dy, grads

    return x, back


# ------------------------------------------------------------------- log-densities of policies


def gaussian_log_prob(p, mean, x):
    """log N(x; mean, std^2 I), summed over the last axis: mean, x (B,d) -> (B,).

    std = 1 if p is empty, else exp(p["log_std"]) with log_std (d,), the same in every state.
    `back` gives the derivatives by the mean and by log_std; x is data.
    """
    log_std = p.get("log_std", np.zeros(mean.shape[1], mean.dtype))
    z = (x - mean) * np.exp(-log_std)
    log_prob = -0.5 * (z * z).sum(1) - log_std.sum() - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def back(dy):
        dmean = dy[..., None] * z * np.exp(-log_std)
        return dmean, {"log_std": (dy[..., None] * (z * z - 1)).sum(0)} if p else {}

    return log_prob, back


def categorical_log_prob(p, logits, a):
    """log softmax(logits)[a]: logits (B,A), a (B,) integers -> (B,)."""
    rows = np.arange(len(a))
    shifted = logits - logits.real.max(1, keepdims=True)
    exp = np.exp(shifted)
    total = exp.sum(1, keepdims=True)
    log_prob = shifted[rows, a] - np.log(total[:, 0])

    def back(dy):
        dlogits = -exp / total
        dlogits[rows, a] += 1
        return dlogits * dy[:, None], {}

    return log_prob, back


# --------------------------------------------------------------------------------- parameters


def init_mlp(rng, sizes, norm=False, ensemble=0, last_scale=1.0, dtype=np.float32):
    """Parameters of `mlp` for layer sizes (I, hidden, ..., O).

    Weights U(-a, a) with a = sqrt(6 / (in + out)) (Glorot), the last layer's times last_scale;
    biases and LayerNorm shifts 0, scales 1. norm: LayerNorm after each hidden layer. ensemble > 0
    adds a leading axis of that size.
    """
    lead = (ensemble,) if ensemble else ()
    p, last = {}, len(sizes) - 2
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:])):
        limit = np.sqrt(6 / (n_in + n_out)) * (last_scale if i == last else 1)
        w = rng.uniform(-limit, limit, lead + (n_in, n_out)).astype(dtype)
        p[f"dense{i}"] = {"W": w, "b": np.zeros(lead + (n_out,), dtype)}
        if norm and i < last:
            p[f"norm{i}"] = {"scale": np.ones(lead + (n_out,), dtype),
                             "shift": np.zeros(lead + (n_out,), dtype)}
    return p


def flatten(tree, prefix=""):
    """Nested dict of arrays -> flat dict {"a/b/c": array}; the arrays themselves, not copies."""
    flat = {}
    for name, x in tree.items():
        flat.update(flatten(x, f"{prefix}{name}/") if isinstance(x, dict) else {prefix + name: x})
    return flat


def unflatten(flat):
    """Inverse of `flatten`, but that empty dicts are lost."""
    tree = {}
    for path, x in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = x
    return tree


def tree_map(f, tree):
    """f applied to every array of a nested dict."""
    return {k: tree_map(f, x) if isinstance(x, dict) else f(x) for k, x in tree.items()}


# --------------------------------------------------------------------------------- optimisers


def adam_init(params):
    """Adam's state for a tree of parameters: step count, first (m) and second (v) moments, both
    without bias correction."""
    return {"count": np.zeros((), np.int64), "m": tree_map(np.zeros_like, params),
            "v": tree_map(np.zeros_like, params)}


def adam(params, grads, state, lr, b1=0.9, b2=0.999, eps=1e-8):
    """One Adam step (Kingma & Ba 2015, Algorithm 1), in place on params and state.

    grads may lack networks of params: these stay as they are, their moments too. All networks
    share the step count.
    """
    state["count"] += 1
    t = int(state["count"])
    flat, ms, vs = flatten(params), flatten(state["m"]), flatten(state["v"])
    for name, g in flatten(grads).items():
        m, v = ms[name], vs[name]
        m[...] = b1 * m + (1 - b1) * g
        v[...] = b2 * v + (1 - b2) * (g * g)
        flat[name] -= lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        if t % 100 == 0:                # Moments of dead units would decay into subnormal numbers,
            m[np.abs(m) < 1e-30] = 0    # which are slow, and stay there. Set to 0 before, they
            v[v < 1e-36] = 0            # change no bit of params: m / eps, sqrt(v) / eps < 1e-9.


def ema(target, params, rate):
    """target <- (1 - rate) target + rate params, in place; target may lack networks of params."""
    source = flatten(params)
    for name, x in flatten(target).items():
        x[...] = (1 - rate) * x + rate * source[name]


# -------------------------------------------------------------------------- derivative checks


def derivative_error(f, tree, grads):
    """Largest relative error of analytic derivatives against the complex step.

    f maps a tree of arrays to a scalar; grads holds df/dx for some arrays of that tree. The
    complex step Im f(x + ih)/h with h = 1e-30 has no cancellation: it is exact to rounding.
    Error of an array: max|a - b| / max(max|b|, 1e-3), a analytic, b by the step. -> {name: error}
    """
    flat = {k: x.astype(complex) if x.dtype.kind == "f" else x for k, x in flatten(tree).items()}
    tree, errors = unflatten(flat), {}
    for name, a in flatten(grads).items():
        b = np.empty(a.shape)
        for i in np.ndindex(*a.shape):
            flat[name][i] += 1e-30j
            b[i] = np.imag(f(tree)) / 1e-30
            flat[name][i] -= 1e-30j
        errors[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3))
    return errors


def layer_errors():
    """{layer: {parameter or "x": error}} for every layer, on random float64 arguments."""
    rng = np.random.default_rng(0)
    x, wide = rng.normal(size=(5, 4)), rng.normal(size=(2, 5, 4))
    twin = tree_map(lambda w: w + rng.normal(size=w.shape),
                    init_mlp(rng, (4, 6, 6, 3), norm=True, ensemble=2, dtype=float))
    norm = {"scale": rng.normal(size=4), "shift": rng.normal(size=4)}
    target, a = rng.normal(size=(5, 4)), rng.integers(4, size=5)
    cases = {
        "linear": (linear, {"W": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}, x),
        "linear, twin on shared x": (linear, twin["dense0"], x),
        "linear, twin": (linear, twin["dense0"], wide),
        "layer_norm": (layer_norm, norm, x),
        "gelu": (gelu, {}, x), "relu": (relu, {}, x), "tanh": (tanh, {}, x),
        "length_normalize": (length_normalize, {}, x),
        "mlp, twin, gelu, layer_norm": (mlp, twin, x),
        "gaussian, std 1": (lambda p, x: gaussian_log_prob(p, x, target), {}, x),
        "gaussian, learned std": (lambda p, x: gaussian_log_prob(p, x, target),
                                  {"log_std": rng.normal(size=4)}, x),
        "categorical": (lambda p, x: categorical_log_prob(p, x, a), {}, x),
    }
    errors = {}
    for name, (layer, p, x) in cases.items():
        y, back = layer(p, x)
        dy = rng.normal(size=y.shape)                           # a random direction of output
        dx, grads = back(dy)
        errors[name] = derivative_error(
            lambda tree: (dy * layer(tree.get("p", {}), tree["x"])[0]).sum(),
            {"p": p, "x": x}, {"p": grads, "x": dx})
    return errors


if __name__ == "__main__":
    print("layer: largest relative error of the analytic derivative against the complex step")
    for name, errors in layer_errors().items():
        print(f"{name:30s} {max(errors.values()):.1e}   ({', '.join(errors)})")
