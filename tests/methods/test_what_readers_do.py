"""What a reader may do to a model around `attach` and `detach`, and names that are not ours alone."""

import copy
import io

import pytest
import torch
from reference.method_cases import RECIPES, assert_same, batch, each_of, fingerprint, loss_of, outputs, train_a_little
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import peft
from minitransformer.heads import SequenceClassifier
from peft import LoRA, Wrapper
from peft.sites import all_wrappers, named_sites, sites_of

QUERY = LoRA(rank=2, targets=("query",))


def classifier(decoder, **options):
    return SequenceClassifier(decoder(causal=False, **options), n_classes=3)


def scores(model):
    with torch.no_grad():
        return model.eval()(*batch())


# The modes of modules


@each_of("recipe", RECIPES)
def test_attach_and_detach_leave_every_mode_and_a_wrapper_has_that_of_its_module(decoder, recipe):
    model = decoder(dropout=0.1)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    before = {module: module.training for module in model.modules()}
    peft.attach(peft.attach(model, peft.BitFit(layers=(0,))) if not isinstance(recipe, peft.BitFit) else model, recipe)
    assert {module: module.training for module in before} == before
    for site in sites_of(model).values():
        assert all(wrapper.training == site.module.training for wrapper in site.wrappers)
    peft.detach(model)
    assert {module: module.training for module in model.modules()} == before


class WithDropout(Wrapper):
    order = 5

    def __init__(self, base):
        super().__init__(base)
        self.drop, self.gain = nn.Dropout(0.5), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gain * self.drop(self.base(x))


class Careless(LoRA):
    """Leaves the model in another mode, and wraps each map in what the test puts here."""

    wrapper = WithDropout

    def wrap(self, name, module, model, generator):
        model.train()
        return type(self).wrapper(module)


@pytest.fixture
def careless(monkeypatch):
    def make(kind):
        monkeypatch.setattr(Careless, "wrapper", kind)
        return Careless(rank=2)

    yield make
    peft.Method.registry.pop("Careless", None)


def test_a_method_that_changes_modes_and_a_wrapper_with_modules_of_its_own(decoder, careless):
    model = peft.attach(decoder().eval(), careless(WithDropout))
    assert not any(module.training for module in model.modules())


def test_a_wrapper_that_keeps_parameters_in_a_module_of_its_own_is_refused(decoder, careless):
    class Hidden(WithDropout):
        def __init__(self, base):
            super().__init__(base)
            self.inner = nn.Linear(2, 2)

    class Counting(WithDropout):
        def __init__(self, base):
            super().__init__(base)
            self.inner = nn.BatchNorm1d(16, affine=False)  # its statistics would be in no file

    model = decoder()
    before = fingerprint(model)
    for kind in (Hidden, Counting):
        with pytest.raises(ValueError, match="give the wrapper itself every"):
            peft.attach(model, careless(kind))
    assert_same(before, fingerprint(model))


def test_a_model_whose_shapes_are_not_known_is_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    before = set(vars(model[1]))
    with pytest.raises(ValueError, match="run it once before"):
        peft.attach(model, LoRA(rank=1, targets=("1",)))
    assert set(vars(model[1])) == before and model[1].weight.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
@each_of("recipe", RECIPES)
def test_what_is_attached_where_no_gradient_is_kept_can_be_trained(decoder, recipe, within):
    model = decoder()
    with within():
        peft.attach(model, recipe)
    peft.gradient_audit(model, loss_of)


# Between attach and detach


def replaced(model):
    model.blocks[0] = copy.deepcopy(model.blocks[1])
    return model


def deleted(model):
    del model.blocks[1]
    return model


def renamed(model):
    model.layers = model._modules.pop("blocks")
    return model


def wrapped_in_theirs(model):
    model.blocks[0].attention.query = nn.Sequential(model.blocks[0].attention.query)
    return model


def without_a_wrapper(model):
    model.blocks[0].attention.query = nn.Linear(16, 16)
    return model


