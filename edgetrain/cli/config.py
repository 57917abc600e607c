"""The settings of a training run: defaults, then the device profile, then a file, then flags.

The records are the schema of ``config.toml``: unknown keys, wrong types and values out of range are errors that
name the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from edgetrain.data import Augmentation
from edgetrain.data.embedded import EMBEDDED_NAMES
from edgetrain.data.readers import NO_SOURCE
from edgetrain.data.streaming import STANDARD_INPUT
from edgetrain.devices import DeviceProfile, Hyperparameters, load_profile
from edgetrain.errors import ProfileError, UsageError
from edgetrain.optim import KINDS, OPTIMIZERS
from edgetrain.policies import NONE, parse_policy
from edgetrain.runs import read_sections
from edgetrain.schema import OneOf, Within, build
from edgetrain.units import MIB, parse_bytes

Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network, and where its weights begin."""

    name: str = "lenet5"
    initial_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images, and what happens to them."""

    source: str = "embedded"
    image_size: str | None = None
    augment: str = ""
    normalize: bool = True


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Limits of the run."""

    profile: str = "host"
    threads: Annotated[int, Within(1, 4096)]
    batch_size: Annotated[int, Within(1, 65_536)]
    memory_budget_mib: Annotated[float, Within(0.001, 1 << 24)]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Hyperparameters):
    """The hyperparameters of the run; where its random numbers begin, and how often it is saved."""

    optimizer: Annotated[str, OneOf(tuple(OPTIMIZERS))]
    schedule: Annotated[str, OneOf(KINDS)]
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    save_every_minutes: Annotated[float, Within(0, 1e6)] = 10.0


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What to skip, as texts of ``edgetrain.policies``."""

    filter: str = NONE
    sparsity: str = NONE
    error_pruning: str = NONE


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Whether the data are a stream, seen once and in order.

    ``predict``: predict every instance before learning from it; ``window``: instances per row of metrics.csv;
    ``block``: instances that the filter looks at together, by default as many as leave one training batch.
    """

    enabled: bool = False
    predict: bool = False
    window: Annotated[int, Within(1, 1 << 40)] = 1000
    block: Annotated[int, Within(1, 1 << 20)] | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the result of a run."""

    model: ModelSettings
    data: DataSettings
    device: DeviceSettings
    training: TrainingSettings
    methods: MethodSettings = MethodSettings()
    stream: StreamSettings = StreamSettings()

    def to_dict(self) -> Table:
        """Return nested dicts, as in ``config.toml``: what is not set is left out."""
        sections = asdict(self).items()
        return {name: {k: v for k, v in section.items() if v is not None} for name, section in sections}


# Norm that gradients are clipped to with SWAT, unless another one is given: 1.0 is what short trials needed.
_SWAT_CLIP_NORM = 1.0
# Of a stream: predictions with the mean of the latest tenth of all steps, of at most about a hundred (docs/streams.md).
_STREAM_AVERAGING = 0.99

# Kind of policy -> the learner's argument, which is its name in checkpoints too.
ARGUMENTS = {"filter": "instance_filter", "sparsity": "sparsity", "error_pruning": "error_pruning"}
METHODS = tuple(ARGUMENTS)
# What --recipe names. "edge" is what measured best on streams whose data change and whose network knows the old ones
# (docs/streams.md), so profiles of boards name it as their ``stream_recipe``, the default of fit --stream with trained
# weights where the profile's own recipe skips nothing. It is not the default from scratch: a network that begins
# untrained has everything to learn (of 60,000 instances seen once LeNet-5 had 76 % with edge, 86 % when it learned from
# every one), and for epochs no method clearly beat dense training for fewer steps at equal time
# (docs/learning_accuracy.md, docs/sparse_accuracy.md).
# One filter for every network, which saves about 70 % of the operations. With rate=0.25 and power=1.25 LeNet-5
# learned 5.7 and ResNet-8 7.4 points less of the rotated images than from everything, so 4.0 and 5.0 (other seeds than
# the reported ones); more power forgets more than a point of the old images (LeNet-5, dark).
RECIPES = {
    "edge": {"filter": "eif:rate=0.33,power=1.5", "sparsity": NONE, "error_pruning": "channels:keep=0.7"},
    "dense": dict.fromkeys(METHODS, NONE),
}

# Flag of `edgetrain fit` -> key of config.toml.
FLAG_KEYS = {
    "model": "model.name", "initial_weights": "model.initial_weights", "data": "data.source",
    "image_size": "data.image_size", "augment": "data.augment", "normalize": "data.normalize",
    "profile": "device.profile", "threads": "device.threads", "batch_size": "device.batch_size",
    "epochs": "training.epochs", "seed": "training.seed", "optimizer": "training.optimizer", "lr": "training.lr",
    "momentum": "training.momentum", "nesterov": "training.nesterov", "weight_decay": "training.weight_decay",
    "clip_norm": "training.clip_norm", "averaging": "training.averaging", "schedule": "training.schedule",
    "warmup": "training.warmup_fraction", "label_smoothing": "training.label_smoothing",
    "save_every": "training.save_every_minutes",
    "filter": "methods.filter", "sparsity": "methods.sparsity", "error_pruning": "methods.error_pruning",
    "stream": "stream.enabled", "predict_first": "stream.predict", "window": "stream.window",
}  # fmt: skip


def from_flags(flags: Mapping[str, Any]) -> tuple[Config, DeviceProfile, frozenset[str]]:
    """Return the effective settings of ``edgetrain fit``.

    Args:
        flags: parameters of the command; ``None`` means not given.

    Returns:
        As ``effective``.

    Raises:
        UsageError, ProfileError: a flag, a key or a value is wrong.
    """
    file = {} if flags.get("config") is None else read_sections(Path(flags["config"]))
    return effective(_with_whole_paths(_given(flags)), flags.get("recipe"), _with_whole_paths(file))


def effective(
    given: Mapping[str, Any], recipe: str | None = None, file: Mapping[str, Any] | None = None
) -> tuple[Config, DeviceProfile, frozenset[str]]:
    """Fill what is not given from a file and the device profile, and check all of it.

    Args:
        given: settings by section.
        recipe: "edge" or "dense": what to skip where ``given`` does not say, whatever ``file`` and profile say.
        file: settings that give way to ``given``, by section.

    Returns:
        The settings, the profile, and the kinds of methods that a recipe chose, since nobody named one.

    Raises:
        UsageError, ProfileError: a key or a value is wrong.
    """
    given, file = _all_sections(given), _all_sections(file or {})
    both = _merge(file, given)
    name = str(both["device"].get("profile", "host"))
    profile = load_profile(name)
    merged = _merge(_from_profile(profile, name), both)
    build(Config, merged, Path("settings"))  # types first: what follows computes with the values
    if merged["training"]["optimizer"] != profile.recipe.optimizer and "lr" not in both["training"]:
        # A recipe's learning rate is for its own optimizer.
        merged["training"]["lr"] = OPTIMIZERS[merged["training"]["optimizer"]].lr
    named = (both if recipe is None else given)["methods"]
    # A method that somebody named stands for itself.
    skips = merged["stream"].get("enabled") and not named and _begins_trained(merged["model"])
    usual = profile.recipe.stream_recipe if skips else "dense"
    merged["methods"] = _methods(profile, recipe, usual) | named
    if merged["methods"]["sparsity"].startswith("swat") and not merged["training"].get("clip_norm"):
        # Weight gradients from the largest activations are biased upwards; LeNet-5 diverges without a bound.
        merged["training"]["clip_norm"] = _SWAT_CLIP_NORM
    if merged["stream"].get("enabled"):
        _adapt_to_stream(merged, given, file)
    config = build(Config, merged, Path("settings"))
    if not config.data.source:
        raise UsageError(f"data.source is ''; {NO_SOURCE}")
    # Errors now, not when the run folder exists.
    Augmentation.parse(config.data.augment)
    _check_methods(config, profile, both["methods"])
    _check_momentum(config.training, profile, given["training"], file["training"])
    check_stream(config)
    return config, profile, frozenset(METHODS) - named.keys()


def from_run(table: Mapping[str, Any], path: Path) -> Config:
    """Return the settings that a run saved; nothing is filled in.

    Raises:
        ProfileError: the file was changed into something else.
    """
    return build(Config, _all_sections(table), path)


def check_stream(config: Config) -> None:
    """Refuse settings that a stream contradicts, and those that only a stream would heed.

    Raises:
        UsageError: there is one.
    """
    training, stream, standing = config.training, config.stream, StreamSettings()
    if stream.enabled and training.epochs != 1:
        raise UsageError(
            f"training.epochs is {training.epochs}, but a stream is learned from once: expected 1; leave it out "
            "(--epochs), or leave stream.enabled out (--stream)"
        )
    if stream.enabled and training.schedule != "constant":
        raise UsageError(
            f"training.schedule is '{training.schedule}', but the end of a stream is unknown: expected 'constant'; "
            "leave it out (--schedule), or leave stream.enabled out (--stream)"
        )
    if stream.enabled and config.data.augment:
        raise UsageError(
            f"data.augment is '{config.data.augment}', but instances of a stream are learned from as they come: "
            "expected ''; leave it out (--augment), or leave stream.enabled out (--stream)"
        )
    if not stream.enabled and config.data.source == STANDARD_INPUT:
        raise UsageError("data.source is '-', standard input, which can be read only once; add --stream")
    if not stream.enabled and stream != standing:
        key = next(key for key, value in asdict(stream).items() if value != getattr(standing, key))
        raise UsageError(
            f"stream.{key} is {getattr(stream, key)}, which only a stream heeds; add --stream, or leave it out"
        )


def why_dense(config: Config, profile: DeviceProfile, recipe: str | None, by_recipe: Collection[str]) -> list[str]:
    """Return a sentence where a stream is learned from densely although the profile names a recipe for streams.

    Args:
        config, profile: the settings.
        recipe: what was asked for with ``--recipe``.
        by_recipe: the kinds of methods that nobody named.
    """
    usual = profile.recipe.stream_recipe
    left_open = config.stream.enabled and recipe is None and len(by_recipe) == len(METHODS)
    if not left_open or usual == "dense" or _begins_trained(asdict(config.model)) or config.methods != MethodSettings():
        return []
    return [
        f"the network begins untrained, so every instance is learned from; recipe '{usual}' is for a network that "
        f"knows its data (--initial-weights, or an .onnx file as --model), or for who asks for it (--recipe {usual})"
    ]


def _begins_trained(model: Mapping[str, Any]) -> bool:
    """Whether a network comes with weights that somebody trained."""
    return bool(model.get("initial_weights")) or is_onnx_file(str(model.get("name", "")))


def is_onnx_file(model: str) -> bool:
    """Whether a run's model is a file that brings its own network and weights; any other is built for the data."""
    return model.lower().endswith(".onnx")


