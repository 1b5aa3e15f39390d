"""The result of a run, as a table that people read."""

from __future__ import annotations

from .suite import SelfTestResult

# Failures that are printed in full.
_SHOWN = 20
_HEAD = ("operation", "form", "W", "W0", "U, V", "G", "cases", "worst error", "bound", "repeats", "verdict")


def format_table(result: SelfTestResult, title: str) -> str:
    """Format a result: a line for each operation, form and dtypes, the kernels that were covered, and all failures."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for line_key, line in result.lines.items():
        # Results of full anchors are compared bit for bit: none of them is a sum.
        error, bound = (f"{line.worst:.1e}", f"{line.bound:.1e}") if line.bound else ("exact", "-")
        verdict = f"{line.failures} FAILED" if line.failures else "ok"
        rows.append((*line_key, str(line.cases), error, bound, str(line.repeats), verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [title, ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    if result.kernels is not None:
        compared, repeated, listed = result.kernels
        lines.append(
            f"{compared} of {listed} kernels were compared with float64, {repeated} repeated where they fill the device"
        )
    lines += _list_absent(result)
    lines += result.notes[:_SHOWN]
    if len(result.notes) > _SHOWN:
        lines.append(f"... and {len(result.notes) - _SHOWN} more")
    lines += [f"FAILED: {failure}" for failure in result.failures[:_SHOWN]]
    if len(result.failures) > _SHOWN:
        lines.append(f"... and {len(result.failures) - _SHOWN} more failures")
    verdict = "passed" if result.passed else f"{len(result.failures)} FAILURES"
    lines.append(f"{verdict}, {result.seconds:.1f} s")
    return "\n".join(lines)


def _list_absent(result: SelfTestResult) -> list[str]:
    """List the kernels that this installation lacks, by reason."""
    reasons: dict[str, list[str]] = {}
    for variant, reason in result.absent.items():
        reasons.setdefault(reason.replace(variant.label(), "a kernel"), []).append(variant.label())
    lines = []
    for reason, labels in reasons.items():
        lines.append(f"{len(labels)} kernels are not in this installation, and were not tested: {reason}")
        lines += [f"  {label}" for label in labels[:_SHOWN]]
        if len(labels) > _SHOWN:
            lines.append(f"  ... and {len(labels) - _SHOWN} more")
    return lines
