"""Rows and reports, shown: on a terminal (rich) and, with later issues, as Markdown and HTML.

Takes records (`kvllm.records`) and gives renderables. Needs no torch and knows no engine.
"""
