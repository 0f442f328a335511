"""The `llmcourse` command: `doctor`, `build`, `pretrain`, `generate`, `artifacts`, and those of `grading.commands`.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcourse.grading.commands import add_commands

app = typer.Typer(
    help="Train and use the models of the course.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input and a full disk end with one line and exit code 2, not with a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError too
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_training_error(error):
                raise
            print(f"llmcourse: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("llmcourse: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def _is_training_error(error: RuntimeError) -> bool:
    from llmcourse.training.fit import TrainingError

    return isinstance(error, TrainingError)


add_commands(app, _one_line_errors)


@app.command()
@_one_line_errors
def doctor() -> None:
    """Say what this machine has, what is missing, and what each lab will cost on it."""
    from llmcourse.doctor import diagnose, render

    report = diagnose()
    print(render(report))
    if report.problems:
        raise typer.Exit(1)


@app.command()
@_one_line_errors
def build(
    stage: Annotated[str, typer.Argument(help="stage of the pipeline: base or sft")],
    preset: Annotated[str, typer.Option(help="cpu or gpu")] = "cpu",
    corpus: Annotated[str, typer.Option(help="tinytown, python-docs, files:GLOB or hub:NAME")] = "tinytown",
    seed: Annotated[int, typer.Option(help="of initial weights and data order")] = 0,
    model: Annotated[str, typer.Option(help="folder or Hub name of a model in place of the base")] = "",
) -> None:
    """Make a stage and everything upstream of it, or find it in the cache; print where it is."""
    from llmcourse import pipeline

    loaded = pipeline.load(stage, preset=preset, corpus=corpus, seed=seed, model=model)
    if loaded.artifact is None:
        raise ValueError(f"stage={stage!r} is the model itself when --model is given: build sft")
    _print_metrics(loaded.artifact.metrics)
    print(f"{stage}: {loaded.artifact.path}")


@app.command()
@_one_line_errors
def artifacts() -> None:
    """List what is in the cache: stage, age, seconds that it took, folder."""
    from llmcourse.artifacts import list_artifacts

    for artifact in list_artifacts():
        created = artifact.manifest["created"][:16]
        print(f"{artifact.stage:10} {created}  {artifact.seconds:8.1f} s  {artifact.path}")


@app.command()
@_one_line_errors
def generate(
    prompt: Annotated[list[str], typer.Argument(help="texts to continue")],
    model: Annotated[str, typer.Option(help="folder, Hub name, or a stage of the pipeline")] = "base",
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens")] = 0,
    top_p: Annotated[float, typer.Option(help="nucleus probability")] = 1.0,
    min_p: Annotated[float, typer.Option(help="least probability relative to the likeliest")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="stop after this many")] = 96,
    stop: Annotated[list[str] | None, typer.Option(help="stop at this text; may be repeated")] = None,
    seed: Annotated[int | None, typer.Option(help="of the random numbers; none: different each time")] = None,
    preset: Annotated[str, typer.Option(help="of the stage, when --model names one")] = "cpu",
) -> None:
    """Continue prompts with a trained model."""
    from llmcourse import pipeline
    from llmcourse.inference import SamplingParams, complete
    from llmcourse.models.pretrained import from_pretrained, local_folder
    from llmcourse.tokenization.tokenizer import Tokenizer

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        seed=seed,
    )
    if model in pipeline.STAGES:
        loaded = pipeline.load(model, preset=preset)
        network, tokenizer = loaded.model, loaded.tokenizer
    else:
        folder = local_folder(model)
        network, tokenizer = from_pretrained(folder), Tokenizer.load(folder)
    tokenizer.check_matches(network.config.vocab_size)
    for text, continuation in zip(prompt, complete(network, tokenizer, prompt, params), strict=True):
        print(text + continuation)


def run_pretraining(out: Path, preset: str, device: str | None, changes: dict[str, Any]) -> None:
    """Train from a corpus name to a folder that `generate` and transformers open; resumes what it finds in `out`.

    Works in one process and in each of several under torchrun, where the first prepares the corpus for all.
    """
    from llmcourse import pipeline, runtime
    from llmcourse.models.pretrained import save_pretrained
    from llmcourse.training import distributed, pretraining

    settings = pretraining.preset(preset, **changes)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    # A folder that cannot be written should come out now, not after the training.
    out.mkdir(parents=True, exist_ok=True)
    chosen = runtime.pick_device(device or ("cpu" if preset == "cpu" else None))
    world = distributed.start(chosen)
    if not world.is_main:
        distributed.barrier()  # the first process makes the corpus, the tokenizer and the tokens
    source = pipeline.corpus(settings.corpus, settings.n_documents)
    codec, codec_artifact = pipeline.tokenizer(source, settings.vocab_size)
    train, valid, _ = pipeline.tokens(source, codec, codec_artifact)
    if world.is_main:
        distributed.barrier()
    model, result = pretraining.pretrain(
        settings, train, valid, checkpoint_folder=out / "checkpoints", device=chosen
    )
    if world.is_main:
        save_pretrained(model, out, codec)
        metrics = pipeline.summarize(settings, source, valid, model, result)
        pipeline.write_records(out, result, metrics)
        _print_metrics(metrics)
        print(f"model: {out}")
    distributed.stop()


def _print_metrics(metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if isinstance(value, dict):
            for inner, estimate in value.items():
                print(
                    f"{inner:28} {estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}] "
                    f"n={estimate['n']}"
                )
        else:
            print(f"{name:28} {value:.6g}" if isinstance(value, float) else f"{name:28} {value}")


FLAG_TYPES = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "tuple[float, float]": tuple[float, float],
}


def _flags() -> dict[str, tuple[type, str]]:
    """Every setting of a pre-training run: name -> (type, help), from the dataclasses themselves."""
    from llmcourse.training.pretraining import FitSettings, ModelConfig, PretrainSettings

    flags: dict[str, tuple[type, str]] = {}
    for owner in (PretrainSettings, ModelConfig, FitSettings):
        helps = _field_docs(owner)
        for field in dataclasses.fields(owner):
            if field.name not in ("model", "fit"):
                kind = FLAG_TYPES[str(field.type).split(" |")[0]]
                flags.setdefault(field.name, (kind, helps[field.name]))
    return flags


def _field_docs(owner: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, in one line."""
    import ast
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())  # type: ignore[union-attr]
    return docs


