"""Checkers of notebook 08."""

from exercises.verdict import called, checker, same
from minitransformer import TransformerConfig
from peft import ALL_LINEARS, LoRA, expected_parameters
from peft.sites import linear_shapes


@checker
def check_lora_parameters(lora_parameters) -> str:
    """lora_parameters(r, targets, n_layers, d_model, d_ff): how many parameters a LoRA trains in the whole model."""
    gpt3, small = (96, 12288, 49152), (3, 20, 50)
    cases = [(gpt3, 2, ("query", "key", "value", "output")), (gpt3, 1, ("query", "value"))]
    cases += [(small, 4, ALL_LINEARS), (gpt3, 8, ALL_LINEARS), (small, 2, ("down",))]
    for (layers, d, d_ff), r, targets in cases:
        config = TransformerConfig(vocab_size=9, max_len=9, d_model=d, n_heads=4, n_layers=layers, d_ff=d_ff)
        expected = expected_parameters(config, LoRA(rank=r, targets=targets))
        shapes = {name.split(".")[-1]: shape for name, shape in linear_shapes(config).items()}
        maps = [shapes[target] for target in targets]
        hints = {
            "every layer has its own A and B": expected / layers,
            "that is A alone: B [d_out, r] is trained as well": layers * sum(r * d_in for d_in, _ in maps),
            "that is B alone: A [r, d_in] is trained as well": layers * sum(r * d_out for _, d_out in maps),
            "that is one map in each layer; every target has an A and a B of its own": expected / len(targets),
            "the FFN's linear layers have d_ff dimensions on one side": layers * len(targets) * 2 * r * d,
            "that is the size of the weights themselves, which stay frozen": layers * sum(i * o for i, o in maps),
            "the weights themselves are frozen; only A and B count": layers * sum(i * o for i, o in maps) + expected,
        }
        what = f"the count for r={r} on {', '.join(targets)} ({layers} layers, {d} wide, FFN {d_ff})"
        same(called(lora_parameters, r, targets, layers, d, d_ff), expected, hints, what)
    return "r (d_in + d_out) for each target, also where no model of that size can be built."


@checker
def check_mixed_precision_bytes(mixed_precision_bytes) -> str:
    """mixed_precision_bytes(frozen, trained): bytes of weights, gradients, float32 copies and Adam's two means."""
    for frozen, trained in ((0, 124_439_808), (823_936, 8_192)):
        expected = 2 * frozen + 16 * trained
        hints = {
            "a frozen number has no gradient, no float32 copy and no means: 2 bytes are all": 16 * (frozen + trained),
            "the frozen weights are missing: the forward pass needs them": 16 * trained,
            "that is float32 for everything that is frozen; its weights are kept in 16 bits": 4 * frozen + 16 * trained,
            "4 bytes are missing for each trained parameter: the float32 copy, or one of Adam's two means": expected
            - 4 * trained,
            "2 bytes are missing for each trained parameter: 16-bit weight or gradient": expected
            - 2 * trained,
            "8 bytes are missing for each trained parameter: Adam's two means take 4 each": expected - 8 * trained,
            "that is the weights and gradients only": 2 * frozen + 4 * trained,
        }
        what = f"the bytes for {frozen:,} frozen and {trained:,} trained parameters"
        same(called(mixed_precision_bytes, frozen, trained), expected, hints, what)
    return "2 bytes for a frozen number, 16 for a trained one: that is where the eightfold saving comes from."


@checker
def check_prefix_cache_bytes(prefix_cache_bytes) -> str:
    """prefix_cache_bytes(n, rows, n_layers, n_heads, d_head, bytes_per_number): of a prefix in every row's cache."""
    for n, rows, layers, heads, d_head, width in ((16, 32, 5, 8, 16, 4), (10, 3, 24, 16, 64, 2)):
        expected = 2 * n * rows * layers * heads * d_head * width
        hints = {
            "keys *and* values are kept": expected / 2,
            "every row has a copy of its own here": expected / rows,
            "every layer has a prefix of its own": expected / layers,
            "every head has keys of its own, d_head values each: d_model in all": expected / heads,
            "that is how many values, not how many bytes": expected / width,
            "that is one position; there are n": expected / n,
        }
        got = called(prefix_cache_bytes, n, rows, layers, heads, d_head, width)
        same(got, expected, hints, f"the bytes for n={n}, {rows} rows, {layers} layers, {heads} heads of {d_head}")
    return "2 n n_layers d_model values for each row; kept once, it would be the prefix's own file."


@checker
def check_step_operations(step_operations) -> str:
    """step_operations(frozen, trained, tokens): operations of a training step in the linear layers."""
    for frozen, trained, tokens in ((786_432, 8_192, 1_856), (0, 1_000, 7), (1_000, 0, 7)):
        expected = tokens * (4 * frozen + 6 * trained)
        hints = {
            "a multiplication and an addition are two operations": expected / 2,
            "that is full fine-tuning: a frozen map needs no gradient of its own weights": 6
            * tokens
            * (frozen + trained),
            "the gradient has to travel through the frozen maps as well: two products for each of their weights": tokens
            * (2 * frozen + 6 * trained),
            "a trained map has three products: its output, the gradient of its input, the gradient of its weights": 4
            * tokens
            * (frozen + trained),
            "that is the forward pass alone": 2 * tokens * (frozen + trained),
            "that is the backward pass alone": tokens * (2 * frozen + 4 * trained),
            "that is for one token": expected / tokens,
            "the frozen maps compute as well": 6 * tokens * trained,
        }
        what = f"the count for {frozen:,} frozen and {trained:,} trained parameters and {tokens:,} tokens"
        same(called(step_operations, frozen, trained, tokens), expected, hints, what)
    return "4 for each frozen number and token, 6 for each trained one: at most a third is saved."
