"""Sampling: synthetic volume number k is a pure function of (model, seed, k) and what it is conditioned on.

One subject is generated at a time, with the unguided half of guidance beside it, so that the arithmetic of subject k
never sees which others were asked for: on a CPU the last bits of a convolution depend on the batch size. Hence any sharding
gives the same bytes on the same kind of device.

Follow-up visits: a model trained with `flow.baseline` is given the first visit's latent and covariates, synthetic or of a
real scan (`Baseline`). A model trained without starts every visit from the subject's own noise with other covariates; what
they do not explain stays.
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
from engine.imaging import flow, labels
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import BASELINE, ImagingConfig, load_config
from engine.imaging.context import flagged, joined
from engine.imaging.dataset import (
    Covariate,
    condition,
    covariate_from_json,
    fit_codes,
    fit_volume,
    is_missing,
    unscale_intensity,
)
from engine.imaging.decoding import decoded
from engine.imaging.denoiser import Condition
from engine.imaging.field_of_view import check_field_of_view
from engine.imaging.flow import SAMPLERS, flow_times
from engine.imaging.latents import encode_within
from engine.imaging.velocity import Velocity, new_denoiser
from engine.imaging.volume import Volume
from engine.training import checkpoint

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A trained run, ready to sample: networks with averaged weights, and what they were trained on."""

    config: ImagingConfig
    autoencoder: Autoencoder
    denoiser: Velocity
    covariates: tuple[Covariate, ...]
    facts: dict[str, Any]
    step: int
    device: torch.device


@dataclass(frozen=True)
class Baseline:
    """An earlier scan of a person, real or synthetic, and the covariates at its time."""

    volume: Volume
    covariates: Given


def load_model(run: str | Path, device: str = "auto", step: int | None = None) -> Model:
    """The model of a run folder, strictly loaded: averaged weights, those of the step that the monitor of memorisation chose
    where there was one.

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
    denoiser = new_denoiser(config, covariates)
    checkpoint.load_strictly(autoencoder, parts["autoencoder"], run)
    checkpoint.load_strictly(denoiser, parts["best"] if "best" in parts else parts["ema"], run)
    return Model(
        config, autoencoder.to(where).eval(), denoiser.to(where).eval(), covariates, facts, int(state["step"]), where
    )


def sample(
    run: str | Path | Model,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    covariates: Sequence[Given | Sequence[Given]] | Given | None = None,
    label_maps: Sequence[Volume] | None = None,
    baselines: Sequence[Baseline] | None = None,
    steps: int | None = None,
    method: str | None = None,
    guidance: float | None = None,
    size: Sequence[int] | None = None,
    spacing_mm: Sequence[float] | None = None,
    force: bool = False,
    memory_gb: float | None = None,
    device: str = "auto",
) -> Iterator[tuple[int, Volume, dict[str, Any]]]:
    """Yield (index, volume, covariates) for the subjects start .. start + n - 1.

    Args:
        run: run folder, or a model from `load_model`.
        covariates: one dict for all, or one entry per subject; an entry that is a list of dicts is one subject's
            visits, which are yielded one after another with the same index. What a dict leaves out is not given to the
            model.
        label_maps: subject k gets map k modulo their number, and its volume lies where the map does.
        baselines: likewise; every visit of subject k is a follow-up of baseline k modulo their number.
        steps, method, guidance, memory_gb: override the config's `sampling`.
        size, spacing_mm: field of view; outside the trained range refused unless `force`.

    Yields:
        Volumes in RAS, float32, in HU (CT) or 0 .. 1000 arbitrary units (MR), centred where the training data was. Of a
        model of label maps the values of the labels; of a model of pairs two channels, image and label values.

    Raises:
        UsageError: a count, method, covariate name or field of view that does not fit the model, or a map or baseline for
            a model trained without.
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
    settings, config = model.config.sampling, model.config
    for wished, trained, key in (
        (label_maps, config.flow.label_map, "label_map"),
        (baselines, config.flow.baseline, "baseline"),
    ):
        if wished is not None and (not trained or not wished):
            got = "a model trained without" if wished else "none"
            raise UsageError(f"a {key} for a model trained with it", got, "sample", f"flow.{key}: true in the config")
    method = settings.method if method is None else method
    if method not in SAMPLERS:
        raise UsageError(f"a sampler among {sorted(SAMPLERS)}", f"'{method}'", "sample")
    wanted, spacing = check_field_of_view(config, model.facts, size, spacing_mm, force=force)
    walk = _Walk(
        method,
        flow_times(settings.steps if steps is None else steps, config.flow.time_shift),
        settings.guidance if guidance is None else guidance,
        wanted,
        spacing,
        settings.memory_gb if memory_gb is None else memory_gb,
    )

    def latents() -> Iterator[tuple[tuple[int, np.ndarray | None, dict[str, Any]], Tensor]]:
        for index, entry in zip(range(start, start + n), entries):
            visits = [entry] if isinstance(entry, Mapping) else list(entry)
            codes = _fitted_map(model, label_maps[index % len(label_maps)], walk) if label_maps else None
            before = _encoded(model, baselines[index % len(baselines)], walk) if baselines else None
            for visit, given in enumerate(visits):
                purpose = f"imaging.noise.visit{visit}" if visit and config.flow.baseline else "imaging.noise"
                latent = _walked(model, walk, seed, purpose, index, given, codes, before)
                if before is None and config.flow.baseline and len(visits) > 1:
                    before = _Earlier(latent, dict(given), None)
                affine = codes.affine if codes is not None else before.affine if before is not None else None
                yield (index, affine, dict(given)), _unstandardised(model, latent)

    overlap = settings.overlap == "on" or (settings.overlap == "auto" and model.device.type == "cuda")
    made = decoded(
        latents(), model.autoencoder, memory_gb=walk.memory_gb, bf16=settings.precision == "bf16", overlap=overlap
    )
    for (index, affine, given), array in made:
        yield index, _volume(model, array, spacing, affine), given


