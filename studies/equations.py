"""The papers' equations in their order, each with its code, its tests and its picture.

One table is the source of `companion.html` and of the README's map; `studies.companion` prints
both. A row's text is the docstring of its first object; `note` adds what no docstring says."""

# ruff: noqa: E501

from dataclasses import dataclass


@dataclass
class Row:
    id: str  # the anchor of the page: companion.html#eq-9
    line: str  # of the README's map, a key of LINES
    title: str  # number and name, as the contents list has them
    tex: str  # its lines, with LaTeX's break between them
    code: list[str]  # objects, by their full names
    tests: list[str]
    note: str = ""
    mark: str = ""  # what the code must hold; by default the number in brackets
    picture: str = ""  # a name of `companion.PICTURES`


R, LINES = (
    Row,
    {
        "flow": "(1) dz = v dt",
        "path": "(2), (4) z = a x0 + b ε; (5), (9), (10) u_t(z | ε)",
        "density": "(3) p_t",
        "field": "(6) u_t(z) = E[a' x0 + b' ε | z]; (7) over E|u|²",
        "loss": "(8), (11), (12) the losses",
        "weight": "L_w; (16), (18) w = −2 π (det/a)²/λ'",
        "snr": "λ, λ'; (14), (15) EDM",
        "closed": "(13), (17)",
        "edm": "(16) F-prediction; § 3 linear paths",
        "pi": "(19), (20), (21), (22)",
        "names": "§ 5.1 the 61; § 5.3.2 shift",
        "plane": "plane: x̂0 = (q z − b o)/det, ε̂ = (a o − p z)/det",
        "network": "guidance; § 4 MM-DiT, DiT",
        "windows": "PeRFlow: windows; t = 1 − ⌊uN⌋/N",
        "phi": "Φ(z_{t_k}, t_k, t_{k−1})",
        "line": "the line, its slope, ε*",
        "sampler": "n ≥ K Euler steps; ΔW",
    },
)
SECTIONS: dict[str, list[Row]] = {
    "SD3, section 2: flows": [
        R("eq-1", "flow", "(1) the equation of the flow", r"dz_t = v_\Theta(z_t, t)\,dt",
          ["rf.solve"], ["test_solvers_show_their_order", "test_one_euler_step_is_exact_for_a_point_mass_on_rf"],
          "The paper writes y for z, and samples from t = 1 down to t = 0."),
        R("eq-2", "path", "(2) the path", r"z_t = a_t x_0 + b_t \varepsilon,\quad \varepsilon \sim \mathcal{N}(0, I)",
          ["rf.Path.interpolate", "rf.Path.coefficients"], ["test_endpoints", "test_coefficients_derivatives_match_autograd"],
          "The paper asks for a_0 = 1, b_0 = 0, a_1 = 0 and b_1 = 1. EDM and the linear schedules meet this in part: each class says where.",
          picture="paths"),
        R("eq-3", "density", "(3) the density of all noise together", r"p_t(z) = \mathbb{E}_{\varepsilon}\, p_t(z \mid \varepsilon)",
          ["toy2d.GaussianMixture.log_density", "toy2d.GaussianMixture._components"],
          ["test_log_density_integrates_to_one", "test_continuity_equation"],
          "Of real data nobody knows it. Of a mixture of Gaussians it is a sum, and of the pictures of `data/shapes.py` a softmax."),
        R("eq-4", "path", "(4) the map from data to the path", r"\psi_t(\cdot \mid \varepsilon)\colon x_0 \mapsto a_t x_0 + b_t \varepsilon \\ \psi_t^{-1}(z \mid \varepsilon) = \frac{z - b_t \varepsilon}{a_t}",
          ["rf.Path.invert", "rf.Path.derivative"], ["test_velocity_5_9_10_is_the_derivative_of_2"]),
        R("eq-5", "path", "(5) the conditional velocity", r"u_t(z \mid \varepsilon) = \psi_t'(\psi_t^{-1}(z \mid \varepsilon) \mid \varepsilon)",
          ["rf.Path.conditional_velocity"], ["test_velocity_5_9_10_is_the_derivative_of_2"]),
        R("eq-6", "field", "(6) the marginal velocity", r"u_t(z) = \mathbb{E}_{\varepsilon}\left[ u_t(z \mid \varepsilon)\, \frac{p_t(z \mid \varepsilon)}{p_t(z)} \right] \\ \qquad = \mathbb{E}[a_t' x_0 + b_t' \varepsilon \mid z_t = z]",
          ["toy2d.GaussianMixture.velocity", "toy2d.GaussianMixture.ends", "data.shapes.field"],
          ["test_ends_6_match_posterior_monte_carlo", "test_continuity_equation", "test_the_posterior_equals_brute_force_over_all_pictures"]),
        R("eq-7", "field", "(7) flow matching", r"\mathcal{L}_{FM} = \mathbb{E}_{t,\, p_t(z)} \lVert v_\Theta(z, t) - u_t(z) \rVert^2",
          ["toy2d.relative_excess", "data.shapes.Shapes.errors"],
          ["test_relative_excess_is_7_over_the_power_of_u", "test_gradients_of_7_and_8_agree"],
          mark="(7)"),
        R("eq-8", "loss", "(8) conditional flow matching", r"\mathcal{L}_{CFM} = \mathbb{E}_{t,\, p_t(z \mid \varepsilon),\, p(\varepsilon)} \lVert v_\Theta(z, t) - u_t(z \mid \varepsilon) \rVert^2",
          ["rf.rectified_flow_loss", "rf.Formulation.examples", "rf.Objective.rows_loss"],
          ["test_gradients_of_7_and_8_agree", "test_the_dozen_lines_are_rf_to_the_last_bit"]),
        R("eq-9", "path", "(9) the conditional velocity, written out", r"u_t(z_t \mid \varepsilon) = \frac{a_t'}{a_t} z_t - \varepsilon\, b_t \left(\frac{a_t'}{a_t} - \frac{b_t'}{b_t}\right)",
          ["rf.Path.conditional_velocity", "rf.Path.derivative", "rf.Path.invert"], ["test_velocity_5_9_10_is_the_derivative_of_2"]),
        R("log-snr", "snr", "λ, the log-SNR", r"\lambda_t = \log\frac{a_t^2}{b_t^2},\quad \lambda_t' = 2\left(\frac{a_t'}{a_t} - \frac{b_t'}{b_t}\right)",
          ["rf.Path.log_snr", "rf.Path.dlog_snr"], ["test_time_inverts_log_snr", "test_coefficients_keep_float32_accuracy"],
          mark="lambda_t"),
        R("eq-10", "path", "(10) the same by the log-SNR", r"u_t(z_t \mid \varepsilon) = \frac{a_t'}{a_t} z_t - \frac{b_t}{2} \lambda_t' \varepsilon",
          ["rf.Path.conditional_velocity", "rf.Path.dlog_snr"], ["test_velocity_5_9_10_is_the_derivative_of_2"],
          picture="log_snr"),
        R("eq-11", "loss", "(11) the loss with the velocity written out", r"\mathcal{L}_{CFM} = \mathbb{E} \left\lVert v_\Theta(z, t) - \frac{a_t'}{a_t} z + \frac{b_t}{2} \lambda_t' \varepsilon \right\rVert^2",
          ["rf.Formulation.examples", "rf.Formulation.pair"], ["test_losses_8_11_12_agree_per_sample"]),
        R("eq-12", "loss", "(12) the loss of a noise prediction", r"\mathcal{L}_{CFM} = \mathbb{E} \left(-\frac{b_t}{2} \lambda_t'\right)^2 \lVert \varepsilon_\Theta(z, t) - \varepsilon \rVert^2",
          ["rf.Formulation.examples", "rf.PREDICTIONS"],
          ["test_losses_8_11_12_agree_per_sample", "test_losses_8_and_12_are_loss_times_the_weight_that_makes_them_equal"],
          "Every prediction is a vector p x0 + q ε of one plane; the table has p and q."),
        R("L_w", "weight", "L_w, the loss with a weight", r"\mathcal{L}_w(x_0) = -\frac{1}{2} \mathbb{E}_{t \sim U,\, \varepsilon}\left[ w_t \lambda_t' \lVert \varepsilon_\Theta(z_t, t) - \varepsilon \rVert^2 \right]",
          ["rf.Formulation.weight"], ["test_loss_is_L_w_with_the_one_line_weight", "test_weights_match_closed_forms"],
          mark="L_w", picture="weights"),
        R("plane", "plane", "both ends from one output", r"\hat{x}_0 = \frac{q z - b o}{\det},\quad \hat{\varepsilon} = \frac{a o - p z}{\det} \\ \det = a q - b p",
          ["rf.Formulation.ends", "rf.Formulation.velocity"], ["test_ends_of_the_exact_output_are_exact", "test_exact_network_gives_exact_ends_velocity_and_rectified_field"],
          "Ours: it is in neither paper, and makes one formula of all 61.", mark="det"),
        R("step", "plane", "the plane's step", r"z_s = a_s \hat{x}_0 + b_s \hat{\varepsilon}",
          ["rf.Formulation.sample"], ["test_plane_step_is_ddim_and_euler", "test_one_plane_step_is_exact_for_a_point_mass"], mark="x0_hat"),
        R("rectified", "plane", "any network is a rectified flow", r"\tilde{t} = \frac{b}{a + b} \\ \tilde{z} = \frac{z}{a + b},\quad \tilde{v}(\tilde{z}, \tilde{t}) = \hat{\varepsilon} - \hat{x}_0",
          ["rf.Formulation.rectified"], ["test_exact_network_gives_exact_ends_velocity_and_rectified_field"], mark="eps_hat - x0_hat"),
    ],
    "SD3, section 3: trajectories and times": [
        R("eq-13", "closed", "(13) the rectified flow", r"z_t = (1 - t)\, x_0 + t\, \varepsilon,\quad w_t^{RF} = \frac{t}{1 - t}",
          ["rf.RectifiedFlow", "rf.rectified_flow_loss"], ["test_the_dozen_lines_are_rf_to_the_last_bit", "test_endpoints", "test_weights_match_closed_forms"],
          "It is at both ends what (2) asks for, all finite, and the network's output is the velocity itself."),
        R("eq-14", "snr", "(14) the path of EDM", r"z_t = x_0 + b_t \varepsilon \\ b_t = \exp F_{\mathcal{N}}^{-1}(t \mid P_m, P_s^2)",
          ["rf.EDM"], ["test_edm_log_snr_is_normal_15", "test_default_grids"]),
        R("eq-15", "snr", "(15) its log-SNR is normal", r"\lambda_t \sim \mathcal{N}(-2 P_m, (2 P_s)^2) \quad \text{for } t \sim U(0, 1)",
          ["rf.EDM"], ["test_edm_log_snr_is_normal_15"]),
        R("eq-16", "edm", "(16) EDM's weight and prediction", r"w_t^{EDM} = \mathcal{N}(\lambda_t \mid -2 P_m, (2 P_s)^2) (e^{-\lambda_t} + 0.5^2)",
          ["rf.edm_prediction", "rf.EDM.c_in"], ["test_edm_prediction_is_the_published_preconditioning", "test_weights_match_closed_forms"]),
        R("eq-17", "closed", "(17) cosine", r"z_t = \cos\left(\frac{\pi}{2} t\right) x_0 + \sin\left(\frac{\pi}{2} t\right) \varepsilon",
          ["rf.Cosine"], ["test_endpoints", "test_weights_match_closed_forms", "test_coefficients_keep_float32_accuracy"],
          "The paper has it with ε, w = sech(λ/2), and with v, w = exp(−λ/2). With ε nothing is known of x0 at t = 1, so t ends at 0.999."),
        R("linear", "edm", "LDM-linear and DDPM-linear", r"b_t = \sqrt{1 - a_t^2} \\ a_t = \sqrt{\prod_{s \le t} (1 - \beta_s)}",
          ["rf.LDMLinear", "rf.DDPMLinear"], ["test_linear_schedules_are_the_published_products", "test_coefficients_derivatives_match_autograd"],
          mark="beta"),
        R("eq-18", "weight", "(18) a density of t is a weight", r"w_t^\pi = \frac{t}{1 - t}\, \pi(t)",
          ["rf.Formulation.weight"], ["test_weights_match_closed_forms", "test_shifted_weight_holds_the_shifted_density"]),
        R("eq-19", "pi", "(19) logit-normal", r"\pi_{ln}(t; m, s) = \frac{1}{s\sqrt{2\pi}}\, \frac{1}{t(1 - t)} \\ \qquad \cdot \exp\left(-\frac{(\operatorname{logit} t - m)^2}{2 s^2}\right)",
          ["rf.LogitNormal"], ["test_densities_integrate_to_one_and_match_their_samplers", "test_densities_at_the_ends"], picture="lognorm"),
        R("eq-20", "pi", "(20) mode", r"f(u; s) = 1 - u - s \left(\cos^2\left(\frac{\pi}{2} u\right) - 1 + u\right) \\ \pi_{mode}(t; s) = \left| \frac{d}{dt} f^{-1}(t) \right|",
          ["rf.Mode"], ["test_densities_integrate_to_one_and_match_their_samplers", "test_mode_at_its_ends_integrates_in_u"], picture="mode"),
        R("eq-21", "pi", "(21) CosMap's map", r"t = f(u) = 1 - \frac{1}{\tan\left(\frac{\pi}{2} u\right) + 1}",
          ["rf.CosMap"], ["test_cosmap_gives_rf_the_cosine_log_snr", "test_densities_integrate_to_one_and_match_their_samplers"]),
        R("eq-22", "pi", "(22) CosMap's density", r"\pi_{CosMap}(t) = \frac{2}{\pi - 2\pi t + 2\pi t^2}",
          ["rf.CosMap.density"], ["test_densities_integrate_to_one_and_match_their_samplers"], picture="cosmap"),
    ],
    "SD3, sections 4 and 5: the network and the study": [
        R("mmdit", "network", "§ 4, figure 2a: MM-DiT", r"y = \operatorname{MLP}(t) + \operatorname{MLP}(c_{vec}) \\ \text{tokens} = [\, c_{ctxt},\, x \,]",
          ["mmdit.MMDiT.forward", "mmdit.MMDiT.mixed"], ["test_equals_the_slow_rewrite", "test_names_are_the_released_ones", "test_zero_at_initialisation"],
          "The paper's c_ctxt is `context`, its c_vec `pooled`, its y `c`. It does not say how weights start, nor how the positions are scaled: `MMDiT.initialize_layer` and `position_table` say what we chose.", mark="context"),
        R("block", "network", "figure 2b: the block", r"\operatorname{softmax}\left(\frac{q k^\top}{\sqrt{64}}\right) v \\ q, k, v \text{ of both streams}",
          ["mmdit.JointBlock.forward", "mmdit.StreamBlock.pre_attention", "mmdit.StreamBlock.post_attention", "mmdit.attend"],
          ["test_equals_the_slow_rewrite", "test_both_streams_have_residuals", "test_the_last_context_is_pre_only"], mark="softmax"),
        R("dit", "network", "§ 5.2: DiT, with one set of weights", r"\theta_{ctxt} = \theta_x",
          ["mmdit.DiTBlock"], ["test_sharing_equals_copying_the_weights", "test_the_shared_network_has_one_set_of_weights"], mark="one set of weights"),
        R("guidance", "network", "classifier-free guidance", r"v = v_{uncond} + s\, (v_{cond} - v_{uncond})",
          ["rf.guide"], ["test_guidance_is_one_doubled_batch"], mark="v_uncond"),
        R("names", "names", "§ 5.1: 61 formulations", r"4 + 9 + 30 + 1 + 15 + 2 = 61",
          ["rf.formulation", "rf._FORMULATIONS", "rf.STUDY"], ["test_the_study_has_61_names_that_mean_what_they_say", "test_sample_of_the_exact_network_lands_on_the_mixture"],
          "The grids of lognorm and of edm are our reading of the paper's ranges.", mark="paper's name"),
        R("shift", "names", "§ 5.3.2: the shift for large pictures", r"t_m = \frac{\sqrt{m/n}\; t_n}{1 + (\sqrt{m/n} - 1)\, t_n}",
          ["rf.Path.shift"], ["test_shift_is_5_3_2_and_applied_once", "test_large_pictures_have_the_exact_velocity"], mark="5.3.2", picture="shift"),
    ],
    "PeRFlow": [
        R("windows", "windows", "the windows", r"1 = t_K > \dots > t_1 > t_0 = 0,\quad t_{k-1} < t \le t_k",
          ["perflow.PeRFlow.window"], ["test_window_holds_t_and_its_start_belongs_to_it"], mark="t_{k-1} < t <= t_k"),
        R("times", "windows", "which t is drawn", r"t = 1 - \frac{\lfloor u N \rfloor}{N},\quad u \sim U[0, 1)",
          ["perflow.PeRFlow.draw"], ["test_discrete_times_are_the_official_ones_and_equally_likely"],
          "The paper's text has t ~ U[0, 1]; its code has N = 1000, 200 or 40. Ours is four times a window.", mark="floor(uN)/N"),
        R("phi", "phi", "Φ, the solve of one window", r"\hat{z}_{t_{k-1}} = \Phi(z_{t_k}, t_k, t_{k-1}) \\ z_{t_k} = a_{t_k} x_0 + b_{t_k} \varepsilon",
          ["perflow.PeRFlow.solve_window"], ["test_ends_reach_the_true_flow_to_the_solvers_order", "test_euler_on_a_linear_path_is_ddim"], mark="Phi"),
        R("line", "line", "the line, and its slope", r"z_t = z_s + \frac{t - t_s}{t_e - t_s} (\hat{z}_e - z_s) \\ \text{target} = \frac{\hat{z}_e - z_s}{t_e - t_s}",
          ["perflow.PeRFlow._line", "perflow.PeRFlow.pair"], ["test_z_t_lies_on_the_line", "test_a_point_mass_is_straight_already"], mark="z_s", picture="window"),
        R("eps-star", "line", "ε*, the noise target", r"\varepsilon^\ast = \frac{\hat{z}_e - \lambda_k z_s}{\eta_k} \\ \lambda_k = \frac{a_e}{a_s},\quad \eta_k = b_e - \frac{a_e}{a_s} b_s",
          ["perflow.PeRFlow._ddim", "perflow.PeRFlow._line", "perflow.PeRFlow.velocity"],
          ["test_epsilon_gives_the_lines_slope_from_any_point_of_it", "test_both_parameterizations_have_one_minimiser", "test_diff_eps_is_the_noise_that_leads_from_the_windows_end_to_its_start"],
          "For linear paths only, where a is never 0. The authors' code for SD1.5 has another η.", mark="lambda_k"),
        R("sampler", "sampler", "n ≥ K Euler steps", r"n = \sum_k n_k \\ n_k \ge 1,\quad \text{no step crosses an edge } t_k",
          ["perflow.PeRFlow.grid", "perflow.PeRFlow.sample"], ["test_steps_never_cross_an_edge", "test_a_perfect_student_samples_as_the_teacher_in_any_number_of_steps"], mark="steps"),
        R("delta-w", "sampler", "ΔW", r"\Delta W = W_{PeRFlow} - W_{teacher}",
          ["perflow.delta", "perflow.plug"], ["test_plugging_the_delta_onto_the_teacher_gives_the_student"], mark="Delta W"),
    ],
}  # fmt: skip
