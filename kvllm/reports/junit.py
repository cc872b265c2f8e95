"""A report as JUnit XML, for the test view of a CI service.

A failure is a rule of the gate that did not hold, and every question that it is about; a question that did not pass
within what the gate allows is "skipped", so that the file has failures exactly when the command exits with 6.

    junit_file(document)     # '<?xml version="1.0" …'
"""

from __future__ import annotations

from xml.etree import ElementTree

from kvllm.metrics import shown
from kvllm.reports.document import Document, Entry
from kvllm.reports.text import xml


def junit_file(document: Document) -> str:
    """Return the whole file."""
    root = ElementTree.Element("testsuites", name=xml(f"kvllm {document.kind}"))
    failed = {check.metric for check in document.checks if not check.passed}
    gate = ElementTree.SubElement(root, "testsuite", name="gate")
    properties = ElementTree.SubElement(gate, "properties")
    for name, numbers in document.metrics.items():
        for suffix, said in zip(("", ".n", ".scorer"), numbers, strict=True):
            ElementTree.SubElement(properties, "property", name=xml(name + suffix), value=xml(said))
    for check in document.checks:
        name = f"{check.metric} {check.sense} {shown(check.limit)}"
        case = ElementTree.SubElement(gate, "testcase", classname="gate", name=xml(name))
        said = f"{check.metric} is {shown(check.value)} (n={check.n})"
        if check.passed:
            ElementTree.SubElement(case, "system-out").text = xml(said)
        else:
            ElementTree.SubElement(case, "failure", type="gate", message=xml(said)).text = xml(said)
    for section in document.sections:
        if section.entries:
            suite = ElementTree.SubElement(root, "testsuite", name=xml(section.title))
            for entry in section.entries:
                _case(suite, entry, failed)
    for suite in (*root.findall("testsuite"), root):
        for name, path in (("tests", ".//testcase"), ("failures", ".//failure"), ("skipped", ".//skipped")):
            suite.set(name, str(len(suite.findall(path))))
        suite.set("errors", "0")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, entry: Entry, failed: set[str]) -> None:
    classname = ".".join(part for part in (entry.kind, entry.group) if part)
    case = ElementTree.SubElement(suite, "testcase", classname=xml(classname), name=xml(entry.question))
    said = " ".join(word for word in (entry.note or "", entry.score, f"by {entry.scorer}") if word)
    texts = "\n".join(f"{label}: {text}" for label, text in (("score", said), *entry.texts))
    if entry.passed is False:
        blocking = not failed.isdisjoint(entry.metrics) or ("facts_lost" in failed and entry.note == "lost")
        tag = "failure" if blocking else "skipped"
        told = f"did not pass ({entry.scorer})" + ("" if blocking else "; within what the gate allows")
        found = ElementTree.SubElement(case, tag, message=xml(told))
        if blocking:
            found.text = xml(texts)
    ElementTree.SubElement(case, "system-out").text = xml(texts)
