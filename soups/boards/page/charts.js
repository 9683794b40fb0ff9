// Points and lines over two axes.

const CHART = { width: 520, height: 300, left: 46, right: 16, top: 14, bottom: 40 };

// A scale with round ticks: of the logarithm, or plain.
function axisOf(values, from, to, { log = false, pad = 0.06 } = {}) {
  const turn = log ? Math.log10 : (value) => value;
  let [low, high] = [Math.min(...values.map(turn)), Math.max(...values.map(turn))];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const room = (high - low) * pad;
  [low, high] = [low - room, high + room];
  const at = (value) => from + ((to - from) * (turn(value) - low)) / (high - low);
  const step = log ? Math.max(1, Math.ceil((high - low) / 6)) : roundStep((high - low) / 5);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high; k += 1) ticks.push(log ? 10 ** (k * step) : k * step);
  return { at, ticks, step: log ? null : step };
}

function roundStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return power * ([1, 2, 5, 10].find((factor) => factor * power >= step) ?? 10);
}

function frame(xAxis, yAxis, xText, yText, xTitle, yTitle) {
  const { width, height, left, right, top, bottom } = CHART;
  const [x0, x1, y0, y1] = [left, width - right, height - bottom, top];
  return [
    ...yAxis.ticks.map((tick) => [
      svg("line", { class: "grid", x1: x0, x2: x1, y1: yAxis.at(tick), y2: yAxis.at(tick) }),
      svg("text", { class: "tick", x: x0 - 6, y: yAxis.at(tick) + 4, "text-anchor": "end" }, yText(tick)),
    ]).flat(),
    ...xAxis.ticks.map((tick) => svg("text", { class: "tick", x: xAxis.at(tick), y: y0 + 16, "text-anchor": "middle" }, xText(tick))),
    svg("line", { class: "axis", x1: x0, x2: x1, y1: y0, y2: y0 }),
    svg("text", { class: "title", x: (x0 + x1) / 2, y: height - 4, "text-anchor": "middle" }, xTitle),
    svg("text", { class: "title", x: x0 - 38, y: y1 - 3, "text-anchor": "start" }, yTitle),
  ];
}

const tickText = (step) => (value) => fixed(value, step >= 1 ? 0 : Math.ceil(-Math.log10(step) - 1e-9));

// Of the rows, those that no other has at least the accuracy of, for less.
function front(points) {
  let best = -Infinity;
  return [...points].sort((a, b) => a.x - b.x || b.y - a.y).filter((point) => {
    const ahead = point.y > best;
    best = Math.max(best, point.y);
    return ahead;
  });
}

// Where a name goes beside its point, if there is room that no other name or point has.
function placeNames(points, taken) {
  return points.map(({ px, py, name }) => {
    const width = 6.3 * name.length;
    const places = [[px - 6, py - 7, "end"], [px + 7, py - 7, "start"], [px, py - 10, "middle"], [px + 7, py + 15, "start"], [px - 6, py + 15, "end"]];
    for (const [x, y, anchor] of places) {
      const left = anchor === "start" ? x : anchor === "end" ? x - width : x - width / 2;
      const box = [left, y - 11, left + width, y + 3];
      const inside = box[0] > CHART.left && box[2] < CHART.width && box[1] > 0;
      if (inside && taken.every((other) => apart(box, other))) {
        taken.push(box);
        return svg("text", { class: "name", x, y, "text-anchor": anchor }, name);
      }
    }
    return null;
  });
}

const apart = (a, b) => a[2] < b[0] || b[2] < a[0] || a[3] < b[1] || b[3] < a[1];

