"""Pretraining the slide encoder on unlabeled slides."""

from typing import Annotated

from cyclopts import Parameter

from gigapath.cli.arguments import Features, Folder, verb
from gigapath.pretraining.options import CohortOptions, PretrainingOptions, SizeOptions, TaskOptions


@verb
def pretrain(
    features: Features,
    /,
    *,
    out: Folder,
    init: Annotated[str, Parameter(metavar="WEIGHTS")] = "",
    dry_run: bool = False,
    cohort: CohortOptions,
    sizes: SizeOptions,
    task: TaskOptions,
    training: PretrainingOptions,
) -> int:
    """Tell the plan, then train; after each epoch OUT/slide_encoder.pth holds the weights.

    Args:
        out: output folder; a run that it holds goes on
        init: weights to go on from: hf_hub:REPO or a file (default: new ones)
        dry_run: show the plan and write nothing
    """
    from gigapath.cli.progress import Terminal
    from gigapath.pretraining import pretrain as run
    from gigapath.progress import StopFlag

    with Terminal() as watch, StopFlag(watch.stopping) as stop:
        result = run(
            features,
            out,
            init=init,
            cohort=cohort,
            sizes=sizes,
            task=task,
            training=training,
            dry_run=dry_run,
            watch=watch,
            check_stop=stop.check,
        )
    print("Dry run: nothing was written." if result is None else f"Weights: {result.weights}")
    return 0
