"""Checkpoints: safetensors plus JSON, written beside their place, flushed, renamed; read strictly, verified by
checksum.

    RUN/checkpoints/step-000000/
        <part>.safetensors     one file per named part ("model", "ema", "optimizer", ...)
        state.json             everything that is no tensor, and the SHA-256 of every part

Never pickle. A missing or unexpected key is an error that names it. A folder that fails its checksum is refused by
name and the newest whole one before it is offered; it is not taken silently, because it is older.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.atomic import atomic_folder, write_json
from engine.errors import CorruptRun, EngineError
from engine.provenance import sha256
from engine.training.distributed import like

Parts = dict[str, dict[str, Tensor]]


def folder_of(run: str | Path, step: int) -> Path:
    """RUN/checkpoints/step-000000."""
    return Path(run) / "checkpoints" / f"step-{step:06d}"


def steps(run: str | Path) -> list[int]:
    """Steps of the checkpoints in `run`, rising. Half-written ones are never named so."""
    return sorted(int(p.name.removeprefix("step-")) for p in Path(run).glob("checkpoints/step-*") if p.is_dir())


def snapshot(parts: Parts) -> Parts:
    """Copies on the CPU that later steps of the optimizer do not change."""
    return {
        name: {k: t.detach().to("cpu", copy=True).contiguous() for k, t in ts.items()} for name, ts in parts.items()
    }


def save(run: str | Path, step: int, parts: Parts, state: dict[str, Any], *, keep: int | None = None) -> Path:
    """Write a checkpoint of `parts` and the JSON-ready `state`; then remove all but the newest `keep`.

    Only one process of a job calls this. Killed at any moment it leaves the earlier checkpoints as they were.

    Raises:
        EngineError: it could not be written (a full or read-only disk); nothing half-written is left under its name.
    """
    target = folder_of(run, step)
    try:
        return _save(target, step, parts, state, keep)
    except (OSError, SafetensorError) as error:
        whole = [s for s in steps(run) if not _fault(folder_of(run, s))]
        after = f"; the same command with --resume goes on from step {whole[-1]}" if whole else ""
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise EngineError("room for a checkpoint", why, target, f"free or writable space{after}") from None


def _save(target: Path, step: int, parts: Parts, state: dict[str, Any], keep: int | None) -> Path:
    if target.exists():  # a stage that ends where it was resumed; what is there is replaced only if it is another thing
        if not _fault(target):
            stored = json.loads((target / "state.json").read_text(encoding="utf-8"))
            if stored.get("done") == state.get("done"):
                return target
            if _same(parts, target):  # only the state is new, and one file is replaced without a moment in between
                write_json(target / "state.json", {**state, "step": step, "sha256": stored["sha256"]})
                return target
        _remove(target)
    with atomic_folder(target) as partial:
        digests = {}
        for name, tensors in parts.items():
            file = partial / f"{name}.safetensors"
            save_file(_apart(tensors), file)
            digests[file.name] = sha256(file)
        write_json(partial / "state.json", {**state, "step": step, "sha256": digests})
    for leftover in target.parent.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep is not None:
        for old in steps(target.parent.parent)[:-keep]:
            _remove(folder_of(target.parent.parent, old))
    return target


def _same(parts: Parts, folder: Path) -> bool:
    """Whether a whole checkpoint holds exactly these tensors."""
    if {f"{name}.safetensors" for name in parts} != {p.name for p in folder.glob("*.safetensors")}:
        return False
    for name, tensors in parts.items():
        stored = load_file(folder / f"{name}.safetensors")
        if stored.keys() != tensors.keys() or not all(torch.equal(stored[k], t.cpu()) for k, t in tensors.items()):
            return False
    return True


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` as safetensors takes them: on the CPU, contiguous, no two of them in one memory."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return apart


def _remove(folder: Path) -> None:
    """Remove a checkpoint; killed half-way it no longer has the name of one."""
    aside = folder.with_name(f".partial-removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def load(run: str | Path, step: int | None = None) -> tuple[Parts, dict[str, Any]]:
    """Parts and state of the checkpoint at `step` (default: the newest), after checking every checksum.

    Raises:
        CorruptRun: there is no checkpoint, or this one is incomplete or changed; names the newest whole one before it.
    """
    found = steps(run)
    if not found:
        raise CorruptRun("a checkpoint", "none", Path(run) / "checkpoints", "train first")
    step = found[-1] if step is None else step
    folder = folder_of(run, step)
    fault = _fault(folder)
    if fault:
        whole = [s for s in found if s < step and not _fault(folder_of(run, s))]
        hint = f"remove it and resume from step {whole[-1]}" if whole else "train again; no earlier one is whole"
        raise CorruptRun("a whole checkpoint", fault, folder, hint)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    parts = {Path(name).stem: load_file(folder / name) for name in state["sha256"]}
    return parts, state


def _fault(folder: Path) -> str:
    """What is wrong with a checkpoint folder; empty when whole."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name, digest in state["sha256"].items():
            if sha256(folder / name) != digest:
                return f"{name} that does not match its checksum"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
        return "a state.json that cannot be read"
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    return ""


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], where: object) -> None:
    """Put `tensors` into `module`.

    Raises:
        CorruptRun: a key is missing, unexpected, or of another shape; the message names the first of each.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    reshaped = [k for k in sorted(own.keys() & tensors.keys()) if own[k].shape != tensors[k].shape]
    for word, keys in (("missing", missing), ("unexpected", unexpected), ("differently shaped", reshaped)):
        if keys:
            raise CorruptRun(f"the weights of {type(module).__name__}", f"{len(keys)} {word}, first '{keys[0]}'", where)
    module.load_state_dict(tensors, strict=True)


def optimizer_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """State of an optimizer as (named tensors "index.key", JSON-ready parameter groups)."""
    whole = optimizer.state_dict()
    tensors = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            tensors[f"{index}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    groups = [{k: list(v) if isinstance(v, tuple) else v for k, v in g.items()} for g in whole["param_groups"]]
    return tensors, groups


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """The inverse of `optimizer_parts`.

    Raises:
        CorruptRun: the number of parameters differs.
    """
    own = [len(g["params"]) for g in optimizer.state_dict()["param_groups"]]
    stored = [len(g["params"]) for g in groups]
    if own != stored:
        raise CorruptRun(f"an optimizer over {own} parameters", f"{stored}", "optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = like(value, parameters[int(index)])
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