def dense(config: Config) -> Config:
    """Return the same settings with nothing skipped."""
    return replace(config, methods=MethodSettings())


def _all_sections(table: Mapping[str, Any]) -> Table:
    """Return the table with an empty section for each that it lacks."""
    return {section.name: {} for section in fields(Config)} | dict(table)


def _from_profile(profile: DeviceProfile, name: str) -> Table:
    recipe = asdict(profile.recipe)
    augment, _ = recipe.pop("augmentation"), recipe.pop("stream_recipe")
    training = {key: value for key, value in recipe.items() if value is not None and key not in METHODS}
    threads = min(profile.threads, len(os.sched_getaffinity(0)))
    limits = {"batch_size": profile.batch_size, "memory_budget_mib": float(profile.memory_budget_mib)}
    device = {"profile": name, "threads": threads, **limits}
    sections = {"model": {}, "data": {"augment": augment}, "device": device, "training": training}
    return sections | {"methods": {}, "stream": {}}


def _methods(profile: DeviceProfile, recipe: str | None, usual: str) -> Table:
    """Return what to skip: by the recipe asked for, else by what the profile names, else by the usual recipe."""
    if recipe is not None and recipe not in RECIPES:
        raise UsageError(f"--recipe '{recipe}', expected one of {', '.join(RECIPES)}")
    own = {key: getattr(profile.recipe, key) for key in METHODS}
    if recipe is None and own != RECIPES["dense"]:
        return own
    return dict(RECIPES[recipe or usual])


