"""The shipped backbone: it is what its record says, and its pretraining can be run again."""

import json
from dataclasses import replace

import pytest
import torch

from minitransformer.pretrained import toy_backbone, toy_record, toy_vocabulary
from minitransformer.pretrained.pretrain import (
    CURRICULUM,
    Recipe,
    Stage,
    backbone_config,
    held_out_loss,
    next_token_cross_entropy,
    pretrain,
    write,
)
from minitransformer.pretrained.toy import BACKBONE
from minitransformer.tasks import probe_scores, sentiment_splits
from minitransformer.tasks.toy.pretraining import pretraining_rows
from minitransformer.tasks.toy.probes import PROBES, probe_rows
from minitransformer.tasks.toy.world import LABELS
from minitransformer.transformer import Transformer
from peft.contents import base_hash

SMALL = Recipe(steps=8, n_rows=2, length=32, warmup=2, probe_every=8, probe_rows=4, threads=1)


@pytest.fixture(scope="module")
def small():
    """A run of eight steps: model and history."""
    return pretrain(SMALL, progress=False)


@pytest.fixture(scope="module")
def backbone():
    return toy_backbone()


@pytest.fixture(scope="module")
def record():
    return toy_record()


def test_the_shipped_file_is_small_and_of_the_stated_shape(backbone):
    assert BACKBONE.stat().st_size <= 4_000_000
    assert backbone.config == backbone_config()
    assert 750_000 < sum(parameter.numel() for parameter in backbone.parameters()) < 900_000
    assert backbone.config.vocab_size == len(toy_vocabulary())


def test_the_held_out_loss_is_the_recorded_one(backbone, record):
    assert held_out_loss(backbone, Recipe()) == pytest.approx(record["held_out_loss"], abs=1e-4)


@pytest.mark.slow
def test_the_probe_scores_are_the_recorded_ones_and_high(backbone, record):
    scores = probe_scores(backbone, n_rows=record["probe_rows"])
    assert set(scores) == set(PROBES)
    for probe, score in scores.items():
        # One row of slack: on another machine two words may tie in the last bit.
        assert score == pytest.approx(record["probes"][probe], abs=1.01 / record["probe_rows"])
        assert score >= 0.95, probe


def test_a_random_model_fails_the_probes():
    scores = probe_scores(Transformer(backbone_config(), seed=3), n_rows=100)
    assert scores["opinion"] < 0.7
    assert max(scores[probe] for probe in ("person", "object", "holder")) < 0.4


def test_zero_shot_sentiment_is_near_chance(backbone):
    """The label words are tied to no opinion: between the two, the frozen model tosses a coin."""
    rows = sentiment_splits(0, (1, 1, 1_000)).test
    positive, negative = toy_vocabulary().encode(list(LABELS))
    with torch.no_grad():
        hidden = backbone.hidden(rows.tokens, rows.padding_mask)
        last = rows.padding_mask.sum(dim=1) - 1
        logits = backbone.lm_head(hidden[torch.arange(len(rows)), last])
    says = torch.where(logits[:, positive] > logits[:, negative], positive, negative)
    assert (says == rows.targets).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_files_trained_on_the_backbone_go_on_knowing_it(backbone):
    assert base_hash(backbone).startswith("6e6bd08dba76bcb986eca928aaee063f")  # as in the files that readers have


def test_each_call_gives_a_copy_of_its_own(backbone):
    other = toy_backbone()
    with torch.no_grad():
        other.embedding.token.weight.zero_()
    assert backbone.embedding.token.weight.abs().sum() > 0
    assert torch.equal(toy_backbone().embedding.token.weight, backbone.embedding.token.weight)


def test_every_position_was_trained_but_the_last_which_no_next_word_is_read_from(backbone):
    fresh = Transformer(backbone.config).embedding.position.weight
    cosine = torch.cosine_similarity(backbone.embedding.position.weight, fresh, dim=1)
    assert (cosine[:-1] < 0.995).all()
    assert cosine[-1] > 0.999999  # weight decay only made it shorter


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(small):
    one, history = small
    same, again = pretrain(SMALL, progress=False)
    other, _ = pretrain(replace(SMALL, seed=1), progress=False)
    assert history == again
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(one.embedding.token.weight, other.embedding.token.weight)


