"""A check is a generator of complaints, and every complaint of it must be provoked by a plant.

A plant is a mistake that a test makes on purpose, listed under words of the complaint.
"""

import ast
import inspect
import textwrap


def complaints(check):
    """Yield the constant text of everything that a check (function or module) can yield."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(check)))):
        if isinstance(node, ast.Yield):
            parts = getattr(node.value, "values", [node.value])
            yield "".join(part.value for part in parts if isinstance(part, ast.Constant))


def unplanted(plants, *checks):
    """List the complaints of checks for which there is no plant."""
    found = [text for check in checks for text in complaints(check)]
    assert found and all(found)
    return [text for text in found if not any(words in text for words in plants)]
