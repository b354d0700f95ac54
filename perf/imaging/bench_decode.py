"""Decoding a latent beside MONAI, and the sampling loop beside MONAI's scheduler: equal weights, equal sizes, the same run.

Decode: one MAISI decoder (`AutoencoderKlMaisi`, widths 32 / 64 / 64, 4x up, trilinear upsampling; random weights, no
attention). Ours streams its planes within a stated budget (`engine.imaging.streamed.run`). The peers call it as MONAI's users
do: whole (`num_splits` 1), in MONAI's own splits of the first axis (`num_splits` 4), and through `SlidingWindowInferer` over
the latent (windows of 8 latent positions, overlap 0.4, Gaussian). All but the last must agree with ours to 1e-4 of the
largest value; the last one cannot (every window has group statistics of its own), and its note says by how much it is off.

Own: the engine's autoencoder of the hippocampus config, as `engine.imaging.decoding.decode` calls it, beside the same network
without oneDNN.

Sample: the engine's denoiser of the hippocampus config, 30 Euler steps of one latent, ours against MONAI's `RFlowScheduler`
loop around the same network, and around MONAI's own `DiffusionModelUNetMaisi` of the same widths. The scheduler rounds its
times to whole thousandths, so that its result is another one; the note says how far off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perf.case import Case, Peer, Timed
from perf.peers import missing_package

_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "imaging" / "hippocampus_cpu15.yaml"
_STEPS, _WINDOW = 30, 8


@dataclass(frozen=True)
class Decoding:
    """Latent and networks; `split` shares every weight with `plain`."""

    z: Any
    plain: Any
    split: Any
    budget_bytes: int


def cases() -> list[Case]:
    return [
        decode((64, 64, 64), budget_mb=100),
        decode((64, 64, 64), budget_mb=60, quick=False),
        decode((192, 160, 160), budget_mb=256, quick=False),
        own((64, 96, 64)),
        sample(),
    ]


def curves() -> dict[str, list[Case]]:
    """Along the streamed axis, where memory must not grow: the budget is the same."""
    return {"depth": [decode((depth, 64, 64), budget_mb=60) for depth in (64, 128, 256)]}


def decode(shape_dhw: tuple[int, int, int], budget_mb: int, quick: bool = True) -> Case:
    """The MAISI decoder to `shape_dhw` voxels. Floor: multiply-adds of its convolutions."""

    def prepare() -> Decoding:
        import torch

        torch.manual_seed(0)
        plain, split = _maisi(1), _maisi(4)
        split.load_state_dict(plain.state_dict())
        z = torch.randn(1, 4, *(n // 4 for n in shape_dhw))
        return Decoding(z, plain, split, budget_mb * 1_000_000)

    def run(inputs: Decoding) -> np.ndarray:
        from engine.imaging import streamed

        made = streamed.run(maisi_steps(inputs.plain), inputs.z, budget_bytes=inputs.budget_bytes)
        return made.numpy()

    def peer(name: str, work: Callable[[Decoding], Any], same: Callable[[Any, Any], None] | None) -> Peer:
        return Peer(f"monai.{name}", work, same=same, missing=lambda: missing_package("monai"))

    return Case(
        "imaging.decode",
        {**dict(zip(("depth", "height", "width"), shape_dhw)), "budget_mb": budget_mb},
        float(np.prod(shape_dhw)),
        "voxels",
        prepare,
        run,
        peers=(
            peer("AutoencoderKlMaisi", lambda inputs: _whole(inputs.plain, inputs.z), _close),
            peer("AutoencoderKlMaisi num_splits 4", lambda inputs: _whole(inputs.split, inputs.z), _close),
            peer("SlidingWindowInferer", _windows, None),
        ),
        floor_ops=_multiply_adds(shape_dhw),
        limit="f32_fma",
        repeats=5,
        quick=quick,
    )


def own(shape_dhw: tuple[int, int, int]) -> Case:
    """The engine's autoencoder, whole."""

    def prepare() -> Any:
        import torch

        from engine.imaging.autoencoder import Autoencoder
        from engine.imaging.config import load_config

        torch.manual_seed(0)
        config = load_config(_CONFIG).autoencoder
        model = Autoencoder(config).eval()
        return model, torch.randn(1, config.latent_channels, *(n // config.factor for n in shape_dhw))

    def run(inputs: Any) -> np.ndarray:
        from engine.imaging.decoding import decode

        return decode(inputs[0], inputs[1], memory_gb=4.0)

    def plainly(inputs: Any) -> np.ndarray:
        """Every convolution as PyTorch would run it."""
        import torch

        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
            return inputs[0].decode(inputs[1]).numpy()

    return Case(
        "imaging.decode_own",
        dict(zip(("depth", "height", "width"), shape_dhw)),
        float(np.prod(shape_dhw)),
        "voxels",
        prepare,
        run,
        peers=(Peer("torch without oneDNN", plainly, same=_close),),
    )


def sample() -> Case:
    """One latent of the hippocampus config by 30 Euler steps."""

    def prepare() -> Any:
        import torch

        from engine.imaging.config import load_config
        from engine.imaging.denoiser import Condition
        from engine.imaging.velocity import new_denoiser

        config = load_config(_CONFIG)
        torch.manual_seed(0)
        ours = new_denoiser(config, []).eval()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        widths = config.flow.widths
        theirs = _unet(
            config.autoencoder.latent_channels, widths, [k in config.flow.attention_levels for k in range(len(widths))]
        )
        noise = torch.randn(1, config.autoencoder.latent_channels, *config.latent_size)
        empty = Condition(torch.zeros(1, 3), torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.int64))
        return ours, theirs, noise, empty

    def run(inputs: Any) -> np.ndarray:
        import torch

        from engine.imaging.flow import euler, flow_times

        ours, _, noise, empty = inputs
        with torch.inference_mode():
            return euler(lambda x, t: ours(x, t, empty), noise, flow_times(_STEPS)).numpy()

    def scheduled(which: int) -> Callable[[Any], Any]:
        def run_theirs(inputs: Any) -> Any:
            import time

            import torch
            from monai.networks.schedulers import RFlowScheduler

            noise, empty = inputs[2], inputs[3]
            begin = time.process_time()
            scheduler = RFlowScheduler()
            scheduler.set_timesteps(_STEPS)
            x = noise
            following = [*scheduler.timesteps[1:].tolist(), 0]
            with torch.inference_mode():
                for t, then in zip(scheduler.timesteps.tolist(), following):
                    here = torch.full((1,), float(t))
                    # its velocity points from noise to data
                    v = -inputs[0](x, here / 1000, empty) if which == 0 else inputs[1](x, here)
                    x, _ = scheduler.step(v, t, x, then)
            seconds = time.process_time() - begin
            if which:
                return Timed(seconds, x.numpy())
            ours = run(inputs)
            return Timed(
                seconds,
                x.numpy(),
                f"differs by {np.abs(ours - x.numpy()).max() / np.abs(ours).max():.1e} of the largest",
            )

        return run_theirs

    return Case(
        "imaging.sample_latent",
        {"steps": _STEPS},
        float(_STEPS),
        "steps",
        prepare,
        run,
        peers=tuple(
            Peer(f"monai.{name}", scheduled(which), missing=lambda: missing_package("monai"))
            for which, name in enumerate(("RFlowScheduler", "RFlowScheduler and DiffusionModelUNetMaisi"))
        ),
    )


def maisi_steps(network: Any) -> list[Any]:
    """MONAI's MAISI decoder as the steps of `engine.imaging.streamed`."""
    from engine.imaging.streamed import Step, residual

    steps = [Step("convolve", network.post_quant_conv.conv)]
    for block in network.decoder.blocks:
        kind = type(block).__name__
        if kind == "MaisiConvolution":
            steps.append(Step("convolve", block.conv.conv))
        elif kind == "MaisiResBlock":
            skip = None if block.in_channels == block.out_channels else block.nin_shortcut.conv.conv
            steps += residual(block.norm1, block.conv1.conv.conv, block.norm2, block.conv2.conv.conv, skip)
        elif kind == "MaisiUpsample":
            steps += [Step("double_linear"), Step("convolve", block.conv.conv.conv)]
        elif kind == "MaisiGroupNorm3D":
            steps.append(Step("normalise", block))
        else:
            raise ValueError(f"a block of bounded reach, not {kind}")
    return steps


def _maisi(splits: int) -> Any:
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    return AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=[32, 64, 64],
        num_res_blocks=[1, 1, 1], norm_num_groups=16, attention_levels=[False] * 3, num_splits=splits, save_mem=False,
    ).eval()  # fmt: skip


