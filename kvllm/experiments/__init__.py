"""Experiments on the article's open questions: declared, resumable, measured against the unedited model and retrieval.

Each experiment is a TOML file (`benchmarks/experiments/`), expands into independent runs of small steps, writes rows to
a results database, and renders a report.

    from kvllm.experiments.declared import load
    from kvllm.experiments.runner import run_experiment
    run_experiment(load("benchmarks/experiments/injection/small.toml"), "out")
"""
