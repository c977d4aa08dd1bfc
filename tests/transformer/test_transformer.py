import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.numpy_transformer import ACTIVATIONS, NumpyTransformer
from reference.random_weights import randomize
from reference.tiny_models import KINDS_AND_LLAMA, tiny_of
from torch.utils.checkpoint import checkpoint

from minitransformer import Transformer, TransformerConfig
from minitransformer.attention import recorded
from minitransformer.cache import KVCache

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6]])
LENGTHS = torch.tensor([7, 4, 1])[:, None]
COLUMNS = torch.arange(7)
MASKS = {"full": LENGTHS > -1, "right": COLUMNS < LENGTHS, "left": COLUMNS >= 7 - LENGTHS}
MASKS["full"] = MASKS["full"].expand(-1, 7)
DECODER = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24)
BERT = {"n_segments": 2, "embedding_norm": True, "lm_head": "bert", "norm_eps": 1e-3}


@pytest.fixture(params=KINDS_AND_LLAMA)
def tiny(request):
    """As elsewhere, and the Llama family."""
    return tiny_of(request.param)


def numpy_twin(model):
    return NumpyTransformer({name: p.detach().double().numpy() for name, p in model.named_parameters()}, model.config)


def real_part(out, mask):
    return out[mask].detach()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_forward_pass_agrees_with_numpy(tiny, activation, mask):
    model, real = tiny(activation=activation, logit_scale=0.5), MASKS[mask]
    expected = numpy_twin(model).logits(TOKENS.numpy(), real.numpy())
    np.testing.assert_allclose(real_part(model(TOKENS, real), real), expected[real.numpy()], atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_berts_additions_agree_with_numpy(tiny, mask):
    model, real = tiny(**BERT), MASKS[mask]
    segments = (TOKENS > 4).long()
    expected = numpy_twin(model).logits(TOKENS.numpy(), real.numpy(), segments.numpy())
    np.testing.assert_allclose(real_part(model(TOKENS, real, segments), real), expected[real.numpy()], atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_written_out_and_fused_attention_agree_in_logits_and_gradients(tiny, mask):
    results = []
    for attention in ("fused", "written_out"):
        model, real = tiny(attention=attention).double(), MASKS[mask]
        logits = model(TOKENS, real)
        logits[real].square().sum().backward()
        results.append({"logits": logits[real]} | {name: p.grad for name, p in model.named_parameters()})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-6, rtol=1e-9, msg=name)


def test_a_later_token_changes_no_earlier_output_of_a_decoder_and_all_of_an_encoder(tiny):
    model = tiny()
    changed = TOKENS.clone()
    changed[:, 4] = 0
    moved = (model(TOKENS) - model(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [not model.config.causal] * 4 + [True] * 3


def test_what_stands_at_padding_does_not_matter(tiny):
    model = tiny()
    for real in (MASKS["left"], MASKS["right"]):
        other = TOKENS.masked_fill(~real, 0)
        assert torch.equal(model(TOKENS, real)[real], model(other, real)[real])


def test_padding_never_gives_nan_in_outputs_or_gradients(tiny):
    model = tiny(attention="written_out")
    for real in (MASKS["left"], MASKS["right"]):
        logits = model(TOKENS, real)
        assert logits.isfinite().all()
        logits[real].sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mask", MASKS)
def test_a_row_in_a_batch_gives_what_it_gives_alone(tiny, mask):
    model, real = tiny(), MASKS[mask]
    logits = model(TOKENS, real)
    for row in range(3):
        alone = model(TOKENS[row, real[row]][None])[0]
        torch.testing.assert_close(logits[row, real[row]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5, 6], [3], [2, 5]], ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_reading_in_pieces_through_a_cache_gives_the_same_logits(norm, mask, cuts):
    model, real = randomize(Transformer(dataclasses.replace(DECODER, norm=norm))), MASKS[mask]
    cache, pieces = KVCache(model.config.n_layers), []
    for start, end in itertools.pairwise([0, *cuts, 7]):
        pieces.append(model(TOKENS[:, start:end], real[:, start:end], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], model(TOKENS, real)[real], atol=1e-5, rtol=1e-5)


def test_attention_weights_are_rows_that_sum_to_1_and_leave_padding_out(tiny):
    model, real = tiny(dropout=0.5), MASKS["left"]
    model.train()
    weights = model.attention_weights(TOKENS, real)
    assert len(weights) == 2 and weights[0].shape == (3, 2, 7, 7)
    for layer in weights:
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(3, 2, 7))
        assert layer[1, :, 3:, :3].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, model.attention_weights(TOKENS, real), strict=True))
    assert model.blocks[1].training


def gradients(model, **options):
    model(TOKENS, MASKS["right"], **options)[MASKS["right"]].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_gives_the_same_gradients(tiny):
    plain, recomputed = gradients(tiny()), gradients(tiny(gradient_checkpointing=True))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_gradient_checkpointing_reaches_the_first_block_of_a_frozen_model(tiny):
    found = []
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing).requires_grad_(False)
        model.blocks[0].attention.query.weight.requires_grad_(True)
        found.append(gradients(model)["blocks.0.attention.query.weight"])
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_recorded_weights_are_those_of_the_pass_and_nobody_records_afterwards(tiny):
    model = tiny(gradient_checkpointing=True)
    with recorded(model) as weights:
        hidden = model.hidden(TOKENS)
    assert len(weights) == 2
    hidden.sum().backward()
    assert len(weights) == 2
    assert all(torch.equal(*pair) for pair in zip(weights, model.attention_weights(TOKENS), strict=True))


