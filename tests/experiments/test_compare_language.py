"""The comparisons of a language model, on a tiny random Llama and letters in place of SmolLM2 and its words."""

import importlib.util
import json
import string
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference.random_weights import randomize

from minitransformer import Transformer, TransformerConfig, quantize
from minitransformer.tasks.language.pairs import LanguageTask, Pair, ask, same_text
from minitransformer.tasks.language.rows import answer_rows
from minitransformer.tasks.language.splits import pair_task
from minitransformer.training import answer_only, evaluate
from peft import expected_parameters
from peft.experiments import compare, report, sweep, tasks
from peft.experiments.cli import main
from peft.experiments.results import COLUMNS, identity, read_rows
from peft.experiments.tasks import FULL, LORA, PREFIX, PROMPT, TASKS, UNTRAINED

BFLOAT16 = "pretrained bfloat16"
CONFIG = TransformerConfig(
    vocab_size=28, max_len=64, d_model=16, n_heads=4, n_kv_heads=2, n_layers=2, d_ff=24, position="rotary",
    norm_type="rms", gated=True, activation="silu", bias="none", lm_head="tied",
)  # fmt: skip


class Letters:
    """A tokenizer of letters and a blank; the end of a turn is the padding too."""

    end_id = pad_id = 0

    def __init__(self, alphabet="| " + string.ascii_lowercase):
        self.alphabet = alphabet

    def encode(self, text):
        return [self.alphabet.index(letter) for letter in text]

    def encode_chat(self, messages, add_generation_prompt=False):
        return self.encode("".join(message["content"] + "|" for message in messages) + " " * add_generation_prompt)

    def decode(self, tokens):
        return "".join(self.alphabet[token] for token in tokens)


