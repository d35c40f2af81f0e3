"""TRIPOD+AI (Collins et al. 2024, BMJ 385:e078378) as a checklist: what a study's files say of each item.

The items' numbers are the statement's, their words are ours. Whatever no file says is left to the authors.
"""

from collections.abc import Mapping

ITEMS = {
    "1": "title: development or evaluation of a prediction model, population, outcome",
    "2": "abstract",
    "3a": "clinical background and models that exist",
    "3b": "who the model is for, and where in the pathway of care",
    "3c": "known health inequalities",
    "4": "objectives",
    "5a": "sources of the data and how representative they are",
    "5b": "dates of the data",
    "6a": "setting and number of centers",
    "6b": "eligibility of participants",
    "6c": "treatments received",
    "7": "preparation of the data and checks of its quality",
    "8a": "outcome: definition, time horizon, how assessed",
    "8b": "who assessed the outcome, where that takes judgment",
    "8c": "blinding of the outcome's assessment",
    "9a": "choice of predictors",
    "9b": "predictors: definition and how measured",
    "9c": "who assessed predictors, where that takes judgment",
    "10": "sample size and its justification",
    "11": "missing data",
    "12a": "which data developed and which evaluated the model",
    "12b": "form of the predictors in the analysis",
    "12c": "type of model, steps of its making, tuning, internal validation",
    "12d": "differences between clusters such as centers",
    "12e": "measures and plots of performance",
    "12f": "updating of the model, such as calibration",
    "12g": "how predictions were computed for the evaluation",
    "13": "class imbalance",
    "14": "fairness",
    "15": "output of the model, thresholds",
    "16": "differences between training and evaluation data",
    "17": "ethical approval",
    "18a": "funding",
    "18b": "conflicts of interest",
    "18c": "protocol",
    "18d": "registration",
    "18e": "availability of data",
    "18f": "availability of code",
    "19": "involvement of patients and the public",
    "20a": "flow of participants, with and without the outcome",
    "20b": "characteristics, by center too",
    "20c": "predictors and outcome in evaluation beside development",
    "21": "participants and events in each analysis",
    "22": "the model in full, so that others can use it",
    "23a": "performance with intervals, in subgroups too",
    "23b": "heterogeneity of performance between clusters",
    "24": "results of updating the model",
    "25": "interpretation, fairness included",
    "26": "limitations",
    "27a": "use: poor or missing input",
    "27b": "use: what users have to do and know",
    "27c": "next steps of research",
}
UNKNOWN = "not known to the program"


def tripod_lines(filled: Mapping[str, str]) -> list[str]:
    """A line of Markdown an item, ticked where it is filled.

    Args:
        filled: number of an item -> a sentence; every number is of `ITEMS`.
    """
    return [
        f"- [{'x' if filled.get(item) else ' '}] **{item}** {topic}: {filled.get(item) or UNKNOWN}"
        for item, topic in ITEMS.items()
    ]
