r"""What a generator predicts of a noisy picture, which a step-aware judge is fitted on.

    (1)  z = encode(x),   z_l = alpha(l) z + sigma(l) eps,   l ~ U[min_level, max_level)
    (2)  what is judged = decode(x_0^ of the guided prediction at z_l),   clamped to [0, 1]

as SPO's preference model is trained (Liang et al., arXiv:2406.04314; released: levels over the
whole range, guidance 5), and what its sampler shows that judge later (stepwise.py). l and eps are
the same for both pictures of a pair. The level told is the process's own of the rounded time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2i_align.contract import Encoded, Sample, TensorDict
from t2i_align.errors import UserError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.diffusers_sampling import both_branches
from t2i_align.judges.fit_options import NoiseOptions
from t2i_align.process.convert import to_x0_eps
from t2i_align.process.schedule import noised
from t2i_align.process.seeds import normals


class Predictions:
    """Eq. (1) and (2), as ``judges.fit_data.Degrade``.

    Args:
        options: with ``process: predicted``.
        device: of the generator.
        half: whether the VAE is in bfloat16, twice as fast on CPUs that have it.
    """

    def __init__(self, options: NoiseOptions, device: str, *, half: bool = False) -> None:
        """Load nothing yet; the resolution is that of the first pictures."""
        self.options, self.device, self.side = options, device, 0
        self.vae_dtype = "bfloat16" if half else "float32"

    def _open(self, pixels: Tensor) -> None:
        """The generator, at the pictures' size.

        Raises:
            UserError: they are not square.
            ModelError: no pipeline there, or it does not make this size.
        """
        height, width = pixels.shape[2:]
        if height != width:
            raise UserError(
                f"noise.process predicted: the pictures have {height} x {width} pixels",
                "set size, which makes squares of them",
            )
        given = {"name_or_path": self.options.model, "resolution": height}
        given |= {"type": "diffusers", "vae_dtype": self.vae_dtype}
        self.generator = DiffusersGenerator(DiffusersOptions.model_validate(given), self.device)
        self.generator.load_module(0, reference=False)
        self.side = height

    @torch.no_grad()
    def __call__(
        self, pixels: Tensor, level: Tensor, seeds: Tensor, prompts: Sequence[str]
    ) -> Tensor:
        """What the judge sees ``(B, 3, h, w)`` in [0, 1].

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].
            level: ``(B,)`` canonical.
            seeds: ``(B,)`` of the noise.
            prompts: B prompts.
        """
        if self.side == 0:
            self._open(pixels)
        model = self.generator
        found = model.encode_media([Encoded({"pixels": 2 * x - 1}, {}) for x in pixels])
        latents = [e.state["mean" if "mean" in e.state else "x0"] for e in found]
        z = torch.stack(latents).float().to(model.device)
        time = model.process.time(level).to(model.device)
        alpha, sigma = model.process.coefficients(time)
        x_t = noised(z, normals(seeds, z.shape[1:]).to(z), alpha, sigma)
        inputs = model.prepare_sampling(prompts, num_steps=1, guidance=self.options.guidance_scale)
        with model.use("policy") as net:

            def predict(x: Tensor, at: Tensor, cond: TensorDict) -> Tensor:
                return model.denoise(net, x, at, cond)

            if inputs.negative is None:
                pred = predict(x_t, time, inputs.cond)
            else:
                uncond, pred = both_branches(predict, x_t, time, inputs, batched=False)
                pred = model.guide(uncond, pred, inputs.guidance)
        x_0, _ = to_x0_eps(model.prediction, pred.float(), x_t, alpha, sigma)
        made = model.decode(Sample({"x0": x_0}, {}))
        return torch.stack([m.data for m in made]).float().cpu()
