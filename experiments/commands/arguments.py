"""What the commands accept. It imports neither torch nor matplotlib, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """The command line of `python -m experiments`; `options.command` is the name of a module of this package."""
    everywhere = argparse.ArgumentParser(add_help=False)
    add_results(everywhere)
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument("--only", metavar="EXPERIMENT", help="this experiment alone")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--jobs", type=int, metavar="N", help="worker processes (one a core)")
    running.add_argument("--force", action="store_true", help="make finished runs again")

    parser = argparse.ArgumentParser(prog="python -m experiments", description="The experiments of the suite.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=parents, help=text, description=text)

    text = "list the experiments and their configurations; with NAME, the variants too; both with the state of results"
    listing = add("list", text, everywhere)
    listing.add_argument("name", nargs="?", metavar="NAME", help="an experiment, or a configuration of one")
    add_run_arguments(add("run", "make the runs of one configuration that are not finished yet", everywhere, running))
    text = "make all laptop configurations: runs, figures and tables; the variable ONLY stands for --only"
    add("reproduce", text, everywhere, running, several)
    figures = add("figures", "draw the figures of all results", everywhere, several)
    figures.add_argument("--docs", action="store_true", help="also copy them to docs/figures")
    add("summarize", "print the tables of all results and write them to summary.md", everywhere, several)
    text = "write what groups of runs end with: medians with bootstrap intervals at the level 0.95"
    add_export_arguments(add("export", text, everywhere, several))
    text = "write one HTML file with the figures, tables, configurations and origins of all results"
    report = add("report", text, everywhere, several)
    report.add_argument("--output", type=Path, metavar="FILE", help="the file (report.html in the folder of results)")
    text = "look at this machine, or at all ranks of a job: versions, devices, binding, network, folder of results"
    add_doctor_arguments(add("doctor", text))
    return parser


def add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="folder (results)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    text = "an experiment (its laptop configuration), a configuration as burgers_2d/paper, or a YAML file"
    parser.add_argument("config", metavar="CONFIG", help=text)
    text = "override a setting, repeatable; variants=NAME,NAME keeps these variants and leaves out the studies"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="print what would run and what is finished, run nothing"
    )
    text = "print the configuration with every --set and every default as YAML, run nothing"
    instead.add_argument("--print-config", action="store_true", help=text)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="a line for each group and metric; - prints it")
    parser.add_argument(
        "--latex", metavar="FILE", help="a table for each experiment, of the package booktabs; - prints it"
    )
    text = "variant (default), label, optimizer, study, seed, or a setting as training.batch_size; several with commas"
    parser.add_argument("--group-by", default="variant", metavar="NAME", help=text)
    text = "a series of the records, * for any letters, repeatable (losses, errors, top-1 and seconds)"
    parser.add_argument("--metric", action="append", metavar="NAME", help=text)


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser)
    parser.add_argument(
        "--site", metavar="NAME", help="compare with jobs/sites/NAME.yaml, or a file that ends in .yaml"
    )
    text = "until all ranks have met (60)"
    parser.add_argument("--start-seconds", type=float, default=60.0, metavar="S", help=text)
