"""Sampling: synthetic volume number k is a pure function of (model, seed, k) and its covariates.

One subject is generated at a time, with the unguided half of guidance beside it, so that the arithmetic of subject k
never
sees which others were asked for: on a CPU the last bits of a convolution depend on the batch size. Hence any sharding
gives the same bytes on the same kind of device.

Follow-up visits of a subject start from the same noise with other covariates. The walk from noise to data is
deterministic, so
what the covariates do not explain stays: the subject's identity. This is the first version of the longitudinal part; it
knows no interval between visits except as a declared covariate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import seeding
from engine.devices import choose
from engine.errors import CorruptRun, UsageError
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import ImagingConfig, load_config
from engine.imaging.dataset import Covariate, condition, covariate_from_json, unscale_intensity
from engine.imaging.denoiser import Condition, Denoiser
from engine.imaging.flow import SAMPLERS, flow_times
from engine.imaging.volume import Volume
from engine.training import checkpoint

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A trained run, ready to sample: networks with averaged weights, and what they were trained on."""

    config: ImagingConfig
    autoencoder: Autoencoder
    denoiser: Denoiser
    covariates: tuple[Covariate, ...]
    facts: dict[str, Any]
    step: int
    device: torch.device


def load_model(run: str | Path, device: str = "auto", step: int | None = None) -> Model:
    """The model of a run folder, strictly loaded.

    Raises:
        CorruptRun: no checkpoint, one that fails its checksum, or one from before the flow was trained.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise CorruptRun(
            "a run folder with config.yaml", "none", run, "the folder given to --out of `engine imaging train`"
        )
    config = load_config(run / "config.yaml")
    if config.privacy is not None:  # its base is a path of this machine, and configs travel with samples
        privacy = config.privacy.model_copy(update={"base": Path(config.privacy.base).name})
        config = config.model_copy(update={"privacy": privacy})
    parts, state = checkpoint.load(run, step)
    if "ema" not in parts:
        raise CorruptRun("a checkpoint of the flow stage", f"stage {state['stage']}", run, "resume the training")
    facts, where = state["model"], choose(device)
    covariates = tuple(covariate_from_json(c) for c in facts["covariates"])
    autoencoder = Autoencoder(config.autoencoder, channels=facts["channels"])
    levels = [len(c.levels) for c in covariates if c.kind == "categorical"]
    continuous = sum(c.kind == "continuous" for c in covariates)
    denoiser = Denoiser(config.flow, config.autoencoder.latent_channels, levels, continuous)
    checkpoint.load_strictly(autoencoder, parts["autoencoder"], run)
    checkpoint.load_strictly(denoiser, parts["ema"], run)
    return Model(
        config, autoencoder.to(where).eval(), denoiser.to(where).eval(), covariates, facts, int(state["step"]), where
    )


def check_field_of_view(
    model: Model, size: Sequence[int] | None, spacing_mm: Sequence[float] | None, *, force: bool = False
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Size and spacing to generate, defaults filled in; refused where the model was not trained (1 % tolerance on
    spacing).

    Raises:
        UsageError: outside the trained range and not `force`; the message states the range.
    """
    trained, factor = model.config.data.size, model.config.autoencoder.factor
    wanted = tuple(int(n) for n in size) if size is not None else trained
    spacing = tuple(float(s) for s in (spacing_mm if spacing_mm is not None else model.facts["spacing_mm"]))
    if len(wanted) != 3 or len(spacing) != 3 or min(wanted) < 1 or min(spacing) <= 0:
        raise UsageError("three positive numbers", f"size {wanted}, spacing {spacing} mm", "field of view")
    if any(n % factor for n in wanted):
        raise UsageError(f"a size in multiples of {factor}", f"{wanted}", "field of view")
    low, high = model.facts["spacing_mm_low"], model.facts["spacing_mm_high"]
    outside = any(not 0.99 * a <= s <= 1.01 * b for s, a, b in zip(spacing, low, high))
    if (wanted != trained or outside) and not force:
        seen = f"size {trained}, spacing {_range(low, high)} mm"
        raise UsageError(
            f"a field of view within what was trained ({seen})",
            f"size {wanted}, spacing {spacing} mm",
            "field of view",
            "the trained one, or --force",
        )
    return (wanted[0], wanted[1], wanted[2]), (spacing[0], spacing[1], spacing[2])


def _range(low: Sequence[float], high: Sequence[float]) -> str:
    return " x ".join(f"{a:.3g}" if abs(a - b) < 1e-6 else f"{a:.3g}-{b:.3g}" for a, b in zip(low, high))


