"""Our checkpoints in EleutherAI's lm-evaluation-harness: `python -m evals.harness CKPT --tasks hellaswag,arc_easy`.

The tasks are the harness's own, and yours (--include-path, or a YAML file in --tasks); the data of most come from the
HuggingFace hub. Needs the extra `eval`. Scores are those of the harness's HuggingFace model on the same checkpoint.
"""

from __future__ import annotations

import argparse
import glob
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, DataError, UserError, shown
from jaxattn.policies.command import add_flags, asked

try:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    raise UserError(f"{error.name or 'lm_eval'} is not installed: pip install 'jaxattn[eval]'.") from error

from evals.harness_lm import JaxattnLM
from evals.write_result import write_result
from jaxattn.text import load

__all__ = ["JaxattnLM", "load_tasks", "main", "parse_options"]

SEEDS = (0, 1234)  # of Python's random, and of everything else: the harness's own


def load_tasks(names: str, include_path: Path | None = None) -> list[Any]:
    """The tasks and groups of a comma-separated list: the harness's names, groups, tags and patterns, or YAML files.

    Raises:
      ConfigError: an unknown task (near names are given), one named twice, a file or folder that is not there.
      DataError: a task's data cannot be reached, or its definition is broken.
    """
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path is {str(include_path)!r} but must be a folder of task files.")
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    wanted: dict[str, None] = {}
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name.endswith(".yaml"):
            matches = [str(Path(path).absolute()) for path in sorted(glob.glob(name))]
        else:
            matches = manager.match_tasks([name])
        if not matches:
            near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigError(
                f"task {shown(name)} is not known: {hint}`python -m lm_eval ls tasks` lists {len(manager.all_tasks)} "
                "names; a YAML file or --include-path adds yours."
            )
        wanted |= dict.fromkeys(matches)
    if not wanted:
        raise ConfigError(f"--tasks is {shown(names)} but must name a task, such as hellaswag.")
    found, owners = [], {}
    for name in wanted:
        loaded = _load_task(manager, name)
        for task in loaded["tasks"].values():
            _check_task(task)
            if (owner := owners.setdefault(task.task_name, name)) != name:
                raise ConfigError(f"--tasks names {task.task_name} twice, in {owner} and in {name}; leave one out.")
        inner = {child for children in loaded["group_map"].values() for child in children}
        found += [item for kind in ("groups", "tasks") for key, item in loaded[kind].items() if key not in inner]
    return found


def _check_task(task: Any) -> None:
    unsafe = getattr(task, "UNSAFE_CODE", False)
    if unsafe or getattr(task, "MULTIMODAL", False):
        why = "runs code that a model wrote" if unsafe else "shows pictures or sound"
        raise ConfigError(f"the task {task.task_name} {why}, which this command does not do; leave it out.")


def _load_task(manager: TaskManager, name: str) -> Any:
    try:
        return manager.load([name])
    except Exception as error:  # a task is a file of somebody's, which may import and fetch anything
        reason, link = first_line(error), error
        while link is not None and not isinstance(link, ConnectionError | TimeoutError):
            link = link.__cause__ or link.__context__
        if link is not None:
            raise DataError(
                f"the data of the task {name} cannot be reached ({reason}); check the network, or give a task whose "
                "data lie on this disk (--include-path)."
            ) from error
        raise DataError(f"the task {name} cannot be loaded ({type(error).__name__}: {reason}).") from error


