"""Every function of `peft/functional.py` once more, in NumPy: forward, and backward derived by hand.

It shares no code with the package. A backward function takes g, the gradient of a loss with respect to the output, and
returns the gradients with respect to the inputs, in their order. Two rules give nearly all of it:

    y = x Wᵀ      gives   dx = g W,   dW = gᵀ x                     (rows of x and g summed over)
    a = softmax(s)  gives   ds = a * (da - sum_j a_j da_j)            (row by row)
"""

import math

import numpy as np


def rows(x):
    """All leading axes as one."""
    return x.reshape(-1, x.shape[-1])


def softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# LoRA


def lora_update(x, A, B, scale):
    return scale * np.einsum("or,ri,...i->...o", B, A, x)


def lora_update_backward(g, x, A, B, scale):
    """y = s B u with u = A x:  dB = s gᵀ u,  du = s g B,  dA = duᵀ x,  dx = du A."""
    u, flat = rows(x) @ A.T, rows(g)
    du = scale * flat @ B
    return (du @ A).reshape(x.shape), du.T @ rows(x), scale * flat.T @ u


def lora_weight(A, B, scale):
    return scale * np.einsum("or,ri->oi", B, A)


def lora_weight_backward(g, A, B, scale):
    """ΔW = s B A:  dA = s Bᵀ g,  dB = s g Aᵀ."""
    return scale * B.T @ g, scale * g @ A.T


def vera_update(x, A, B, d, b):
    return np.einsum("o,or,r,ri,...i->...o", b, B, d, A, x)


def vera_update_backward(g, x, A, B, d, b):
    """y = b z with z = B v, v = d u, u = A x:  db = g·z,  dz = b g,  dB = dzᵀ v,  dv = dz B,  dd = dv·u,  du = d dv."""
    u, flat = rows(x) @ A.T, rows(g)
    v = d * u
    dz = b * flat
    dv = dz @ B
    du = d * dv
    return (du @ A).reshape(x.shape), du.T @ rows(x), dz.T @ v, (dv * u).sum(axis=0), (flat * (v @ B.T)).sum(axis=0)


def vera_weight(A, B, d, b):
    return np.einsum("o,or,r,ri->oi", b, B, d, A)


def vera_weight_backward(g, A, B, d, b):
    """ΔW = diag(b) B diag(d) A, entry by entry."""
    dA = np.einsum("oi,o,or,r->ri", g, b, B, d)
    dB = np.einsum("oi,o,r,ri->or", g, b, d, A)
    return dA, dB, np.einsum("oi,o,or,ri->r", g, b, B, A), np.einsum("oi,or,r,ri->o", g, B, d, A)


def row_norms(weight):
    return np.sqrt(np.einsum("oi,oi->o", weight, weight))


def row_norms_backward(g, weight):
    """|w| = sqrt(w·w):  dw = g w / |w|."""
    return ((g / row_norms(weight))[:, None] * weight,)


def dora_weight(frozen_weight, A, B, magnitude, scale, norms):
    rows_of = [m * (w + scale * b @ A) / n for m, w, b, n in zip(magnitude, frozen_weight, B, norms, strict=True)]
    return np.stack(rows_of)


def dora_weight_backward(g, frozen_weight, A, B, magnitude, scale, norms):
    """W' = c D, D = W0 + s B A, c = m / norm, row by row:  dD = c g,  dm = g·D / norm; then as for ΔW."""
    direction = frozen_weight + scale * B @ A
    dD = (magnitude / norms)[:, None] * g
    return dD, scale * B.T @ dD, scale * dD @ A.T, (g * direction).sum(axis=1) / norms


# Prefix


def one_head(q, k, v, mask):
    """softmax(q kᵀ / sqrt(d_head)) v of one head of one row, and its weights."""
    a = softmax(np.where(mask, q @ k.T / math.sqrt(q.shape[1]), -np.inf))
    return a @ v, a


def one_head_backward(g, q, k, v, a):
    """o = a v:  da = g vᵀ,  dv = aᵀ g;  s = q kᵀ / sqrt(d):  dq = ds k / sqrt(d),  dk = dsᵀ q / sqrt(d).

    A hidden key has a = 0, hence ds = 0: it neither gets a gradient nor gives one.
    """
    da = g @ v.T
    ds = a * (da - (a * da).sum(axis=1, keepdims=True)) / math.sqrt(q.shape[1])
    return ds @ k, ds.T @ q, a.T @ g


def full_mask(q, k, mask):
    shape = (*q.shape[:3], k.shape[2])
    return np.ones(shape, dtype=bool) if mask is None else np.broadcast_to(mask, shape)


