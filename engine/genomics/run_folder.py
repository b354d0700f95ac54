"""A fitted copying model as a run folder: config.yaml, provenance.json, log.jsonl, checkpoints/step-000000/.

The checkpoint is safetensors for arrays and JSON for the rest, with the hash of each in checksums.json. Loading is
strict.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from engine import atomic, provenance
from engine.errors import CorruptRun, EngineError

if TYPE_CHECKING:
    from engine.genomics.genealogy import Genealogy
    from engine.genomics.li_stephens import LiStephens, LiStephensConfig
    from engine.genomics.mixture import Mixture

SCHEMA = "engine.li_stephens/1"
_CHECKPOINT = Path("checkpoints") / "step-000000"
_TENSORS = {
    "bits_lw": np.uint64, "position_bp": np.int64, "alt_index": np.int16, "distance_l": np.float64,
    "mismatch_l": np.float64, "group_of_haplotype_k": np.int32, "first_haplotype": np.int64, "contig": np.uint8,
    "id": np.uint8, "ref": np.uint8, "alt": np.uint8, "sample_ids": np.uint8,
}  # fmt: skip
_OPTIONAL = {"learned_l": np.float64, "position_cm": np.float64, "sample_group": np.uint8, "sample_sex": np.uint8}
_MIXTURE = {f"mix.{name}": np.float32 for name in ("hardness_l", "mean", "scale", "w0", "b0", "w1", "b1", "w2", "b2")}
_SETTINGS = ("schema", "contig_length", "assembly", "group_names", "warnings")


def save(model: LiStephens, run_folder: str | Path, *, inputs: Sequence[str | Path] = ()) -> None:
    """Write `model`, whole or not at all; `run_folder` must not exist."""
    tensors = {
        "bits_lw": model.bits_lw, "position_bp": model.sites.position_bp, "alt_index": model.sites.alt_index,
        "distance_l": model.distance_l, "mismatch_l": model.mismatch_l,
        "group_of_haplotype_k": model.group_of_haplotype_k, "first_haplotype": model.samples.first_haplotype,
        "contig": _text(model.sites.contig), "id": _text(model.sites.id), "ref": _text(model.sites.ref),
        "alt": _text(model.sites.alt), "sample_ids": _text(model.samples.ids),
    }  # fmt: skip
    if model.sites.position_cm is not None:
        tensors["position_cm"] = model.sites.position_cm
    if model.learned_l is not None:
        tensors["learned_l"] = model.learned_l
    if model.mixture is not None:
        tensors["mix.hardness_l"] = model.mixture.hardness_l
        tensors |= {f"mix.{name}": values for name, values in model.mixture.weights.items()}
        for e, trees in enumerate(model.mixture.trees):
            tensors |= {f"trees{e}.{name}": values for name, values in trees._asdict().items()}
    if model.samples.group is not None:
        tensors["sample_group"] = _text(model.samples.group)
    if model.samples.sex is not None:
        tensors["sample_sex"] = _text(model.samples.sex)
    settings: dict[str, Any] = {
        "schema": SCHEMA, "contig_length": model.contig_length, "assembly": model.assembly,
        "group_names": model.group_names, "warnings": model.warnings,
    }  # fmt: skip
    if model.config.sampler == "interchange":
        settings["genealogy"] = model.genealogy.to_json()
    if model.mixture is not None:
        settings["mixture"] = model.mixture.figures()
    config = model.config.model_dump()
    with atomic.atomic_folder(run_folder) as folder:
        checkpoint = folder / _CHECKPOINT
        checkpoint.mkdir(parents=True)
        dtypes = {**_TENSORS, **_OPTIONAL, **_MIXTURE, **_trees(_cluster_sets(model.config, model.n_sites))}
        save_file(
            {name: np.ascontiguousarray(values, dtype=dtypes[name]) for name, values in tensors.items()},
            checkpoint / "model.safetensors",
        )
        atomic.write_json(checkpoint / "model.json", settings)
        atomic.write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        names = ["model.safetensors", "model.json"]
        atomic.write_json(checkpoint / "checksums.json", {name: provenance.sha256(checkpoint / name) for name in names})
        figures = {"haplotypes": model.k, "sites": model.n_sites, "groups": _group_sizes(model)}
        atomic.write_text(folder / "log.jsonl", json.dumps({"event": "fit", **figures}) + "\n")
        provenance.write(
            folder, "genomics fit", config=config, inputs=inputs, seed=None,
            extra={"model": "li_stephens", **figures, "warnings": model.warnings},
        )  # fmt: skip


def load(run_folder: str | Path) -> LiStephens:
    """Read what `save` wrote; CorruptRun where anything is absent, altered, missing or unexpected."""
    from engine.genomics.li_stephens import LiStephens, load_config
    from engine.genomics.panel import Samples, Sites

    run_folder = Path(run_folder)
    checkpoint = run_folder / _CHECKPOINT
    checksums = _read_json(checkpoint / "checksums.json")
    for name in ("model.safetensors", "model.json"):
        path = checkpoint / name
        if not path.is_file() or checksums.get(name) != provenance.sha256(path):
            got = "another" if path.is_file() else "no such file"
            raise CorruptRun("the checksum recorded when it was written", got, path, "fitting again")
    settings = _read_json(checkpoint / "model.json")
    _check_keys(set(settings), set(_SETTINGS), {"genealogy", "mixture"}, checkpoint / "model.json")
    if settings["schema"] != SCHEMA:
        raise CorruptRun(SCHEMA, str(settings["schema"]), checkpoint / "model.json", "the engine version that wrote it")
    try:
        tensors = load_file(checkpoint / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise CorruptRun("a safetensors file", str(error), checkpoint / "model.safetensors") from None
    if not (run_folder / "config.yaml").is_file():
        raise CorruptRun("config.yaml", "no such file", run_folder)
    try:
        config = load_config(run_folder / "config.yaml")
    except EngineError as error:
        raise CorruptRun("the config that was written", str(error), run_folder / "config.yaml") from None
    needed = set(_TENSORS)
    if "mixture" in settings and "distance_l" in tensors:
        needed |= set(_MIXTURE) | set(_trees(_cluster_sets(config, len(tensors["distance_l"]))))
    _check_keys(set(tensors), needed, set(_OPTIONAL), checkpoint / "model.safetensors")
    group, sex = tensors.get("sample_group"), tensors.get("sample_sex")
    sites = Sites(
        np.array(_lines(tensors["contig"]), dtype=str), tensors["position_bp"], _objects(tensors["id"]),
        _objects(tensors["ref"]), _objects(tensors["alt"]), tensors["alt_index"], tensors.get("position_cm"),
    )  # fmt: skip
    samples = Samples(
        _lines(tensors["sample_ids"]),
        None if group is None else np.array(_lines(group), dtype=str),
        None if sex is None else np.array(_lines(sex), dtype=str),
        tensors["first_haplotype"],
    )
    if (config.mix is not None) != ("mixture" in settings):
        raise CorruptRun("a mixture where the config has one", "the other way round", checkpoint / "model.json")
    return LiStephens(
        config, tensors["bits_lw"], sites, samples, settings["contig_length"], settings["assembly"],
        tensors["distance_l"], tensors["mismatch_l"], settings["group_names"], tensors["group_of_haplotype_k"],
        settings["warnings"], _genealogy(settings.get("genealogy"), checkpoint / "model.json"), tensors.get("learned_l"),
        _mixture(settings.get("mixture"), config, tensors, checkpoint / "model.json"),
    )  # fmt: skip


def _genealogy(values: Any, path: Path) -> Genealogy | None:
    from engine.genomics.genealogy import Genealogy

    try:
        return None if values is None else Genealogy(**values)
    except TypeError as error:
        raise CorruptRun("what the panel shows of its past", str(error), path) from None


def _mixture(figures: Any, config: LiStephensConfig, tensors: dict[str, np.ndarray], path: Path) -> Mixture | None:
    if figures is None or config.mix is None:
        return None
    from engine.genomics.clusters import Trees
    from engine.genomics.mixture import Mixture

    weights = {name.removeprefix("mix."): tensors[name] for name in _MIXTURE}
    trees = [
        Trees(*(tensors[f"trees{e}.{name}"] for name in Trees._fields))
        for e in range(_cluster_sets(config, len(tensors["distance_l"])))
    ]
    try:
        return Mixture(
            config.bank, config.mix.inputs, weights, weights.pop("hardness_l"), trees=tuple(trees), **figures
        )
    except TypeError as error:
        raise CorruptRun("figures of a mixture", str(error), path) from None


def _cluster_sets(config: LiStephensConfig, sites: int) -> int:
    """How many sets of clusters a model of this config over so many sites has."""
    return 0 if config.mix is None or sites > config.mix.cluster_sites else len(config.mix.clusters)


def _trees(sets: int) -> dict[str, Any]:
    """Names and dtypes of their tables."""
    own = {"parent_l": np.int64, "alt_sla": np.float32, "share_s": np.float32}
    return {f"trees{e}.{name}": dtype for e in range(sets) for name, dtype in own.items()}


def checksum(run_folder: str | Path) -> str:
    """SHA-256 of the model's arrays, which names the model in what it makes."""
    return str(_read_json(Path(run_folder) / _CHECKPOINT / "checksums.json").get("model.safetensors"))