@pytest.mark.slow
def test_a_short_run_is_the_beginning_of_the_whole_run():
    recipe = replace(SMALL, steps=100, probe_every=100)
    whole, part = pretrain(recipe, progress=False)[1], pretrain(recipe, steps=50, progress=False)[1]
    assert [entry["step"] for entry in whole] == [50, 100] and [entry["step"] for entry in part] == [50]
    assert part[0]["loss"] == whole[0]["loss"]


def test_the_first_step_moves_every_weight_by_the_first_rate_of_the_whole_recipe():
    """Adam's first step is the learning rate, up or down: of a warm-up to 2e-3 in two steps, a third of it."""
    recipe = replace(SMALL, weight_decay=0.0)
    model, _ = pretrain(recipe, steps=1, progress=False)
    start = Transformer(backbone_config(), seed=recipe.seed).state_dict()
    moved = torch.cat([(tensor - start[name]).abs().flatten() for name, tensor in model.state_dict().items()])
    assert moved.max().item() == pytest.approx(2e-3 / 3, rel=1e-3)


def test_the_next_stage_begins_when_the_probes_say_so(monkeypatch):
    mixtures, reported = [], []

    def watched(vocabulary, mixture, *size, seed, step):
        if seed == SMALL.seed:  # the held-out text has another
            mixtures.append(mixture)
        return pretraining_rows(vocabulary, mixture, *size, seed=seed, step=step)

    monkeypatch.setattr("minitransformer.pretrained.pretrain.pretraining_rows", watched)
    monkeypatch.setattr("minitransformer.pretrained.pretrain.probe_scores", lambda *_, **__: dict.fromkeys(PROBES, 1.0))
    _, history = pretrain(replace(SMALL, probe_every=3), progress=False, on_probe=reported.append)
    assert mixtures == [CURRICULUM[stage].mixture for stage in (0, 0, 0, 1, 1, 1, 2, 2)]
    assert [(entry["step"], entry["stage"]) for entry in history] == [(3, 1), (6, 2), (8, 3)]
    assert [entry["held_out_loss"] for entry in history] == [entry["held_out_loss"] for entry in reported]


def test_pretraining_learns_and_puts_the_threads_back():
    before = torch.get_num_threads()
    recipe = replace(SMALL, steps=60, n_rows=4, warmup=5, probe_every=60)
    model, history = pretrain(recipe, progress=False)
    assert torch.get_num_threads() == before
    assert history[-1]["loss"] < history[0]["loss"] < 5.2
    assert history[-1]["held_out_loss"] == pytest.approx(held_out_loss(model, recipe), abs=1e-6)


def test_steps_outside_of_the_recipe_are_refused():
    for steps in (0, SMALL.steps + 1):
        with pytest.raises(ValueError, match="from 1 to 8"):
            pretrain(SMALL, steps=steps, progress=False)


def test_the_next_token_cross_entropy_is_the_mean_over_all_next_tokens():
    model = Transformer(backbone_config())
    tokens = torch.randint(2, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
        expected = -torch.stack(
            [logits[row, t].log_softmax(dim=-1)[tokens[row, t + 1]] for row in range(2) for t in range(5)]
        ).mean()
        assert next_token_cross_entropy(model, tokens).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_stage_ends_when_every_probe_it_names_is_reached():
    stage = Stage({"story": 1.0}, until={"person": 0.8, "opinion": 0.9})
    assert stage.is_over({"person": 0.8, "opinion": 0.95, "object": 0.0})
    assert not stage.is_over({"person": 0.9, "opinion": 0.85, "object": 1.0})
    assert not CURRICULUM[-1].is_over({probe: 1.0 for probe in PROBES})


def test_a_written_backbone_is_read_back(tmp_path, small, monkeypatch):
    monkeypatch.setattr("minitransformer.pretrained.pretrain.PROBE_ROWS", 4)
    model, history = small
    file = tmp_path / "small.safetensors"
    write(model, history, SMALL, file)
    read = toy_backbone(file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name])
    assert toy_record(file)["recipe"]["steps"] == 8


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    file = tmp_path / "none.safetensors"
    with pytest.raises(ValueError, match=r"is missing: make it by `python -m"):
        toy_backbone(file)
    record = toy_record()
    record["config"]["vocab_size"] = 7
    file.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="7 words"):
        toy_backbone(file)


def test_an_unknown_probe_is_refused():
    with pytest.raises(ValueError, match="the probes are person"):
        probe_rows("taste", 3)
