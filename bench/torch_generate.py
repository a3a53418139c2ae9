"""transformers on llama.cpp's file of a model, in a Python that has torch: what bench/serve.py is measured against, and
tests/test_smollm2.py compared with.

python bench/torch_generate.py FILE.gguf      (it needs torch, transformers, gguf and accelerate)

It answers each line on stdin, JSON, with one JSON line:
{"ids": […], "count": N}       greedy: the ids that follow, the gaps between the two best logits, the seconds of it
{"ids": […], "save": "x.npy"}  the logits [T, V] of these ids, saved there
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Transformers:
    """The process. Imported by scripts that have no torch themselves."""

    def __init__(self, python: str, file: Path):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([python, __file__, str(file)], text=True, **pipes)
        self.versions = self._answer()

    def greedy(self, ids: list[int], count: int) -> dict[str, Any]:
        return self._ask({"ids": ids, "count": count})

    def logits(self, ids: list[int], path: Path) -> None:
        self._ask({"ids": ids, "save": str(path)})

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of transformers ended with status {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Transformers":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(file: Path) -> None:
    import numpy as np  # ty: ignore
    import torch  # ty: ignore
    import transformers  # ty: ignore

    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes elsewhere
    tell = lambda what: print(json.dumps(what), file=answers, flush=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # it goes on, as it is asked to
    tell({"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor([asked["ids"]])
        with torch.no_grad():
            if "save" in asked:
                np.save(asked["save"], model(ids).logits[0].numpy())
                tell({})
                continue
            start, count = time.perf_counter(), asked["count"]
            how = {"do_sample": False, "max_new_tokens": count, "output_logits": True}
            found = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **how)
            seconds = time.perf_counter() - start
            best = [torch.topk(logits[0], 2).values for logits in found.logits]
        new = found.sequences[0, ids.shape[1] :].tolist()
        tell({"ids": new, "gaps": [float(a - b) for a, b in best], "seconds": seconds})


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    serve(Path(sys.argv[1]))
