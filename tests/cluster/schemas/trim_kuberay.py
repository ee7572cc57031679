"""Trim KubeRay's resource definitions to the fields that cluster/kuberay.yaml uses, and write kuberay.json.

    cd tests/cluster/schemas
    python trim_kuberay.py VERSION rayclusters.yaml rayjobs.yaml > kuberay.json

The two files are helm-chart/kuberay-operator/crds/ray.io_{rayclusters,rayjobs}.yaml of that version of KubeRay. All
field names of the objects in use are kept, so that an unknown one is detected; unused fields accept any value. Run this
again when the yaml uses more fields, or for a newer KubeRay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = ("type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength")
USED = Path(__file__).parents[3] / "cluster/kuberay.yaml"


def trim(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """Return the part of a schema that applies to these values."""
    kept = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if "properties" in schema:
        used = {key: [value[key] for value in values if key in value] for key in schema["properties"]}
        kept["properties"] = {
            key: trim(part, used[key]) if used[key] else True for key, part in sorted(schema["properties"].items())
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = trim(
            schema["additionalProperties"], [part for value in values for part in value.values()]
        )
    if "items" in schema:
        kept["items"] = trim(schema["items"], [part for value in values for part in value])
    return kept


def at(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def spec_of(file: str) -> dict[str, Any]:
    versions = yaml.load(Path(file).read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")
    return dict(at(schema, "schema", "openAPIV3Schema", "properties", "spec"))


def main(version: str, clusters: str, jobs: str) -> None:
    items = yaml.safe_load(USED.read_text())["items"]
    used = {kind: [item["spec"] for item in items if item["kind"] == kind] for kind in ("RayCluster", "RayJob")}
    whole, job = spec_of(clusters), spec_of(jobs)
    specs = [*used["RayCluster"], *(spec["rayClusterSpec"] for spec in used["RayJob"])]
    cluster = trim(whole, specs)
    pods = [spec["headGroupSpec"]["template"] for spec in specs]
    pods += [group["template"] for spec in specs for group in spec["workerGroupSpecs"]]
    head = at(whole, "properties", "headGroupSpec", "properties", "template")
    worker = at(whole, "properties", "workerGroupSpecs", "items", "properties", "template")
    assert at(head, "properties", "spec", "properties").keys() == at(worker, "properties", "spec", "properties").keys()
    at(cluster, "properties", "headGroupSpec", "properties")["template"] = {"$ref": "#/$defs/pod"}
    at(cluster, "properties", "workerGroupSpecs", "items", "properties")["template"] = {"$ref": "#/$defs/pod"}
    run = trim(job, used["RayJob"])
    run["properties"]["rayClusterSpec"] = {"$ref": "#/$defs/RayCluster"}
    policies = [item["spec"] for item in items if item["kind"] == "NetworkPolicy"]
    rules = at(whole, "properties", "networkPolicy", "properties", "head", "properties")
    directions = {
        direction: trim(rules[f"{direction}Rules"], [policy[direction] for policy in policies])
        for direction in ("ingress", "egress")
    }
    selector = {"type": "object", "properties": {"matchLabels": {"type": "object"}}, "additionalProperties": False}
    network = {
        "type": "object",
        "required": ["podSelector"],
        "properties": {
            "podSelector": selector,
            "policyTypes": {"items": {"enum": ["Ingress", "Egress"]}},
            **directions,
        },
        "additionalProperties": False,
    }
    pod = trim(head, pods)
    pod["properties"]["metadata"] = {"type": "object"}
    json.dump(
        {
            "$comment": f"trimmed from github.com/ray-project/kuberay {version} (Apache-2.0) by trim_kuberay.py",
            "$defs": {"RayCluster": cluster, "RayJob": run, "NetworkPolicy": network, "pod": pod},
        },
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
