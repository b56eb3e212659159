"""What a configuration accepts, refuses, keeps and writes down."""

import copy
import json

import pytest
import torch

from optimum_pgsvd import PGSVDConfig, modeling_pgsvd
from optimum_pgsvd.errors import CalibrationError, ConfigError
from optimum_pgsvd.structures import Budget


RANKS = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 4}


class Uncopyable:
    """Stands for a tokenizer or a data set that holds an open file."""

    def __init__(self, name_or_path: str | None = None):
        self.name_or_path = name_or_path

    def __iter__(self):
        yield "a text"

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def request(**fields) -> PGSVDConfig:
    return PGSVDConfig(**({"parameter_reduction": 0.2} | fields))


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of parameter_reduction, tolerance, ranks must be given, not none"),
        (
            {"parameter_reduction": 0.2, "tolerance": 0.1},
            "must be given, not parameter_reduction and tolerance; parameter_reduction=0.2 removes 20 %",
        ),
        ({"tolerance": 0.1, "ranks": {"*": 2}}, "must be given, not tolerance and ranks"),
        (
            {"parameter_reduction": 0.2, "tolerance": 0.1, "ranks": {"*": 2}},
            "not parameter_reduction and tolerance and ranks",
        ),
        ({"parameter_reduction": 1}, r"parameter_reduction=1 is outside \[0, 1\)"),
        ({"parameter_reduction": -0.2}, r"parameter_reduction=-0.2 is outside \[0, 1\)"),
        ({"parameter_reduction": "20%"}, "a budget is a number, not '20%'"),
        ({"tolerance": 1.5}, r"tolerance=1.5 is outside \[0, 1\]"),
        ({"tolerance": float("nan")}, r"tolerance=nan is outside \[0, 1\]"),
        ({"ranks": {"*.q_proj": 0}}, r"ranks\['\*.q_proj'\]=0 must be an integer of at least 1"),
        ({"ranks": {"*.q_proj": 8.0}}, r"ranks\['\*.q_proj'\]=8.0 must be an integer of at least 1"),
        ({"ranks": {"*.q_proj": True}}, r"ranks\['\*.q_proj'\]=True must be an integer of at least 1"),
        (
            {"ranks": {"*": 2}, "groups": {"vision*": {"tolerance": 0.1}}},
            "groups have no meaning with ranks, which name their layers; give one of the two",
        ),
    ],
)
def test_exactly_one_budget_in_its_range(fields, message):
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allocation": "greedy"}, "allocation='greedy' is not known; known are .*pareto.*uniform"),
        ({"solver": "qr"}, "solver='qr' is not known; known are .*als.*eigh.*svd"),
        ({"quant_method": "gptq"}, "quant_method='gptq' is not 'pgsvd'"),
        ({"ratio": 0.2, "alpha": 1}, "unknown fields alpha, ratio; known are allocation, batch_size, .*tolerance"),
        (
            {"groups": {"vision*": {"tolerance": 2}}},
            r"groups\['vision\*'\]={'tolerance': 2}: tolerance=2 is outside \[0, 1\]",
        ),
        (
            {"groups": {"vision*": {"tolerance": 0.1, "parameter_reduction": 0.1}}},
            r"groups\['vision\*'\]=.*: a budget is exactly one of parameter_reduction and tolerance",
        ),
        ({"groups": {"vision*": {}}}, r"groups\['vision\*'\]={}: a budget is exactly one of"),
        ({"groups": {"vision*": {"epsilon": 0.1}}}, r"groups\['vision\*'\]={'epsilon': 0.1}: .*'epsilon'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head' must be a list of names or globs"),
        ({"seed": None}, "seed=None must be an integer"),
        ({"seed": True}, "seed=True must be an integer"),
        ({"dataset": 7}, "dataset is a int; give a list of texts, .* or 'self'"),
        ({"dataset": {"text": "a"}}, "dataset is a dict; give a list of texts"),
        ({"groups": {"a": 0.3}}, r"groups\['a'\]=0.3 must map names or globs to values"),
        ({"groups": ["a"]}, r"groups=\['a'\] must map names or globs to values"),
        ({"allocation": ["pareto"]}, r"allocation=\['pareto'\] is not known"),
        ({"self_contained": "no"}, "self_contained='no' must be True or False"),
    ],
)
def test_what_is_not_known_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        request(**fields)


