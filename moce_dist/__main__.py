"""Commands about a machine and about what was trained.

`python -m moce_dist [--config FILE] [--set FIELD=VALUE]` is the doctor: one line a check, `ok`,
`warn` or `fail`, the last two with advice, and how ranks and expert groups would stand. Exit status
0 when nothing failed, 1 otherwise, 2 for a wrong configuration. `python -m moce_dist schema` prints
the JSON schema of the configuration. `routes`, `heldout`, `predict` and `onnx` use what was
trained: `python -m moce_dist predict --help`.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from moce_dist.cli import Parser, add_overrides, quiet_libraries, run_job
from moce_dist.config import Config, load_config
from moce_dist.doctor import diagnose, topology_lines

_COMMANDS = ("routes", "heldout", "predict", "onnx")


def main(argv: Sequence[str]) -> None:
    """Run the doctor, print the schema, or hand over to another command.

    Raises:
        ConfigError: the configuration is wrong.
        SystemExit: with status 1, when a check failed.
    """
    if argv and argv[0] in _COMMANDS:
        from moce_dist.transfer.commands import COMMANDS

        COMMANDS[argv[0]](argv[1:])
        return
    parser = Parser(prog="python -m moce_dist", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    shown = f"{{{','.join(('doctor', 'schema', *_COMMANDS))}}}"
    parser.add_argument(
        "what", nargs="?", choices=("doctor", "schema"), default="doctor", metavar=shown
    )
    parser.add_argument("--config", metavar="FILE", help="the request to check the machine for")
    add_overrides(parser)
    args = parser.parse_args(argv)
    if args.what == "schema":
        sys.stdout.write(json.dumps(Config.model_json_schema(), indent=1) + "\n")
        return
    config = load_config(args.config, args.overrides)
    quiet_libraries()
    is_healthy = True
    for finding in diagnose(config):
        is_healthy &= finding.level != "fail"
        sys.stdout.write(finding.line() + "\n")
        sys.stdout.flush()
    sys.stdout.write("\n" + "\n".join(topology_lines(config)) + "\n")
    if not is_healthy:
        raise SystemExit(1)


if __name__ == "__main__":
    run_job(main)
