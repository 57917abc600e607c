"""Policies as text: what is read, what is refused, and that every policy survives being written and read."""

from __future__ import annotations

import ast

import numpy as np
import pytest

import edgetrain as et
from edgetrain.errors import UsageError
from edgetrain.optim import Schedule
from edgetrain.policies import describe_policy, example, parse_policy, policy_names

KINDS = ("filter", "sparsity", "error_pruning")
EVERY = [(kind, name) for kind in KINDS for name in policy_names(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_policy_survives_being_written_and_read(kind, name):
    policy = parse_policy(kind, name)
    assert parse_policy(kind, describe_policy(kind, policy)) == policy


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_no_policy_and_nothing_is_a_mistake(kind):
    assert parse_policy(kind, "none") is None
    for text in ("", " ", "0.9"):
        with pytest.raises(UsageError, match=f"name '{text.strip()}'; known: .*; expected such as {example(kind)}"):
            parse_policy(kind, text)
    assert describe_policy(kind, None) == "none"


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_messages_is_valid(kind):
    assert parse_policy(kind, example(kind)) is not None


def test_keys_are_read_by_the_type_of_their_field():
    read = parse_policy("filter", " eif:rate=0.1, start=5,labels=hard,cells=none,hidden=3,power=inf ")
    assert read == et.EarlyInstanceFilter(0.1, 5, labels="hard", cells=None, hidden=3, power=float("inf"))
    assert parse_policy("filter", describe_policy("filter", read)) == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rando", "unknown name 'rando'; did you mean 'random'"),
        ("random:share=1", "unknown key 'share'; 'random' knows rate, start"),
        ("random:rate", "'rate' is not KEY=VALUE"),
        ("random:rate=", "'rate=' is not KEY=VALUE"),
        ("random:rate=high", "rate=high, expected a number"),
        ("random:start=1.5", "start=1.5, expected a whole number"),
        ("random:rate=7", "RandomFilter: rate=7.0, expected above 0"),
        ("none:rate=1", "'none' takes no settings"),
        (":rate=1", "unknown name ''; known: eif, selective, random, none; expected such as eif:rate=0.3"),
        ("eif:cells=many", "cells=many, expected none or a whole number"),
        ("random:rate=0.5,rate=0.4", "key 'rate' is given twice"),
    ],
)
def test_bad_texts_are_refused_with_a_remedy(text, message):
    with pytest.raises(UsageError, match=message):
        parse_policy("filter", text)


def test_another_object_is_not_a_policy():
    with pytest.raises(UsageError, match="not a policy of this kind, expected one of EarlyInstanceFilter"):
        describe_policy("filter", et.SGD())


NUMBERS = {
    "weights": (et.RigL, {"weights": np.float32(0.9), "refresh": np.int64(4), "dense_last": np.bool_(True)}),
    "swat": (et.SWAT, {"weights": np.float64(0.8), "activations": np.float16(0.5), "refresh": np.int32(7)}),
    "filter": (et.RandomFilter, {"rate": np.float32(0.5), "start": np.int16(3)}),
    "early filter": (et.EarlyInstanceFilter, {"rate": np.float32(0.1), "cells": np.int64(4), "power": np.float32(2)}),
    "error maps": (et.ErrorMapPruning, {"keep": np.float32(0.3)}),
    "gradients": (et.GradientPruning, {"rate": np.float32(0.7)}),
    "sgd": (et.SGD, {"lr": np.float32(0.1), "momentum": np.float32(0.9), "clip_norm": np.float32(1)}),
    "schedule": (Schedule, {"total_steps": np.int64(9), "gamma": np.float32(0.2), "milestones": np.float32([0.1, 1])}),
}


@pytest.mark.parametrize(("record", "settings"), NUMBERS.values(), ids=NUMBERS)
def test_numpy_numbers_are_stored_as_python_numbers(record, settings):
    plain = {key: ast.literal_eval(str(value).replace(" ", ",")) for key, value in settings.items()}
    assert record(**settings) == record(**plain)
    assert not any(isinstance(value, np.generic) for value in vars(record(**settings)).values())
    assert "float32" not in repr(record(**settings))


@pytest.mark.parametrize(("record", "settings"), [
    (et.StaticSparse, {"weights": False}), (et.SET, {"total_steps": True}), (et.RandomFilter, {"rate": True}),
    (et.RandomFilter, {"rate": np.bool_(True)}), (et.ErrorMapPruning, {"keep": True}), (et.SGD, {"lr": True}),
    (et.SGD, {"clip_norm": True}), (et.EarlyInstanceFilter, {"hidden": True}), (et.SWAT, {"refresh": True}),
], ids=str)  # fmt: skip
def test_flags_are_no_numbers(record, settings):
    with pytest.raises(UsageError, match=r"=(np\.)?(True|False)_?, expected a number"):
        record(**settings)


PERCENT = {
    "weights": (et.SWAT, {"weights": 90.0}, "from 0 to below 1; 90 % is weights=0.9"),
    "fraction": (et.RigL, {"fraction": 30}, "a share from 0 to 1; 30 % is fraction=0.3"),
    "rate": (et.RandomFilter, {"rate": 30}, "the share of instances to keep; 30 % is rate=0.3"),
    "keep": (et.ErrorMapPruning, {"keep": 70}, "above 0 and at most 1; 70 % is keep=0.7"),
    "gradients": (et.GradientPruning, {"rate": 90}, "below 1; 90 % is rate=0.9"),
}


@pytest.mark.parametrize(("policy", "settings", "message"), PERCENT.values(), ids=PERCENT)
def test_percent_are_told_as_shares(policy, settings, message):
    with pytest.raises(UsageError, match=message):
        policy(**settings)


def test_optional_flags_name_every_choice():
    with pytest.raises(UsageError, match="dense_first=maybe, expected none or true or false"):
        parse_policy("sparsity", "rigl:dense_first=maybe")


BAD_FIELDS = {
    "rate as text": (et.RandomFilter, {"rate": "0.5"}, "RandomFilter: rate='0.5', expected above 0"),
    "start as text": (et.RandomFilter, {"start": "5"}, "RandomFilter: start='5', expected a whole number"),
    "endless start": (et.RandomFilter, {"start": float("inf")}, "RandomFilter: start=inf, expected a whole number"),
    "half a cell": (et.EarlyInstanceFilter, {"cells": 2.5}, "cells=2.5, expected a whole number from 1 to 1024, or"),
    "power as text": (et.EarlyInstanceFilter, {"power": "2"}, "EarlyInstanceFilter: power='2', expected a number"),
    "first layer": (et.RigL, {"dense_first": "x"}, "rigl: dense_first='x', expected True, False or None"),
    "last layer": (et.StaticSparse, {"dense_last": 1}, "static: dense_last=1, expected True or False"),
    "fraction": (et.SET, {"fraction": "x"}, "set: fraction='x', expected a share"),
    "rescale": (et.SWAT, {"rescale": "x"}, "swat: rescale='x', expected True, False or None"),
}


@pytest.mark.parametrize(("policy", "settings", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_fields_are_refused_when_a_policy_is_made(policy, settings, message):
    with pytest.raises(UsageError, match=message):
        policy(**settings)
