"""Config of the learned metrics: one YAML file, every key with a default; `--set a.b=c` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import InputError, closest
from engine.training.settings import apply_overrides


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LearningConfig(_Section):
    """How long one network learns; the batch is drawn anew in every step."""

    steps: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    crop: int = Field(96, ge=8, description="largest crop per axis; longer axes are cut at random places")


class WeightsConfig(_Section):
    """Weights that the user brings; the file is read only where its SHA-256 is the one given."""

    kind: Literal["medicalnet", "radimagenet"]
    path: Path = Field(description=".safetensors, or a PyTorch file that holds nothing but tensors")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    depth: Literal[10, 18, 34, 50] = Field(10, description="medicalnet: layers of the ResNet; radimagenet has 50")


class ExtractorConfig(_Section):
    """Encoders that learn without labels, in 3D and on slices of three planes, and weights of others beside them."""

    volumes: LearningConfig = LearningConfig()
    slices: LearningConfig = LearningConfig(batch_size=32)
    components: int = Field(16, ge=2, description="principal components of the features that distances see")
    weights: list[WeightsConfig] = Field(default_factory=list)


class SegmenterConfig(LearningConfig):
    """The 3D U-Net (MONAI) that learns label maps."""

    steps: int = Field(300, ge=1)
    batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    widths: tuple[int, ...] = Field((16, 32, 64), min_length=2)


class UtilityConfig(_Section):
    """Train on synthetic, test on real."""

    repeats: int = Field(2, ge=1, description="trainings of each side, from different weights")
    classes: list[str] = Field(default_factory=list, description="categorical covariates that a network learns to tell")
    classifier: LearningConfig = LearningConfig(steps=300, batch_size=16)
    goal: float = Field(0.95, gt=0, description="share of the figure reached by training on real scans")


class QualityConfig(_Section):
    """Everything that `engine imaging evaluate --train` learns."""

    extractor: ExtractorConfig = ExtractorConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    utility: UtilityConfig = UtilityConfig()
    covariates: list[str] | None = Field(None, description="null: every column that both tables share")
    neighbours: int = Field(5, ge=1, description="that give the radius in precision, recall, density and coverage")
    halves: int = Field(20, ge=1, description="splits of unseen real people behind every floor")
    frechet_goal: float = Field(2.0, gt=0, description="times the floor")
    region_goal: float = Field(1.5, gt=0, description="times the floor")

    @model_validator(mode="after")
    def _no_twins(self) -> QualityConfig:
        kinds = [w.kind for w in self.extractor.weights]
        if len(kinds) != len(set(kinds)):
            raise ValueError("extractor.weights: one entry of a kind")
        return self


def load_quality_config(path: str | Path | None, overrides: Sequence[str] = ()) -> QualityConfig:
    """The config at `path` (None: the defaults) with `overrides`; paths of weights are relative to the file.

    Raises:
        InputError: no YAML mapping, an unknown key (suggests the nearest), or a value that does not fit.
    """
    values: Any = {}
    where = "the defaults" if path is None else str(path)
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise InputError("a config file", "nothing there", path) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError("a YAML file", " ".join(str(error).split())[:200], path) from None
        if not isinstance(values, dict):
            raise InputError("a YAML mapping", type(values).__name__, path)
    try:
        config = QualityConfig.model_validate(apply_overrides(values, list(overrides)))
    except ValidationError as error:
        fault = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in fault["loc"]) or "config"
        if fault["type"] == "extra_forbidden":
            raise InputError("a known config key", f"'{key}'", where, closest(str(fault["loc"][-1]), _keys())) from None
        raise InputError(f"{key}: {fault['msg']}", where=where) from None
    beside = Path() if path is None else Path(path).parent
    weights = [w.model_copy(update={"path": beside / w.path}) for w in config.extractor.weights]
    return config.model_copy(update={"extractor": config.extractor.model_copy(update={"weights": weights})})


def _keys() -> list[str]:
    sections = (QualityConfig, ExtractorConfig, SegmenterConfig, UtilityConfig, WeightsConfig, LearningConfig)
    return sorted({name for section in sections for name in section.model_fields})
