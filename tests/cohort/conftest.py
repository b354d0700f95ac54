"""One small embedded cohort, made once for all tests of this folder."""

from __future__ import annotations

import pytest

from engine.cohort.config import EmbeddedConfig, GenotypeConfig, PeopleConfig
from engine.cohort.embedded import Cohort, make_cohort


@pytest.fixture(scope="session")
def small_config() -> EmbeddedConfig:
    return EmbeddedConfig(
        people=48,
        seed=3,
        genotypes=GenotypeConfig(windows=1, window_bp=200_000),
        recruitment=PeopleConfig(second_visit=0.5, second_visit_ad=0.5, holdout=0.25),
    )


@pytest.fixture(scope="session")
def small(small_config: EmbeddedConfig) -> Cohort:
    return make_cohort(small_config)
