"""Settings without a framework: a script's own globals are the settings.

    batch_size = 12  # sequences per micro-batch       <- default and documentation, in the script
    settings = configure(globals())                    <- python script.py config/a.py --batch_size=16

Config files (.py, or the config.json of an earlier run) and --key=value flags are applied in the
order given, later ones win. Both pass the same checks, and a mistake ends in one line, exit code 2.
"""
import ast, difflib, json, math, operator, os, sys, tokenize, traceback
from contextlib import contextmanager
from pathlib import Path

BOOLS = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos}


def configure(module: dict, start_from: dict | None = None, argv: list[str] | None = None) -> dict:
    """Apply the command line to `module` (a script's globals()) and return the final settings.

    `start_from` stands in for the script's defaults: a resumed run passes its checkpoint's settings, and
    the command line is applied on top of those. Keys of it that the script no longer has are ignored.
    """
    with user_errors():
        # The types are those of the source's defaults, also when a second call finds them overridden.
        defaults = module.setdefault("_defaults", {k: v for k, v in module.items() if is_setting(k, v)})
        settings = defaults | {k: v for k, v in (start_from or {}).items() if k in defaults}
        for arg in sys.argv[1:] if argv is None else argv:
            if arg in ("-h", "--help"):
                print(help_text(module["__file__"], module.get("__doc__"), defaults))
                raise SystemExit(0)
            for key, value, source in overrides(arg, settings):
                if key not in defaults:
                    nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
                    raise ValueError(f"{source}: no setting is called {key!r} (value {value!r}); the nearest is {nearest!r}")
                settings[key] = checked(key, value, defaults[key], source)
        module.update(settings)
        return settings


@contextmanager
def user_errors():
    """Turn a user's mistake, raised inside, into one line on stderr and exit code 2.

    A mistake is a ValueError of this project's own, a failing file operation or a missing package; others are bugs.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = raised_in.is_relative_to(Path(__file__).parent) and "site-packages" not in raised_in.parts  # of .venv
        if isinstance(error, ValueError) and not ours:
            raise
        rank = os.environ.get("RANK", "0")  # torchrun's; every rank stumbles over the same mistake
        print("error: " + ("" if rank == "0" else f"rank {rank}: ") + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def is_setting(key, value):
    """Lower-case numbers, strings and booleans are settings; _private names and CONSTANTS are not."""
    return isinstance(value, (bool, int, float, str)) and key.islower() and not key.startswith("_")


def overrides(arg, settings):
    """The (key, value, where it stands) that one command-line word sets."""
    if arg.startswith("--"):
        key, equals, text = arg[2:].partition("=")
        return [(key, text if equals else True, arg)]
    path = Path(arg)
    if path.suffix not in (".py", ".json"):
        raise ValueError(f"{arg!r} is neither a --key=value flag nor a config file (.py or .json)")
    if not path.is_file():
        raise ValueError(f"config file {arg} not found (from {Path.cwd()})")
    try:
        source = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return [(key, value, arg) for key, value in json.loads(source)["settings"].items()]
        namespace = dict(settings)  # so that a file can say lr_decay_iters = max_iters
        exec(compile(source, arg, "exec"), namespace)
    except Exception as error:  # whatever the file's own code raises is the file's mistake
        line = getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ValueError(f"{arg}, line {line}: {type(error).__name__}: {error}") from None
    return [(k, v, arg) for k, v in namespace.items() if not k.startswith("_")
            and (k not in settings or v is not settings[k]) and not callable(v) and not isinstance(v, type(ast))]


def checked(key, value, default, source):
    """`value` in the type of `default`; text (from a flag) is read as that type's literal first."""
    kind = type(default)
    if default == "auto" and str(value) in ("True", "true", "False", "false"):  # compile: 'auto', or a plain yes or no
        return BOOLS[str(value)]
    try:
        if kind is bool:
            return BOOLS[str(value)]
        if kind in (int, float) and not isinstance(value, bool):
            number = arithmetic(ast.parse(value.strip(), mode="eval").body) if isinstance(value, str) else value
            if math.isfinite(number) and (kind is float or number == int(number)):
                return kind(number)
        if kind is str and isinstance(value, str):
            return value
    except (ValueError, SyntaxError, KeyError, TypeError, ArithmeticError):
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ValueError(f"{source}: {key} must be {wanted}, not {value!r} (the default is {default!r})")


def arithmetic(node):
    """The number that a literal such as 1e-3, -1 or 12*1024 spells; KeyError or ValueError for anything else."""
    if isinstance(node, ast.BinOp):
        return ARITHMETIC[type(node.op)](arithmetic(node.left), arithmetic(node.right))
    if isinstance(node, ast.UnaryOp):
        return ARITHMETIC[type(node.op)](arithmetic(node.operand))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    raise ValueError


def help_text(file, doc, defaults):
    """Every setting as `--key=default  comment`; the comment is the one that stands beside it in `file`."""
    comments, name = {}, None
    with open(file, "rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.NAME and token.start[1] == 0:
                name = token.string
            elif token.type == tokenize.COMMENT and token.start[1] > 0:
                comments.setdefault(name, token.string.lstrip("# "))
    flags = {k: f"--{k}={v}" for k, v in defaults.items()}
    width = max(map(len, flags.values()), default=0)
    lines = [f"  {flag:{width}}  {comments.get(k, '')}".rstrip() for k, flag in flags.items()]
    return "\n".join([(doc or "").strip(), "", "settings (config files and --key=value flags, in order):", *lines])
