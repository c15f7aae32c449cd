"""Every key of configs/base.py is read by some code: a key that nothing reads is a lie.

Reads are found in the source: `config.train.steps`, `**config.mesh`, and both through variables and
through the parameters of functions to which a section is handed. t2i_jax/config.py, which checks
all keys, does not count.
"""

import ast
from pathlib import Path

from t2i_jax.config import base, flat

ROOT = Path(__file__).parent.parent
KEYS = set(flat(base()))
SECTIONS = {key: set(value) for key, value in base().items() if hasattr(value, "keys")}
WHOLE = ("items", "values", "to_dict")  # methods that read all keys of a section


def sources():
    files = [*ROOT.glob("t2i_jax/**/*.py"), *ROOT.glob("launch/**/*.py")]
    return [file.read_text() for file in files if file.name not in ("config.py", "cli.py")]


class Reads(ast.NodeVisitor):
    """The keys that some sources read.

    Attributes:
      keys: 'section.key' and 'key'.
      handed: {function: {parameter's position or name: section}}, as calls hand sections over.
    """

    def __init__(self):
        self.keys, self.handed, self.names = set(), {}, [{}]

    def known(self, name):
        """What was assigned to a name: a section, 'config', or None."""
        return next((names[name.id] for names in reversed(self.names) if name.id in names), None)

    def section(self, node):
        """The section that an expression is, or None."""
        if isinstance(node, ast.Name):
            return self.known(node) if self.known(node) in SECTIONS else None
        if isinstance(node, ast.Attribute) and self.is_config(node.value):
            return node.attr if node.attr in SECTIONS else None
        return None

    def is_config(self, node):
        if isinstance(node, ast.Name):
            return (self.known(node) or node.id) == "config"
        return isinstance(node, ast.Attribute) and node.attr in ("config", "value")

    def visit_FunctionDef(self, node, name=None):
        handed = self.handed.get(name or node.name, {})
        parameters = [a for a in node.args.args if a.arg not in ("self", "cls")]
        known = {}
        for i, parameter in enumerate([*parameters, *node.args.kwonlyargs]):
            noted = ast.unparse(parameter.annotation) if parameter.annotation else ""
            if parameter.arg in SECTIONS and ("ConfigDict" in noted or "Mapping" in noted):
                known[parameter.arg] = parameter.arg
            for key in (i, parameter.arg):
                if key in handed:
                    known[parameter.arg] = handed[key]
        self.names.append(known)
        self.generic_visit(node)
        self.names.pop()

    def visit_ClassDef(self, node):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                self.visit_FunctionDef(part, node.name)
            else:
                self.visit(part)

    def visit_Assign(self, node):
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=False)
            for to, value in pairs:
                what = "config" if self.is_config(value) else self.section(value)
                if isinstance(to, ast.Name) and what:
                    self.names[-1][to.id] = what
        self.generic_visit(node)

    def visit_Call(self, node):
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", None))
        arguments = [(i, argument) for i, argument in enumerate(node.args)]
        arguments += [(keyword.arg, keyword.value) for keyword in node.keywords]
        for key, argument in arguments:
            section = self.section(argument)
            if section and (key is None or name == "dict"):  # f(**section), dict(section)
                self.keys |= {f"{section}.{k}" for k in SECTIONS[section]}
            elif section:
                self.handed.setdefault(name, {})[key] = section
        self.generic_visit(node)

    def visit_Attribute(self, node):
        section = self.section(node.value)
        if section and node.attr in WHOLE:
            self.keys |= {f"{section}.{k}" for k in SECTIONS[section]}
        elif section:
            self.keys.add(f"{section}.{node.attr}")
        elif self.is_config(node.value):
            self.keys.add(node.attr)
        self.generic_visit(node)


def reads(texts) -> set[str]:
    finder = Reads()
    trees = [ast.parse(text) for text in texts]
    while True:  # until no call hands over a section to a function that was not known to get it
        before = repr(finder.handed)
        for tree in trees:
            finder.names = [{}]
            finder.visit(tree)
        if repr(finder.handed) == before:
            return finder.keys & KEYS


def test_no_key_is_dead():
    dead = sorted(KEYS - reads(sources()))
    assert not dead, f"{len(dead)} keys of configs/base.py are read nowhere: {', '.join(dead)}"


def test_finds_every_way_to_read_a_key():
    text = """
def train(config):
    seed = config.seed
    steps, optimizer = config.train.steps, config.optimizer
    rate = optimizer.learning_rate
    mesh = make_mesh(**config.mesh)
    make(0, config.ema, flow=config.flow)
    Store(config.checkpoint)
    SOURCES[config.data.source](config.data)

def make(x, section, *, flow):
    inner(section)
    return flow.shift

def inner(config):
    return config.decay, config.name

class Store:
    def __init__(self, config):
        self.keep = config.keep

    def read(self):
        c, other = self.config, 1
        return c.sampling.steps

def scenes(data: ConfigDict):
    return data.image_size

def decode(data: bytes):
    return data.path

def other(thing):
    return thing.train.dtype, thing.weights.llm, steps.batch_size
"""
    assert reads([text]) == {
        "seed",
        "train.steps",
        "optimizer.learning_rate",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "flow.shift",
        "ema.decay",
        "checkpoint.keep",
        "sampling.steps",
        "data.source",
        "data.image_size",
    }
