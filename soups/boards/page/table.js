// The table: sorted by any column, filtered by words, with the columns that a person chooses.

const BAR = { width: 132, height: 16, margin: 5 };

class Table {
  constructor({ columns, name, groups, filter, onchoose, firstSort, baseline }) {
    Object.assign(this, { columns, groups, onchoose, baseline });
    this.shown = new Set(columns.filter((column) => column.shown).map((column) => column.key));
    this.sort = firstSort;
    this.words = [];
    this.chosen = [];
    this.rows = [];
    this.head = element("thead");
    this.body = element("table", {}, element("caption", { class: "unseen" }, name), this.head);
    this.count = element("span", { class: "count", role: "status" });
    this.node = element(
      "div",
      { class: "table" },
      element("div", { class: "tools" }, filter ? this.filterField() : null, this.columnMenu(), this.count),
      element(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": `${name}, scrolls sideways` },
        this.body,
      ),
    );
  }

  setRows(rows) {
    this.rows = rows;
    this.scales = new Map();
    this.draw();
  }

  choose(rows) {
    this.chosen = rows;
    this.draw();
  }

  filterField() {
    const input = element("input", {
      type: "search",
      "aria-label": "Filter",
      autocomplete: "off",
      spellcheck: "false",
      oninput: () => {
        this.words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
        this.draw();
      },
    });
    return element("span", { class: "field" }, "Filter ", input);
  }

  columnMenu() {
    const boxes = this.columns.map((column) => {
      const box = element("input", {
        type: "checkbox",
        checked: this.shown.has(column.key),
        disabled: column.key === "learner",
        onchange: () => {
          if (box.checked) this.shown.add(column.key);
          else this.shown.delete(column.key);
          this.draw();
        },
      });
      return element("label", { title: column.help }, box, " ", column.header);
    });
    const menu = element(
      "details",
      {
        class: "menu",
        onkeydown: (event) => {
          if (event.key !== "Escape") return;
          menu.open = false;
          menu.firstChild.focus();
        },
      },
      element("summary", {}, "Columns"),
      element("fieldset", {}, element("legend", { class: "unseen" }, "Columns that are shown"), boxes),
    );
    document.addEventListener("click", (event) => {
      if (!menu.contains(event.target)) menu.open = false;
    });
    return menu;
  }

