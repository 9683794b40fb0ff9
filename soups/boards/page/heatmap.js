// Coefficients, ingredient by group of tensors: bare paper is an equal share, 1/K, blue is more,
// orange less; the darkest 2% may all look the same.

const CELL = { height: 15, gap: 1, most: 26, least: 4, label: 64, below: 6 };

class HeatMaps {
  constructor(maps, several) {
    this.maps = maps;
    this.place = element("div", { class: "heat" });
    const options = maps.map((map, place) => [String(place), several ? `${map.learner} of ${map.run}` : map.learner]);
    // What says most comes first: a map rather than a column.
    const first = maps.reduce((best, map, place) => (map.groups.length > maps[best].groups.length ? place : best), 0);
    const { field } = choice("Learner", options, String(first), (value) => this.show(Number(value)));
    this.node = element("section", { class: "part" }, element("h3", {}, "Coefficients"), element("div", { class: "tools" }, field), this.place);
    this.show(first);
  }

  show(which) {
    const map = this.maps[which];
    this.place.replaceChildren(...(map.groups.length === 1 ? this.bars(map) : this.map(map)));
  }

  map({ learner, ingredients, groups, matrix, uniform }) {
    const reach = this.reach(matrix, uniform);
    const across = groups.length;
    const cell = Math.max(CELL.least, Math.min(CELL.most, Math.floor(940 / across)));
    const marks = matrix.flatMap((line, row) => line.map((value, column) => svg("rect", {
      class: value < uniform ? "less" : "more",
      x: CELL.label + column * cell,
      y: row * CELL.height,
      width: cell - CELL.gap,
      height: CELL.height - CELL.gap,
      "fill-opacity": Math.min(1, Math.abs(value - uniform) / reach).toFixed(3),
    })));
    const describe = (at) => {
      const [row, column] = [Math.floor(at / across), at % across];
      return `${ingredients[row]}, ${groups[column]}: ${fixed(matrix[row][column], 3)}`;
    };
    const width = CELL.label + across * cell;
    const below = ingredients.length * CELL.height + 12;
    const height = below + CELL.below;
    const label = `Coefficients of ${learner}, ${ingredients.length} rows by ${across} groups`;
    const picture = explorable(marks, across, describe, label);
    return [
      element("div", { class: "scroll" }, svg(
        "svg",
        { class: "map", width, height, viewBox: `0 0 ${width} ${height}`, ...picture.attributes },
        ingredients.map((name, row) => svg("text", { class: "tick", x: CELL.label - 8, y: row * CELL.height + 11, "text-anchor": "end" }, elided(name, 9))),
        marks,
        svg("text", { class: "tick", x: CELL.label, y: below }, groups[0]),
        svg("text", { class: "tick", x: width, y: below, "text-anchor": "end" }, `${groups[across - 1]}`),
      )),
      picture.said,
      this.key(uniform, reach),
    ];
  }

  bars({ learner, ingredients, matrix, uniform }) {
    const values = matrix.map((line) => line[0]);
    const [low, high] = [Math.min(0, ...values), Math.max(uniform, ...values)];
    const width = 360;
    const at = (value) => CELL.label + ((width - CELL.label - 60) * (value - low)) / (high - low || 1);
    const height = ingredients.length * 18 + 4;
    const label = `Coefficients of ${learner}, one for each of ${ingredients.length} ingredients`;
    return [
      svg(
        "svg",
        { class: "map bars", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
        svg("line", { class: "zero", x1: at(uniform), x2: at(uniform), y1: 0, y2: height }),
        values.map((value, row) => [
          svg("text", { class: "tick", x: CELL.label - 8, y: row * 18 + 13, "text-anchor": "end" }, elided(ingredients[row], 9)),
          svg("rect", { class: value < 0 ? "less" : "more", x: Math.min(at(0), at(value)), y: row * 18 + 3, width: Math.abs(at(value) - at(0)), height: 12 }),
          svg("text", { class: "tick value", x: Math.max(at(0), at(value)) + 6, y: row * 18 + 13 }, fixed(value, 3)),
        ]).flat(),
      ),
      element("p", { class: "quiet" }, `dashed: an equal share, 1/K = ${fixed(uniform, 3)}`),
    ];
  }

  // How far from 1/K the full colour is: where 98% of the cells are nearer.
  reach(matrix, uniform) {
    const apart = matrix.flat().map((value) => Math.abs(value - uniform)).sort((a, b) => a - b);
    return Math.max(apart[Math.floor(0.98 * (apart.length - 1))], 0.1 * uniform);
  }

  key(uniform, reach) {
    const part = (side, k) => svg("rect", { class: side, x: (side === "less" ? 4 - k : 5 + k) * 18, y: 0, width: 17, height: 10, "fill-opacity": k / 4 });
    return element(
      "p",
      { class: "key quiet" },
      fixed(uniform - reach, 3),
      svg("svg", { width: 180, height: 10, "aria-hidden": "true" }, [0, 1, 2, 3, 4].flatMap((k) => [part("less", k), part("more", k)])),
      `${fixed(uniform + reach, 3)}; in the middle an equal share, 1/K = ${fixed(uniform, 3)}`,
    );
  }
}

// What tells names apart is more often at their end.
const elided = (text, most) => (text.length > most ? `\u2026${text.slice(1 - most)}` : text);