def test_what_is_computed_again_for_a_gradient_is_not_recorded_twice(tiny):
    model = tiny(gradient_checkpointing=True)
    with recorded(model) as weights:
        model.hidden(TOKENS).sum().backward()
        assert len(weights) == 2
        checkpoint(model.hidden, TOKENS, use_reentrant=False).sum().backward()
    assert len(weights) == 4


def test_who_records_a_layer_sees_no_other_and_two_may_record_one(tiny):
    model = tiny()
    with recorded(model) as all_of_them, recorded(model.blocks[1].attention) as one:
        model(TOKENS)
    assert len(all_of_them) == 2 and len(one) == 1 and torch.equal(one[0], all_of_them[1])


def test_recorded_weights_know_a_mask_that_comes_by_name(tiny):
    model = tiny()
    expected = model.attention_weights(TOKENS)

    class ByName(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x, mask=None, context=None):
            return self.base(x, mask=mask, context=context)

    for block in model.blocks:
        block.attention = ByName(block.attention)
    assert all(torch.equal(*pair) for pair in zip(model.attention_weights(TOKENS), expected, strict=True))


def test_the_loss_of_a_model_is_the_cross_entropy_of_its_logits(tiny):
    model = tiny().double()
    targets = TOKENS.roll(-1, dims=1)
    targets[0, 2:] = -100
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(TOKENS, targets), expected)
    assert torch.autograd.grad(model.loss(TOKENS, targets), model.embedding.token.weight)[0].abs().max() > 0


def test_gradients_of_the_whole_model_agree_with_finite_differences():
    config = TransformerConfig(vocab_size=5, max_len=4, d_model=4, n_heads=2, n_layers=2, d_ff=5, norm_eps=0.1)
    model = randomize(Transformer(config)).double()
    names, weights = zip(*model.named_parameters(), strict=True)
    tokens, real = torch.tensor([[1, 2, 3], [4, 0, 1]]), torch.tensor([[True] * 3, [False, True, True]])

    def run(*weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (tokens, real))[real]

    assert torch.autograd.gradcheck(run, [w.detach().clone().requires_grad_() for w in weights], fast_mode=True)


def test_module_names_are_the_documented_ones(tiny):
    names = set(dict(tiny().named_modules()))
    block = ("attention.query", "attention.key", "attention.value", "attention.output", "feedforward.up")
    block += ("feedforward.down", "norm_attention", "norm_feedforward")
    assert {"embedding.token", "norm"} | {f"blocks.1.{name}" for name in block} <= names
    assert ("embedding.position" in names) != ("blocks.1.feedforward.gate" in names)


def test_a_loss_of_no_word_is_refused(tiny):
    with pytest.raises(ValueError, match="targets ask for no word: all are -100"):
        tiny().loss(TOKENS, torch.full_like(TOKENS, -100))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t + 30, "the target 3[0-9] is none of the 23 words; only -100 asks nothing"),
        (lambda t: t * 0 - 1, "the target -1 is none of the 23 words"),
        (lambda t: t[:, 1:], r"are not \[N, T\]"),
        (lambda t: t.float(), r"torch.float32 \[3, 7\], are not"),
        (lambda t: t, "targets ask padding for a word"),
    ],
    ids=["beyond", "negative", "another shape", "real numbers", "at padding"],
)
def test_a_loss_of_what_is_no_word_is_refused(tiny, unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        tiny().loss(TOKENS, change(TOKENS), MASKS["left"])


@pytest.mark.parametrize("asked", [[0, -1, 2], [0, 1, 7]], ids=str)
def test_an_asked_position_outside_the_text_is_refused(tiny, asked):
    with pytest.raises(ValueError, match=r"asked positions run from 0 to 6, got \["):
        tiny().hidden(TOKENS, asked=torch.tensor(asked))


@pytest.mark.parametrize(
    "tokens, mask, message",
    [
        (TOKENS[:0], None, r"tokens is empty, shape \(0, 7\); give at least one row"),
        (TOKENS, MASKS["full"] & (LENGTHS > 1), r"hides every token of row 2 \(1 such rows\).*invert the mask"),
        (TOKENS + 20, None, "tokens range from 21 to 29, but the vocabulary has 23"),
        (TOKENS - 2, None, "tokens range from -1 to 7"),
        (torch.ones(1, 13, dtype=torch.long), None, "13 positions, but max_len is 12; shorten the text"),
    ],
    ids=["empty", "hidden row", "beyond", "negative", "too long"],
)
def test_bad_input_is_refused(tiny, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny()(tokens, mask)


@pytest.mark.parametrize(
    "tokens, mask, message",
    [
        (TOKENS[0], None, r"tokens must be \[B, T\], got shape \(7,\); tokens\[None\]"),
        (TOKENS.float(), None, r"word numbers, torch.int64 or torch.int32, got torch.float32; use tokens.long\(\)"),
        (TOKENS, MASKS["left"].long(), r"padding_mask must be bool .* got torch.int64 .*; mask.bool\(\)"),
        (TOKENS, MASKS["left"][:1], r"of the shape of tokens, \(3, 7\), got torch.bool \(1, 7\)"),
    ],
    ids=["one row", "real numbers", "integers", "another shape"],
)
def test_bad_shapes_have_messages_of_their_own_where_shapes_are_not_checked(tiny, unchecked, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny()(tokens, mask)


def test_an_encoder_refuses_a_cache():
    with pytest.raises(ValueError, match="an encoder has no KV cache"):
        Transformer(dataclasses.replace(DECODER, causal=False))(TOKENS, cache=KVCache(2))
