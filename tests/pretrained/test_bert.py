import pytest
import torch
from reference.golden import read_golden, weighted_sum

from minitransformer.pretrained import from_bert

GOLDEN = read_golden("huggingface_bert")
TOKENS, REAL, SEGMENTS = (GOLDEN.input[name] for name in ("tokens", "padding_mask", "segments"))


def state_dict_of(kind):
    """As the class writes it: `BertModel` has no prefix and a pooler; the others have prefix and heads."""
    prefix = "bert." if kind == "BertModel" else ""
    return {name: GOLDEN.weight[prefix + name] for name in GOLDEN.names[kind]}


def old_names():
    """As the first files have it: gamma and beta, position numbers stored, the tied copies left out."""
    tensors = {}
    for name, tensor in state_dict_of("BertForPreTraining").items():
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            name = name.replace(new, old)
        if "decoder" not in name:
            tensors[name] = tensor
    return tensors | {"bert.embeddings.position_ids": torch.arange(12)[None]}


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_hidden_states_agree_with_hugging_face(kind):
    model = from_bert(state_dict_of(kind), GOLDEN.config)
    hidden = model.hidden(TOKENS, REAL, SEGMENTS)
    torch.testing.assert_close(hidden[REAL], GOLDEN.output["hidden"][REAL], atol=1e-4, rtol=0)
    assert model.config.lm_head == ("none" if kind == "BertModel" else "bert")


@pytest.mark.parametrize(
    "weights", [state_dict_of("BertForMaskedLM"), state_dict_of("BertForPreTraining"), old_names()], ids=len
)
def test_word_scores_agree_with_hugging_face(weights):
    logits = from_bert(weights, GOLDEN.config)(TOKENS, REAL, SEGMENTS)
    torch.testing.assert_close(logits[REAL], GOLDEN.output["logits"][REAL], atol=1e-4, rtol=0)


def test_gradients_agree():
    model = from_bert(state_dict_of("BertForMaskedLM"), GOLDEN.config)
    weighted_sum(model(TOKENS, REAL, SEGMENTS), REAL).backward()
    ours = {
        "bert.embeddings.word_embeddings.weight": model.embedding.token,
        "bert.embeddings.token_type_embeddings.weight": model.embedding.segment,
        "bert.embeddings.LayerNorm.weight": model.embedding.norm,
        "bert.encoder.layer.0.attention.self.key.weight": model.blocks[0].attention.key,
        "bert.encoder.layer.0.attention.output.LayerNorm.bias": model.blocks[0].norm_attention,
        "bert.encoder.layer.1.intermediate.dense.weight": model.blocks[1].feedforward.up,
        "cls.predictions.transform.dense.weight": model.head.dense,
        "cls.predictions.bias": model.head,
    }
    assert ours.keys() == GOLDEN.gradient.keys()
    for name, module in ours.items():
        gradient = getattr(module, name.rpartition(".")[2]).grad
        torch.testing.assert_close(gradient, GOLDEN.gradient[name], atol=1e-4, rtol=1e-4)


def test_without_the_head_there_are_no_word_scores():
    with pytest.raises(ValueError, match="no language-model head"):
        from_bert(state_dict_of("BertModel"), GOLDEN.config)(TOKENS)


def test_left_out_segments_are_the_first_segment():
    model = from_bert(state_dict_of("BertModel"), GOLDEN.config)
    assert torch.equal(model.hidden(TOKENS), model.hidden(TOKENS, segments=torch.zeros_like(TOKENS)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "mish"}, "'mish' is not supported; choose a checkpoint with one of gelu,"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key', but only 'absolute'"),
        ({"is_decoder": True}, "is_decoder=True, but only False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, but only True"),
        ({"model_type": "roberta"}, "model_type='roberta' .*, but only 'bert'"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"attention_probs_dropout_prob": 0.0}, "one dropout rate.*attention_probs_dropout_prob=0.0; set them"),
        ({"num_hidden_layers": 3}, r"lacks encoder\.layer\.2\..* and 13 more"),
        ({"num_hidden_layers": 1}, r"unexpected tensors: encoder\.layer\.1\..*; drop them"),
        ({"type_vocab_size": 3}, r"token_type_embeddings\.weight' has shape \(2, 24\), but config says \(3, 24\)"),
        ({"vocab_size": 41}, r"has shape \(40, 24\), but config says \(41, 24\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_bert(state_dict_of("BertForMaskedLM"), GOLDEN.config | change)


def test_without_a_head_it_does_not_matter_whether_it_is_tied():
    from_bert(state_dict_of("BertModel"), GOLDEN.config | {"tie_word_embeddings": False})


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("bert.embeddings.LayerNorm.bias", None, r"lacks embeddings\.LayerNorm\.bias"),
        ("cls.predictions.transform.dense.bias", None, r"lacks cls\.predictions\.transform\.dense\.bias"),
        ("classifier.weight", torch.zeros(2, 24), "unexpected tensors: classifier.weight; drop them"),
        ("cls.predictions.bias", torch.zeros(39), "'cls.predictions.decoder.bias' differs from"),
        ("cls.predictions.decoder.weight", torch.zeros(40, 24), "'cls.predictions.decoder.weight' differs from"),
        (
            "embeddings.LayerNorm.bias",
            torch.zeros(24),
            "begin with '' .* and 'bert.' .*; pass the state dict of one model",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(name, tensor, message):
    weights = state_dict_of("BertForMaskedLM")
    weights.pop(name, None)
    with pytest.raises(ValueError, match=message):
        from_bert(weights if tensor is None else weights | {name: tensor}, GOLDEN.config)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ValueError, match=r"lacks hidden_size; pass the whole config\.json"):
        from_bert(state_dict_of("BertModel"), {k: v for k, v in GOLDEN.config.items() if k != "hidden_size"})
