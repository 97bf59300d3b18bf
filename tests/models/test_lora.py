"""Low-rank adapters against peft: outputs, gradients, files in both directions, and merging."""

import copy
import json

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.models import build, lora
from pipeline.models.lora_config import Lora

peft = pytest.importorskip("peft")

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "mixtral")
VARIANTS = {
    "plain": {},
    "alpha": {"alpha": 3.0},
    "rslora": {"rank_stabilised": True},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.3},
    "dora with dropout": {"dora": True, "dropout": 0.3},
    "two layers": {"targets": ["q_proj", "v_proj"]},
}


def tiny(family: str = "llama", head: str = "causal"):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    keys = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family != "gpt2":
        keys |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    labels = {} if head == "causal" else {"num_labels": 1}
    config = AutoConfig.for_model(family, **keys, **labels, attn_implementation="eager")
    return kind.from_config(config, dtype=torch.float32).eval()


def ids(batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def trained(model, options: Lora, **keys):
    """The model with an adapter whose numbers are all other than at the start."""
    lora.attach(model, options, seed=7, **keys)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=source) * 0.1)
    return model


def of_peft(base, options: Lora, ours, **keys):
    """peft's model of the same adapter as `ours` has."""
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.numerator,
        lora_dropout=options.dropout,
        use_rslora=options.rank_stabilised,
        use_dora=options.dora,
        target_modules=sorted(lora.adapted_layers(ours)),
        fan_in_fan_out=base.config.model_type == "gpt2",
        **keys,
    )
    theirs = peft.get_peft_model(base, config)
    numbers = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(numbers[our_name(name)])
    return theirs.eval()


def our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".default", "").replace("modules_to_save.", "")
    name = name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(family, variant):
    options = Lora(rank=4, **VARIANTS[variant])
    if options.targets is not None and family == "gpt2":
        options = Lora(rank=4, targets=["c_attn"])
    base = tiny(family)
    ours = trained(copy.deepcopy(base), options)
    theirs = of_peft(base, options, ours)
    for train in (False, True):
        results = []
        for model in (ours, theirs):
            model.train(train)
            torch.manual_seed(3)  # of dropout
            loss = model(input_ids=ids(), labels=ids()).loss
            model.zero_grad()
            loss.backward()
            gradients = {our_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
            results.append((loss.detach(), gradients))
        torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-6)
        assert results[0][1].keys() == results[1][1].keys() and len(results[0][1]) >= 4
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(gradient, results[1][1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_all_linear_layers_are_those_of_peft():
    """Where the family has no router: peft adapts one that is a linear layer, and so does `attach`."""
    for family in ("llama", "qwen2", "gpt2", "gemma2"):
        base = tiny(family)
        ours = copy.deepcopy(base)
        lora.attach(ours, Lora(rank=2), seed=0)
        theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
        names = {our_name(name).rpartition(".")[0] for name, _ in theirs.named_parameters() if "lora_A" in name}
        assert set(lora.adapted_layers(ours)) == names, family


def test_a_rank_that_no_layer_can_use_is_refused():
    """Layers of the tiny model have 32 inputs or outputs, or fewer."""
    base = tiny("llama")
    widest = max(min(layer.weight.shape) for layer in base.model.layers.modules() if isinstance(layer, torch.nn.Linear))
    lora.attach(copy.deepcopy(base), Lora(rank=widest), seed=0)
    with pytest.raises(UserError, match=rf"lora.rank: {widest + 1} is more than the {widest} dimensions"):
        lora.attach(base, Lora(rank=widest + 1), seed=0)


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_disabled_is_the_base(dora):
    base = tiny()
    model = copy.deepcopy(base)
    lora.attach(model, Lora(rank=4, dora=dora), seed=7)
    expected = base(input_ids=ids()).logits
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, atol=1e-6 if dora else 0, rtol=0)
    model = trained(copy.deepcopy(base), Lora(rank=4, dora=dora))
    assert not torch.allclose(model(input_ids=ids()).logits, expected, atol=1e-2)
    with lora.disabled(model):
        assert torch.equal(model(input_ids=ids()).logits, expected)
    assert not torch.allclose(model(input_ids=ids()).logits, expected, atol=1e-2)


def test_only_the_adapter_is_trained_and_names_stay():
    base = tiny()
    names = dict(base.named_parameters()).keys()
    model = trained(copy.deepcopy(base), Lora(rank=4))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.rpartition(".")[2] in ("lora_A", "lora_B"))
        assert parameter.requires_grad or torch.equal(parameter, base.get_parameter(name))
    assert names < dict(model.named_parameters()).keys()