def pairs(n, start, kind_of=lambda i: "even" if i % 2 == 0 else "odd"):
    """Three letters and the question what the first one is."""
    letters = string.ascii_lowercase
    texts = [letters[i % 26] + letters[i * 7 % 26] + letters[i // 26] for i in range(start, start + n)]
    return tuple(ask(text, text[0], kind_of(i)) for i, text in enumerate(texts))


TEXTS = LanguageTask("movers", pairs(70, 0), pairs(40, 70), pairs(30, 110), same_text)


def llama(seed=0, dtype=torch.float32):
    return randomize(Transformer(CONFIG), 3).to(dtype)


def short(entry):
    """Four steps; words of this tokenizer to start from."""
    method = entry.method
    if hasattr(method, "init_tokens"):
        method = replace(method, init_tokens=tuple(range(2, 18)))
    if hasattr(method, "rank"):
        method = replace(method, rank=2)
    return replace(entry, method=method, steps=4 if entry.steps else 0, choice_steps=None)


@pytest.fixture
def task(monkeypatch):
    """The comparison on movers with that model, that tokenizer and those texts."""
    made, own = pair_task(TEXTS, Letters(), validation=36), TASKS["movers"]
    models = {"pretrained": llama, BFLOAT16: lambda seed: llama(seed, torch.bfloat16)}
    entries = {name: short(entry) for name, entry in own.entries.items()}
    changes = {"splits": lambda: made, "models": models, "entries": entries, "note_every": 2, "warmup": 1}
    monkeypatch.setitem(TASKS, "movers", replace(own, **changes))
    return made


@pytest.mark.slow
def test_the_whole_sweep_and_going_on_with_it(task, tmp_path):
    out, entries = tmp_path / "rows.csv", TASKS["movers"].entries
    rows = sweep.run(compare.study("movers", progress=False), out, seeds=(1,))
    assert rows == read_rows(out)
    more = ["test_by_kind", "validation_curve", "steps_to_90", "precision"]
    assert [*rows[0]] == [*COLUMNS[:15], *more, *COLUMNS[15:]]
    final = {row["method"]: row for row in rows if row["stage"] == "final"}
    assert list(final) == list(entries)
    for name, row in final.items():
        choice = [row for row in rows if row["method"] == name and row["stage"] == "choice"]
        assert tuple(float(own["learning_rate"]) for own in choice) == entries[name].learning_rates
        assert all(own["test_accuracy"] == own["validation_curve"] == own["steps_to_90"] == "" for own in choice)
        method = entries[name].method
        everything = sum(p.numel() for p in llama().parameters())
        trained = {UNTRAINED: 0, FULL: everything}.get(name) if method is None else expected_parameters(CONFIG, method)
        assert int(row["trained_parameters"]) == trained and row["precision"] == "float32"
        curve = [int(part.split()[0]) for part in row["validation_curve"].split("; ") if part]
        assert curve == ([] if name == UNTRAINED else [2, 4])
    assert sweep.missing(compare.study("movers", progress=False), rows, seeds=(1, 2))[0]["seed"] == "2"


def test_the_scores_are_those_of_answers_asked_one_by_one(task):
    """Each prompt alone, token by token, without a cache."""
    model, _ = compare.train(task, FULL, 1e-2, 40, seed=1, progress=False)
    row = compare.scores(model, task, answer_only, final=True)

    def said(pair):
        tokens, new = task.tokenizer.encode_chat(pair.prompt, add_generation_prompt=True), []
        while len(new) < task.max_new_tokens and 0 not in new:
            with torch.no_grad():
                new.append(int(model(torch.tensor([tokens + new]))[0, -1].argmax()))
        return task.tokenizer.decode([token for token in new if token])

    right = {name: [said(p) == p.answer for p in getattr(task, name).pairs] for name in ("validation", "test")}
    assert 0 < sum(right["test"]) < len(right["test"])
    assert row["validation_accuracy"] == f"{sum(right['validation']) / 36:.4f}"
    assert row["test_accuracy"] == f"{sum(right['test']) / 30:.4f}"
    for kind, share in (part.split() for part in row["test_by_kind"].split("; ")):
        own = [one for one, pair in zip(right["test"], TEXTS.test, strict=True) if pair.kind == kind]
        assert share == f"{sum(own) / len(own):.4f}" and len(own) == 15
    loss = evaluate(model, answer_rows(task.tokenizer, task.validation.pairs), answer_only)["loss"]
    assert float(row["validation_loss"]) == pytest.approx(loss, abs=1e-4)


def test_looking_at_the_answers_changes_no_bit_of_a_run(task):
    runs = [compare.train(task, LORA, 1e-2, 5, 3, progress=False, note_every=every) for every in (None, 2)]
    for ours, theirs in zip(*(model.parameters() for model, _ in runs), strict=True):
        assert torch.equal(ours, theirs)
    assert runs[0][1].loss == runs[1][1].loss
    assert runs[0][1].validation_step == [] and runs[1][1].validation_step == [2, 4, 5]


def test_a_look_sees_the_model_as_it_is_after_so_many_steps(task):
    """A run that ends there, at a rate that never changes, has the same weights."""
    whole = TASKS["movers"]
    TASKS["movers"] = replace(whole, schedule="constant", warmup=0)
    long = compare.train(task, FULL, 1e-2, 8, 3, progress=False, note_every=4)[1]
    model, _ = compare.train(task, FULL, 1e-2, 4, 3, progress=False)
    assert long.validation_accuracy[0] == task.accuracy(model, task.validation.first(32))


def test_steps_to_90_is_the_first_look_with_nine_right_in_ten(task, monkeypatch):
    shares = iter((0.5, 29 / 32))
    monkeypatch.setattr(compare, "look", lambda model, task, step, looks: looks.note(
        validation_step=step, validation_accuracy=next(shares)))  # fmt: skip
    key = compare.planned("movers", LORA, "final", 1e-3, 1, "pretrained", inputs="known")
    row = compare.finished(key, task, progress=False)
    assert row["steps_to_90"] == "4" and row["validation_curve"] == "2 0.5000; 4 0.9062"


def test_in_the_table_the_steps_of_all_seeds(task):
    assert sweep.to_90({"steps_to_90": [20, 40, None], "runs": 3}) == "20 to 40, 2 of 3"
    assert sweep.to_90({"steps_to_90": [30, 30], "runs": 2}) == "30"
    assert sweep.to_90({"steps_to_90": [None], "runs": 1}) == sweep.to_90({"runs": 1}) == "–"


def test_training_is_as_it_was_planned(task, monkeypatch):
    seen = {}
    fit = compare.fit
    monkeypatch.setattr(compare, "fit", lambda *own, **more: seen.update(more) or fit(*own, **more))
    compare.train(task, LORA, 1e-3, 2, 1, progress=False)
    assert (seen["schedule"], seen["warmup"], seen["objective"]) == ("linear", 1, answer_only)
    assert "autocast" not in seen
    compare.train(task, LORA, 1e-3, 2, 1, BFLOAT16, progress=False)
    assert seen["autocast"] == torch.bfloat16


@pytest.mark.parametrize("name", TASKS["movers"].entries)
def test_in_16_bits_what_is_trained_has_32(task, name):
    model = compare.model_for("movers", name, 0, BFLOAT16)
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == (set() if name == UNTRAINED else {torch.float32})
    assert name == FULL or torch.bfloat16 in frozen
    key = compare.planned("movers", name, "final", 1e-3, 1, BFLOAT16, inputs="known")
    row = compare.finished(key, task, progress=False)
    assert row["precision"] == "bfloat16" and 0 <= float(row["test_accuracy"]) <= 1


OTHERS = {
    "an answer": replace(TEXTS, test=(Pair(TEXTS.test[0].prompt, "z"), *TEXTS.test[1:])),
    "a kind": replace(TEXTS, test=(replace(TEXTS.test[0], kind="prime"), *TEXTS.test[1:])),
    "a prompt": replace(TEXTS, train=(*TEXTS.train[:-1], ask("zzz", "z", "odd"))),
}


@pytest.mark.parametrize("other", [*OTHERS, "the tokenizer", "more room", "the file of the base"])
def test_what_a_run_starts_from_belongs_to_it(task, other):
    own = TASKS["movers"]
    now = compare.inputs_of(own, task, "pretrained")
    assert now == compare.inputs_of(own, pair_task(TEXTS, Letters(), validation=36), "pretrained")
    assert now.endswith(f"base {tasks.SHA256[:12]}")
    base, made = own, task
    if other in OTHERS:
        made = pair_task(OTHERS[other], Letters(), validation=36)
    elif other == "the tokenizer":
        made = pair_task(TEXTS, Letters("| " + string.ascii_lowercase[::-1]), validation=36)
    elif other == "more room":
        made = replace(task, max_new_tokens=task.max_new_tokens + 1)
    else:
        base = replace(own, base="another")
    assert compare.inputs_of(base, made, "pretrained") != now


def test_the_digest_of_a_known_file_stands_for_the_weights(task):
    def never(seed):
        raise AssertionError("the weights are not needed")

    assert "base " in compare.inputs_of(replace(TASKS["movers"], models={"pretrained": never}), task, "pretrained")


@pytest.mark.parametrize("change", [{"schedule": "cosine"}, {"warmup": 5}, {"note_every": 5}, {"batch_size": 8}])
def test_the_settings_belong_to_a_run(task, change):
    own = TASKS["movers"]
    before, after = (compare.settings_of(it, it.entries[LORA]) for it in (own, replace(own, **change)))
    assert before != after


@pytest.mark.slow
def test_both_precisions_in_one_file_and_their_reports(task, tmp_path, capsys):
    command = ["compare", "--task", "movers", "--methods", "LoRA q,v", "IA3", "no training", "--out", str(tmp_path)]
    main(command)
    said = capsys.readouterr().out
    assert "14 runs to do, 40 training steps: about 0 minutes" in said
    assert "| steps to 90% |" in said and "(3 seeds)" in said and (tmp_path / "movers.png").exists()
    first = read_rows(tmp_path / "movers.csv")
    main([*command, "--precision", "bfloat16", "--seeds", "1"])
    assert (tmp_path / "movers_bfloat16.png").exists()
    rows = read_rows(tmp_path / "movers.csv")
    assert rows[: len(first)] == first and {row["precision"] for row in rows[len(first) :]} == {"bfloat16"}
    assert sorted(compare.current(rows, "movers"), key=identity) == sorted(rows, key=identity)
    found = report.records_in(tmp_path)
    assert [*found["movers"]] == [name + added for added in ("", ", bfloat16") for name in (UNTRAINED, LORA, "IA3")]
    page = report.page(found, {"seconds": {}, "memory": {}, "settings": dict.fromkeys(
        ("pairs", "threads", "batch", "length", "ours", "theirs"), "1")})  # fmt: skip
    assert "## A language model" in page and "| LoRA q,v r=8, bfloat16 |" in page and "| not run |" in page
    (line,) = report.result_lines(found)
    assert "no training, bfloat16 " in line and line.index("no training ") > line.index("IA3")


@pytest.mark.parametrize(("precision", "name"), [("nf4", "NF4"), ("q4_1", "Q4_1")])
def test_over_four_bits_all_but_full_fine_tuning(task, tmp_path, capsys, monkeypatch, precision, name):
    def rounded(seed):
        return quantize(llama(seed).requires_grad_(False), block=8)

    backbone = f"pretrained {precision}"
    assert backbone in TASKS["records"].models
    monkeypatch.setitem(TASKS, "movers", replace(TASKS["movers"], models={"pretrained": llama, backbone: rounded}))
    command = ["compare", "--task", "movers", "--precision", precision, "--seeds", "1", "--out", str(tmp_path)]
    main([*command, "--methods", "LoRA q,v"])
    assert (tmp_path / f"movers_{precision}.png").exists()
    rows = read_rows(tmp_path / "movers.csv")
    trained = expected_parameters(CONFIG, TASKS["movers"].entries[LORA].method)
    whole = sum(p.numel() for p in llama().parameters())
    assert {(row["backbone"], row["precision"]) for row in rows} == {(backbone, "float32")}
    assert {(int(row["trained_parameters"]), row["share"]) for row in rows} == {(trained, f"{trained / whole:.6f}")}
    assert [*report.records_in(tmp_path)["movers"]] == [f"{LORA}, {name}"]
    everything = [*TASKS["movers"].entries]
    assert [*compare.study("movers", None, backbone).rates] == [own for own in everything if own != FULL]
    with pytest.raises(ValueError, match=f"choose some of {UNTRAINED}; {LORA}"):
        compare.study("movers", [FULL], backbone)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "--methods", FULL])
    assert "no method is called 'full fine-tuning'" in capsys.readouterr().err


