"""The whole forward pass once more, in NumPy, from the papers' formulas and with loops where a loop is plainest.

It shares no code with the package: no torch, one row of the batch at a time, one head at a time, and padding is not
masked but *cut out*, so that a padded batch is compared with rows that never saw padding.

Sources: Vaswani et al. 2017 (equations 1 and 2, section 3.1), Radford et al. 2019 section 2.3 (pre-norm), Devlin et
al. 2019 (embeddings, masked language model's head), Ba et al. 2016 equation 4 (LayerNorm), Hendrycks & Gimpel 2016
(GELU); for the Llama family Zhang & Sennrich 2019 equation 4 (RMSNorm), Su et al. 2021 equation 15 (rotary positions),
Shazeer 2020 equation 6 (SwiGLU), Ainslie et al. 2023 section 2.2 (grouped-query attention).
"""

import math

import numpy as np


def layer_norm(x, weight, bias, eps):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return weight * (x - mean) / np.sqrt(variance + eps) + bias


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def rotated(x, positions, theta):
    """R(t) x, [T, d_head]: the pair (x_i, x_{i + d_head / 2}) turned by the angle t theta^(-2i / d_head)."""
    out, half = np.zeros_like(x), x.shape[1] // 2
    for row, t in enumerate(positions):
        for i in range(half):
            angle = t * theta ** (-2 * i / x.shape[1])
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            out[row, [i, i + half]] = turn @ x[row, [i, i + half]]
    return out


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


ACTIVATIONS = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": lambda x: np.maximum(x, 0), "silu": silu}


def attention_of_one_head(q, k, v, causal):
    """softmax(q kᵀ / sqrt(d_head)) v, query by query. Returns [T, d_head] and the weights [T, S]."""
    out, weights = np.zeros_like(q), np.zeros((len(q), len(k)))
    for t in range(len(q)):
        seen = t + 1 if causal else len(k)
        weights[t, :seen] = softmax(k[:seen] @ q[t] / math.sqrt(q.shape[1]))
        out[t] = weights[t] @ v
    return out, weights


class NumpyTransformer:
    """`weights`: name -> array, by the package's names. `config`: any object with the package's config fields."""

    def __init__(self, weights, config):
        self.weights, self.config = weights, config

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        if self.config.norm_type == "rms":
            return rms_norm(x, self.weights[f"{name}.weight"], self.config.norm_eps)
        return layer_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.config.norm_eps)

    def attention(self, name, x):
        q, k, v = (self.linear(f"{name}.{part}", x) for part in ("query", "key", "value"))
        heads = []
        for h in range(self.config.n_heads):
            shared = h * (self.config.n_kv_heads or self.config.n_heads) // self.config.n_heads
            parts = [self.head(part, i) for part, i in ((q, h), (k, shared), (v, shared))]
            if self.config.position == "rotary":
                parts[:2] = (rotated(part, range(len(x)), self.config.rope_theta) for part in parts[:2])
            heads.append(attention_of_one_head(*parts, self.config.causal)[0])
        return self.linear(f"{name}.output", np.concatenate(heads, axis=1))

    def head(self, x, h):
        d_head = self.config.head_dim or self.config.d_model // self.config.n_heads
        return x[:, h * d_head : (h + 1) * d_head]

    def feedforward(self, name, x):
        activate, up = ACTIVATIONS[self.config.activation], self.linear(f"{name}.up", x)
        hidden = activate(self.linear(f"{name}.gate", x)) * up if self.config.gated else activate(up)
        return self.linear(f"{name}.down", hidden)

    def block(self, name, x):
        if self.config.norm == "pre":
            x = x + self.attention(f"{name}.attention", self.norm(f"{name}.norm_attention", x))
            return x + self.feedforward(f"{name}.feedforward", self.norm(f"{name}.norm_feedforward", x))
        x = self.norm(f"{name}.norm_attention", x + self.attention(f"{name}.attention", x))
        return self.norm(f"{name}.norm_feedforward", x + self.feedforward(f"{name}.feedforward", x))

    def embedding(self, tokens, segments):
        x = self.weights["embedding.token.weight"][tokens]
        if self.config.position == "learned":
            x = x + self.weights["embedding.position.weight"][: len(tokens)]
        if self.config.n_segments:
            x = x + self.weights["embedding.segment.weight"][segments]
        return self.norm("embedding.norm", x) if self.config.embedding_norm else x

    def hidden_of_row(self, tokens, segments):
        """The hidden states of one row without padding: [T] -> [T, d_model]."""
        x = self.embedding(tokens, segments)
        for i in range(self.config.n_layers):
            x = self.block(f"blocks.{i}", x)
        return self.norm("norm", x) if self.config.norm == "pre" else x

    def lm_head(self, hidden):
        words = self.weights["head.weight" if self.config.lm_head == "untied" else "embedding.token.weight"]
        if self.config.lm_head != "bert":
            return hidden @ words.T * self.config.logit_scale
        hidden = self.norm("head.norm", ACTIVATIONS[self.config.activation](self.linear("head.dense", hidden)))
        return hidden @ words.T + self.weights["head.bias"]

    def hidden(self, tokens, real, segments=None):
        """[B, T] -> [B, T, d_model]; zeros at padding."""
        segments = np.zeros_like(tokens) if segments is None else segments
        out = np.zeros((*tokens.shape, self.config.d_model))
        for row in range(len(tokens)):
            out[row, real[row]] = self.hidden_of_row(tokens[row, real[row]], segments[row, real[row]])
        return out

    def logits(self, tokens, real, segments=None):
        """[B, T] -> [B, T, V]; meaningless at padding."""
        return self.lm_head(self.hidden(tokens, real, segments))


class NumpyAdamW:
    """Loshchilov & Hutter 2019, algorithm 2, with the learning rate as the schedule multiplier."""

    def __init__(self, weights, learning_rate, betas, weight_decay, eps=1e-8):
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.learning_rate, self.betas, self.weight_decay, self.eps = learning_rate, betas, weight_decay, eps
        self.m = {name: np.zeros_like(w) for name, w in weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in weights.items()}
        self.t = 0

    def step(self, gradients, factor=1.0):
        self.t += 1
        rate, (beta1, beta2) = self.learning_rate * factor, self.betas
        for name, g in gradients.items():
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g**2
            m_hat, v_hat = self.m[name] / (1 - beta1**self.t), self.v[name] / (1 - beta2**self.t)
            self.weights[name] = self.weights[name] * (1 - rate * self.weight_decay)
            self.weights[name] = self.weights[name] - rate * m_hat / (np.sqrt(v_hat) + self.eps)


def clip_by_global_norm(gradients, largest):
    """Pascanu et al. 2013, algorithm 1, over all tensors together."""
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * min(1.0, largest / norm) for name, g in gradients.items()}, norm
