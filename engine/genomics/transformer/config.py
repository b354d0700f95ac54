"""Settings of a haplotype transformer: one YAML file is one whole run. `--set a.b=c` is the only other way to change one.

An unknown key is an error that suggests the nearest one. The resolved copy goes into the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import UsageError, closest
from engine.genomics.chains import ChainSpec
from engine.genomics.li_stephens import LiStephensConfig
from engine.training.settings import apply_overrides


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NetworkConfig(_Section):
    """Sizes of `model.HaplotypeTransformer`."""

    patch: int = Field(8, ge=1, description="sites per patch")
    width: int = Field(48, ge=8, description="of a patch's vector; a multiple of heads")
    depth: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    attention: int = Field(64, ge=1, description="how many patches back attention looks; fading sums reach further")
    hidden: int = Field(48, ge=4, description="width of the network at each site")
    site_width: int = Field(8, ge=1, description="learned features of each site")
    dropout: float = Field(0.1, ge=0, lt=1)
    site_dropout: float = Field(0.3, ge=0, lt=1, description="of what is learned of single sites")

    @model_validator(mode="after")
    def _divides(self) -> NetworkConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class FitConfig(_Section):
    """Training; it ends at `steps` or after `max_minutes`, whichever comes first, and the best weights on held-out people
    are kept."""

    steps: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    minutes_of: Literal["wall", "cpu"] = "wall"
    batch_size: int = Field(16, ge=1, description="haplotypes, all processes together")
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.05, ge=0, description="of matrices and of what is learned of single sites")
    ema_decay: float = Field(0.995, gt=0, lt=1)
    condition_drop: float = Field(0.5, ge=0, le=1, description="share of haplotypes whose group is hidden")
    window: int = Field(256, ge=1, description="patches that are computed at once; the state is carried on")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the people who judge and are not learned from")
    people: int | None = Field(None, ge=2, description="take part at most, drawn at random; null: all of the panel")
    judge_every_steps: int = Field(100, ge=1)
    patience: int = Field(5, ge=1, description="judgements without a better one that end the training")

    @model_validator(mode="after")
    def _bounded(self) -> FitConfig:
        if self.steps is None and self.max_minutes is None:
            raise ValueError("give steps, max_minutes or both")
        return self


class TrainingConfig(_Section):
    """How it runs, not what is learned."""

    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    checkpoint_every_steps: int | None = Field(None, ge=1)
    checkpoint_every_minutes: float | None = Field(5.0, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    log_every_steps: int = Field(20, ge=1)
    gradient_clip: float = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1, description="parts in which a process works through its share of a batch")
    bad_step_limit: int = Field(10, ge=1)
    tensorboard: bool = False


class TransformerConfig(_Section):
    """A whole run: the copying model below, its bank of chains, the network, its training."""

    model: Literal["transformer"]
    seed: int = 0
    copying: LiStephensConfig = Field(default_factory=LiStephensConfig)
    bank: list[ChainSpec] = Field(min_length=1)
    start: list[float] | None = Field(None, description="weights of the chains at the start; null: the same for all")
    network: NetworkConfig = Field(default_factory=lambda: NetworkConfig.model_validate({}))
    fit: FitConfig
    phenotypes: str | None = Field(
        None, description="table of sample id and columns of numbers that people are conditioned on"
    )
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig.model_validate({}))

    @model_validator(mode="after")
    def _fits(self) -> TransformerConfig:
        if self.start is not None and len(self.start) != len(self.bank):
            raise ValueError(f"start must have a weight for each of {len(self.bank)} chains")
        return self

    @property
    def weights(self) -> list[float]:
        """Weights of the chains at the start."""
        return [1.0 / len(self.bank)] * len(self.bank) if self.start is None else self.start


def is_transformer(path: str | Path | None) -> bool:
    """Whether a config file says `model: transformer`; False where it cannot be read, which its own loader tells."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path is not None else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and values.get("model") == "transformer"


def is_run(run_folder: str | Path) -> bool:
    """Whether a folder holds a run of this model."""
    return (Path(run_folder) / "reference").is_dir()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TransformerConfig:
    """Config from YAML with `a.b=c` overrides.

    Raises:
        UsageError: unknown key (the nearest one is named), a value outside its range, or text that is not YAML.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError("a YAML file", str(error).splitlines()[0], path) from None
    if not isinstance(values, dict):
        raise UsageError("a mapping of settings", type(values).__name__, path)
    return parse_config(apply_overrides(values, list(overrides)), path)


def parse_config(values: dict[str, Any], where: object = "config") -> TransformerConfig:
    """Checked settings; errors as for `load_config`."""
    try:
        return TransformerConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageError("a known setting", f"'{name}'", where, closest(name.split(".")[-1], _keys())) from None
        raise UsageError(f"{name}: {first['msg']}", repr(first["input"]), where) from None


def dump_config(config: TransformerConfig) -> str:
    """YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _keys() -> list[str]:
    sections = (TransformerConfig, NetworkConfig, FitConfig, TrainingConfig, LiStephensConfig, ChainSpec)
    return [name for section in sections for name in section.model_fields]
