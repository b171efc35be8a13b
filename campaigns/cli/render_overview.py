"""What `hafs status` shows: campaigns, jobs and models on one screen."""

from campaigns.cli.render import as_json, heading, jobs, line, models
from campaigns.cli.render_campaign import campaign_facts, campaign_list
from campaigns.overview import Overview
from campaigns.picture import picture_of


def overview(seen: Overview, json_wanted: bool) -> None:
    campaigns = [picture_of(status) for status in seen.campaigns]
    if json_wanted:
        nodes = [
            {
                "name": node.name,
                "problem": node.problem,
                "jobs": [job.model_dump(mode="json") for job in node.jobs],
                "models": [model.model_dump(mode="json") for model in node.models],
            }
            for node in seen.nodes
        ]
        return as_json({"home": seen.home, "campaigns": [campaign_facts(seen) for seen in campaigns], "nodes": nodes})
    line(f"home: {seen.home}")
    heading("campaigns")
    campaign_list(campaigns, False)
    for node in seen.nodes:
        heading(f"node {node.name}")
        if node.problem:
            line(f"unknown: {node.problem}")
        else:
            jobs(node.jobs, False)
            models(node.models, False)
