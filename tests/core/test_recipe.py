"""Recipes: YAML 1.2, strict keys, helpful sentences, overrides, inheritance, and what is identity."""

import json
import shutil
import subprocess
import sys
import time

import families
import jsonschema
import pytest
import recipe_fuzzer
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from ruamel.yaml import YAML

from pipeline.core import recipe_schema
from pipeline.core.config import dump, identity
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.precheck import checked
from pipeline.core.recipe import KINDS, load, module_of

BASE = """\
name: small
seed: 7
model: {family: llama, hidden_size: 64}
stages:
  clean:
    sources:
      web: {path: data/*.jsonl}
  tokenizer: {vocab_size: 512}
  pack: {}
  pretrain:
    steps: 10
    batch_size: 4
    sequence_length: 32
    optimizer: {lr: 3e-4}
"""


@pytest.fixture
def write(tmp_path):
    def writer(text, name="r.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def test_yaml_1_2_numbers_words_and_injected_keys(write):
    recipe = load(write(BASE))
    pretrain = recipe.stages["pretrain"]
    assert pretrain.optimizer.lr == 0.0003 and isinstance(pretrain.optimizer.lr, float)  # YAML 1.1 reads 3e-4 as a word
    assert pretrain.seed == 7 and pretrain.model == {"family": "llama", "hidden_size": 64}
    assert load(write(BASE.replace("name: small", "name: no"))).name == "no"  # YAML 1.1 reads false


@pytest.mark.parametrize(
    "change, line, said",
    [
        (("optimizer:", "optimizr:"), 13, "unknown key stages.pretrain.optimizr; did you mean 'optimizer'?"),
        (
            ("{lr: 3e-4}", "{learning_rate: 3e-4}"),
            13,
            "unknown key stages.pretrain.optimizer.learning_rate; expected one of kind, lr, betas",
        ),
        (("steps: 10", "steps: ten"), 10, "stages.pretrain.steps is 'ten', expected"),
        (("steps: 10", "steps: 0"), 10, "stages.pretrain.steps is 0, expected greater than or equal to 1"),
        (("    steps: 10\n", ""), 9, "stage pretrain does not say how long it is; give one of steps, tokens"),
        (("seed: 7", "sead: 7"), 2, "unknown key sead; did you mean 'seed'?"),
        (("  pack: {}", "  pakc: {}"), 9, "stages.pakc has the unknown kind 'pakc'; did you mean 'pack'?"),
        (("  pack: {}", "  seed: {kind: pack}"), 8, "no stage may be called seed"),
        (
            ("path: data/*.jsonl", "path: a, package: x==1, member: m"),
            7,
            "give exactly one of path, package and dataset",
        ),
        (("    steps: 10", "    steps: 10\n    steps: 11"), 11, "the key 'steps' is given twice in this block"),
        (
            ("    optimizer: {lr: 3e-4}", "    parallel: {pipeline: 2, zero: 2}"),
            13,
            "pipeline: 2 cannot be combined with zero: 2",
        ),
        (("stages:", "stages: ["), 6, "not valid YAML"),
        (("      web:", "      ~:"), 7, "a key is None, which YAML reads as no name; put it in quotes"),
        (("      web:", "      true:"), 7, "a key is True"),
        (("      web:", "      .nan:"), 7, "a key is nan"),
        (("path: data/*.jsonl", "path: data/*.jsonl, text: ''"), 7, "text: '' names no field"),
        (("      web:", "      网页:"), 7, "stages.clean.sources has the name '网页', expected Latin letters, digits"),
        (("path: data/*.jsonl", "package: x, member: m"), 7, "sources.web.package is 'x', expected NAME==VERSION"),
        (("name: small", "name: small\noutput: 3"), 2, "output is 3, expected a path"),
        (
            ("name: small", "extends: nosuch.yaml"),
            1,
            "`extends` names 'nosuch.yaml', which does not exist; that folder has",
        ),
    ],
)
def test_mistakes_end_in_a_sentence_with_file_and_line(write, change, line, said):
    path = write(BASE.replace(*change))
    with pytest.raises(UserError) as caught:
        load(path)
    assert said in str(caught.value)
    numbers = [int(part.split(":")[0]) for part in str(caught.value).split(f"{path}:")[1:]]
    # a flow block's inner keys may be placed at its own line
    assert numbers and abs(numbers[0] - line) <= 1, str(caught.value)


def test_a_stages_model_changes_keys_of_the_recipes_or_is_another(write):
    changed = (
        load(write(BASE), ["pretrain.model.hidden_size=32", "pretrain.model.num_hidden_layers=3"])
        .stages["pretrain"]
        .model
    )
    assert changed == {"family": "llama", "hidden_size": 32, "num_hidden_layers": 3}
    other = load(write(BASE + "    model: {family: gpt2, n_embd: 8}\n")).stages["pretrain"].model
    assert other == {"family": "gpt2", "n_embd": 8}


def test_file_mistakes(write, tmp_path):
    with pytest.raises(UserError, match=r"nosuch.yaml: no such recipe; this folder has r.yaml"):
        write(BASE)
        load(tmp_path / "nosuch.yaml")
    with pytest.raises(UserError, match="found an empty file"):
        load(write("", "empty.yaml"))
    with pytest.raises(UserError, match="found a list"):
        load(write("- name: small", "list.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read as a UTF-8 text file"):
        load(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    "text, said",
    [
        ("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{}" + BASE, "aliases expand to more than 100,000 values"),
        ("seed: " + "[" * 60 + "]" * 60 + "\n" + BASE.replace("seed: 7\n", ""), "nested blocks"),
        ("seed: " + "[" * 5000 + "]" * 5000 + "\n" + BASE.replace("seed: 7\n", ""), "nested blocks"),
        ("# " + "x" * 300_000 + "\n" + BASE, "has more than 256,000 bytes"),
        (BASE.replace("web: {path: data/*.jsonl}", "web: {from: [a, b]}"), "have no ['a', 'b']"),
        (BASE.replace("name: small", "name: " + "x" * 300), "at most 100"),
        (BASE.replace("name: small", "extends: " + "x" * 5000), "which does not exist"),
        (BASE.replace("name: small", "name: small\noutput: " + "x" * 300), "too long for a path"),
        (BASE.replace("    steps: 10", "    steps: 99999999999999999999"), "is beyond 9,223,372,036,854,775,807"),
        (BASE.replace("{lr: 3e-4}", "{lr: .inf}"), "lr is inf, expected a finite number"),
        (BASE.replace("name: small", 'name: "a\\0b"'), "a character that is not text"),
        (BASE.replace("name: small", "name: !word small"), "has a YAML tag"),
        ("# of mine\n\n%YAML 1.1\n---\n" + BASE, "begins with the directive '%YAML 1.1', which can change what values"),
        (BASE.replace("seed: 7", "seed: 7\nmodel: &m {<<: *m}"), "a block is merged into itself"),
        (BASE.replace("path: data/*.jsonl", "path: []"), "give exactly one of path, package and dataset; found none"),
        (BASE.replace("seed: 7", "seed: 7\n1: a\n'1': b"), "the key '1' is given twice in this block"),
        (BASE[: BASE.index("stages:")] + "stages:\n", "`stages` must name at least one stage"),
        (BASE[: BASE.index("stages:")] + "stages: 3\n", "`stages` must name at least one stage"),
        (BASE[: BASE.index("stages:")] + "stages: {clean: [], pack: ~}\n", "must be a block of keys, found []"),
    ],
)
def test_what_no_recipe_holds_ends_in_one_sentence_at_once(write, text, said):
    """correctness 32: bombs of aliases, deep nesting, long names, lists for names, empty documents."""
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    before = time.process_time()
    with pytest.raises(UserError) as caught:
        load(write(text.replace("{}", bomb, 1) if text.startswith("a0") else text))
    assert said in str(caught.value) and len(str(caught.value)) < 5000
    assert time.process_time() - before < 10


@pytest.mark.parametrize(
    "word, said",
    [
        ("seed=&a [*a]", "command line, 'seed=&a [*a]': more than 50 nested blocks"),
        ("pretrain.model.family=[llama]", "model.family: ['llama'] is unknown"),
        ("pretrain.model.num_attention_heads=0", "model.num_attention_heads is 0, expected 1 to"),
        ("pretrain.model.num_hidden_layers=2000000000", "model.num_hidden_layers is 2000000000, expected 1 to"),
        ("pretrain.inputs={model: ./" + "x" * 400 + "}", "is not a folder with files in it"),
        ("pretrain.run.processes=1000000007", "run.processes is 1000000007, expected less than or equal to 1024"),
        ("pretrain.run={processes: 1021, nodes: 99991}", "use 3 or"),
        ("pretrain.micro_batch=1000000007", "not divisible by micro_batch 1000000007; use 2 or 4"),
    ],
)
def test_values_that_no_run_can_have_are_refused_at_once(write, word, said):
    """correctness 32: what passes as a key and has no meaning as a model, an input or a layout."""
    before = time.process_time()
    words = ["pretrain.batch_size=4", word]
    if "nodes" in word:
        words, said = [word], "is not divisible by 102090811 data-parallel ranks"
    with pytest.raises(UserError) as caught:
        checked(write(BASE), words)
    assert said in str(caught.value)
    assert time.process_time() - before < 20


def test_all_mistakes_of_a_recipe_are_told_at_once_with_file_and_line(write):
    """correctness 44: across stages, and across keys, words, inputs, layouts and models."""
    path = write(
        BASE.replace("{path: data/*.jsonl}", "{pth: data/*.jsonl}")
        .replace("vocab_size: 512", "vocab_size: none")
        .replace("hidden_size: 64", "hiden_size: 64")
        .replace("batch_size: 4", "batch_size: 5\n    run: {processes: 2}")
        + "  anneal: {kind: pretrain, steps: 1, batch_size: 1, sequence_length: 16, inputs: {modle: pretrain}}\n"
        + "  sft: {steps: 1, batch_size: 1, sequence_length: 16, sources: {a: {from: nowhere}}}\n"
        + "  speak: {kind: speech}\n"
    )
    with pytest.raises(UserError) as caught:
        checked(path, ["sede=3"])
    lines = str(caught.value).splitlines()
    for line, said in [
        (3, "model.hiden_size: llama has no such key; did you mean hidden_size?"),
        (7, "unknown key stages.clean.sources.web.pth; did you mean 'path'?"),
        (8, "stages.tokenizer.vocab_size is 'none', expected"),
        (12, "batch_size 5 is not divisible by 2 data-parallel ranks"),
        (16, "stages.anneal.inputs: pretrain has no input 'modle'"),
        (17, "the recipe's `sources` have no 'nowhere'"),
        (18, "stages.speak has the unknown kind 'speech'"),
    ]:
        assert any(text.startswith(f"{path}:{line}: ") and said in text for text in lines), (line, said, lines)
    assert any("'sede' is neither a stage nor a top-level key" in text for text in lines)
    assert len(lines) == 8, "\n".join(lines)


@pytest.mark.parametrize(
    "seeds",
    [
        range(60),
        pytest.param(range(60, 1060), marks=pytest.mark.slow),
        pytest.param(range(1060, 2260), marks=pytest.mark.slow),
    ],
)
def test_changed_recipes_are_accepted_or_refused_with_a_sentence(seeds, tmp_path, monkeypatch):
    """correctness 32: shipped recipes with anything changed in file or words: UserError or accepted, and in time."""
    shutil.copytree(ROOT / "recipes", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    refused = 0
    for seed in seeds:
        path, words = recipe_fuzzer.made(seed, tmp_path)
        before = time.process_time()
        try:
            checked(path, words)
        except UserError as error:
            refused += 1
            assert 0 < len(str(error)) < 20_000 and str(error).encode(), seed
        except Exception as error:
            raise AssertionError(f"seed {seed} ({path.name} {words}): {type(error).__name__}: {error}") from error
        assert time.process_time() - before < 20, f"seed {seed} took more than 20 s"
    assert len(seeds) / 2 < refused < len(seeds)  # both happen, so the changes are neither idle nor all alike


def test_overrides(write):
    path = write(BASE)
    recipe = load(
        path,
        [
            "pretrain.optimizer.lr=1e-2",
            "stages.pretrain.steps=12",
            "pretrain.save.keep=5",
            "seed=9",
            "pretrain.precision=fp32",
            "clean.sources.web.limit=3",
        ],
    )
    pretrain = recipe.stages["pretrain"]
    assert (pretrain.optimizer.lr, pretrain.steps, pretrain.save.keep, pretrain.seed, pretrain.precision) == (
        0.01,
        12,
        5,
        9,
        "fp32",
    )
    assert recipe.stages["clean"].sources["web"].limit == 3
    for word, said in [
        ("pretrain.step=1", "did you mean 'steps'?"),
        ("pretrian.steps=1", "did you mean 'pretrain'?"),
        ("steps", "is not an override"),
        ("pretrain.steps.x=1", "not a block"),
        ("pretrain.steps=[", "not a YAML value"),
    ]:
        with pytest.raises(UserError, match=said.replace("?", r"\?")):
            load(path, [word])
    with pytest.raises(UserError, match=r"command line, pretrain.steps=0: stages.pretrain.steps is 0"):
        load(path, ["pretrain.steps=0"])
    # the last one wins, so that a script can pass on what its user adds
    assert load(path, ["pretrain.steps=1", "stages.pretrain.steps=2"]).stages["pretrain"].steps == 2
    assert load(path, ["pretrain.save={}", "pretrain.save.keep=5"]).stages["pretrain"].save.keep == 5


def test_extends_merges_blocks_replaces_lists_and_takes_stages_out(write):
    write(BASE, "base.yaml")
    child = write(
        "extends: base.yaml\nname: child\nstages:\n  pretrain:\n    optimizer: {betas: [0.8, 0.9]}\n  pack: ~\n "
        " longer: {kind: pretrain, steps: 3, batch_size: 2, sequence_length: 16}\n",
        "child.yaml",
    )
    recipe = load(child)
    assert recipe.name == "child" and list(recipe.stages) == ["clean", "tokenizer", "pretrain", "longer"]
    assert recipe.stages["pretrain"].optimizer.lr == 3e-4 and recipe.stages["pretrain"].optimizer.betas == (0.8, 0.9)
    write("extends: b.yaml\nname: a\nstages: {pack: {}}", "a.yaml")
    circle = write("extends: a.yaml\nname: b\nstages: {pack: {}}", "b.yaml")
    with pytest.raises(UserError, match="is cyclic"):
        load(circle)
    wrong = write("extends: base.yaml\nstages:\n  pretrain:\n    stepz: 1\n", "wrong.yaml")
    with pytest.raises(UserError, match=r"wrong.yaml:4: unknown key stages.pretrain.stepz"):
        load(wrong)


def test_a_source_taken_from_the_recipes_sources(write):
    text = (
        BASE.replace("      web: {path: data/*.jsonl}", "      web: {from: crawl, limit: 5}")
        + "sources:\n  crawl:\n    path: data/*.jsonl\n    limit: 9\n"
    )
    source = load(write(text)).stages["clean"].sources["web"]
    assert (source.path, source.limit) == ("data/*.jsonl", 5)
    with pytest.raises(
        UserError, match=r"r.yaml:7: stages.clean.sources.web.from: .* no 'craw'; did you mean 'crawl'\?"
    ):
        load(write(text.replace("from: crawl", "from: craw")))
    with pytest.raises(UserError, match=r"r.yaml:17: unknown key stages.clean.sources.web.pth; did you mean 'path'\?"):
        load(write(text.replace("    path: data", "    pth: data")))


def test_identity_leaves_out_defaults_and_execution(write):
    path = write(BASE)
    plain = identity(load(path).stages["pretrain"])
    written_out = identity(
        load(path, ["pretrain.schedule.kind=cosine", "pretrain.optimizer.betas=[0.9, 0.95]"]).stages["pretrain"]
    )
    executed = identity(
        load(
            path,
            [
                "pretrain.micro_batch=2",
                "pretrain.parallel.zero=3",
                "pretrain.run.processes=2",
                "pretrain.save.every_steps=1",
                "pretrain.log.every_steps=1",
            ],
        ).stages["pretrain"]
    )
    assert plain == written_out == executed
    assert identity(load(path, ["pretrain.optimizer.lr=1e-3"]).stages["pretrain"]) != plain
    assert "optimizer" not in plain  # 3e-4 is the default


def test_inputs_are_the_nearest_earlier_stage_of_the_kind(write):
    graph = nodes(
        load(
            write(
                BASE + "  anneal: {kind: pretrain, steps: 1, batch_size: 1, sequence_length: 16, inputs: {model:"
                " pretrain}}\n"
            )
        )
    )
    assert graph["pretrain"].parents == {"tokens": "pack", "tokenizer": "tokenizer"}
    assert graph["anneal"].parents == {"model": "pretrain", "tokens": "pack", "tokenizer": "tokenizer"}
    for inputs, said in [
        ("{model: pak}", "is not another stage of this recipe"),
        ("{model: pack}", "of kind pack, expected pretrain"),
        ("{modle: pretrain}", "has no input 'modle'"),
        ("{model: anneal}", "is not another stage"),
    ]:
        with pytest.raises(UserError, match=said):
            nodes(
                load(
                    write(
                        BASE + "  anneal: {kind: pretrain, steps: 1, batch_size: 1, sequence_length: 16, inputs:"
                        f" {inputs}}}\n"
                    )
                )
            )
    with pytest.raises(UserError, match="needs the input 'tokens', a stage of kind pack, but there is none before it"):
        nodes(load(write(BASE.replace("  pack: {}\n", ""))))
    with pytest.raises(UserError, match="cyclic inputs: one -> two -> one"):
        pair = "".join(
            f"  {a}: {{kind: pretrain, steps: 1, batch_size: 1, sequence_length: 16, inputs: {{model: {b}}}}}\n"
            for a, b in (("one", "two"), ("two", "one"))
        )
        nodes(load(write(BASE + pair)))


def test_batch_and_ranks_are_checked_before_anything_runs(write):
    stage = load(write(BASE)).stages["pretrain"]
    stage.check(2)
    with pytest.raises(UserError, match=r"batch_size 4 is not divisible by 3 data-parallel ranks; use 3 or 6"):
        stage.check(3)
    with pytest.raises(UserError, match="3 processes cannot be divided into pipeline: 2"):
        load(write(BASE), ["pretrain.parallel.pipeline=2"]).stages["pretrain"].check(3)
    with pytest.raises(UserError, match="not divisible by micro_batch 3"):
        load(write(BASE), ["pretrain.micro_batch=3"]).stages["pretrain"].check(1)
    with pytest.raises(UserError, match="stage pack: 2 processes were launched, but it runs in one process"):
        load(write(BASE)).stages["pack"].check(2)


SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def test_shipped_recipes_are_accepted_and_name_their_schema(capsys):
    from pipeline.cli import recipe_check

    assert {"quickstart", "gpt2-124m", "llama-7b"} <= {path.stem for path in SHIPPED}
    for path in SHIPPED:
        recipe_check(str(path))
        assert f"{path}: " in capsys.readouterr().out
        assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json")


def test_schema_accepts_the_shipped_recipes_and_refuses_a_wrong_key():
    schema = recipe_schema.schema()
    assert {f"stage-{kind}" for kind in KINDS} <= set(schema["$defs"])
    committed = json.loads((ROOT / "recipes" / "schema.json").read_text())
    assert committed == json.loads(json.dumps(schema)), (
        "recipes/schema.json is old: alma recipe schema -o recipes/schema.json"
    )
    validator = jsonschema.Draft202012Validator(schema)
    for path in SHIPPED:
        recipe = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        assert not [error.message for error in validator.iter_errors(recipe)], path
        recipe["stages"] = {"sft": {"stepps": 3}}
        assert not validator.is_valid(recipe)


def test_every_key_of_every_stage_is_documented():
    def undocumented(definition, where):
        for key, value in definition.get("properties", {}).items():
            if "description" not in value:
                yield f"{where}.{key}"

    schema = recipe_schema.schema()
    missing = [name for where, definition in schema["$defs"].items() for name in undocumented(definition, where)]
    assert not missing, missing


def test_stage_modules_keep_heavy_imports_inside_functions():
    """`alma status` imports every stage; with torch at the top of one it would take seconds."""
    code = (
        f"import sys, importlib; [importlib.import_module('pipeline.' + kind) for kind in {KINDS}];"
        " print(sorted({'torch', 'transformers', 'deepspeed', 'trl', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_stage_script_shadows_a_module():
    """A script's folder is first on sys.path when it is launched by path."""
    from importlib.metadata import packages_distributions

    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    names = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }
    assert not names & (taken - {"pipeline"}), names & taken


def test_modules_have_the_contract():
    for kind in KINDS:
        module = module_of(kind)
        assert isinstance(module.VERSION, int) and callable(module.run) and isinstance(module.INPUTS, dict), kind


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["steps", "batch_size", "sequence_length", "optimizer", "x", "run"]),
        st.none()
        | st.integers(-3, 99)
        | st.text(max_size=4)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
        max_size=5,
    )
)
def test_any_block_is_parsed_or_refused_with_a_sentence(tmp_path_factory, block):
    path = tmp_path_factory.mktemp("r") / "r.yaml"
    path.write_text(json.dumps({"name": "x", "stages": {"pretrain": block}}))
    try:
        dump(load(path).stages["pretrain"])
    except UserError as error:
        assert str(error)


def test_recipes_above_1b_parameters_split_the_model_with_fsdp():
    """By the published sizes of tests/helpers/families.py; tests/test_fits.py has their memory."""
    for name, parameters in families.PUBLISHED.items():
        for stage in load(ROOT / "recipes" / f"{name}.yaml").stages.values():
            if stage.kind == "pretrain":
                assert (stage.parallel.shard in ("full", "hybrid")) == (parameters > 1e9), name


def test_a_stage_that_needs_larger_gpus_says_so_in_the_first_sentence():
    """All recipes name GPUs that they fit; one has two sizes."""
    text = (ROOT / "recipes" / "llama-3-8b.yaml").read_text(encoding="utf-8")
    assert "anneal, needs GPUs of 141 GB" in " ".join(text.split("extends")[0].splitlines())
