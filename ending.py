"""The end of a run: what it leaves behind for people to look at."""

import assemble
from data import corpus as corpora
from runtime.digest import params_digest
from runtime.metrics import read
from runtime.plot import plot_loss


def finish(config, parts, corpus, workdir, console, phases, params, evaluated: tuple[float, float]) -> None:
    """samples.txt, summary.json, plots/loss.png. Called by every process: the parameters stay in their shards."""
    eval_loss, eval_bits_per_byte = evaluated
    digest = params_digest(params)
    text = assemble.sample_text(config, parts, params, corpus.tokenizer)
    if not workdir.leader:
        return
    if text:
        (workdir.path / "samples.txt").write_text(text + "\n")
        console.say(f"a sample:\n{text}")
    unigram, bigram = corpora.ngram_bits_per_byte(corpus)
    rows = read(workdir.path / "metrics.jsonl")
    last = [row for row in rows if "loss" in row][-1]
    phases.mark("training and end")
    workdir.update_summary(
        parameters=assemble.num_parameters(parts),
        mesh=dict(parts.mesh.shape),
        steps=last["step"],
        tokens=last["tokens"],
        final_loss=last["loss"],
        final_eval_loss=eval_loss,
        final_eval_bits_per_byte=eval_bits_per_byte,
        unigram_bits_per_byte=unigram,
        bigram_bits_per_byte=bigram,
        params_digest=digest,
        wire_bytes_per_step=last["wire_bytes"],
        compiles=len(parts.strategy.programs()),  # ahead of time: the executables cannot compile again
        phases=phases.seconds,
        goodput=round(last["train_seconds"] / workdir.seconds_since_first_start(), 4),
    )
    nats = eval_loss / eval_bits_per_byte  # nats per token for one bit per byte
    baselines = {"unigram": unigram * nats, "bigram": bigram * nats}
    (workdir.path / "plots").mkdir(exist_ok=True)
    plot_loss(rows, workdir.path / "plots" / "loss.png", workdir.path.name, baselines)
    console.say(
        f"held-out text: {eval_bits_per_byte:.3f} bits per byte (unigram {unigram:.2f}, bigram {bigram:.2f}); "
        f"see {workdir.path}/plots/loss.png and summary.json"
    )