// Accuracy against a cost, with the Pareto front of the soups.
function costChart({ title, rows, key, kind, unit, scale, log }) {
  // As in the table: references that are far from the soups do not press these together.
  const [low, high] = rangeOf(rows, (row) => [row.report_accuracy]);
  const points = rows
    .filter((row) => row[key] > 0 && row.report_accuracy >= low && row.report_accuracy <= high)
    .map((row) => ({ row, x: row[key] / scale, y: 100 * row.report_accuracy, name: row.label }));
  if (points.length < 2) return null;
  const { width, height, left, right, top, bottom } = CHART;
  const xAxis = axisOf(points.map((point) => point.x), left, width - right, { log });
  const yAxis = axisOf(points.map((point) => point.y), height - bottom, top);
  points.forEach((point) => Object.assign(point, { px: xAxis.at(point.x), py: yAxis.at(point.y) }));
  const best = front(points.filter(({ row }) => row.kind !== "reference"));
  const steps = best.map(({ px, py }, place) => (place ? `H${px}V${py}` : `M${px} ${py}`)).join("");
  const marks = points.map((point) => svg("circle", {
    class: `point ${point.row.kind} ${best.includes(point) ? "front" : ""}`,
    cx: point.px, cy: point.py, r: best.includes(point) ? 5 : 4,
  }));
  const said = (place) => {
    const { row } = points[place];
    const reference = row.kind === "reference" ? " (no soup)" : "";
    return `${row.label}${reference}: ${written("percent", row.report_accuracy)}%, ${written(kind, row[key])}${kind === "seconds" ? " s" : ""}${best.includes(points[place]) ? ", on the front" : ""}`;
  };
  // In the order in which the arrow keys go through them: from cheap to costly.
  const order = points.map((_, place) => place).sort((a, b) => points[a].x - points[b].x);
  const picture = explorable(order.map((place) => marks[place]), 1, (at) => said(order[at]), `${title}, ${points.length} rows`);
  const names = placeNames(best, points.map(({ px, py }) => [px - 4, py - 4, px + 4, py + 4]));
  const xText = log ? logText : tickText(xAxis.step);
  return element(
    "figure",
    {},
    element("figcaption", {}, title),
    svg(
      "svg",
      { class: "chart", viewBox: `0 0 ${width} ${height}`, ...picture.attributes },
      frame(xAxis, yAxis, xText, tickText(yAxis.step), log ? `${unit}, logarithmic` : unit, "report, %"),
      svg("path", { class: "front", d: steps }),
      marks.filter((_, place) => !best.includes(points[place])),
      best.map((point) => marks[points.indexOf(point)]),
      names.filter(Boolean),
    ),
    picture.said,
  );
}

const logText = (value) => (value >= 1 ? grouped(value) : String(Number(value.toPrecision(1))));

// Lines of one picture; the arrow keys, or a pointer, bring one forward.
function curveChart({ run, title, x, y, percent, lines }, several) {
  const scaled = lines.map(({ name, points }) => ({ name, points: points.map(([a, b]) => [a, percent ? 100 * b : b]) }));
  const all = scaled.flatMap(({ points }) => points);
  if (all.length < 2) return null;
  const { width, height, left, right, top, bottom } = CHART;
  const xAxis = axisOf(all.map((point) => point[0]), left, width - right, { pad: 0.02 });
  const yAxis = axisOf(all.map((point) => point[1]), height - bottom, top);
  // Of a model that was scored once, at its end, there is a point and no line.
  const marks = scaled.map(({ points }) => (points.length === 1
    ? svg("circle", { class: "curve end", cx: xAxis.at(points[0][0]), cy: yAxis.at(points[0][1]), r: 4 })
    : svg("path", {
      class: "curve",
      d: points.map(([a, b], place) => `${place ? "L" : "M"}${xAxis.at(a).toFixed(1)} ${yAxis.at(b).toFixed(1)}`).join(""),
    })));
  const said = (place) => {
    const { name, points } = scaled[place];
    const last = points[points.length - 1];
    return `${name}: ${String(Number(last[1].toPrecision(4)))} at its end`;
  };
  const caption = several ? `${title} (${run})` : title;
  const picture = explorable(marks, 1, said, `${caption}, ${lines.length} line${lines.length === 1 ? "" : "s"}`);
  return element(
    "figure",
    {},
    element("figcaption", {}, caption),
    svg(
      "svg",
      { class: `chart ${lines.length === 1 ? "single" : ""}`, viewBox: `0 0 ${width} ${height}`, ...picture.attributes },
      frame(xAxis, yAxis, tickText(xAxis.step), tickText(yAxis.step), x, y),
      marks,
    ),
    picture.said,
  );
}
