"""YAML as every file of this package is read and written."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

_STRING_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"

# Far more than recipes and records hold, and little enough to be read, or refused, in a second or so. What aliases
# stand for counts each time.
MOST_CHARACTERS, MOST_VALUES, DEEPEST, LONGEST_NUMBER = 1 << 20, 20_000, 50, 100


def from_yaml(text: str) -> Any:
    """The value of YAML text, in which no key is given twice; for all YAML that is read.

    Raises:
        yaml.YAMLError: naming the line; also if the text is larger than :data:`MOST_CHARACTERS` and so on allow.
    """
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MOST_CHARACTERS} characters, found {len(text)}")
    try:
        return yaml.load(text, _loader())
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"a number or a date that there is not: {error}") from None


@functools.cache
def _loader() -> Any:
    import yaml

    def refuse(message: str, place: Any) -> None:
        raise yaml.composer.ComposerError(None, None, message, place.start_mark)

    class Loader(yaml.SafeLoader):
        depth = values = 0

        def count(self, depth: int, place: Any) -> None:
            self.values += 1
            if depth > DEEPEST:
                refuse(f"expected at most {DEEPEST} values within each other, found more", place)
            if self.values > MOST_VALUES:
                refuse(f"expected at most {MOST_VALUES} values, aliases written out, found more", place)

        def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
            self.depth += 1
            self.count(self.depth, self.peek_event())
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def compose_document(self) -> yaml.Node | None:
            node = super().compose_document()
            self.values = 0
            if node is not None:
                self.write_out(node, ())
            return node

        def write_out(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
            """Walk through what a node stands for as if its aliases were written out."""
            self.count(len(above) + 1, node)
            if any(node is one for one in above):
                refuse("an alias stands for what it is in", node)
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    self.write_out(key, (*above, node))
                    # A mapping that is merged into itself is the same mapping.
                    if key.tag != _MERGE_TAG or value is not node:
                        self.write_out(value, (*above, node))
            elif isinstance(node, yaml.SequenceNode):
                for value in node.value:
                    self.write_out(value, (*above, node))

        def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
            node = super().compose_scalar_node(anchor)
            if node.tag != _STRING_TAG and len(node.value) > LONGEST_NUMBER:
                refuse(f"expected text, or a number of {LONGEST_NUMBER} characters, found {len(node.value)}", node)
            return node

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            """As written, before merge keys (<<) put in those of other mappings."""
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        refuse(f"the key {key.value!r:.60} is given twice", key)
                    seen.add(key.value)
            return node

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """As YAML has it, whichever PyYAML there is: a mapping's own keys win over merged ones, of a list of
            mappings the earlier. 6.0.4 lets the later win, except for keys that happen to be the same object in memory.
            """
            to_merge = [value for key, value in node.value if key.tag == _MERGE_TAG]
            # Before the others are looked at, one of which may be this one.
            node.value = [(key, value) for key, value in node.value if key.tag != _MERGE_TAG]
            merged: list[tuple[yaml.Node, yaml.Node]] = []
            for value in to_merge:
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

    return Loader


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; see :func:`from_yaml`.

    Raises:
        yaml.YAMLError, UnicodeDecodeError, OSError: if it cannot be read.
    """
    import yaml

    if (size := path.stat().st_size) > 4 * MOST_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MOST_CHARACTERS} characters, found {size} bytes")
    return from_yaml(path.read_text(encoding="utf-8"))


def to_yaml(document: dict[str, Any]) -> str:
    """YAML in the order of the keys, without aliases."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_str(self, data: str) -> yaml.ScalarNode:
            # PyYAML writes line breaks that only Unicode has as they are, and reads the first of them as a blank.
            style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
            return self.represent_scalar(_STRING_TAG, data, style)

    Dumper.add_representer(str, Dumper.represent_str)
    return yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
