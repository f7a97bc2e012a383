"""Configurations from JSON and from the command line: what is wrong is named, what is right survives a round trip."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.config import check_numbers, from_dict, override, to_dict
from mm_gpt.errors import ConfigError
from mm_gpt.hub.checkpoint import TokenizerConfig
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.model.decoder import DecoderConfig
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.training.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    other: str | Inner | None = None
    many: tuple[Inner, ...] = ()
    kind: Literal["red", "green"] = "red"
    numbers: tuple[float, ...] = ()
    flag: bool = False
    limit: int | None = None


INNERS = st.builds(Inner, size=st.integers(), rate=st.floats(allow_nan=False))
OUTERS = st.builds(
    Outer,
    name=st.text(),
    inner=INNERS,
    other=st.none() | st.text() | INNERS,
    many=st.lists(INNERS, max_size=3).map(tuple),
    kind=st.sampled_from(["red", "green"]),
    numbers=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
    flag=st.booleans(),
    limit=st.none() | st.integers(),
)


@given(OUTERS)
def test_json_round_trip(config: Outer) -> None:
    """A run's configuration must come back as it was, tuples and nested dataclasses included."""
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("decoder", ["smollm2-135m-instruct", tiny_config(400).decoder])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4, alpha=8)])
def test_model_config_round_trip(decoder: str | DecoderConfig, lora: LoRAConfig | None) -> None:
    tiny = tiny_config(400)
    config = ModelConfig(decoder=decoder, vision=tiny.vision, connector=tiny.connector, lora=lora)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "inner": {"sise": 3}}, r"file\.inner: unknown key 'sise'; did you mean 'size'\?"),
        ({"name": "x", "other": {"rat": 3}}, r"file\.other: unknown key 'rat'; did you mean 'rate'\?"),
        ({"name": "x", "many": [{}, {"size": "3"}]}, r"file\.many\[1\]\.size: expected int, got '3'"),
        ({"nme": "x"}, r"file: unknown key 'nme'; did you mean 'name'\?"),
        ({}, "file: missing key 'name'"),
        ({"name": 3}, r"file\.name: expected str, got 3"),
        ({"name": "x", "inner": {"size": True}}, r"file\.inner\.size: expected int, got True"),
        ({"name": "x", "inner": {"size": 3.0}}, r"file\.inner\.size: expected int, got 3\.0"),
        ({"name": "x", "flag": 1}, r"file\.flag: expected bool, got 1"),
        ({"name": "x", "kind": "rde"}, r"file\.kind: unknown value 'rde'; did you mean 'red'\?"),
        ({"name": "x", "numbers": 3}, r"file\.numbers: expected a list, got 3"),
        ({"name": "x", "inner": []}, r"file\.inner: expected an object with keys, got list"),
        ({"name": "x", "limit": "3"}, r"file\.limit: expected int, got '3'"),
        ([], "file: expected an object with keys, got list"),
    ],
)
def test_a_wrong_key_is_named(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, values, where="file")


def test_a_whole_number_is_a_float() -> None:
    """JSON written by other programs has 1 for 1.0."""
    rate = from_dict(Inner, {"rate": 1}).rate
    assert rate == 1.0
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("inner.size=7", {"inner": Inner(size=7)}),
        ("inner.rate=1e-3", {"inner": Inner(rate=1e-3)}),
        ("flag=true", {"flag": True}),
        ("flag=False", {"flag": False}),
        ("kind=green", {"kind": "green"}),
        ("numbers=1,2.5", {"numbers": (1.0, 2.5)}),
        ("numbers=", {"numbers": ()}),
        ("limit=none", {"limit": None}),
        ("limit=12", {"limit": 12}),
        ("name=a=b", {"name": "a=b"}),
        ("other=text", {"other": "text"}),
    ],
)
def test_override(assignment: str, changed: dict[str, Any]) -> None:
    assert override(Outer(name="x"), [assignment]) == Outer(**{"name": "x", **changed})


def test_false_is_false() -> None:
    """argparse's type=bool makes every text true."""
    assert override(Outer(name="x", flag=True), ["flag=false"]).flag is False


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.sise=7", r"inner\.sise: unknown key 'sise'; did you mean 'size'\?"),
        ("iner.size=7", r"iner\.size: unknown key 'iner'; did you mean 'inner'\?"),
        ("inner", "override 'inner' is not of the form key=value"),
        ("inner.size=x", r"inner\.size: cannot read 'x' as int"),
        ("flag=yes", "flag: cannot read 'yes' as bool"),
        ("kind=blue", r"kind: unknown value 'blue'"),
        ("name.first=x", r"name\.first: 'name' has no keys of its own"),
        ("inner=x", "inner: cannot read 'x' as Inner"),
        ("inner.size=3 inner=none", r"inner: inner\.size was given as well"),
    ],
)
def test_override_errors(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Outer(name="x"), assignment.split())