def prefix_attention(q, k, v, prefix_k, prefix_v, mask=None):
    out, seen, n = np.zeros_like(q), full_mask(q, k, mask), prefix_k.shape[2]
    for b, h in np.ndindex(q.shape[:2]):
        visible = np.concatenate([np.ones((q.shape[2], n), dtype=bool), seen[b, h]], axis=1)
        keys, values = np.concatenate([prefix_k[b, h], k[b, h]]), np.concatenate([prefix_v[b, h], v[b, h]])
        out[b, h], _ = one_head(q[b, h], keys, values, visible)
    return out


def prefix_attention_backward(g, q, k, v, prefix_k, prefix_v, mask=None):
    """Attention's own backward over [P_k ; K] and [P_v ; V]; the first n rows of dK and dV are the prefix's."""
    gradients = [np.zeros_like(x) for x in (q, k, v, prefix_k, prefix_v)]
    seen, n = full_mask(q, k, mask), prefix_k.shape[2]
    for b, h in np.ndindex(q.shape[:2]):
        visible = np.concatenate([np.ones((q.shape[2], n), dtype=bool), seen[b, h]], axis=1)
        keys, values = np.concatenate([prefix_k[b, h], k[b, h]]), np.concatenate([prefix_v[b, h], v[b, h]])
        _, a = one_head(q[b, h], keys, values, visible)
        dq, dk, dv = one_head_backward(g[b, h], q[b, h], keys, values, a)
        for gradient, part in zip(gradients, (dq, dk[n:], dv[n:], dk[:n], dv[:n]), strict=True):
            gradient[b, h] = part
    return tuple(gradients)


def gate_of(q, k, prefix_k, mask):
    """lambda: the share of exp(scores) that falls on the prefix. He et al. 2022, equation 7."""
    own = np.where(mask, np.exp(q @ k.T / math.sqrt(q.shape[1])), 0.0).sum(axis=1, keepdims=True)
    prefix = np.exp(q @ prefix_k.T / math.sqrt(q.shape[1])).sum(axis=1, keepdims=True)
    return prefix / (own + prefix)


def gated_attention(q, k, v, prefix_k, prefix_v, mask=None):
    out, gates, seen = np.zeros_like(q), np.zeros((*q.shape[:3], 1)), full_mask(q, k, mask)
    for b, h in np.ndindex(q.shape[:2]):
        gate = gates[b, h] = gate_of(q[b, h], k[b, h], prefix_k[b, h], seen[b, h])
        own, _ = one_head(q[b, h], k[b, h], v[b, h], seen[b, h])
        prefix, _ = one_head(q[b, h], prefix_k[b, h], prefix_v[b, h], True)
        out[b, h] = (1 - gate) * own + gate * prefix
    return out, gates


def gated_attention_backward(g, q, k, v, prefix_k, prefix_v, mask=None):
    """g is the pair of gradients for the output o = (1 - lambda) u + lambda w and for the gate lambda.

    du = (1 - lambda) g and dw = lambda g go through the two attentions. lambda = sigmoid(m_P - m), where m = log sum
    exp(s):  dlambda = g · (w - u) + g_lambda,  dm_P = lambda (1 - lambda) dlambda = -dm,  and dm/ds = softmax(s) adds
    a dm to ds (a_P dm_P to ds_P).
    """
    g_out, g_gate = g
    gradients = [np.zeros_like(x) for x in (q, k, v, prefix_k, prefix_v)]
    seen, root = full_mask(q, k, mask), math.sqrt(q.shape[-1])
    for b, h in np.ndindex(q.shape[:2]):
        qs, ks, vs, pk, pv, go = (x[b, h] for x in (q, k, v, prefix_k, prefix_v, g_out))
        gate = gate_of(qs, ks, pk, seen[b, h])
        (u, a), (w, a_prefix) = one_head(qs, ks, vs, seen[b, h]), one_head(qs, pk, pv, True)
        dm = gate * (1 - gate) * ((go * (w - u)).sum(axis=1, keepdims=True) + g_gate[b, h])
        dq, dk, dv = one_head_backward((1 - gate) * go, qs, ks, vs, a)
        dq_prefix, dpk, dpv = one_head_backward(gate * go, qs, pk, pv, a_prefix)
        ds, ds_prefix = -dm * a / root, dm * a_prefix / root
        parts = (dq + dq_prefix + ds @ ks + ds_prefix @ pk, dk + ds.T @ qs, dv, dpk + ds_prefix.T @ qs, dpv)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[b, h] = part
    return tuple(gradients)


def gated_prefix(own, q, prefix_k, prefix_v, gate):
    out = own.copy()
    for b, h in np.ndindex(q.shape[:2]):
        seen, _ = one_head(q[b, h], prefix_k[b, h], prefix_v[b, h], True)
        out[b, h] += math.tanh(gate[h]) * seen
    return out


