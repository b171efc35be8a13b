"""`hafs train`: jobs on nodes. A job is named by its id, the start of one, or a model's name (its newest job), wherever it is."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train on your nodes. JOB is a job's id, the start of one, or a model's name.", no_args_is_help=True)

Node = Annotated[str, typer.Option("--node", help="Look there only; without it every node is asked.", show_default=False)]
Job = Annotated[str, typer.Argument(help="A job's id, the start of one, or a model's name (its newest job).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended; Ctrl-C ends the following only.")]


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="The job's TOML file.")],
    node: Annotated[
        str, typer.Option("--node", help="A node of nodes.toml, or auto: the one that suits best. Else this machine.")
    ] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Of the jobs that wait, a higher one goes first.")] = 0,
    after: Annotated[str, typer.Option(metavar="JOB", help="Wait until that job has succeeded; it names the node, too.")] = "",
    follow: Follow = False,
    as_json: Json = False,
) -> None:
    """Ship the job's data and queue the job. Every submit is a new job.

    With --follow, [notify] of HAFS_HOME/notify.toml (else that of the job's campaign) is told when the job ends.
    """
    from campaigns.cli import render, render_train, train_live
    from campaigns.training import Wish, ship_and_submit
    from config.contracts.job import JobSpec
    from config.settings import load_settings
    from config.toml import load_toml

    settings, tell = load_settings(), render.note if as_json else render.line
    at = ship_and_submit(settings, Wish(node, priority, after), load_toml(spec, JobSpec), tell)
    if follow:
        train_live.follow_job(settings, at.node, at.job.id)
    else:
        render_train.submitted(at, as_json)


@app.command()
def status(
    job: Annotated[str, typer.Argument(help="One job; without it, what goes on.")] = "", node: Node = "", as_json: Json = False
) -> None:
    """What goes on at the nodes, or all about one job. A node that does not answer is unknown, with what it said last."""
    from campaigns.sync.survey import surveying
    from config.settings import load_settings

    answers = surveying(load_settings(), [node] if node else ())  # what follows is loaded while the nodes answer
    from campaigns.cli import render_train
    from campaigns.locate import find

    states = render_train.surveyed(answers(), node)
    if job:
        render_train.one_job(find(states, job), as_json)
    else:
        render_train.going_on(states, as_json)


@app.command("list")
def list_(node: Node = "", as_json: Json = False) -> None:
    """Every job of every node, the newest first."""
    from campaigns.sync.survey import surveying
    from config.settings import load_settings

    answers = surveying(load_settings(), [node] if node else ())
    from campaigns.cli import render_train
    from campaigns.locate import jobs_at

    render_train.jobs(jobs_at(render_train.surveyed(answers(), node)), as_json)


@app.command()
def logs(job: Job, node: Node = "", follow: Follow = False) -> None:
    """What the job printed. Into a file or a pipe it goes byte for byte, through lost connections too."""
    from campaigns.cli.train_live import follow_log, print_log
    from campaigns.locate import node_of
    from config.settings import load_settings

    settings = load_settings()
    name, there = node_of(settings, job, node)
    if follow:
        follow_log(settings, name, there)
    else:
        print_log(settings, name, there)


@app.command()
def metrics(job: Job, node: Node = "", as_json: Annotated[bool, typer.Option("--json", help="One JSON a line.")] = False) -> None:
    """Loss, learning rate and speed by step."""
    from campaigns.cli import render_train
    from campaigns.cli.train_live import read_metrics
    from campaigns.locate import node_of
    from config.settings import load_settings

    settings = load_settings()
    render_train.metrics(read_metrics(settings, *node_of(settings, job, node)), as_json)


@app.command()
def watch(job: Annotated[str, typer.Argument(help="Without it, the newest that has not ended.")] = "", node: Node = "") -> None:
    """A job live: loss, steps, time to go, GPU, queue. Ctrl-C ends the watching only.

    Whoever watches or follows a job to its end also sends [notify]. When nobody does, nothing is sent: the node itself tells
    nobody.
    """
    from campaigns.cli import render_train
    from campaigns.cli.train_live import watch_job
    from campaigns.locate import find
    from campaigns.sync.survey import survey
    from config.settings import load_settings

    settings = load_settings()
    watch_job(settings, find(render_train.surveyed(survey(settings, [node] if node else ()), node), job))


@app.command()
def cancel(job: Job, node: Node = "", as_json: Json = False) -> None:
    """Stop a job; its last checkpoint is kept."""
    from campaigns.cli import render_train
    from campaigns.training import ask_about
    from config.contracts.wire import CANCEL
    from config.settings import load_settings

    render_train.cancelled(ask_about(load_settings(), CANCEL, job, node), as_json)


@app.command()
def retry(job: Job, node: Node = "", as_json: Json = False) -> None:
    """Queue a job that failed or was cancelled again; it goes on from what it has done."""
    from campaigns.cli import render_train
    from campaigns.training import ask_about
    from config.contracts.wire import RETRY
    from config.settings import load_settings

    render_train.retried(ask_about(load_settings(), RETRY, job, node), as_json)


@app.command()
def artifacts(
    job: Job,
    names: Annotated[list[str] | None, typer.Argument(help="Fetch these: a file, or a folder with all in it.")] = None,
    node: Node = "",
    as_json: Json = False,
) -> None:
    """What a job made: a list, or, with names, the files, below HAFS_HOME/models."""
    from campaigns.cli import render, render_train
    from campaigns.results import fetch, results_of
    from config.settings import load_settings

    settings = load_settings()
    found = results_of(settings, job, node)
    if not names:
        return render_train.artifacts(found, as_json)
    with render.transfer("fetching") as on_bytes:
        folder = fetch(settings, found, names, on_bytes)
    render_train.fetched(found, folder, as_json)