def with_more(model):
    model.attached = model.base = model.merged = nn.Parameter(torch.zeros(2))
    model.blocks[0].attention.query.mine = nn.Linear(2, 2)
    return model


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def quantised(model):
    weight = model.blocks[0].attention.value.weight
    model.blocks[0].attention.value.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


CHANGES = [
    replaced, deleted, renamed, wrapped_in_theirs, without_a_wrapper, with_more, pickled, copy.deepcopy, quantised,
    lambda m: m.requires_grad_(True), lambda m: m.requires_grad_(False), lambda m: m.double(),
    lambda m: nn.Sequential(m), lambda m: peft.attach(m, RECIPES["houlsby"]),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_done_in_between_a_model_can_be_detached(decoder, change):
    model = decoder()
    model.norm.weight.requires_grad_(False)
    model = change(peft.attach(model, QUERY))
    assert peft.detach(model) is model
    assert not any(isinstance(module, Wrapper) for module in model.modules()) and not peft.attached(model)
    norm = model.norm if hasattr(model, "norm") else model[0].norm
    assert not norm.weight.requires_grad and norm.bias.requires_grad
    peft.attach(model, RECIPES["lora B"])


@pytest.mark.parametrize("part_first", [True, False])
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_a_tensor_of_two_modules_is_trainable_again_wherever_it_is_met_first(decoder, names, part_first):
    parts = {"a": decoder(), "b": nn.Linear(16, 23)}
    model = nn.ModuleDict({name: parts[name] for name in names})
    model["b"].weight = model["a"].embedding.token.weight
    model["b"].bias.requires_grad_(False)
    if part_first:
        peft.attach(model["a"], QUERY)
    peft.attach(model, RECIPES["houlsby"])
    assert not model["b"].weight.requires_grad
    peft.detach(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["b.bias"]


def test_a_model_of_inference_tensors_can_be_detached(decoder):
    with torch.inference_mode():
        model = decoder()
    query = model.blocks[0].attention.query
    assert peft.detach(peft.attach(model, QUERY)).blocks[0].attention.query is query
    with pytest.raises(ValueError, match="train_also names norm"):
        peft.attach(model, QUERY, train_also=("norm",))


def test_a_copy_of_a_part_and_a_part_whose_whole_is_gone_know_what_is_attached(decoder):
    whole = peft.attach(classifier(decoder), QUERY)
    for part in (copy.deepcopy(whole.transformer), whole.transformer):
        assert [record.method for record in peft.attached(part)] == [QUERY]
        assert all(p.requires_grad for p in peft.detach(part).parameters())
    assert not whole.head.weight.requires_grad


def test_the_same_module_at_two_places_gets_one_wrapper_at_both(decoder, tmp_path):
    def model():
        made = decoder()
        made.blocks[1].attention = made.blocks[0].attention
        made.alias = made.blocks[0].feedforward.up
        return made

    shared = model()
    plain, before = outputs(shared), {name: id(module) for name, module in shared.named_modules(remove_duplicate=False)}
    peft.attach(shared, LoRA(rank=2, targets=("query", "up")))
    assert shared.blocks[1].attention.query is shared.blocks[0].attention.query
    assert shared.alias is shared.blocks[0].feedforward.up and isinstance(shared.alias, Wrapper)
    train_a_little(shared)
    assert peft.parameter_table(shared).trained == 2 * (16 + 16) + 2 * 2 * (16 + 24)
    peft.save(shared, tmp_path / "file")
    assert torch.equal(outputs(peft.load(model(), tmp_path / "file")), outputs(shared))
    peft.detach(shared)
    assert {name: id(module) for name, module in shared.named_modules(remove_duplicate=False)} == before
    assert torch.equal(outputs(shared), plain)


# Parts and wholes


@pytest.mark.parametrize("part_first", [True, False])
def test_methods_on_a_part_and_on_the_whole_are_methods_of_the_whole(decoder, tmp_path, part_first):
    model = classifier(decoder)
    calls = [
        lambda: peft.attach(model.transformer, QUERY, seed=1),
        lambda: peft.attach(model, RECIPES["houlsby"], seed=2, train_also=("head",)),
    ]
    before = fingerprint(model)
    for call in calls if part_first else reversed(calls):
        call()
    assert {name.split(".")[-1] for name in peft.trainable_parameters(model)} == {
        "A", "B", "down_weight", "down_bias", "up_weight", "up_bias", "weight", "bias",
    }  # fmt: skip
    base = scores(model)
    train_a_little(model)
    expected = scores(model)
    peft.save(model, tmp_path / "whole")
    fresh = peft.load(classifier(decoder), tmp_path / "whole")
    assert torch.equal(scores(fresh), expected) and peft.attached(fresh) == peft.attached(model)
    with pytest.raises(ValueError, match="a file could not say where BottleneckAdapter"):  # its head is not in the part
        peft.save(model.transformer, tmp_path / "part")
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.head, name).copy_(before[1][f"head.{name}"][2])
    with peft.disabled(model):
        assert torch.equal(scores(model), base)
    peft.detach(model)
    assert_same(before, fingerprint(model))


def test_after_the_part_is_detached_what_the_whole_still_has_is_said_and_can_be_detached(decoder, tmp_path):
    model = classifier(decoder)
    before = fingerprint(model)
    peft.attach(model, QUERY, train_also=("head",))
    peft.detach(model.transformer)
    with pytest.raises(ValueError, match="a file could not say where"):
        peft.save(model, tmp_path / "file")
    peft.detach(model)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("change", [deleted, renamed])
def test_a_rearranged_model_is_saved_as_what_it_is(decoder, tmp_path, change):
    model = train_a_little(change(peft.attach(decoder(), QUERY)))
    peft.save(model, tmp_path / "file")
    assert peft.state_dict(peft.load(change(decoder()), tmp_path / "file")).keys() == peft.state_dict(model).keys()
    with pytest.raises(ValueError, match="another base"):
        peft.load(decoder(), tmp_path / "file")


@pytest.mark.parametrize("change", [replaced, wrapped_in_theirs, without_a_wrapper])
def test_what_no_file_could_give_back_is_not_saved(decoder, tmp_path, change):
    model = change(peft.attach(decoder(), QUERY))
    with pytest.raises(ValueError, match=r"a file could not say where|would be left out"):
        peft.save(model, tmp_path / "file")


def test_a_method_of_one_part_is_not_saved_as_one_of_all(decoder, tmp_path):
    two = nn.ModuleDict({"left": decoder(), "right": decoder()})
    peft.attach(two["left"], QUERY)
    with pytest.raises(ValueError, match="save the part that it was attached to"):
        peft.save(two, tmp_path / "file")
    two["right"].requires_grad_(False)
    with pytest.raises(ValueError, match="save the part that it was attached to"):
        peft.save(two, tmp_path / "file")
    peft.save(two["left"], tmp_path / "file")


def test_nothing_is_attached_to_a_model_with_wrappers_that_attach_does_not_know(decoder):
    bank = peft.TaskBank(decoder(), {"a": [(QUERY, peft.state_dict(peft.attach(decoder(), QUERY)))]})
    with pytest.raises(ValueError, match="attach did not put there"):
        peft.attach(bank.model, RECIPES["houlsby"])


# Names


def test_a_full_name_means_that_module_alone(decoder):
    model = SequenceClassifier(decoder(causal=False, lm_head="bert"), 3)
    peft.attach(model, QUERY, train_also=("head",))
    whole = {name for name in peft.trainable_parameters(model) if not name.endswith(("A", "B"))}
    assert whole == {"head.weight", "head.bias"}


@pytest.mark.parametrize("also", [("blocks.0.attention.query",), ("blocks.0",), ("blocks",)])
def test_train_also_trains_no_tensor_of_another_method(decoder, also):
    model = peft.attach(decoder(), LoRA(rank=2, train=("B",)))
    peft.attach(model, RECIPES["parallel"], train_also=also)
    query = model.blocks[0].attention.query
    assert not query.A.requires_grad and query.B.requires_grad and query.base.weight.requires_grad
    peft.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_that_is_trained_whole_is_so_where_a_part_of_it_stands_elsewhere_too():
    model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(3, 3)), "second": nn.Sequential(nn.Linear(3, 3))})
    model["second"].append(model["first"][0])
    peft.attach(model, LoRA(rank=1, targets=("second.0",)), train_also=("second",))
    names = {name for name in peft.trainable_parameters(model) if not name.endswith(("A", "B"))}
    assert names == {"first.0.weight", "first.0.bias", "second.0.weight", "second.0.bias"}


