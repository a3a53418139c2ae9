"""For each mending an edit that takes it out, and the test that must then fail.

python tests/taken_out.py [TEXT]        does the one of that name, or those whose name contains TEXT, in a copy of the
                                        working tree

A test that passes whether or not the code is there shows nothing. `make prove` does them all.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class TakenOut(NamedTuple):
    """name: what is taken out. file, text, replacement: the edit; the text stands there exactly once. test: its node,
    relative to the root, or "FILE -k EXPRESSION"."""

    name: str
    file: str
    text: str
    replacement: str
    test: str


CASES = [
    # ── refusing ─────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "refusing: after three refusals what is finite is applied",
        "optim/guard.py",
        "applied = sound & (~spike | (counters.in_a_row >= PATIENCE))",
        "applied = sound & ~spike",
        "tests/test_optimizer.py::test_after_three_refusals_in_a_row_what_is_finite_is_applied_scaled_to_the_limit",
    ),
    TakenOut(
        "refusing: nothing of a refused gradient is sent or kept for later",
        "parallel/strategies/sync.py",
        "messages_R = jax.tree.map(lambda m: jnp.where(new.applied, m, 0), messages_R)",
        "",
        "tests/test_strategies.py::test_a_gradient_of_nan_leaves_no_trace[stale-int4]",
    ),
    TakenOut(
        "refusing: state is stored by the verdict on the gradient that made it",
        "parallel/strategies/sync.py",
        "return messages_R, self.guard.commit(new, opt, state.opt), new,",
        "return messages_R, opt, new,",
        "tests/test_refusing.py::test_one_bad_batch_at_any_phase_of_a_round_leaves_no_lasting_trace[stale-none-signum]",
    ),
    TakenOut(
        "refusing: a round that is not finite leaves the replicas where the round began",
        "parallel/strategies/local.py",
        '"replicas": own["replicas"] | {"params": self.spread(params, self.specs)},',
        '"replicas": self.guard.commit(used, own["replicas"] | {"params": self.spread(params, self.specs)}, '
        'own["replicas"]),',
        "tests/test_strategies.py::test_a_replica_with_parameters_of_nan_begins_its_next_round_like_the_others",
    ),
    TakenOut(
        "refusing: a batch without target tokens makes no update",
        "parallel/strategies/sync.py",
        "sound = (weight > 0) & jnp.isfinite(loss)",
        "sound = jnp.isfinite(loss)",
        "tests/test_strategies.py::test_a_batch_without_target_tokens_is_no_update",
    ),
    TakenOut(
        "refusing: residuals follow an exchange that is cut off",
        "parallel/strategies/sync.py",
        "codec = self.guard.commit(usable, codec, state.codec)",
        "codec = self.guard.commit(used, codec, state.codec)",
        "tests/test_refusing.py::test_a_lump_that_residuals_hold_is_cut_off_and_does_not_come_back",
    ),
    TakenOut(
        "refusing: a vote of zero is no vote",
        "optim/messages.py",
        "return jax.tree.map(jnp.sign, momentum_R), opt",
        "return jax.tree.map(lambda m: jnp.where(m < 0, -1.0, 1.0), momentum_R), opt",
        "tests/test_strategies.py::test_a_tie_and_a_vote_of_zero_move_nothing",
    ),
    TakenOut(
        "refusing: 1-bit Adam masks what has no variance",
        "optim/messages.py",
        'return {"first": jnp.where(own["second"] > 0, u, 0), "second": own["second"]}',
        'return {"first": u, "second": own["second"]}',
        "tests/test_strategies.py::test_the_row_of_a_token_that_never_occurs_does_not_drift[onebit_adam-sign-10-]",
    ),
    TakenOut(
        "refusing: the sign of a zero is drawn",
        "parallel/exchange/codecs/sign.py",
        "positive_MB = (x_MB > 0) | ((x_MB == 0) & coins_MB)",
        "positive_MB = x_MB >= 0",
        "tests/test_strategies.py::test_the_row_of_a_token_that_never_occurs_does_not_drift[sign-off-]",
    ),
    TakenOut(
        "deciding: norms are added up in one order everywhere",
        "parallel/strategies/base.py",
        "parts_DM = lax.all_gather(parts_DM, axis, tiled=True)",
        "parts_DM = lax.psum(parts_DM, axis)",
        "tests/test_strategies.py::test_a_norm_is_the_same_bits_on_every_device_and_crosses_no_slow_axis",
    ),
    # ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "going on: what servers owe is folded, of fragments too",
        "parallel/strategies/resume.py",
        "owed |= fold.unfold(server, arrays[server], leaves)",
        "pass",
        "tests/test_seams.py::test_a_few_changes_of_mesh_and_replicas[streaming-diloco-adamw]",
    ),
    TakenOut(
        "going on: what was in flight is owed where it has no place",
        "parallel/strategies/resume.py",
        'flying = [n for n, x in self.saved.items() if x["kind"] == roles.IN_FLIGHT and n not in self.wanted]',
        "flying: list[str] = []",
        "tests/test_seams.py::test_a_few_changes_of_mesh_and_replicas[stale-sync-adamw]",
    ),
    TakenOut(
        "going on: every array that is another one is named",
        "parallel/strategies/resume.py",
        "self._say(what, [name])",
        "",
        "tests/test_seams.py::test_a_few_changes_of_mesh_and_replicas[sync-diloco-adamw]",
    ),
    TakenOut(
        "going on: an old array is cut over the mesh, not held whole by every device",
        "parallel/strategies/resume.py",
        "if place is not None and size > 1:",
        "if False:",
        "tests/test_seams.py::test_every_change_of_mesh_and_replicas[diloco-streaming-adamw]",
    ),
    TakenOut(
        "going on: a run that cannot end in whole rounds is refused",
        "recipes/methods.py",
        "if step % K or last % K:",
        "if False:",
        "tests/test_strategies.py::test_a_run_that_would_not_end_in_whole_rounds_is_refused",
    ),
    TakenOut(
        "going on: a step counts updates, not calls",
        "parallel/strategies/streaming.py",
        "step=state.step + K,",
        "step=state.step + 1,",
        "tests/test_strategies.py::test_a_step_of_every_strategy_is_an_update",
    ),
    TakenOut(
        "going on: an eager run that is extended is together after its last round",
        "parallel/strategies/eager.py",
        "state = self._apply(state, mean, codec, nothing_R, none, False)",
        "after = self._apply(state, mean, codec, nothing_R, none, False)\n"
        "        state = replace(after, strategy=after.strategy | {'outer': state.strategy['outer']})",
        "tests/test_strategies.py::test_an_eager_run_that_is_extended_goes_on_like_one_that_was_not_ended",
    ),
    TakenOut(
        "names: a chain's positions are not on the disk",
        "optim/optimizer.py",
        "node[SLOTS[field]] = x  # several counts count the same",
        "node[str(len(path)) + SLOTS[field]] = x",
        "tests/test_optimizer.py::test_an_optimizer_s_state_has_our_names_whatever_the_chain_is",
    ),
    TakenOut(
        "names: format 1 counted calls",
        "runtime/checkpoint.py",
        "if counted_calls:\n            arrays",
        "if False:\n            arrays",
        "tests/test_format1.py::test_every_array_is_found_and_has_its_digest",
    ),
    # ── before the first step, and after the last ──
    TakenOut(
        "wire: a GPU's slice_index is its host",
        "parallel/cost/wire.py",
        ' if d.platform == "tpu" else None for d in devices',
        " for d in devices",
        "tests/test_wire.py::test_bytes_of_gpu_hosts_are_laid_to_the_right_axis",
    ),
    TakenOut(
        "wire: an all-reduce-start of a GPU names its operands",
        "parallel/cost/wire.py",
        'if start and (kind != "all-reduce" or type_.startswith("((")):',
        'if start and kind != "all-reduce":',
        "tests/test_wire.py::test_bytes_that_one_device_sends",
    ),
    TakenOut(
        "mfu: a chip is known by whole words",
        "parallel/cost/hardware.py",
        'rf"(?<!\\w){re.escape(kind)}(?!\\w)"',
        'rf"{re.escape(kind)}"',
        "tests/test_kernels.py::test_a_chip_is_known_by_whole_words_of_its_name",
    ),
    TakenOut(
        "attention: cudnn is asked for its head sizes",
        "model/kernels.py",
        "if head_dim % 8 or head_dim > largest:",
        "if False:",
        "tests/test_kernels.py::test_auto_takes_the_first_kernel_that_fits_and_says_why_not_the_others",
    ),
    TakenOut(
        "attention: splash is asked for its block",
        "model/kernels.py",
        "if shape[1] % SPLASH_BLOCK:",
        "if False:",
        "tests/test_kernels.py::test_splash_fits_what_jax_itself_lets_through",
    ),
    TakenOut(
        "stray: a text that is not understood stops no training",
        "parallel/cost/stray.py",
        "except Exception as error:  # whatever",
        "except KeyError as error:  # whatever",
        "tests/test_stray.py::test_a_text_that_is_not_understood_stops_the_counting_and_nothing_else",
    ),
    TakenOut(
        "stray: a name makes no large array a scalar",
        "parallel/cost/stray.py",
        "c.sent <= SCALARS and ",
        "",
        "tests/test_stray.py::test_a_name_makes_no_large_array_a_scalar",
    ),
    TakenOut(
        "stray: the embedding is looked up in one's own rows",
        "model/transformer.py",
        "x_BTD = self._embedded(params, tokens_BT, positions_BT, constrain)",
        'x_BTD = constrain(jnp.take(constrain(params["embed"], ("vocab", None)), tokens_BT, axis=0), RESIDUAL)',
        "tests/test_stray.py::test_no_program_sends_what_nobody_asked_for",
    ),
    TakenOut(
        "stray: the sample is one a replica group",
        "recipes/programs.py",
        "jax.vmap(one, in_axes=(None, 0, None, None), spmd_axis_name=SLOW)",
        "jax.vmap(one, in_axes=(None, 0, None, None))",
        "tests/test_stray.py::test_no_program_sends_what_nobody_asked_for",
    ),
    TakenOut(
        "evaluation has the size of a micro-step",
        "recipes/build.py",
        "task.eval_rows(batch_size // c.optimizer.accumulate, ",
        "task.eval_rows(batch_size, ",
        "tests/test_memory.py::test_evaluation_and_the_sample_need_no_more_than_the_step",
    ),
    TakenOut(
        "ending: nothing is divided by nothing",
        "recipes/programs.py",
        "return a / b if b else math.nan",
        "return a / b",
        "tests/test_ending.py::test_a_loss_of_nothing_and_a_text_of_no_byte_divide_nothing_by_nothing",
    ),
    TakenOut(
        "ending: what fails costs only itself",
        "recipes/finish.py",
        "            failed.append(what)\n",
        "            raise\n",
        "tests/test_ending.py::test_what_fails_at_the_end_costs_only_itself_and_is_said",
    ),
    TakenOut(
        "ending: it is tried at the start",
        "recipes/finish.py",
        "except Exception as error:  # of whatever type the tokenizer raises",
        "except KeyError as error:",
        "tests/test_ending.py::test_the_end_is_tried_at_the_start",
    ),
    TakenOut(
        "ending: a writer that fails costs only its rows",
        "runtime/metrics.py",
        "self._writers = [other for other in self._writers if other is not writer]",
        "raise",
        "tests/test_ending.py::test_a_writer_that_fails_costs_only_its_own_rows",
    ),
    TakenOut(
        "ending: what is trained is saved before it is evaluated",
        "recipes/fit.py",
        "            if last:  # what is trained",
        "            if False:  # what is trained",
        "tests/test_ending.py::test_what_is_trained_is_saved_before_the_evaluation_and_the_sample_run",
    ),
    TakenOut(
        "compare: its batches are training's",
        "recipes/language.py",
        'mask = {"document_mask": self.document_mask, "eos"',
        'mask = {"document_mask": False, "eos"',
        "tests/test_compare.py::test_a_comparison_cuts_its_batches_as_training_does",
    ),
    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "data: an epoch has an order of its own, of no other seed's epoch",
        "data/loader.py",
        "    if part == epoch == 0:\n        return ranges[0].shuffle(seed), 0",
        "    if part == 0:\n        return ranges[0].shuffle((seed + epoch) % 2**32), 0",
        "tests/test_loader.py -k no_epoch_of_two",
    ),
    TakenOut(
        "data: each stretch of a mixture has its shares",
        "data/mixture.py",
        'order_M = np.argsort((rank_M + 0.5) / counts[part_M], kind="stable")',
        "order_M = np.arange(len(part_M))",
        "tests/test_loader.py -k mixture_has_its_shares",
    ),
    TakenOut(
        "data: hidden files are left out",
        "data/files.py",
        '    if entry.name.startswith("."):  # also',
        "    if False:  # also",
        "tests/test_data.py -k what_a_folder_holds",
    ),
    TakenOut(
        "data: what is no regular file is left out",
        "data/files.py",
        '    if not stat.S_ISREG(status.st_mode):\n        return "not regular"',
        '    if False:\n        return "not regular"',
        "tests/test_data.py -k what_a_folder_holds",
    ),
    TakenOut(
        "data: a path that is no file is refused",
        "data/sources.py",
        "    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):",
        "    if False:",
        "tests/test_data.py -k no_file_is_refused",
    ),
    TakenOut(
        "data: what is compressed is read",
        "data/reading.py",
        'COMPRESSION = (".gz", ".bz2", ".xz", ".zst")',
        'COMPRESSION = (".gz", ".bz2", ".xz")',
        "tests/test_data.py -k compression_and_encoding",
    ),
    TakenOut(
        "data: a .zst that is cut off is an error",
        "data/reading.py",
        '                    raise EOFError("the file ends before its last frame does")',
        "                    return 0",
        "tests/test_data.py -k damaged_shard",
    ),
    TakenOut(
        "data: a byte order mark says the encoding",
        "data/reading.py",
        "        if head.startswith(mark):\n            return name",
        "        if False:\n            return name",
        "tests/test_data.py -k compression_and_encoding",
    ),
    TakenOut(
        "data: UTF-16 without a mark is found out",
        "data/reading.py",
        "odd > len(head) // 5 and not even",
        "False",
        "tests/test_data.py -k compression_and_encoding",
    ),
    TakenOut(
        "data: a record's text is a text",
        "data/reading.py",
        "            if not isinstance(record[text_key], str):",
        "            if False:",
        "tests/test_data.py -k record_without_text",
    ),
    TakenOut(
        "data: the header of llm.c's .bin is known",
        "data/flat.py",
        "    if magic in _LLM_C and",
        "    if False and",
        "tests/test_data.py -k headers_of_flat",
    ),
    TakenOut(
        "data: an .npy is none of our token files",
        "data/flat.py",
        "    if head.startswith(_NPY):",
        "    if False:",
        "tests/test_data.py -k headers_of_flat",
    ),
    TakenOut(
        "data: what has a known format is not taken for tokens",
        "data/flat.py",
        "    if kind := kind_of(head):",
        "    if kind := None:",
        "tests/test_data.py -k no_flat_tokens",
    ),
    TakenOut(
        "data: only a special token ends a document",
        "data/subwords.py",
        'for token in self._json.get("added_tokens") or () if token["special"]}',
        'for token in self._json.get("added_tokens") or ()}',
        "tests/test_data.py -k only_a_special",
    ),
    TakenOut(
        "data: no text becomes a special token",
        "data/subwords.py",
        "self._reserved_V[list(special.values())] = True",
        "self._reserved_V[[]] = True",
        "tests/test_data.py -k no_text_becomes",
    ),
    TakenOut(
        "data: a cut text goes on without a prefix",
        "data/pieces.py",
        '        "normalizer": None if normalizer and _prepends(normalizer) else without_prefix(normalizer),',
        '        "normalizer": normalizer,',
        "tests/test_data.py -k ids_are_those",
    ),
    TakenOut(
        "data: Metaspace is cut where it cuts itself",
        "data/pieces.py",
        '        return (_BLANK,) if part.get("split", True) else ()',
        "        return (_BLANK, _LINE)",
        "tests/test_data.py -k ids_are_those",
    ),
    TakenOut(
        "data: a pattern that is not known is not cut",
        "data/pieces.py",
        '    if kind == "Split" and part["pattern"].get("Regex") in KNOWN_PATTERNS:',
        '    if kind == "Split":',
        "tests/test_data.py -k ids_are_those",
    ),
    TakenOut(
        "data: a word that the tokenizer gets at once is bounded",
        "data/pieces.py",
        "        if found is None and stop - start <= WORD_CHARS:",
        "        if found is None:",
        "tests/test_data.py -k gets_at_once",
    ),
    TakenOut(
        "data: words that a BPE is trained on are bounded",
        "data/bpe.py",
        "            if max(map(len, piece.split()), default=0) <= _WORD_CHARS and",
        "            if True or",
        "tests/test_data.py -k training_a_bpe",
    ),
    TakenOut(
        "data: what a library does is left at a signal",
        "data/waiting.py",
        "    thread = threading.Thread(",
        "    return call()\n    thread = threading.Thread(",
        "tests/test_data.py -k left_at_a_signal",
    ),
    TakenOut(
        "data: the held-out part is about the asked one",
        "data/split.py",
        "    if size < 0.7 * target:",
        "    if size == 0:",
        "tests/test_data.py -k about_the_asked",
    ),
    TakenOut(
        "data: a held-out part far from the asked one is said",
        "data/corpus.py",
        "    if not eval_fraction / 2 <= share <= eval_fraction * 2:",
        "    if False:",
        "tests/test_data.py -k far_from_what",
    ),
    TakenOut(
        "data: a larger held-out part, as offered, is enough",
        "data/corpus.py",
        "    enough = 1.6 * (seq_len + 1) / total",
        "    enough = 0.6 * (seq_len + 1) / total",
        "tests/test_data.py -k larger_held_out",
    ),
    TakenOut(
        "data: a suffix, as offered, is read",
        "data/sources.py",
        '        f"If it is plain text, set --config.data.suffixes={inner}"',
        '        f"If it is plain text, set --config.data.suffixes={suffix_of(path.name)}"',
        "tests/test_data.py -k remedies_that",
    ),
    TakenOut(
        "data: changed data names its files",
        "data/corpus.py",
        '    if lines and changed != "accept":',
        "    if False:",
        "tests/test_data.py -k names_files",
    ),
    TakenOut(
        "data: a run's tokenizer is its own",
        "data/record.py",
        "    if other and not accept:",
        "    if False:",
        "tests/test_data.py -k never_used",
    ),
    TakenOut(
        "data: bytes are counted from what was read",
        "data/corpus.py",
        "return bytes_V if read == known or not known else bytes_V * (read / known)",
        "return bytes_V",
        "tests/test_data.py -k bytes_are_counted",
    ),
    TakenOut(
        "data: a damaged record of the data is made anew",
        "data/record.py",
        "    if not kept.is_file() or hashlib.sha256(kept.read_bytes()).hexdigest() != digest:",
        "    if False:",
        "tests/test_data.py -k not_made_anew",
    ),
    TakenOut(
        "seeds: what a codec draws varies in a comparison",
        "recipes/runner.py",
        "if methods.draws(config.sync, job.own):",
        "if False:",
        "tests/test_compare.py::test_what_a_codec_draws_varies_with_the_seed",
    ),
    # ── config and command line ───────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "config: nothing forgotten is no decay",
        "runtime/config/keys.py",
        'Range(0, 1, "[)"): "optimizer.b1',
        'Range(0, 1, "[]"): "optimizer.b1',
        "tests/test_bad_input.py::test_options[--config.optimizer.b1=1]",
    ),
    TakenOut(
        "config: None is no value",
        "runtime/config/keys.py",
        "    if not isinstance(value, kind) or (",
        "    if value is not None and not isinstance(value, kind) or (",
        "tests/test_bad_input.py::test_every_key_has_one_type_wherever_its_value_comes_from",
    ),
    TakenOut(
        "config: a whole number may be written as a float",
        "runtime/config/keys.py",
        "return float(text) if kind in (int, float) else text",
        "return kind(text)",
        "tests/test_bad_input.py::test_every_key_has_one_type_wherever_its_value_comes_from",
    ),
    TakenOut(
        "config: a tilde is the home in every path",
        "runtime/config/keys.py",
        "local_path(key, str(value)) if key in PATHS else value",
        "value",
        "tests/test_bad_input.py::test_a_tilde_is_the_home_in_every_path",
    ),
    TakenOut(
        "config: an address of a store is no folder",
        "runtime/config/keys.py",
        '    if found := re.search(r"(?:^|,)\\s*([A-Za-z][\\w+.-]*)://", path):',
        "    if found := None:",
        "tests/test_bad_input.py::test_an_address_of_a_store_is_no_folder",
    ),
    TakenOut(
        "config: one of several paths is an address",
        "runtime/config/keys.py",
        'r"(?:^|,)\\s*([A-Za-z]',
        'r"^([A-Za-z]',
        "tests/test_bad_input.py::test_one_of_several_paths_is_an_address",
    ),
    TakenOut(
        "config: a key that came later than the run has its default",
        "runtime/config/resume.py",
        "nested(base_values() | converted(",
        "nested(converted(",
        "tests/test_bad_input.py::test_config_json_of_another_version_or_hand",
    ),
    TakenOut(
        "config: an option's value may follow a blank",
        "runtime/config/flags.py",
        "            yield name, argument\n",
        "            raise UsageError(argument)\n",
        "tests/test_bad_input.py::test_an_option_is_followed_by_its_value_after_an_equals_sign_or_a_blank",
    ),
    TakenOut(
        "config: a shorter run has a shorter warm-up",
        "runtime/config/flags.py",
        "    notes += _shorten_warm_up(before, flat, typed)\n",
        "",
        "tests/test_bad_input.py::test_a_run_made_shorter_keeps_the_share_of_its_warm_up",
    ),
    TakenOut(
        "config: initials are as good as words",
        "runtime/config/suggest.py",
        "(1 if initials",
        "(0 if initials",
        "tests/test_bad_input.py::test_options[--wd=0]",
    ),
    TakenOut(
        "config: sizes that are offered are legal",
        "runtime/config/check.py",
        "return size > 0 and set(",
        "return size > 0 or set(",
        "tests/test_bad_input.py::test_sizes_that_are_offered_are_legal_in_every_respect",
    ),
    TakenOut(
        "config: a vocabulary that is offered holds its tokenizer",
        "parallel/layout/mesh.py",
        ">= max(1, (least or {}).get(axis, 1))",
        ">= 1",
        "tests/test_bad_input.py::"
        "test_options[--config.mesh.tensor=2 --config.data.vocab_size=257 --config.data.tokenizer=bpe]",
    ),
    TakenOut(
        "config: one version",
        "runtime/__init__.py",
        'VERSION = "0.1.0"',
        'VERSION = "0.2.0"',
        "tests/test_bad_input.py::test_the_version_is_that_of_the_project",
    ),
    TakenOut(
        "config: pip install says how this is used",
        "pyproject.toml",
        'build-backend = "no_install"',
        'build-backend = "setuptools.build_meta"',
        "tests/test_bad_input.py::test_pip_install_says_how_this_is_used_instead",
    ),
    TakenOut(
        "config: the table of changes is that of the page",
        "runtime/config/resume.py",
        '"refused: the weights mean something else"',
        '"refused"',
        "tests/test_bad_input.py::test_every_key_has_one_row_in_the_table_of_changes_which_is_that_of_the_page",
    ),
    TakenOut(
        "config: fewer steps than were made are refused",
        "runtime/config/resume.py",
        "    if steps < made:",
        "    if False:",
        "tests/test_bad_input.py::test_fewer_steps_than_were_made",
    ),
    TakenOut(
        "config: steps of a profile inside a call",
        "runtime/progress.py",
        "wanted = step < self._range.stop and step + steps_per_call > self._range.start",
        "wanted = step in self._range",
        "tests/test_metrics.py::test_a_profile_range_inside_one_call_is_traced",
    ),
    TakenOut(
        "config: tokens are counted as they are read",
        "runtime/progress.py",
        "self.units += units",
        "self.units = step * units",
        "tests/test_bad_input.py::test_tokens_are_counted_as_they_are_read",
    ),
    # ── messages, and ends ────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "messages: a jump of the learning rate is said",
        "recipes/begin.py",
        "elif start and not own.optimizer and configuration.changes_schedule(before, config):",
        "elif False:",
        "tests/test_bad_input.py::test_a_longer_run_says_what_the_learning_rate_jumps_from_and_to",
    ),
    TakenOut(
        "messages: a run that is complete says so",
        "recipes/begin.py",
        "    if start == config.steps:\n        console.say(",
        "    if False:\n        console.say(",
        "tests/test_bad_input.py::test_a_longer_run_says_what_the_learning_rate_jumps_from_and_to",
    ),
    TakenOut(
        "messages: Ctrl-C is one line",
        "runtime/exits.py",
        "except KeyboardInterrupt:",
        "except GeneratorExit:",
        "tests/test_exits.py::test_ctrl_c_is_one_line",
    ),
    TakenOut(
        "messages: Ctrl-C during the imports is one line",
        "runtime/early.py",
        "signal.signal(signal.SIGINT, _end)",
        "pass",
        "tests/test_exits.py -k during_the_imports",
    ),
    TakenOut(
        "messages: a reader that has gone is no error",
        "runtime/exits.py",
        "except BrokenPipeError:",
        "except GeneratorExit:",
        "tests/test_exits.py::test_a_reader_that_has_gone_is_no_error",
    ),
    TakenOut(
        "messages: XLA's failures are sentences",
        "runtime/exits.py",
        "        if STATUS.match(str(error)):",
        "        if False:",
        "tests/test_exits.py::test_each_way_to_end_has_its_sentence_and_its_code",
    ),
    TakenOut(
        "messages: what libraries print is not shown",
        "runtime/library_log.py",
        "            setattr(sys, name, copy)\n        os.dup2(_file.fileno(), descriptor)",
        "            setattr(sys, name, copy)",
        "tests/test_exits.py -k libraries_print",
    ),
    TakenOut(
        "messages: what libraries print is kept",
        "runtime/library_log.py",
        "    for descriptor in _saved:\n        os.dup2(_file.fileno(), descriptor)",
        "",
        "tests/test_exits.py -k libraries_print",
    ),
    TakenOut(
        "messages: what takes long is said",
        "runtime/console.py",
        "self._announcement.start()",
        "pass",
        "tests/test_console.py -k what_takes_long",
    ),
    TakenOut(
        "messages: damage below all arrays names its file",
        "runtime/stored.py",
        "_damaged_metadata(step_directory) or _first_cause(error)",
        "str(error)[:160]",
        "tests/test_checkpoint.py -k one_damaged_file",
    ),
    TakenOut(
        "messages: what is wrong with all arrays is said once",
        "runtime/stored.py",
        're.sub(r"\\d+", "", cause)',
        "name",
        "tests/test_checkpoint.py -k one_damaged_file",
    ),
    TakenOut(
        "messages: what a digest cannot see is said",
        "runtime/digest.py",
        "1,920",
        "some",
        "tests/test_checkpoint.py::test_places_that_share_a_hash_are_what_the_pages_say",
    ),
    # ── compare ───────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "compare: intervals are Student's",
        "recipes/table.py",
        "float(stdtrit(freedom, 0.975))",
        "1.96",
        "tests/test_compare.py::test_students_quantiles_for_any_number_of_seeds",
    ),
    TakenOut(
        "compare: seeds are different",
        "recipes/compare.py",
        "< max(3, len(seeds)):",
        "< 3:",
        "tests/test_compare.py::test_bad_comparisons",
    ),
    TakenOut(
        "compare: a third of the length is checked, too",
        "recipes/compare.py",
        "[({}, self.steps), *candidates]",
        "[({}, self.steps)]",
        "tests/test_compare.py::test_bad_comparisons",
    ),
    TakenOut(
        "compare: refused updates are shown",
        "recipes/table.py",
        '        " / ".join(map(str, row["skipped"])),',
        '        "",',
        "tests/test_compare.py -k run_was_ended",
    ),
    TakenOut(
        "compare: one writer",
        "compare.py",
        "    lock.hold(workdir)",
        "    pass",
        "tests/test_compare.py::test_a_comparison_that_runs_is_not_started_twice",
    ),
    # ── saves ─────────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "saves: damaged steps above the one restored are set aside",
        "runtime/checkpoint.py",
        "aside = lambda: [steps.set_aside(self.directory / str(step), steps.DAMAGED) for step in damaged]",
        "aside = lambda: []",
        "tests/test_checkpoint.py -k save_below_a_damaged_step",
    ),
    TakenOut(
        "saves: a step is no step before it is deleted",
        "runtime/steps.py",
        'doomed = folder.rename(folder.with_name(f"{step}{DELETED}"))',
        "doomed = folder",
        "tests/test_checkpoint.py::test_a_step_that_is_being_deleted_is_none",
    ),
    TakenOut(
        "saves: what a kill left goes",
        "runtime/checkpoint.py",
        "            steps.remove_leftovers(directory)",
        "            pass",
        "tests/test_checkpoint.py -k what_a_kill_left",
    ),
    TakenOut(
        "saves: what only has a number is no step",
        "runtime/steps.py",
        'if {"state", "record"} & set(_names(folder))}',
        "if True}",
        "tests/test_checkpoint.py -k what_is_not_ours",
    ),
    TakenOut(
        "saves: the best step has a loss that is a number",
        "runtime/checkpoint.py",
        "loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None",
        "loss = eval_loss",
        "tests/test_checkpoint.py -k loss_is_a_number",
    ),
    TakenOut(
        "saves: a step that is not there is not saved",
        "recipes/fit.py",
        "    if done not in checkpoints.finish():",
        "    checkpoints.finish()\n    if False:",
        "tests/test_checkpoint.py -k last_step_has_vanished",
    ),
    TakenOut(
        "saves: where one cannot read, none restores",
        "runtime/stored.py",
        'if not any(agree.everyone("arrays loaded", error)):',
        "if not error:",
        "tests/test_agree.py::test_all_take_the_same_way_where_one_cannot_read",
    ),
    TakenOut(
        "saves: process 0 says which steps there are",
        "runtime/checkpoint.py",
        'agree.decided("steps to restore", self._on_disk)',
        "self._on_disk()",
        "tests/test_agree.py::test_all_take_the_same_way_where_one_cannot_read",
    ),
    # ── processes, and locks ──────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "processes: a folder that is not shared is found out",
        "runtime/agree.py",
        "while not _holds(path, nonce):",
        "while False:",
        "tests/test_agree.py::test_a_folder_that_is_not_shared_is_found_out_by_all",
    ),
    TakenOut(
        "processes: nobody waits for one that was killed",
        "runtime/watch.py",
        "self._gone.add(gone)",
        "gone = None",
        "tests/test_agree.py::test_nobody_waits_for_a_process_that_has_gone[killed--9-it ended without a word]",
    ),
    TakenOut(
        "processes: a launcher is known by its step",
        "runtime/rendezvous.py",
        'if "SLURM_STEP_NODELIST" in env:',
        "if True:",
        "tests/test_agree.py -k launcher_is_known",
    ),
    TakenOut(
        "processes: a number is given once",
        "runtime/rendezvous.py",
        "if number in here or not 0 < number < count:",
        "if not 0 < number < count:",
        "tests/test_agree.py -k number_given_twice",
    ),
    TakenOut(
        "processes: who comes last with a number that is there is told",
        "runtime/rendezvous.py",
        "        _take(listener, here, count, 0)  # who came with a number that was there already\n",
        "",
        "tests/test_agree.py -k after_the_last",
    ),
    TakenOut(
        "processes: SIGTERM does not end a failure otherwise",
        "runtime/preemption.py",
        "        if agree.failing.is_set():\n            return\n",
        "",
        "tests/test_agree.py -k sigterm_to_a_process_that_fails",
    ),
    TakenOut(
        "processes: they are started alike",
        "train.py",
        "agree.same_start(config, flags)",
        "agree.code_facts()",
        "tests/test_processes.py::"
        "test_processes_that_differ_all_say_in_what_and_train_nothing[optimizer.lr---config.optimizer.lr=5e-3]",
    ),
    TakenOut(
        "lock: a process with an old number is not its holder",
        "runtime/lock.py",
        'return holder.get("begun") != _begun(holder["pid"])',
        "return False",
        "tests/test_lock.py -k old_number",
    ),
    TakenOut(
        "lock: a refused process deletes no lock of another",
        "runtime/lock.py",
        'if self._mine and self._read().get("nonce") == self.nonce:',
        "if True:",
        "tests/test_lock.py -k folder_in_use",
    ),
    TakenOut(
        "lock: who has lost it ends",
        "runtime/lock.py",
        "                os._exit(1)",
        "                return",
        "tests/test_lock.py -k lost_its_lock",
    ),
    TakenOut(
        "lock: who is not silent keeps it",
        "runtime/lock.py",
        "            if self._read() != before:",
        "            if False:",
        "tests/test_lock.py -k not_silent",
    ),
    TakenOut(
        "lock: a file that was deleted locks nothing",
        "runtime/lock.py",
        "            if self._is_linked(file):",
        "            if True:",
        "tests/test_lock.py -k just_deleted",
    ),
    TakenOut(
        "beginning: a value that is typed and not the other run's",
        "runtime/config/origin.py",
        "        if key in typed and flat[key] != value\n",
        "        if False\n",
        "tests/test_beginning.py -k another_value_that_is_typed",
    ),
    TakenOut(
        "beginning: the same command goes on when the other run is gone",
        "runtime/config/origin.py",
        "own = _config_of(workdir) if workdir else None",
        "own = None",
        "tests/test_beginning.py -k goes_on_when_the_other_run_is_gone",
    ),
    TakenOut(
        "beginning: learned positions take the length",
        "runtime/config/origin.py",
        'if flat["model.position"] == "learned" else ()',
        "if False else ()",
        "tests/test_beginning.py -k every_key_that_parameters",
    ),
    TakenOut(
        "beginning: the tokenizer of the other run",
        "data/corpus.py",
        "which = record.kept(origin, tokenizer) if origin else tokenizer",
        "which = tokenizer",
        "tests/test_beginning.py -k model_and_the_tokenizer",
    ),
    TakenOut(
        "beginning: a tokenizer that was trained and not kept",
        "data/record.py",
        '    if name == "bpe":\n        raise',
        '    if name == "none":\n        raise',
        "tests/test_beginning.py -k trained_and_not_kept",
    ),
    TakenOut(
        "beginning: the parameters of the other run",
        "recipes/programs.py",
        "params = seed_or_params if given else parts.task",
        "params = parts.task.init(jax.random.key(0)) if given else parts.task",
        "tests/test_beginning.py -k begins_with_the_parameters_of_the_newest_step",
    ),
    TakenOut(
        "beginning: parameters only are not resumed",
        "runtime/workdir.py",
        "if steps.parameters_only(self.checkpoints):",
        "if False:",
        "tests/test_beginning.py -k workdir_of_parameters_only",
    ),
    TakenOut(
        "beginning: a damaged newest step",
        "runtime/checkpoint.py",
        "arrays, problems = read_arrays(folder, record, dict(wanted))\n",
        "arrays, problems = read_arrays(folder, record, dict(wanted))[0], []\n",
        "tests/test_beginning.py -k damaged_newest_step",
    ),
    TakenOut(
        "beginning: a step that its run deletes meanwhile",
        "runtime/checkpoint.py",
        "        if step in on_disk:  # else",
        "        if True:  # else",
        "tests/test_beginning.py -k deletes_meanwhile",
    ),
    TakenOut(
        "beginning: a folder without a run",
        "recipes/begin.py",
        "if not workdir.resuming:",
        "if False:",
        "tests/test_beginning.py -k folder_without_a_run",
    ),
    TakenOut(
        "beginning: a comparison does not start from a run",
        "recipes/compare.py",
        "if config.init.workdir:",
        "if False:",
        "tests/test_beginning.py -k comparison_does_not_start",
    ),
    TakenOut(
        "beginning: the summary says where it began",
        "recipes/begin.py",
        "start, begun | computed_by(compiled, facts))",
        "start, computed_by(compiled, facts))",
        "tests/test_beginning.py -k begins_with_the_parameters",
    ),
    # ── the house ────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "codecs: one of votes carries no gradients with error feedback",
        "runtime/config/check.py",
        'if codec in ("int2", "sign") and flat["sync.stochastic"]',
        'if codec == "int2" and flat["sync.stochastic"]',
        "tests/test_bad_input.py -k codecs_and_strategies",
    ),
    TakenOut(
        "loop: the last update is evaluated and saved",
        "recipes/fit.py",
        "return done == last or bool(every and done % every == 0)",
        "return bool(every and done % every == 0)",
        "tests/test_compare.py::test_what_is_due_every_so_many_updates_is_due_after_the_last_one_too",
    ),
    TakenOut(
        "exchange: with one replica nothing is rounded",
        "parallel/exchange/exchange.py",
        "codec = codec if replicas > 1 else FLOAT32",
        "codec = codec",
        "tests/test_exchange.py::test_without_replicas_nothing_is_rounded",
    ),
    TakenOut(
        "notebooks: the status is one line that changes",
        "runtime/console.py",
        'return type(stream).__module__.startswith("ipykernel.")',
        "return False",
        "tests/test_console.py::test_in_a_notebook_the_status_is_one_line_that_changes",
    ),
    TakenOut(
        "notebooks: what was drawn is wiped out",
        "runtime/console.py",
        "return f\"\\r{' ' * len(self._drawn)}\\r\" if self._notebook else ERASE_LINE",
        'return "\\r" if self._notebook else ERASE_LINE',
        "tests/test_console.py::test_in_a_notebook_the_status_is_one_line_that_changes",
    ),
    TakenOut(
        "python: a plot has its baselines",
        "recipes/trained.py",
        "self.workdir.name, self._baselines()",
        "self.workdir.name",
        "tests/test_python.py::test_the_plot_shows_what_counting_letters_achieves",
    ),
    TakenOut(
        "python: an exchange by itself remembers",
        "recipes/once.py",
        "self._mean(tree_R, memory, jnp.int32(step))",
        "self._mean(tree_R, self._nothing, jnp.int32(step))",
        "tests/test_python.py::test_one_gradient_goes_through_a_round_codec_in_three_lines",
    ),
    TakenOut(
        "notebooks: an accelerator is installed with what it needs",
        "notebooks/start.py",
        'f"jax[{extra}]" if extra else "jax"',
        '"jax"',
        "tests/test_notebooks.py::test_the_accelerator_decides_what_is_installed_in_the_one_call",
    ),
    TakenOut(
        "notebooks: what is missing is a sentence",
        "notebooks/start.py",
        "if names := missing():",
        "if names := []:",
        "tests/test_notebooks.py::test_what_is_missing_is_one_sentence",
    ),
    TakenOut(
        "notebooks: one address",
        "pyproject.toml",
        "slackline-jax/slackline",
        "elsewhere/slackline",
        "tests/test_notebooks.py::test_the_badge_and_the_first_cell_follow_the_one_address",
    ),
    TakenOut(
        "baselines: of the windows that are evaluated",
        "data/corpus.py",
        'scored = [batch["mask"] > 0 for batch in windows]',
        'scored = [batch["mask"] >= 0 for batch in windows]',
        "tests/test_data.py::test_ngram_baseline",
    ),
    TakenOut(
        "link: a whole replica sends through it",
        "recipes/over_link.py",
        "    through = sent * senders(parts.mesh)\n",
        "    through = sent\n",
        "tests/test_over_link.py::test_the_time_on_the_wire_is_that_of_a_whole_replica",
    ),
    TakenOut(
        "link: a rate has a unit and is not 0",
        "parallel/cost/link.py",
        " or not float(found[1])",
        "",
        "tests/test_over_link.py::test_what_is_no_link_is_a_sentence",
    ),
    TakenOut(
        "warm steps: the state crosses the border",
        "recipes/fit.py",
        "                self.state = phases.cross(self.parts, phase, self.state)\n",
        "                pass\n",
        "tests/test_phases.py::test_it_is_a_synchronous_run_that_goes_on_with_another_strategy[diloco int4]",
    ),
    TakenOut(
        "warm steps: a checkpoint is of the phase of its step",
        "recipes/phases.py",
        "phase for phase in parts.phases if phase.first <= step][-1]",
        "phase for phase in parts.phases][-1]",
        "tests/test_phases.py::test_it_is_a_synchronous_run_that_goes_on_with_another_strategy[diloco int4]",
    ),
    TakenOut(
        "resume: refused updates are not counted again for every replica",
        "parallel/layout/roles.py",
        'TALLY if name in ("skipped", "clipped") else kind',
        "kind",
        "tests/test_seams.py::test_what_was_refused_is_counted_once[sync-diloco-4]",
    ),
    TakenOut(
        "python: the objects of a run are kept",
        "runtime/workdir.py",
        "kept = {configuration.OBJECTS: objects} if objects else {}",
        "kept = {}",
        "tests/test_python.py::test_objects_stand_where_the_config_has_names",
    ),
    TakenOut(
        "python: an own codec is used",
        "recipes/methods.py",
        "    if own.codec is not None:\n        return own.codec\n",
        "",
        "tests/test_python.py::test_objects_stand_where_the_config_has_names",
    ),
    TakenOut(
        "python: Ctrl-C is heard",
        "recipes/fit.py",
        "last, stopping = done == config.steps, notice.requested(done)",
        "last, stopping = done == config.steps, False",
        "tests/test_python.py::test_ctrl_c_ends_at_the_border_of_a_call_and_the_same_call_goes_on",
    ),
    # ── machines that are not here ───────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "targets: slices of v5p have links around from one cube on",
        "parallel/cost/targets.py",
        "return (math.prod(self.sides) >= CUBE**3,) * 3",
        "return (False,) * 3",
        "tests/test_targets.py::test_links_wrap_around_where_a_slice_has_them",
    ),
    TakenOut(
        "targets: what cannot be rented is refused",
        "parallel/cost/targets.py",
        "if chips > chip.largest:",
        "if False:",
        "tests/test_targets.py::test_what_is_no_machine_is_refused_with_the_nearest_one",
    ),
    TakenOut(
        "targets: a CUDA plugin of another JAX is refused",
        "parallel/cost/compilers.py",
        "if right and not _fits(name, found, right):",
        "if False:",
        "tests/test_targets.py -k of_another_jax",
    ),
    TakenOut(
        "targets: a compiler's refusal is a verdict",
        "parallel/cost/compilers.py",
        'if not said.startswith("RESOURCE_EXHAUSTED"):',
        "if True:",
        "tests/test_targets.py::test_a_refusal_of_the_compiler_is_read",
    ),
    TakenOut(
        "targets: a run takes 90 % of a GPU's memory unless the user has said how much",
        "parallel/layout/mesh.py",
        "if not any(os.environ.get(key) for key in SHARE_KEYS):",
        "if True:",
        "tests/test_targets.py::test_a_gpu_lends_the_share_that_the_run_takes",
    ),
    TakenOut(
        "targets: a state that does not fit is refused before anything is compiled",
        "recipes/target.py",
        "    if state <= target.memory:",
        "    if True:",
        "tests/test_targets.py::test_a_state_that_does_not_fit_is_refused_with_the_smallest_machine_that_holds_it",
    ),
    TakenOut(
        "targets: a batch that the mesh does not divide is replaced, and said",
        "recipes/target.py",
        'if config.data.batch_size % unit and "data.batch_size" not in typed:',
        "if False:",
        "tests/test_targets.py::test_a_batch_that_the_mesh_does_not_divide_is_the_nearest_that_it_does_and_said",
    ),
    TakenOut(
        "targets: the state lies beside the evaluation",
        "recipes/aot.py",
        "used + (state - params if only_params else 0)",
        "used",
        "tests/test_targets.py::test_the_whole_state_lies_beside_what_reads_the_parameters_alone",
    ),
    TakenOut(
        "targets: a milder remedy is tried where the strongest leaves room",
        "recipes/verdict.py",
        "return [*found, mild] if mild else found",
        "return found",
        "tests/test_targets.py::test_what_does_not_fit_names_the_remedy_that_was_compiled_mildest_first",
    ),
    TakenOut(
        "targets: a frame's parent is counted as the text counts it",
        "parallel/cost/hlo.py",
        'shift = 1 if field_of("parent_frame_id", stack.get("1", "")) == "1" else 0',
        "shift = 0",
        "tests/test_schedule.py::test_arrays_come_from_lines_of_ours",
    ),
    TakenOut(
        "targets: only products hide what is sent",
        "parallel/cost/schedule.py",
        "            if own:\n                names",
        "            if True:\n                names",
        "tests/test_schedule.py::test_what_is_under_way_while_matrices_are_multiplied_is_hidden_and_nothing_else",
    ),
    TakenOut(
        "targets: a padded window of a TPU's product counts what it holds",
        "parallel/cost/schedule.py",
        "0 <= (at := o * stride - pad + k * spread) < reach and at % apart == 0",
        "(at := o * stride - pad + k * spread) is not None",
        "tests/test_schedule.py::test_products_as_tpus_write_them_count_what_they_multiply",
    ),
    # ── the page of a run ────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "report: nothing in a sample or a config can end the script that holds the data",
        "runtime/report.py",
        'text = re.sub("[<>&]", lambda found: f"\\\\u{ord(found[0]):04x}", text)',
        "pass",
        "tests/test_report.py::test_markup_in_a_sample_a_config_or_a_name_stays_text",
    ),
    TakenOut(
        "report: the browser is told to load nothing",
        "runtime/report.html",
        "default-src 'none'; ",
        "",
        "tests/test_report.py::test_the_page_asks_for_nothing_outside_of_it",
    ),
    TakenOut(
        "report: spikes of a long curve stay",
        "runtime/report.py",
        "places += [finite_M[y_M[finite_M].argmin()], finite_M[y_M[finite_M].argmax()]]",
        "pass",
        "tests/test_report.py::test_a_page_stays_below_2_megabytes_and_says_what_it_left_out",
    ),
    TakenOut(
        "report: of many runs fewer points are drawn",
        "runtime/report.py",
        "points //= 2",
        "points = 0",
        "tests/test_report.py::test_a_page_stays_below_2_megabytes_and_says_what_it_left_out",
    ),
    TakenOut(
        "report: the end of a run writes its page",
        "recipes/finish.py",
        "attempt(report.PAGE, lambda: report.write([folder], folder / report.PAGE))",
        "pass",
        "tests/test_ending.py::test_what_fails_at_the_end_costs_only_itself_and_is_said",
    ),
    # ── tasks, optimizers, rows of a caller's ────────────────────────────────────────────────────────────────────
    TakenOut(
        "task: nothing in parallel/ names a key of a batch",
        "parallel/strategies/base.py",
        'return per_weight | {"weight": weight}',
        'return per_weight | {"tokens": weight}',
        "tests/test_task.py::test_nothing_in_parallel_names_a_key_of_a_batch",
    ),
    TakenOut(
        "task: weights are no whole numbers",
        "parallel/strategies/base.py",
        "return jnp.where(x > 0, x, 1)",
        "return jnp.maximum(x, 1)",
        "tests/test_task.py::test_a_loss_is_the_mean_by_weight_over_all_replicas_and_micro_steps",
    ),
    TakenOut(
        "task: rows of any rank are cut into micro-steps",
        "parallel/strategies/base.py",
        "*[None] * (x_BT.ndim - 1)",
        "None",
        "tests/test_task.py::test_a_loss_is_the_mean_by_weight_over_all_replicas_and_micro_steps",
    ),
    TakenOut(
        "task: a model whose weights begin at 0 is judged",
        "parallel/strategies/base.py",
        "ratio = size / (divisor(whole) *",
        "ratio = size / (whole *",
        "tests/test_task.py::test_rows_of_a_comparison_hold_objects",
    ),
    TakenOut(
        "task: all that is held out is read",
        "recipes/task.py",
        "(held_out // rows * rows, rows)",
        "rows",
        "tests/test_task.py::test_a_run_of_a_task_keeps_and_says_what_it_has_and_nothing_of_text",
    ),
    TakenOut(
        "task: axes are checked",
        "recipes/task.py",
        "        check_axes(shapes, self.axes)\n",
        "",
        "tests/test_task.py -k does_not_fit_together",
    ),
    TakenOut(
        "task: a run is opened with its task",
        "recipes/door.py",
        "if key in needed and key not in now:",
        "if key not in needed and key not in now:",
        "tests/test_task.py::test_a_run_of_a_task_is_opened_with_it",
    ),
    TakenOut(
        "task: streaming needs layers",
        "parallel/strategies/streaming.py",
        "if not isinstance(blocks, dict) or any(",
        "if isinstance(blocks, dict) and any(",
        "tests/test_task.py::test_streaming_needs_layers",
    ),
    TakenOut(
        "task: muon takes arrays that have no model dimension",
        "optim/muon.py",
        'return in_blocks and "embed" in names and any(name not in ("embed", "layers") for name in names)',
        "return in_blocks",
        "tests/test_task.py -k every_codec",
    ),
    TakenOut(
        "task: the state of an optimizer lies as the parameters do",
        "optim/own.py",
        "weights[keystr(path)] = weight",
        "weights[keystr(path)] = ()",
        "tests/test_task.py::test_a_codec_a_strategy_an_optimizer_and_a_loss_of_a_caller_s_train_and_go_on_to_the_same_bits[diloco]",
    ),
    TakenOut(
        "task: an optimizer whose state cannot be laid out is refused",
        "optim/own.py",
        "if (x.shape and not weight) or jnp",
        "if jnp",
        "tests/test_task.py -k optimizer_that_does_not_fit",
    ),
    TakenOut(
        "task: an optimizer of a caller's has no metric of a rate",
        "parallel/strategies/local.py",
        '**({"lr": rate} if self.optimizer.schedule else {}),',
        '"lr": rate,',
        "tests/test_task.py::test_a_codec_a_strategy_an_optimizer_and_a_loss_of_a_caller_s_train_and_go_on_to_the_same_bits[diloco]",
    ),
    TakenOut(
        "task: a function is told by what it closes over",
        "recipes/objects.py",
        "yield from _inside(cell.cell_contents, seen)",
        "yield str(len(seen))",
        "tests/test_task.py::test_another_optimizer_is_told_by_what_it_closes_over",
    ),
    TakenOut(
        "wire: a loop's counter may go by more than 1",
        "parallel/cost/loops.py",
        "-(-(bound - start) // step)",
        "bound - start",
        "tests/test_wire.py::test_a_loop_of_a_tpu_runs_from_its_counter_s_start_to_its_bound_by_its_step",
    ),
    TakenOut(
        "wire: a bound that a loop's body changes is not known",
        "parallel/cost/loops.py",
        "if _place(root.operands[place], body.lines) != place:",
        "if False:",
        "tests/test_wire.py::test_a_bound_that_the_loop_changes_is_an_error",
    ),
    TakenOut(
        "task: equal numbers in an object are each counted",
        "recipes/objects.py",
        "yield repr(value)\n        return\n",
        "yield repr(value) * (id(value) not in seen)\n        seen.add(id(value))\n        return\n",
        "tests/test_task.py::test_equal_numbers_in_an_object_are_each_counted",
    ),
    TakenOut(
        "task: a run of a comparison is named by the objects of its row",
        "recipes/runner.py",
        "KIND, *described_objects(job.own)]",
        "KIND]",
        "tests/test_task.py::test_the_file_of_a_run_is_named_by_the_objects_of_its_row_too",
    ),
    TakenOut(
        "task: a name in a row takes an object away",
        "recipes/methods.py",
        "own[name] = None if isinstance(x, str) else x",
        "own[name] = getattr(before, name) if isinstance(x, str) else x",
        "tests/test_task.py::test_the_file_of_a_run_is_named_by_the_objects_of_its_row_too",
    ),
]


def copy(target: Path) -> None:
    """The files that git tracks, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def check(case: TakenOut, tree: Path) -> str:
    """Empty if the test fails once the edit is made; else what is wrong. The tree is as before afterwards."""
    file = tree / case.file
    whole = file.read_text()
    if whole.count(case.text) != 1:
        return f"{case.file} has the text {whole.count(case.text)} times"
    try:
        file.write_text(whole.replace(case.text, case.replacement))
        where, _, expression = case.test.partition(" -k ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", where]
        command += ["-k", expression] if expression else []
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return ""  # it does not end without it
    finally:
        file.write_text(whole)
    if done.returncode == 1:
        return ""
    return "the test passes without it" if done.returncode == 0 else f"pytest: {done.stdout[-300:]}{done.stderr[-300:]}"


def main(argv: list[str]) -> int:
    wanted = [case for case in CASES if case.name in argv]
    wanted = wanted or [case for case in CASES if not argv or argv[0] in case.name]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        for case in wanted:
            wrong = check(case, Path(folder))
            failed += bool(wrong)
            print(f"{'NOT NOTICED' if wrong else 'noticed'}: {case.name}{f' ({wrong})' if wrong else ''}", flush=True)
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
