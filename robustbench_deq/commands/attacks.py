"""`attacks`: what is registered, with its settings."""

from __future__ import annotations

import json
from typing import Any

import click

from robustbench_deq.adjoints import ADJOINTS
from robustbench_deq.attacks import ATTACKS
from robustbench_deq.commands.rows import echo_listing
from robustbench_deq.optimise import OBJECTIVES
from robustbench_deq.solvers import SOLVERS


def attacks(is_json: bool) -> None:
    """List attacks and what --set reaches in each; also solvers, adjoints and objectives, which settings name."""
    rows = []
    for name in ATTACKS:
        kind = ATTACKS.get(name)
        fields = kind.config_type.model_fields
        if is_json:
            schema = kind.config_type.model_json_schema()
            settings = _without_references(schema["properties"], schema.get("$defs", {}))
            rows.append({"name": name, "summary": kind.summary, "settings": settings})
        else:
            rows.append({"name": name, "summary": kind.summary, "settings": len(fields)})
    named = {"solvers": SOLVERS, "adjoints": ADJOINTS, "objectives": OBJECTIVES}
    others = {kind: list(registry) for kind, registry in named.items()}
    # Of other libraries, none where they are not installed.
    others |= {f"{prefix}:NAME": list(names) for prefix, names in ATTACKS.prefixed().items()}
    echo_listing(rows, "attacks", is_json, others)
    if not is_json:
        click.echo("\nSettings with their defaults, for --set key=value:")
        for name in ATTACKS:
            kind = ATTACKS.get(name)
            defaults = kind.config_type().model_dump(mode="json")
            click.echo(f"\n{name}")
            for key, info in kind.config_type.model_fields.items():
                click.echo(f"  {key}={json.dumps(defaults.get(key))}  {info.description or ''}")


def _without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with every `$ref` replaced by what it refers to."""
    if isinstance(schema, list):
        return [_without_references(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    named = definitions[schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else {}
    own = {key: value for key, value in schema.items() if key != "$ref"}
    return {key: _without_references(value, definitions) for key, value in {**named, **own}.items()}
