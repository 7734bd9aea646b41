"""Answers cases on standard input with what gbstats says, one JSON document each way."""

import json
import sys
import warnings

warnings.filterwarnings("ignore")

from gbstats.bayesian.tests import EffectBayesianABTest, EffectBayesianConfig, GaussianPrior
from gbstats.frequentist.tests import SequentialConfig, SequentialTwoSidedTTest
from gbstats.models.statistics import ProportionStatistic, SampleMeanStatistic
from gbstats.utils import check_srm


def statistic(case, name):
    units, total, squares = case[name]
    if case["metric"] == "conversion":
        return ProportionStatistic(units, total)
    return SampleMeanStatistic(units, total, squares)


def answer(case):
    control, treatment = statistic(case, "control"), statistic(case, "treatment")
    prior = GaussianPrior(0, 0.09, case["prior"])
    bayes = EffectBayesianABTest(control, treatment, EffectBayesianConfig(prior_effect=prior)).compute_result()
    config = SequentialConfig(alpha=case["alpha"], sequential_tuning_parameter=case["tuned_for"])
    sequence = SequentialTwoSidedTTest(control, treatment, config).compute_result()
    return {
        "silent": bayes.error_message is not None,
        "mean": bayes.uplift.mean,
        "deviation": float(bayes.uplift.stddev),
        "win": float(bayes.chance_to_win),
        "risk": [float(risk) for risk in bayes.risk],
        "interval": [float(end) for end in bayes.ci],
        "sequence": [float(end) for end in sequence.ci],
        "sample_ratio_p": float(check_srm([control.n, treatment.n], case["weights"])),
    }


json.dump([answer(case) for case in json.load(sys.stdin)], sys.stdout)