def test_later_overrides_win_and_the_original_stays() -> None:
    config = Outer(name="x")
    assert override(config, ["limit=1", "limit=2"]).limit == 2
    assert config.limit is None


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (TrainConfig, {"steps": 0, "lr": 1e-3}),
        (TrainConfig, {"steps": 1, "lr": 0.0}),
        (TrainConfig, {"steps": 1, "lr": 1e-3, "accumulate": 0}),
        (LoRAConfig, {"rank": 0, "alpha": 1.0}),
        (LoRAConfig, {"rank": 1, "alpha": 0.0}),
        (LoRAConfig, {"rank": 1, "alpha": 1.0, "dropout": 1.0}),
        (GenerationConfig, {"max_new_tokens": 0}),
        (GenerationConfig, {"temperature": -1.0}),
        (GenerationConfig, {"temperature": float("nan")}),
        (GenerationConfig, {"top_p": 0.0}),
        (GenerationConfig, {"top_k": -1}),
        (GenerationConfig, {"num_beams": 0}),
        (GenerationConfig, {"stop": [""]}),
        (GenerationConfig, {"length_penalty": float("inf")}),
        (GenerationConfig, {"num_beams": 2, "temperature": 1.0}),
    ],
)
def test_impossible_values(cls: type, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_dict(cls, values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "at least 1"),
        ("accumulate", -1, "at least 1"),
        ("batch_tokens", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("lr", float("nan"), "above 0"),
        ("lr", float("inf"), "above 0"),
        ("lr", -1e-3, "above 0"),
        ("clip", 0.0, "above 0"),
        ("eps", 0.0, "above 0"),
        ("warmup_steps", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("final_lr", 1.5, "at least 0 and at most 1"),
        ("beta1", 1.0, "at least 0 and below 1"),
        ("beta2", -0.1, "at least 0 and below 1"),
        ("seed", -1, "at least 0 and below 4,294,967,296"),
        ("seed", 10**400, "at least 0 and below 4,294,967,296"),
        ("seed", 2**32, "at least 0 and below 4,294,967,296"),
    ],
)
def test_every_setting_of_training_has_bounds(name: str, value: float, message: str) -> None:
    """A beta of 1 divides by zero in the first step, a huge seed in the middle of a run."""
    with pytest.raises(ConfigError, match=rf"^{name} must be {re.escape(message)}, not"):
        TrainConfig(**{"steps": 1, "lr": 1e-3, name: value})  # type: ignore[arg-type]


def test_bounds_of_numbers() -> None:
    check_numbers(Inner(size=2, rate=0.5), "size", "rate", at_least=0.5, at_most=2)
    check_numbers(Outer(name="x", limit=None), "limit", at_least=1)
    with pytest.raises(ConfigError, match="rate must be above 1, not 1"):
        check_numbers(Inner(rate=1.0), "rate", above=1)
    with pytest.raises(ConfigError, match="rate must be a finite number, not nan"):
        check_numbers(Inner(rate=float("nan")), "rate")


def test_impossible_decoders() -> None:
    values = to_dict(tiny_config(400).decoder)
    with pytest.raises(ConfigError, match="num_heads 6 is not a multiple of num_kv_heads 4"):
        from_dict(DecoderConfig, values | {"num_kv_heads": 4})
    with pytest.raises(ConfigError, match="head_size 7 must be even"):
        from_dict(DecoderConfig, values | {"head_size": 7})
    for changes, message in (
        ({"num_kv_heads": 0}, "num_kv_heads must be above 0, not 0"),  # was a ZeroDivisionError
        ({"num_layers": -1}, "num_layers must be above 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be above 0"),
        ({"position_offset": -2}, "position_offset cannot be below 0"),
        ({"positions": "sinusoidal", "width": 49}, "width 49 must be even"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(DecoderConfig, values | changes)


@pytest.mark.parametrize("names", ["x", [1], 3, {"bos_token": 5}])
def test_a_dict_is_checked_as_well(names: Any) -> None:
    values = {"end_of_text": "a", "end_of_turn": "b", "names": names}
    with pytest.raises(ConfigError, match=r"tokenizer\.names"):
        from_dict(TokenizerConfig, values, where="tokenizer")
    assert from_dict(TokenizerConfig, values | {"names": {"bos_token": "a"}}).names == {"bos_token": "a"}


def test_impossible_processors() -> None:
    image = {"size": 32}
    for values, message in (
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_length": 9, "tokens_per_image": 4}, "need image"),
        ({"max_length": 9, "image": image}, "tokens_per_image of at least 1, not 0"),
        (
            {
                "max_length": 9,
                "image": image,
                "tokens_per_image": 4,
                "tiling": {"kind": "idefics3", "longest_edge": 64},
            },
            "tiling needs image_text",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(ProcessorConfig, values)


def test_a_key_of_an_inner_part_is_named_with_its_path() -> None:
    """`lr=1e-3` is what people write for `inner.lr=1e-3`."""

    @dataclass(frozen=True)
    class Part:
        lr: float = 1.0

    @dataclass(frozen=True)
    class Whole:
        steps: int = 1
        part: Part = Part()

    with pytest.raises(ConfigError, match=r"^lr: unknown key 'lr'; did you mean 'part\.lr'\?$"):
        override(Whole(), ["lr=2"])
    with pytest.raises(ConfigError, match=r"did you mean 'steps'\?"):
        override(Whole(), ["step=2"])


def test_half_a_character_is_refused_in_values() -> None:
    @dataclass(frozen=True)
    class Named:
        name: str = ""
        more: tuple[str, ...] = ()

    for wrong in ({"name": "caf\udce9"}, {"more": ["a", "\ud83d"]}):
        with pytest.raises(ConfigError, match=r"(name|more\[1\]): half a character"):
            from_dict(Named, wrong)
    with pytest.raises(ConfigError, match="name: half a character"):
        override(Named(), ["name=caf\udce9"])
