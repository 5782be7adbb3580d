"""--help of the commands, read off their source: at once, with nothing of the library imported."""

import ast
import re
import textwrap
from pathlib import Path

_FOLDER = Path(__file__).parent
_CONFIGS = _FOLDER.parent / "configs"
_NOT_A_STUDENTS = ("model", "data", "noise")  # they are its flow's
_FIELD = re.compile(r'^ {12}"(\w+)": (.+?),(?:  # (.*))?$')
_GROUP = re.compile(r"^    config\.(\w+) = ")
_WIDTH = 110


def show(command: str) -> str:
    """What `python -m launch.COMMAND --help` prints: what it does, examples, flags, and fields of a recipe."""
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
        lines += ["", "Fields of a recipe, each a flag: --config.GROUP.FIELD=VALUE", *_fields(command == "distill")]
    return "\n".join(lines)


def _parts(tree: ast.Module) -> list[Path]:
    """The other modules of launch/ that a command is made of."""
    imported = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [_FOLDER / f"{name.removeprefix('launch.')}.py" for name in imported if name.startswith("launch.")]


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


def _fields(of_student: bool) -> list[str]:
    lines, group = [], ""
    text = (_CONFIGS / "common.py").read_text().partition("return config")[0]
    if of_student:
        text += (_CONFIGS / "student" / "common.py").read_text().partition("return config")[0]
    for line in text.splitlines():
        if named := _GROUP.match(line):
            group = named[1]
        elif (field := _FIELD.match(line)) and not (of_student and group in _NOT_A_STUDENTS):
            lines.append(f"  {group}.{field[1]:<{26 - len(group)}} {field[2]}" + (f"  {field[3]}" if field[3] else ""))
    return lines
