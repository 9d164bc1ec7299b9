"""Tables and plain-character curves for the terminal. The tables are Markdown, to be pasted as they are."""


def table(head, rows):
    """Markdown with padded columns; numbers to the right.

    table(["run", "loss"], [["a", 4.5], ["bc", None]]) ->
        | run |   loss |
        | --- | -----: |
        | a   | 4.5000 |
        | bc  |      - |
    """
    right = [any(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
             for i in range(len(head))]  # fmt: skip
    cells = [[shown(value) for value in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in [head, *cells])) for i in range(len(head))]

    def line(row):
        padded = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)]
        return f"| {' | '.join(padded)} |"

    rule = "| " + " | ".join("-" * (w - r) + ":" * r for w, r in zip(widths, right)) + " |"
    return "\n".join([line(head), rule, *map(line, cells)])


def shown(value):
    """A value as a cell: integers with separators, floats in four decimals or, if small or large, four digits."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value).replace("|", "/")
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if 1e3 <= abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"
    return str(value)


def spread(values):
    """ "mean ± standard deviation" of a sample, or the one value. Two values and more have a deviation (n - 1)."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return shown(mean)
    return f"{shown(mean)} ± {shown(deviation(values))}"


def deviation(values):
    """Standard deviation of a sample (n - 1)."""
    mean = sum(values) / len(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5


def draw(curves, width=72, height=16):
    """Curves as lines of plain characters, a scale at the left and below.

    curves: [(character, xs, ys)]; a later curve is drawn over an earlier one.
    """
    points = [(x, y) for _, xs, ys in curves for x, y in zip(xs, ys)]
    if not points:
        return ["(no loss has been recorded yet)"]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    grid = [[" "] * width for _ in range(height)]
    for mark, xs, ys in curves:
        for x, y in zip(xs, ys):
            column = round((x - left) / ((right - left) or 1) * (width - 1))
            row = round((high - y) / ((high - low) or 1) * (height - 1))
            grid[row][column] = mark
    lines = []
    for i, row in enumerate(grid):
        scale = f"{high - (high - low) * i / (height - 1):8.3f}" if i % 5 == 0 or i == height - 1 else " " * 8
        lines.append(f"{scale} |{''.join(row)}".rstrip())
    lines.append(" " * 9 + "+" + "-" * width)
    lines.append(" " * 10 + f"{left:,.0f}".ljust(width - 12) + f"{right:,.0f}".rjust(12))
    return lines
