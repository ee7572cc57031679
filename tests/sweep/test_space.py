"""Search spaces: parsing, drawing, and what is refused."""

from __future__ import annotations

import math
import re

import pytest

from t2idist.config import load
from t2idist.sweep import space


def parsed(*overrides: str) -> space.Space:
    return space.split_overrides(overrides)[1]


def test_overrides_are_split_into_one_value_for_all_trials_and_values_to_try() -> None:
    fixed, swept = space.split_overrides(["seed=3", "a.b=[1,2.5,x]", "c=uniform(0, 1)", "d=randint(1,4)", "e=f(x=1"])
    assert fixed == ["seed=3", "e=f(x=1"]
    assert swept == {
        "a.b": space.Choice(("1", "2.5", "x")),
        "c": space.Range("uniform", 0.0, 1.0),
        "d": space.Range("randint", 1.0, 4.0),
    }
    assert space.describe(swept) == {"a.b": "[1,2.5,x]", "c": "uniform(0,1)", "d": "randint(1,4)"}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("[[64,128],[32]]", ("[64,128]", "[32]")),
        ("[true,null,1e-4]", ("true", "null", "0.0001")),
        ("['a b',\"1\"]", ('"a b"', '"1"')),
        ("[1,1,2]", ("1", "2")),
    ],
)
def test_values_are_written_as_the_command_line_reads_them(text: str, values: tuple[str, ...]) -> None:
    assert parsed(f"k={text}") == {"k": space.Choice(values)}


def test_written_values_reach_the_config() -> None:
    keys = {"precision": "[float32,bfloat16]", "stages.attngan.model.generator_lr": "loguniform(1e-7,1e-6)"}
    for values in space.draw(parsed(*(f"{key}={text}" for key, text in keys.items())), 0, 4):
        config = load("attngan", [f"{key}={value}" for key, value in values.items()])
        assert config.precision == values["precision"]
        rate = config.stages["attngan"].model["generator_lr"]
        assert isinstance(rate, float) and 1e-7 <= rate <= 1e-6


def test_a_trial_depends_on_the_seed_and_its_number_only() -> None:
    swept = parsed("a=uniform(0,1)", "b=[1,2,3,4]", "c=loguniform(1e-4,1)", "d=randint(0,9)")
    few, many = space.draw(swept, 7, 3), space.draw(swept, 7, 12)
    assert many[:3] == few and space.draw(swept, 8, 3) != few
    assert len({trial["a"] for trial in many}) == 12
    assert all(0 <= float(trial["a"]) <= 1 and 1e-4 <= float(trial["c"]) <= 1 for trial in many)
    assert all(int(trial["d"]) in range(10) for trial in many)


def test_loguniform_is_uniform_in_the_logarithm() -> None:
    drawn = [math.log10(float(t["a"])) for t in space.draw(parsed("a=loguniform(1e-4,1)"), 0, 400)]
    assert abs(sum(drawn) / len(drawn) + 2) < 0.2


def test_lists_give_every_combination_once() -> None:
    swept = parsed("a=[1,2,3]", "b=[x,y]")
    drawn = [tuple(trial.values()) for trial in space.draw(swept, 0, 16)]
    assert space.combinations(swept) == len(drawn) == len(set(drawn)) == 6
    assert len({tuple(trial.values()) for trial in space.draw(swept, 0, 5)}) == 5
    assert space.combinations(parsed("a=[1,2]", "b=uniform(0,1)")) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a=[]", "a=\\[\\]: an empty list; give the values to try, such as \\[1,2\\]"),
        ("a=[1,", "not valid YAML"),
        ("a=uniform(2,1)", "the first number must be below the second"),
        ("a=uniform(1)", "expected uniform\\(low,high\\) with two numbers"),
        ("a=uniform(0,inf)", "a=uniform\\(0,inf\\): expected uniform\\(low,high\\) with two finite numbers"),
        ("a", "'a': expected key.path=value"),
        ("=[1,2]", "'=\\[1,2\\]': expected key.path=value"),
        ("a=loguniform(0,1)", "loguniform needs numbers above 0; use uniform"),
        ("a=randint(0.5,2)", "randint needs whole numbers; use uniform"),
        ("a=normal(0,1)", "no such range; there are uniform"),
    ],
)
def test_bad_ranges_are_refused_in_a_sentence(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space.split_overrides([override])


def test_a_key_is_given_once() -> None:
    with pytest.raises(ValueError, match="a is swept twice"):
        space.split_overrides(["a=[1,2]", "a=[3,4]"])
    with pytest.raises(ValueError, match="a: swept and also given one value"):
        space.split_overrides(["a=[1,2]", "a=3"])


@pytest.mark.parametrize("overrides", [[], ["seed=1"], ["seed=[1]"]])
def test_a_sweep_needs_a_key_with_several_values(overrides: list[str]) -> None:
    with pytest.raises(ValueError, match="no key to sweep.*give one or more of key=\\[a,b,c\\]"):
        space.check(*space.split_overrides(overrides))


@pytest.mark.parametrize("override", ["a=[1]", "a=[1,1]", "a=uniform(1,2", "a=1,2", "a={1,2}"])
def test_the_key_that_was_meant_to_be_swept_is_named(override: str) -> None:
    written = "a=[1]" if override == "a=[1,1]" else override
    with pytest.raises(ValueError, match=f"no key to sweep; {re.escape(written)} is one value: give"):
        space.check(*space.split_overrides(["storage=/runs", "name=x", override]))
