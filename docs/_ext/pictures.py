"""Pictures of the site: scripts draw them before pages are read, and directives show them.

A script in docs/pictures draws one picture, and so do most of the examples. What a script prints is kept
beside its picture. A script that has not changed since runs no second time.

`{picture} NAME` shows a picture; its caption is the first paragraph of the script's docstring. `{example}
NAME` shows an example's docstring, its picture, and what it prints. `{gallery}` shows all examples in small.
`{usage}` shows the help of `python -m batchnorm`.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).resolve().parents[1]
EXAMPLES = DOCS.parent / "examples"
DRAWN = DOCS / "_pictures"
log = logging.getLogger(__name__)

# The examples of the gallery, in its order, with the options that the site runs them with.
GALLERY: dict[str, list[str]] = {
    "lenet": [],
    "good_train_bad_test": [],
    "pytorch_repair": [],
    "small_batches": ["--seeds", "3"],
    "padded_sequences": ["--seeds", "3"],
    "image_preprocessing": [],
    "dataset_statistics": [],
    "lenet_processes": [],
}


def docstring(script: Path) -> str:
    text = ast.get_docstring(ast.parse(script.read_text()))
    if not text:
        raise ExtensionError(f"{script} has no docstring")
    return text


def scripts() -> dict[str, Path]:
    """All scripts that make something of the site, by name."""
    own = {path.stem: path for path in sorted((DOCS / "pictures").glob("*.py"))}
    return own | {name: EXAMPLES / f"{name}.py" for name in GALLERY}


def draw(name: str, script: Path) -> None:
    """Run one script, unless what it made is newer than itself."""
    printed = DRAWN / f"{name}.txt"
    if printed.exists() and printed.stat().st_mtime >= script.stat().st_mtime:
        return
    options = GALLERY.get(name, [])
    if "--out" in script.read_text():
        options = [*options, "--out", f"{name}.png"]
    environment = {**os.environ, "MPLBACKEND": "Agg", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *options],
        capture_output=True, text=True, env=environment, cwd=DRAWN, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ExtensionError(f"{script.name} {' '.join(options)} failed:\n{done.stderr[-2000:]}")
    printed.write_text(done.stdout)


def draw_all(app: Sphinx) -> None:
    DRAWN.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        for name in [pool.submit(draw, *item) for item in scripts().items()]:
            name.result()


class Picture(SphinxDirective):
    """A picture of docs/pictures, with the first paragraph of its script's docstring as the caption."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        script = scripts()[name]
        self.env.note_dependency(str(script))
        caption = docstring(script).split("\n\n")[0].replace("\n", " ")
        return [self.figure(name, caption)]

    def figure(self, name: str, caption: str) -> nodes.figure:
        image = nodes.image(uri=f"/_pictures/{name}.png", alt=caption.replace("`", ""))
        figure = nodes.figure("", image, align="left")
        self.set_source_info(figure)
        if name not in GALLERY:  # an example's picture stands beside its text, or beside a link to that
            figure += nodes.caption(caption, *self.parse_inline(caption)[0])
        return figure


class Example(Picture):
    """An example: what its docstring says, its picture, what it prints."""

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        script = scripts()[name]
        self.env.note_dependency(str(script))
        text = docstring(script)
        body = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), source=str(script)), 0, body)
        made: list[nodes.Node] = [*body.children]
        if (DRAWN / f"{name}.png").exists():
            made.append(self.figure(name, text.split("\n")[0]))
        printed = (DRAWN / f"{name}.txt").read_text().rstrip()
        if printed:
            where = "It prints, with one thread on the machine that built this page:"
            made += [nodes.paragraph("", where), nodes.literal_block(printed, printed, language="text")]
        return made


class Usage(SphinxDirective):
    """What `python -m batchnorm` says of itself, or of the command that is named."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "batchnorm", *self.arguments, "--help"]
        environment = {**os.environ, "COLUMNS": "92", "NO_COLOR": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise ExtensionError(f"{' '.join(command)} failed:\n{done.stderr}")
        self.env.note_dependency(str(DOCS.parent / "python" / "batchnorm" / "__main__.py"))
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


class Gallery(SphinxDirective):
    """All examples: small pictures that lead to their pages."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for name in GALLERY:
            script = scripts()[name]
            self.env.note_dependency(str(script))
            first = docstring(script).split("\n\n")[0].replace("\n", " ")
            lines += [":::{container} card", f"[{first}]({name}.md)", ""]
            if (DRAWN / f"{name}.png").exists():
                alt = first.replace("`", "")
                lines += [f"[![{alt}](../_pictures/{name}.png)]({name}.md)", ""]
            else:
                lines += ["```text", *(DRAWN / f"{name}.txt").read_text().splitlines(), "```", ""]
            lines += [":::", ""]
        grid = nodes.container(classes=["cards"])
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, grid)
        return [grid]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", draw_all)
    app.add_directive("picture", Picture)
    app.add_directive("example", Example)
    app.add_directive("gallery", Gallery)
    app.add_directive("usage", Usage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
