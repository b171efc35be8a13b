"""`hafs train`: jobs on a node."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train on a node.", no_args_is_help=True)

Node = Annotated[str, typer.Option("--node", help="A node of nodes.toml; local is this machine.")]
Job = Annotated[str, typer.Argument(help="A job's id, the start of one, or a model's name (its newest job).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended; Ctrl-C ends the following only.")]


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="The job's TOML file.")], node: Node = "local", follow: Follow = False
) -> None:
    """Ship the job's data and queue the job. Every submit is a new job."""
    from campaigns.cli import render
    from campaigns.cli.train_live import follow_job
    from campaigns.training import ship_and_submit
    from config.contracts.job import JobSpec
    from config.settings import load_settings
    from config.toml import load_toml

    settings = load_settings()
    job = ship_and_submit(settings, node, load_toml(spec, JobSpec), render.line)
    if not follow:
        render.line(f"follow it with: {render.command('train', 'logs', job.id, '-f', node=node)}")
    else:
        follow_job(settings, node, job.id)


@app.command()
def status(
    job: Annotated[str, typer.Argument(help="One job; without it, all.")] = "", node: Node = "local", as_json: Json = False
) -> None:
    """The jobs of a node, or all about one."""
    from campaigns.cli import render
    from campaigns.sync.remote import connect
    from config.contracts.wire import STATUS, JobArgs
    from config.settings import load_settings

    with connect(load_settings(), node) as remote:
        views = remote.call(STATUS, JobArgs(job=job)).jobs
    if job and not as_json:
        render.job_end(views[0])
    else:
        render.jobs(views, as_json)


@app.command()
def logs(job: Job, node: Node = "local", follow: Follow = False) -> None:
    """What the job printed."""
    from campaigns.cli.train_live import follow_job, print_log
    from config.settings import load_settings

    if follow:
        follow_job(load_settings(), node, job)
    else:
        print_log(load_settings(), node, job)


@app.command()
def cancel(job: Job, node: Node = "local") -> None:
    """Stop a job; its last checkpoint is kept."""
    from campaigns.cli import render
    from campaigns.sync.remote import connect
    from config.contracts.wire import CANCEL, JobArgs
    from config.settings import load_settings

    with connect(load_settings(), node) as remote:
        render.jobs(remote.call(CANCEL, JobArgs(job=job)).jobs, False)
