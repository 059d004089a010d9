"""The command line: nova-train <command> [recipe.yaml] [--key value ...]

Exit codes: 0 done; 2 a mistake in the recipe, the flags, the data or the folders, told in one line on stderr; 130
stopped by Ctrl-C or SIGTERM, with the command that continues. Anything else is a fault of ours and comes with its
traceback.

    torchrun --nproc-per-node 8 -m nova_train <command> ...

Ranks speak with one voice, the first one's; a failure that another rank has alone is told by that one, with its number.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from nova_train.config import ConfigError, launched_ranks, load_config, parse_flags, unknown_name
from nova_train.stages.kinds import COMMANDS, STAGES, Kind

OVERVIEW = """\
usage: nova-train <command> [recipe.yaml] [--key value ...]

{commands}

nova-train <command> --help lists the keys of a command. Flags win over the recipe.
--dry_run prints the resolved keys; for a stage that trains, its data in tokens and its memory as well.
--traceback shows where an error came from.
"""
PIPELINE_HELP = """\
usage: nova-train pipeline recipe.yaml [--from STAGE] [--until STAGE] [--key value ...]

Run the stages of a recipe in order: what is done is skipped, what was interrupted continues.

  --from STAGE    start here; the stages before must be finished
  --until STAGE   stop after this one
  --dry_run       print the resolved stages and which are done; run nothing

Keys of the recipe that flags can set: output_dir, seed, num_threads, disable_progress.
"""
_OTHERS = {
    "pipeline": "run a list of stages, each from the results of earlier ones",
    "env": "versions, threads and devices of this machine",
}
# Errors whose messages say all there is to say, by module; others of the caught types name their type.
_CLEAR_ERRORS = {
    "nova_train.config": "ConfigError",
    "nova_train.datafiles": "DataError",
    "nova_train.loop": "DivergenceError",
    "nova_train.rewards": "RewardError",
    "nova_train.state": "StateError",
    "nova_kernels.backend": "BackendUnavailableError",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        several = launched_ranks() > 1
    except ConfigError as error:
        print(f"nova-train: {error}", file=sys.stderr)
        return 2
    if not several:
        return _told(words)
    if not words or _wants_help(words) or words[0] == "env" or "--dry_run" in words:
        return _told(words) if _rank() == 0 else 0
    from nova_train import mesh

    if _rank() > 0:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    try:
        mesh.connect()
    except ConfigError as error:
        print(f"nova-train: {error}", file=sys.stderr)
        return 2
    try:
        return _told(words)
    finally:
        mesh.leave()


def _told(words: Sequence[str]) -> int:
    """Run one command and say on stderr how it ended, if it did not end well; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0
    try:
        _run(words[0], [word for word in words[1:] if word != "--traceback"])
    except KeyboardInterrupt:
        return _interrupted("interrupted", words)
    except _loaded("nova_train.loop", "Interrupted") as error:
        return _interrupted(str(error), words)
    except _loaded("nova_train.mesh", "RankError"):
        return 2
    except Exception as error:
        if not _is_ours_to_tell(error):
            return 2
        who = f"nova-train {words[0]}: " + (f"rank {_rank()}: " if _rank() else "")
        if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and "--traceback" not in words:
            print(f"{who}{_one_line(error)}", file=sys.stderr)
            return 2
        if _rank():
            print(f"{who}{type(error).__name__}", file=sys.stderr)
        raise
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if launched_ranks() > 1 else 0


def _is_ours_to_tell(error: Exception) -> bool:
    """Whether this process tells of an error: of several ranks, one does."""
    if launched_ranks() == 1:
        return True
    from nova_train import mesh

    return mesh.tells(f"{type(error).__name__}: {error}")


def _interrupted(message: str, words: Sequence[str]) -> int:
    if _rank() == 0:
        same = "" if launched_ranks() == 1 else "the same torchrun options and "
        print(f"nova-train {words[0]}: {message}", file=sys.stderr)
        print(f"continue with: {same}nova-train {shlex.join(words)}", file=sys.stderr)
    return 130


def overview() -> str:
    """What `nova-train --help` prints."""
    summaries = {name: kind.summary for name, kind in (STAGES | COMMANDS).items()} | _OTHERS
    width = max(map(len, summaries))
    return OVERVIEW.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in summaries.items()))


def _run(command: str, rest: list[str]) -> None:
    if command == "pipeline":
        _run_pipeline(rest)
    elif command == "env":
        from nova_train.stages.env import environment_report

        print(environment_report())
    elif command in STAGES or command in COMMANDS:
        _run_stage(command, (STAGES | COMMANDS)[command], rest)
    else:
        raise ConfigError(unknown_name("command", command, [*STAGES, *COMMANDS, *_OTHERS]))


def _run_stage(name: str, stage: Kind, rest: list[str]) -> None:
    config_class, run = stage.load()
    if _wants_help(rest):
        _print_keys(f"nova-train {name}", stage.summary, config_class)
        return
    recipe, flags = parse_flags(rest)
    dry_run = _take_switch(flags, "dry_run")
    config = load_config(config_class, recipe, flags)
    if dry_run:
        from nova_train.stages.dry_run import print_plan

        print_plan(config)
    else:
        _leave_the_screen_to_us()
        from nova_train.mesh import join
        from nova_train.stages.pipeline import run_stage

        run_stage(run, config, join())


def _run_pipeline(rest: list[str]) -> None:
    if not rest or _wants_help(rest):
        print(PIPELINE_HELP, end="")
        return
    recipe, flags = parse_flags(rest)
    if recipe is None:
        raise ConfigError("expected a recipe: nova-train pipeline recipe.yaml")
    first, last = _take_name(flags, "from"), _take_name(flags, "until")
    dry_run = _take_switch(flags, "dry_run")
    from nova_train.stages.pipeline import plan_pipeline, plan_text, run_pipeline

    stages = plan_pipeline(recipe, flags)
    if dry_run:
        print(plan_text(stages))
    else:
        _leave_the_screen_to_us()
        run_pipeline(stages, first=first, last=last)


def _print_keys(program: str, summary: str, config_class: type[Any]) -> None:
    """The typed keys; their comments in the dataclass are the help texts."""
    import tyro

    try:
        tyro.cli(
            config_class,
            config=(tyro.conf.FlagConversionOff,),
            prog=f"{program} [recipe.yaml]",
            description=f"{summary[0].upper()}{summary[1:]}.",
            args=["--help"],
            use_underscores=True,
        )
    except SystemExit:
        return


def _leave_the_screen_to_us() -> None:
    """Stages have progress bars of their own; those of transformers only scatter them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _wants_help(words: Sequence[str]) -> bool:
    return "-h" in words or "--help" in words


def _take_switch(flags: dict[str, object], key: str) -> bool:
    value = flags.pop(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"--{key} takes no value, got {value!r}")
    return value


def _take_name(flags: dict[str, object], key: str) -> str | None:
    value = flags.pop(key, None)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"--{key} takes the name of one stage, got {value!r}")
    return value


def _loaded(module: str, name: str) -> tuple[type[BaseException], ...]:
    """A class of a module that may not be imported yet (then it cannot have been raised either)."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _one_line(error: Exception) -> str:
    clear = tuple(kind for module, name in _CLEAR_ERRORS.items() for kind in _loaded(module, name))
    message = " ".join(str(error).split())
    if launched_ranks() > 1 and sys.modules["nova_train.mesh"].lost_a_rank(error):
        message = f"another rank ended without a word, or cannot be reached; its launcher knows more: {message}"
    return message if isinstance(error, clear) else f"{message} ({type(error).__name__}; --traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
