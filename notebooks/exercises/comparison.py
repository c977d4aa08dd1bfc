"""Checkers of notebook 09."""

import statistics

from exercises.verdict import called, checker, given, require, same


@checker
def check_chosen_rate(chosen_rate) -> str:
    """chosen_rate(runs): dicts with "stage", "rate", "validation", "loss", "test" -> the rate to run with."""

    def run(rate, validation, loss, stage="choice", test=None):
        return {"stage": stage, "rate": rate, "validation": validation, "loss": loss, "test": test}

    runs = [run(0.001, 0.90, 0.30), run(0.01, 0.95, 0.20), run(0.1, 0.95, 0.10), run(0.5, 0.50, 0.05)]
    hints = {
        "the lowest loss alone decides for you; accuracy comes first, loss between equals": 0.5,
        "of two with the same accuracy take the one with the lower validation loss": 0.01,
        "that is the worst one": 0.001,
    }
    same(called(chosen_rate, runs), 0.1, hints, "the rate")
    final = [run(0.7, 0.99, 0.01, "final", 0.99), run(0.01, 0.2, 0.9, "final", 0.999)]
    hints = {
        'a final run takes part in the choice: only runs of the stage "choice" may': 0.7,
        "the test accuracy has decided: then the test split is no test any more": 0.01,
    }
    same(called(chosen_rate, runs + final), 0.1, hints, "the rate, with final runs among the rows,")
    return "chosen on validation, by runs made for that purpose; the test split has no say."


@checker
def check_mean_and_spread(mean_and_spread) -> str:
    """mean_and_spread(accuracies) -> the mean and the standard deviation of a sample, over seeds."""
    values = [0.91, 0.95, 0.96]
    result = called(mean_and_spread, values)
    require(isinstance(result, tuple) and len(result) == 2, "return two numbers: the mean and the spread")
    mean, spread = (given(part) for part in result)
    same(mean, statistics.fmean(values), {"that is the median": 0.95}, "the mean")
    hints = {
        "divide by the number of seeds minus one: the mean comes from the same few seeds": statistics.pstdev(values),
        "that is the variance; the spread is its root": statistics.variance(values),
        "that is half of the range": (max(values) - min(values)) / 2,
    }
    same(spread, statistics.stdev(values), hints, "the spread")
    one = called(mean_and_spread, [0.9])
    same(one[0], 0.9, what="the mean of one seed")
    same(given(one[1]), 0.0, what="the spread of one seed")
    return "as in the tables: mean ± standard deviation of the seeds."


@checker
def check_one_common_rate(lost_points) -> str:
    """lost_points(accuracies, rate): {method: {rate: accuracy}} -> {method: points lost by that common rate}."""
    accuracies = {"a": {0.1: 0.5, 0.01: 0.9}, "b": {0.01: 0.8, 0.001: 0.7}, "c": {1.0: 0.6}}
    result = called(lost_points, accuracies, 0.01)
    require(isinstance(result, dict), f"return a dict, one number for each method; this is {type(result).__name__}")
    require("c" not in result, "c never tried that rate, so nothing can be said of it: leave it out")
    require(set(result) == {"a", "b"}, f"a and b tried that rate, the result is about {sorted(result)}")
    same(result["a"], 0.0, what="what a loses, whose best rate that is,")
    below_all = {"a method is compared with its own best, not with the best of all methods": 10.0}
    same(result["b"], 0.0, below_all, "what b loses, whose best rate that is too,")
    again = called(lost_points, accuracies, 0.1)
    same(
        again.get("a"),
        40.0,
        {"give points, a hundred for an accuracy of 1": 0.4, "what is lost is not below zero": -40.0},
        "what a loses by the rate 0.1",
    )
    return "one rate for all compares tastes, not methods."
