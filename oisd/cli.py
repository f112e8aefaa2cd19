"""The command line: `oisd train`, `plan`, `check`, `eval`, `compare`, `lens`, `attention`,
`report`."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from oisd.config import ConfigError, TrainConfig, from_tables, load_recipe, to_tables
from oisd.errors import is_explained, report, shortened, speaks_for_all
from oisd.run.parent import end_with_parent
from oisd.schema import nearest, recipe_path, require, require_device, with_none_spelled

_USAGE = """\
usage: oisd train [RECIPE] [--processes N] [--show] [--table.key value ...]
       oisd plan [RECIPE] [--processes N] [--show] [--table.key value ...]
       oisd check MODEL [--recipe NAME] [--data SOURCE] [--option value ...]
       oisd eval MODEL [--benchmark NAME ...] [--processes N] [--option value ...]
       oisd compare FOLDER ... [--output-dir FOLDER]
       oisd lens MODEL --prompt TEXT | --data SOURCE [--option value ...]
       oisd attention MODEL --prompt TEXT | --data SOURCE [--option value ...]
       oisd report RUN [RUN ...] [--inside] [--output FILE]

train      train a model with GRPO and internal self-distillation; without a recipe, a tiny model on
           sums of two-digit numbers, in a few minutes on a CPU
plan       the memory that such a run needs, part by part, and the GPUs that have it
check      what to know of a model, its tokenizer and its data before a run, as a table of pass,
           warn and fail with numbers, bounds and remedies
eval       Avg@K and Pass@K of a checkpoint folder or Hub model on verifiable problems
compare    tables and pass@k curves of several such evaluations side by side
lens       what each layer would say next: pictures, numbers, the layer to align, a web page
attention  how far each layer's attention overlaps with the final layer's
report     a web page about a run's folder, or about several side by side

`oisd COMMAND --help` lists all settings; "none" turns off one that says None. RECIPE is a name such
as qwen3-4b, or a TOML file. --processes N shares the work among N processes of this machine, a GPU
each, as torchrun does; `oisd plan` plans for so many.
With --debug, any command shows the traceback of an error that it did not foresee.
"""

_COMPARE_USAGE = """\
usage: oisd compare FOLDER ... [--output-dir FOLDER]

Tables and pass@k curves, side by side, of several evaluations. FOLDER is one into which
`oisd eval` has written the results of benchmarks.

--output-dir FOLDER  where the tables and the picture go; by default runs/compare
"""


# How to go on after Ctrl-C.
_AFTER_INTERRUPT = {
    "train": "run the same command again to resume from the last checkpoint",
    "eval": "run the same command again to resume after the last problem that was written",
    "lens": "nothing is kept; run the same command again to start over",
    "attention": "nothing is kept; run the same command again to start over",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 failed, 2 for an impossible request."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of a launcher, whose SIGKILL would leave it at work
        end_with_parent(signal.SIGTERM)
    commands = {
        "train": _train,
        "plan": _plan,
        "check": _check,
        "eval": _eval,
        "compare": _compare,
        "lens": _lens,
        "attention": _attention,
        "report": _report,
    }
    try:
        asked_for_help = bool(arguments) and arguments[0] in ("-h", "--help")
        if arguments and arguments[0] not in commands and not asked_for_help:
            raise ConfigError(f"unknown command {arguments[0]!r}{nearest(arguments[0], commands)}")
        if not arguments or asked_for_help:
            print(_USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr, flush=True)
            return 0 if asked_for_help else 2
        if any("\0" in argument for argument in arguments):
            raise ConfigError("an argument holds a NUL character, which no name or text may")
        try:
            return commands[arguments[0]](arguments[1:])
        finally:
            if sys.stdout is not None:  # as it is where a program starts without one
                sys.stdout.flush()  # here, where a closed pipe is known for what it is
    except BrokenPipeError:
        _discard_output()
        return 141  # as a shell says it: 128 + SIGPIPE
    except KeyboardInterrupt:
        then = _AFTER_INTERRUPT.get(arguments[0], "run the same command again")
        if os.environ.get("RANK", "0") == "0":  # all processes are interrupted, at any moment
            print(f"oisd: interrupted; {then}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug and not is_explained(error):
            raise
        return report(error)


def _parsed(kind: Any, without_flags: bool = False, **options: Any) -> Any:
    """What tyro makes of a command line; of several processes, one says what is wrong with it.

    without_flags: a bool is set by a word, as in `--run.restart True`.
    """
    import tyro  # `oisd --help` need not wait for it

    if without_flags:
        options["config"] = (tyro.conf.FlagConversionOff,)

    if os.environ.get("WORLD_SIZE", "1") == "1":
        return tyro.cli(kind, **options)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, **options)
    except SystemExit as end:
        if end.code and speaks_for_all():
            print(said.getvalue(), end="", file=sys.stderr)
        raise


def _discard_output() -> None:
    """Let what is still to be written to a closed pipe go nowhere, at exit too."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file of its own, as in a test
        pass


