"""Scans at several institutions, one model: the adapter of `engine.training.federated` for the autoencoder and the flow.

Stages, in order; each is one or several rounds of the same five methods, and `stage` says which:

    data          statistics only: scans, people, sums of continuous covariates, sums of the fields' centres
    autoencoder   states are averaged
    latents       statistics only: sums over latents per channel, which standardise them alike everywhere
    flow          states of the denoiser are averaged

No scan, latent, id, file name or extreme value leaves: levels of categorical covariates must be declared in the config, and
where a plain run states the smallest and largest value of a covariate, a federated one states two deviations around the
mean. Networks begin from weights drawn from the config's seed, the same everywhere. Every draw is named by the site, the
round and the scan, so that a repeated round is the same round. The patch discriminator, the monitor of memorisation, label
maps and earlier scans are left to central training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from engine import provenance, seeding
from engine.atomic import write_text
from engine.errors import InputError, Unsupported, UsageError
from engine.imaging import field_of_view
from engine.imaging.autoencoder import Autoencoder, autoencoder_loss, kl_per_element, reconstruction_loss
from engine.imaging.config import ImagingConfig, dump_config
from engine.imaging.dataset import Covariate, Row, Scans, is_missing, load_scans, read_table
from engine.imaging.draws import flow_batch, flow_data
from engine.imaging.flow import interpolate, velocity_target
from engine.imaging.latents import Latents, encode_scans
from engine.imaging.train import moved
from engine.imaging.velocity import Velocity, new_denoiser
from engine.training import checkpoint
from engine.training.federated import Declared, Tensors, checked

Stage = Literal["data", "autoencoder", "latents", "flow"]
STAGES: tuple[Stage, ...] = ("data", "autoencoder", "latents", "flow")
LEAST_PEOPLE = 5  # sums over fewer would be near to the values of one
_STRIDE = 1 << 20  # names of draws: step x 2^40 + site x 2^20 + scan


@dataclass(frozen=True)
class Local:
    """What a site does in a round.

    Attributes:
        steps: optimizer steps, each on `batch_size` of the config's stage, or on all scans where there are fewer.
        optimizer: a fresh one in every round: states of optimizers stay at the site.
        learning_rate: None takes that of the config's stage.
    """

    steps: int = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = None


def check_config(config: ImagingConfig) -> None:
    """Refuse what cannot be learned in a federation.

    Raises:
        Unsupported: label maps, earlier scans, a regression on covariates, a discriminator, a monitor, privacy, several grids.
        UsageError: no spacing, or a categorical covariate without levels.
    """
    asked = {
        "data.labels": bool(config.data.labels),
        "data.further_grids": bool(config.data.further_grids),
        "flow.baseline": config.flow.baseline,
        "flow.linear_mean": config.flow.linear_mean,
        "autoencoder.adversarial_weight": config.autoencoder.adversarial_weight > 0,
        "monitor": config.monitor is not None,
        "privacy": config.privacy is not None,
    }
    if wrong := [name for name, given in asked.items() if given]:
        raise Unsupported("a config that sites can share", " and ".join(wrong), "federated", "leave it out")
    if config.data.spacing_mm is None:
        raise UsageError("one voxel size for all sites", "none", "data.spacing_mm", "data.spacing_mm=[1,1,1]")
    for name, declared in config.data.covariates.items():
        if declared.kind == "categorical" and not declared.levels:
            raise UsageError("levels that no site has to reveal", "none", f"data.covariates.{name}.levels", "list them")


def stats_declared(config: ImagingConfig, stage: str) -> Declared:
    """Name and shape of the sums of stage data or latents."""
    if stage == "data":
        sums = {f"covariate.{name}": (3,) for name, c in config.data.covariates.items() if c.kind == "continuous"}
        return {"scans": (1,), "people": (1,), "centre_mm": (3,), **sums}
    channels = config.autoencoder.latent_channels
    return {"scans": (1,), "positions": (1,), "latent": (channels,), "latent_square": (channels,)}


class ScanSite:
    """One institution: its table, split by person as everywhere, and the common model.

    Args:
        data: table of scans or BIDS dataset. name: of the site, which names its draws and never leaves.
        first_draw: where the site's draws begin, in place of a number made from `name`.

    Raises:
        InputError: fewer than LEAST_PEOPLE people on the training side, or a scan that cannot be used.
    """

    def __init__(
        self,
        config: ImagingConfig,
        data: str | Path,
        name: str,
        local: Local | None = None,
        *,
        cache: Path | None = None,
        first_draw: int | None = None,
        rows: Sequence[Row] | None = None,
    ) -> None:
        check_config(config)
        self.config, self.local, self.stage = config, local or Local(), STAGES[0]
        table = list(rows) if rows is not None else read_table(data, config.data)
        self.rows, self.holdout = [r for r in table if r.train], [r for r in table if not r.train]
        people = len({row.subject for row in self.rows})
        if people < LEAST_PEOPLE:
            raise InputError(f"at least {LEAST_PEOPLE} people to learn from", str(people), "federated site")
        self.people = people
        self.scans = load_scans(self.rows, config, cache)
        self.unseen = load_scans(self.holdout, config, cache / "holdout" if cache else None) if self.holdout else None
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        own = int.from_bytes(digest, "little") % _STRIDE * _STRIDE
        self.first_draw = own if first_draw is None else first_draw
        torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 0))
        self.autoencoder = Autoencoder(config.autoencoder, channels=self.scans.x_bcdhw.shape[1])
        self.known: list[Covariate] | None = None
        self.denoiser: Velocity | None = None
        self.latent_c: tuple[torch.Tensor, torch.Tensor] | None = None

    # --- what leaves and what comes ---------------------------------------------------------------------------------

    def state_declared(self) -> Declared:
        """Parameters and buffers of the network of this stage."""
        return {name: tuple(tensor.shape) for name, tensor in self._network().state_dict().items()}

    def stats_declared(self) -> Declared:
        """Sums of this stage; see `stats_declared`."""
        return stats_declared(self.config, self.stage)

    def get_state(self) -> Tensors:
        """float32 arrays of the network of this stage."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self._network().state_dict().items()}

    def set_state(self, state: Tensors) -> None:
        """Take the common network of this stage; refused whole where it is another one."""
        checked(state, self.state_declared(), "the common state")
        tensors = {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in state.items()}
        checkpoint.load_strictly(self._network(), tensors, "the common state")

    def local_stats(self) -> Tensors:
        """Sums of this stage over the training side, float64."""
        scans = np.array([float(len(self.rows))])
        if self.stage == "data":
            made = {"scans": scans, "people": np.array([float(self.people)])}
            made["centre_mm"] = self.scans.centre_mm.sum(axis=0)
            for name, declared in self.config.data.covariates.items():
                if declared.kind == "continuous":
                    given = [float(r.covariates[name]) for r in self.rows if not is_missing(r.covariates[name])]
                    values = np.array(given)
                    made[f"covariate.{name}"] = np.array([len(values), values.sum(), np.square(values).sum()])
            return made
        tensors = encode_scans(self.config, self.autoencoder, [self.scans], torch.device("cpu"))
        mean, deviation = tensors["mean"].double(), tensors["deviation"].double()
        return {
            "scans": scans,
            "positions": np.array([float(mean.numel() // mean.shape[2])]),
            "latent": mean.sum(dim=(0, 1, 3, 4, 5)).numpy(),
            "latent_square": (mean.square() + deviation.square()).sum(dim=(0, 1, 3, 4, 5)).numpy(),
        }

    def set_stats(self, total: Tensors) -> None:
        """Take the sums over all sites: covariates' means and deviations, then those of the latents."""
        checked(total, self.stats_declared(), "the common statistics")
        if self.stage == "data":
            self.known = covariates_of(self.config, total)
        else:
            mean_c, deviation_c = latent_statistics_of(total)
            self.latent_c = torch.from_numpy(mean_c), torch.from_numpy(deviation_c)

    # --- learning ---------------------------------------------------------------------------------------------------

    def fit(self, round_number: int) -> Tensors:
        """`local.steps` steps from the state that was set; the state after them."""
        network, budget = self._network(), self._budget()
        rate = self.local.learning_rate or budget.learning_rate
        network.train()
        parameters = list(network.parameters())
        optimizer: torch.optim.Optimizer
        if self.local.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=rate)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay)
        data = self._flow_data() if self.stage == "flow" else None
        for step in range(round_number * self.local.steps, (round_number + 1) * self.local.steps):
            items = self._items(step, min(budget.batch_size, len(self.rows)))
            positions = [(step << 40) + self.first_draw + item for item in items]
            if data is None:
                loss = self._image_loss(positions, items)
            else:
                loss = self._velocity_error(data, positions, items).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, self.config.training.gradient_clip)
            optimizer.step()
        return self.get_state()

    def evaluate(self) -> dict[str, float]:
        """Loss of this stage on the holdout, with the same draws in every round; "n" scans."""
        if self.unseen is None:
            return {"n": 0.0}
        losses_b = self.losses()
        return {"n": float(len(losses_b)), "velocity_mse" if self.stage == "flow" else "l1": float(losses_b.mean())}

    @torch.no_grad()
    def losses(self, draws: int = 1) -> np.ndarray:
        """Loss of this stage for each scan of the holdout, float64 (b,): l1 of its reconstruction, or the squared error of the
        velocity, mean over `draws` draws of noise and time. They stay at the site: only `evaluate` answers.

        Raises:
            UsageError: nobody was kept out here.
        """
        if self.unseen is None:
            raise UsageError("people kept out at this site", "none", "losses")
        network, items = self._network().eval(), list(range(len(self.holdout)))
        if self.stage == "flow":
            data = self._flow_data(unseen=True)
            first = [(1 << 60) + draw * len(items) for draw in range(draws)]
            errors = [self._velocity_error(data, [at + item for item in items], items) for at in first]
        else:
            x = torch.from_numpy(np.array(self.unseen.x_bcdhw))
            errors = [(self.autoencoder.decode(self.autoencoder.encode(x)[0]) - x).abs()]
        network.train()
        made: np.ndarray = torch.stack([e.flatten(1).mean(dim=1) for e in errors]).double().mean(dim=0).numpy()
        return made

    def _network(self) -> nn.Module:
        if self.stage == "autoencoder":
            return self.autoencoder
        if self.stage != "flow":
            raise UsageError("a stage with a state", self.stage, "stage", "autoencoder or flow")
        if self.known is None:
            raise UsageError("the statistics of stage data first", "none", "set_stats")
        if self.denoiser is None:
            self.denoiser = first_denoiser(self.config, self.known)
        return self.denoiser

    def _budget(self) -> Any:
        return self.config.flow if self.stage == "flow" else self.config.autoencoder

    def _items(self, step: int, batch: int) -> list[int]:
        """Positions of the step's scans: epochs of permutations, cut into batches; all in order where all fit."""
        n = len(self.rows)
        if batch >= n:
            return list(range(n))
        epoch, at = divmod(step, n // batch)
        order = seeding.generator(self.config.seed, f"imaging.federated.order.{self.first_draw}", epoch).permutation(n)
        return [int(k) for k in order[at * batch : (at + 1) * batch]]

    def _image_loss(self, positions: list[int], items: list[int]) -> torch.Tensor:
        budget, config = self.config.autoencoder, self.config
        x = np.stack(
            [moved(self.scans.x_bcdhw[i], self.scans.spacing_mm[i], config, p) for p, i in zip(positions, items)]
        )
        shape = (budget.latent_channels, *(n // budget.factor for n in x.shape[2:]))
        noise = torch.stack([seeding.normal(shape, config.seed, "imaging.posterior", p) for p in positions])
        whole = torch.from_numpy(x)
        output, mean, log_variance = self.autoencoder(whole, noise)
        terms = reconstruction_loss(budget, output, whole, config.label_channels)
        return autoencoder_loss(budget, {**terms, "kl": kl_per_element(mean, log_variance)})

    def _flow_data(self, unseen: bool = False) -> Any:
        if self.latent_c is None or self.known is None:
            raise UsageError("the statistics of stage latents first", "none", "set_stats")
        scans, rows = (self.unseen, self.holdout) if unseen else (self.scans, self.rows)
        assert isinstance(scans, Scans)
        tensors = encode_scans(self.config, self.autoencoder, [scans], torch.device("cpu"))
        latents = Latents([tensors["mean"]], [tensors["deviation"]], *self.latent_c, "")
        return flow_data(self.config, rows, [scans], latents, self.known)

    def _velocity_error(self, data: Any, positions: list[int], items: list[int]) -> torch.Tensor:
        x0, noise, t, wanted = flow_batch(self.config, data, 0, positions, items)
        velocity = self._network()(interpolate(x0, noise, t), t, wanted)
        return (velocity - velocity_target(x0, noise)).square()


# --- from sums to a model that can be sampled -------------------------------------------------------------------------


def covariates_of(config: ImagingConfig, total: Tensors) -> list[Covariate]:
    """What the model is conditioned on, from the sums of all sites; the range is two deviations around the mean.

    Raises:
        InputError: a continuous covariate that no site has.
    """
    made = []
    for name, declared in config.data.covariates.items():
        if declared.kind == "categorical":
            made.append(Covariate(name, "categorical", levels=tuple(declared.levels or ())))
            continue
        count, summed, square = (float(x) for x in total[f"covariate.{name}"])
        if count < 1:
            raise InputError(f"values of '{name}' at some site", "none", "federated", "remove it from data.covariates")
        mean = summed / count
        deviation = max(0.0, square / count - mean**2) ** 0.5 or 1.0
        made.append(Covariate(name, "continuous", (), mean, deviation, mean - 2 * deviation, mean + 2 * deviation))
    return made


def latent_statistics_of(total: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation per channel of draws from the posteriors, float32."""
    mean_c = total["latent"] / total["positions"]
    variance_c = total["latent_square"] / total["positions"] - np.square(mean_c)
    return mean_c.astype(np.float32), np.sqrt(np.maximum(variance_c, 1e-12)).astype(np.float32)


def first_denoiser(config: ImagingConfig, known: Sequence[Covariate]) -> Velocity:
    """The denoiser before any learning, from the config's seed."""
    torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 1))
    return new_denoiser(config, known)


def first_state(config: ImagingConfig, stage: Stage, known: Sequence[Covariate] = (), channels: int = 1) -> Tensors:
    """The state that every site begins with, for whoever averages; needs no data."""
    torch.manual_seed(seeding.derived_seed(config.seed, "imaging.weights", 0))
    network: nn.Module = Autoencoder(config.autoencoder, channels=channels)
    if stage == "flow":
        network = first_denoiser(config, known)
    return {name: tensor.detach().numpy().copy() for name, tensor in network.state_dict().items()}


def write_run(
    out: str | Path, config: ImagingConfig, data: Tensors, latents: Tensors, autoencoder: Tensors, denoiser: Tensors,
    rounds: dict[str, int],
) -> Path:  # fmt: skip
    """The common model as a run folder, which `engine imaging sample` and the audits take like any other.

    Args:
        data, latents: sums over all sites of these stages; autoencoder, denoiser: the last common states.

    Raises:
        UsageError: `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise UsageError("a folder that does not exist yet", "an existing one", out)
    assert config.data.spacing_mm is not None
    known, spacing = covariates_of(config, data), [float(s) for s in config.data.spacing_mm]
    mean_c, deviation_c = latent_statistics_of(latents)
    facts = {
        "channels": 1,
        "covariates": [c.to_json() for c in known],
        "spacing_mm_low": spacing,
        "spacing_mm_high": spacing,
        "spacing_mm": spacing,
        "centre_mm": (data["centre_mm"] / data["scans"]).tolist(),
        "fields": field_of_view.trained_fields([(tuple(config.data.size), np.array([spacing]))]),
        "latent_mean_c": mean_c.tolist(),
        "latent_deviation_c": deviation_c.tolist(),
        "stages": {stage: {"rounds": n} for stage, n in rounds.items()},
    }
    parts = {
        name: {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}
        for name, state in (("autoencoder", autoencoder), ("denoiser", denoiser), ("ema", denoiser))
    }
    out.mkdir(parents=True)
    write_text(out / "config.yaml", dump_config(config))
    checkpoint.save(out, sum(rounds.values()), parts, {"stage": "flow", "done": True, "model": facts})
    extra = {"federated": {"scans": float(data["scans"][0]), "people": float(data["people"][0]), "rounds": rounds}}
    provenance.write(out, "imaging federated", config=config.model_dump(mode="json"), seed=config.seed, extra=extra)
    return out
