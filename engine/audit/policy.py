"""`AuditPolicy`: the numbers an audit decides with, each with its default and its reason. A config may override them;
the policy used is written into audit.json, so that a verdict can be read without this file.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AuditPolicy(BaseModel):
    """Thresholds of the audit. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: tuple[float, ...] = Field(
        (0.05, 0.01, 0.001), description="False-positive rates at which the flagged share is reported, where n allows."
    )
    alpha: float = Field(
        0.005, gt=0, lt=0.2, description="Error allowed to each gate; an honest generator fails with a few times this."
    )
    tolerated_excess: float = Field(
        0.0, ge=0, lt=1, description="Share flagged above the nominal rate that is let through even when certain."
    )
    fdr: float = Field(0.05, gt=0, lt=1, description="False-discovery rate (Benjamini-Hochberg) for single samples.")
    neighbours: int = Field(20, ge=2, description="Neighbours that give the local scale of the distance ratio.")
    null: Literal["auto", "holdout", "both"] = Field(
        "auto",
        description="Rows that give the null: the holdout, or training rows too, each against the rest. 'auto' takes "
        "the holdout where it has at least `null_people` people.",
    )
    null_people: int = Field(999, ge=19, description="People in the null below which 'auto' uses both sides.")
    duplicate_relative: float = Field(
        1e-3, ge=0, description="Features nearer than this times real people's median nearest distance are a copy."
    )
    nearer_train_tolerance: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="How far above one half the share nearer to training than to holdout may lie, at equal pools.",
    )
    subsets: int = Field(8, ge=1, description="Random training subsets of holdout size in that comparison.")
    aats_train_min: float = Field(
        0.35, ge=0, le=0.5, description="AATS against training below which the set copies; 0.5 is ideal."
    )
    privacy_loss_max: float = Field(
        0.05, ge=0, le=1, description="Largest AATS(holdout) - AATS(train); positive means nearer to training."
    )
    aats_rows: int = Field(2000, ge=20, description="Rows per side in the adversarial accuracy, drawn at random.")
    membership_auc_max: float = Field(
        0.55, ge=0.5, le=1, description="Largest area under the ROC of a membership attack; 0.5 is guessing."
    )
    membership_tpr_excess: float = Field(
        0.02, ge=0, lt=1, description="True-positive rate of a membership attack above its false-positive rate."
    )
    membership_people: int = Field(2000, ge=20, description="People of each side who are attacked, drawn at random.")
    gate_copying_model: bool = Field(
        False, description="Genotypes: gate the attack by a copying model of the released people too, on all sets."
    )
    prdc_neighbours: int = Field(5, ge=1, description="Neighbours that give the radius in precision and coverage.")
    cells: int = Field(8, ge=1, description="Cells of the training side in the data-copying test C_T.")
    fresh_share: float = Field(
        0.25, gt=0, lt=1, description="Share of holdout people set aside as the control that must pass."
    )
    control_rows: int = Field(200, ge=20, description="Rows in each planted control.")
    control_noise: float = Field(
        0.25, gt=0, lt=1, description="Noise of the noisy copycat, in real people's median nearest distances."
    )
    contamination: float = Field(0.05, gt=0, lt=1, description="Share of noisy copies in the contaminated control.")
    contamination_repeats: int = Field(40, ge=1, description="Draws of the contaminated control behind its power.")
    honest_repeats: int = Field(
        20, ge=0, description="Fresh draws of unseen real people, each judged as a set: the false-positive rate."
    )
    honest_people: int = Field(
        400, ge=40, description="People of each side in those draws, at most; larger sides are cut at random."
    )
    false_positive_max: float = Field(
        0.05, gt=0, lt=1, description="Share of honest sets convicted above which, when certain, there is no verdict."
    )
