"""Formulas as MathML, which browsers draw themselves: no script, no network."""

import latex2mathml.converter


def inline(self, node):
    """Write a formula in a line of text."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise_skip()


def block(self, node):
    """Write a formula of its own."""
    self.body.append(f'<div class="math">{latex2mathml.converter.convert(node.astext(), display="block")}</div>')
    raise_skip()


def raise_skip():
    """Tell docutils that the node is written."""
    from docutils.nodes import SkipNode

    raise SkipNode


def setup(app):
    """Register the renderer."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True}
