"""Policies as text: ``name:key=value,key=value``, for flags, configuration files and checkpoints.

A policy says what to skip: which instances (``filter``), which weights and activations (``sparsity``), which error
maps (``error_pruning``). Every policy is a frozen dataclass; its fields are the keys. A new one needs a row in
``_POLICIES`` and nothing else to be a flag, a key of a profile's recipe, and a part of checkpoints.
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any, get_type_hints

from edgetrain.errors import UsageError
from edgetrain.schema import nearest

# Kind -> name -> module and class.
_POLICIES: dict[str, dict[str, str]] = {
    "filter": {
        "eif": "edgetrain.filters:EarlyInstanceFilter",
        "selective": "edgetrain.filters:SelectiveBackprop",
        "random": "edgetrain.filters:RandomFilter",
    },
    "sparsity": {
        "swat": "edgetrain.sparsity:SWAT",
        "rigl": "edgetrain.sparsity:RigL",
        "set": "edgetrain.sparsity:SET",
        "static": "edgetrain.sparsity:StaticSparse",
    },
    "error_pruning": {
        "channels": "edgetrain.pruning:ErrorMapPruning",
        "gradients": "edgetrain.pruning:GradientPruning",
    },
}

# Kind -> module and class that all policies of the kind derive from.
_BASES = {
    "filter": "edgetrain.filters:InstanceFilter",
    "sparsity": "edgetrain.sparsity:SparsityPolicy",
    "error_pruning": "edgetrain.pruning:ErrorPruning",
}

# Turns a policy off, whatever the profile says.
NONE = "none"


def policy_names(kind: str) -> list[str]:
    """Return the names of all policies of a kind.

    Example:
        >>> policy_names("filter")
        ['eif', 'selective', 'random']
    """
    return list(_POLICIES[kind])


def parse_policy(kind: str, text: str) -> Any:
    """Return the policy that a text describes, ``None`` for "none".

    Args:
        kind: "filter", "sparsity" or "error_pruning".
        text: a name, then perhaps a colon and settings: ``name:key=value,key=value``. Keys not given keep
            their default.

    Raises:
        UsageError: the text is malformed, or a name, a key or a value is wrong.

    Example:
        >>> parse_policy("filter", "random:rate=0.25")
        RandomFilter(rate=0.25, start=0)
        >>> parse_policy("filter", "none") is None
        True
    """
    policy, given = _read(kind, text)
    return None if policy is None else policy(**given)


def agrees(kind: str, text: str, policy: Any) -> bool:
    """Tell whether a policy is one that a text describes, whatever the keys that the text leaves out.

    Defaults may differ between versions; what a text names does not.

    Raises:
        UsageError: the text is bad.

    Example:
        >>> half = parse_policy("filter", "random:rate=0.5,start=7")
        >>> agrees("filter", "random:rate=0.5", half), agrees("filter", "random:start=0", half)
        (True, False)
    """
    wanted, named = parse_policy(kind, text), _read(kind, text)[1]
    return type(policy) is type(wanted) and all(getattr(policy, key) == getattr(wanted, key) for key in named)


def as_policy(kind: str, policy: Any) -> Any:
    """Return a policy as it is, that of a text as ``parse_policy`` reads it, or ``None``.

    Args:
        kind: "filter", "sparsity" or "error_pruning".
        policy: what a user gave.

    Raises:
        UsageError: not a policy of this kind, or a bad text.

    Example:
        >>> as_policy("filter", "random:rate=0.25")
        RandomFilter(rate=0.25, start=0)
    """
    if isinstance(policy, str):
        return parse_policy(kind, policy)
    if policy is None or isinstance(policy, _imported(_BASES[kind])):
        return policy
    raise _not_of(kind, policy)


def describe_policy(kind: str, policy: Any) -> str:
    """Return the text from which ``parse_policy`` makes an equal policy; "none" for ``None``.

    Raises:
        UsageError: the object is not a policy of this kind.

    Example:
        >>> describe_policy("filter", parse_policy("filter", "random:rate=0.25"))
        'random:rate=0.25,start=0'
    """
    if policy is None:
        return NONE
    name = next((name for name in _POLICIES[kind] if _load(kind, name) is type(policy)), None)
    if name is None:
        raise _not_of(kind, policy)
    listed = ",".join(f"{item.name}={_text(getattr(policy, item.name))}" for item in fields(policy))
    return f"{name}:{listed}" if listed else name


def example(kind: str) -> str:
    """Return an example of the texts of a kind, for messages."""
    return {
        "filter": "eif:rate=0.3", "sparsity": "swat:weights=0.9,activations=0.9", "error_pruning": "channels:keep=0.7",
    }[kind]  # fmt: skip


def _read(kind: str, text: str) -> tuple[Any, dict[str, Any]]:
    """Return the class that a text names, ``None`` for "none", and the settings; raises as ``parse_policy``."""
    name, _, settings = text.strip().partition(":")
    if name == NONE:
        if settings:
            raise UsageError(f"{_what(kind)} '{text}': 'none' takes no settings")
        return None, {}
    policy = _find(kind, name, text)
    hints = get_type_hints(policy)
    known = {item.name: hints[item.name] for item in fields(policy)}
    given: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise UsageError(f"{_what(kind)} '{text}': '{part}' is not KEY=VALUE; expected such as {example(kind)}")
        if key not in known:
            raise UsageError(f"{_what(kind)} '{text}': unknown key '{key}'; '{name}' knows {', '.join(known)}")
        if key in given:
            raise UsageError(f"{_what(kind)} '{text}': key '{key}' is given twice; leave one out")
        given[key] = _value(known[key], value, f"{_what(kind)} '{text}': {key}")
    return policy, given


def _find(kind: str, name: str, text: str) -> Any:
    known = _POLICIES[kind]
    if name not in known:
        likely = nearest(name, known)
        hint = f"did you mean '{likely}'? " if set(name) & set(likely) else ""
        listed = ", ".join([*known, NONE])
        raise UsageError(
            f"{_what(kind)} '{text}': unknown name '{name}'; {hint}known: {listed}; expected such as {example(kind)}"
        )
    return _load(kind, name)


def _load(kind: str, name: str) -> Any:
    # Loaded when named: reading a flag must not load every method.
    return _imported(_POLICIES[kind][name])


def _imported(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _not_of(kind: str, policy: Any) -> UsageError:
    known = ", ".join(place.partition(":")[2] for place in _POLICIES[kind].values())
    hint = f"; make one: {policy.__name__}()" if isinstance(policy, type) else ""
    return UsageError(
        f"{_what(kind)}={policy!r}: not a policy of this kind, expected one of {known}, a text such as "
        f"'{example(kind)}', or None{hint}"
    )


def _what(kind: str) -> str:
    return {"filter": "instance filter", "sparsity": "sparsity", "error_pruning": "error pruning"}[kind]


def _value(hint: Any, text: str, where: str) -> Any:
    """Return a text as the type of a field: bool, int, float or str, perhaps with ``None``."""
    if type(None) in getattr(hint, "__args__", ()) and text.lower() == NONE:
        return None
    kinds = [kind for kind in (bool, int, float, str) if hint is kind or kind in getattr(hint, "__args__", ())]
    for kind in kinds:
        try:
            return _TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            continue
    names = {bool: "true or false", int: "a whole number", float: "a number"}
    expected = [NONE] if type(None) in getattr(hint, "__args__", ()) else []
    raise UsageError(f"{where}={text}, expected {' or '.join([*expected, *(names[kind] for kind in kinds)])}")


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
