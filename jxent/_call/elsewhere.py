"""The names that other libraries give arguments, and the answers of jxent's errors to these names.

`tests/names_elsewhere.txt` lists the libraries, and the answer of each function to each name.
"""

IS = {
    "log_probs": "log-probabilities",
    "logits_p": "logits or log-probabilities of P: the teacher's, or the student's for the reverse divergence",
    "logits_q": "logits or log-probabilities of Q: the student's, or the teacher's for the reverse divergence",
    "hidden_p": "of P: the teacher's, or the student's for the reverse divergence",
    "hidden_q": "of Q: the student's, or the teacher's for the reverse divergence",
    "kernel": "the output layer's weights, with vocab_axis=0 where their shape is (vocab, features)",
    "kernel_p": "of P, with vocab_axis=0 where its shape is (vocab, features)",
    "kernel_q": "of Q, with vocab_axis=0 where its shape is (vocab, features)",
    "class_weight": "one number per class",
    "sample_weight": "one number per position",
    "where": "boolean, True for what counts",
    "reduction": '"mean", "sum" or "none"',
    "beta": "the share of P",
    "block_size": "the number of positions at once",
    "return_stats": "it adds all of Stats",
    "axis_name": "the mesh axis that shards the classes",
    "batch_axis_name": "the mesh axis that shards the positions",
}
"""The remark that an error adds to the jxent name of an argument."""

# Each answer is for a function that has the argument before the colon.
TO_LINEAR = (
    "class_weight: linear_cross_entropy takes hidden states and a kernel",
    "logits_q: the function with linear_ in front takes hidden states and kernels",
)
TO_LOGITS = (
    "hidden: here logits are made of hidden and kernel; cross_entropy and sigmoid_cross_entropy take logits",
    "hidden_q: here logits are made of hidden states and kernels; the function without linear_ in front takes logits",
)
LEFT_OUT = tuple(
    f"{name}: leave these positions out with where=, as in where=labels != -100"
    for name in ("pos_weight", "logits_q", "hidden_q")
)
CAPPED = tuple(
    f"{name}: cap the logits first, cap * jnp.tanh(logits / cap)" for name in ("logits", "log_probs", "logits_q")
)
CLASS_AXIS = "vocab_axis: the classes are the last axis of the logits; vocab_axis says which axis of a kernel they are"
NO_LOGITS = "log_probs: pass log-probabilities, as of log_softmax; cross_entropy takes logits"
OF_TOKENS = "tokens: it is called where here (boolean, True for the tokens that may be labels)"
OF_LABELS = "sample_weight: it is called where here (boolean, True for what counts, along the labels)"
OTHER_SEGMENTS = (
    "segment_ids",
    "sample_weight: leave out the positions whose label is of another segment with where=, or with labels of "
    "next_token_labels(tokens, segment_ids=segment_ids)",
)
NO_SHIFT = (
    "class_weight: nothing is shifted here: the label of position i is labels[i]; next_token_labels(tokens) shifts",
    "tokens: offset is how far ahead the label is, 1 for the next token",
)
DIVIDED = 'reduction: take reduction="sum" and divide by it'
CAST = (
    "hidden: cast hidden and kernel with .astype; losses and sums are in at least float32",
    "hidden_q: cast hidden states and kernels with .astype; losses and sums are in at least float32",
    "logits: cast the logits with .astype; it is computed in at least float32",
    "logits_q: cast the logits with .astype; it is computed in at least float32",
    "log_probs: cast log_probs with .astype; losses are in at least float32",
    "tokens: cast the tokens with .astype",
)
OF_SHAPE = (
    "kernel: the number of classes is read from the kernel",
    "kernel_q: the number of classes is read from the kernels",
    "axis: the number of classes is read from the shape",
)
NO_PROBABILITIES = (
    "logits: pass logits; of probabilities these are jnp.log(probabilities)",
    "log_probs: pass log-probabilities; of probabilities these are jnp.log(probabilities)",
    "logits_q: pass logits or log-probabilities; of probabilities these are jnp.log(probabilities)",
)
ADDED = (
    "class_weight: add jxent.kl_divergence or jxent.js_divergence to the loss, each with its own factor",
    "logits_q: add jxent.cross_entropy to the divergence, each with its own factor",
    "hidden_q: add jxent.linear_cross_entropy to the divergence, each with its own factor",
)