def test_a_module_without_parameters_is_not_trained_whole(decoder):
    for model, name in ((decoder(), "head"), (decoder(norm="post"), "norm")):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=f"train_also names {name}, which holds no parameters"):
            peft.attach(model, QUERY, train_also=(name,))
        assert_same(before, fingerprint(model))


OURS = ["attached", "trainable_before", "base", "enabled", "merged", "record", "tensors", "order", "sites"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("value", [lambda: "mine", lambda: nn.Linear(16, 16)], ids=["text", "module"])
def test_attributes_of_the_readers_own_mean_nothing(decoder, tmp_path, name, value):
    def made():
        model = decoder()
        for module in (model, model.blocks[0], model.blocks[0].attention.query):
            setattr(module, name, value())
        return model

    model = made()
    before = fingerprint(model)
    train_a_little(peft.attach(model, QUERY))
    assert getattr(model, name) == "mine" or type(getattr(model, name)) is nn.Linear
    if value() == "mine":
        peft.save(model, tmp_path / "file")
        assert torch.equal(outputs(peft.load(decoder(), tmp_path / "file")), outputs(model))
    with peft.disabled(peft.merge(model)):
        outputs(model)
    peft.detach(model)
    assert_same(before, fingerprint(model))


class Named(nn.Linear):
    def __init__(self):
        super().__init__(16, 16)
        self.A = nn.Parameter(torch.zeros(2, 16))


def test_a_tensor_of_the_modules_own_that_is_called_as_ours_is_refused(decoder):
    model = decoder()
    model.blocks[0].attention.query = Named()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="has tensors called A"):
        peft.attach(model, QUERY)
    assert_same(before, fingerprint(model))


