"""The code keeps to docs/architecture.md, and the documents speak of what exists."""

import ast
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import helpers
import jax
import pytest

from configs import base
from parallel.strategies import beside
from recipes import methods
from runtime import config as configuration
from runtime import launch

ROOT = helpers.ROOT
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PER_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

# ── the source tree ──────────────────────────────────────────────────────────────────────────────────────────────


def sources() -> Iterator[Path]:
    """Every Python file of the project, relative to its root; virtual environments and runs are not the project's."""
    for folder, subfolders, names in os.walk(ROOT):
        here = Path(folder)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith((".", "__")) and name != "runs" and not (here / name / "pyvenv.cfg").exists()
        )
        yield from ((here / name).relative_to(ROOT) for name in sorted(names) if name.endswith(".py"))


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


ROOMS_OF_THEIR_OWN = {"model/huggingface.py", "data/chat.py"} | {
    f"islands/{name}.py" for name in ("experiments", "founding", "comparison", "compared", "language")
}


def room(file: Path) -> str:
    """Of a file: its folder at the root, or its own name there; parallel/ has four rooms, and a command its own."""
    if str(file) in ROOMS_OF_THEIR_OWN:
        return str(file.with_suffix(""))
    first = file.parts[0].removesuffix(".py")
    return "/".join(file.parts[:2]) if first == "parallel" and len(file.parts) > 2 else first


SOURCES = list(sources())
PER_FILE = pytest.mark.parametrize("file", SOURCES, ids=str)
NOT_TESTS = pytest.mark.parametrize("file", [file for file in SOURCES if room(file) != "tests"], ids=str)

# ── 1. a training step is read in tiers ──────────────────────────────────────────────────────────────────────────

STEP = {
    "model/transformer.py", "model/attention.py", "model/layers.py", "model/loss.py", "optim/optimizer.py",
    "optim/guard.py", "parallel/layout/rules.py", "parallel/strategies/base.py", "parallel/strategies/sync.py",
}  # fmt: skip
# With an exchange; the last two run before the step is traced, and are read to understand it. Besides, one codec.
EXCHANGE = {
    "parallel/exchange/exchange.py", "parallel/exchange/net.py", "parallel/exchange/codecs/base.py",
    "parallel/exchange/residuals.py", "parallel/exchange/units.py",
}  # fmt: skip
CODEC = {
    name: f"parallel/exchange/codecs/{file}.py"
    for file, names in {
        "plain": "exact bf16", "quantized": "int", "floats": "fp4", "sign": "sign", "sparse": "topk",
        "lowrank": "powersgd", "rounds": "rounds",
    }.items()
    for name in names.split()
}  # fmt: skip
STRATEGIES = "stale local streaming eager warmed overlap backward beside".split()
STRATEGY = {name: f"parallel/strategies/{name}.py" for name in STRATEGIES}
AXES = {
    "pipeline": "parallel/layout/pipeline.py", "ring": "parallel/layout/ring.py", "products": "model/products.py",
    "experts": "parallel/layout/experts.py", "moe": "model/moe.py", "first": "model/first.py",
}  # fmt: skip
OTHERS = {"muon": "optim/muon.py", "messages": "optim/messages.py", "lora": "model/lora.py"}
FEATURES = CODEC | STRATEGY | OTHERS | AXES
# {recipe: (mesh, its config, its codec, further features)}
INT4 = {"sync__codec": "int4"}
RECIPES = {
    "one device": ((1, 1, 1), {}, "", ""),
    "fast axes": ((1, 2, 2), {}, "", ""),
    "muon": ((1, 2, 2), {"optimizer__name": "muon"}, "", "muon"),
    "bf16": ((2, 2, 2), {"sync__codec": "bf16"}, "bf16", ""),
    "int8": ((4, 2, 1), {"sync__codec": "int8"}, "int", ""),
    "int4, error feedback": ((4, 2, 1), INT4, "int", ""),
    "fp4": ((2, 2, 2), {"sync__codec": "fp4"}, "fp4", "int"),
    "topk": ((2, 2, 2), {"sync__codec": "topk"}, "topk", "int"),
    "powersgd": ((2, 2, 2), {"sync__codec": "powersgd"}, "exact", "rounds powersgd"),
    "stale": ((4, 2, 1), INT4 | {"sync__strategy": "stale"}, "int", "stale overlap"),
    "backward": ((4, 2, 1), INT4 | {"sync__exchange": "backward"}, "int", "backward"),
    "diloco": ((4, 2, 1), INT4 | {"sync__strategy": "diloco"}, "int", "local"),
    "streaming": (
        (4, 2, 1),
        INT4 | {"sync__strategy": "streaming", "sync__interval": 10, "sync__overlap": 1},
        "int",
        "local streaming overlap",
    ),
    "eager": ((4, 2, 1), INT4 | {"sync__strategy": "eager", "sync__interval": 5}, "int", "local eager"),
    "1-bit Adam": (
        (4, 2, 1),
        {"optimizer__name": "onebit_adam", "optimizer__freeze_steps": 2, "sync__codec": "sign"},
        "sign",
        "int exact messages warmed",
    ),
    "stages": ((1, 2, 2, 1, 1), {"optimizer__accumulate": 2}, "", "pipeline"),
    "long sequences": ((1, 1, 2, 2), {"attention__context": "ring"}, "", "ring products"),
    "experts": ((1, 1, 2, 2, 1, 1), {"model__experts": 4}, "", "experts moe"),
    "layers before experts": (
        (1, 1, 2, 2, 1, 1),
        {"model__experts": 4, "model__dense_layers": 1, "model__dense_dim": 64},
        "",
        "experts moe first",
    ),
    "LoRA": ((4, 2, 1), INT4 | {"lora__rank": 2, "init__workdir": "runs/base"}, "int", "lora beside"),
}