ROWS = (
    # logits, hidden states, tokens
    ("x inputs", "logits", "log_probs", "hidden", "tokens", "logits_p|logits_q", "hidden_p|hidden_q"),
    ("input", "logits", "log_probs", "hidden", "tokens", "logits_q", "hidden_p|hidden_q"),
    ("_input", "logits", "log_probs", "hidden", "logits_q"),
    ("a", "keepdims: it is called logits here"),
    ("b", "bias", "keepdims: add jnp.log(b) to the logits"),
    ("y_pred pred predictions output", "logits", "log_probs", "logits_q", *TO_LOGITS),
    (
        "logits vocab_parallel_logits",
        "logits",
        "logits_p|logits_q",
        NO_LOGITS,
        *TO_LOGITS,
    ),
    (
        "log_probs",
        *TO_LOGITS,
        "class_weight: it is called logits here (log-probabilities are logits too)",
        "logits_p|logits_q",
    ),
    ("log_predictions", "log_probs", "logits_q"),
    ("probs from_logits use_softmax", *NO_PROBABILITIES),
    ("log_target", NO_PROBABILITIES[-1]),
    ("hidden hidden_states last_hidden_state", "hidden", "hidden_p|hidden_q", *TO_LINEAR),
    ("pred_embeddings e", "hidden"),
    ("embeddings", "hidden|kernel", "hidden_p|hidden_q|kernel_p|kernel_q"),
    ("kernel linear_weight lm_head_weight lm_head", "kernel", "kernel_p|kernel_q", *TO_LINEAR),
    ("embedding", "kernel", "kernel_p|kernel_q", *TO_LINEAR),
    ("lin_weight lm_weight pred_lm_head c w", "kernel"),
    ("bias linear_bias lm_head_bias", "bias", "bias_p|bias_q", "logits: add it to the logits"),
    ("input_ids input_tokens tokens", "tokens", "class_weight: pass labels, as of next_token_labels(tokens)"),
    # two sides
    ("teacher_logits", "logits_p", "class_weight: pass jxent.softmax of it as labels", *TO_LOGITS),
    ("ref_logits target_logits teacher_log_probs log_targets", "logits_p"),
    ("student_logits", "logits", NO_LOGITS, "logits_q", *TO_LOGITS),
    ("student_log_probs", "logits_q"),
    ("teacher_input teacher_hidden_states", "hidden_p", TO_LINEAR[1]),
    ("student_input student_hidden_states", "hidden_q", TO_LINEAR[1]),
    ("teacher_weight", "kernel_p", TO_LINEAR[1]),
    ("student_weight", "kernel_q", TO_LINEAR[1]),
    ("teacher_bias", "bias_p", TO_LINEAR[1]),
    ("student_bias", "bias_q", TO_LINEAR[1]),
    ("beta jsd_beta", "beta", "logits_p: js_divergence has it", "hidden_p: linear_js_divergence has it"),
    ("weight_hard_loss weight_soft_loss compute_ce_loss", *ADDED),
    (
        *("temperature tau", "temperature", "hidden: divide hidden and bias by it, in float32"),
        "logits: divide the logits by it",
        "log_probs: divide the logits by it, before log_softmax",
    ),
    (
        *("logit_scale", "temperature: temperature is 1 / logit_scale", "hidden: multiply hidden and bias by it"),
        "logits: multiply the logits by it",
        "log_probs: multiply the logits by it, before log_softmax",
    ),
    # labels
    ("target targets y_true", "labels", "logits_p", "indices"),
    ("label y target_labels target_y onehot_labels", "labels", "indices"),
    ("shift_labels", "labels", *NO_SHIFT),
    ("labels", *LEFT_OUT[1:], "tokens: pass the tokens", "indices"),
    ("shift", *NO_SHIFT),
    ("ignore_index ignored_index ignore_class", "ignore_index", *LEFT_OUT),
    ("pad_token_id pad_id padding_idx label_pad_token_id", "ignore_index", *LEFT_OUT),
    ("label_smoothing smoothing label_smoothing_factor", "label_smoothing", "log_probs: pass smoothed labels"),
    ("num_classes vocab_size num_labels depth", *OF_SHAPE),
    # weights and masks
    ("weight", "class_weight|kernel", "kernel_p|kernel_q|sample_weight", "sample_weight"),
    ("weights", "sample_weight|kernel", "sample_weight|kernel_p|kernel_q"),
    ("class_weight class_weights", "class_weight", "pos_weight: pos_weight weighs the yes, sample_weight both"),
    ("ce_weight", "class_weight"),
    ("sample_weights token_weights loss_weights", "sample_weight"),
    ("pos_weight", "pos_weight", "class_weight: class_weight weighs the classes"),
    ("where mask", "where"),
    ("attention_mask", OF_LABELS, OF_TOKENS, "where"),
    ("loss_mask label_mask padding_mask input_mask completion_mask live_targets", OF_LABELS, OF_TOKENS),
    ("label_paddings logit_paddings", "sample_weight: pass where=paddings == 0"),
    ("targets_segmentation", "sample_weight: pass where=targets_segmentation != 0"),
    ("segment_ids decoder_segment_ids document_ids", *OTHER_SEGMENTS),
    # the loss and what comes with it
    ("size_average reduce", "reduction"),
    ("num_items_in_batch loss_normalizing_factor num_label_tokens n_items", DIVIDED),
    ("z_loss z_loss_scale z_loss_multiplier lse_square_scale logsumexp_weight", "z_loss_weight"),
    ("softcap logit_soft_cap logits_soft_cap", "logit_softcap", *CAPPED),
    ("logit_softcap final_logit_softcapping", "logit_softcap", *CAPPED),
    ("return_lse return_z_loss return_token_accuracy return_predicted_tokens compute_accuracy", "return_stats"),
    ("return_stats z_loss_weight", "log_probs: cross_entropy has it"),
    ("keepdim keep_dims", "keepdims"),
    # how it is computed
    (
        "dim class_axis reduction_axis vocab_axis",
        "axis",
        CLASS_AXIS,
    ),
    ("axis", CLASS_AXIS),
    ("chunk_size chunk_len batch_chunk_size b_block_size", "block_size"),
    (
        "num_chunks num_output_chunks",
        "block_size: block_size is the number of positions at once, positions / num_chunks",
    ),
    (
        "v_block_size num_vocab_tiling",
        "block_size: blocks are of positions, not of classes; block_size is how many",
    ),
    ("remat", "recompute"),
    ("compute_dtype dtype accum_dtype acc_dtype logits_dtype", *CAST),
    ("matmul_precision", "precision"),
    ("process_group tp_group", "tokens: axis_name names the mesh axis of the sequence", "axis_name"),
    ("batch_axis batch_axes", "batch_axis_name"),
    # what has no counterpart
    ("name implementation impl options filter_eps inplace_backward gamma alpha epsilon eps",),
    ("vocab_parallel_options return_sign initial stacklevel hidden_size num_sampled key training precomputed_lse",),
)
"""(Names in other libraries, answers...). An error gives the first answer whose argument the function has.

An answer is the jxent name, or several possible names joined by |, or "an argument of the function: what to do".
"""

ELSEWHERE = {name: answers for names, *answers in ROWS for name in names.split()}