@dataclass(frozen=True)
class _Walk:
    """How to get from noise to data, the same for all subjects of a call."""

    method: str
    times: Tensor
    guidance: float
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    memory_gb: float


@dataclass(frozen=True)
class _Earlier:
    """Standardised latent of an earlier scan, the covariates at its time, and where it lies if it is a real one."""

    latent_bcdhw: Tensor
    covariates: Given
    affine: np.ndarray | None


def velocity_of(model: Model, given: Condition, guidance: float) -> flow.Velocity:
    """The model's velocity of one sample under classifier-free guidance: without + guidance * (with - without)."""
    anything = bool((given.categorical_bk >= 0).any() or (~given.continuous_bk.isnan()).any())
    both = given.with_unguided()

    def velocity(x_bcdhw: Tensor, t_b: Tensor) -> Tensor:
        if guidance == 1.0 or not anything:
            return model.denoiser(x_bcdhw, t_b, given)
        with_given, without = model.denoiser(x_bcdhw.repeat(2, 1, 1, 1, 1), t_b.repeat(2), both).chunk(2)
        return without + guidance * (with_given - without)

    return velocity


@torch.no_grad()
def _walked(
    model: Model,
    walk: _Walk,
    seed: int,
    purpose: str,
    index: int,
    given: Given,
    codes: Volume | None,
    before: _Earlier | None,
) -> Tensor:
    """The standardised latent of one visit, (1, c, d, h, w)."""
    factor = model.config.autoencoder.factor
    shape = (model.config.autoencoder.latent_channels, *(n // factor for n in walk.size))
    noise = seeding.normal(shape, seed, purpose, index, model.device)[None]
    asked = dict(given)
    if before is not None:
        asked = {**{BASELINE + k: v for k, v in before.covariates.items() if not is_missing(v)}, **asked}
    encoded = condition([asked], np.array([walk.spacing_mm]), model.covariates, f"subject {index}").to(model.device)
    drawn = earlier = None
    if codes is not None:
        one = torch.from_numpy(codes.array_cdhw.astype(np.uint8))
        drawn = labels.map_context(one, len(model.config.data.labels), factor, model.config.map_fold)
    if before is not None:
        earlier = flagged(before.latent_bcdhw, torch.ones(1, dtype=torch.bool, device=model.device))
    encoded = encoded.within(joined(model.config, drawn, earlier, noise))
    bf16 = model.config.sampling.precision == "bf16"
    with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
        return SAMPLERS[walk.method](velocity_of(model, encoded, walk.guidance), noise, walk.times)


def latent_statistics(model: Model) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel that standardise latents, (1, c, 1, 1, 1)."""
    mean, deviation = (
        torch.tensor(model.facts[name], device=model.device).view(1, -1, 1, 1, 1)
        for name in ("latent_mean_c", "latent_deviation_c")
    )
    return mean, deviation


def _unstandardised(model: Model, latent_bcdhw: Tensor) -> Tensor:
    mean, deviation = latent_statistics(model)
    return latent_bcdhw * deviation + mean


def _fitted_map(model: Model, volume: Volume, walk: _Walk) -> Volume:
    data = model.config.data.model_copy(update={"size": walk.size, "spacing_mm": walk.spacing_mm})
    return fit_codes(volume, data, "label map")


@torch.no_grad()
def _encoded(model: Model, baseline: Baseline, walk: _Walk) -> _Earlier:
    """A real scan as an earlier visit: on the grid asked for, encoded to the posterior's mean."""
    data = model.config.data.model_copy(update={"size": walk.size, "spacing_mm": walk.spacing_mm})
    fitted = fit_volume(baseline.volume, data)
    x = torch.from_numpy(fitted.array_cdhw)[None].to(model.device)
    if x.shape[1] != model.facts["channels"]:
        raise UsageError(f"a baseline of {model.facts['channels']} channels", f"{x.shape[1]}", "baseline")
    mean, deviation = latent_statistics(model)
    z = encode_within(model.autoencoder, x, walk.memory_gb)[0].to(model.device)
    return _Earlier((z - mean) / deviation, baseline.covariates, fitted.affine)


def _volume(
    model: Model, array_cdhw: np.ndarray, spacing_mm: tuple[float, float, float], affine: np.ndarray | None
) -> Volume:
    """RAS volume at `affine`, or whose field of view is centred where the training data's was."""
    if affine is None:
        affine = np.diag([*spacing_mm, 1.0])
        middle = (np.array(array_cdhw.shape[1:], dtype=float) - 1) / 2
        affine[:3, 3] = np.array(model.facts["centre_mm"]) - affine[:3, :3] @ middle
    return as_written(model.config, array_cdhw, affine)


def as_written(config: ImagingConfig, array_cdhw: np.ndarray, affine: np.ndarray) -> Volume:
    """What the networks see, as a volume: intensities in HU or 0 .. 1000, label channels as values of labels."""
    data = config.data
    units = "HU" if data.modality == "CT" and data.produce == "image" else "arbitrary"
    if data.produce == "image":
        return Volume(unscale_intensity(array_cdhw, data), affine, data.modality, units, {})
    split = len(array_cdhw) - len(data.labels)
    values = labels.values_of(labels.codes_from(array_cdhw[split:]), data.labels)[None]
    parts = [unscale_intensity(array_cdhw[:split], data), values] if split else [values]
    return Volume(np.concatenate(parts), affine, data.modality if split else None, units, {})
