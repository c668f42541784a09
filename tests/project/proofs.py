"""For each row of docs/features.md, tests that would fail without it: file below tests/ :: function."""

from __future__ import annotations

_COMBINED = "operations/test_combinations.py::test_pairs_are_right"

PROOFS: dict[str, tuple[str, ...]] = {
    "Inference with given statistics: any rank from 2, any channel axis, gamma, beta or neither": (
        "operations/test_layouts.py::test_every_axis",
        "operations/test_numerics.py::test_inference_passes_inf_and_nan_on",
        _COMBINED,
    ),
    "Batch statistics, stable without being asked; `ddof`, `keepdims`": (
        "operations/test_moments.py::test_exact_data_has_exact_moments",
        "operations/test_moments.py::test_ddof_divides_by_count_less_ddof",
        "operations/test_moments.py::test_result",
    ),
    "Training forward: statistics, affine map and running statistics in one call": (
        _COMBINED,
        "operations/test_running.py::test_the_step",
    ),
    "Given statistics with a backward pass: frozen layers": (
        "operations/test_properties.py::test_inference_is_training_with_given_statistics",
        "operations/test_running.py::test_given_statistics_and_the_update_are_apart",
    ),
    "Backward: dx, dgamma, dbeta, dresidual, from what the forward left": (
        _COMBINED,
        "operations/test_gradients.py::test_the_reference_differentiates_itself",
        "operations/test_saved.py::test_results_are_a_pair",
    ),
    "Selective gradients: what is not asked for is not computed": (
        "operations/test_gradients.py::test_needs_selects_without_changing_bits",
    ),
    "Statistics of one's own, with the same backward": (
        "operations/test_saved.py::test_it_can_be_made_of_stored_statistics",
    ),
    "A changed or overwritten x is noticed in most cases": (
        "operations/test_saved.py::test_an_overwritten_tensor_is_noticed",
        "operations/test_saved.py::test_out_over_x_wants_keep_y",
    ),
    "No tensor kept at all: x comes back at backward": (
        "operations/test_saved.py::test_x_may_come_with_backward",
        "operations/test_saved.py::test_what_it_keeps_alive",
    ),
    "Double backward, exact, of every combination; there is no third": (
        "operations/test_double_backward.py::test_everything_combines",
        "operations/test_double_backward.py::test_errors",
    ),
    "Moving averages: `decay` weighs the old value; a number or one per channel": (
        "operations/test_running.py::test_the_step",
        "operations/test_running.py::test_decay_one_keeps_every_bit_and_zero_takes_the_batch",
    ),
    "Cumulative average, weighted by the number of values": (
        "operations/test_running.py::test_a_cumulative_average_is_the_average_of_all_batches",
    ),
    "TF warm-up, min(decay, (1 + n) / (10 + n))": (
        "layer/test_statistics.py::test_decays_of_single_steps",
        "layer/test_statistics.py::test_the_running_statistics_are_the_weighted_average_of_the_batches",
    ),
    "Zero-debias of mean and variance, exact for any initial value": (
        "layer/test_statistics.py::test_the_running_statistics_are_the_weighted_average_of_the_batches",
        "layer/test_statistics.py::test_absent_at_first_means_no_share_of_the_initial_value",
    ),
    "Variance estimator: normalised with n, kept with n - `running_ddof`": (
        "operations/test_running.py::test_unbiased_variance_in_exact_numbers",
    ),
    "Guard against NaN and Inf in running statistics": (
        "operations/test_running.py::test_on_nonfinite",
        "operations/test_errors.py::test_raise_on_nonfinite_writes_nothing_in_place_either",
    ),
    "Layouts NC to NDHWC; other libraries' words are translated": (
        "operations/test_layouts.py::test_data_format_is_an_alias_of_channel_axis",
        "operations/test_layouts.py::test_right_from_any_layout",
        "operations/test_errors.py::test_error",
    ),
    "Several channel axes: statistics per activation": (
        "operations/test_layouts.py::test_several_channel_axes_are_one",
        "layer/test_calls.py::test_several_channel_axes",
        "data/test_accumulator.py::test_axes",
    ),
    "Fused activations relu, leaky_relu, relu6, sigmoid, tanh, silu": (
        "operations/test_activations.py::test_values_and_derivatives",
        "operations/test_activations.py::test_fused_has_the_bits_of_two_calls",
    ),
    "Residual and activation in one pass, one bit per element kept": (
        "operations/test_activations.py::test_the_gradient_of_the_residual_is_dy_bit_for_bit",
        "operations/test_saved.py::test_bytes",
    ),
    "In place: `out=x` forward, in training too, `out=dy` backward": (
        "operations/test_inplace.py::test_in_place_with_every_option",
        "operations/test_inplace.py::test_any_geometry_of_overlap",
    ),
    "Backward from y: gamma of any sign, small gamma by itself": (
        "operations/test_saved.py::test_y_is_kept_as_long_as_it_tells_x",
        "operations/test_saved.py::test_memory_of_training_in_place",
    ),
    "Mask, lengths, weights, read by rank: padding is not there": (
        "operations/test_layouts.py::test_masks_and_weights_are_read_by_rank",
        "operations/test_layouts.py::test_lengths_are_a_mask",
        "operations/test_properties.py::test_weights_repeat_and_masks_leave_out",
        "operations/test_properties.py::test_what_does_not_count_is_not_read",
    ),
    "A mask of x's shape: counts, statistics and updates per channel": (
        "operations/test_errors.py::test_a_mask_of_the_shape_of_x_counts_each_channel",
        "operations/test_running.py::test_channels_without_two_values_stay_as_they_are",
        "layer/test_statistics.py::test_a_channel_has_the_statistics_of_the_batches_that_it_was_in",
    ),
    "Batch renormalisation with clipping and a decay of its own": (
        _COMBINED,
        "operations/test_running.py::test_a_reference_of_its_own_moves_by_its_own_decay",
    ),
    "Ghost batches, ragged ones too; instance normalisation": (
        "operations/test_determinism.py::test_a_part_has_the_bits_of_a_call_on_it_alone",
        "operations/test_running.py::test_parts_enter_by_their_average",
        "operations/test_saved.py::test_statistics_have_rows_if_parts_were_asked_for",
    ),
    "Scale and shift per sample, gamma and beta of shape (N, C)": (_COMBINED,),
    "One batch over several processes: the same bits for any cut, failures for all": (
        "group/test_group.py::test_any_cut_and_order_give_the_same_bits",
        "group/test_group.py::test_a_rank_that_fails_fails_all",
        "group/test_processes.py::test_mpi",
    ),
    "The whole batch's gradients of gamma and beta, exactly": (
        "group/test_group.py::test_any_cut_and_order_give_the_same_bits",
    ),
    "Every combination of these that mathematics allows": (
        "operations/test_combinations.py::test_everything_combines",
        "operations/test_combinations.py::test_pairs_have_the_same_bits_everywhere",
    ),
    "Arrays of other libraries, buffers, and lists per channel, where they are only read": (
        "operations/test_arrays.py::test_every_array_that_is_read_may_be_foreign",
        "operations/test_arrays.py::test_without_a_copy",
        "operations/test_arrays.py::test_sequences_of_numbers_are_values_per_channel_and_position",
    ),
    "Arrays of a GPU: PyTorch's, CuPy's, by DLPack or CUDA's interface; the CPU's bytes": (
        "cuda/test_rehearsal.py::test_every_option_has_the_bits_of_the_cpu",
        "cuda/test_rehearsal.py::test_inference",
        "cuda/test_rehearsal.py::test_work_goes_to_the_stream_of_x_and_waits_for_the_others",
        "cuda/test_torch.py::test_every_option_has_the_bits_of_the_cpu",
        "cuda/test_cupy.py::test_every_option_has_the_bits_of_the_cpu",
    ),
    "Integer images: exact sums, floating output, channels moved on the way": (
        "operations/test_moments.py::test_moments_of_integers_are_correctly_rounded",
        "data/test_images.py::test_channels_last_to_first",
        "data/test_images.py::test_training_on_integers",
    ),
    "Image preprocessing; statistics in impossible units are an error": (
        "data/test_images.py::test_every_byte_is_correctly_rounded",
        "data/test_images.py::test_statistics_that_no_image_has_are_refused",
    ),
    "Accumulated moments: merged in any order with the same bits, plain arrays as state": (
        "data/test_accumulator.py::test_order_and_grouping_do_not_matter",
        "data/test_accumulator.py::test_state_through_a_file",
    ),
    "Accumulators of several processes merged, with MPI in a tree": (
        "group/test_group.py::test_allreduce_of_accumulators",
        "group/test_processes.py::test_mpi",
    ),
    "No-data values and masked arrays in statistics": (
        "data/test_counting.py::test_nodata",
        "data/test_counting.py::test_nothing_hidden_and_all_hidden",
    ),
    "Statistics of data larger than memory, of any file format": (
        "data/test_dataset.py::test_a_gigabyte_needs_no_gigabyte",
        "data/test_dataset.py::test_read_gets_every_path",
        "data/test_dataset.py::test_statistics_in_units_of_max_value",
    ),
    "Dask arrays: a task a block, masks too, one thread each, errors that name the block": (
        "data/test_dask.py::test_blocks_are_merged_as_batches_are",
        "data/test_dask.py::test_masked_values_of_any_kind",
        "data/test_dask.py::test_each_block_is_read_once_and_soon_let_go",
        "data/test_dask.py::test_threads_of_a_task",
        "data/test_dask.py::test_errors",
    ),
    "Dask arrays and bags as data sets; the same bits on every scheduler, in any order": (
        "data/test_dask.py::test_bits_depend_on_neither_scheduler_nor_order_nor_tree",
        "data/test_dask.py::test_a_cluster_has_the_same_bits_also_when_workers_die",
        "data/test_dask.py::test_pieces_of_a_sample_have_the_same_bits_however_samples_are_cut",
        "data/test_dask.py::test_a_bag_of_files",
    ),
    "Images and inference of Dask arrays, lazily, block by block": (
        "data/test_dask.py::test_normalize_images",
        "data/test_dask.py::test_batch_norm",
        "data/test_dask.py::test_batch_norm_of_integers",
    ),
    "Flat states to send and merge: versioned, of either byte order": (
        "data/test_accumulator.py::test_flat_states_are_merged_as_accumulators_are",
        "data/test_accumulator.py::test_the_flat_state_of_another_byte_order",
        "data/test_accumulator.py::test_bad_arrays",
    ),
    "The same bits for any threads, instruction set, alignment; every digit at any mean": (
        "operations/test_determinism.py::test_levels_and_threads",
        "operations/test_determinism.py::test_address_of_input",
        "operations/test_numerics.py::test_variance_of_ill_conditioned_data",
        "operations/test_numerics.py::test_float64_from_1e_300_to_1e300",
    ),
    "Folding into the weights of any dense or convolution layer": (
        "operations/test_fold.py::test_every_layout",
        "operations/test_fold.py::test_eps_and_out_axis_have_no_default",
    ),
    # ---- the layer
    "PyTorch models diagnosed as they are, by module path, nothing changed": (
        "pytorch/test_diagnose.py::test_each_fault_is_told_with_its_layer",
        "pytorch/test_diagnose.py::test_what_it_finds_is_the_layers_own",
        "pytorch/test_diagnose.py::test_bad_input_changes_nothing",
    ),
    "A diagnosis as a table, a picture, JSON": (
        "pytorch/test_diagnose.py::test_numbers_for_people_and_programs",
    ),
    "PyTorch models recalibrated exactly, over several processes too": (
        "pytorch/test_recalibrate.py::test_each_layer_has_exactly_what_it_meets",
        "pytorch/test_recalibrate.py::test_several_processes_have_the_statistics_of_all",
    ),
    "PyTorch models folded, proven before they are returned": (
        "pytorch/test_fold.py::test_every_layer",
        "pytorch/test_fold.py::test_what_would_change_the_output_is_left",
    ),
    "PyTorch modules on the CPU: same state, same results, both orders of gradients": (
        "pytorch/test_proof.py::test_module_info",
        "pytorch/test_proof.py::test_op_info",
        "pytorch/test_proof.py::test_gradcheck_and_gradgradcheck",
        "pytorch/test_modules.py::test_values_that_the_functions_refuse",
        "pytorch/test_modules.py::test_it_keeps_the_input_as_pytorch_does",
    ),
    "The same modules on a GPU, in captured graphs too": (
        "cuda/test_torch.py::test_modules_have_the_bits_of_the_cpu",
        "cuda/test_on_a_gpu.py::test_a_module_trains_in_a_captured_graph",
    ),
    "Batch norm, residual and activation as one PyTorch module": (
        "pytorch/test_modules.py::test_fused_activations",
        "pytorch/test_proof.py::test_gradients_behind_an_activation",
    ),
    "Synchronised statistics on the CPU, parts of any size": (
        "pytorch/test_modules.py::test_synchronised_statistics_are_those_of_the_whole_batch",
        "pytorch/test_modules.py::test_ddp_and_faults_of_one_process",
    ),
    "A model's batch norms converted and back, with the ReLU behind them": (
        "pytorch/test_modules.py::test_convert_and_revert",
    ),
    "Keras 3 models diagnosed and recalibrated, on any backend": (
        "keras3/test_keras.py::test_each_fault_is_told_with_its_layer",
        "keras3/test_keras.py::test_each_layer_has_exactly_what_it_meets",
        "keras3/test_keras.py::test_on_each_backend",
    ),
    "Keras 3 models folded, compared before they are returned": (
        "keras3/test_keras.py::test_fold",
        "keras3/test_keras.py::test_what_is_not_folded",
    ),
    "Lazy channel count; a given one is checked; a guess that looks wrong is said": (
        "layer/test_lazy.py::test_a_lazy_layer_is_as_one_with_a_count",
        "layer/test_lazy.py::test_another_channel_count_is_told_of_x",
        "layer/test_lazy.py::test_channels_that_seem_to_be_last_are_asked_about",
    ),
    "A name, which warnings, reports and errors say": (
        "layer/test_statistics.py::test_cold_statistics_warn_once_with_numbers_and_the_name",
        "layer/test_errors.py::test_errors_of_other_methods_say_the_name_too",
    ),
    "`scale` and `center` independent; absent ones have no gradient": (
        "layer/test_backward.py::test_parameters_are_what_the_layer_has",
    ),
    "Gamma and beta that come with the call": (
        "layer/test_calls.py::test_scale_and_shift_may_come_with_the_call",
    ),
    "Train and eval, override per call, Python and NumPy bools only": (
        "layer/test_calls.py::test_the_mode_decides_what_a_call_does",
        "layer/test_calls.py::test_flags_are_bools",
    ),
    "Statistics and update chosen per call": (
        "layer/test_calls.py::test_statistics_and_update_are_independent",
    ),
    "Frozen layers survive train()": (
        "layer/test_calls.py::test_a_frozen_layer_survives_train",
        "layer/test_calls.py::test_no_update",
    ),
    "Eval never writes; a row's result does not depend on its batch": (
        "layer/test_calls.py::test_eval_never_writes",
        "layer/test_calls.py::test_a_row_in_eval_does_not_depend_on_its_batch",
    ),
    "One layer used twice; a gradient that would be lost is an error": (
        "layer/test_backward.py::test_one_layer_two_inputs",
        "layer/test_backward.py::test_gradient_accumulation",
    ),
    "Statistics never updated are an error that says what to do": (
        "layer/test_statistics.py::test_statistics_that_were_never_updated_are_an_error",
    ),
    "Cold statistics warn, with numbers": (
        "layer/test_statistics.py::test_cold_statistics_warn_once_with_numbers_and_the_name",
    ),
    "Training good, test bad: why?": (
        "layer/test_diagnose.py::test_never_updated",
        "layer/test_diagnose.py::test_cold_statistics_are_not_called_mismatched",
        "layer/test_diagnose.py::test_mismatched_names_the_channels_worst_first",
    ),
    "The same for a network": (
        "layer/test_diagnose.py::test_every_layer_of_a_network_is_looked_at",
        "layer/test_recalibrate.py::test_no_update_and_freeze_of_a_network",
    ),
    "Recalibrate: exactly one giant batch; from batches or a Moments": (
        "layer/test_recalibrate.py::test_the_statistics_are_those_of_one_giant_batch",
        "layer/test_recalibrate.py::test_a_moments_is_as_good_as_its_batches",
        "layer/test_recalibrate.py::test_one_by_one_gives_the_statistics_that_eval_meets",
    ),
    "Training and recalibration over several processes": (
        "group/test_group.py::test_a_layer_trains_to_the_same_bits",
        "group/test_group.py::test_recalibrate_a_network",
    ),
    "State in, new state out, nothing mutated": (
        "layer/test_copies.py::test_a_chain_of_states_is_what_a_layer_goes_through",
    ),
    "Snapshot and rollback: a rejected step has not counted": (
        "layer/test_copies.py::test_a_rejected_step_has_not_counted",
    ),
    "Sharing parameters, statistics, or both": (
        "layer/test_copies.py::test_what_is_shared_is_the_same_array_and_the_rest_is_apart",
    ),
    "Parameters, live; what to exclude from weight decay": (
        "layer/test_backward.py::test_a_parameter_is_a_view",
        "layer/test_backward.py::test_weight_decay_groups",
    ),
    "Initial values: arrays, scalars or callables": (
        "layer/test_lazy.py::test_initial_values",
        "layer/test_lazy.py::test_bad_initial_values",
    ),
    "Save, load, continue: the same bits; strict; no pickle; files of 0.1": (
        "io/test_layer_state.py::test_save_load_continue_is_bitwise_equal",
        "io/test_layer_state.py::test_files_of_version_0_1_load_and_continue",
        "io/test_npz.py::test_a_pickle_is_never_read",
    ),
    "pickle, deepcopy, repr": (
        "layer/test_copies.py::test_copies_are_whole_and_apart",
        "layer/test_settings.py::test_repr",
    ),
    "A frozen layer as factor and summand per channel, or folded": (
        "project/test_programs.py::test_program",
    ),
    "Renormalisation, ghost batches, kept y, several channel axes in the layer": (
        "layer/test_calls.py::test_everything_together_is_that_of_the_functions",
        "layer/test_backward.py::test_with_keep_y_a_layer_works_in_place",
    ),
    "Batch against running statistics over time, as a picture": (
        "layer/test_history.py::test_the_picture",
        "layer/test_history.py::test_memory_is_bounded_and_the_whole_of_training_stays_in_view",
    ),
    "One table of names: PyTorch, Keras, TensorFlow, Flax, Haiku, MXNet, as dictionaries": (
        "io/test_norms.py::test_names_of_other_libraries",
        "io/test_norms.py::test_several_formats_at_once_and_their_order",
    ),
    "A layer of each, whose training goes on as there; and back": (
        "io/test_norms.py::test_there_and_back",
        "io/test_files.py::test_pytorch_and_here_do_the_same_and_train_alike",
        "io/test_files.py::test_training_goes_on_as_in_caffe",
    ),
    "Files: .safetensors, .pt, Keras, ONNX, Caffe, read without trust": (
        "io/test_files.py::test_there_and_back",
        "io/test_hostile.py::test_pickles_are_never_read",
        "io/test_hostile.py::test_flipped_bits_and_other_damage",
    ),
    "What is in a model file, and what looks wrong there": (
        "io/test_inspection.py::test_findings",
        "io/test_files.py::test_a_gigabyte_is_not_read",
    ),
    "From file to file; what the target cannot hold is said": (
        "io/test_inspection.py::test_from_every_kind_to_every_other",
        "io/test_inspection.py::test_what_is_not_carried_is_said",
    ),
    "ONNX models folded, and checked by running them; .safetensors and .pt by pairs": (
        "io/test_folding.py::test_every_layer",
        "io/test_folding.py::test_a_fold_that_would_be_wrong_is_not_written",
        "io/test_folding.py::test_state_dicts",
    ),
}
