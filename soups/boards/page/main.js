// Fills the sections that the page comes with from the data that stands below them.

const data = JSON.parse(document.getElementById("data").textContent);

const GROUPS = [
  { title: null, has: (row) => row.kind !== "reference" },
  { title: "References: not soups", has: (row) => row.kind === "reference" },
];

function taskSection(task, place) {
  for (const row of task.rows) row.label = task.several ? `${row.learner} of ${row.run}` : row.learner;
  const comparison = new Comparison(task, (chosen) => choose(chosen));
  const table = new Table({
    columns: task.columns,
    name: `Leaderboard of ${task.name}`,
    filter: true,
    firstSort: { key: "report_accuracy", descending: true },
    groups: GROUPS,
    onchoose: comparison.fields ? (chosen) => choose(chosen) : null,
    baseline: task.baseline,
  });
  const choose = (chosen) => {
    table.choose(chosen);
    comparison.show(chosen);
  };
  table.setRows(task.rows);
  if (comparison.fields) choose(firstPair(comparison.rows, task.baseline));
  place.append(table.node, legend(task), comparison.node, ...charts(task), about(task));
}

// The best row and what it is measured against, or else the next one.
function firstPair(rows, baseline) {
  const best = rows.find((row) => row.standing === "best") ?? rows[0];
  const against = rows.find((row) => row !== best && row.run === best.run && row.learner === baseline);
  return [best, against ?? rows.find((row) => row !== best)];
}

function legend(task) {
  const parts = ["Dots are the measured values and lines 95% intervals."];
  if (task.baseline) parts.push("In differences the whole interval is above zero where it is blue, below where it is orange; it is not corrected for the number of rows, as the column p is.");
  if (task.rows.some((row) => row.standing === "tied")) {
    parts.push("Tied: not told from the best by McNemar's exact test on the same images, corrected by Holm.");
  }
  return element("p", { class: "quiet legend" }, parts.join(" "));
}

function charts(task) {
  const found = [];
  const costs = costCharts(task.rows);
  if (costs.length) {
    found.push(element(
      "section",
      { class: "part" },
      element("h3", {}, "Accuracy against cost"),
      element("p", { class: "quiet" }, "The line is the Pareto front of the soups: no other soup is as accurate for less. Grey marks are references. Cost is of choosing or learning; a soup runs as fast as one ingredient."),
      element("div", { class: "figures" }, costs),
    ));
  }
  if (task.heatmaps.length) found.push(new HeatMaps(task.heatmaps, task.several).node);
  const curves = task.curves.map((curve) => curveChart(curve, task.several)).filter(Boolean);
  if (curves.length) {
    found.push(element("section", { class: "part" }, element("h3", {}, "Curves"), element("div", { class: "figures" }, curves)));
  }
  return found;
}

function costCharts(rows) {
  const bytes = rows.map((row) => row.peak_bytes).filter((value) => value > 0);
  const unit = Math.max(...bytes) < 2 ** 30 ? ["MiB", 2 ** 20] : ["GiB", 2 ** 30];
  const log = Math.max(...bytes) > 20 * Math.min(...bytes);
  return [
    costChart({ title: "Accuracy against seconds", rows, key: "seconds", kind: "seconds", unit: "seconds", scale: 1, log: true }),
    costChart({ title: "Accuracy against memory", rows, key: "peak_bytes", kind: "bytes", unit: `peak memory, ${unit[0]}`, scale: unit[1], log }),
  ].filter(Boolean);
}

function about(task) {
  const notes = task.rows.filter((row) => row.notes).map((row) => element("li", {}, element("b", {}, row.label), `: ${row.notes}`));
  const runs = task.runs.map((run) => element("li", {}, element("b", {}, run.name), `: ${describeRun(run)}`));
  return element(
    "details",
    { class: "part about" },
    element("summary", {}, "Notes, and what was run"),
    notes.length ? element("ul", {}, notes) : null,
    element("ul", {}, runs),
  );
}

const describeRun = (run) =>
  [run.folder, `seed ${run.seed}`, run.device, run.started, run.commit ? `commit ${run.commit.slice(0, 12)}` : ""].filter(Boolean).join(", ");

function sweepSection(sweep, place) {
  for (const row of sweep.rows) row.label = row.learner;
  const table = new Table({
    columns: sweep.columns,
    name: `Comparisons of ${sweep.name}`,
    filter: false,
    firstSort: { key: "difference", descending: true },
    groups: GROUPS,
    onchoose: null,
  });
  const costs = element("div", { class: "figures part" });
  const chosen = Object.fromEntries(sweep.keys.map(({ column, values, all }) => [column, values.includes(all) ? all : values[0]]));
  const show = () => {
    const rows = sweep.rows.filter((row) => sweep.keys.every(({ column }) => row[column] === chosen[column]));
    table.setRows(rows);
    costs.replaceChildren(...costCharts(rows));
  };
  const fields = sweep.keys.map(({ column, values }) => choice(column, values.map((value) => [value, value]), chosen[column], (value) => {
    chosen[column] = value;
    show();
  }).field);
  table.node.querySelector(".tools").prepend(...fields);
  show();
  place.append(table.node, costs);
}

function themeButton() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const say = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Light theme" : "Dark theme");
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    say();
  });
  system.addEventListener("change", say);
  say();
}

themeButton();
for (const place of document.querySelectorAll("[data-task]")) taskSection(data.tasks[Number(place.dataset.task)], place);
for (const place of document.querySelectorAll("[data-sweep]")) sweepSection(data.sweeps[Number(place.dataset.sweep)], place);