def gated_prefix_backward(g, own, q, prefix_k, prefix_v, gate):
    """o = own + t u, t = tanh(gate):  dgate = (1 - t²) g·u over rows and queries;  du = t g goes through attention."""
    gradients = [np.zeros_like(x) for x in (q, prefix_k, prefix_v)]
    dgate = np.zeros_like(gate)
    for b, h in np.ndindex(q.shape[:2]):
        t = math.tanh(gate[h])
        parts = (q[b, h], prefix_k[b, h], prefix_v[b, h])
        seen, a = one_head(*parts, True)
        dgate[h] += (1 - t**2) * (g[b, h] * seen).sum()
        for gradient, part in zip(gradients, one_head_backward(t * g[b, h], *parts, a), strict=True):
            gradient[b, h] = part
    return g, *gradients, dgate


def prefix_mlp(source, hidden_weight, hidden_bias, out_weight, out_bias):
    return np.tanh(source @ hidden_weight.T + hidden_bias) @ out_weight.T + out_bias


def prefix_mlp_backward(g, source, hidden_weight, hidden_bias, out_weight, out_bias):
    """P = t W_oᵀ + b_o, t = tanh(z), z = P' W_hᵀ + b_h:  dz = (g W_o)(1 - t²); biases sum over the rows."""
    t = np.tanh(source @ hidden_weight.T + hidden_bias)
    dz = g @ out_weight * (1 - t**2)
    return dz @ hidden_weight, dz.T @ source, dz.sum(axis=0), g.T @ t, g.sum(axis=0)


# Prompt


def prepend(prompt, vectors):
    return np.stack([np.concatenate([prompt, row]) for row in vectors])


def prepend_backward(g, prompt, vectors):
    """The prompt stands in every row, so its gradients add up; each row's own pass through."""
    return g[:, : len(prompt)].sum(axis=0), g[:, len(prompt) :]


# Adapters


def phi(z):
    """The standard normal's density; `normal_cdf` is its integral."""
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def normal_cdf(z):
    return 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def gelu_tanh(z):
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def gelu_tanh_slope(z):
    """z (1 + t) / 2 with t = tanh(c (z + k z³)):  (1 + t) / 2 + z (1 - t²) c (1 + 3 k z²) / 2."""
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(c * (z + k * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * k * z**2)


ACTIVATIONS = {  # value, slope
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(z.dtype)),
    "gelu": (lambda z: z * normal_cdf(z), lambda z: normal_cdf(z) + z * phi(z)),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
}


def bottleneck(h, down_weight, down_bias, up_weight, up_bias, activation="relu", scale=1.0):
    a = ACTIVATIONS[activation][0](h @ down_weight.T + down_bias)
    return scale * (a @ up_weight.T + up_bias)


def bottleneck_backward(g, h, down_weight, down_bias, up_weight, up_bias, activation="relu", scale=1.0):
    """y = s (a W_upᵀ + b_up), a = act(z), z = h W_downᵀ + b_down:  dz = s (g W_up) act'(z)."""
    value, slope = ACTIVATIONS[activation]
    z, g = rows(h) @ down_weight.T + down_bias, scale * rows(g)
    dz = g @ up_weight * slope(z)
    return (dz @ down_weight).reshape(h.shape), dz.T @ rows(h), dz.sum(axis=0), g.T @ value(z), g.sum(axis=0)


# Scales and biases


def rescaled(h, scale):
    return np.einsum("...d,d->...d", h, scale)


def rescaled_backward(g, h, scale):
    """y = l h:  dh = l g,  dl = g h, summed over the rows."""
    return g * scale, (rows(g) * rows(h)).sum(axis=0)


def shifted(h, delta_bias):
    return np.stack([row + delta_bias for row in rows(h)]).reshape(h.shape)


def shifted_backward(g, h, delta_bias):
    return g, rows(g).sum(axis=0)


def normalized(x, eps, centred):
    """(x - m) / s row by row, and s: the root of the mean square of what stands above it, eps added under it."""
    x = x - x.mean(axis=-1, keepdims=True) if centred else x
    s = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return x / s, s


def gain_update(x, delta_gain, eps, centred=True):
    return np.einsum("...d,d->...d", normalized(x, eps, centred)[0], delta_gain)


def gain_update_backward(g, x, delta_gain, eps, centred=True):
    """y = Δg n, n = c / s:  dΔg = g n;  with e = g Δg:  dc = (e - n mean(e n)) / s,  dx = dc, less its mean if
    c = x - mean(x)."""
    n, s = normalized(x, eps, centred)
    e = g * delta_gain
    dc = (e - n * (e * n).mean(axis=-1, keepdims=True)) / s
    return dc - dc.mean(axis=-1, keepdims=True) if centred else dc, (rows(g) * rows(n)).sum(axis=0)