def test_without_runs_there_is_no_page_of_them(task):
    found = {name: {} for name in TASKS}
    settings = dict.fromkeys(("pairs", "threads", "batch", "length", "ours", "theirs"), "1")
    assert "language model" not in report.page(found, {"seconds": {}, "memory": {}, "settings": settings})


def test_the_cost_counts_the_answers_too(task, monkeypatch):
    monkeypatch.setattr(compare, "step_seconds", lambda models, *_, **__: dict.fromkeys(models, 0.0))
    times = iter((0.0, 60.0 * 32))  # a minute an answer
    study = compare.study("movers", [LORA], progress=False)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(times))
    answers = 2 * 36 + 3 * (36 + 30 + 2 * 32)
    assert sweep.cost(study, [], seeds=(1, 2, 3)).endswith(f"about {answers} minutes on this machine")


def test_models_are_timed_one_at_a_time(task, monkeypatch):
    seen = []
    monkeypatch.setattr(
        compare, "step_seconds", lambda models, *_, **__: seen.append(list(models)) or dict.fromkeys(models, 1.0)
    )
    seconds = compare.study("movers", [UNTRAINED, LORA, PROMPT], progress=False).step_seconds([UNTRAINED, LORA, PROMPT])
    assert seen == [[LORA], [PROMPT]] and seconds == {UNTRAINED: 0.0, LORA: 1.0, PROMPT: 1.0}


