"""Lists which test defends against which bug of other systems.

`REPLAY` holds published bugs of routing replay, `CORRUPTION` those that silently corrupted
importance weights, masks or rows. References are issues and pull requests of the named projects.
Tests written for one of them alone are in test_bugs_of_replay.py and test_bugs_of_weights.py.

These cannot occur here, because the part that broke does not exist:

- a fused router kernel that returns before the hook of replay (Megatron-LM, AReaL#1496): no hook;
  choice and gates are two functions, the same for every implementation of the experts
- routes bound to modules that were thrown away (miles#2570, verl#4562, NeMo-RL#2590), or held in a
  registry of the process (verl#7786, verl#7805): modules hold no routes; a routing is an argument
- queues and cursors of choices for recomputation (SkyRL#1908, slime): choices are inputs of the
  layer, recomputed or not
- positions cut or packed in training, but not their routes (SkyRL#1335, ART#721, verl#7106):
  positions are never cut or packed alone, only rows with all their arrays
- routes of cached prefixes, stitched (prime-rl#2648) or left from other requests (vLLM#39568):
  each prompt is run in full; no request outlives a rollout
- routes off by one where turns meet (prime-rl#1807, verifiers#2544, AReno#522): one turn only
- too little replayed (miles#2722): order is kept and gates are live; gate weights are not recorded
"""

import ast
import pathlib

import pytest

REPLAY = {
    "crash: an expert twice in padding rows (miles#1002, verl#4986)": [
        "catalogue/test_bugs_of_replay.py::test_padding_may_name_one_expert_k_times",
        "model/test_replay.py::test_padding_rows_of_the_routing_do_not_matter",
        "test_routing.py::test_an_expert_twice_is_refused_with_its_place",
    ],
    "no effect: an implementation bypasses replay (Megatron-LM, AReaL#1496)": [
        "model/test_experts.py::test_implementations_agree",
        "trainer/test_update.py::test_replay_reaches_the_update",
    ],
    "no effect: sequences with padding skipped (miles#645)": [
        "catalogue/test_bugs_of_replay.py::test_every_row_is_replayed_padded_or_not",
        "model/test_router_kinds.py::test_layer_equals_the_reference",
    ],
    "no effect: routes lost on the way (AReno#524, NeMo-RL#2849, slime#1145, slime#1909)": [
        "catalogue/test_bugs_of_replay.py::test_routing_cannot_be_left_out",
        "trainer/test_update.py::test_split_keeps_rows_together",
    ],
    "worse: dense layers counted (verl#5037)": [
        "catalogue/test_bugs_of_replay.py::test_routing_of_another_layer_is_noticed",
        "model/test_replay.py::test_layers_are_counted_without_the_dense_ones",
        "model/test_replay.py::test_wrong_layers_show",
        "test_routing.py::test_rows_of_dense_layers_are_refused",
    ],
    "worse: rows off by one (verl#7106, miles#645, AReno#524)": [
        "trainer/test_update.py::test_one_token_shift_of_the_routing_is_noticed",
        "model/test_replay.py::test_a_shift_by_one_token_shows",
        "model/test_replay.py::test_replay_reaches_only_later_tokens",
        "sampler/test_rollout.py::test_routing_covers_every_fed_token",
    ],
    "worse: tokens permuted, routes not (SkyRL#1335)": [
        "catalogue/test_bugs_of_replay.py::test_routing_of_another_row_is_noticed",
        "sharding/test_meshes.py::test_meshes_agree_with_one_device",
    ],
    "worse: physical ids for logical ones (TensorRT-LLM#17778)": [
        "catalogue/test_bugs_of_replay.py::test_physical_expert_ids_are_noticed",
    ],
    "no gradient of the router: gates from masked scores (ISEEKYAN/Megatron-LM#49, #79)": [
        "model/test_router_kinds.py::test_drifted_experts_have_gates_and_gradients",
        "model/test_router_kinds.py::test_layer_equals_the_reference",
        "model/test_replay.py::test_gradient_of_the_router_equals_finite_differences",
        "trainer/test_update.py::test_router_has_gradient_under_replay",
    ],
    "empty buffers: routes bound to dead modules (miles#2570, verl#4562, NeMo-RL#2590)": [
        "catalogue/test_bugs_of_replay.py::test_a_model_that_is_built_twice_is_replayed_all_the_same",
    ],
    "load drifts: padding counted, or sent to the first experts (SkyRL#2091, prime-rl#3350)": [
        "catalogue/test_bugs_of_replay.py::test_padding_may_name_one_expert_k_times",
        "model/test_router_kinds.py::test_padding_reaches_nothing",
        "trainer/test_update.py::test_padding_rows_and_columns_added",
    ],
    "replay of the teacher, the sampler or an evaluation (NeMo-RL#4083)": [
        "catalogue/test_bugs_of_replay.py::test_models_of_one_program_have_their_own_routing",
        "catalogue/test_bugs_of_replay.py::test_sampling_and_evaluation_cannot_be_replayed",
    ],
    "wrong gradients of recomputation (SkyRL#1908)": [
        "catalogue/test_bugs_of_replay.py::test_recomputation_replays_each_micro_batch",
        "model/test_transformer.py::test_execution_changes_nothing",
    ],
    "expert 255: −1 in uint8 (sglang#9499); no room for it at 256 experts (prime-rl#3051)": [
        "catalogue/test_bugs_of_replay.py::test_a_minus_one_stored_in_uint8_is_loud",
        "catalogue/test_bugs_of_replay.py::test_the_last_of_256_experts_is_an_expert",
        "test_routing.py::test_experts_out_of_range_are_refused",
        "test_routing.py::test_dtype_of_experts",
        "model/test_experts.py::test_more_than_256_experts_are_reported_as_uint16",
    ],
    "stale rows (sglang#36404)": [
        "catalogue/test_bugs_of_replay.py::test_stale_rows_are_found_where_they_are",
        "sampler/test_rollout.py::test_routing_equals_that_of_the_training_forward",
    ],
    "runs fail, or change, with replay off (verl#7786, verl#7805)": [
        "catalogue/test_bugs_of_replay.py::test_without_replay_there_is_no_trace_of_it",
        "model/test_replay.py::test_replay_without_valid_rows_is_the_ordinary_pass",
    ],
}

