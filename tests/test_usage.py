"""--help has one shape everywhere: how a command is called, what it is, its options, examples."""

import importlib
import inspect
import re
import sys

import helpers
import pytest

from runtime import usage

# No commands of a user's: a guardian that bench/link.py starts, and what stands alone to be compared with.
NOT_FOR_USERS = {"bench/namespaces.py", "bench/torch_gpt.py", "bench/torch_generate.py", "bench/handwritten.py"}
MAIN = 'if __name__ == "__main__":'
FOLDERS = ("", "bench/", "runtime/", "serving/", "islands/")
FILES = [file for folder in FOLDERS for file in helpers.ROOT.glob(f"{folder}*.py")]
COMMANDS = sorted({str(file.relative_to(helpers.ROOT)) for file in FILES if MAIN in file.read_text()} - NOT_FOR_USERS)
# Where its `main` is.
ELSEWHERE = {"runtime/checkpoint.py": "runtime.verify", "islands/laboratory.py": "islands.experiments"}


def shown(file: str, monkeypatch, capsys) -> str:
    """What `--help` prints, of a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", [*sys.path])  # a file of bench/ puts the project's folder there
    main = importlib.import_module(ELSEWHERE.get(file, file.removesuffix(".py").replace("/", "."))).main
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    arguments = [["train.py", "--help"]] if file == "train.py" else [["--help"]]
    with pytest.raises(SystemExit) as stop:
        main(*(arguments if inspect.signature(main).parameters else []))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_commands_are_found():
    assert {"train.py", "compare.py", "runtime/report.py", "runtime/launch.py", "bench/step.py"} < set(COMMANDS)


@pytest.mark.parametrize("file", COMMANDS)
def test_help_has_one_shape(file, monkeypatch, capsys):
    text = shown(file, monkeypatch, capsys)
    module = file.removesuffix(".py").replace("/", ".").removesuffix(".__main__")
    command = f"python -m {module}" if file.startswith(("runtime/", "serving/", "islands/")) else f"python {file}"
    found = re.fullmatch(
        r"usage: (?:sudo )?(?P<call>.*?)\n\n(?P<about>[A-Z].*?)\n\n(positional arguments:\n(?P<named>.*?)\n\n)?"
        r"options:\n(?P<options>.*?)\n\nexamples:\n(?P<examples>.*)\n",
        text,
        re.DOTALL,
    )
    assert found, text
    assert found["call"].startswith(f"{command} ") and "[options]" in found["call"] and "\n" not in found["call"]
    assert command not in found["about"], "all examples stand at the end"
    entries = re.split(r"\n(?=  \S)", found["options"])
    assert entries[0].split("  ")[1] == "-h, --help"
    for entry in entries:
        option = re.fullmatch(r"  (-h, --help|--\S+)\s+(?P<said>\S.*)", entry, re.DOTALL)
        assert option, f"without a word on what it is: {entry}"
        said = option["said"]
        assert not said[0].isupper() and not said.endswith("."), f"in another style than the others: {entry}"
    for line in found["examples"].splitlines():
        assert re.match(rf"  (sudo )?{re.escape(command)}\b", line), line
        used = re.findall(r"--[\w-]+", line.partition(" -- ")[0].partition("   ")[0])
        assert all(option in found["options"] for option in used), line


def test_examples_are_taken_out_of_a_docstring():
    doc = "What it does.\n\npython a.py\nsudo python a.py --b     or so\n\nMore of it,\npython a.py is named here."
    about, examples = usage.apart(doc)
    assert about == "What it does.\n\nMore of it,\npython a.py is named here."
    assert examples == ["python a.py", "sudo python a.py --b     or so"]


def test_an_option_says_its_value_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = usage.parser("It.\n\npython a.py --n=1", "python a.py", then="-- REST")
    parser.add_argument("--n", type=int, required=True, help="how many")
    parser.add_argument("--of", default="x", help="of what")
    parser.add_argument("--both", action="store_true", help="of all")
    parser.add_argument("file", help="to read")
    text = parser.format_help()
    assert text.startswith("usage: python a.py --n=N [options] FILE -- REST\n\nIt.\n")
    for line in ("--n=N +how many", "--of=TEXT +of what \\(default: x\\)", "--both +of all"):
        assert re.search(rf"^  {line}$", text, re.MULTILINE), text
    with pytest.raises(SystemExit):
        parser.parse_args(["there", "--of=y"])
    said = capsys.readouterr().err
    assert said.startswith("usage: python a.py --n=N [options] FILE -- REST\n") and "--n" in said.splitlines()[-1]