def sample(
    run: str | Path | Model,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    covariates: Sequence[Given | Sequence[Given]] | Given | None = None,
    steps: int | None = None,
    method: str | None = None,
    guidance: float | None = None,
    size: Sequence[int] | None = None,
    spacing_mm: Sequence[float] | None = None,
    force: bool = False,
    device: str = "auto",
) -> Iterator[tuple[int, Volume, dict[str, Any]]]:
    """Yield (index, volume, covariates) for the subjects start .. start + n - 1.

    Args:
        run: run folder, or a model from `load_model`.
        covariates: one dict for all, or one entry per subject; an entry that is a list of dicts is one subject's
            visits, which share the subject's noise and are yielded one after another with the same index. What a dict
            leaves out is not given to the model.
        steps, method, guidance: override the config's `sampling`.
        size, spacing_mm: field of view; outside the trained range refused unless `force`.

    Yields:
        Volumes in RAS, float32, in HU (CT) or 0 .. 1000 arbitrary units (MR), centred where the training data was.

    Raises:
        UsageError: a count, method, covariate name or field of view that does not fit the model.
        CorruptRun: the run folder cannot be loaded.
    """
    model = run if isinstance(run, Model) else load_model(run, device)
    if n < 0 or start < 0:
        raise UsageError("n and start of at least 0", f"n {n}, start {start}", "sample")
    if covariates is None or isinstance(covariates, Mapping):
        entries: list[Given | Sequence[Given]] = [covariates or {}] * n
    else:
        entries = list(covariates)
        if len(entries) != n:
            raise UsageError(f"one entry of covariates for each of {n} subjects", f"{len(entries)}", "sample")
    settings = model.config.sampling
    method = settings.method if method is None else method
    if method not in SAMPLERS:
        raise UsageError(f"a sampler among {sorted(SAMPLERS)}", f"'{method}'", "sample")
    guidance = settings.guidance if guidance is None else guidance
    wanted, spacing = check_field_of_view(model, size, spacing_mm, force=force)
    times = flow_times(settings.steps if steps is None else steps, model.config.flow.time_shift)
    for index, entry in zip(range(start, start + n), entries):
        for given in [entry] if isinstance(entry, Mapping) else entry:
            encoded = condition([dict(given)], np.array([spacing]), model.covariates, f"subject {index}")
            array = _one(model, seed, index, encoded, wanted, times, method, guidance)
            yield index, _volume(model, array, spacing), dict(given)


@torch.no_grad()
def _one(
    model: Model,
    seed: int,
    index: int,
    given: Condition,
    size: tuple[int, int, int],
    times: Tensor,
    method: str,
    guidance: float,
) -> np.ndarray:
    """One volume in the network's range, (c, d, h, w) float32."""
    factor = model.config.autoencoder.factor
    shape = (model.config.autoencoder.latent_channels, *(n // factor for n in size))
    noise = seeding.normal(shape, seed, "imaging.noise", index, model.device)[None]
    given = given.to(model.device)
    unguided = given.unguided()
    both = Condition(
        torch.cat([given.spacing_b3, unguided.spacing_b3]),
        torch.cat([given.continuous_bk, unguided.continuous_bk]),
        torch.cat([given.categorical_bk, unguided.categorical_bk]),
    )
    anything = bool((given.categorical_bk >= 0).any() or (~given.continuous_bk.isnan()).any())
    bf16 = model.config.sampling.precision == "bf16"

    def velocity(x_bcdhw: Tensor, t_b: Tensor) -> Tensor:
        if guidance == 1.0 or not anything:
            return model.denoiser(x_bcdhw, t_b, given)
        with_given, without = model.denoiser(x_bcdhw.repeat(2, 1, 1, 1, 1), t_b.repeat(2), both).chunk(2)
        return without + guidance * (with_given - without)

    with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
        latent = SAMPLERS[method](velocity, noise, times)
        mean = torch.tensor(model.facts["latent_mean_c"], device=model.device).view(1, -1, 1, 1, 1)
        deviation = torch.tensor(model.facts["latent_deviation_c"], device=model.device).view(1, -1, 1, 1, 1)
        return model.autoencoder.decode(latent * deviation + mean)[0].float().cpu().numpy()


def _volume(model: Model, array_cdhw: np.ndarray, spacing_mm: tuple[float, float, float]) -> Volume:
    """RAS volume whose field of view is centred where the training data's was."""
    affine = np.diag([*spacing_mm, 1.0])
    middle = (np.array(array_cdhw.shape[1:], dtype=float) - 1) / 2
    affine[:3, 3] = np.array(model.facts["centre_mm"]) - affine[:3, :3] @ middle
    modality = model.config.data.modality
    units = "HU" if modality == "CT" else "arbitrary"
    return Volume(unscale_intensity(array_cdhw, model.config.data), affine, modality, units, {})