  // What has the focus keeps it, although it is made anew.
  draw() {
    const focused = this.body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.redraw();
    if (focused) this.body.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  redraw() {
    const columns = this.columns.filter((column) => this.shown.has(column.key));
    this.drawHead(columns);
    const kept = this.rows.filter((row) => this.words.every((word) => haystack(row).includes(word)));
    const bodies = this.groups.map(({ title, has }) => this.group(title, kept.filter(has), columns));
    for (const body of [...this.body.tBodies]) body.remove();
    this.body.append(...bodies.filter(Boolean));
    this.count.textContent =
      kept.length === this.rows.length ? `${kept.length} rows` : `${kept.length} of ${this.rows.length} rows`;
  }

  drawHead(columns) {
    const cells = columns.map((column) => {
      const sorted = this.sort.key === column.key;
      const direction = this.sort.descending ? "descending" : "ascending";
      const button = element(
        "button",
        { type: "button", title: column.help, "data-key": `sort ${column.key}`, onclick: () => this.sortBy(column) },
        column.header,
      );
      return element(
        "th",
        { scope: "col", class: cellClass(column), "aria-sort": sorted ? direction : "none" },
        button,
        column.low ? this.axis(column) : null,
      );
    });
    if (this.onchoose) cells.unshift(element("th", { scope: "col", class: "pick" }, element("span", { class: "unseen" }, "compare")));
    this.head.replaceChildren(element("tr", {}, cells));
  }

  sortBy(column) {
    const first = column.better === "high";
    const descending = this.sort.key === column.key ? !this.sort.descending : first;
    this.sort = { key: column.key, descending };
    this.draw();
  }

  group(title, rows, columns) {
    if (!rows.length) return null;
    const sorted = [...rows].sort((a, b) => compare(a[this.sort.key], b[this.sort.key], this.sort.descending));
    const width = columns.length + (this.onchoose ? 1 : 0);
    const heading = title
      ? element("tr", { class: "group" }, element("th", { scope: "rowgroup", colspan: width }, title))
      : null;
    return element("tbody", {}, heading, sorted.map((row) => this.line(row, columns)));
  }

  line(row, columns) {
    const cells = columns.map((column) => this.cell(row, column));
    if (this.onchoose) cells.unshift(this.pick(row));
    return element("tr", {}, cells);
  }

  pick(row) {
    const place = this.chosen.indexOf(row);
    const box = element("input", {
      type: "checkbox",
      checked: place >= 0,
      disabled: !row.outcomes,
      "data-key": `row ${this.rows.indexOf(row)}`,
      "aria-label": `compare ${row.label}${place >= 0 ? `, it is ${"AB"[place]}` : ""}`,
      onchange: () => {
        const others = this.chosen.filter((other) => other !== row);
        this.onchoose(box.checked ? [...others, row].slice(-2) : others);
      },
    });
    const side = place < 0 ? null : element("b", { class: "ab"[place], "aria-hidden": "true" }, "AB"[place]);
    return element("td", { class: "pick" }, box, side);
  }

  cell(row, column) {
    const value = row[column.key];
    if (column.key === "learner") {
      const mark = row.standing || (row.is_baseline ? "baseline" : "");
      const notes = row.notes || null;
      return element(
        "th",
        { scope: "row", class: "learner", title: notes },
        element("span", { class: "name" }, row.learner),
        mark ? element("span", { class: `mark ${mark}` }, mark) : null,
      );
    }
    let text = written(column.kind, value);
    if (column.key === "ingredients_used" && isNumber(row.zoo_size)) text += `\u200a/\u200a${row.zoo_size}`;
    const bar = column.low && text ? this.bar(row, column) : null;
    return element("td", { class: cellClass(column) }, element("span", { class: "value" }, text), bar);
  }

  // One scale for all rows of a column, so that a filter moves nothing. References may be so far
  // from the soups that these would fall together: at most, they double the range to each side.
  scale(column) {
    if (!this.scales.has(column.key)) {
      const [low, high] = rangeOf(this.rows, (row) => [row[column.key], row[column.low], row[column.high]], zeroOf(column));
      const room = BAR.width - 2 * BAR.margin;
      const at = (value) => BAR.margin + (room * (Math.min(high, Math.max(low, value)) - low)) / (high - low || 1);
      this.scales.set(column.key, { low, high, at });
    }
    return this.scales.get(column.key);
  }

  // Where the thin line stands: at no difference, or at the baseline's own value.
  zero(column) {
    const baselines = this.rows.filter((row) => row.learner === this.baseline);
    return zeroOf(column) ?? (baselines.length === 1 ? baselines[0][column.key] : null);
  }

  axis(column) {
    const { low, high } = this.scale(column);
    if (!isNumber(low)) return null;
    const text = (value) => (value === 0 ? "0" : written(column.kind, value).replace(/(\.\d)\d$/, "$1"));
    return element("span", { class: "axis", "aria-hidden": "true" }, element("span", {}, text(low)), element("span", {}, text(high)));
  }

  bar(row, column) {
    const scale = this.scale(column);
    const { at } = scale;
    const [value, low, high] = [row[column.key], row[column.low], row[column.high]];
    const zero = this.zero(column);
    const middle = BAR.height / 2;
    const sure = column.kind !== "points" ? "" : low > 0 ? "better" : high < 0 ? "worse" : "open";
    const known = isNumber(low) && isNumber(high);
    const said = known ? `95% interval ${written(column.kind, low)} to ${written(column.kind, high)}` : "no interval";
    return svg(
      "svg",
      { class: `bar ${row.kind ?? ""} ${sure}`, width: BAR.width, height: BAR.height, role: "img", "aria-label": said },
      svg("title", {}, said),
      isNumber(zero) ? svg("line", { class: "zero", x1: at(zero), x2: at(zero), y1: 0, y2: BAR.height }) : null,
      known ? svg("line", { class: "range", x1: at(low), x2: at(high), y1: middle, y2: middle }) : null,
      value < scale.low || value > scale.high
        ? beyond(at(value), middle, value < scale.low ? -1 : 1)
        : svg("circle", { cx: at(value), cy: middle, r: 3.5 }),
    );
  }
}

const zeroOf = (column) => (column.kind === "points" ? 0 : null);

// The ends of a scale for what `values` takes of each row, and `zero`.
function rangeOf(rows, values, zero = null) {
  const of = (some) => some.flatMap(values).concat(zero ?? []).filter(isNumber);
  const ends = (numbers) => [Math.min(...numbers), Math.max(...numbers)];
  const soups = of(rows.filter((row) => row.kind !== "reference"));
  const [low, high] = ends(of(rows));
  if (!soups.length) return [low, high];
  const [from, to] = ends(soups);
  return [Math.max(low, 2 * from - to), Math.min(high, 2 * to - from)];
}

// A mark for what lies outside of the scale.
const beyond = (x, y, side) => svg("path", { class: "beyond", d: `M${x - side * 3} ${y - 4}l${side * 6} 4l${-side * 6} 4z` });

const haystack = (row) =>
  [row.run, row.learner, row.kind, row.standing, row.notes].filter(Boolean).join(" ").toLowerCase();

const cellClass = (column) => (column.kind === "text" ? "text" : column.low ? "number with-bar" : "number");

// What is not there comes last, whichever way the rest is sorted.
function compare(a, b, descending) {
  const missing = (value) => value === null || value === undefined || value === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return descending ? -order : order;
}