CORRUPTION = {
    "routers disagree, nobody sees how often (Megatron-LM#4168)": [
        "trainer/test_update.py::test_r2_and_r3_differ_when_the_sampler_is_quantized",
        "trainer/test_update.py::test_r3_lowers_the_mismatch",
        "diagnostics/test_router_metrics.py::test_routing_agreement_by_hand",
    ],
    "settings that exclude each other accepted (verl#7805)": [
        "catalogue/test_bugs_of_replay.py::test_objectives_that_replay_score_first",
        "trainer/test_update.py::test_experiment_config_errors",
    ],
    "R2 is no identity in the first mini-batch (Table 1 of the paper)": [
        "trainer/test_update.py::test_r2_is_the_identity_in_the_first_mini_batch",
        "model/test_router_kinds.py::test_replay_of_the_live_choice_is_the_ordinary_pass_bit_for_bit",
    ],
    "tokens without a route (prime-rl#1807, verifiers#2544)": [
        "model/test_replay.py::test_replayed_experts_equal_the_reference",
        "model/test_router_kinds.py::test_layer_equals_the_reference",
        "test_routing.py::test_rows_without_a_choice_are_not_checked",
        "catalogue/test_bugs_of_replay.py::test_valid_is_a_mask_and_nothing_else",
    ],
    "slot order and gate weights (miles#2722)": [
        "model/test_router_kinds.py::test_slots_keep_their_order",
        "model/test_router_kinds.py::test_gates_equal_the_reference",
        "trainer/test_update.py::test_r2_equals_r3_when_sampler_and_trainer_are_one",
    ],
    "truncated sampling biases the ratio (trl#6789)": [
        "catalogue/test_bugs_of_weights.py::test_truncated_sampling_records_the_log_probs_of_the_trainer",
        "sampler/test_rollout.py::test_truncated_sampling_records_untruncated_log_probs",
    ],
    "temperature on one side (trl#4159)": [
        "catalogue/test_bugs_of_weights.py::test_temperature_on_one_side_is_stopped",
        "catalogue/test_bugs_of_weights.py::test_score_and_update_are_bound_to_the_same_settings",
        "sampler/test_rollout.py::test_temperature_is_the_same_on_both_sides",
    ],
    "sum for mean (trl#5814), sum of exp for exp of sum (unsloth-zoo#870), old for current policy"
    " (slime#179)": [
        "catalogue/test_bugs_of_weights.py::test_golden_weights_are_of_tokens_and_of_the_current_policy",
        "objectives/test_minirl.py::test_gradient_equals_numpy_derivation",
        "objectives/test_minirl.py::test_hand_computed",
    ],
    "fused loss without the weights (Liger-Kernel#1088)": [
        "catalogue/test_bugs_of_weights.py::test_the_fused_loss_has_the_weights_of_the_plain_one",
        "model/test_head.py::test_gradients_equal_those_without_chunks",
    ],
    "ratio ≠ 1 on policy: other micro-batches (verl#6280)": [
        "catalogue/test_bugs_of_weights.py::test_score_and_update_are_bound_to_the_same_settings",
        "trainer/test_update.py::test_ratio_is_one_right_after_score",
        "trainer/test_update.py::test_micro_batches_recut",
        "test_errors.py::test_first_mini_batch_that_disagrees_stops_the_run",
    ],
    "rewards of other samples (verl#2185, verl#1943, JustRL#5)": [
        "catalogue/test_bugs_of_weights.py::test_rows_of_a_whole_step_permuted",
        "trainer/test_update.py::test_rows_permuted",
        "run/test_judge.py::test_responses_are_decoded_without_prompt_stop_token_and_padding",
    ],
    "NaN or None from the sampler (trl#6166)": [
        "catalogue/test_bugs_of_weights.py::test_log_probs_that_the_sampler_could_not_give",
        "catalogue/test_bugs_of_weights.py::test_missing_log_probs_are_refused",
        "objectives/test_minirl.py::test_padding_can_hold_anything",
        "trainer/test_update.py::test_non_finite_gradient_is_skipped_and_counted",
        "run/test_gates.py::test_run_of_skipped_steps_stops",
    ],
}


@pytest.mark.fast
@pytest.mark.parametrize("bug", [*REPLAY, *CORRUPTION])
def test_the_tests_of_each_bug_exist(bug):
    """A test that is renamed or dropped would leave its bug without a test: update the list."""
    folder = pathlib.Path(__file__).parents[1]
    for entry in (REPLAY | CORRUPTION)[bug]:
        file, name = entry.split("::")
        tree = ast.parse((folder / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{entry} is gone"