def test_uniform_ranks_take_no_tolerance():
    message = "takes parameter_reduction, not tolerance; use allocation='pareto'"
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(tolerance=0.1, allocation="uniform")
    with pytest.raises(ConfigError, match=message):
        request(groups={"vision*": {"tolerance": 0.1}}, allocation="uniform")
    request(groups={"vision*": {"parameter_reduction": 0.1}}, allocation="uniform")


@pytest.mark.parametrize("field", ["num_iterations", "rank_multiple", "num_samples", "batch_size", "sequence_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
def test_counts_are_integers_from_one(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value!r} must be an integer of at least 1"):
        request(**{field: value})
    assert getattr(request(**{field: 1}), field) == 1


# Requests


def test_groups_have_budgets_of_their_own_in_the_order_given():
    config = request(groups={"vision*": {"tolerance": 0.1}, "*.mlp.*": {"parameter_reduction": 0.5}})
    assert config.group_budgets == {"vision*": Budget(tolerance=0.1), "*.mlp.*": Budget(parameter_reduction=0.5)}
    assert list(config.group_budgets) == ["vision*", "*.mlp.*"]  # the first match wins
    assert request().group_budgets == {}
    assert not config.is_result


@pytest.mark.parametrize("solver", ["als", "eigh"])
def test_a_solver_that_looks_at_activations_needs_a_dataset(solver):
    config = request(solver=solver)
    assert config.needs_dataset
    with pytest.raises(CalibrationError, match=f"solver='{solver}' needs calibration data: .* or use solver='svd'"):
        config.require_dataset()
    request(solver=solver, dataset="self").require_dataset()


def test_plain_svd_needs_no_dataset():
    assert not request(solver="svd").needs_dataset
    request(solver="svd").require_dataset()


def test_a_config_keeps_its_own_copy_of_what_it_was_given():
    ranks, groups, names = {"*": 2}, {"vision*": {"tolerance": 0.1}}, ["lm_head"]
    by_ranks, by_groups = PGSVDConfig(ranks=ranks), request(groups=groups, modules_to_not_convert=names)
    ranks["*"] = 9
    groups["vision*"]["tolerance"] = 0.9
    names.append("embed")
    assert by_ranks.ranks == {"*": 2}
    assert by_groups.groups == {"vision*": {"tolerance": 0.1}}
    assert by_groups.modules_to_not_convert == ["lm_head"]


# Results


def test_with_ranks_makes_a_result_and_leaves_the_request_alone():
    config = request(groups={"vision*": {"tolerance": 0.1}}, dataset=["a text"])
    before = copy.deepcopy(vars(config))
    ranks = dict(RANKS)
    result = config.with_ranks(ranks)
    ranks.clear()
    assert result.is_result
    assert result.ranks == RANKS
    assert result.get_loading_attributes() == {}
    # The request stays on record in the result, and is itself unchanged.
    assert vars(config) == before
    changed = {key for key, value in vars(result).items() if value != before[key]}
    assert changed == {"ranks", "format_version"}
    result.groups["vision*"]["tolerance"] = 0.9
    assert vars(config) == before


@pytest.mark.parametrize(
    "config",
    [
        request(),
        PGSVDConfig(tolerance=0.25, solver="als", num_iterations=3),
        PGSVDConfig(ranks={"*.q_proj": 2}, modules_to_not_convert=["lm_head"], solver="svd"),
        request(groups={"vision*": {"tolerance": 0.1}}, rank_multiple=8, dataset="self", seed=7, self_contained=True),
        request(dataset=[torch.zeros(1, 4)], tokenizer=Uncopyable(), sequence_length=64, batch_size=2, num_samples=5),
    ],
    ids=["reduction", "tolerance", "ranks", "groups", "objects"],
)
def test_a_result_survives_its_json(config):
    stored = config.with_ranks(RANKS).to_dict()
    loaded = PGSVDConfig.from_dict(json.loads(json.dumps(stored)))
    assert loaded.is_result
    assert loaded.ranks == RANKS
    assert loaded.to_dict() == stored


def test_a_result_without_ranks_is_damaged():
    stored = request().with_ranks(RANKS).to_dict() | {"ranks": None}
    with pytest.raises(ConfigError, match="the config of a compressed model has no ranks; its config.json is damaged"):
        PGSVDConfig.from_dict(stored)


def test_a_newer_format_is_refused():
    result = request().with_ranks(RANKS)
    newer = max(modeling_pgsvd.FORMATS.values()) + 1
    message = f"this checkpoint has PGSVD format {newer}, and this runtime reads up to {newer - 1}; upgrade with"
    with pytest.raises(RuntimeError, match=message):
        PGSVDConfig.from_dict(result.to_dict() | {"format_version": newer})
    # A field that only the newer format knows must not hide that.
    with pytest.raises(RuntimeError, match=message):
        PGSVDConfig.from_dict(result.to_dict() | {"format_version": newer, "storage": "pivoted"})


# Copies


def test_a_copy_shares_the_dataset_and_tokenizer_objects_and_nothing_else():
    texts = (text for text in ["one", "two"])
    tokenizer = Uncopyable()
    config = request(dataset=texts, tokenizer=tokenizer, groups={"a": {"tolerance": 0.1}})
    for clone in (copy.deepcopy(config), copy.deepcopy([config])[0], config.with_ranks(RANKS)):
        assert type(clone) is PGSVDConfig
        assert clone.dataset is texts
        assert clone.tokenizer is tokenizer
        assert clone.groups == config.groups
        assert clone.groups is not config.groups
        assert clone.groups["a"] is not config.groups["a"]
        assert clone.modules_to_not_convert is not config.modules_to_not_convert
    assert next(texts) == "one"  # nothing was consumed


def test_a_copy_knows_itself_within_a_larger_structure():
    config = request()
    first, second = copy.deepcopy([config, config])
    assert first is second is not config


# What is written down


def test_to_dict_is_a_copy_and_every_view_agrees_with_it():
    config = request(dataset=Uncopyable(), groups={"a": {"tolerance": 0.1}})
    fields = config.to_dict()
    assert dict(config) == json.loads(config.to_json_string()) == json.loads(json.dumps(fields)) == fields
    assert config.to_diff_dict() == fields
    assert fields.keys() == vars(config).keys() - {"record", "storage"}
    assert request(storage="pivoted").to_dict().keys() == vars(config).keys() - {"record"}
    fields["groups"]["a"]["tolerance"] = 0.9
    fields["modules_to_not_convert"].append("x")
    assert config.groups == {"a": {"tolerance": 0.1}}
    assert config.modules_to_not_convert == []


@pytest.mark.parametrize(
    ("dataset", "described"),
    [
        (None, None),
        ("self", "self"),
        ("user/name", "user/name"),
        ("user/name:config", "user/name:config"),
        ("/home/someone/private/corpus.jsonl", "corpus.jsonl"),
        ("/home/someone/private/corpus/", "corpus"),
        (["a", "b"], "list of 2 str"),
        ([torch.zeros(1)], "list of 1 Tensor"),
        ((), "empty list"),
        ((text for text in ["a"]), "generator"),
        (Uncopyable(), "Uncopyable"),
        (Uncopyable("user/model"), "user/model"),
        (Uncopyable("/home/someone/model"), "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_dataset_or_tokenizer_is_described_without_its_folders(dataset, described):
    fields = request(dataset=dataset, tokenizer=dataset).to_dict()
    assert fields["dataset"] == fields["tokenizer"] == described


def test_paths_that_exist_lose_their_folders_too(tmp_path, monkeypatch):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "corpus.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "private" / "corpus.jsonl"
    for dataset in (path, str(path), "private/corpus.jsonl", "./private/../private/corpus.jsonl"):
        assert request(dataset=dataset).to_dict()["dataset"] == "corpus.jsonl"
    assert request(tokenizer=Uncopyable(str(tmp_path / "private"))).to_dict()["tokenizer"] == "private"
    assert str(tmp_path) not in repr(request(dataset=path, tokenizer=Uncopyable(str(path))))


def test_ranks_must_name_layers():
    with pytest.raises(ConfigError, match="ranks=8 must map names or globs"):
        PGSVDConfig(ranks=8)
    with pytest.raises(ConfigError, match="ranks={} names no layer"):
        PGSVDConfig(ranks={})


def test_a_pivoted_result_has_a_format_of_its_own():
    plain, pivoted = request().with_ranks(RANKS), request(storage="pivoted").with_ranks(RANKS)
    assert (plain.format_version, pivoted.format_version) == (1, 2)
    assert "storage" not in plain.to_dict()  # byte for byte what earlier versions wrote
    assert pivoted.to_dict()["storage"] == "pivoted"
    assert PGSVDConfig.from_dict(pivoted.to_dict()).storage == "pivoted"
    for damage in ({"format_version": 1}, {"storage": "folded"}, {"storage": "factors"}):
        with pytest.raises(RuntimeError, match="and there is no such format; its config.json is damaged"):
            PGSVDConfig.from_dict(pivoted.to_dict() | damage)


def test_gradients_are_asked_of_what_can_use_them():
    for fields, message in {
        ("objective", "inputs"): "objective='inputs' is not known; known are outputs, loss",
        ("objective", "loss", "solver", "als"): "objective='loss' needs solver='eigh', not 'als'",
        ("objective", "loss", "solver", "svd"): "objective='loss' needs solver='eigh', not 'svd'",
        (
            "allocation",
            "loss",
            "solver",
            "svd",
        ): "allocation='loss' measures gradients on a calibration set, and solver='s",
        (
            "objective",
            "loss",
            "elastic",
            True,
        ): "elastic=True needs objective='outputs' and an allocation that measures no",
        (
            "allocation",
            "loss",
            "elastic",
            True,
        ): "elastic=True needs objective='outputs' and an allocation that measures",
    }.items():
        with pytest.raises(ConfigError, match=f"^{message}"):
            request(**dict(zip(fields[::2], fields[1::2], strict=True)))
    assert request(allocation="loss", solver="als").needs_curvature
    assert request(objective="loss").needs_curvature
    assert not request().needs_curvature


def test_loss_takes_no_tolerance():
    message = "allocation='loss' takes parameter_reduction, not tolerance; use allocation='pareto'"
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(tolerance=0.1, allocation="loss")
    with pytest.raises(ConfigError, match=message):
        PGSVDConfig(0.2, allocation="loss", groups={"*.mlp.*": {"tolerance": 0.1}})
    assert PGSVDConfig(0.2, allocation="loss", groups={"*.mlp.*": {"parameter_reduction": 0.1}}).groups


def test_the_best_settings():
    """Those of the docstring, and any of them may be given otherwise."""
    best = PGSVDConfig.best(0.4, dataset=["a"])
    names = ("allocation", "objective", "storage", "calibration", "refine_steps")
    assert [getattr(best, name) for name in names] == ["loss", "loss", "pivoted", "anchored", 100]
    rest = {name: value for name, value in best.to_dict().items() if name not in names}
    default = PGSVDConfig(0.4, dataset=["a"]).to_dict()
    assert rest == {name: default[name] for name in rest}
    other = PGSVDConfig.best(0.4, dataset=["a"], storage="factors", refine_steps=0, blend=1.0)
    assert (other.storage, other.refine_steps, other.blend, other.objective) == ("factors", 0, 1.0, "loss")
    with pytest.raises(ConfigError, match="refine_steps=100 needs calibration='anchored'"):
        PGSVDConfig.best(0.4, calibration="parallel")


def test_storage_is_known_and_not_elastic():
    with pytest.raises(ConfigError, match="storage='folded' is not known; known are factors, pivoted"):
        request(storage="folded")
    with pytest.raises(ConfigError, match="elastic=True needs storage='factors': pivoted storage mixes"):
        request(storage="pivoted", elastic=True)


def test_loading_reads_ranks_and_format_and_keeps_the_rest_as_a_record():
    saved = request().with_ranks({"a": 1}).to_dict()
    newer = saved | {"solver": "plugin", "allocation": "plugin", "note": 1, "num_samples": None}
    assert PGSVDConfig.from_dict(newer).to_dict() == newer
    for damage, message in (
        ({"ranks": {"a": 0}}, r"ranks\['a'\]=0"),
        ({"ranks": {"a": "8"}}, r"ranks\['a'\]='8'"),
        ({"ranks": None}, "no ranks"),
        ({"format_version": 0}, "format_version=0"),
        ({"format_version": "1"}, "format_version='1'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PGSVDConfig.from_dict(saved | damage)


def test_configs_are_equal_when_all_they_say_is():
    texts = ["a"]
    assert request(dataset=texts) == request(dataset=texts)
    assert request(dataset=texts) != request(dataset=["b"])
    assert PGSVDConfig(parameter_reduction=0.2) != PGSVDConfig(tolerance=0.5)


def test_paths_that_are_gone_when_saved_lose_their_folders_too():
    for path, described in (
        ("data/private/x.jsonl", "x.jsonl"),
        ("private/x.txt", "x.txt"),
        ("user/name", "user/name"),
    ):
        assert request(dataset=path).to_dict()["dataset"] == described