def _quiet() -> None:
    """Keep progress bars and notes of other libraries from between our lines, errors excepted."""
    # Before `datasets` is imported, which not every command does, and after.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


def parse_train(arguments: Sequence[str], command: str = "train") -> TrainConfig:
    """The configuration of a recipe, or of recipes/arithmetic.toml, with overrides."""
    name, options = _named(arguments)
    config = _parsed(
        TrainConfig,
        prog=f"oisd {command} [RECIPE]",
        description="Train with GRPO and internal self-distillation. The recipe (by default "
        "arithmetic) gives the settings that the command line does not. --show prints all of them "
        f"as TOML, to start your own recipe from, and does not {command}. "
        f"--processes N {'plans for one of' if command == 'plan' else 'shares the work among'} N "
        "processes.",
        args=with_none_spelled(TrainConfig, options),
        default=load_recipe(recipe_path(name or "arithmetic")),
        without_flags=True,
    )
    # The same checks as for a file: tyro knows the types, not what "none" or a list may be.
    return from_tables(to_tables(config), where="command line")


def _named(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The first argument, unless it is an option, and the others."""
    named = bool(arguments) and not arguments[0].startswith("-")
    return (arguments[0], list(arguments[1:])) if named else ("", list(arguments))


def _parse_shown(arguments: Sequence[str], command: str) -> TrainConfig | None:
    """The configuration; None if `--show` is given, which prints it instead."""
    config = parse_train([a for a in arguments if a != "--show"], command)
    if "--show" not in arguments and command == "train":
        return config  # whose data is read first of all
    from oisd.data.problems import check_names

    check_names(config)
    if "--show" not in arguments:
        return config
    import tomli_w

    if os.environ.get("RANK", "0") == "0":
        print(tomli_w.dumps(to_tables(config)), end="")
    return None


def _train(arguments: Sequence[str]) -> int:
    processes, own = _processes(arguments)
    config = _parse_shown(own, "train")
    if config is None:
        return 0
    if processes is not None:
        return _launch(processes, ["train", *own])
    _quiet()
    _check_machine("run.seed", config.run)
    from oisd.trainer import Trainer  # torch and transformers: --help need not wait for them

    summary = Trainer(config).train()
    if summary:
        _print_table(f"oisd train: {config.run.output_dir}", _train_rows(summary))
    return 0


def _launch(processes: int, arguments: Sequence[str]) -> int:
    from oisd.run.launch import run_on_processes

    return run_on_processes(processes, [sys.executable, "-m", "oisd.cli", *arguments])


def _plan(arguments: Sequence[str]) -> int:
    processes, arguments = _processes(arguments)
    config = _parse_shown(arguments, "plan")
    if config is None:
        return 0
    _quiet()
    from oisd.plan import check_layers, model_shape, rich_tables

    shape = model_shape(config.model.path)
    check_layers(config, shape)
    console = _console()
    for renderable in rich_tables(config, shape, processes):
        console.print(renderable)
    return 0


def _processes(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """The number that `--processes` gives, if it is there, and the other arguments."""
    left = [part for a in arguments for part in (a.split("=", 1) if _is_count(a) else [a])]
    if "--processes" not in left:
        return None, left
    at = left.index("--processes")
    given = left[at + 1] if at + 1 < len(left) else ""
    count = int(given) if given.isascii() and given.isdigit() else 0
    require(count >= 1, "--processes", "a number of processes, at least 1", given)
    return count, left[:at] + left[at + 2 :]


def _is_count(argument: str) -> bool:
    return argument.startswith("--processes=")


def _parse_model(arguments: Sequence[str], command: str, kind: Any, text: str) -> tuple[str, Any]:
    """The model, and the settings of a command as a dataclass `kind`."""
    model, options = _named(arguments)
    if not model and not {"-h", "--help"} & set(options):
        raise ConfigError(f"oisd {command}: MODEL is missing: a checkpoint folder or Hub id")
    options = with_none_spelled(kind, options)
    config = _parsed(kind, prog=f"oisd {command} MODEL", description=text, args=options)
    _quiet()
    _check_machine("--seed", config)
    return model, config


def _eval(arguments: Sequence[str]) -> int:
    from oisd.options import EvalRun

    text = (
        "Avg@K and Pass@K with bootstrap intervals; run it again to resume where it stopped. "
        "--processes N shares the work among N processes."
    )
    processes, arguments = _processes(arguments)
    model, config = _parse_model(arguments, "eval", EvalRun, text)
    if processes is not None:
        return _launch(processes, ["eval", *arguments])
    from oisd.evaluate.run import benchmark_names, run

    if "--benchmark" in arguments and not config.benchmark:
        raise ConfigError(f"--benchmark: wanted any of {', '.join(benchmark_names())}, got none")
    summaries = run(model, config)
    if config.benchmark and summaries:
        _print_benchmarks({Path(model).name: summaries}, Path(summaries[0]["output_dir"]).parent)
    elif summaries:
        _print_table(f"oisd eval: {model}", _eval_rows(summaries[0]))
    return 0


def _check(arguments: Sequence[str]) -> int:
    from oisd.options import CheckRun

    text = "What to know of a model and its data before a run; exit status 1 if a row fails."
    model, config = _parse_model(arguments, "check", CheckRun, text)
    from oisd.check.run import run_check
    from oisd.check.settings import options_named
    from oisd.check.table import findings_table, verdict

    console = _console(width_elsewhere=200)
    with console.status(f"checking {model}") if console.is_terminal else nullcontext():
        report = run_check(model, config)
    rows = report["rows"]
    console.print(findings_table(f"oisd check: {model}", rows))
    if options := options_named(row.remedy for row in rows):
        said = ", ".join(f"{key} is {name}" for key, name in options.items())
        console.print(f"the settings are those of a run; here {said}", markup=False)
    console.print(f"{verdict(rows)}; {report['file']}", markup=False, soft_wrap=True)
    failed = [row.name for row in rows if row.status == "fail"]
    if failed:
        print(f"oisd: {model} fails: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _compare(arguments: Sequence[str]) -> int:
    options = list(arguments)
    if {"-h", "--help"} & set(options):
        print(_COMPARE_USAGE, end="")
        return 0
    out = Path("runs/compare")
    if "--output-dir" in options[:-1]:
        at = options.index("--output-dir")
        out = Path(options[at + 1])
        del options[at : at + 2]
    if not options or any(option.startswith("-") for option in options):
        raise ConfigError("oisd compare: wanted folders of `oisd eval --benchmark`, and no options "
                          "but --output-dir")  # fmt: skip
    _quiet()
    from oisd.evaluate.table import read_summaries

    runs = {}
    for folder in options:
        name = Path(folder).resolve().name
        try:
            runs[folder if name in runs else name] = read_summaries(folder)
        except (ValueError, AttributeError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{folder} holds a summary.json that is not an evaluation's: {shortened(error)}"
            ) from error
    try:
        _print_benchmarks(runs, out)
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{' '.join(options)}: a summary.json there lacks or has changed {shortened(error)}; "
            f"run that evaluation again"
        ) from error
    return 0


def _print_benchmarks(runs: dict[str, Any], folder: Path) -> None:
    from oisd.evaluate import table

    console = _console(width_elsewhere=200)
    console.print(table.rich_table(runs))
    for line in table.notes(runs):
        console.print(line, markup=False, highlight=False)
    for path in table.write(runs, folder):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _console(width_elsewhere: int | None = None) -> Any:
    """Where tables go; a file or a pipe has no width of its own."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise  # what rich has caught: `main` knows it, rich would exit with 1

    console = Piped()
    return console if console.is_terminal else Piped(width=width_elsewhere)


def _lens(arguments: Sequence[str]) -> int:
    from oisd.options import LookRun

    text = "The logit lens of every layer; prints the layer to align."
    model, config = _parse_model(arguments, "lens", LookRun, text)
    from oisd.lens.run import run_lens

    report = run_lens(model, config)
    summary = next(iter(report["layers"].values()))
    layer = report["layer"]
    boundary = report["boundary_layer"]
    rows = [
        ("texts, tokens", f"{report['texts']}, {report['tokens']}"),
        ("boundary layer", f"{boundary}" if boundary else report["without_boundary"]),
        (f"divergence of layer {layer}", f"{summary['divergence'][layer - 1]:.4f} nats"),
        (f"lens entropy of layer {layer}", f"{summary['entropy'][layer - 1]:.4f} nats"),
        (f"top token of layer {layer}", f"final one's at {summary['agreement'][layer - 1]:.1%}"),
        ("page", report["page"]),
    ]
    if report["without_attention"]:
        rows.append(("without attention", report["without_attention"]))
    _print_table(f"oisd lens: {model}", rows)
    return 0


def _attention(arguments: Sequence[str]) -> int:
    from oisd.options import AttentionRun

    text = "Overlap of every layer's attention with the final layer's."
    model, config = _parse_model(arguments, "attention", AttentionRun, text)
    from oisd.lens.run import run_attention

    report = run_attention(model, config)
    layer, place = report["layer"], report["layers"].index(report["layer"])
    rows = [
        ("texts, tokens", f"{report['texts']}, {report['tokens']}"),
        ("compared with", report["compared_with"]),
        (f"overlap of layer {layer}", f"{report['overlap'][place]:.4f}"),
        (f"divergence of layer {layer}", f"{report['divergence'][place]:.4f} nats"),
    ]
    for name, means in report["compared"].items():
        if layer in means["layers"]:
            overlap = means["overlap"][means["layers"].index(layer)]
            rows.append((f"overlap of layer {layer} in {name}", f"{overlap:.4f}"))
    rows.append(("picture", report["plots"][0]))
    _print_table(f"oisd attention: {model}", rows)
    return 0


def _report(arguments: Sequence[str]) -> int:
    from oisd.options import ReportRun

    count = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    folders, options = arguments[:count], with_none_spelled(ReportRun, arguments[count:])
    if not folders and not {"-h", "--help"} & set(options):
        raise ConfigError("oisd report: RUN is missing: the folder of a run of `oisd train`")
    text = "One web page about a run of `oisd train`, or about several side by side."
    config = _parsed(ReportRun, prog="oisd report RUN [RUN ...]", description=text, args=options)
    _quiet()
    from oisd.report.page import write_report

    print(write_report(folders, config))
    return 0


def _train_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("steps", str(summary["steps"]))]
    if "reward_first" in summary:
        first, last = summary["reward_first"], summary["reward_last"]
        rows.append(("reward, first to last steps", f"{first:.3f} -> {last:.3f}"))
        rows.append(("seconds per step", f"{summary['seconds_per_step']:.3f}"))
    if "eval_before" in summary:
        low, high = summary["eval_interval"]
        change = f"{summary['eval_before']:.3f} -> {summary['eval_after']:.3f}"
        rows.append(("evaluation, before to after", f"{change} [{low:.3f}, {high:.3f}]"))
    if "alignment" in summary:
        rows.append(("alignment", summary["alignment"]))
    rows.append(("checkpoint", summary["checkpoint"]))
    if summary["plots"]:
        rows.append(("plots", str(Path(summary["plots"][0]).parent)))
    return rows


