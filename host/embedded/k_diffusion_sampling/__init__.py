"""The sampler functions that KSamplerSelect lists.

All have the form `sample_<name>(model, x, sigmas, extra_args=None, callback=None, disable=None, **options)`: `model(x, sigma,
**extra_args)` is denoised, `callback` gets {"x", "i", "sigma", "sigma_hat", "denoised"} each step, the last x is returned. They are
written from the papers named in each file; on CONST models the ancestral ones follow the flow's own noise schedule.
"""

from .ancestral import sample_dpm_2_ancestral, sample_dpmpp_2s_ancestral, sample_euler_ancestral
from .cfg_pp import (
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2s_ancestral_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
)
from .common import (
    default_noise_sampler,
    get_ancestral_step,
    half_log_snr_to_sigma,
    offset_first_sigma_for_snr,
    sigma_to_half_log_snr,
    to_d,
)
from .dpm_solver import FROM_LIMITS, over_schedule, sample_dpm_adaptive, sample_dpm_fast
from .karras import sample_dpm_2, sample_euler, sample_heun, sample_heunpp2
from .multistep import sample_deis, sample_ipndm, sample_ipndm_v, sample_lms
from .predictors import (
    sample_dpmpp_2m,
    sample_gradient_estimation,
    sample_gradient_estimation_cfg_pp,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_res_multistep_ancestral_cfg_pp,
    sample_res_multistep_cfg_pp,
)
from .sa_solver import sample_sa_solver, sample_sa_solver_pece
from .stochastic import sample_ddpm, sample_er_sde, sample_lcm, sample_seeds_2, sample_seeds_3
from .uni_pc import sample_uni_pc, sample_uni_pc_bh2

# Samplers of ComfyUI that are not here, and the one that comes nearest in what it solves.
UNAVAILABLE = {
    "dpmpp_sde": "seeds_2",
    "dpmpp_sde_gpu": "seeds_2",
    "dpmpp_2m_sde": "er_sde",
    "dpmpp_2m_sde_gpu": "er_sde",
    "dpmpp_2m_sde_heun": "er_sde",
    "dpmpp_2m_sde_heun_gpu": "er_sde",
    "dpmpp_3m_sde": "er_sde",
    "dpmpp_3m_sde_gpu": "er_sde",
}

__all__ = [
    "UNAVAILABLE", "FROM_LIMITS", "over_schedule", "to_d", "get_ancestral_step", "default_noise_sampler", "sigma_to_half_log_snr",
    "half_log_snr_to_sigma", "offset_first_sigma_for_snr", "sample_ddpm", "sample_deis", "sample_dpm_2", "sample_dpm_2_ancestral",
    "sample_dpm_adaptive", "sample_dpm_fast", "sample_dpmpp_2m", "sample_dpmpp_2m_cfg_pp", "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_2s_ancestral_cfg_pp", "sample_er_sde", "sample_euler", "sample_euler_ancestral", "sample_euler_ancestral_cfg_pp",
    "sample_euler_cfg_pp", "sample_gradient_estimation", "sample_gradient_estimation_cfg_pp", "sample_heun", "sample_heunpp2",
    "sample_ipndm", "sample_ipndm_v", "sample_lcm", "sample_lms", "sample_res_multistep", "sample_res_multistep_ancestral",
    "sample_res_multistep_ancestral_cfg_pp", "sample_res_multistep_cfg_pp", "sample_sa_solver", "sample_sa_solver_pece",
    "sample_seeds_2", "sample_seeds_3", "sample_uni_pc", "sample_uni_pc_bh2",
]  # fmt: skip
