"""Policies as text: what is read, what is refused, and that every policy survives being written and read."""

from __future__ import annotations

import pytest

import edgetrain as et
from edgetrain.errors import UsageError
from edgetrain.policies import describe_policy, example, parse_policy, policy_names

KINDS = ("filter", "sparsity", "error_pruning")
EVERY = [(kind, name) for kind in KINDS for name in policy_names(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_policy_survives_being_written_and_read(kind, name):
    policy = parse_policy(kind, name)
    assert parse_policy(kind, describe_policy(kind, policy)) == policy


@pytest.mark.parametrize("kind", KINDS)
def test_none_and_nothing_are_no_policy(kind):
    assert parse_policy(kind, "none") is parse_policy(kind, "") is None
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
        (":rate=1", "takes no settings"),
        ("random:rate=0.5,rate=0.4", "key 'rate' is given twice"),
    ],
)
def test_bad_texts_are_refused_with_a_remedy(text, message):
    with pytest.raises(UsageError, match=message):
        parse_policy("filter", text)


def test_another_object_is_not_a_policy():
    with pytest.raises(UsageError, match="not a policy of this kind, expected one of EarlyInstanceFilter"):
        describe_policy("filter", et.SGD())


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