def _check_methods(config: Config, profile: DeviceProfile, given: Mapping[str, Any]) -> None:
    """Read the texts of all methods once.

    Raises:
        UsageError: a text that was given is bad.
        ProfileError: one of the profile's recipe is.
    """
    for kind, text in asdict(config.methods).items():
        try:
            parse_policy(kind, text)
        except UsageError as error:
            if kind in given or text != getattr(profile.recipe, kind):
                raise
            where = f"profile {config.device.profile}: key 'defaults.recipe.{kind}'"
            raise ProfileError(f"{where} is {text!r}: {error}") from error


def _check_momentum(
    training: TrainingSettings, profile: DeviceProfile, given: Mapping[str, Any], file: Mapping[str, Any]
) -> None:
    """Refuse what somebody asked for that only sgd heeds, if the optimizer is another one.

    The file of a run has all settings: what it has of the profile, or for its own sgd, nobody asked for here.

    Raises:
        UsageError: there is such a setting.
    """
    if training.optimizer == "sgd":
        return
    of_sgd = file.get("optimizer", training.optimizer) == "sgd"
    for key, standing in (("momentum", profile.recipe.momentum), ("nesterov", profile.recipe.nesterov)):
        value = getattr(training, key)
        if value is not False and (key in given or (key in file and not of_sgd and value != standing)):
            raise UsageError(
                f"training.{key} is {value}, which only sgd heeds, but the optimizer is {training.optimizer}; leave it "
                f"out (--{key}), or take --optimizer sgd"
            )