def _group_sizes(model: LiStephens) -> dict[str, int]:
    counts = np.bincount(model.group_of_haplotype_k, minlength=len(model.group_names))
    return dict(zip(model.group_names, counts.tolist(), strict=True))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        got = "no such file" if isinstance(error, OSError) else "other content"
        raise CorruptRun("a run folder's JSON file", got, path, "the folder that `engine genomics fit` wrote") from None
    if not isinstance(value, dict):
        raise CorruptRun("a JSON object", type(value).__name__, path)
    return value


def _check_keys(found: set[str], needed: set[str], optional: set[str], path: Path) -> None:
    missing, unexpected = sorted(needed - found), sorted(found - needed - optional)
    if missing or unexpected:
        raise CorruptRun(
            "exactly the keys of this model", f"missing {missing or 'none'}, unexpected {unexpected or 'none'}", path
        )


def _text(values: Any) -> np.ndarray:
    """Strings as UTF-8 bytes, one per line; none of them can hold a newline, because they come from lines."""
    return np.frombuffer("\n".join(str(value) for value in values).encode(), dtype=np.uint8)


def _lines(encoded: np.ndarray) -> list[str]:
    return encoded.tobytes().decode().split("\n")


def _objects(encoded: np.ndarray) -> np.ndarray:
    lines = _lines(encoded)
    made = np.empty(len(lines), dtype=object)
    made[:] = lines
    return made
