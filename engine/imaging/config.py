"""Configs of imaging runs: one YAML file is one whole run, checked before anything else happens.

An unknown key is an error that suggests the nearest one. `--set a.b=c` (`overrides`) is the only other way to change
a value. The resolved copy goes into the run folder, so that the folder alone can be resumed, sampled and explained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import InputError, closest
from engine.training.settings import apply_overrides

BASELINE = "baseline_"  # before the name of a covariate: its value at the earlier visit


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class CovariateConfig(_Section):
    """One covariate the model is conditioned on; any row may leave it empty."""

    kind: Literal["categorical", "continuous"]
    levels: list[str] | None = Field(
        None, description="categorical: allowed values; default: those of the training side"
    )
    drop: float | None = Field(
        None, ge=0, le=1, description="probability of training without it; default: flow.condition_drop"
    )


class GridConfig(_Section):
    """A further field of view on which the same scans are trained."""

    size: tuple[int, int, int] = Field(description="voxels per axis after reorientation to RAS")
    spacing_mm: tuple[float, float, float]


class DataConfig(_Section):
    """Which grid the volumes are brought to, how intensities are scaled, and how people are split."""

    size: tuple[int, int, int] = Field(description="voxels per axis after reorientation to RAS")
    spacing_mm: tuple[float, float, float] | None = Field(
        None, description="resample to this; null keeps the file's own"
    )
    further_grids: list[GridConfig] = Field(
        default_factory=list, description="further sizes and spacings, each trained in its share of the steps"
    )
    produce: Literal["image", "mask", "pair"] = Field(
        "image", description="what a sample is: a scan, a label map, or both as one (column label)"
    )
    labels: list[int] = Field(
        default_factory=list, description="values of the label maps that count; others are background"
    )
    modality: Literal["MR", "CT"] = "MR"
    mr_percentile: float = Field(99.5, gt=50, le=100, description="MR: this percentile becomes the top of the range")
    hu_range: tuple[float, float] = Field((-1000.0, 2000.0), description="CT: HU are clipped to this range")
    covariates: dict[str, CovariateConfig] = Field(default_factory=dict)
    holdout_share: float = Field(
        0.2, ge=0, lt=1, description="share of people kept out of training, by hash of the subject"
    )
    bids_suffix: str | None = Field(
        None, description="which images of a BIDS dataset, e.g. T1w; null: the only kind there is"
    )
    split_column: str | None = Field(None, description="column holding train / holdout; replaces the hash")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if min(self.size) < 4:
            raise ValueError(f"size must be at least 4 voxels on every axis, got {self.size}")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if self.hu_range[0] >= self.hu_range[1]:
            raise ValueError(f"hu_range must rise, got {self.hu_range}")
        if self.produce != "image" and not self.labels:
            raise ValueError(f"produce: {self.produce} needs labels, the values of the label maps that count")
        if (
            sorted(set(self.labels)) != self.labels
            or min(self.labels, default=1) < 1
            or max(self.labels, default=1) > 255
        ):
            raise ValueError(f"labels must rise between 1 and 255, got {self.labels}")
        if any(name.startswith(BASELINE) for name in self.covariates):
            raise ValueError(f"covariates may not be named {BASELINE}..., which means those of an earlier visit")
        return self

    @property
    def grids(self) -> list[DataConfig]:
        """This config, and for every further grid one that differs in size and spacing."""
        more = [{"size": g.size, "spacing_mm": g.spacing_mm, "further_grids": []} for g in self.further_grids]
        return [self, *(self.model_copy(update=changes) for changes in more)]

    @property
    def image_channels(self) -> bool:
        """Whether the channels that are learned begin with an image."""
        return self.produce != "mask"


class Budget(_Section):
    """A stage ends at `steps` or after `max_minutes` of measured time, whichever comes first; the log says which."""

    steps: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    minutes_of: Literal["wall", "cpu"] = Field(
        "wall", description="cpu: seconds that processors worked for the process; no measure of a GPU's work"
    )
    batch_size: int = Field(4, ge=1, description="global batch, all processes together")
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _bounded(self) -> Budget:
        if self.steps is None and self.max_minutes is None:
            raise ValueError("give steps, max_minutes or both")
        return self


class AutoencoderConfig(Budget):
    """Networks and losses of the first stage."""

    patch: Literal[1, 2, 4] = Field(2, description="space-to-depth factor of the stem")
    widths: list[int] = Field(
        [48, 96], min_length=1, description="channels per level; each level after the first halves"
    )
    blocks: int = Field(1, ge=1)
    output_width: int = Field(4, ge=1, description="channels of the one convolution at full resolution")
    latent_channels: int = Field(8, ge=1)
    kl_weight: float = Field(1e-3, ge=0, description="times the KL divergence as a mean per element")
    gradient_weight: float = Field(1.0, ge=0)
    label_weight: float = Field(
        0.25, gt=0, description="of the labels' own loss (cross-entropy and Dice) beside the image's"
    )
    coarser_scales: int = Field(1, ge=0, le=3)
    shift_voxels: int = Field(2, ge=0, description="augmentation: random whole-voxel shifts of at most this")
    turn_degrees: float = Field(
        0.0, ge=0, le=45, description="augmentation: random turns of at most this about each axis; costs interpolation"
    )
    bend_mm: float = Field(
        0.0,
        ge=0,
        description="augmentation: smooth random bends that keep volumes, root mean square; costs interpolation",
    )
    adversarial_weight: float = Field(0.0, ge=0, description="0 = no discriminator")
    adversarial_start: float = Field(0.5, ge=0, le=1, description="share of the stage after which it joins")
    feature_weight: float = Field(
        0.0,
        ge=0,
        description="of the L1 between what the discriminator, if any, sees in a scan and in its reconstruction",
    )
    discriminator_width: int = Field(16, ge=4)
    crop_size: tuple[int, int, int] | None = Field(
        None, description="train on random crops of this size; null: whole volumes"
    )

    @model_validator(mode="after")
    def _whole_or_crops(self) -> AutoencoderConfig:
        if self.crop_size is not None and (self.turn_degrees or self.bend_mm):
            raise ValueError("turn_degrees and bend_mm move whole volumes: leave them out where crop_size is given")
        return self

    @property
    def factor(self) -> int:
        """Voxels per latent position on each axis."""
        return self.patch * 2 ** (len(self.widths) - 1)


class FlowConfig(Budget):
    """Network and training of the second stage."""

    network: Literal["unet", "dit"] = "unet"
    patch: int = Field(2, ge=1, description="dit: latent positions per token and axis")
    depth: int = Field(8, ge=1, description="dit: blocks; its width is widths[0], heads of 32 or 64 channels")
    widths: list[int] = Field([64, 128, 192], min_length=1)
    blocks: int = Field(1, ge=1)
    attention_levels: list[int] = Field(default_factory=lambda: [1, 2])
    attention: Literal["auto", "sdpa", "xformers"] = Field(
        "auto",
        description="auto: xformers on a GPU where it is installed, else PyTorch's; a named one is never replaced",
    )
    embedding_width: int = Field(256, ge=8)
    dropout: float = Field(0.0, ge=0, lt=1)
    ema_decay: float = Field(0.999, gt=0, lt=1)
    condition_drop: float = Field(0.15, ge=0, le=1, description="each covariate is dropped with this probability")
    condition_noise: float = Field(
        0.1,
        ge=0,
        description="blurs continuous covariates in training, in standard deviations: an exact age names a person",
    )
    time_shift: float = Field(1.0, gt=0, description="> 1 spends more of training and sampling near noise")
    label_map: bool = Field(False, description="conditioned on the label map (column label, data.labels)")
    baseline: bool = Field(
        False, description="conditioned on another scan of the same person and on the covariates at its time"
    )
    linear_mean: bool = Field(
        False, description="a regression of the latents on the covariates is taken out of what the network has to learn"
    )
    components: int = Field(
        0, ge=0, description="linear_mean: so many principal components of what it leaves begin with their own variance"
    )
    views: int = Field(4, ge=1, description="latents per training volume: the volume itself and moved copies")
    shift_voxels: int = Field(1, ge=0, description="the copies are shifted by at most this")
    turn_degrees: float = Field(0.0, ge=0, le=45, description="and turned by at most this about each axis")
    bend_mm: float = Field(0.0, ge=0, description="and bent smoothly, volumes kept, by this root mean square")


class SamplingConfig(_Section):
    """Defaults of `sample`."""

    steps: int = Field(20, ge=1)
    method: Literal["euler", "heun"] = "heun"
    guidance: float = Field(1.0, ge=0, description="1 = conditional model as it is, 0 = covariates ignored")
    precision: Literal["fp32", "bf16"] = "fp32"
    memory_gb: float = Field(
        4.0, gt=0, description="a volume whose decoding needs more is decoded in a stream of planes within this"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto", description="decode one volume while the next is sampled; auto: on a GPU"
    )


class MonitorConfig(_Section):
    """Memorisation watched while the flow trains: copies among samples, and the loss on the holdout."""

    every_steps: int = Field(ge=1, description="of the flow stage")
    samples: int = Field(40, ge=8, description="volumes drawn each time")
    steps: int = Field(10, ge=1, description="of the sampler")
    level: float = Field(0.05, gt=0, lt=0.5, description="share of unseen real scans that would be called copies")
    patience: int = Field(2, ge=1, description="judgements in a row with certain copying that end the stage")


class TrainingConfig(_Section):
    """What both stages share."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware multiplies it"
    )
    checkpoint_every_steps: int | None = Field(None, ge=1)
    checkpoint_every_minutes: float | None = Field(10.0, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    log_every_steps: int = Field(50, ge=1)
    tensorboard: bool = Field(False, description="also write RUN/tensorboard; needs engine[tensorboard]")
    gradient_clip: float = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1, description="parts in which a process works through its share of a batch")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several processes: each holds the denoiser, or a part of it (fsdp)"
    )
    bad_step_limit: int = Field(
        10, ge=1, description="steps with a non-finite loss or gradient are skipped, at most so many"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations inside blocks: less memory, about a third more time"
    )


