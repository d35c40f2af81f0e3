"""`gigapath verify`: check a released pair against recorded hashes and published numbers."""

import argparse

from gigapath.cli.arguments import add_options, options_from
from gigapath.doctor.options import VerifyOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, VerifyOptions)


def run(namespace: argparse.Namespace) -> int:
    options = options_from(namespace, VerifyOptions)
    from gigapath.doctor.verify import STATUS, verify  # torch takes seconds: a wrong word is told before

    report = verify(
        options, after_check=lambda check: print(f"{STATUS[check.state]}: {check.name}: {check.text}", flush=True)
    )
    print(f"\n{report['table']}\n\nwritten to {options.out}")
    return 1 if report["verdict"] == "failed" else 0