def test_other_tasks_have_no_sixteen_bits(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--task", "sentiment", "--precision", "bfloat16", "--out", str(tmp_path)])
    assert "sentiment has no pretrained bfloat16 backbone" in capsys.readouterr().err


def test_without_the_package_the_command_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["compare", "--task", "records", "--out", str(tmp_path)])
    assert "requirements-real-text.txt" in capsys.readouterr().err


def test_a_part_of_a_split_is_always_the_same_and_the_rest_as_it_was():
    one, two = (pair_task(TEXTS, Letters(), validation=10) for _ in range(2))
    assert one.validation.pairs == two.validation.pairs and len(one.validation.pairs) == 10
    assert all(one.validation.pairs.count(pair) == 1 and pair in TEXTS.validation for pair in one.validation.pairs)
    assert one.validation.pairs != TEXTS.validation[:10]
    assert (one.train.pairs, one.test.pairs) == (TEXTS.train, TEXTS.test)
    for i, pair in enumerate(one.validation.pairs):
        assert (
            one.validation.rows(slice(i, i + 1)).trimmed().tokens.tolist()
            == answer_rows(Letters(), [pair]).tokens.tolist()
        )
    for n in (0, 41):
        with pytest.raises(ValueError, match=f"validation={n}: choose between 1 and the 40"):
            pair_task(TEXTS, Letters(), validation=n)