def test_initial_values_depend_on_seed_and_name_only():
    """peft's distribution: uniform up to 1 / sqrt(inputs)."""
    first, again, other = tiny(), tiny(), tiny()
    lora.attach(first, Lora(rank=4), seed=7)
    lora.attach(again, Lora(rank=4, targets=["v_proj"]), seed=7)
    lora.attach(other, Lora(rank=4), seed=8)
    name = "model.layers.1.self_attn.v_proj.lora_A"
    drawn = first.get_parameter(name)
    assert torch.equal(drawn, again.get_parameter(name)) and not torch.equal(drawn, other.get_parameter(name))
    assert 0.8 * 32**-0.5 < drawn.abs().max() <= 32**-0.5
    assert not torch.equal(drawn, first.get_parameter(name.replace("v_proj", "k_proj")))
    assert not first.get_parameter(name.replace("lora_A", "lora_B")).any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_and_adapter_give_the_same_logits(family, variant):
    options = VARIANTS[variant] if family == "llama" or variant != "two layers" else {"targets": ["c_attn"]}
    base = tiny(family)
    model = trained(copy.deepcopy(base), Lora(rank=4, **options)).eval()
    expected = model(input_ids=ids()).logits
    lora.merge(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of base models."""
    folder = tmp_path_factory.mktemp("lora")
    for family in ("llama", "gpt2"):
        tiny(family).save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_what_is_saved_and_the_other_way_round(family, variant, world, tmp_path):
    options = VARIANTS[variant] if family == "llama" or variant != "two layers" else {"targets": ["c_attn"]}
    ours = trained(build.load(world / family), Lora(rank=4, **options)).eval()
    expected = ours(input_ids=ids()).logits
    lora.save(ours, tmp_path / "ours", world / family)
    theirs = peft.PeftModel.from_pretrained(build.load(world / family), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(input_ids=ids()).logits, expected, atol=1e-5, rtol=1e-5)
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(automatic(input_ids=ids()).logits, expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for where in ("ours", "theirs"):
        again = build.load(lora.base_of(tmp_path / where))
        lora.load(again, tmp_path / where)
        torch.testing.assert_close(again.eval()(input_ids=ids()).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_score_layer_is_part_of_the_adapter(tmp_path):
    """As peft keeps it: modules_to_save."""
    from transformers import AutoModelForSequenceClassification

    tiny("llama", "reward").save_pretrained(tmp_path / "base")
    ours = build.load(tmp_path / "base", head="reward")
    trained(ours, Lora(rank=4), complete=("score",)).eval()
    lora.save(ours, tmp_path / "adapter", tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(input_ids=ids()).logits, ours(input_ids=ids()).logits, atol=1e-6, rtol=1e-6)
    again = build.load(tmp_path / "base", head="reward")
    lora.load(again, tmp_path / "adapter")
    assert torch.equal(again.score.weight, ours.score.weight)


def test_whole_names_where_short_ones_would_find_more(tmp_path, world):
    options = Lora(rank=4, targets=["model.layers.0.self_attn.q_proj"])
    ours = trained(build.load(world / "llama"), options).eval()
    lora.save(ours, tmp_path, world / "llama")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == options.targets
    theirs = peft.PeftModel.from_pretrained(build.load(world / "llama"), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids()).logits, ours(input_ids=ids()).logits, atol=1e-6, rtol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_there_are_named():
    with pytest.raises(UserError, match="no linear layer is called 'w_proj'; this model has down_proj, gate_proj, k_p"):
        lora.attach(tiny(), Lora(targets=["w_proj"]), seed=0)


def test_experts_of_a_mixture_are_refused():
    """They are one matrix of three dimensions, not linear layers; peft calls them target_parameters."""
    message = "lora.targets: 'experts.gate_up_proj' has the weights of 8 experts, which are no linear layers"
    with pytest.raises(UserError, match=message):
        lora.attach(tiny("mixtral"), Lora(targets=["q_proj", "experts.gate_up_proj"]), seed=0)


def test_adapters_of_other_models_are_refused(tmp_path, world):
    ours = trained(build.load(world / "llama"), Lora(rank=4))
    lora.save(ours, tmp_path, world / "llama")
    with pytest.raises(UserError, match="is an adapter of another model: .*_proj.* is for a model without that layer"):
        lora.load(build.load(world / "gpt2"), tmp_path)
    wider = tiny("llama")
    wider.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 72, bias=False)
    with pytest.raises(
        UserError, match=r"another model: .*gate_proj.lora_B is for shape \[64, 4\], the model has \[72"
    ):
        lora.load(wider, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"base_model_name_or_path": "/nowhere"}, "is an adapter of /nowhere, which is not a model folder"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=message):
            lora.base_of(tmp_path)


def test_a_base_with_other_weights_is_refused(tmp_path, world):
    """Of the same shapes: found by the hash that is kept next to the adapter, whatever files the weights are in and
    whatever folder they are moved to. An adapter by peft has none."""
    base = build.load(world / "llama")
    lora.save(trained(build.load(world / "llama"), Lora(rank=4)), tmp_path / "adapter", world / "llama")
    assert lora.base_of(tmp_path / "adapter") == world / "llama"
    for name, size in (("one", "5GB"), ("many", "10KB")):
        base.save_pretrained(tmp_path / name, max_shard_size=size)
        changed = {"base_model_name_or_path": str(tmp_path / name)}
        settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**settings, **changed}))
        assert lora.base_of(tmp_path / "adapter") == tmp_path / name
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight += 0.01
    base.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    with pytest.raises(UserError, match="another model: the weights in .*many are not those that it was trained on"):
        lora.base_of(tmp_path / "adapter")
    (tmp_path / "adapter/alma_base.json").unlink()
    assert lora.base_of(tmp_path / "adapter") == tmp_path / "many"


def test_layers_that_are_not_called_are_refused():
    """A fused kernel that reads a layer's weight would ignore its adapter."""
    model = tiny()
    mlp, linear = model.model.layers[1].mlp, torch.nn.functional.linear
    mlp.forward = lambda hidden: linear(linear(hidden, mlp.gate_proj.weight), mlp.down_proj.weight)
    with pytest.raises(UserError, match=r"computes model.layers.1.mlp.gate_proj without calling it"):
        lora.attach(model, Lora(), seed=0)