def test_blocks_of_the_readers_own_are_no_blocks_of_the_transformer(decoder):
    model = classifier(decoder)
    model.blocks = nn.ModuleList([nn.ModuleDict({"query": nn.Linear(16, 16)}) for _ in range(3)])
    peft.attach(model, LoRA(rank=2, layers=(1,)))
    names = {name.rpartition(".")[0] for name in peft.state_dict(model)}
    assert names == {f"transformer.blocks.1.attention.{name}" for name in ("query", "value")}
    model = classifier(decoder)
    model.blocks = model.transformer.blocks  # the same modules under a second name
    peft.attach(model, LoRA(rank=2, layers=(1,)))
    assert {name.rpartition(".")[0] for name in peft.state_dict(model)} == names


# Handles


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def not_traced():
    """Handles of `torch.compile` run as they are: the tests' checks of shapes cannot be traced."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_block(model):
    model.blocks[0] = compiled(model.blocks[0])
    return model


@pytest.mark.parametrize("handle", [compiled, compiled_block, lambda m: compiled(compiled_block(m))])
def test_a_compiled_model_is_the_model_in_it(decoder, tmp_path, handle, not_traced):
    model = decoder().eval()
    plain = outputs(model)
    peft.save(train_a_little(peft.attach(decoder(), QUERY)), tmp_path / "plain")
    held = handle(model)
    assert peft.attach(held, QUERY) is held
    names = {f"blocks.{i}.attention.query.{n}" for i in (0, 1) for n in "AB"}
    assert peft.state_dict(held).keys() == names == peft.trainable_parameters(held).keys()
    assert all(row.name in names for row in peft.parameter_table(held).rows if row.trained)
    expected = outputs(peft.load(held, tmp_path / "plain"))
    peft.gradient_audit(held, lambda m: m.hidden(*batch()).square().mean())
    assert not torch.equal(expected, plain)
    peft.save(held, tmp_path / "held")
    assert (tmp_path / "held").read_bytes() == (tmp_path / "plain").read_bytes()
    torch.testing.assert_close(outputs(peft.merge(held)), expected)
    peft.unmerge(held)
    with peft.disabled(held):
        assert torch.equal(outputs(held), plain)
    handles = [module for module in held.modules() if "_orig_mod" in module._modules]
    assert torch.equal(outputs(peft.detach(held)), plain)
    assert handles == [module for module in held.modules() if "_orig_mod" in module._modules]
    assert torch.equal(outputs(peft.load(handle(decoder()), tmp_path / "plain")), expected)


def test_what_a_compiled_handle_computes_follows_attach_and_detach(unchecked):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    held, x = compiled(model), torch.linspace(-1, 1, 8).view(2, 4)
    with torch.no_grad():
        before = held(x)
        train_a_little(peft.attach(held, LoRA(rank=2, targets=("0", "2"))))
        assert torch.allclose(held(x), model(x), atol=1e-6) and not torch.allclose(held(x), before, atol=1e-3)
        with peft.disabled(held):
            assert torch.equal(held(x), before)
        assert torch.equal(peft.detach(held)(x), before)


def test_a_map_that_is_compiled_by_itself_is_refused_before_and_taken_out_after(decoder):
    model = decoder()
    model.blocks[0].attention.query = compiled(model.blocks[0].attention.query)
    with pytest.raises(ValueError, match="compile it after attaching"):
        peft.attach(model, QUERY)
    model = decoder()
    model.beside = compiled(model.blocks[0].attention.query)  # the same layer, under a name that no target matches
    with pytest.raises(ValueError, match="compile it after attaching"):
        peft.attach(model, QUERY)
    model = decoder()
    before = fingerprint(model)
    peft.attach(model, QUERY)
    model.blocks[0].attention.query = compiled(model.blocks[0].attention.query)
    assert len(all_wrappers(model)) == 2
    peft.detach(model)
    assert_same(before, fingerprint(model))


def test_a_model_in_data_parallelism_is_the_model_in_it(decoder, tmp_path, process_group):
    model = train_a_little(peft.attach(decoder(), QUERY))
    peft.save(model, tmp_path / "plain")
    held = DistributedDataParallel(model)
    assert peft.state_dict(held).keys() == peft.state_dict(model).keys()
    peft.save(held, tmp_path / "held")
    assert (tmp_path / "held").read_bytes() == (tmp_path / "plain").read_bytes()
    peft.load(held, tmp_path / "plain")
    assert peft.state_dict(nn.DataParallel(model)).keys() == peft.state_dict(model).keys()
    for late in (held, compiled(held), nn.ModuleDict({"in": held})):
        with pytest.raises(ValueError, match="attach the method before it"):
            peft.attach(late, RECIPES["houlsby"])
    peft.detach(held)
    with pytest.raises(ValueError, match="attach the method before it"):
        peft.load(held, tmp_path / "plain")
    assert not peft.attached(held)


# Layers that read a weight and do not call its module


@pytest.mark.parametrize("recipe", [LoRA, peft.DoRA, peft.VeRA])
@pytest.mark.parametrize("target", ["out_proj", "linear1", "layers.1.linear2"])
def test_layers_of_torch_that_do_not_call_a_map_are_refused(recipe, target):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"read the weight of .* and do not call it"):
        peft.attach(model, recipe(rank=2, targets=(target,)))
    assert_same(before, fingerprint(model))


def test_layers_of_torch_that_call_their_maps_work():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    x = torch.randn(2, 3, 16)
    peft.attach(model, LoRA(rank=2, targets=("linear1", "linear2")))
    peft.gradient_audit(model, lambda m: (m(x, x) * torch.arange(16)).sum())
    train_a_little(model).eval()
    with torch.no_grad():
        adapted = model(x, x)
        torch.testing.assert_close(peft.merge(model)(x, x), adapted)


def test_named_sites_are_those_of_the_bare_model(decoder):
    model = decoder()
    names = set(named_sites(model))
    peft.attach(model, RECIPES["houlsby"])
    assert set(named_sites(compiled(model))) == names