def test_there_is_room_for_the_longest_answer_and_its_end():
    texts = replace(TEXTS, test=(*TEXTS.test, ask("a", "long", "odd")))
    assert pair_task(TEXTS, Letters()).max_new_tokens == 2 and pair_task(texts, Letters()).max_new_tokens == 5


@pytest.mark.parametrize("name", report.LANGUAGE_TASKS)
def test_every_language_task_has_a_rate_to_choose_and_words_to_start_from(name):
    own = TASKS[name]
    assert (own.seeds, own.batch_size, own.schedule, own.warmup) == (3, 16, "linear", 10)
    assert {LORA, PREFIX, PROMPT, FULL, UNTRAINED} <= set(own.entries)
    for entry in own.entries.values():
        assert entry.frozen or (len(entry.learning_rates) >= 2 and entry.steps in (100, 300))
    assert len(tasks.INIT_TOKENS[name]) == own.entries[PREFIX].method.length == 16


class Blanks(Letters):
    """Whatever is no small letter is a blank."""

    def encode(self, text):
        return [max(self.alphabet.find(letter), 1) for letter in text]


def test_the_script_of_what_tuning_does_to_other_text(task, tmp_path, monkeypatch):
    path = report.RESULTS / "language_model.py"
    spec = importlib.util.spec_from_file_location("language_model", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE == report.RESULTS / report.SPOKEN
    texts = [SimpleNamespace(text=f"{word} is here to see ") for word in ("a film", "nobody at all")]
    changes = {"smollm2": lambda: llama(0), "smollm2_tokenizer": Blanks, "snippets": lambda: texts}
    rate = lambda rows, name: 0.1  # noqa: E731
    changes |= {"FILE": tmp_path / "said.json", "STEPS": 2, "QUESTIONS": ("Who?", "Why so?")}
    for name, value in (changes | {"chosen_learning_rate": rate}).items():
        monkeypatch.setattr(script, name, value)
    script.main()
    found = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    asked = task.test.pairs[:6]
    assert found["asked"] == [[pair.prompt[0]["content"], pair.answer] for pair in asked] and found["steps"] == 2
    assert list(found["runs"]) == [UNTRAINED, LORA, PREFIX, FULL] and found["questions"] == ["Who?", "Why so?"]
    before = found["runs"][UNTRAINED]
    model = llama(0)
    assert before["said"] == script.generated_answers(model, Blanks(), asked, 24)
    tokens = [Blanks().encode(text.text.strip()) for text in texts]
    logs = [model(torch.tensor([row])).float().log_softmax(-1)[0] for row in tokens]
    nats = [-log[i, row[i + 1]].item() for log, row in zip(logs, tokens, strict=True) for i in range(len(row) - 1)]
    assert before["loss"]["films"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
    for name in (LORA, PREFIX):
        run = found["runs"][name]
        assert run["detached"] == before["loss"] and run["loss"] != before["loss"] and len(run["training_loss"]) == 2
        assert len(run["said"]) == 6 and len(run["others"]) == 2 and run["learning_rate"] == 0.1
    assert "detached" not in found["runs"][FULL] and found["runs"][FULL]["loss"] != before["loss"]
    (tmp_path / report.SPOKEN).write_text((tmp_path / "said.json").read_text())
    assert report.caption(tmp_path) == []  # this model is never right
