"""Weights of Hugging Face's in and out: GPT-2, Llama, Mistral, Mixtral, Qwen 2 and 3, Qwen3-MoE.

python -m model.huggingface import path/to/folder runs/base
python -m model.huggingface import model.gguf runs/base
python -m model.huggingface export runs/mine out/
python -m model.huggingface export runs/mine out/ --adapter

An import makes a workdir at step 0 of a folder with config.json, tokenizer.json and safetensors, or of a .gguf file.
Another run begins with it: train.py --config.init.workdir=runs/base. An export makes such a folder of the newest step
of a run; an adapter (lora.rank) is merged into it, or with --adapter becomes a folder that PEFT loads.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()
    early.one_arena()

import sys
from pathlib import Path

from parallel.layout import mesh as meshes
from recipes import exported, imported
from runtime import exits, usage


def main(argv: list[str]) -> int:
    parser = usage.parser(__doc__, "python -m model.huggingface")
    parser.add_argument("what", choices=["import", "export"], metavar="import|export", help="in or out")
    parser.add_argument("source", type=Path, metavar="FROM", help="a folder or a .gguf file; of an export, a workdir")
    parser.add_argument("target", type=Path, metavar="TO", help="what is made; it is not there yet")
    parser.add_argument("--simulate", type=int, metavar="N", help="so many devices, over which arrays are cut")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], metavar="NAME",
        help="of an export: float32, bfloat16 or float16; otherwise that of the import, or float32",
    )  # fmt: skip
    parser.add_argument("--adapter", action="store_true", help="of an export: what lora.rank has trained, and no more")
    args = parser.parse_args(argv)
    if args.simulate:
        meshes.simulate(args.simulate)
    say = lambda line: print(line, flush=True)
    if args.what == "import":
        imported.import_model(args.source.expanduser(), args.target.expanduser(), say)
    elif args.adapter:
        exported.export_adapter(args.source.expanduser(), args.target.expanduser(), say)
    else:
        exported.export_folder(args.source.expanduser(), args.target.expanduser(), args.dtype or "", say)
    return 0


if __name__ == "__main__":
    sys.exit(exits.guarded(lambda: main(sys.argv[1:]), "nothing was kept"))