def files_run_by(call: Callable[[], object]) -> set[str]:
    """Names of the project's files with a function that runs during the call."""
    found: set[str] = set()

    def note(frame, event, argument):
        found.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {str(file) for file in SOURCES if str(ROOT / file) in found and room(file) != "tests"}


def lines(files: set[str]) -> int:
    return sum(len((ROOT / file).read_text().splitlines()) for file in files)


# Residuals without error feedback, units before the step; a local strategy does without the synchronous one.
MAY_REST = {f"parallel/{name}.py" for name in ("exchange/residuals", "exchange/units", "strategies/sync")}
QUICK = ("one device", "int8")


@pytest.mark.parametrize(
    "recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_what_runs_while_a_step_is_traced_is_its_tiers(recipe):
    mesh, config, codec, features = RECIPES[recipe]
    wanted = STEP | (EXCHANGE | {CODEC[codec]} if codec else set()) | {FEATURES[name] for name in features.split()}
    parts = helpers.build(helpers.tiny(**config), mesh)
    (phase,) = parts.phases
    calls = phase.strategy.programs()
    if parts.frozen:
        calls = beside.programs(phase.strategy, lambda params, _, base: parts.task.lora.join(base, params))

    def trace():
        for program in calls.values():
            jax.jit(program).lower(phase.state, phase.batch, *parts.frozen)

    found = files_run_by(trace)
    assert found <= wanted, f"more is run: {sorted(found - wanted)}"
    assert wanted - found <= MAY_REST


def test_a_step_without_an_exchange_is_read_in_9_files_and_1200_lines():
    assert len(STEP) <= 9 and lines(STEP) <= 1200


@pytest.mark.parametrize("codec", ["bf16", "int", "sign"])
def test_a_block_codec_is_6_files_and_850_lines_more(codec):
    more = EXCHANGE | {CODEC[codec]}
    assert len(more) <= 6 and lines(more) <= 850


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_a_further_feature_is_one_file_of_at_most_300_lines(feature):
    assert lines({FEATURES[feature]}) <= 300


def test_the_architecture_page_lists_these_files():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## The life of one training step\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)) == STEP | EXCHANGE | {CODEC["int"]}


# ── 2. imports point one way ─────────────────────────────────────────────────────────────────────────────────────

PARALLEL = {f"parallel/{name}" for name in ("layout", "exchange", "strategies", "cost")}
MAY_IMPORT = {
    "model": {"model"},
    "model/huggingface": {"recipes", "parallel/layout", "runtime"},
    "optim": {"optim"},
    "parallel": set(),
    "parallel/layout": {"parallel/layout"},
    "parallel/exchange": {"parallel/exchange", "parallel/layout"},
    "parallel/strategies": {"parallel/strategies", "parallel/exchange", "parallel/layout"},
    "parallel/cost": {"parallel/cost", "parallel/exchange", "parallel/layout"},
    "data": {"data"},
    "data/chat": {"data", "runtime"},
    "runtime": {"runtime"},
    "configs": {"configs"},
    "recipes": {"recipes", "islands", "model", "optim", *PARALLEL, "data", "runtime"},
    "compare": {"recipes", "islands", "data", *PARALLEL, "runtime"},
    "plan": {"recipes", *PARALLEL, "runtime"},
    "train": {"recipes", "data", *PARALLEL, "runtime"},
    "slackline": {"recipes", "data", "runtime"},
    "islands/experiments": {"islands", "recipes", "runtime"},
    "islands/founding": {"islands", "recipes", "parallel/layout", "runtime"},
    "islands/comparison": {"islands", "recipes", "runtime"},
    "islands/compared": {"islands", "runtime"},
    "islands/language": {"recipes", "parallel/layout", "runtime"},
    "islands": {"islands", "parallel/exchange", "runtime"},
    "serving": {"serving", "recipes", "model", "parallel/layout", "parallel/cost", "data", "runtime"},
    "serve": {"serving", "data", "runtime"},
    "generate": {"serving", "data", "runtime"},
    "chat": {"serving", "recipes", "parallel/layout", "data", "runtime"},
    "examples": {"slackline"},
    "notebooks": set(),
}
FREE = {"tests", "bench"}  # these may use everything, and nothing may use them


def imported_rooms(tree: ast.Module, own: str) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {room(Path(*alias.name.split("."), "module.py")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            names = [name for name in whole if name != "parallel"]
            found |= {own} if node.level else {room(Path(*name.split("."), "module.py")) for name in names}
    return found & (MAY_IMPORT.keys() | FREE)


@PER_FILE
def test_imports_point_one_way(file):
    own = room(file)
    if own in FREE:
        return
    assert own in MAY_IMPORT, f"{file} is in a new room: say in MAY_IMPORT and docs/architecture.md what it may import"
    wrong = imported_rooms(parsed(file), own) - MAY_IMPORT[own]
    assert not wrong, f"{file} imports {', '.join(sorted(wrong))}; docs/architecture.md says what it may import"


def test_an_import_against_the_arrows_is_noticed():
    code = "def f():\n    from parallel.layout.rules import RULES\n    import configs.tiny, numpy"
    assert imported_rooms(ast.parse(code), "model") == {"parallel/layout", "configs"}
    assert imported_rooms(ast.parse("from parallel import cost"), "model") == {"parallel/cost"}
    assert imported_rooms(ast.parse("import parallel.strategies.base"), "model") == {"parallel/strategies"}


def test_there_is_one_loop_that_trains():
    loops = {
        str(file)
        for file in SOURCES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute) and node.attr == "batches" and room(file) not in FREE
    }
    assert loops == {"recipes/fit.py"}, "batches of training are asked for by fit.Steps only: iterate over it"


# ── 3. files and functions stay short ────────────────────────────────────────────────────────────────────────────


@NOT_TESTS
def test_no_file_is_longer_than_350_lines_and_no_function_than_60(file):
    assert len((ROOT / file).read_text().splitlines()) <= 350
    if file == Path("configs/base.py"):
        return  # one function, but a list: every default, once
    for node in ast.walk(parsed(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{file}: {node.name} has {length} lines"


# ── 4. nothing that executes data, nothing private of JAX ────────────────────────────────────────────────────────

FORBIDDEN_MODULES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "jax._src")


def forbidden(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            names = []
        found += [n for n in names if n == "torch.load" or any(f"{n}.".startswith(f"{m}.") for m in FORBIDDEN_MODULES)]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.removeprefix("builtins.") in ("eval", "exec"):
                found.append(called)
            found += [
                f"{called}(allow_pickle=…)"
                for keyword in node.keywords
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False
            ]
    return found


# JAX has no public way to wait for other processes with a time-out: one function takes its coordination client.
THE_EXCEPTION = {Path("runtime/agree.py"): ["jax._src.distributed"]}


@PER_FILE
def test_nothing_executes_data_or_uses_what_jax_keeps_private(file):
    assert forbidden(parsed(file)) == THE_EXCEPTION.get(file, [])


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import pickle as p",
        "from jax._src import core",
        "from jax import _src",
        "import jax._src.core",
        "jax._src.core.Tracer",
        "eval('1')",
        "builtins.exec(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "from torch import load",
    ],
)
def test_each_forbidden_name_is_noticed(code):
    assert forbidden(ast.parse(code))


@pytest.mark.parametrize("code", ["model.eval()", "np.load(path)", "np.load(path, allow_pickle=False)", "jax.jit(f)"])
def test_what_only_looks_like_one_is_allowed(code):
    assert not forbidden(ast.parse(code))


# ── 5. a process that trains beside others does not look for itself ──────────────────────────────────────────────

LOOKS = {"glob", "rglob", "iterdir", "listdir", "scandir", "walk", "exists", "lexists", "is_file", "is_dir", "stat"}
# {(file, function): why it may look}. What is not here asks process 0 (`agree.decided`), which alone sees the disk.
MAY_LOOK = {
    ("runtime/config/flags.py", "_start"): "before the processes have met; what it finds is compared then",
    ("runtime/config/flags.py", "execute"): "before the processes have met; what it finds is compared then",
    ("runtime/lock.py", "hold"): "inside a decision of process 0",
    ("runtime/lock.py", "_is_linked"): "inside a decision of process 0",
    ("runtime/metrics.py", "rewind"): "of process 0",
    ("runtime/metrics.py", "__init__"): "of process 0",
    ("runtime/steps.py", "_names"): "inside decisions of process 0",
    ("runtime/steps.py", "set_aside"): "inside decisions of process 0",
    ("runtime/steps.py", "make_room"): "inside a decision of process 0",
    ("runtime/workdir.py", "holds_run"): "inside a decision of process 0",
    ("runtime/workdir.py", "changes"): "inside a decision of process 0",
    ("runtime/workdir.py", "summary"): "inside a decision of process 0, or of process 0",
}
# The one room for it; tools that never train; a comparison, which has no processes beside it.
ALONE = {
    "runtime/agree.py",
    "runtime/launch.py",
    "runtime/verify.py",
    "runtime/report.py",
    "recipes/compare.py",
    "recipes/runner.py",
    "recipes/door.py",
    "recipes/planned.py",
    "recipes/imported.py",
    "recipes/exported.py",
    "recipes/published.py",
    "recipes/gaps.py",
}


def looks(tree: ast.Module) -> set[str]:
    """Names of the functions that look at a directory (the innermost one that has a name)."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOKS:
            found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


def test_only_what_process_0_decides_looks_at_a_directory():
    assert len(MAY_LOOK) <= 12
    trainers = [file for file in SOURCES if room(file) in ("train", "recipes", "runtime") and str(file) not in ALONE]
    found = {(str(file), function) for file in trainers for function in looks(parsed(file))}
    assert found == MAY_LOOK.keys(), "agree.decided asks process 0; a line in MAY_LOOK says why that is not needed"


@pytest.mark.parametrize("call", ["os.listdir(x)", "path.glob('*')", "(path / 'a').exists()", "os.path.lexists(x)"])
def test_each_way_to_look_is_noticed(call):
    assert looks(ast.parse(f"def f():\n    return [lambda: {call}]")) == {"f"}


# ── 6. the documents speak of what exists ────────────────────────────────────────────────────────────────────────


def commands(document: Path) -> list[list[str]]:
    """The shell commands in the fenced blocks of a document, as words."""
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.removeprefix("$ ").split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


@PER_DOCUMENT
def test_every_relative_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name} links to {target}"


@PER_DOCUMENT
def test_every_file_that_is_named_exists(document):
    text = document.read_text()
    rooms = sorted({file.parts[0] for file in SOURCES if len(file.parts) > 1} | {"docs"})
    named = re.findall(rf"(?<![\w./])((?:{'|'.join(rooms)})/[\w./-]*\w)", text)
    named += re.findall(r"(?<![\w./*-])(\w+\.(?:py|md))\b", text)
    for name in named:
        assert (ROOT / name).exists() or (document.parent / name).exists(), f"{document.name} names {name}"


@PER_DOCUMENT
def test_every_config_key_exists(document):
    keys = {key for key, _ in configuration.flatten(base.get_config())}
    named = set(re.findall(r"--config\.([a-z0-9_.]*[a-z0-9_])", document.read_text()))
    assert named <= keys, f"{document.name} sets {', '.join(sorted(named - keys))}"


@PER_DOCUMENT
def test_every_training_command_can_be_read(document, tmp_path, monkeypatch):
    """Parsed and validated, not run. A run that is resumed, or started from, is taken to be a quickstart."""
    monkeypatch.chdir(ROOT)
    saved = methods.parse(["train.py", "--config=configs/quickstart.py"], "")[0]
    (tmp_path / "config.json").write_text(saved.to_json())
    for words in commands(document):
        if "runtime.launch" in words:
            launch.parse(words[words.index("runtime.launch") + 1 :])
        if "train.py" not in words:
            continue
        argv = words[words.index("train.py") :]
        start_from = "--config.init.workdir="
        argv = [f"{start_from}{tmp_path}" if word.startswith(start_from) else word for word in argv]
        if not any(word.startswith("--config=") for word in argv):
            argv = [f"--workdir={tmp_path}" if word.startswith("--workdir=") else word for word in argv]
        config, _ = methods.parse(argv, "")
        methods.validate(config)


@PER_DOCUMENT
def test_every_make_target_exists(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(document):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words


def test_commands_are_found_in_a_document(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("```sh\nmake test  # all\npython train.py \\\n    --a=1 && ls\n```\n\n```text\nnot this\n```\n")
    assert commands(document) == [["make", "test"], ["python", "train.py", "--a=1"], ["ls"]]


def test_the_readme_has_commands_to_check():
    assert sum("train.py" in words for words in commands(ROOT / "README.md")) >= 3


def test_the_picture_is_small():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture.name
