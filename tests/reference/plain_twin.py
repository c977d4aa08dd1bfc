"""Every method at once, written out by hand: one plain function of the frozen weights and the methods' tensors.

Row by row, without padding, masks, wrappers or casts; it knows the tensors by the names of `peft.state_dict` only.
"""

import torch
import torch.nn.functional as F

from peft import BottleneckAdapter, LoRA

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class PlainTwin:
    """`base` is a plain model in float64; `tensors` are those of `peft.state_dict`, which may require gradients."""

    def __init__(self, base, recipes, tensors):
        self.config, self.frozen = base.config, {name: p.detach() for name, p in base.named_parameters()}
        self.recipes, self.tensors = recipes, tensors

    def recipe(self, kind, *placements):
        fitting = [r for r in self.recipes if isinstance(r, kind)]
        return next(r for r in fitting if not placements or r.placement in placements)

    def own(self, site, *names):
        return [self.tensors.get(f"{site}.{name}") for name in names]

    def bottleneck(self, site, h, *placements):
        down, down_bias, up, up_bias = self.own(site, "down_weight", "down_bias", "up_weight", "up_bias")
        if down is None:
            return 0.0
        recipe = self.recipe(BottleneckAdapter, *placements)
        return recipe.scale * (ACTIVATIONS[recipe.activation](h @ down.T + down_bias) @ up.T + up_bias)

    def weight(self, site):
        W = self.frozen[f"{site}.weight"]
        A, B, m, d, b = self.own(site, "A", "B", "magnitude", "d", "b")
        if d is not None:  # VeRA: A and B stand once, whoever shares them
            A, B = (next(t for name, t in self.tensors.items() if name.endswith(end)) for end in (".A", ".B"))
            return W + b[:, None] * (B[: W.shape[0]] @ (d[:, None] * A[:, : W.shape[1]]))
        if A is None:
            return W
        recipe = self.recipe(LoRA)
        W = W + recipe.alpha / (recipe.rank**0.5 if recipe.rank_stabilized else recipe.rank) * (B @ A)
        return W if m is None else m[:, None] * W / W.detach().norm(dim=1, keepdim=True)

    def linear(self, site, x):
        scale, delta = self.own(site, "scale", "delta_bias")
        x = x + self.bottleneck(site, x, "inside_ffn")
        reads = site.endswith("down")
        if scale is not None and reads:
            x = x * scale
        y = x @ self.weight(site).T + self.frozen[f"{site}.bias"]
        if scale is not None and not reads:
            y = y * scale
        return y if delta is None else y + delta

    def norm(self, site, x):
        if f"{site}.weight" not in self.frozen:
            return x
        delta, delta_gain = self.own(site, "delta_bias", "delta_gain")
        gain, bias = self.frozen[f"{site}.weight"], self.frozen[f"{site}.bias"]
        gain = gain if delta_gain is None else gain + delta_gain
        y = F.layer_norm(x, x.shape[-1:], gain, bias, eps=self.config.norm_eps)
        return y if delta is None else y + delta

    def prefix(self, site):
        key, value, hidden, source = self.own(site, "key", "value", "hidden", "source")
        if hidden is not None:
            return self.linear(f"{site}.key", hidden), self.linear(f"{site}.value", hidden)
        if source is not None:
            W, b, *parts = self.own(
                site, "hidden_weight", "hidden_bias", "key_weight", "key_bias", "value_weight", "value_bias"
            )
            h = torch.tanh(source @ W.T + b)
            return h @ parts[0].T + parts[1], h @ parts[2].T + parts[3]
        return key, value

    def attention(self, site, x):
        heads = self.config.n_heads
        q, k, v = (self.linear(f"{site}.{part}", x) for part in ("query", "key", "value"))
        P_k, P_v = self.prefix(site)
        (gate,) = self.own(site, "gate")
        sees = torch.ones(len(x), len(x), dtype=torch.bool)
        sees = sees.tril() if self.config.causal else sees
        if P_k is not None and gate is None:
            k, v = torch.cat([P_k, k]), torch.cat([P_v, v])
            sees = torch.cat([torch.ones(len(x), len(P_k), dtype=torch.bool), sees], dim=1)
        out = []
        for h, (q_h, k_h, v_h) in enumerate(zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)):
            scores = q_h @ k_h.T / q_h.shape[-1] ** 0.5
            seen = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ v_h
            if gate is not None:
                pk, pv = P_k.chunk(heads, dim=-1)[h], P_v.chunk(heads, dim=-1)[h]
                seen = seen + torch.tanh(gate[h]) * (q_h @ pk.T / q_h.shape[-1] ** 0.5).softmax(dim=-1) @ pv
            out.append(seen)
        y = self.linear(f"{site}.output", torch.cat(out, dim=-1))
        return y + self.bottleneck(site, y, "houlsby")

    def feedforward(self, site, x):
        y = self.linear(f"{site}.down", ACTIVATIONS[self.config.activation](self.linear(f"{site}.up", x)))
        beside = any(getattr(r, "placement", None) == "parallel" for r in self.recipes)
        return y + self.bottleneck(site, x if beside else y, "houlsby", "pfeiffer", "parallel")

    def hidden(self, words):
        x = self.frozen["embedding.token.weight"][words]
        prompt = self.tensors.get("embedding.prompt")
        x = x if prompt is None else torch.cat([prompt, x])
        x = x + self.frozen["embedding.position.weight"][: len(x)]
        for i in range(self.config.n_layers):
            block = f"blocks.{i}"
            for sublayer in ("attention", "feedforward"):
                sub, norm = getattr(self, sublayer), f"{block}.norm_{sublayer}"
                if self.config.norm == "pre":
                    x = x + sub(f"{block}.{sublayer}", self.norm(norm, x))
                else:
                    x = self.norm(norm, x + sub(f"{block}.{sublayer}", x))
        return self.norm("norm", x)[-len(words) :]

    def logits(self, tokens, mask):
        """At the real tokens of all rows, one row after the other; padding stands on the right."""
        hidden = torch.cat([self.hidden(row[real]) for row, real in zip(tokens, mask, strict=True)])
        return hidden @ self.frozen["embedding.token.weight"].T * self.config.logit_scale
