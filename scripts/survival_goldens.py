"""Make `tests/goldens/survival.npz`: what lifelines and scikit-survival say of 200 made sets with ties and censoring.

    pip install lifelines==0.30.3 scikit-survival==0.28.0
    python scripts/survival_goldens.py tests/goldens/survival.npz

In an environment of its own, which needs neither this package nor torch: scikit-survival is GPL, so that it is asked
once and never installed with the package. A value that a tool does not define is NaN.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from lifelines.utils import concordance_index
from sksurv import metrics
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.util import Surv

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from made_survival import SETS, made_survival

SCORES = (
    "cox_efron", "coefficient_0", "coefficient_1", "harrell_c", "harrell_c_sksurv", "uno_c", "integrated_brier",
    "auroc_first", "auroc_last", "kaplan_meier", "log_rank", "log_rank_p", "breslow", "breslow_coefficient_0",
    "breslow_coefficient_1",
)  # fmt: skip


def said(number: int) -> list[float]:
    """The scores of one set, in the order of `SCORES`."""
    made = made_survival(number)
    time, event, risk, times = made["time"], made["event"], made["risk"], made["times"]
    truth = Surv.from_arrays(event, time)
    frame = pd.DataFrame({"a": made["x"][:, 0], "b": made["x"][:, 1], "time": time, "event": event})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = CoxPHFitter().fit(frame, "time", "event", fit_options={"precision": 1e-12})
    found = [-fitted.log_likelihood_, *fitted.params_.to_numpy()]
    found += [concordance_index(time, -risk, event), metrics.concordance_index_censored(event, time, risk)[0]]

    def of(measure: object, *args: object, **more: object) -> float:
        try:
            return measure(*args, **more)  # type: ignore[operator,no-any-return]
        except ValueError:
            return float("nan")

    found.append(of(lambda: metrics.concordance_index_ipcw(truth, truth, risk, tau=times[-1])[0]))

    def integrated() -> float:
        scores = metrics.brier_score(truth, truth, made["survival"], times)[1]
        return float(np.trapezoid([0.0, *scores], [0.0, *times]) / times[-1])

    found.append(of(integrated))
    for moment in (times[0], times[-1]):
        found.append(of(lambda at=moment: float(metrics.cumulative_dynamic_auc(truth, truth, risk, [at])[0][0])))
    found.append(float(KaplanMeierFitter().fit(time, event).predict(times[-1])))
    test = multivariate_logrank_test(time, made["group"], event)
    model = CoxPHSurvivalAnalysis(ties="breslow").fit(made["x"], truth)
    hazard = float(model.cum_baseline_hazard_(times[-1]))
    return [*found, test.test_statistic, test.p_value, hazard, *model.coef_]


def main() -> None:
    """Read the command line, ask both, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    table = np.array([said(number) for number in range(SETS)])
    print({name: int(np.isnan(column).sum()) for name, column in zip(SCORES, table.T, strict=True)})
    np.savez_compressed(out, names=SCORES, values=table)


if __name__ == "__main__":
    main()