class PrivacyConfig(_Section):
    """Differentially private fine-tuning of a base run on people who must be protected; see docs/privacy.md.

    With this section `train` makes no model of its own: it takes the base's, and the sections data, autoencoder and flow
    must be the base's.
    """

    base: str = Field(description="run folder that was trained on public data only")
    part: Literal["adapters", "condition"] = Field(
        "adapters", description="what learns: low-rank additions to the linear layers, or the covariate embedding"
    )
    rank: int = Field(4, ge=1, description="of the adapters")
    epsilon: float | None = Field(None, ge=0.1, description="budget; the noise that meets it is computed")
    noise_multiplier: float | None = Field(None, gt=0, description="in place of epsilon: deviation over clipping_norm")
    delta: float = Field(1e-5, gt=0, lt=1, description="must be below 1 / people")
    clipping_norm: float = Field(1.0, gt=0, description="largest length of one person's gradient")
    people_per_step: int = Field(16, ge=1, description="expected number; each person joins a step by a draw of its own")
    steps: int = Field(ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    draws: int = Field(4, ge=1, description="times and noises per person and step, averaged before clipping")
    unit: Literal["person", "scan"] = Field("person", description="whose presence is hidden; scan: one scan per person")
    sampling: Literal["poisson", "shuffle"] = Field("poisson", description="shuffle is refused: see docs/privacy.md")

    @model_validator(mode="after")
    def _one_budget(self) -> PrivacyConfig:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give either epsilon or noise_multiplier")
        return self


class ImagingConfig(_Section):
    """A whole imaging run: data, autoencoder, flow, sampling."""

    name: str = "imaging"
    seed: int = 0
    data: DataConfig
    autoencoder: AutoencoderConfig
    flow: FlowConfig
    sampling: SamplingConfig = Field(default_factory=lambda: SamplingConfig.model_validate({}))
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))
    monitor: MonitorConfig | None = None
    privacy: PrivacyConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> ImagingConfig:
        factor = self.autoencoder.factor
        crop = self.autoencoder.crop_size
        named = [("data.size", self.data.size), *(("further_grids.size", g.size) for g in self.data.further_grids)]
        for name, size in [*named, *([("autoencoder.crop_size", crop)] if crop else [])]:
            if any(n % factor for n in size):
                nearest = tuple(max(1, round(n / factor)) * factor for n in size)
                raise ValueError(f"{name} {size} must be multiples of {factor}, e.g. {nearest}")
        if self.data.further_grids and self.data.spacing_mm is None:
            raise ValueError("further_grids need data.spacing_mm, so that every grid is stated")
        if crop and any(c > n for _, size in named for c, n in zip(crop, size)):
            raise ValueError(f"autoencoder.crop_size {crop} must fit into every grid")
        if self.flow.label_map and (not self.data.labels or self.data.produce != "image"):
            raise ValueError("flow.label_map needs data.labels, and data.produce image: the map is given, not made")
        if self.monitor is not None and self.training.parallel == "fsdp":
            raise ValueError("monitor needs whole weights on the main process: training.parallel ddp")
        if self.flow.linear_mean and self.data.further_grids:
            raise ValueError("flow.linear_mean is made for one grid and does not go with data.further_grids")
        flow = self.flow
        if flow.components and not flow.linear_mean:
            raise ValueError("flow.components are those of what flow.linear_mean leaves: set it too")
        if self.privacy is not None and (
            flow.label_map or flow.baseline or flow.linear_mean or self.data.further_grids
        ):
            raise ValueError(
                "privacy goes with neither flow.label_map, flow.baseline, flow.linear_mean nor data.further_grids"
            )
        if any(not 0 <= level < len(self.flow.widths) for level in self.flow.attention_levels):
            raise ValueError(f"flow.attention_levels {self.flow.attention_levels} must name levels of flow.widths")
        return self

    @property
    def label_channels(self) -> int:
        """Channels of labels that the autoencoder makes, the last ones."""
        return len(self.data.labels) if self.data.produce != "image" else 0

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent positions per axis."""
        d, h, w = (n // self.autoencoder.factor for n in self.data.size)
        return d, h, w

    @property
    def map_channels(self) -> int:
        """Channels of a label map on the latent grid, the flag "given" included; 0 where it is no condition."""
        return self.map_fold**3 * len(self.data.labels) + 1 if self.flow.label_map else 0

    @property
    def map_fold(self) -> int:
        """Shares of labels are given per half a latent position, where one has so many voxels."""
        return 2 if self.autoencoder.factor % 2 == 0 else 1

    @property
    def baseline_channels(self) -> int:
        """Channels of an earlier scan's latent, the flag "given" included; 0 where it is no condition."""
        return self.autoencoder.latent_channels + 1 if self.flow.baseline else 0


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Keys allowed at `location` of an ImagingConfig (the last part is the unknown key itself)."""
    model: Any = ImagingConfig
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return list(CovariateConfig.model_fields)
        model = field.annotation
        if get_args(model):  # an optional section
            model = next((a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)), model)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            model = CovariateConfig
    return list(model.model_fields)


def parse_config(values: dict[str, Any], where: object = "config") -> ImagingConfig:
    """Validate plain values; the first fault becomes one line naming the key.

    Raises:
        InputError: a key is unknown (with the nearest known one), missing, or its value does not fit.
    """
    try:
        return ImagingConfig.model_validate(values)
    except ValidationError as error:
        # an unknown key first: beside a missing one it is usually its misspelling
        fault = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        location = tuple(fault["loc"])
        key = ".".join(str(part) for part in location) or "config"
        if fault["type"] == "extra_forbidden":
            near = closest(str(location[-1]), _known_keys(location))
            raise InputError("a known config key", f"'{key}'", where, near) from None
        raise InputError(f"{key}: {fault['msg']}", where=where) from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ImagingConfig:
    """Read a YAML config and apply `overrides`.

    Raises:
        InputError: the file is absent, is no YAML mapping, or does not fit the schema.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("a config file", "nothing there", path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("a YAML file", " ".join(str(error).split())[:200], path) from None
    if not isinstance(values, dict):
        raise InputError("a YAML mapping", type(values).__name__, path)
    return parse_config(apply_overrides(values, overrides), path)


def dump_config(config: ImagingConfig) -> str:
    """The resolved config as YAML; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
