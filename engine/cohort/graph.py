"""Who depends on whom, as a drawing: the links of a profile in layers, as `engine.release.figures.graph` takes them."""

from __future__ import annotations

from typing import Any

from engine.cohort.profile import END, GENOTYPE, NO_GENOTYPE, NO_SCAN, PREVIOUS, SCAN, Profile


def links_figure(profile: Profile, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Figure "graph": nodes with a place (column = longest way from a node without parents) and a kind, and edges.

    Args:
        left_out: links "A -> B" that a fitted model does without; drawn as broken lines.
    """
    edges = [(parent, child) for child, parents in profile.links.items() for parent in parents]
    edges += [(GENOTYPE, node) for node in profile.genetic]
    names = [*profile.columns, GENOTYPE, *profile.genetic]
    names += [
        n for n in (END, NO_GENOTYPE, NO_SCAN, SCAN) if n in profile.links or (n == SCAN and profile.parents(SCAN))
    ]
    names += [n for n in profile.links if n.startswith("missing ")]
    names += [name for name in profile.parents(SCAN) if name in (PREVIOUS, "years")]
    names = list(dict.fromkeys(names))
    depth = dict.fromkeys(names, 0)
    for _ in names:  # longest paths
        for source, target in edges:
            if source in depth and target in depth:
                depth[target] = max(depth[target], min(depth[source] + 1, len(names)))
    rows: dict[int, int] = {}
    nodes = []
    for name in names:
        column = depth[name]
        kind = "genotype" if name in (GENOTYPE, *profile.genetic) else "scan" if name in (SCAN, PREVIOUS) else "column"
        kind = "absence" if name.startswith("missing ") or name in (NO_GENOTYPE, NO_SCAN, END) else kind
        nodes.append({"name": name, "x": column, "y": rows.setdefault(column, 0), "kind": kind})
        rows[column] += 1
    known = {node["name"] for node in nodes}
    return {
        "kind": "graph",
        "nodes": nodes,
        "edges": [[a, b, f"{a} -> {b}" in left_out] for a, b in edges if a in known and b in known],
        "title": "Who depends on whom",
        "caption": "An arrow is a link that the model has; a broken one was declared and left out when it was fitted.",
    }


def left_out(notes: tuple[str, ...]) -> tuple[str, ...]:
    """Links that the notes of a fitted model say are left out."""
    return tuple(note.partition(" is left out")[0] for note in notes if " -> " in note and " is left out" in note)