def _pretrain_command() -> Callable[..., None]:
    """`pretrain` with one option for each setting; those not given keep the preset's value."""

    def pretrain(out: Path, preset: str, device: str | None, **changes: Any) -> None:
        """Pre-train a model on a corpus and save it; the same command goes on after an interruption."""
        run_pretraining(out, preset, device, changes)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = {
        "out": (Path, typer.Option(help="folder for model, records and checkpoints"), Path("runs/base")),
        "preset": (str, typer.Option(help="cpu or gpu: where unnamed settings come from"), "cpu"),
        "device": (str | None, typer.Option(help="cpu, cuda or mps; default: as the preset"), None),
    }
    parameters = [
        inspect.Parameter(name, keyword, annotation=Annotated[kind, option], default=default)
        for name, (kind, option, default) in own.items()
    ] + [
        inspect.Parameter(
            name, keyword, annotation=Annotated[kind | None, typer.Option(help=text)], default=None
        )
        for name, (kind, text) in _flags().items()
    ]
    pretrain.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    pretrain.__annotations__ = {p.name: p.annotation for p in parameters}
    command = _one_line_errors(pretrain)
    command.__signature__ = pretrain.__signature__  # type: ignore[attr-defined]
    return command


def main() -> None:
    """Entry point; `pretrain` gets its flags only when it is asked for, since that imports torch."""
    arguments = sys.argv[1:]
    if "pretrain" in arguments[:1]:
        app.command(name="pretrain")(_pretrain_command())
    else:

        @app.command(name="pretrain", context_settings={"ignore_unknown_options": True})
        def _placeholder() -> None:
            """Pre-train a model on a corpus; `llmcourse pretrain --help` lists every setting."""

    app()


if __name__ == "__main__":
    main()
