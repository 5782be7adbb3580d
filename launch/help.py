"""--help of the commands, read off their source: at once, with nothing of the library imported."""

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(__file__).parent
_CONFIGS = _FOLDER.parent / "configs"
_NOT_A_STUDENTS = ("model", "data", "noise")  # they are its flow's
_FIELD = re.compile(r'^ {8}"(\w+)": (.+?),(?:  # (.*))?$')
_GROUP = re.compile(r'^ {4}"(\w+)": {$')
_WIDTH = min(shutil.get_terminal_size((110, 50)).columns, 110)


def show(command: str, fields: bool = False) -> str:
    """What `python -m launch.COMMAND --help` prints: what it does, examples, flags, and names of a recipe's fields.

    With `fields`, as `--helpfull` prints it, also each field's default and what it is.
    """
    tree = ast.parse((_FOLDER / f"{command}.py").read_text())
    lines = [ast.get_docstring(tree) or "", "", "Flags:"]
    shared = ast.parse((_FOLDER / "common.py").read_text())
    defined = {node.name: node for node in shared.body if isinstance(node, ast.FunctionDef)}
    trees = [tree, *(ast.parse(path.read_text()) for path in _parts(tree))]
    lines += [line for part in trees for line in _flags(part)]
    used = {node.attr for part in trees for node in ast.walk(part) if isinstance(node, ast.Attribute)}
    used -= {"define_seed"}  # a flag itself
    for name in sorted(used & defined.keys()):
        lines += _flags(defined[name])
    lines += [line for node in shared.body if not isinstance(node, ast.FunctionDef) for line in _flags(node)]
    if "DEFINE_config_file" in ast.dump(tree):
        lines += ["", "Fields of a recipe, each a flag: --config.GROUP.FIELD=VALUE"]
        of_student = command == "distill"
        names = [*_names(of_student), "--helpfull has their defaults, and what they are."]
        lines += _fields(of_student) if fields else names
    return "\n".join(lines)


def _parts(tree: ast.Module) -> list[Path]:
    """The other modules of launch/ that a command is made of."""
    imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [
        _FOLDER / f"{name.removeprefix('launch.').replace('.', '/')}.py"
        for name in imported
        if name.startswith("launch.")
    ]


def _flags(tree: ast.AST) -> list[str]:
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func).rpartition(".")[2]
        if function == "define_seed":
            name, default, text = "seed", "0", ast.literal_eval(call.args[0])
        elif re.match("DEFINE_|define_number", function) and isinstance(call.args[0], ast.Constant):
            name, default = call.args[0].value, re.sub(r"[\[\]' ]", "", ast.unparse(call.args[1]))
            text = next((a.value for a in call.args[:1:-1] if isinstance(a, ast.Constant) and a.value), "")
        else:
            continue
        shown = "" if default in ("None", "False", "") else f" [{default}]"
        found.append(textwrap.fill(f"  --{name:<22} {text}{shown}", _WIDTH, subsequent_indent=" " * 27))
    return found


def _recipe(of_student: bool) -> Iterator[tuple[str, re.Match[str]]]:
    """Group and line of every field."""
    group, files = "", [_CONFIGS / "common.py", *([_CONFIGS / "student" / "common.py"] if of_student else [])]
    for line in "".join(file.read_text().partition("\n}\n")[0] for file in files).splitlines():
        if named := _GROUP.match(line):
            group = named[1]
        elif (field := _FIELD.match(line)) and not (of_student and group in _NOT_A_STUDENTS):
            yield group, field


def _fields(of_student: bool) -> list[str]:
    lines = [(f"{group}.{field[1]}", field[2], field[3] or "") for group, field in _recipe(of_student)]
    return [f"  {name:<27} {default}  {text}".rstrip() for name, default, text in lines]


def _names(of_student: bool) -> list[str]:
    groups: dict[str, list[str]] = {}
    for group, field in _recipe(of_student):
        groups.setdefault(group, []).append(field[1])
    lines = (f"  {group:<10} {' '.join(names)}" for group, names in groups.items())
    return [textwrap.fill(line, _WIDTH, subsequent_indent=" " * 13) for line in lines]