def _eval_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = summary["avg_at_k_interval"]
    rows = [
        ("problems", str(summary["problems"])),
        (f"Avg@{summary['samples']}", f"{summary['avg_at_k']:.4f} [{low:.4f}, {high:.4f}]"),
    ]
    for k, value in summary["pass_at_k"].items():
        low, high = summary["pass_at_k_interval"][k]
        rows.append((f"Pass@{k}", f"{value:.4f} [{low:.4f}, {high:.4f}]"))
    rows.append(("finished", f"{summary['frac_finished']:.3f}"))
    if graders := summary["graders"]:
        rows.append((f"by {graders['second']}", f"{graders['second_avg_at_k']:.4f}"))
        rows.append(("graders agree on", f"{graders['agreement']:.4f}"))
    return [*rows, ("dump", summary["output_dir"])]


def _check_machine(seed: str, options: Any) -> None:
    """Raise ConfigError for a seed, a device or threads that torch does not have here.

    seed: the name of that option; the others' names follow from it.
    """
    import torch

    before = seed.removesuffix("seed")
    require(0 <= options.seed < 2**63, seed, "at least 0 and below 2^63", options.seed)
    threads, name = options.threads, f"{before}threads"
    require(threads is None or threads <= 4096, name, "at most 4096", threads)
    require_device(f"{before}device", options.device)
    kind, _, index = options.device.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ConfigError(
            f'{before}device must be one of this machine, which has {count} CUDA devices; "auto" '
            f"takes what there is, got {options.device!r}"
        )


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