def _unet(channels: int, widths: list[int], attention: list[bool]) -> Any:
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    return DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=channels, out_channels=channels, num_res_blocks=1, num_channels=widths,
        attention_levels=attention, norm_num_groups=16, num_head_channels=[32 if a else 0 for a in attention],
    ).eval()  # fmt: skip


def _multiply_adds(shape_dhw: tuple[int, int, int]) -> float:
    full = float(np.prod(shape_dhw))
    # convolutions of 27 taps at a quarter, a half and full resolution
    quarter, half, whole = 4 * 64 + 2 * 64 * 64, 3 * 64 * 64, 64 * 64 + 64 * 32 + 32 * 32 + 32
    return 27 * full * (quarter / 64 + half / 8 + whole)


def _whole(network: Any, z: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return network.decode(z).numpy()


def _windows(inputs: Decoding) -> Timed:
    import time

    import torch
    from monai.inferers import SlidingWindowInferer

    inferer = SlidingWindowInferer((_WINDOW,) * 3, sw_batch_size=1, overlap=0.4, mode="gaussian")
    begin = time.process_time()
    with torch.inference_mode():
        made = np.asarray(inferer(inputs.z, inputs.plain.decode))
    seconds = time.process_time() - begin
    whole = _whole(inputs.plain, inputs.z)
    off = np.abs(made - whole).max() / np.abs(whole).max()
    return Timed(seconds, made, f"differs from the whole by {100 * off:.0f} % of the largest")


def _close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * float(np.abs(theirs).max()))