def _adapt_to_stream(merged: Table, given: Table, file: Table) -> None:
    """A stream has no known end, so no decay that would end it: a constant rate, a fifth of the recipe's peak.

    The recipe's rate is the peak of a schedule that comes down; held constant it is too large. What a decay would do,
    to take the noise out of the parameters, their average does.
    """
    training, kept = merged["training"], {**_kept_by_stream(file), **given["training"]}
    changes = {"epochs": 1, "schedule": "constant", "warmup_fraction": 0.0, "lr": training["lr"] / 5,
               "averaging": training.get("averaging") or _STREAM_AVERAGING}  # fmt: skip
    training |= {key: value for key, value in changes.items() if key not in kept}
    # A recipe's augmentation is for epochs; ``check_stream`` refuses one that was asked for of a stream.
    asked = _merge(file, given) if file["stream"].get("enabled") else given
    merged["data"]["augment"] = asked["data"].get("augment", "")


def _kept_by_stream(file: Table) -> Table:
    """Return what a stream keeps of the recipe in a file: of a run over epochs the rate, unless it is a peak."""
    training: Table = file["training"]
    if file["stream"].get("enabled"):
        return training
    has_peak = training.get("schedule", "constant") != "constant"
    return {"lr": training["lr"]} if "lr" in training and not has_peak else {}


def _given(flags: Mapping[str, Any]) -> Table:
    """Return what the flags say, by section; ``--set`` gives way to a flag of its own."""
    given: Table = {}
    for key, value in _settings(flags.get("set_") or ()):
        _put(given, key, value)
    for flag, key in FLAG_KEYS.items():
        if flags.get(flag) is not None:
            _put(given, key, flags[flag])
    if flags.get("memory_budget") is not None:
        _put(given, "device.memory_budget_mib", parse_bytes(flags["memory_budget"]) / MIB)
    return given


_PATHS: dict[str, Callable[[str], bool]] = {
    "model.initial_weights": lambda value: True,
    "model.name": is_onnx_file,
    "data.source": lambda value: value not in EMBEDDED_NAMES and value != STANDARD_INPUT,
    "device.profile": lambda value: value.endswith(".toml") or os.sep in value,
}


def _with_whole_paths(given: Table) -> Table:
    """Return the settings with the full path of every file and folder, so that the run can be resumed from anywhere.

    Raises:
        UsageError: a path that the run folder's config.toml cannot hold.
    """
    for key, is_path in _PATHS.items():
        section, _, name = key.partition(".")
        value = given.get(section, {}).get(name)
        if isinstance(value, str) and value and is_path(value):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UsageError(f"{key} is {value!r}, expected a path in UTF-8; rename what it leads to") from None
            given = _merge(given, {section: {name: str(Path(value).resolve())}})
    return given


def _merge(base: Table, over: Mapping[str, Any]) -> Table:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _settings(texts: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set '{text}': expected KEY=VALUE such as training.lr=0.1")
        pairs.append((key.strip(), _literal(value.strip())))
    return pairs


def _literal(text: str) -> Any:
    """Return a number or truth value if the text is one, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float, str)) else text


def _put(table: Table, key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    if not dot:
        raise UsageError(f"'{key}' is not a setting; expected SECTION.KEY such as training.lr")
    table.setdefault(section, {})[name] = value
