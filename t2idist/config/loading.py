"""Recipes: the YAML files in configs/, and ``key.path=value`` overrides of their values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t2idist.config.schema import RunConfig
from t2idist.config.strict import from_dict, parse_value, parse_yaml, type_at, unknown_key


def configs_folder() -> Path:
    """Return the folder of the recipes: `configs/` of the checkout or of the installed package."""
    package = Path(__file__).parents[1]
    return next(p for p in (package.parent / "configs", package / "configs") if p.is_dir())


def recipes() -> dict[str, list[str]]:
    """Return the names of the presets by recipe name."""
    folder = configs_folder()
    return {d.name: sorted(p.stem for p in d.glob("*.yaml")) for d in sorted(folder.iterdir()) if d.is_dir()}


def load(recipe: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a recipe and apply overrides.

    Args:
        recipe: a name in configs/, or a .yaml file.
        overrides: ``key.path=value``; ``preset=NAME`` selects configs/<recipe>/<NAME>.yaml, by default ``demo``.

    Raises:
        ValueError: in one sentence, the file or key, its value and what is allowed.
    """
    pairs = [_parse_override(override) for override in overrides]
    presets = [value for path, value in pairs if path == ["preset"]]
    values = _read_recipe(recipe, str(presets[-1]) if presets else None)
    stages = values.get("stages")
    known = list(stages) if isinstance(stages, dict) else []
    for path, value in pairs:
        if path != ["preset"]:
            _set(values, path, value)
    for name, stage in values["stages"].items() if known and isinstance(values["stages"], dict) else ():
        if name not in known and isinstance(stage, dict) and "system" not in stage:
            raise ValueError(unknown_key(f"stages.{name}", name, known).replace("unknown key", "no such stage"))
    return from_dict(RunConfig, values)


def _read_recipe(recipe: str, preset: str | None) -> dict[str, Any]:
    if recipe.endswith((".yaml", ".yml")):
        if preset:
            raise ValueError(f"preset={preset}: a preset needs a recipe's name, not the file {recipe}")
        file = Path(recipe)
        if not file.is_file():
            raise ValueError(f"{recipe}: no such file in {Path.cwd()}; recipes with a name are {', '.join(recipes())}")
    else:
        known = recipes()
        if recipe not in known:
            raise ValueError(unknown_key(recipe, recipe, known).replace("unknown key", "no such recipe"))
        preset = preset or "demo"
        if preset not in known[recipe]:
            raise ValueError(f"preset={preset}: {recipe} has {', '.join(known[recipe])}")
        file = configs_folder() / recipe / f"{preset}.yaml"
    values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected keys with values, such as 'name: mine'")
    return values


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: expected key.path=value")
    path = key.split(".")
    return path, parse_value(text, type_at(RunConfig, path), override)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for i, key in enumerate(path[:-1]):
        section = values.setdefault(key, {})
        if not isinstance(section, dict):
            raise ValueError(f"{'.'.join(path)}: '{'.'.join(path[: i + 1])}' is a value, not a section")
        values = section
    values[path[-1]] = value
