"""Random follow-up with ties and censoring; numpy's frozen generator, so that goldens know the same sets."""

import numpy as np

SETS = 200


def made_survival(number: int) -> dict[str, np.ndarray]:
    """time (N,), event (N,) bool, risk (N,) with ties, x (N, 2), times (5,), survival (N, 5), group (N,) 0 .. 2."""
    random = np.random.RandomState(1000 + number)
    rows = random.randint(15, 70)
    x = random.standard_normal((rows, 2))
    scale = (3, 8, 1000)[number % 3]  # few times, some, nearly none tied
    true = np.ceil(scale * random.exponential(np.exp(-x[:, 0])))
    end = np.ceil(scale * random.exponential(2.0, rows))
    time, event = np.minimum(true, end), true <= end
    event[:2] = True
    risk = np.round(x[:, 0] + 0.7 * random.standard_normal(rows), 1)
    # Within the follow-up, and where not all who are left are censored.
    sure = np.sort(time)[: max(3, int(0.8 * rows))]
    times = np.unique(np.quantile(sure, [0.2, 0.35, 0.5, 0.65, 0.8]) + 0.25)
    times = times[times < time[event].max()] if (times < time[event].max()).any() else times[:1]
    survival = np.exp(-np.outer(np.exp(0.5 * risk), times / times[-1]))
    return {
        "time": time,
        "event": event,
        "risk": risk,
        "x": x,
        "times": times,
        "survival": survival,
        "group": random.randint(0, 3, rows),
    }
