"""Exit with one line of advice if this Python lacks the packages that the jobs need.

Every job imports this module first.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

_MISSING = [name for name in ("moce_dist", "pydantic", "torch") if find_spec(name) is None]
_VENV = Path(__file__).resolve().parents[1] / ".venv" / "bin"
if _MISSING:
    _ADVICE = (
        f"take {_VENV / 'python'}, or enter its environment first: source {_VENV / 'activate'}"
        if (_VENV / "python").exists()
        else "make setup installs it into .venv; then enter that: source .venv/bin/activate"
    )
    sys.stderr.write(f"error: {sys.executable} has no package {_MISSING[0]}; {_ADVICE}\n")
    sys.exit(2)
