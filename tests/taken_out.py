"""For each mending an edit that takes it out, and the test that must then fail.

python tests/taken_out.py [TEXT]        does those whose name contains TEXT, in a copy of the working tree

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
    relative to the root."""

    name: str
    file: str
    text: str
    replacement: str
    test: str


CASES = [
    # ── refusing ─────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "refusing: after three refusals what is finite is applied",
        "model/guard.py",
        "applied = sound & (~spike | (counters.in_a_row >= PATIENCE))",
        "applied = sound & ~spike",
        "tests/test_optimizer.py::test_after_three_refusals_in_a_row_what_is_finite_is_applied_scaled_to_the_limit",
    ),
    TakenOut(
        "refusing: what is new is judged before residuals are added to it",
        "parallel/strategies.py",
        "messages_R = jax.tree.map(lambda m: jnp.where(new.applied, m, 0), messages_R)",
        "",
        "tests/test_strategies.py::test_a_gradient_of_nan_leaves_no_trace",
    ),
    TakenOut(
        "refusing: state is stored by the verdict on the gradient that made it",
        "parallel/strategies.py",
        "return messages_R, self.guard.commit(new, opt, state.opt), new,",
        "return messages_R, opt, new,",
        "tests/test_refusing.py::test_one_bad_batch_at_any_phase_of_a_round_leaves_no_lasting_trace[stale-none-signum]",
    ),
    TakenOut(
        "refusing: a round that is not finite leaves the replicas where the round began",
        "parallel/local.py",
        "sent = lambda x: jnp.where(verdict.applied, jnp.where(verdict.scale < 1, verdict.scale * x, x), 0)",
        "sent = lambda x: x",
        "tests/test_strategies.py::test_a_replica_with_parameters_of_nan_begins_its_next_round_like_the_others",
    ),
    TakenOut(
        "refusing: a batch without target tokens makes no update",
        "parallel/strategies.py",
        "sound = (tokens > 0) & jnp.isfinite(loss)",
        "sound = jnp.isfinite(loss)",
        "tests/test_strategies.py::test_a_batch_without_target_tokens_is_no_update",
    ),
    TakenOut(
        "refusing: residuals follow an exchange that is cut off",
        "parallel/strategies.py",
        "codec = self.guard.commit(usable, codec, state.codec)",
        "codec = self.guard.commit(used, codec, state.codec)",
        "tests/test_refusing.py::test_a_lump_that_residuals_hold_is_cut_off_and_does_not_come_back",
    ),
    TakenOut(
        "refusing: a vote of zero is no vote",
        "model/momentum_messages.py",
        "return jax.tree.map(jnp.sign, momentum_R), opt",
        "return jax.tree.map(lambda m: jnp.where(m < 0, -1.0, 1.0), momentum_R), opt",
        "tests/test_strategies.py::test_a_tie_and_a_vote_of_zero_move_nothing",
    ),
    TakenOut(
        "refusing: 1-bit Adam masks what has no variance",
        "model/momentum_messages.py",
        'return {"first": jnp.where(own["second"] > 0, u, 0), "second": own["second"]}',
        'return {"first": u, "second": own["second"]}',
        "tests/test_strategies.py::test_the_row_of_a_token_that_never_occurs_does_not_drift[onebit_adam-sign-10-]",
    ),
    TakenOut(
        "refusing: the sign of a zero is drawn",
        "parallel/codecs/quantized.py",
        "positive_MB = (x_MB > 0) | ((x_MB == 0) & coins_MB)",
        "positive_MB = x_MB >= 0",
        "tests/test_strategies.py::test_the_row_of_a_token_that_never_occurs_does_not_drift[sign-off-]",
    ),
    TakenOut(
        "deciding: norms are added up in one order everywhere",
        "parallel/norms.py",
        "parts_DM = lax.all_gather(parts_DM, axis, tiled=True)",
        "parts_DM = lax.psum(parts_DM, axis)",
        "tests/test_strategies.py::test_a_norm_is_the_same_bits_on_every_device_and_crosses_no_slow_axis",
    ),
    # ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────
    TakenOut(
        "going on: what servers owe is folded, of fragments too",
        "parallel/fold.py",
        'FRAGMENTS = "codec/fragments/server/"',
        'FRAGMENTS = "codec/fragments/servers/"',
        "tests/test_seams.py::test_a_few_changes_of_mesh_and_replicas[streaming-diloco-adamw]",
    ),
    TakenOut(
        "going on: what was in flight is owed where it has no place",
        "parallel/resume.py",
        'flying = [n for n, x in self.saved.items() if x["kind"] == roles.IN_FLIGHT and n not in self.wanted]',
        "flying: list[str] = []",
        "tests/test_seams.py::test_a_few_changes_of_mesh_and_replicas[stale-sync-adamw]",
    ),
    TakenOut(
        "going on: every array that is another one is named",
        "parallel/resume.py",
        "self._say(what, [name])",
        "",
        "tests/test_seams.py::test_a_few_changes_of_mesh_and_replicas[sync-diloco-adamw]",
    ),
    TakenOut(
        "going on: an old array is cut over the mesh, not held whole by every device",
        "parallel/resume.py",
        "if place is not None and size > 1:",
        "if False:",
        "tests/test_seams.py::test_every_change_of_mesh_and_replicas[diloco-streaming-adamw]",
    ),
    TakenOut(
        "going on: a run that cannot end in whole rounds is refused",
        "parallel/strategies.py",
        "if step % K or last % K:",
        "if False:",
        "tests/test_strategies.py::test_a_run_that_would_not_end_in_whole_rounds_is_refused",
    ),
    TakenOut(
        "going on: a step counts updates, not calls",
        "parallel/streaming.py",
        "step=state.step + K,",
        "step=state.step + 1,",
        "tests/test_strategies.py::test_a_step_of_every_strategy_is_an_update",
    ),
    TakenOut(
        "going on: an eager run that is extended is together after its last round",
        "parallel/eager.py",
        "state = self._apply(state, mean, codec, nothing_R, none, False)",
        "after = self._apply(state, mean, codec, nothing_R, none, False)\n"
        "        state = replace(after, strategy=after.strategy | {'outer': state.strategy['outer']})",
        "tests/test_strategies.py::test_an_eager_run_that_is_extended_goes_on_like_one_that_was_not_ended",
    ),
    TakenOut(
        "names: a chain's positions are not on the disk",
        "model/optimizer.py",
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
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", case.test]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=1800)
    finally:
        file.write_text(whole)
    if done.returncode == 1:
        return ""
    return "the test passes without it" if done.returncode == 0 else f"pytest: {done.stdout[-300:]}{done.stderr[-300:]}"


def main(argv: list[str]) -> int:
    wanted = [case for case in CASES if not argv or argv[0] in case.name]
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
