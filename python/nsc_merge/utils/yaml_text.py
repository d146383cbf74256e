"""YAML as every file of this package is read and written."""

from __future__ import annotations

from typing import Any

_MERGE_TAG = "tag:yaml.org,2002:merge"


def from_yaml(text: str) -> Any:
    """The value of YAML text, in which no key is given twice; for all YAML that is read.

    Raises:
        yaml.YAMLError: naming the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        # As written, before merge keys (<<) put in those of other mappings.
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.composer.ComposerError(
                            None, None, f"the key {key.value!r} is given twice", key.start_mark
                        )
                    seen.add(key.value)
            return node

        # As YAML has it, whichever PyYAML there is: a mapping's own keys win over merged ones, of a list of mappings
        # the earlier. 6.0.4 lets the later win, except for keys that happen to be the same object in memory.
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            written, merged = node.value, []
            # Before those of others are looked at, which may be this one.
            node.value = [(key, value) for key, value in written if key.tag != _MERGE_TAG]
            for key, value in written:
                if key.tag == _MERGE_TAG:
                    for other in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
                        if not isinstance(other, yaml.MappingNode):
                            expected = "expected keys and values, or a list of such, to merge (<<)"
                            raise yaml.constructor.ConstructorError(
                                None, None, f"{expected}, found a {other.id}", other.start_mark
                            )
                        self.flatten_mapping(other)
                        merged += other.value
            node.value = merged + node.value
            super().flatten_mapping(node)

    return yaml.load(text, Loader)


def to_yaml(document: dict[str, Any]) -> str:
    """YAML in the order of the keys."""
    import yaml

    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