def first_line(error: BaseException) -> str:
    """The first line of an error, not too long."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text if len(text) <= 300 else text[:300] + "…"


def parse_options(flag: str, text: str | None) -> dict[str, Any] | None:
    """``"temperature=0.7,do_sample=True"`` or a JSON object -> options.

    Raises:
      ConfigError: another form, naming the flag.
    """
    if text is None:
        return None
    try:
        found = json.loads(text) if text.lstrip().startswith("{") else simple_parse_args_string(text)
    except ValueError as error:
        raise ConfigError(f"{flag} is {shown(text)}, which is no JSON object ({error}).") from error
    words = [] if text.lstrip().startswith("{") else [word for word in text.split(",") if "=" not in word]
    if words or not isinstance(found, dict) or not found:
        raise ConfigError(f"{flag} is {shown(text)} but must be like name=0.7,other=True.")
    return found


def evaluate(
    model: JaxattnLM,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool | None = None,
    system_instruction: str | None = None,
    gen_kwargs: dict[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The harness's results {task: {metric: value}} of a model on tasks of `load_tasks`, as JSON has them.

    Raises:
      ConfigError: impossible options, or a chat template that the checkpoint does not have.
      DataError: a task fails on its own documents.
    """
    for name, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0), ("--seed", seed, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value} but must be at least {least}.")
    if fewshot_as_multiturn and not apply_chat_template:
        raise ConfigError("--fewshot-as-multiturn is for conversations: add --apply-chat-template.")
    if apply_chat_template:
        model.chat_template(True)  # refuses here, before the tasks are prepared
    first, rest = SEEDS if seed is None else (seed, seed)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, gen_kwargs=gen_kwargs,
            task_manager=TaskManager(include_defaults=False),  # which would list them all once more
            apply_chat_template=apply_chat_template, system_instruction=system_instruction, log_samples=False,
            fewshot_as_multiturn=apply_chat_template if fewshot_as_multiturn is None else fewshot_as_multiturn,
            random_seed=first, numpy_random_seed=rest, torch_random_seed=rest, fewshot_random_seed=rest,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # documents and metrics are the tasks' own code
        raise DataError(f"a task failed on its documents ({type(error).__name__}: {first_line(error)}).") from error
    return json.loads(json.dumps((found or {}).get("results", {}), default=str))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint or run of text")
    parser.add_argument("--tasks", required=True, help="comma-separated: names, groups, patterns or YAML files")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="more task files")
    parser.add_argument("--limit", type=int, help="only this many examples a task")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt (default: the task's)")
    parser.add_argument("--apply-chat-template", action="store_true", help="ask in the checkpoint's chat template")
    parser.add_argument(
        "--fewshot-as-multiturn", action=argparse.BooleanOptionalAction,
        help="examples are turns of the conversation (default with --apply-chat-template)",
    )  # fmt: skip
    parser.add_argument("--system-instruction", metavar="TEXT", help="system message, or text before the prompt")
    parser.add_argument("--gen-kwargs", metavar="OPTIONS", help="of generation, like temperature=0.7,do_sample=True")
    parser.add_argument("--chat-template-args", metavar="OPTIONS", help="of the template, like enable_thinking=False")
    parser.add_argument("--think-end-token", metavar="TEXT", help="an answer is what follows it, such as </think>")
    parser.add_argument(
        "--add-bos-token", action=argparse.BooleanOptionalAction,
        help="texts begin with BOS, or with nothing (default: what the tokenizer puts there)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of examples and of sampled answers (default: the harness's own)")
    parser.add_argument("--batch-size", type=int, default=8, help="changes no result (default 8)")
    parser.add_argument("--max-length", type=int, help="tokens of a context (default: the checkpoint's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: the model's)")
    parser.add_argument("--attn", help="other options of the model's attention, such as softmax(window=64)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    add_flags(parser)
    args = parser.parse_args()
    gen_kwargs = parse_options("--gen-kwargs", args.gen_kwargs)
    more = parse_options("--chat-template-args", args.chat_template_args)
    tasks = load_tasks(args.tasks, args.include_path)
    seed = SEEDS[1] if args.seed is None else args.seed
    loaded = load(args.checkpoint, dtype=args.dtype, attn=args.attn, asked=asked(args))
    model = JaxattnLM(
        loaded, batch_size=args.batch_size, max_length=args.max_length, seed=seed, add_bos_token=args.add_bos_token,
        think_end_token=args.think_end_token, chat_template_args=more,
    )  # fmt: skip
    names = ("limit", "num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "system_instruction", "seed")
    results = evaluate(model, tasks, gen_kwargs=gen_kwargs, **{name: getattr(args, name) for name in names})
    print(json.dumps(results, indent=2), flush=True)
    if args.json:
        write_result(args.json, results)
    return 0


if __name__ == "__main__":
    run_cli(main)
